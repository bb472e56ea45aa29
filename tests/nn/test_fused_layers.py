"""Layers take a fused backend where one runs: here Triton's, by its interpreter on the CPU."""

import copy
import gc
import os

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import flashrnn.nn as ours
from flashrnn import FlashRNNConfig, backends
from flashrnn.backends import triton
from flashrnn.nn import at_once, stack, stepping
from tests.nn.against import assert_like_torch, assert_same, pair, states, tensors

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    "kind",
    ["LSTM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("GRU", "RNN"))],
)
def test_batches_and_packed_sequences(kind):
    mine, theirs = pair(kind, 3, 16, bidirectional=True, dtype=torch.float32)
    assert backends.fused_on(torch.device("cpu"))
    x = torch.randn(3, 2, 3)
    assert_like_torch(mine, theirs, x, states(mine, 2), tolerance=1e-5)
    assert_like_torch(mine, theirs, x, None, torch.tensor([3, 1]), tolerance=1e-5)


def test_what_it_cannot_do_is_done_by_vanilla():
    mine, theirs = pair("GRU", 3, 16)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    assert_same(mine(x), theirs(x))


@pytest.fixture
def calls(monkeypatch):
    """Of each call of a layer, the directions."""
    made = []
    compute = at_once.recurrent_layer

    def counted(*args, **options):
        made.append(options["reverse"])
        return compute(*args, **options)

    monkeypatch.setattr(at_once, "recurrent_layer", counted)
    return made


def test_a_layer_is_one_call(calls):
    x, bounds = torch.randn(3, 2, 3), torch.tensor([0, 4, 6])
    reset = torch.tensor([[0, 1], [1, 0], [0, 0]])
    for bidirectional in (False, True):
        layer = ours.LSTM(3, 16, bidirectional=bidirectional)
        plain = copy.deepcopy(layer).double()
        for mine, given in ((layer, x), (plain, x.double())):
            mine.found = [
                mine(given),
                mine(given, reset=reset),
                mine(given.flatten(0, 1), cu_seqlens=bounds),
            ]
        # In float64 by `vanilla`, in turns.
        directions = (False, True) if bidirectional else False
        assert calls == [directions] * (3 if bidirectional else 2)
        calls.clear()
        for given, expected in zip(tensors(layer.found), tensors(plain.found), strict=True):
            torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_is_one_call_in_a_graph(monkeypatch):
    layer = ours.Recurrent("lstm", 3, 16, bidirectional=True)
    x, reset = torch.randn(2, 2, 3), torch.tensor([[0, 1], [1, 0]])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(x), layer(x, reset=reset)
        # In turns there is none.
        monkeypatch.delattr(stack, "_in_turn")
        assert_same((compiled(x), compiled(x, reset=reset)), expected, 1e-6)


def test_what_is_no_call_of_both_directions_is_two(calls, monkeypatch):
    """As of heads that fill a GPU each."""
    unsupported = triton.unsupported
    monkeypatch.setattr(
        triton, "unsupported", lambda problem: "full" if problem.N > 1 else unsupported(problem)
    )
    at_once._does.cache_clear()
    mine, theirs = pair("GRU", 3, 16, bidirectional=True, dtype=torch.float32)
    x = torch.randn(3, 2, 3)
    assert_same(mine(x), theirs(x), 1e-5)
    assert not calls
    at_once._does.cache_clear()


def test_a_gradient_of_the_states_alone_counts(calls, monkeypatch):
    """For two directions there may be forward kernels only."""
    unsupported = triton.unsupported
    monkeypatch.setattr(
        triton,
        "unsupported",
        lambda given: "full" if given.N > 1 and given.needs_gradient else unsupported(given),
    )
    at_once._does.cache_clear()
    layer = ours.GRU(3, 16, bidirectional=True, backend="triton").requires_grad_(False)
    x, hx = torch.randn(2, 2, 3), torch.randn(2, 2, 16)
    expected = layer(x, hx)
    assert len(calls) == 1
    found = layer(x, hx.requires_grad_())
    assert len(calls) == 1 and found[0].requires_grad
    assert_same(found, expected, 1e-6)
    at_once._does.cache_clear()


def test_masks_are_those_of_vanilla():
    """One seed draws the same ones, whatever computes."""
    masks = {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.4)}
    layer = ours.LSTM(3, 16, bidirectional=True, **masks)
    x, results = torch.randn(3, 2, 3), []
    for network, given in ((layer, x), (copy.deepcopy(layer).double(), x.double())):
        network.backend = "triton" if given is x else "vanilla"
        torch.manual_seed(0)
        output, last = network(given)
        output.square().sum().backward()
        results.append([output, *last, *(weight.grad for weight in network.parameters())])
        results[-1] += tensors(network.eval()(given))
    for given, expected in zip(*results, strict=True):
        torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_of_equal_lengths_are_a_batch(monkeypatch, batch_first, bidirectional):
    """No row moves, and results are those of torch.nn."""
    monkeypatch.setattr(stack, "one_after_another", None)
    options = {"batch_first": batch_first, "bidirectional": bidirectional}
    mine, theirs = pair("LSTM", 3, 16, **options, dtype=torch.float32)
    x = torch.randn(2, 2, 3)
    assert_like_torch(mine, theirs, x, states(mine, 2), torch.tensor([2, 2]), tolerance=1e-5)


