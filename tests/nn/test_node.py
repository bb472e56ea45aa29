"""Plain layers as one node of autograd, by emulated kernels: as torch.nn's, and as in turns."""

import copy
import itertools
import pickle

import pytest
import torch

import flashrnn.nn as ours
from flashrnn import rows
from flashrnn.backends import cuda_fused
from flashrnn.nn import node, stack
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.nn.against import assert_same, pair, states, tensors
from tests.problems import relative_error

pytestmark = needs_compiler


@pytest.fixture
def made(monkeypatch):
    """How many calls were computed so, and an error where one is computed in turns."""
    found, run = [], node.run

    def counted(*given):
        results = run(*given)
        assert results is not None
        found.append(results)
        return results

    monkeypatch.setattr(node, "run", counted)
    return found


def results(layers, x, hx, losses, in_turns=False):
    """Outputs, last states, and the gradients of everything, of a loss of some of the results."""
    x = x.detach().requires_grad_()
    hx = None if hx is None else [each.detach().requires_grad_() for each in hx]
    given = hx and (tuple(hx) if len(hx) > 1 else hx[0])
    with pytest.MonkeyPatch.context() as patch:
        if in_turns:
            patch.setattr(stack.node, "run", lambda *_: None)
        outputs = tensors(layers(x, given))
    weights = torch.randn(100, generator=torch.Generator().manual_seed(3))
    loss = sum(
        (one * weights[: one.shape[-1]].to(one)).sum()
        for one, counts in zip(outputs, losses, strict=False)
        if counts
    )
    wanted = [x, *(hx or ()), *layers.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return outputs, found


KINDS = {"LSTM": 2, "GRU": 1, "RNN": 1}


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("kind", KINDS)
def test_like_torch(fused_emulation, made, kind, batch_first, given):  # noqa: F811
    options = {"num_layers": 2, "batch_first": batch_first, "dtype": torch.float32}
    mine, theirs = pair(kind, 3, 5, backend="cuda_fused", **options)
    x = torch.randn(2, 4, 3) if batch_first else torch.randn(4, 2, 3)
    hx = list(tensors(states(mine, 2))) if given else None
    for losses in ((1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 0, 1))[: 2 + 2 * (kind == "LSTM")]:
        found, expected = (results(layers, x, hx, losses) for layers in (mine, theirs))
        for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            # A gradient of nothing is zeros or none.
            other = torch.zeros_like(one) if other is None and one is not None else other
            one = torch.zeros_like(other) if one is None and other is not None else one
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(made) == 2 + 2 * (kind == "LSTM")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", ["slstm", "gru"])
def test_as_in_turns(fused_emulation, made, cell, bias):  # noqa: F811
    """Cells and heads that torch.nn does not have, in 16 bits: the same bits."""
    layer = ours.Recurrent(cell, 3, 12, heads=2, bias=bias, backend="cuda_fused").bfloat16()
    x = torch.randn(4, 2, 3).bfloat16()
    hx = [torch.randn(1, 2, 12).bfloat16() for _ in layer.cell.states]
    for start, losses in ((None, (1, 0)), (hx, (1, 1))):
        once, turns = (results(layer, x, start, losses, in_turns) for in_turns in (False, True))
        for one, other in zip(itertools.chain(*once), itertools.chain(*turns), strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one, other) and one.dtype == other.dtype)
    assert len(made) == 2


