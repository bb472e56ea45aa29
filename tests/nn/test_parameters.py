"""A layer's parameters: names, shapes, first values, copies and changes, as torch.nn has them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import flashrnn.nn as ours
from tests.nn.against import (
    assert_like_torch,
    assert_same,
    both_paths,
    corners,
    every_kind,
    own,
    pair,
    random,
)


class TestWeights:
    @every_kind
    def test_names_shapes_order_and_numbers_are_torchs(self, kind):
        for chosen in corners(kind):
            made = []
            for module in (ours, nn):
                torch.manual_seed(3)
                made.append(getattr(module, kind)(4, 5, 2, **chosen))
            mine, theirs = (dict(layer.named_parameters()) for layer in made)
            assert list(mine) == list(theirs)
            for name, weight in theirs.items():
                assert torch.equal(mine[name], weight)
            assert [[weight.shape for weight in row] for row in made[0].all_weights] == [
                [weight.shape for weight in row] for row in made[1].all_weights
            ]

    @every_kind
    def test_state_dicts_load_both_ways(self, kind):
        mine = getattr(ours, kind)(5, 7, 2, bidirectional=True)
        theirs = getattr(nn, kind)(5, 7, 2, bidirectional=True)
        x = torch.randn(4, 3, 5)
        theirs.load_state_dict(mine.state_dict())
        assert_same(mine(x), theirs(x), 1e-6)
        meta = getattr(ours, kind)(5, 7, 2, bidirectional=True, device="meta")
        assert all(weight.is_meta for weight in meta.parameters())
        meta.load_state_dict(theirs.state_dict(), assign=True)
        assert_same(meta(x), theirs(x), 1e-6)

    @every_kind
    @both_paths
    def test_changes_count_in_the_next_call(self, kind, backend):
        mine, theirs = pair(kind, 4, 5, 2, backend=backend)
        x = random(3, 2, 4)
        mine(x)
        value = random(*theirs.weight_ih_l1.shape)
        for layer in (mine, theirs):
            layer.weight_hh_l0.data.fill_(0.1)
            layer.weight_ih_l1 = nn.Parameter(value.clone())
        assert_same(mine(x), theirs(x))
        for layer in (mine, theirs):
            layer.weight_hh_l1 = layer.weight_hh_l0  # Tied.
        assert_like_torch(mine, theirs, x)
        kept = mine.weight_hh_l0
        del mine.weight_hh_l0
        mine.to(torch.float64)
        mine.weight_hh_l0 = kept
        assert_same(mine(x), theirs(x))

    @every_kind
    @both_paths
    def test_no_two_gradients_share_memory(self, kind, backend):
        """Or clipping would scale both at once, twice."""
        for chosen in corners(kind):
            mine, theirs = pair(kind, 4, 5, 2, backend=backend, **chosen)
            x = random(3, 2, 4)
            for layer in (mine, theirs):
                layer(x)[0].sum().backward()
                nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
            memory = {weight.grad.untyped_storage().data_ptr() for weight in mine.parameters()}
            assert len(memory) == len(list(mine.parameters()))
            assert_same(
                [weight.grad for weight in mine.parameters()],
                [weight.grad for weight in theirs.parameters()],
            )

    @every_kind
    def test_conversions(self, kind):
        mine, theirs = pair(kind, 5, 6, 2, dtype=torch.float32)
        for convert in ("double", "half", "bfloat16", "float"):
            assert getattr(mine, convert)() is mine
            assert mine.flatten_parameters() is None
            assert mine._flat_weights[0] is mine.weight_ih_l0
        theirs.load_state_dict(mine.state_dict())
        mine.share_memory()
        x = torch.randn(4, 3, 5)
        assert_same(mine(x), theirs(x), 1e-6)

    @every_kind
    @both_paths
    def test_copies_stand_alone(self, kind, backend):
        mine, _ = pair(kind, 5, 6, 2, bidirectional=True, backend=backend)
        x = random(4, 3, 5)
        expected = mine(x)
        file = io.BytesIO()
        torch.save(mine, file)
        file.seek(0)
        for twin in (
            copy.deepcopy(mine),
            pickle.loads(pickle.dumps(mine)),
            torch.load(file, weights_only=False),
        ):
            assert_same(twin(x), expected, 0)
            with torch.no_grad():
                twin.weight_hh_l0.add_(1)
            assert_same(mine(x), expected, 0)
            assert not torch.equal(twin(x)[0], expected[0])

    @every_kind
    @both_paths
    def test_weights_that_are_computed(self, kind, backend):
        x = random(4, 3, 5)
        mine, theirs = pair(kind, 5, 6, backend=backend)
        for layer in (mine, theirs):
            parametrizations.weight_norm(layer, "weight_hh_l0")
            with torch.no_grad():
                layer.parametrizations.weight_hh_l0.original0.mul_(2)
        assert_same(mine(x), theirs(x))
        mine, theirs = pair(kind, 5, 6, backend=backend)
        for layer in (mine, theirs):
            prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
        assert_same(mine(x), theirs(x))
        mine, theirs = pair(kind, 5, 6, backend=backend)
        other = {name: weight.detach() + 0.1 for name, weight in theirs.named_parameters()}
        before = mine(x)
        assert_same(
            torch.func.functional_call(mine, other, (x,)),
            torch.func.functional_call(theirs, other, (x,)),
        )
        assert_same(mine(x), before, 0)

    def test_own_cells_have_one_bias_that_holds_all_that_is_learned(self):
        layer = ours.Recurrent(own, 3, 8, heads=2)
        assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
            "weight_ih_l0": (16, 3),
            "weight_hh_l0": (8, 4),
            "bias_l0": (24,),
        }


class TestForgetBias:
    @pytest.mark.parametrize(
        ("layer", "gate"),
        [
            (lambda **o: ours.LSTM(3, 4, 2, bidirectional=True, **o), 1),
            (lambda **o: ours.Recurrent("slstm", 3, 4, 2, heads=2, **o), 1),
        ],
    )
    def test_the_gate_begins_with_it_and_all_else_with_torchs_numbers(self, layer, gate):
        torch.manual_seed(0)
        plain = layer()
        torch.manual_seed(0)
        given = layer(forget_bias=2.0)
        assert repr(given) == repr(plain)[:-1] + ", forget_bias=2.0)"
        found = 0
        for names in given._all_weights:
            total = torch.zeros(4)
            for name in names:
                mine, theirs = getattr(given, name).detach(), getattr(plain, name).detach()
                if name.startswith("bias_"):
                    total += mine[4 * gate : 4 * gate + 4]
                    mine, theirs = (x.unflatten(0, (4, 4))[[0, 2, 3]] for x in (mine, theirs))
                assert torch.equal(mine, theirs)
            assert torch.equal(total, torch.full((4,), 2.0))
            found += 1
        assert found == given.num_layers * (1 + given.bidirectional)

    def test_what_has_no_such_bias(self):
        with pytest.raises(ValueError, match="gates g, r, z, n; accepted is None"):
            ours.Recurrent("gru", 3, 4, forget_bias=1.0)
        with pytest.raises(ValueError, match="gates none; accepted is None"):
            ours.LSTM(3, 4, bias=False, forget_bias=1.0)
