"""The stress program, as far as it can be tried without a GPU."""

import importlib.util
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from flashrnn import FlashRNNConfig
from flashrnn.cells import resolve
from flashrnn.kernels import registry
from flashrnn.kernels.cluster import ClusterBackwardPlan, ClusterMmaPlan, ClusterWgmmaPlan
from flashrnn.kernels.grid import GridPlan, GridWgmmaPlan
from flashrnn.kernels.single_cta import SingleCtaPlan
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.gpus import H200
from tests.problems import call, gradients, random_inputs, relative_error
from tests.residuals import backward_from_residuals
from tests.stress import __main__ as stress
from tests.stress import fuzz, limits
from tests.stress.cells import reciprocal, suited
from tests.stress.running import Check, run_in_a_child

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's cases are others")


def run(*checks):
    results = []
    run_in_a_child("part", checks, results.append)
    return results


def begin():
    """Has the process import this file, which takes time."""


def hang():
    time.sleep(600)


def die():
    print("last words", flush=True)
    os._exit(3)


@pytest.mark.slow
def test_a_hanging_check_is_killed_and_the_next_one_runs():
    _, hung, right = run(
        Check("begin", begin), Check("hang", hang, seconds=1), Check("right", os.getpid)
    )
    assert hung.failure.startswith("did not end within 1 s, and was killed") and hung.seconds < 60
    assert "in hang" in hung.failure, "the report says where its threads were"
    assert right.failure is None and right.returned != os.getpid()


@pytest.mark.slow
def test_a_process_that_dies_is_reported_with_what_it_printed():
    died, right = run(Check("die", die), Check("right", os.getpid))
    assert died.failure.startswith("its process died with exit code 3")
    assert "last words" in died.failure
    assert right.failure is None


@pytest.mark.slow
def test_an_error_ends_the_process_and_a_wrong_result_does_not():
    """After an error, the GPU may be in any state."""
    first, wrong, second, error, third = run(
        Check("pid", os.getpid),
        Check("wrong", partial(torch.testing.assert_close, torch.ones(1), torch.zeros(1))),
        Check("pid", os.getpid),
        Check("error", partial(torch.ones, -1)),
        Check("pid", os.getpid),
    )
    assert "not close" in wrong.failure and "RuntimeError" in error.failure
    assert first.returned == second.returned != third.returned


# ---- the command line


