"""Bad input is refused before any work, with what was given and what is accepted."""

import re

import pytest
import torch

from flashrnn import flashrnn

B, T, N, D = 2, 3, 2, 4


def arguments(**replaced):
    tensors = {
        "Wx": torch.zeros(B, T, 4, N, D),
        "R": torch.zeros(4, N, D, D),
        "b": torch.zeros(4, N, D),
        "states": torch.zeros(2, B, 1, N, D),
    }
    return {**tensors, **replaced}


@pytest.mark.parametrize(
    ("replaced", "error", "words"),
    [
        ({"Wx": [1.0]}, TypeError, "Wx is list; accepted is a torch.Tensor"),
        ({"R": None}, TypeError, "R is NoneType; accepted is a torch.Tensor"),
        (
            {"Wx": torch.zeros(B, T, 4, D)},
            ValueError,
            "Wx has shape (2, 3, 4, 4); accepted are 5 dimensions, [B, T, Gw, N, D]",
        ),
        (
            {"Wx": torch.zeros(B, T, 3, N, D)},
            ValueError,
            "Wx holds 3 gates; lstm takes 4 there: i, f, z, o",
        ),
        (
            {"Wx": torch.zeros(B, T, 4, 0, D)},
            ValueError,
            "Wx has shape (2, 3, 4, 0, 4), 0 heads of 4 units; accepted are N and D ≥ 1",
        ),
        (
            {"R": torch.zeros(4, D, D)},
            ValueError,
            "R has shape (4, 4, 4); accepted are 4 dimensions, [Gr, N, D, D]",
        ),
        ({"R": torch.zeros(3, N, D, D)}, ValueError, "R holds 3 gates; lstm takes 4"),
        (
            {"R": torch.zeros(4, N, D, D + 1)},
            ValueError,
            "R has shape (4, 2, 4, 5); with this input it must be (4, 2, 4, 4), [Gr, N, D, D]",
        ),
        ({"R": torch.zeros(4, N + 1, D, D)}, ValueError, "must be (4, 2, 4, 4)"),
        ({"b": torch.zeros(4, D)}, ValueError, "accepted are 3 dimensions, [Gb, N, D]"),
        ({"b": torch.zeros(5, N, D)}, ValueError, "b holds 5 gates; lstm takes 4"),
        ({"b": torch.zeros(4, N, 1)}, ValueError, "b has shape (4, 2, 1); with this input"),
        ({"states": torch.zeros(2, B, N, D)}, ValueError, "5 dimensions, [S, B, 1, N, D]"),
        (
            {"states": torch.zeros(4, B, 1, N, D)},
            ValueError,
            "states has shape (4, 2, 1, 2, 4), 4 states; lstm has 2: h, c",
        ),
        ({"states": torch.zeros(2, B + 1, 1, N, D)}, ValueError, "must be (2, 2, 1, 2, 4)"),
        ({"states": torch.zeros(2, B, T, N, D)}, ValueError, "must be (2, 2, 1, 2, 4)"),
        (
            {"b": torch.zeros(4, N, D, device="meta")},
            ValueError,
            "Wx on cpu, R on cpu, b on meta, states on cpu; accepted is one device for all",
        ),
        (
            {"Wx": torch.zeros(B, T, 4, N, D, dtype=torch.int64)},
            TypeError,
            "Wx torch.int64, R torch.float32, b torch.float32, states torch.float32; "
            "accepted are torch.float16, torch.bfloat16, torch.float32, torch.float64",
        ),
        (
            {"R": torch.zeros(4, N, D, D, dtype=torch.complex64)},
            TypeError,
            "R torch.complex64",
        ),
        (
            {"R": torch.zeros(4, N, D, D, dtype=torch.bfloat16)},
            TypeError,
            "R torch.bfloat16, b torch.float32, states torch.float32; accepted is one dtype",
        ),
        (
            {"states": torch.zeros(2, B, 1, N, D, dtype=torch.float64)},
            TypeError,
            "states torch.float64; accepted is one dtype for all",
        ),
        (
            {"config": {"forward_clipval": 1.0}},
            TypeError,
            "config is dict; accepted is a FlashRNNConfig",
        ),
        ({"backend": None}, TypeError, "backend is NoneType; accepted is a name, or 'auto'"),
        ({"dtype": "float8"}, TypeError, "dtype 'float8'; accepted are float16, bfloat16"),
        ({"dtype": torch.int32}, TypeError, "dtype torch.int32; accepted are"),
        ({"function": "gru"}, ValueError, "Wx holds 4 gates; gru takes 3 there: r, z, n"),
        (
            {"function": "lsmt"},
            ValueError,
            "unknown function 'lsmt'. Did you mean 'lstm'? Accepted: elman, lstm, gru, slstm",
        ),
        ({"function": torch.tanh}, TypeError, "accepted are a cell made by @cell, or a name"),
        (
            {"backend": "vanila"},
            ValueError,
            "unknown backend 'vanila'. Did you mean 'vanilla'? Accepted: auto, ",
        ),
    ],
)
def test_refused(replaced, error, words):
    with pytest.raises(error, match=re.escape(words)):
        flashrnn(**arguments(**replaced))


def test_named_backend_that_cannot_do_the_call_says_why(monkeypatch):
    from flashrnn.backends import vanilla

    monkeypatch.setattr(vanilla, "unsupported", lambda problem: f"D={problem.D} is too odd")
    with pytest.raises(ValueError, match=r"backend 'vanilla' cannot do this call: D=4 is too odd"):
        flashrnn(**arguments(), backend="vanilla")
    monkeypatch.setattr(vanilla, "unavailable", lambda device: "no CPU here")
    with pytest.raises(ValueError, match=r"cannot do this call: no CPU here"):
        flashrnn(**arguments(), backend="vanilla")


def test_states_of_float32_go_with_16_bits():
    sixteen = {name: x.bfloat16() for name, x in arguments().items()}
    states = arguments()["states"]
    outputs = flashrnn(**{**sixteen, "states": states})
    assert outputs[0].dtype == torch.bfloat16 and outputs[1].dtype == torch.float32
    assert torch.equal(outputs[0], flashrnn(**sixteen)[0])
