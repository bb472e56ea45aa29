"""LSTM, GRU and RNN stand wherever torch.nn's stood."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import flashrnn.nn as ours
from flashrnn import cell, problem
from flashrnn.nn import scan
from tests.nn.against import (
    BACKENDS,
    KINDS,
    assert_like_torch,
    assert_same,
    options,
    pair,
    run,
    states,
    tensors,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
both_paths = pytest.mark.parametrize("backend", BACKENDS)
few = settings(max_examples=15, deadline=None)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def corners(kind: str) -> list[dict[str, object]]:
    """Constructors' options, each with each, of two layers."""
    axes: dict[str, tuple[object, ...]] = {
        "bias": (True, False),
        "batch_first": (False, True),
        "bidirectional": (False, True),
    }
    if kind == "LSTM":
        axes["proj_size"] = (0, 3)
    if kind == "RNN":
        axes["nonlinearity"] = ("tanh", "relu")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


class TestResults:
    """Outputs, states and every gradient, in float64 to 1e-10."""

    @every_kind
    @both_paths
    @few
    @given(st.data())
    def test_batches(self, kind, backend, data):
        T, B, size, H = (data.draw(st.integers(1, most)) for most in (6, 4, 4, 6))
        chosen = data.draw(options(kind))
        torch.manual_seed(data.draw(st.integers(0, 99)))
        mine, theirs = pair(kind, size, H + 2, backend=backend, **chosen)
        x = random(B, T, size) if chosen["batch_first"] else random(T, B, size)
        hx = states(mine, B) if data.draw(st.booleans()) else None
        assert_like_torch(mine, theirs, x, hx)

    @every_kind
    @both_paths
    @few
    @given(st.data())
    def test_packed_sequences(self, kind, backend, data):
        lengths = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
        size, H = data.draw(st.integers(1, 4)), data.draw(st.integers(3, 6))
        chosen = data.draw(options(kind))
        torch.manual_seed(data.draw(st.integers(0, 99)))
        mine, theirs = pair(kind, size, H, backend=backend, **chosen)
        B, T = len(lengths), int(lengths.max())
        x = random(B, T, size) if chosen["batch_first"] else random(T, B, size)
        hx = states(mine, B) if data.draw(st.booleans()) else None
        assert_like_torch(mine, theirs, x, hx, lengths)

    @every_kind
    @both_paths
    def test_one_sequence_without_a_batch(self, kind, backend):
        for chosen in corners(kind):
            mine, theirs = pair(kind, 5, 6, 2, backend=backend, **chosen)
            assert_like_torch(mine, theirs, random(4, 5), states(mine))

    @every_kind
    @both_paths
    def test_float32(self, kind, backend):
        mine, theirs = pair(
            kind, 8, 16, 2, bidirectional=True, backend=backend, dtype=torch.float32
        )
        assert_same(mine(torch.ones(9, 3, 8)), theirs(torch.ones(9, 3, 8)), 1e-6)

    @every_kind
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bits(self, kind, dtype):
        mine, theirs = pair(kind, 8, 16, 2, bidirectional=True, dtype=dtype, backend="vanilla")
        x = torch.randn(9, 3, 8).to(dtype)
        assert_same(mine(x), theirs(x), 2e-2)
        mine(x)[0].float().sum().backward()
        assert {weight.grad.dtype for weight in mine.parameters()} == {dtype}

    @every_kind
    @both_paths
    def test_any_strides(self, kind, backend):
        mine, theirs = pair(kind, 5, 6, 2, batch_first=True, backend=backend)
        hx = tuple(random(3, 6, 2).permute(2, 0, 1) for _ in range(2))
        hx = hx if kind == "LSTM" else hx[0]
        x = random(5, 4, 3).permute(2, 1, 0)
        assert_same(mine(x, hx), theirs(x, hx))
        x = random(1, 1, 5).expand(3, 4, 5)
        assert_same(mine(x), theirs(x))

    @every_kind
    @both_paths
    def test_memory_is_laid_out_as_torchs(self, kind, backend):
        """Programs call .view() on both results, as torch's documentation shows."""
        for chosen in corners(kind):
            mine, theirs = pair(kind, 5, 6, 2, backend=backend, **chosen)
            for x in (random(4, 3, 5), random(4, 5)):
                for given_, expected in zip(tensors(mine(x)), tensors(theirs(x)), strict=True):
                    assert given_.is_contiguous() or not expected.is_contiguous()

    @every_kind
    @both_paths
    def test_results_share_no_memory_with_arguments(self, kind, backend):
        mine, _ = pair(kind, 5, 6, backend=backend)
        x, hx = random(4, 3, 5), states(mine, 3)
        kept = [tensor.clone() for tensor in (x, *tensors(hx))]
        with torch.no_grad():
            for tensor in tensors(mine(x, hx)):
                tensor.add_(1)
        assert_same([x, hx], kept, 0)

    @every_kind
    @both_paths
    def test_states_continue_a_sequence(self, kind, backend):
        mine, _ = pair(kind, 5, 6, 2, backend=backend)
        x, hx, parts = random(8, 3, 5), None, []
        for piece in x.split([3, 1, 4]):
            output, hx = mine(piece, hx)
            parts.append(output)
        assert_same((torch.cat(parts), hx), mine(x))

    @every_kind
    @both_paths
    def test_an_empty_batch(self, kind, backend):
        mine, theirs = pair(kind, 5, 6, 2, bidirectional=True, backend=backend)
        assert_same(mine(random(4, 0, 5)), theirs(random(4, 0, 5)))


