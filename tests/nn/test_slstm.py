"""The layer sLSTM to a plain reading of the paper's equations, in parts and step by step."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import prune

import flashrnn.nn as ours
from flashrnn import FlashRNNConfig
from tests.nn.against import assert_same

B, T, H, N = 3, 7, 12, 3


def layer_of(**options):
    """One with weights that are all at work."""
    torch.manual_seed(0)
    layer = ours.sLSTM(**{"hidden_size": H, "heads": N, "dtype": torch.float64} | options)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    return layer


def by_the_paper(layer, x):
    """arXiv:2405.04517, equations of the sLSTM, and its block's picture, a number at a time."""
    H, N, K = layer.hidden_size, layer.heads, layer.conv_size
    D = H // N
    rows = []
    for sequence in x:
        h, c, n, m = ([torch.zeros((), dtype=x.dtype)] * H for _ in range(4))
        for t in range(len(sequence)):
            convolved = list(sequence[t])
            if K:
                for u in range(H):
                    s = layer.conv_bias[u]
                    for k in range(K):
                        if t - k >= 0:
                            s = s + layer.conv_weight[u, 0, K - 1 - k] * sequence[t - k, u]
                    convolved[u] = s * torch.sigmoid(s)
            after = []
            for u in range(H):
                head, d = divmod(u, D)
                units = range(head * D, (head + 1) * D)
                i, f, z, o = (
                    sum(
                        layer.weight[g, head, d, j] * source[v]
                        + layer.recurrent_weight[g, head, d, j] * h[v]
                        for j, v in enumerate(units)
                    )
                    + layer.bias[g, head, d]
                    for g, source in enumerate((convolved, convolved, sequence[t], sequence[t]))
                )
                log_f = torch.nn.functional.logsigmoid(f)
                new_m = torch.maximum(log_f + m[u], i)
                i, f = torch.exp(i - new_m), torch.exp(log_f + m[u] - new_m)
                new_c, new_n = f * c[u] + i * torch.tanh(z), f * n[u] + i
                after.append((torch.sigmoid(o) * new_c / new_n, new_c, new_n, new_m))
            h, c, n, m = map(list, zip(*after, strict=True))
            heads = torch.stack(h).view(N, D)
            centred = heads - heads.mean(1, keepdim=True)
            normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            rows.append(normed.flatten() * layer.norm_weight)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("conv_size", [4, 1, 0])
def test_the_papers_equations(conv_size):
    layer = layer_of(hidden_size=6, heads=2, conv_size=conv_size)
    x = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = []
    for y in (layer(x)[0], by_the_paper(layer, x)):
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        found.append([y, *torch.autograd.grad(loss, leaves)])
    assert_same(*found)


@pytest.mark.parametrize("conv_size", [4, 1, 0])
def test_parts_and_steps_are_the_sequence(conv_size):
    layer = layer_of(conv_size=conv_size)
    x = torch.randn(B, T, H, dtype=torch.float64)
    y, last = layer(x)
    for cut in (1, 2, 5):
        first, state = layer(x[:, :cut])
        second, state = layer(x[:, cut:], state)
        assert_same((torch.cat([first, second], 1), state), (y, last))
    state, steps = None, []
    for x_t in x.unbind(1):
        step, state = layer.step(x_t, state)
        steps.append(step)
    assert_same((torch.stack(steps, 1), state), (y, last))


def test_weights_that_a_hook_makes():
    """Steps have them as they are now, like a call."""
    layer, x = layer_of(), torch.randn(B, 1, H, dtype=torch.float64)
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)
        y, after = layer.step(x[:, 0])
        expected, last = layer(x)
    assert_same((y, after), (expected[:, 0], last))


def test_first_values():
    """The biases of f fall from 5 to -7, in later blocks by a higher power."""
    middle = []
    for block in range(3):
        layer = ours.sLSTM(10, heads=2, block=block, blocks=3)
        i, f, z, o = layer.bias.detach()
        assert not (i.any() or z.any() or o.any() or layer.recurrent_weight.any())
        assert torch.equal(f[0], f[1])
        assert f[0, 0] == 5 and f[0, -1] == -7
        middle.append(float(f[0, 2]))
    assert middle == pytest.approx([5 - 12 * 0.5**p for p in (0.3, 0.95, 1.6)], rel=1e-5)
    assert torch.equal(layer.norm_weight, torch.ones(10))
    assert ours.sLSTM(4, heads=4).bias.isfinite().all()


def test_dropout_in_training_only():
    layer = layer_of(dropout=1.0)
    x = torch.randn(B, T, H, dtype=torch.float64)
    assert not layer(x)[0].any() and not layer.step(x[:, 0])[0].any()
    assert layer.eval()(x)[0].all()


def test_options_of_the_cell():
    x = torch.randn(B, T, H, dtype=torch.float64)
    layer = layer_of()
    layer.config = FlashRNNConfig(forward_clipval=0.01)
    (_, state), (_, cut) = layer_of()(x), layer(x)
    assert state.cells[0].abs().max() > 0.01 >= cut.cells[0].abs().max()


def test_copies_and_dtypes():
    layer = layer_of()
    x = torch.randn(B, T, H, dtype=torch.float64)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(twin(x), expected, 0)
    y, state = layer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and state.cells.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected[0], rtol=0.1, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x.float())[0].sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in layer.parameters())


@pytest.mark.slow
def test_one_graph():
    layer = layer_of()
    x = torch.randn(B, 2, H, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), layer(x))


def test_errors():
    for options, message in (
        ({"heads": 5}, "12 units in 5 heads"),
        ({"conv_size": -1}, "conv_size=-1"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"block": 2, "blocks": 2}, "block=2 of blocks=2"),
        ({"backend": "tritom"}, "unknown backend 'tritom'"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_of(**options)
    layer = layer_of()
    for shape in ((B, 0, H), (B, T, H + 1), (T, H)):
        with pytest.raises(ValueError, match=r"accepted is \[B, T, 12\]"):
            layer(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"accepted is \[B, 12\]"):
        layer.step(torch.zeros(B, T, H, dtype=torch.float64))
    for name in ("heads", "conv_size", "block"):
        with pytest.raises(TypeError, match=f"{name}=2.0 is float; accepted is an integer"):
            layer_of(**{name: 2.0})
    x = torch.zeros(B, T, H, dtype=torch.float64)
    _, state = layer(x)
    for run, given in ((layer, x), (layer.step, x[:, 0])):
        with pytest.raises(
            TypeError, match=r"x is of torch.int64, the weights are of torch.float64"
        ):
            run(given.long())
        with pytest.raises(TypeError, match="state is Tensor; accepted is what an earlier call"):
            run(given, state.cells)
        with pytest.raises(
            ValueError, match=r"state has the shapes .* with this input they must be"
        ):
            run(given[1:], state)
