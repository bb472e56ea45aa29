"""Resets, lengths, packing and directions: ``vanilla`` to plain calls of pieces, errors, graphs."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn import flashrnn, recurrent_layer, sequences
from flashrnn.backends import autograd
from flashrnn.backends.fused import plans
from flashrnn.cells import lstm, resolve
from flashrnn.problem import Problem
from flashrnn.sequences import runs_backwards
from tests.gpus import GPUS
from tests.problems import random_inputs, sparse
from tests.sequences import (
    episode_by_episode,
    gradients_of,
    hold_empty_sequences_out,
    random_ragged,
)

sizes = {
    "B": st.integers(1, 4),
    "T": st.integers(1, 6),
    "N": st.integers(1, 3),
    "D": st.integers(1, 3),
    "seed": st.integers(0, 2**20),
}
options = {
    "resets": st.sampled_from(["none", "zeros", "sequence", "step"]),
    "ragged": st.sampled_from(["none", "lengths", "packed"]),
    "reverse": st.sampled_from(["none", "all", "some"]),
    "return_states": st.sampled_from(["all", "h", "last"]),
}


def close(given, expected):
    for name, truth in expected.items():
        assert given[name].shape == truth.shape, name
        torch.testing.assert_close(given[name], truth, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize(
    "function",
    ["lstm", *(pytest.param(x, marks=pytest.mark.slow) for x in ("elman", "gru", "slstm", sparse))],
    ids=str,
)
@settings(max_examples=40, deadline=None)
@given(sizes=st.fixed_dictionaries(sizes), options=st.fixed_dictionaries(options))
def test_vanilla_is_a_plain_call_of_each_episode(function, sizes, options):
    case = random_ragged(function, **sizes, **options)
    given = gradients_of(case, case.call("vanilla"))
    close(given, gradients_of(case, episode_by_episode(case)))


@pytest.mark.parametrize("resets", ["sequence", "step"])
@pytest.mark.parametrize("T", [0, 3])
def test_without_steps_gradients_are_zero(resets, T):
    """Each is there, as in any call."""
    case = random_ragged("lstm", 2, T, 1, 2, resets=resets, ragged="lengths", dtype=torch.bfloat16)
    lengths = torch.zeros_like(case.options["lengths"])
    states, last_states = case.call("vanilla", lengths=lengths)
    leaves = case.leaves()
    found = torch.autograd.grad(states.sum() + last_states.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert (gradient == (name == "states")).all()


def test_options_are_cast_under_autocast():
    case = random_ragged("lstm", 2, 3, 2, 4, resets="step", ragged="lengths", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, last_states = case.call("auto")
    assert (states.dtype, last_states.dtype) == (torch.bfloat16, torch.float32)
    truth = episode_by_episode(case.to(torch.float64))
    torch.testing.assert_close(last_states.double(), truth[1], atol=0.05, rtol=0.05)


def test_one_start_for_all_sequences():
    inputs = random_inputs("lstm", 3, 4, 2, 3)
    start = inputs.states.detach()[:, :1].clone().requires_grad_()
    everywhere = start.detach().expand(-1, 3, -1, -1, -1).clone().requires_grad_()
    found = []
    for states in (start, everywhere):
        outputs = flashrnn(inputs.Wx, inputs.R, inputs.b, states)
        found.append((*outputs, torch.autograd.grad(outputs[0].sum(), states)[0]))
    for given_one, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(given_one, expected)
    torch.testing.assert_close(found[0][2], found[1][2].sum(1, keepdim=True))


def test_nothing_past_the_end_reaches_a_gradient():
    """Not even where it is not finite."""
    case = random_ragged("lstm", 3, 5, 2, 3, seed=3, ragged="lengths")
    expected = gradients_of(case, case.call("vanilla"))
    planted = case.inputs.Wx.detach().clone()
    for i, length in enumerate(case.lengths):
        planted[i, length:] = torch.nan
    case = replace(case, inputs=replace(case.inputs, Wx=planted.requires_grad_()))
    for name, x in gradients_of(case, case.call("vanilla")).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_the_start_of_an_empty_sequence_reaches_no_gradient(ragged):
    hold_empty_sequences_out("vanilla", ragged)


def test_directions_are_those_of_each_call():
    """They are made once, and kept: within inference mode too for calls outside."""

    def flags(reverse, N=3):
        problem = Problem(lstm.traced, 1, 1, N, 4, torch.float32, torch.device("cpu"))
        return runs_backwards(problem._replace(reverse=reverse))

    with torch.inference_mode():
        first = flags((False, True, True))
    assert first.tolist() == [0, 1, 1] and not first.is_inference()
    for _ in range(2):
        assert flags(True).tolist() == [1, 1, 1] and flags(True, 2).tolist() == [1, 1]
        assert flags((True, False, True)).tolist() == [1, 0, 1]
        assert flags((False, True, True)) is first


@pytest.mark.parametrize("packed", [False, True])
def test_values_out_of_range_are_moved_into_it_where_nobody_may_look(packed):
    """As on a GPU, whose values no host waits for."""
    case = random_ragged("lstm", 3, 4, 1, 2, ragged="packed" if packed else "lengths")
    name = "cu_seqlens" if packed else "lengths"
    total = case.inputs.Wx.shape[1]
    given, meant = (
        ([-5, total + 9, 2, total - 1], [0, total, total, total])
        if packed
        else ([-1, 99, 2], [0, 4, 2])
    )
    with pytest.raises(ValueError, match=f"{name} "):
        case.call("vanilla", **{name: torch.tensor(given)})
    # Collected out of the graph: Dynamo of PyTorch 2.9 does not follow that.
    others = case.arguments("vanilla")
    del others[name]
    torch.compiler.reset()
    unseen = torch.compile(
        lambda x: flashrnn(**others, **{name: x}), backend="eager", fullgraph=True
    )
    expected = case.call("vanilla", **{name: torch.tensor(meant)})
    for x, y in zip(unseen(torch.tensor(given)), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_compiles_whole_and_once_for_all_lengths():
    case = random_ragged("lstm", 3, 4, 2, 2, resets="sequence", ragged="lengths", reverse="some")
    # Collected out of the graph: Dynamo of PyTorch 2.9 does not follow that.
    others = case.arguments("auto")
    del others["lengths"], others["reset"]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda lengths, reset: flashrnn(**others, lengths=lengths, reset=reset),
        fullgraph=True,
        backend="eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([4, 2, 3], [0, 4, 1], [1, 1, 1]):
            reset = torch.rand(3, 4) < 0.5
            given = compiled(torch.tensor(lengths), reset)
            expected = case.call("auto", lengths=torch.tensor(lengths), reset=reset)
            for x, y in zip(given, expected, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reset": [True]}, TypeError, "reset is list; accepted is a torch.Tensor"),
        (
            {"reset": torch.zeros(2, 3)},
            TypeError,
            "reset is of torch.float32; accepted is torch.bool: make it reset.bool()",
        ),
        (
            {"reset": torch.zeros(2, 2, dtype=torch.bool)},
            ValueError,
            "reset has shape (2, 2); with this input it must be (2, 3), a flag a step",
        ),
        (
            {"reset_states": torch.zeros(2, 2, 1, 2, 4)},
            ValueError,
            "reset_states is given without reset, which says where",
        ),
        (
            {
                "reset": torch.zeros(2, 3, dtype=torch.bool),
                "reset_states": torch.zeros(2, 2, 2, 2, 4),
            },
            ValueError,
            "reset_states has shape (2, 2, 2, 2, 4); with this input it must be (2, 2, 3, 2, 4), a "
            "start a step, (2, 2, 1, 2, 4), a start a sequence, or (2, 1, 1, 2, 4), one for all",
        ),
        ({"lengths": [1, 2]}, TypeError, "lengths is list; accepted is a torch.Tensor"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths is of torch.float32; accepted are"),
        (
            {"lengths": torch.tensor([1])},
            ValueError,
            "lengths has shape (1,); accepted is (2,), [B]",
        ),
        (
            {"lengths": torch.tensor([1, 4])},
            ValueError,
            "lengths has values from 1 to 4; accepted are 0 to 3, the steps of the input",
        ),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "accepted is a packed batch"),
        (
            {"lengths": torch.tensor([3]), "cu_seqlens": torch.tensor([0, 3]), "B": 1},
            ValueError,
            "lengths and cu_seqlens are given; accepted is one of them",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 1, 3]), "B": 1},
            ValueError,
            "cu_seqlens goes from 0 to 3 and falls by 1 between; accepted are values that do not "
            "fall, from 0 to 3",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2]), "B": 1},
            ValueError,
            "cu_seqlens goes from 0 to 2; accepted are values that do not fall, from 0 to 3",
        ),
        (
            # Each differs from the one before by less than 2³¹, counted by 32 bits.
            {"cu_seqlens": torch.tensor([0, 2**31 - 1, -2, 3], dtype=torch.int32), "B": 1},
            ValueError,
            "cu_seqlens goes from 0 to 3 and falls by 2147483649 between",
        ),
        ({"cu_seqlens": torch.tensor([0]), "B": 1}, ValueError, "cu_seqlens has one element"),
        *(
            (options, TypeError, f"{name} is a tensor of layout sparse_coo; accepted are dense")
            for name, options in [
                ("reset", {"reset": torch.zeros(2, 3, dtype=torch.bool).to_sparse()}),
                ("lengths", {"lengths": torch.tensor([1, 2]).to_sparse()}),
                ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3]).to_sparse(), "B": 1}),
            ]
        ),
        ({"reverse": "yes"}, TypeError, "reverse is str; accepted is a bool, or a list"),
        (
            {"reverse": [True]},
            ValueError,
            "reverse has 1 elements; accepted is one for each of 2 heads",
        ),
        ({"reverse": [1, 0]}, TypeError, "accepted are bools"),
        (
            {"return_states": "c"},
            ValueError,
            "return_states is 'c'; accepted are 'all', 'h', 'last'",
        ),
    ],
)
def test_bad_options_are_refused(options, error, words):
    B = options.pop("B", 2)
    Wx, R, b = torch.zeros(B, 3, 4, 2, 4), torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4)
    with pytest.raises(error, match=re.escape(words)):
        flashrnn(Wx, R, b, **options)


def test_a_layer_that_is_not_packed_is_refused_by_its_names():
    x, W, R, b = (
        torch.zeros(sizes) for sizes in ((2, 3, 5), (4, 2, 4, 5), (4, 2, 4, 4), (4, 2, 4))
    )
    words = "x is (2, 3, 5) and cu_seqlens is given; accepted is a packed batch, [1, total, I]"
    with pytest.raises(ValueError, match=re.escape(words)):
        recurrent_layer(x, W, R, b, cu_seqlens=torch.tensor([0, 6]))


def test_rows_without_their_dimension_of_1():
    case = random_ragged("lstm", 3, 4, 2, 2, resets="step", ragged="packed")
    states, last_states = case.call("vanilla")
    inputs = case.inputs.tensors() | {"Wx": case.inputs.Wx[0]}
    options = case.options | {"reset": case.options["reset"][0]}
    given = flashrnn(**inputs, **options, reset_states=case.reset_states)
    assert torch.equal(given[0], states[:, 0]) and torch.equal(given[1], last_states)


OF_A_PROBLEM = {
    "reset": {"resets": True},
    "lengths": {"ragged": True},
    "cu_seqlens": {"ragged": True, "packed": True},
    "reverse": {"reverse": (True, False)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("option", OF_A_PROBLEM)
def test_large_heads_of_cuda_fused_have_each_option(option, dtype):
    problem = Problem(
        resolve("lstm").traced, 2, 3, 2, 256, dtype, torch.device("cpu"), True, returned=2
    )
    problem = problem._replace(**OF_A_PROBLEM[option])
    for gpu in ("sm_80", "sm_90a"):
        assert plans.refused(problem, GPUS[gpu]) is None


@pytest.mark.parametrize(
    ("lengths", "even"), [([8, 8], True), ([8, 7], True), ([8, 6], False), ([0, 0], True)], ids=str
)
def test_lengths_on_the_cpu_tell_whether_they_are_even(lengths, even):
    """That decides which plan is taken."""
    given = torch.tensor(lengths)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), given.cumsum(0)])
    for known in (
        sequences._known(given, None, 8),
        sequences._known(None, bounds, int(given.sum())),
    ):
        assert known[:2] == (max(lengths), even)


@pytest.mark.parametrize("reset", [False, True])
def test_lengths_of_all_steps_on_the_cpu_are_as_none(monkeypatch, reset):
    """They cost nothing then: no table, no other plan."""
    seen = []
    monkeypatch.setattr(
        autograd,
        "run",
        lambda chosen, problem, *given: seen.append((problem, given)) or (None, None),
    )
    Wx, R, b = torch.randn(2, 3, 4, 1, 8), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8)
    options = {"reset": torch.tensor([[False, True, False]] * 2)} if reset else {}
    for lengths in (None, torch.tensor([3, 3]), torch.tensor([3, 2])):
        flashrnn(Wx, R, b, lengths=lengths, return_states="h", **options)
    (without, of_none), (whole, of_whole), (ragged, of_ragged) = seen
    assert whole == without and not whole.ragged and ragged.ragged
    lengths_of = [None if x[-2] is None else x[-2].lengths for x in (of_none, of_whole, of_ragged)]
    assert lengths_of[0] is lengths_of[1] is None and lengths_of[2] is not None
