"""LSTM, GRU and RNN stand wherever torch.nn's stood."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import flashrnn.nn as ours
from tests.nn.against import (
    assert_like_torch,
    assert_same,
    both_paths,
    corners,
    every_kind,
    options,
    pair,
    random,
    run,
    states,
    tensors,
)

few = settings(max_examples=15, deadline=None)


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


@both_paths
def test_what_does_not_fit_is_a_runtime_error_in_the_users_words(backend):
    layer, x = ours.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3)
    other = torch.zeros(1, 2, 4, dtype=torch.float64)
    one, flags = ours.GRU(3, 4, backend=backend), torch.ones(5, 1)
    for call, words in (
        (lambda: layer(x, (other, other)), r"input is of torch.float32, hx of torch.float64"),
        (lambda: layer(x.to("meta")), "input is on meta, the weights are on cpu"),
        (lambda: one(x[:, 0], reset=flags), r"shape \(5, 1\); accepted is \(5,\)"),
        (lambda: one(x[:, 0], reset=torch.ones(())), r"shape \(\); accepted is \(5,\)"),
        (lambda: layer.step(x[0], (other[0], other[0])), "hx has 2 dimensions.*accepted are 3"),
        (lambda: layer(x, cu_seqlens=torch.tensor([0, 5])), r"2 dimensions, \[rows, input_size\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_another_dtype_on_a_device_without_autocast():
    """Whether autocast is on was asked of PyTorch, which knows of none there."""
    options = {"dtype": torch.float64, "device": "meta"}
    for layer, shape in (
        (ours.LSTM(4, 4, device="meta"), (5, 2, 4)),
        (ours.LSTMCell(4, 4, heads=2, device="meta"), (2, 4)),
        (ours.sLSTM(4, heads=2, device="meta"), (2, 5, 4)),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"float64.*float32"):
            layer(torch.zeros(shape, **options))


def test_arguments_as_torch_takes_them():
    """No projection, before a device by position; NumPy's numbers."""
    assert ours.GRU(3, 4, 1, True, False, 0.0, False, 0, "cpu").weight_ih_l0.shape == (12, 3)
    with pytest.raises(ValueError, match="only supported for LSTM"):
        ours.GRU(3, 4, proj_size=2)
    assert ours.LSTM(3, 4, np.int64(2), zoneout=np.float32(0.5)).num_layers == 2