@pytest.mark.parametrize("trains", [False, True], ids=["no gradients", "trained"])
def test_many_rows(fused_emulation, made, monkeypatch, trains):  # noqa: F811
    """What is turned by time is copied by wide elements; x gets a gradient of its own layout."""
    monkeypatch.setattr(cuda_fused, "multiplies", lambda *_: False)
    for module in (rows, node):
        monkeypatch.setattr(module, "FEWEST", 1)
    by_time = ours.LSTM(16, 32, backend="cuda_fused").bfloat16()
    by_sequence = ours.LSTM(16, 32, backend="cuda_fused", batch_first=True).bfloat16()
    by_sequence.load_state_dict(by_time.state_dict())
    x = torch.randn(7, 3, 16).bfloat16()
    given = [x.clone(), x.transpose(0, 1).contiguous()]
    for each in given:
        each.requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        found, expected = by_time(given[0])[0], by_sequence(given[1])[0]
    assert found.is_contiguous()
    assert torch.equal(found, expected.transpose(0, 1))
    if trains:
        found.square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(by_time.parameters(), by_sequence.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2)
        assert given[0].grad.is_contiguous()
        torch.testing.assert_close(given[0].grad, given[1].grad.transpose(0, 1))
        # A transposed input's gradient goes back as it is.
        by_time(turned := given[1].transpose(0, 1))[0].square().sum().backward()
        assert not turned.is_contiguous()
        torch.testing.assert_close(given[1].grad, 2 * given[0].grad.transpose(0, 1))
    assert len(made) == 2 + trains


def test_without_gradients(fused_emulation, made):  # noqa: F811
    mine, theirs = pair("LSTM", 3, 5, num_layers=2, backend="cuda_fused", dtype=torch.float32)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        assert_same(mine(x), theirs(x), 1e-5)
    assert made


