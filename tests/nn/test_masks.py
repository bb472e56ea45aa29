"""Variational dropout and zoneout: to loops in plain PyTorch with the masks that were drawn."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import flashrnn.nn as ours
from flashrnn.nn import at_once
from tests.nn.against import assert_same, states, tensors

F64 = {"dtype": torch.float64}


@pytest.fixture
def drawn(monkeypatch):
    """The masks of each layer, ``[B, T, masks, heads, D]``."""
    found = []
    draw = at_once.drawn

    def kept(*args):
        found.append(draw(*args))
        return found[-1]

    monkeypatch.setattr(at_once, "drawn", kept)
    return found


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def lstm_loop(layer, x, hx, read, stay_h, stay_c, suffix="_l0"):
    """One sequence ``[T, I]`` by one direction: h of every step, and both last states.

    Masks ``[T, D]``: ``read`` is what h is multiplied by before R, the others are weights of what
    was before a step.
    """
    W, R, b, b2 = (
        getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h, c = hx
    steps = []
    # Before a step, R reads h with the mask of any step: it is one for all.
    for x_t, m, p, q in zip(x, read, stay_h, stay_c, strict=True):
        i, f, z, o = (W @ x_t + b + R @ (m * h) + b2).chunk(4)
        new_c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        h, c = p * h + (1 - p) * new_h, q * c + (1 - q) * new_c
        steps.append(h)
    return torch.stack(steps), h, c


def gradients(layer, results):
    found = tensors(results)
    loss = sum((y * torch.arange(1, y.numel() + 1).view_as(y)).sum() for y in found)
    return torch.autograd.grad(loss, list(layer.parameters()))


def test_to_a_loop_with_gradients(drawn):
    T, B, D = 6, 3, 5
    layer = ours.LSTM(4, D, recurrent_dropout=0.4, zoneout=(0.2, 0.5), **F64)
    x, hx = random(T, B, 4), states(layer, B)
    found = layer(x, hx)
    (given,) = drawn
    assert given.shape == (B, T, 3, 1, D) and set(given.unique().tolist()) == {0.0, 1.0}
    assert (given[:, :, 0] == given[:, :1, 0]).all() and (given[0, 0, 0] != given[:, 0, 0]).any()
    expected = []
    for n in range(B):
        read, stay_h, stay_c = given[n, :, :, 0].unbind(1)
        start = [state[0, n] for state in hx]
        expected.append(lstm_loop(layer, x[:, n], start, read / 0.6, stay_h, stay_c))
    output, h, c = (torch.stack(each, -2) for each in zip(*expected, strict=True))
    expected = output, (h[None], c[None])
    assert_same(found, expected)
    assert_same(gradients(layer, found), gradients(layer, expected))


def test_packed_in_both_directions(drawn):
    lengths = torch.tensor([2, 5, 3])
    layer = ours.LSTM(4, 3, bidirectional=True, recurrent_dropout=0.4, zoneout=(0.3, 0.0), **F64)
    x = random(5, 3, 4)
    packed, (h, _) = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    output, _ = pad_packed_sequence(packed)
    # The sequences one after another, the longest first.
    (given,) = drawn
    parts = dict(zip((1, 2, 0), given[0].split([5, 3, 2]), strict=True))
    for n, part in parts.items():
        for direction, suffix in enumerate(("_l0", "_l0_reverse")):
            read, stay = part[:, :, direction].unbind(1)
            assert (read == read[:1]).all()
            zeros = torch.zeros(3, dtype=torch.float64)

            def in_order(y, reverse=bool(direction)):
                return y.flip(0) if reverse else y

            steps, last, _ = lstm_loop(
                layer,
                in_order(x[: lengths[n], n]),
                (zeros, zeros),
                in_order(read) / 0.6,
                in_order(stay),
                torch.zeros_like(stay),
                suffix,
            )
            units = slice(3 * direction, 3 * direction + 3)
            assert_same(output[: lengths[n], n, units], in_order(steps))
            assert_same(h[direction, n], last)


def test_resets_keep_the_mask(drawn):
    """A part that follows a reset is what it is alone, with the mask of its sequence."""
    layer = ours.LSTM(4, 3, recurrent_dropout=0.4, **F64)
    x, reset = random(5, 1, 4), torch.tensor([0, 0, 1, 0, 0])[:, None]
    output, _ = layer(x, reset=reset)
    read = drawn[0][0, 2:, 0, 0] / 0.6
    zeros = torch.zeros(3, dtype=torch.float64)
    steps, _, _ = lstm_loop(layer, x[2:, 0], (zeros, zeros), read, *(torch.zeros(2, 3, 3)))
    assert_same(output[2:, 0], steps)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_in_evaluation(kind):
    plain = getattr(ours, kind)(4, 3, 2, bidirectional=True, **F64)
    varied = getattr(ours, kind)(
        4, 3, 2, bidirectional=True, dropout=0.5, variational=True, recurrent_dropout=0.3, **F64
    )
    zoned = getattr(ours, kind)(4, 3, zoneout=0.25, **F64).eval()
    varied.load_state_dict(plain.state_dict())
    x = random(5, 2, 4)
    assert_same(varied.eval()(x), plain(x))
    # Zoneout's mean at each step.
    cell, state, steps = getattr(torch.nn, f"{kind}Cell")(4, 3, **F64), None, []
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in zoned.state_dict().items()})
    for x_t in x:
        before = tensors(state) or [x_t.new_zeros(2, 3)] * (1 + (kind == "LSTM"))
        after = tensors(cell(x_t, state))
        mean = [0.25 * a + 0.75 * b for a, b in zip(before, after, strict=True)]
        state = tuple(mean) if kind == "LSTM" else mean[0]
        steps.append(mean[0])
    assert_same(zoned(x)[0], torch.stack(steps))
    _, state = zoned.step(x[0])
    assert_same(zoned.step(x[1], state)[0], steps[1])


@pytest.mark.parametrize("function", ["gru", "slstm"])
def test_rates_and_seeds(function, drawn):
    probabilities = (0.7,) if function == "gru" else (0.7, 0.0, 0.0, 0.0)
    layer = ours.Recurrent(function, 4, 64, heads=2, recurrent_dropout=0.2, zoneout=probabilities)
    x, results = torch.randn(20, 16, 4), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(layer(x)[0])
    assert_same(results[0], results[1], 0)
    assert not torch.equal(results[0], results[2])
    read, stay = drawn[0].unbind(2)
    # Of 1024 draws the deviation is 0.0125, of 20480 it is 0.0032; five of each.
    assert abs(read[:, 0].mean() - 0.8) < 0.0625 and abs(stay.mean() - 0.7) < 0.016


def test_small_probabilities_where_the_default_dtype_is_coarse(drawn):
    layer = ours.Recurrent("gru", 4, 128, recurrent_dropout=0.001, zoneout=0.001)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer(torch.randn(4, 256, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(default)
    read, stay = drawn[0].unbind(2)
    # Of 32768 draws the deviation is 0.00017, of 131072 it is 0.000087; of bfloat16 1 in 256 is 0.
    assert abs(1 - read[:, 0].mean() - 0.001) < 0.0009 and abs(stay.mean() - 0.001) < 0.0005


@pytest.mark.parametrize("packed", [False, True])
def test_between_layers_one_mask_for_all_steps(packed, monkeypatch):
    layer = ours.GRU(4, 8, 2, dropout=0.5, variational=True, bidirectional=True, **F64)
    seen, compute = [], at_once.layer

    def kept(x, *args):
        seen.append((x, *compute(x, *args)))
        return seen[-1][1:]

    monkeypatch.setattr(at_once, "layer", kept)
    x = random(5, 3, 4)
    layer(pack_padded_sequence(x, torch.tensor([5, 4, 2])) if packed else x)
    # What the second layer reads, by what the first returned.
    ratio = seen[1][0] / seen[0][1]
    sequences = ratio[0].split([5, 4, 2]) if packed else ratio
    assert len({tuple(each[0].tolist()) for each in sequences}) == 3
    for each in sequences:
        torch.testing.assert_close(each, each[:1].expand_as(each))
        assert {round(value) for value in each.flatten().tolist()} == {0, 2}


def test_compiled_in_one_graph():
    layer = ours.Recurrent(
        "gru", 3, 4, 2, dropout=0.5, variational=True, recurrent_dropout=0.3, zoneout=0.2
    )
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 2, 3)
    for _ in range(2):
        results = []
        for network in (layer, compiled):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(network(x))
        assert_same(*results, 1e-6)
        layer.eval()


def test_copies_and_printed_form():
    layer = ours.LSTM(3, 4, 2, dropout=0.5, variational=True, recurrent_dropout=0.3, zoneout=0.2)
    assert repr(layer) == (
        "LSTM(3, 4, num_layers=2, dropout=0.5, variational=True, recurrent_dropout=0.3, "
        "zoneout=(0.2, 0.2))"
    )
    x, results = torch.randn(3, 2, 3), []
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        results.append([twin.train()(x), twin.eval()(x)])
    assert_same(results[0], results[1], 0)
    assert_same(results[0], results[2], 0)
    assert ours.restore(torch.nn.Sequential(layer)).left == {
        "0": "torch.nn has neither variational dropout nor zoneout"
    }


def test_probabilities_may_be_set():
    """As torch.nn's `dropout`: what is set is what is computed with."""
    given = {"recurrent_dropout": 0.4, "zoneout": (0.2, 0.5)}
    made, plain, later = ours.LSTM(4, 5, **given), ours.LSTM(4, 5), ours.LSTM(4, 5)
    for network in (plain, later):
        network.load_state_dict(made.state_dict())
    for name, value in given.items():
        setattr(later, name, value)
    x = torch.randn(3, 2, 4)

    def results(network):
        torch.manual_seed(0)
        return [network.train()(x), network.eval()(x)]

    assert_same(results(later), results(made), 0)
    assert repr(later) == repr(made)
    with pytest.raises(ValueError, match="a tuple with one for each of h, c"):
        later.zoneout = 2.0
    later.recurrent_dropout = later.zoneout = 0
    assert_same(results(later), results(plain), 0)
    assert not ours.restore(torch.nn.Sequential(later)).left


def test_errors():
    for options, words in (
        ({"zoneout": 1.5}, "a tuple with one for each of h, c"),
        ({"zoneout": (0.1,)}, "a tuple with one for each of h, c"),
        ({"zoneout": (0.1, "a")}, "a tuple with one for each of h, c"),
        ({"zoneout": None}, "a tuple with one for each of h, c"),
        ({"recurrent_dropout": 1.0}, "probability less than 1"),
        ({"recurrent_dropout": 0.1, "proj_size": 2}, "layer without a projection"),
        ({"zoneout": 0.1, "proj_size": 2}, "layer without a projection"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.LSTM(3, 4, **options)
    with pytest.raises(TypeError, match="variational should be of type bool"):
        ours.LSTM(3, 4, variational=0.5)
    for options in (
        {"recurrent_dropout": 0.1},
        {"num_layers": 2, "dropout": 0.1, "variational": True},
    ):
        with pytest.raises(ValueError, match="a layer in evaluation"):
            ours.LSTM(3, 4, **options).step(torch.randn(2, 3))