class TestPackedSequences:
    """What lies beyond a sequence's end is not there."""

    @every_kind
    @both_paths
    def test_fields_and_order_are_kept(self, kind, backend):
        mine, theirs = pair(kind, 3, 4, 2, bidirectional=True, backend=backend)
        hx = states(mine, 3)
        for x in (
            pack_sequence([random(n, 3) for n in (4, 2, 2)]),
            pack_sequence([random(n, 3) for n in (2, 4, 1)], enforce_sorted=False),
        ):
            (mine_out, mine_last), (out, last) = mine(x, hx), theirs(x, hx)
            assert torch.equal(mine_out.batch_sizes, out.batch_sizes)
            for field in ("sorted_indices", "unsorted_indices"):
                given_, expected = getattr(mine_out, field), getattr(out, field)
                assert given_ is expected is None or torch.equal(given_, expected)
            assert_same((mine_out, mine_last), (out, last))

    @both_paths
    def test_padding_may_be_nan(self, backend):
        layer = ours.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64, backend=backend)
        x = random(5, 3, 3)
        lengths = torch.tensor([5, 1, 3])
        for b, length in enumerate(lengths):
            x[length:, b] = torch.nan
        (output, last), gradients = run(layer, x, None, lengths)
        assert all(torch.isfinite(tensor).all() for tensor in tensors((output, last)))
        for b, length in enumerate(lengths):
            assert not gradients[0][length:, b].any()
        assert all(torch.isfinite(gradient).all() for gradient in gradients[1:])

    def test_a_recurrence_that_explodes_does_so_at_steps_alone(self):
        """After the end of the short sequence nothing overflows, whose gradient would be NaN."""
        layer = ours.RNN(1, 2, nonlinearity="relu", dtype=torch.float64, backend="vanilla")
        with torch.no_grad():
            layer.weight_hh_l0.fill_(1e100)
        x = pack_sequence([torch.ones(2, 1).double(), torch.ones(1, 1).double()])
        layer(x)[0].data.sum().backward()
        assert all(torch.isfinite(weight.grad).all() for weight in layer.parameters())
        long = pack_sequence([torch.zeros(30, 1).double(), torch.ones(1, 1).double()])
        with torch.no_grad():
            layer.bias_ih_l0.zero_()
            layer.bias_hh_l0.zero_()
        layer.zero_grad()
        layer(long)[0].data.sum().backward()
        assert all(torch.isfinite(weight.grad).all() for weight in layer.parameters())


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


class TestDropout:
    @every_kind
    @both_paths
    @pytest.mark.parametrize("packed", [False, True])
    def test_it_draws_torchs_numbers(self, kind, backend, packed):
        mine, theirs = pair(kind, 5, 6, 3, dropout=0.5, bidirectional=True, backend=backend)
        x = random(4, 3, 5)
        if packed:
            x = pack_padded_sequence(x, torch.tensor([4, 1, 2]), enforce_sorted=False)
        results = []
        for layer in (mine, theirs):
            torch.manual_seed(1)
            results.append(layer(x))
        assert_same(*results)
        assert_same(mine.eval()(x), theirs.eval()(x))

    @every_kind
    @both_paths
    def test_all_of_a_layer(self, kind, backend):
        mine, theirs = pair(kind, 5, 6, 2, dropout=1.0, backend=backend)
        x = random(4, 3, 5)
        assert_same(mine(x), theirs(x))

    @every_kind
    def test_one_layer_is_warned_of(self, kind):
        with pytest.warns(UserWarning, match="dropout=0.5 with num_layers=1"):
            layer = getattr(ours, kind)(5, 6, dropout=0.5)
        x = torch.randn(4, 3, 5)
        assert_same(layer(x), layer.eval()(x), 0)