def test_lists_its_parts(capsys):
    assert stress.main(["--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(stress.PARTS)
    assert all(len(line) <= 100 and line.split()[1:] for line in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fuz"], "no part 'fuz'; accepted are fuzz, "), (["--case", "x"], "needs the one PART")],
    ids=str,
)
def test_says_what_it_does_not_know(arguments, message, capsys):
    with pytest.raises(SystemExit):
        stress.main(arguments)
    assert message in capsys.readouterr().err


def test_a_case_that_is_none_is_answered_with_those_there_are():
    with pytest.raises(SystemExit, match="no check 'x'; there are\n  isolated cuda"):
        stress.main(["nan", "--case", "x", "--backend", "cuda"])


@without_gpu
def test_says_what_was_left_out_and_counts_failures(monkeypatch, capsys):
    parts = {
        "one": stress.Part("a part", lambda _: [[Check("die", die)]], needs_gpu=False),
        "other": stress.Part("another", lambda _: [[Check("die", die)]]),
    }
    monkeypatch.setattr(stress, "PARTS", parts)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert stress.main([]) == 1
    printed = capsys.readouterr().out
    assert "FAILED one: its process died with exit code 3" in printed
    assert "python -m tests.stress one --case 'die'" in printed
    assert "needs a GPU" in printed and "1 failures in" in printed


# ---- fuzzing


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cases_follow_from_their_numbers_and_reach_everything(device):
    cases = [fuzz.draw(number, device) for number in range(0, 6000, 3)]
    assert cases[::100] == [fuzz.draw(number, device) for number in range(0, 6000, 300)]
    sizes = fuzz.SIZES[device]
    assert {case.T for case in cases} == {0, *sizes.T}
    assert {case.B for case in cases} == {0, *sizes.B}
    assert {case.D for case in cases} == set(sizes.D)
    assert {case.cell for case in cases} == set(fuzz.CELLS)
    assert {layout for case in cases for layout in case.layouts} == set(fuzz.LAYOUTS)
    assert {case.values for case in cases} == set(fuzz.VALUES)
    assert {case.mode for case in cases} == set(fuzz.MODES)


def test_a_family_shares_what_is_compiled():
    size = fuzz.SIZES["cuda"].family
    for first in range(0, 20 * size, size):
        cases = [fuzz.draw(number, "cuda") for number in range(first, first + size)]
        assert len({(x.cell, x.N, x.D, x.dtype, x.tf32, x.triton) for x in cases}) == 1
        assert len({x.B for x in cases} - {0}) <= 3 and len({x.layouts for x in cases}) <= 3


def test_three_minutes_reach_every_regime():
    found = Counter()
    for number in range(30 * fuzz.SIZES["cuda"].family):
        x = fuzz.draw(number, "cuda")
        if not x.triton and x.B:
            gpu = torch.device("cuda")
            cell = resolve(fuzz.CELLS[x.cell])
            problem = Problem(cell, x.B, 1, x.N, x.D, x.dtype, gpu, x.mode == "training")
            for backward in (False, True):
                plan = registry.best_plan(problem, H200, backward)
                found[type(plan).__name__, backward] += 1
    forward = {SingleCtaPlan, ClusterMmaPlan, GridPlan, GridWgmmaPlan, ClusterWgmmaPlan}
    expected = {(plan.__name__, False) for plan in forward}
    expected |= {(plan.__name__, True) for plan in (SingleCtaPlan, GridPlan, ClusterBackwardPlan)}
    assert expected <= found.keys() and all(found[key] >= 5 for key in expected)


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
def test_layouts_keep_shapes_and_all_but_one_keep_values(layout):
    x = torch.randn(3, 4, 2, 5)
    given = fuzz.LAYOUTS[layout](x, random.Random(0))
    assert given.shape == x.shape
    assert torch.equal(given, x) == (layout != "expanded")
    assert given.is_neg() == (layout == "negated")


def test_workers_share_the_families():
    every = [fuzz.cases(["cuda"], "cpu", 1, 60, k, 3) for k in range(3)]
    of_workers = [[check.name for check in itertools.islice(cases, 4)] for cases in every]
    assert of_workers[0] == [f"seed:{1_000_000 + k}" for k in (0, 3, 6, 9)]
    assert not {*of_workers[0]} & {*of_workers[1]}


@pytest.fixture
def wrong_backend(monkeypatch):
    """A backend "cuda" that is vanilla, but for a fault."""
    from flashrnn.backends import cuda, vanilla

    faults = []

    def run(problem, *tensors):
        states, last_states = vanilla.run(problem, *tensors)
        for fault in faults:
            states = fault(problem, states)
        return states, last_states

    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "unsupported", lambda problem: None)
    monkeypatch.delattr(cuda, "forward")
    monkeypatch.setattr(cuda, "run", run, raising=False)
    return faults.append


def failures(numbers):
    found = {}
    for number in numbers:
        try:
            fuzz.check(number, ["cuda"], "cpu")
        except AssertionError as error:
            found[number] = str(error)
    return found


def off_by_a_thousandth(problem, states):
    return states * 1.001 if problem.dtype == torch.float32 else states


def zero_where_nan(problem, states):
    return torch.where(states.isnan(), 0, states)


def last_unit_unwritten(problem, states):
    if not problem.B * problem.T:
        return states
    unwritten = states.new_empty(states.shape[:-1])
    return torch.cat([states[..., :-1], unwritten[..., None]], dim=-1)


def gradients_off_by_a_fiftieth(problem, states):
    return states + (states - states.detach()) / 50


def other_bits_each_time(problem, states, times=[0]):  # noqa: B006
    times[0] += 1
    return states * (1 + 2**-20 * times[0])


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (off_by_a_thousandth, "states: error 0.001, at most 1e-05 is right"),
        (gradients_off_by_a_fiftieth, "d_Wx: error 0.02"),
        (zero_where_nan, "elements are finite, inf or NaN where vanilla's are not alike"),
        (last_unit_unwritten, "elements are finite, inf or NaN where vanilla's are not alike"),
        (other_bits_each_time, "elements of other bits the second time"),
    ],
)
def test_a_planted_fault_is_found(wrong_backend, fault, found):
    assert not failures(range(24))
    wrong_backend(fault)
    assert any(found in message for message in failures(range(24)).values())


# Cases of clips through which NaN passes.
CLIPS = [
    number
    for number in range(400)
    if (case := fuzz.draw(number, "cpu")).values.startswith("planted")
    and "forward_clipval" in case.options
    and case.mode == "training"
]