def test_under_autocast(fused_emulation, made):  # noqa: F811
    layer = ours.LSTM(3, 5, num_layers=2, backend="cuda_fused")
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h, c) = layer(x)
    assert {output.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    output.float().sum().backward()
    assert {weight.grad.dtype for weight in layer.parameters()} == {torch.float32}
    assert_same(output.float(), layer(x)[0], 2e-2)


@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_two_results_share_memory(
    fused_emulation,  # noqa: F811
    made,
    kind,
    num_layers,
    dtype,
    batch_first,
):
    """Programs change states and gradients in place, each by itself."""
    options = {"batch_first": batch_first, "dtype": dtype, "backend": "cuda_fused"}
    layer = getattr(ours, kind)(3, 5, num_layers, **options)
    output, last = layer(torch.randn(4, 2, 3, dtype=dtype))
    last = tensors(last)
    output.sum().backward()
    with torch.no_grad():
        changed = [*last, *(weight.grad for weight in layer.parameters())]
        before = [one.clone() for one in changed]
        for k, one in enumerate(changed):
            one.add_(1)
            versions = [other._version for other in changed]
            assert versions == [1] * (k + 1) + [0] * (len(changed) - k - 1)
    for one, was in zip(changed, before, strict=True):
        assert torch.equal(one, was + 1) and one.is_contiguous() and not one._is_view()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_last_states_are_what_programs_take_them_for(
    fused_emulation,  # noqa: F811
    made,
    kind,
    num_layers,
    dtype,
):
    """Changed in place where there is a gradient, kept, or made leaves of a graph."""
    layer = getattr(ours, kind)(3, 5, num_layers, dtype=dtype, backend="cuda_fused")
    x = torch.randn(4, 2, 3, dtype=dtype)
    expected = tensors(layer(x)[1])
    slopes = torch.autograd.grad([2 * one.sum() for one in expected], layer.weight_hh_l0)
    last = tensors(layer(x)[1])
    for one in last:
        one.mul_(2)
    for one, right in zip(last, expected, strict=True):
        assert torch.equal(one, 2 * right)
    found = torch.autograd.grad([one.sum() for one in last], layer.weight_hh_l0)
    assert torch.equal(*found, *slopes)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            last = tensors(layer(x)[1])
            for one in copy.deepcopy(last) + pickle.loads(pickle.dumps(last)):
                one.zero_()
            for one, right in zip(last, expected, strict=True):
                assert torch.equal(one, right)
    with torch.no_grad():
        last = tensors(layer(x)[1])
    for one in last:
        assert one.requires_grad_().is_leaf
        one.sum().backward()
        assert one.grad is not None


@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits(fused_emulation, made, kind, dtype, batch_first):  # noqa: F811
    """As near to torch.nn's in float64 as what is computed in turns, where biases are added up
    first; with gradients and without."""
    options = {"num_layers": 2, "batch_first": batch_first, "dtype": dtype}
    mine, _ = pair(kind, 20, 24, backend="cuda_fused", **options)
    theirs = getattr(torch.nn, kind)(20, 24, **(options | {"dtype": torch.float64}))
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(5, 6, 20).to(dtype)
    losses = (1, 1, 1)
    found, turns = (results(mine, x, None, losses, in_turns) for in_turns in (False, True))
    truth = results(theirs, x.double(), None, losses)
    each = map(itertools.chain.from_iterable, (found, turns, truth))
    for one, near, right in zip(*each, strict=True):
        allowed = relative_error(near, right)
        assert relative_error(one, right) <= 1.5 * allowed + torch.finfo(dtype).eps / 2
        assert one.dtype == near.dtype and one.shape == near.shape
    with torch.no_grad():
        again = tensors(mine(x))
    assert all(map(torch.equal, again, found[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_biases_that_lie_apart(fused_emulation, made, kind):  # noqa: F811
    """A parametrization may put any view in a bias's place."""

    class Spread(torch.nn.Module):
        def forward(self, bias):
            return torch.stack([bias, bias], 1)[:, 0]

    layer = getattr(ours, kind)(3, 5, backend="cuda_fused")
    x = torch.randn(4, 2, 3)
    expected = layer(x)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        torch.nn.utils.parametrize.register_parametrization(layer, name, Spread())
    assert_same(layer(x), expected, 1e-6)


def test_of_a_frozen_layer_the_input_has_a_gradient(fused_emulation, made):  # noqa: F811
    mine, theirs = pair("LSTM", 3, 5, backend="cuda_fused", dtype=torch.float32)
    x = torch.randn(4, 2, 3)
    found = []
    for layer in (mine, theirs):
        given = x.clone().requires_grad_()
        layer.requires_grad_(False)(given)[0].sum().backward()
        assert all(weight.grad is None for weight in layer.parameters())
        found.append(given.grad)
    assert_same(*found, 1e-5)


def test_a_second_derivative_is_refused(fused_emulation, made):  # noqa: F811
    layer = ours.LSTM(3, 5, backend="cuda_fused")
    x = torch.randn(4, 2, 3, requires_grad=True)
    (d_x,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    for wanted in (x, layer.weight_ih_l0, layer.weight_hh_l0):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(d_x.sum(), wanted, retain_graph=True)


def test_weights_changed_before_backward_are_an_error(fused_emulation, made):  # noqa: F811
    layer = ours.LSTM(3, 5, backend="cuda_fused")
    loss = layer(torch.randn(4, 2, 3))[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True}, {"proj_size": 2}, {"num_layers": 2, "dropout": 0.5}],
    ids=str,
)
def test_what_one_node_cannot_be(fused_emulation, options):  # noqa: F811
    layer = ours.LSTM(3, 5, backend="cuda_fused", **options)
    assert node.run(layer, torch.randn(4, 2, 3), None) is None


def test_weights_that_do_not_fit_are_named(fused_emulation):  # noqa: F811
    layer = ours.LSTM(3, 5, backend="cuda_fused")
    layer(torch.randn(4, 2, 3))
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().double())
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(4, 2, 3))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_of_a_batch_of_losses(fused_emulation, kind):  # noqa: F811
    """What torch.func maps over has no memory of its own that a kernel could copy."""
    layer = getattr(ours, kind)(3, 5, backend="cuda_fused")
    output, _ = layer(torch.randn(4, 2, 3))
    slopes = torch.randn(3, *output.shape)
    weights = list(layer.parameters())
    given = torch.autograd.grad(output, weights, slopes, retain_graph=True, is_grads_batched=True)
    for k, slope in enumerate(slopes):
        expected = torch.autograd.grad(output, weights, slope, retain_graph=True)
        for found, right in zip(given, expected, strict=True):
            torch.testing.assert_close(found[k], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_gradient_of_each_weight_has_no_derivative(fused_emulation, kind):  # noqa: F811
    """And says so, rather than be taken for a constant."""
    layer = getattr(ours, kind)(3, 5, backend="cuda_fused")
    output, _ = layer(torch.randn(4, 2, 3))
    for name, weight in layer.named_parameters():
        (slope,) = torch.autograd.grad(output.sum(), weight, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(slope.square().sum(), layer.weight_ih_l0)
        assert slope.requires_grad, name