class TestErrors:
    """Of the types that torch.nn raises."""

    @every_kind
    @pytest.mark.parametrize(
        ("args", "options"),
        [
            ((10, 0), {}),
            ((10, 5, 0), {}),
            ((0, 5), {}),
            ((10.0, 5), {}),
            ((10, "5"), {}),
            ((10,), {}),
            ((10, 5), {"dropout": 1.5}),
            ((10, 5), {"dropout": True}),
            ((10, 5), {"dropout": "a"}),
            ((10, 5), {"bias": 0}),
            ((10, 5), {"batch_first": 1}),
            ((10, 5), {"no_such_option": 1}),
            ((10, 5), {"proj_size": 5}),
            ((10, 5), {"proj_size": -1}),
        ],
    )
    def test_of_arguments(self, kind, args, options):
        expected = (TypeError, ValueError)
        try:
            getattr(nn, kind)(*args, **options)
        except Exception as error:
            expected = type(error)
        else:
            # Sizes of 0, and anything for a bool, were taken once.
            assert torch.__version__ < "2.13"
        with pytest.raises(expected):
            getattr(ours, kind)(*args, **options)

    def test_of_arguments_that_are_ours(self):
        with pytest.raises(ValueError, match=r"unknown backend 'vanila'\. Did you mean 'vanilla'"):
            ours.LSTM(3, 4, backend="vanila")
        with pytest.raises(ValueError, match="4 units in 3 heads"):
            ours.LSTM(3, 4, heads=3)
        with pytest.raises(ValueError, match="one head"):
            ours.LSTM(3, 4, heads=2, proj_size=2)
        with pytest.raises(ValueError, match="'gelu'; accepted are 'tanh' and 'relu'"):
            ours.RNN(3, 4, nonlinearity="gelu")
        with pytest.raises(ValueError, match="unknown function 'lstn'"):
            ours.Recurrent("lstn", 3, 4)

    @every_kind
    @both_paths
    def test_of_calls(self, kind, backend):
        mine, theirs = pair(kind, 5, 6, 2, bidirectional=True, backend=backend)

        def hx(*shape):
            return (random(*shape), random(*shape)) if kind == "LSTM" else random(*shape)

        calls = {
            "1-D input": (random(5),),
            "4-D input": (random(2, 4, 3, 5),),
            "another input_size": (random(4, 3, 7),),
            "no steps": (random(0, 3, 5),),
            "hx of another batch": (random(4, 2, 5), hx(4, 3, 6)),
            "hx of too few layers": (random(4, 3, 5), hx(2, 3, 6)),
            "hx of another size": (random(4, 3, 5), hx(4, 3, 7)),
            "3-D hx beside 2-D input": (random(4, 5), hx(4, 3, 6)),
            "2-D hx beside 3-D input": (random(4, 3, 5), hx(4, 6)),
            "another dtype": (random(4, 3, 5).float(),),
            "packed, another input_size": (pack_sequence([random(3, 7)]),),
            "packed, another batch": (pack_sequence([random(3, 5)]), hx(4, 3, 6)),
        }
        for args in calls.values():
            with pytest.raises(Exception) as expected:  # noqa: PT011
                theirs(*args)
            with pytest.raises(expected.type):
                mine(*args)

    def test_hx_that_is_no_tuple(self):
        layer = ours.LSTM(5, 6)
        with pytest.raises(
            TypeError, match=r"hx is Tensor; accepted is a tuple of tensors, \(h, c"
        ):
            layer(torch.randn(4, 3, 5), torch.randn(1, 3, 6))
        with pytest.raises(TypeError, match="accepted is one tensor, h"):
            ours.GRU(5, 6)(torch.randn(4, 3, 5), (torch.randn(1, 3, 6),))


class Cudnn:
    """torch.backends.cudnn as it was before it had a setting for RNNs."""

    def __init__(self, allow_tf32):
        self.allow_tf32 = allow_tf32