def test_cells_and_steps():
    layer = ours.LSTM(3, 16)
    cell = ours.LSTMCell(3, 16)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, 3)
    expected, _ = torch.nn.LSTM.forward(layer, x[None])
    assert_same(cell(x)[0], expected[0], 1e-5)
    assert_same(layer.step(x)[0], expected[0], 1e-5)


class TestStepsWithoutGradients:
    """They are computed by steppers that are kept, and never with weights of before."""

    def hold(self, layer):
        x = torch.randn(2, 3)
        _, state = layer(torch.randn(2, 2, 3))
        for before in (None, state):
            expected = layer(x[None], before)
            given = layer.step(x, before)
            assert_same((given[0][None], given[1]), expected, 1e-6)

    @pytest.mark.parametrize(
        "layer",
        [
            lambda: ours.LSTM(3, 16, 2),
            pytest.param(lambda: ours.GRU(3, 16, 2), marks=pytest.mark.slow),
            pytest.param(lambda: ours.RNN(3, 16, bias=False), marks=pytest.mark.slow),
            lambda: ours.Recurrent("slstm", 3, 32, heads=2),
        ],
        ids=["LSTM", "GRU", "RNN", "slstm"],
    )
    def test_changed_weights(self, layer):
        def written(layer):
            for weight in layer.parameters():
                weight.data.mul_(0.5)

        def elsewhere(layer):
            for weight in layer.parameters():
                weight.data = weight.data.flip(0).contiguous()

        layer = layer()
        with torch.inference_mode():
            self.hold(layer)
        for change in (written, elsewhere, written):
            change(layer)
            with torch.no_grad():
                self.hold(layer)

    def test_another_zoneout(self):
        layer = ours.LSTM(3, 16, zoneout=0.1).eval()
        with torch.no_grad():
            for probability in (0.1, 0.6, 0.0):
                layer.zoneout = probability
                self.hold(layer)

    def test_of_the_slstm_layer(self):
        layer = ours.sLSTM(32, heads=2)
        x = torch.randn(2, 3, 32)
        with torch.no_grad():
            for _ in range(2):
                expected, last = layer(x)
                state, steps = None, []
                for x_t in x.unbind(1):
                    y, state = layer.step(x_t, state)
                    steps.append(y)
                assert_same((torch.stack(steps, 1), state), (expected, last), 1e-5)
                for weight in layer.parameters():
                    weight.data.add_(torch.randn_like(weight), alpha=0.1)
        assert len(stepping._kept[layer]) == 1

    @pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"num_heads": 2}], ids=str)
    def test_of_the_slstm_layer_with_a_config(self, config):
        """With a dtype of its own, and with fields of upstream's, which only flashrnn() takes."""
        layer, x = ours.sLSTM(32, heads=2, config=FlashRNNConfig(**config)), torch.randn(2, 32)
        with torch.no_grad():
            _, state = layer(torch.randn(2, 3, 32))
            for before in (None, state):
                expected, after = layer(x[:, None], before)
                assert_same(layer.step(x, before), (expected[:, 0], after), 1e-5)

    def test_what_is_kept_goes_with_its_layer(self):
        layer = ours.LSTM(3, 16)
        before = len(stepping._kept)
        with torch.no_grad():
            layer.step(torch.randn(2, 3))
        assert len(stepping._kept) == before + 1
        assert_same(copy.deepcopy(layer).step(torch.ones(2, 3)), layer.step(torch.ones(2, 3)), 1e-6)
        del layer
        gc.collect()
        assert len(stepping._kept) == before

    def test_with_gradients_they_are_sequences(self):
        layer = ours.LSTM(3, 16)
        layer.step(torch.randn(2, 3))[0].sum().backward()
        assert layer.weight_hh_l0.grad is not None

    def test_cells_with_changed_weights(self):
        for mine, theirs in (
            (ours.LSTMCell(3, 16), torch.nn.LSTMCell(3, 16)),
            (ours.GRUCell(3, 16), torch.nn.GRUCell(3, 16)),
            (ours.RNNCell(3, 16, bias=False), torch.nn.RNNCell(3, 16, bias=False)),
            (ours.GRUCell(3, 32, heads=2), ours.GRUCell(3, 32, heads=2, backend="vanilla")),
        ):
            for _ in range(3):
                for weight, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                    other.data.normal_(std=0.3)
                    weight.data.copy_(other)
                x = torch.randn(2, 3)
                with torch.no_grad():
                    state, expected = mine(x), theirs(x)
                    assert_same((state, mine(x, state)), (expected, theirs(x, expected)), 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["triton", "vanilla"])
def test_a_program_of_jit_trace(backend):
    """Of two directions; of a packed batch the lengths would be those of the first for ever."""
    layer = ours.GRU(3, 8, bidirectional=True, backend=backend)
    program = torch.jit.trace(layer, (torch.randn(4, 2, 3),), check_trace=False)
    x = torch.randn(4, 5, 3)
    assert_same(program(x), layer(x), 1e-6)

    def packed(x):
        return layer(pack_sequence([x[:, 0], x[:2, 1]]))[0].data

    with pytest.raises(NotImplementedError, match=r"take this PackedSequence's lengths for those"):
        torch.jit.trace(packed, (x,), check_trace=False)