def lost_gradients(problem, states):
    if states.requires_grad:
        states.register_hook(lambda gradient: torch.where(gradient.isnan(), 0, gradient))
    return states


def test_a_gradient_that_a_clip_should_have_let_pass_is_missed(wrong_backend):
    assert not failures(CLIPS)
    wrong_backend(lost_gradients)
    assert failures(CLIPS)


def test_few_gradients_hang_on_the_rounding_of_h_beside_a_clip():
    """Those that do not are held; vanilla in 16 bits is right there, too."""
    case = replace(fuzz.draw(640, "cuda"), B=4, N=1, D=64)
    draw = fuzz.Draw(case, "cpu", 0)
    some, none = (fuzz.pattern(found["d_Wx"]) for found in draw.about_the_clip)
    assert 0 < (some != none).float().mean() < 0.05
    assert torch.equal(*(x[some == none] for x in (some, fuzz.pattern(draw.plain["d_Wx"]))))


@without_gpu
def test_a_failing_case_fails_again_by_its_line(wrong_backend, capsys):
    wrong_backend(off_by_a_thousandth)
    number, message = next(iter(failures(range(24)).items()))
    line = ["fuzz", "--case", f"seed:{number}", "--backend", "cuda"]
    assert stress.main(line) == 1
    assert capsys.readouterr().out == f"FAILED seed:{number}: {message}\n"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 9, 13, 16])
def test_cases_of_the_emulated_kernels(fused_emulation, number):  # noqa: F811
    fuzz.check(number, ["cuda_fused"], "cpu")


@without_gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.slow
def test_some_seconds_of_fuzzing():
    command = [sys.executable, "-m", "tests.stress", "fuzz", "--seconds", "8"]
    command += ["--backend", "triton"]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "triton held" in finished.stdout


# ---- what residuals cost


def errors_with_residuals(cell, dtype, sizes=(9, 5, 2, 24), **options):
    """Of gradients, by vanilla and by vanilla with what is kept; and both gradients of Wx."""
    inputs = random_inputs(cell, *sizes, dtype)
    suited(cell, inputs)
    config = FlashRNNConfig(**options)

    def found(given):
        return gradients(call(cell, given, backend="vanilla", config=config), given)

    truth, plain = found(inputs.to(torch.float64)), found(inputs)
    with backward_from_residuals():
        kept = found(inputs)
    errors = [relative_error(x["Wx"], truth["Wx"]) for x in (plain, kept)]
    return *errors, plain, kept


@pytest.mark.parametrize("cell", fuzz.CELLS.values(), ids=fuzz.CELLS)
@pytest.mark.parametrize("options", [{}, *fuzz.OPTIONS], ids=str)
def test_what_is_kept_in_float32_is_what_vanilla_has(cell, options):
    _, _, plain, kept = errors_with_residuals(cell, torch.float32, **options)
    for name, x in plain.items():
        torch.testing.assert_close(kept[name], x, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_residuals_of_16_bits_cost_little_where_a_derivative_is_smooth(cell):
    plain, kept, *_ = errors_with_residuals(cell, torch.bfloat16)
    assert plain < kept < 1.5 * plain


def test_residuals_cost_what_a_derivative_is_ill_conditioned_by():
    """1/g² is off by twice what a rounded g is; the incoming and the found gradient by as much."""
    plain, kept, *_ = errors_with_residuals(reciprocal, torch.bfloat16, (64, 1, 2, 64))
    assert kept / plain == pytest.approx(((1 + 1 + 2**2) / (1 + 1)) ** 0.5, rel=0.1)


# ---- sizes past 2³¹


def test_windows_of_a_long_sequence_are_as_the_whole_has_them():
    """What lies before and after a window leaves no trace in it."""
    limits.large_problem("lstm", 2, 500, 3, 128, "vanilla", device="cpu")


@pytest.mark.parametrize("step", [0, 100, 499])
def test_a_fault_of_a_few_steps_is_found(wrong_backend, step):
    def fault(problem, states):
        factor = torch.ones_like(states)
        factor[:, -1, step, -1] = 1.1
        return states * factor

    limits.large_problem("lstm", 2, 500, 2, 16, "cuda", device="cpu")
    wrong_backend(fault)
    with pytest.raises(AssertionError, match="sequence 1, head 1, steps"):
        limits.large_problem("lstm", 2, 500, 2, 16, "cuda", device="cpu")