class TestMachinery:
    @every_kind
    def test_printed_form_and_arguments_by_position(self, kind):
        args = (5, 7, 2, False, True, 0.5, True)
        if kind == "RNN":
            args = (5, 7, 2, "relu", False, True, 0.5, True)
        if kind == "LSTM":
            args = (*args, 3)
        mine, theirs = getattr(ours, kind)(*args), getattr(nn, kind)(*args)
        assert repr(mine) == repr(theirs)
        assert isinstance(mine, getattr(nn, kind))
        assert "heads=2, backend='vanilla'" in repr(ours.LSTM(2, 4, heads=2, backend="vanilla"))
        assert repr(ours.Recurrent("slstm", 2, 4)) == "Recurrent('slstm', 2, 4)"

    @every_kind
    @both_paths
    def test_second_derivatives(self, kind, backend):
        mine, _ = pair(kind, 2, 3, backend=backend)
        arguments = [
            tensor.requires_grad_() for tensor in (random(3, 2, 2), *tensors(states(mine, 2)))
        ]

        def run_(x, *hx):
            return tuple(tensors(mine(x, hx if kind == "LSTM" else hx[0])))

        assert torch.autograd.gradcheck(run_, arguments)
        assert torch.autograd.gradgradcheck(run_, arguments)

    @every_kind
    def test_one_graph_without_the_types(self, kind):
        """PyTorch compiles no instance of torch.nn's classes with fullgraph=True."""
        name = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[kind]
        layer = ours.Recurrent(name, 3, 4, bidirectional=True, batch_first=True)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 3, 3)
        mine, gradients = run(layer, x)
        given_, their_gradients = run(compiled, x)
        assert_same(mine, given_, 1e-6)
        assert_same(gradients, their_gradients, 1e-5)

    # Dynamo's, of a tensor that it resumes with; it means to hide it.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @every_kind
    def test_compiled_with_a_break_in_the_graph(self, kind, monkeypatch):
        """What is not in the graph is computed as it is without one, by PyTorch's kernels."""
        layer = nn.Sequential(nn.Linear(3, 3), getattr(ours, kind)(3, 4))
        torch._dynamo.reset()
        x = torch.randn(5, 2, 3)
        expected = layer(x)
        monkeypatch.delattr(ours.Recurrent, "_run_ours")
        assert_same(torch.compile(layer, backend="aot_eager")(x), expected, 1e-6)

    @every_kind
    @both_paths
    def test_exported(self, kind, backend):
        mine, _ = pair(kind, 5, 6, 2, backend=backend, dtype=torch.float32)
        x = torch.randn(4, 3, 5)
        program = torch.export.export(mine.eval(), (x,))
        assert_same(program.module()(x), mine(x), 1e-6)

    @every_kind
    def test_an_ensemble_by_vmap(self, kind):
        """PyTorch's own kernels have none."""
        models = [pair(kind, 5, 6)[0] for _ in range(2)]
        weights, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        x = random(4, 3, 5)

        def one(weights, buffers):
            return torch.func.functional_call(base, (weights, buffers), (x,))

        outputs, _ = torch.vmap(one)(weights, buffers)
        assert_same(list(outputs), [model(x)[0] for model in models])

    @every_kind
    @both_paths
    def test_autocast(self, kind, backend):
        mine, theirs = pair(kind, 8, 16, 2, backend=backend, dtype=torch.float32)
        x, hx = torch.randn(9, 3, 8), states(mine, 3)
        with torch.autocast("cpu", torch.bfloat16):
            given_, expected = tensors(mine(x, hx)), tensors(theirs(x, hx))
            loss = mine(x)[0].float().sum()
        for a, e in zip(given_, expected, strict=True):
            torch.testing.assert_close(a.float(), e.float(), rtol=4e-2, atol=4e-2)
        loss.backward()
        assert all(weight.grad.dtype == torch.float32 for weight in mine.parameters())

    def test_float32_on_a_gpu_follows_the_setting_of_torchs_layers(self, monkeypatch):
        gpu = torch.device("cuda")
        cudnn = torch.backends.cudnn
        before = cudnn.rnn.fp32_precision
        try:
            for precision, allowed in (("tf32", True), ("ieee", False)):
                cudnn.rnn.fp32_precision = precision
                assert scan.config_on(gpu).allow_tf32 is allowed
        finally:
            cudnn.rnn.fp32_precision = before
        for allowed in (False, True):  # PyTorch without that setting.
            monkeypatch.setattr(problem.torch.backends, "cudnn", Cudnn(allowed))
            assert scan.config_on(gpu).allow_tf32 is allowed
        assert scan.config_on(torch.device("cpu")) is None

    @every_kind
    @both_paths
    def test_another_default_device(self, kind, backend):
        """As a program has it that sets it to its GPU: what is given says where a call computes."""
        layer = getattr(ours, kind)(5, 6, bidirectional=True, backend=backend)
        x, bounds = torch.randn(4, 3, 5), torch.tensor([0, 5, 5, 12])
        reset = torch.eye(4, 3).bool()
        packed = pack_padded_sequence(x, torch.tensor([4, 2, 3]), enforce_sorted=False)

        def results():
            rows = layer(x.flatten(0, 1), cu_seqlens=bounds)
            return [layer(packed)[0].data, layer(x, reset=reset)[0], rows[0], layer(x)[0]]

        expected = results()
        try:
            torch.set_default_device("meta")
            given = results()
        finally:
            torch.set_default_device("cpu")
            torch.set_default_device(None)
        assert all(map(torch.equal, given, expected))

    @every_kind
    def test_hooks_and_training_mode(self, kind):
        layer = getattr(ours, kind)(5, 6)
        seen = []
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer(torch.randn(4, 3, 5).requires_grad_())[0].sum().backward()
        assert seen == ["forward", "backward"]
        assert layer.train() is layer and not layer.eval().training

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted(self):
        """As torch.nn's layer with the same weights."""

        class Holder(nn.Module):
            def __init__(self, rnn):
                super().__init__()
                self.rnn = rnn

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.rnn(x)[0]

        layer = ours.LSTM(5, 6)
        x = torch.randn(4, 3, 5)
        assert_same(torch.jit.script(Holder(layer))(x), layer(x)[0], 1e-6)


@cell(states=("h", "c"), gates={"z": ("Wx", "b"), "f": ("Wx", "R", "b"), "p": ("b",)})
def own(states, gates):
    """Gates that not all sources feed, one of them by a bias alone."""
    _, c = states
    z, f, p = gates
    c = torch.sigmoid(f + p * c) * c + torch.tanh(z)
    return torch.tanh(c), c


class TestRecurrent:
    """What torch.nn does not have, in the same clothes."""

    @pytest.mark.parametrize("function", ["slstm", own])
    def test_shapes_of_any_cell(self, function):
        layer = ours.Recurrent(
            function, 3, 8, 2, bidirectional=True, heads=2, batch_first=True, dtype=torch.float64
        )
        names = layer.cell.states
        x = random(4, 5, 3)
        output, last = layer(x)
        assert output.shape == (4, 5, 16) and len(last) == len(names)
        assert all(state.shape == (4, 4, 8) for state in last)
        _, gradients = run(layer, x, last)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert_same(copy.deepcopy(layer)(x), (output, last), 0)

    def test_own_cells_have_one_bias_that_holds_all_that_is_learned(self):
        layer = ours.Recurrent(own, 3, 8, heads=2)
        assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
            "weight_ih_l0": (16, 3),
            "weight_hh_l0": (8, 4),
            "bias_l0": (24,),
        }

    @every_kind
    def test_heads_are_blocks_of_torchs_matrix(self, kind):
        N, D = 3, 2
        mine = getattr(ours, kind)(4, N * D, 2, bidirectional=True, heads=N, dtype=torch.float64)
        theirs = getattr(nn, kind)(4, N * D, 2, bidirectional=True, dtype=torch.float64)
        weights = mine.state_dict()
        for name, weight in weights.items():
            if name.startswith("weight_hh"):
                blocks = weight.view(-1, N, D, D)
                dense = [torch.block_diag(*gate) for gate in blocks]
                weights[name] = torch.cat(dense)
        theirs.load_state_dict(weights)
        x = random(5, 3, 4)
        assert_same(mine(x), theirs(x))

    def test_sequences_alone_and_packed_with_another_cell(self):
        layer = ours.Recurrent("slstm", 3, 4, 2, bidirectional=True, dtype=torch.float64)
        sequences = [random(n, 3) for n in (2, 5, 1)]
        packed, last = layer(pack_sequence(sequences, enforce_sorted=False))
        padded, lengths = pad_packed_sequence(packed)
        for b, sequence in enumerate(sequences):
            output, alone = layer(sequence)
            assert_same(padded[: lengths[b], b], output)
            assert_same([state[:, b] for state in last], alone)


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
