"""The suites that measure contenders in turns: host, short, step, arena, layers, sequences."""

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch

from flashrnn import nn
from flashrnn.__main__ import main
from flashrnn.bench import (
    arena,
    check,
    clocks,
    command,
    compared,
    in_turns,
    report,
    running,
    sequenced,
)
from flashrnn.bench.case import Case, tf32_allowed
from flashrnn.bench.contender import Found
from flashrnn.bench.layers import Layer, Stack
from flashrnn.bench.ours import Ours
from flashrnn.bench.peers import DTYPES, MODULES, TorchNN
from flashrnn.bench.sequenced import PackedTorchNN, Sequenced, TorchRL
from flashrnn.bench.single_step import Stepping
from flashrnn.bench.suites import SUITES, Entry, Selection

CPU = torch.device("cpu")
TINY = Case("lstm", B=2, T=5, N=1, D=3, dtype=torch.float32)
IN_TURNS = [name for name, suite in SUITES.items() if suite.measures]


# Clocks


def test_the_host_is_not_kept_waiting_and_the_wall_clock_is(monkeypatch):
    """A device that takes 2 ms for what is enqueued at once.

    The least of some samples: a busy machine may interrupt others.
    """
    pending = []
    monkeypatch.setattr(
        clocks, "_finish", lambda device: (time.sleep(2e-3 * len(pending)), pending.clear())
    )
    calls = in_turns.without_gradients(
        replace(Ours("vanilla").prepare(TINY, CPU), run=lambda *leaves: pending.append(1))
    )
    host, wall = clocks.host(calls, CPU), clocks.wall(calls, CPU)
    assert min(host() for _ in range(5)) < 1000
    assert 2000 <= min(wall() for _ in range(5)) < 20_000


@pytest.mark.parametrize(("once", "count"), [(1e-6, clocks.MOST), (1e-3, 5), (1.0, 1)])
def test_a_sample_has_as_many_calls_as_fit(once, count, monkeypatch):
    made = []
    monkeypatch.setattr(clocks, "_seconds", lambda calls: (len(calls) - 1) * once)

    def calls(count):
        made.append(count)
        return [None] * count

    assert clocks.wall(calls, CPU)() == pytest.approx(once * 1e6)
    assert made[-1] == count


def test_what_is_called():
    work = Ours("vanilla").prepare(TINY, CPU)
    seen = []

    def run(*leaves):
        seen.append(torch.is_grad_enabled())
        return work.run(*leaves)

    noted = replace(work, run=run)
    for calls, grad_enabled in (
        (in_turns.without_gradients, False),
        (in_turns.with_gradients, True),
        (in_turns.both, True),
    ):
        (call,) = calls(noted)(1)
        seen.clear()
        call()
        assert seen == [grad_enabled]
    ready = in_turns.backward(noted)(2)
    seen.clear()
    # Forward is done before, and each has a graph of its own.
    for call in ready:
        assert [x.shape for x in call()] == [x.shape for x in work.leaves]
    assert not seen


# In turns


def test_contenders_take_turns_to_and_fro():
    order = []

    def sample(name):
        return lambda: order.append(name) or float(len(order))

    reason = Found(reason="too wide")
    first, second, third = in_turns.in_turns([sample("a"), reason, sample("b")], seconds=0.0)
    assert order[:4] == ["a", "b", "b", "a"] and len(first) == len(third) == in_turns.FEWEST
    assert second is reason


def test_who_fails_on_the_way_is_left_behind():
    values = iter([1.0, Found(reason="failed: out of memory")])
    found, other = in_turns.in_turns([lambda: next(values), lambda: 2.0], seconds=0.0)
    assert found.reason == "failed: out of memory" and other == [2.0] * in_turns.FEWEST


def test_results_are_checked_and_reasons_stand_beside_others_times():
    class Wrong(Ours):
        def prepare(self, case, device):
            work = super().prepare(case, device)
            return replace(work, run=lambda *leaves: work.run(*leaves) * 1.1)

    contenders = [Ours("auto"), Wrong("vanilla"), Ours("cuda"), Stepping()]
    found = in_turns.measure(contenders, TINY, CPU, in_turns.WALL, seconds=0.0)
    right, wrong, *refused = found
    assert list(right) == [measure.name for measure in in_turns.WALL]
    for measured in right.values():
        assert measured.unit == "µs" and measured.value > 0 and measured.error < 1e-6
        assert measured.q1 <= measured.value <= measured.q3
    assert all(each.value is None and "wrong: the output" in each.reason for each in wrong.values())
    if not torch.cuda.is_available():
        assert all(each.value is None and each.reason for each in refused[0].values())
    assert {x.reason for x in refused[1].values()} == {"a single step has no gradients"}


def test_tf32_is_allowed_while_it_is_measured_and_held_to_its_own_accuracy():
    matmul = torch.backends.cuda.matmul
    with tf32_allowed():
        assert matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert not matmul.allow_tf32
    truth = torch.ones(10)
    given, plain, exact = (
        check.Results(x, [], finite=True) for x in (truth * 1.001, truth, truth.double())
    )
    assert check.judge(given, exact, plain, tf32=True).reason is None
    assert "the output is off by 0.001" in check.judge(given, exact, plain).reason
    far = check.Results(truth * 1.01, [], finite=True)
    assert "the output is off by 0.01" in check.judge(far, exact, plain, tf32=True).reason


# Contenders


@pytest.mark.parametrize("function", MODULES)
def test_layers_compute_the_same_from_the_same_numbers(function):
    case = replace(TINY, function=function, dtype=torch.float64)
    outputs = []
    for contender in (Layer(), TorchNN(torch.float64, full_width=False)):
        torch.manual_seed(in_turns.SEED)
        work = contender.prepare(case, CPU)
        outputs.append(work.run(*work.leaves))
        torch.testing.assert_close(outputs[-1], work.reference(*work.leaves))
    # [B, T, N, D] and [T, B, D]
    torch.testing.assert_close(outputs[0].squeeze(2).transpose(0, 1), outputs[1])


@pytest.mark.parametrize("directions", [1, 2])
def test_stacks_are_checked_by_their_first_steps(directions, monkeypatch):
    monkeypatch.setattr("flashrnn.bench.contender.STEPS", 4)
    case = replace(TINY, T=7)
    ours, theirs = (Stack(package, 2, directions) for package in (nn, torch.nn))
    found = in_turns.measure([ours, theirs], case, CPU, in_turns.WALL, seconds=0.0)
    for measured in (*found[0].values(), *found[1].values()):
        assert measured.reason is None and measured.error < 1e-5
    torch.manual_seed(0)
    work = ours.prepare(case, CPU)
    assert work.run(*work.leaves).shape == (7, 2, 3 * directions)
    # A reverse direction's first steps depend on the last ones.
    gradient = work.weights_of_loss()
    whole = replace(work, causal=True).given(gradient, backward=False).output
    cut = work.given(gradient, backward=False).output
    assert torch.allclose(whole, cut) == (directions == 1)


@pytest.mark.parametrize("option", sequenced.MEANING)
def test_calls_with_options_are_checked_by_their_first_steps(option, monkeypatch):
    monkeypatch.setattr("flashrnn.bench.contender.STEPS", 4)
    monkeypatch.setattr(sequenced, "RESETS", 0.5)
    case = replace(TINY, B=3, T=7, N=2)
    found, plain = in_turns.measure(
        [Sequenced(option), Sequenced(sequenced.PLAIN)], case, CPU, in_turns.WALL, seconds=0.0
    )
    for measured in (*found.values(), *plain.values()):
        assert measured.reason is None and measured.error < 1e-5
    outputs = []
    for each in (option, sequenced.PLAIN):
        torch.manual_seed(in_turns.SEED)
        work = Sequenced(each).prepare(case, CPU)
        outputs.append(work.run(*work.leaves))
    same = outputs[0].shape == outputs[1].shape and torch.equal(*outputs)
    # What an option asks for is computed, and nothing else.
    assert same == (option in (sequenced.PLAIN, sequenced.EQUAL, sequenced.H))


@pytest.mark.parametrize("function", MODULES)
@pytest.mark.parametrize("equal", [True, False])
def test_torch_on_packed_sequences_is_given_the_same_lengths(function, equal):
    case = replace(TINY, function=function, B=4, T=6, dtype=torch.float64)
    work = PackedTorchNN(torch.float64, full_width=False, equal=equal).prepare(case, CPU)
    given = work.run(*work.leaves)
    torch.testing.assert_close(given, work.reference(*work.leaves))
    lengths = sequenced.lengths_of(case)
    padding = torch.arange(case.T)[:, None] >= lengths
    assert lengths.max() <= case.T and padding.any()
    assert (given[padding] == 0).all() != equal


def test_torchrl_starts_anew_where_it_is_told():
    """By its kernels that run on a CPU; those by Triton take the same arguments."""
    pytest.importorskip("torchrl", reason="needs torchrl")
    peer = TorchRL("pad")
    case = replace(TINY, B=4, T=30)
    assert peer.refusal(case, CPU, True) is None
    work = peer.prepare(case, CPU)
    given, expected = (call(*work.leaves) for call in (work.run, work.reference))
    torch.testing.assert_close(given, expected)
    gradient = torch.randn_like(given)
    for x, y in zip(
        *(torch.autograd.grad(h, work.leaves, gradient) for h in (given, expected)), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_torchrl_says_why_it_is_not_measured(monkeypatch):
    reasons = []
    for version in (None, "0.14"):
        monkeypatch.setattr(sequenced, "_version_of_torchrl", lambda version=version: version)
        peer = TorchRL()
        assert peer.name == ("torchrl 0.14, triton" if version else "torchrl, triton")
        reasons += [peer.refusal(replace(TINY, function=f), CPU, True) for f in ("lstm", "gru")]
    assert reasons == [
        "torchrl is not installed; pip install torchrl",
        "it is measured as an LSTM, not as gru",
        "its Triton kernels run on a GPU",
        "it is measured as an LSTM, not as gru",
    ]


def test_a_stepper_is_held_to_vanilla():
    case = replace(TINY, T=1, N=2)
    (found,) = in_turns.measure([Stepping()], case, CPU, in_turns.FORWARD_ALONE[:2], seconds=0.0)
    assert all(measured.error < 1e-6 and measured.value > 0 for measured in found.values())


# Random shapes


def test_random_shapes_are_the_same_for_a_seed_and_within_bounds():
    cases = arena.cases(200, seed=3, device="cuda")
    assert cases == arena.cases(300, seed=3, device="cuda")[:200]
    assert cases != arena.cases(200, seed=4, device="cuda")
    for name, (low, high) in {"B": arena.B, "T": arena.T, "D": arena.D}.items():
        values = [getattr(case, name) for case in cases]
        assert low <= min(values) < 2 * low and high / 2 < max(values) <= high
        # Log-uniformly: about as many below the geometric mean of the ends as above; the bound of
        # the product takes some of those above.
        assert 0.4 < sum(value < math.sqrt(low * high) for value in values) / 200 < 0.75
    assert max(case.B * case.T * case.D for case in cases) <= arena.LARGEST["cuda"]
    assert {case.dtype for case in cases} == set(DTYPES) and {case.N for case in cases} == {1}
    assert {case.function for case in cases} == set(MODULES)


def test_time_is_shared_among_the_shapes_that_are_left(monkeypatch, capsys):
    clock = itertools.count(100.0, 2.0)
    monkeypatch.setattr(arena.time, "perf_counter", lambda: next(clock))
    entries = SUITES["arena"].entries(Selection(shapes=5))
    tasks = [running.Task("arena", entry, entry.contenders) for entry in entries]
    others = [running.Task("host", entries[0], entries[0].contenders)]
    shares = [share for _, share in command._within_time([*others, *tasks], seconds=7.0)]
    # A shape takes 2 s: of 7 s the first one may take what is left of them, a fifth of 5.
    assert shares == [math.inf, 1.0, 0.75, pytest.approx(1 / 3)]
    assert "2 of 5 shapes were left out when 7 s were up" in capsys.readouterr().out


# Summary


def rows(ours, theirs, **sizes):
    case = replace(TINY, **sizes)
    return [
        report.Row.of(
            "arena",
            name,
            case,
            "",
            "wall, forward",
            Found(value, "µs") if value else Found(reason="failed"),
            None,
        )
        for name, value in (("recurrent_layer", ours), ("torch.nn float32, one head", theirs))
    ]


def test_a_summary_says_what_was_won_and_what_was_worst():
    lines = compared.summary(
        [
            rows(1.0, 8.0, D=7),
            rows(4.0, 2.0, D=8, dtype=torch.float16),
            rows(None, 2.0, D=9),
            rows(1.0, None, D=10),
        ]
    )
    assert lines[0] == "arena: wall, forward, beside torch.nn"
    # The geometric mean of 8 and 1/2.
    assert lines[1].split(maxsplit=1) == [
        "all",
        "1 of 3 won, 2 times as fast (geometric mean), 1 failed; torch.nn failed in 1 more",
    ]
    assert lines[2].split(maxsplit=1)[1].startswith("0 of 1 won, 0.5 times")
    worst = [line for line in lines if "worst" in line]
    assert "D 9" not in worst[0] and "1×9" in worst[0] and worst[0].endswith("failed")
    assert "1×8" in worst[1] and worst[1].endswith("0.5 (4 and 2 µs)")
    assert "1×7" in worst[2] and len(worst) == 3


def test_a_summary_tells_the_plain_call_from_torch():
    task = rows(2.0, 8.0)
    plain = replace(task[0], contender=sequenced.PLAIN, value=1.0)
    lines = compared.summary([[*task, plain]])
    assert [line for line in lines if "beside" in line] == [
        "arena: wall, forward, beside torch.nn",
        "arena: wall, forward, beside plain call",
    ]
    assert lines[1].split(maxsplit=1)[1].startswith("1 of 1 won, 4 times")
    assert any("0 of 1 won, 0.5 times" in line for line in lines)


# Suites


@pytest.mark.parametrize("suite", IN_TURNS)
def test_ours_come_first_and_torch_takes_part(suite):
    for entry in SUITES[suite].entries(Selection()):
        ours, *_, peer = entry.contenders
        assert not ours.name.startswith("torch.nn") and peer.name.startswith("torch.nn")
        assert isinstance(peer, Stack) or peer.dtype == entry.case.dtype


def test_suites_have_the_cases_that_they_promise():
    def cases(suite):
        return [entry.case for entry in SUITES[suite].entries(Selection())]

    assert {(c.N, c.D, c.B, c.T) for c in cases("host")} == {
        (2, 64, 4, 8), (12, 64, 16, 8), (1, 120, 9, 1)
    }  # fmt: skip
    assert {c.T for c in cases("short")} == {1, 2, 4, 8, 16, 32, 64}
    assert {(c.N, c.D) for c in cases("step")} == {(1, 256), (1, 768), (12, 64), (4, 128)}
    assert {(c.B, c.T) for c in cases("step")} == {(1, 1), (16, 1)}
    assert len(cases("arena")) == 95
    stacks = [entry.contenders[0] for entry in SUITES["layers"].entries(Selection())]
    assert {(x.layers, x.directions) for x in stacks} == set(itertools.product((1, 2, 4), (1, 2)))
    assert len(stacks) == 36
    options = [(e.contenders[0].option, e.case.N) for e in SUITES["sequences"].entries(Selection())]
    assert {option for option, _ in options} == {*sequenced.MEANING} - {sequenced.PLAIN}
    assert {option for option, N in options if N == 1} == {
        option for option, N in options if N == 12
    } - {sequenced.H}


@pytest.mark.parametrize("suite", IN_TURNS)
def test_a_suite_on_the_cpu_says_where_it_is_measured(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    entries = SUITES[suite].entries(Selection(quick=True, device="cpu"))
    sizes = [entry.case.B * entry.case.T * entry.case.N * entry.case.D for entry in entries]
    assert max(sizes) <= 100_000
    entry = Entry(replace(entries[-1].case, B=1, T=1, D=2), contenders=entries[-1].contenders)
    monkeypatch.setitem(SUITES, suite, replace(SUITES[suite], entries=lambda _: [entry]))
    monkeypatch.setattr(in_turns, "FEWEST", 2)
    arguments = ["bench", suite, "--quick", f"--output={tmp_path}", "--seconds=0.001"]
    assert main(arguments) == 0
    found = report.read(tmp_path / command.FILE)
    assert len(found) == len(entry.contenders) * len(SUITES[suite].measures)
    for row in found:
        assert "threads" in row["device"]
        assert bool(row["value"]) == (not row["measure"].startswith("graph"))
    printed = capsys.readouterr().out
    assert f"PyTorch {torch.__version__.split('+')[0]}" in printed and "threads" in printed
    assert f"{suite}: {SUITES[suite].measures[0].name}, beside torch.nn" in printed


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("measure", [*in_turns.HOST, *in_turns.WALL, *in_turns.GRAPH])
def test_each_measure_on_a_gpu(measure):
    case = Case("lstm", B=2, T=3, N=1, D=32, dtype=torch.float16)
    contenders = [Ours("auto"), TorchNN(torch.float16, full_width=False)]
    device = torch.device("cuda", torch.cuda.current_device())
    for found in in_turns.measure(contenders, case, device, [measure], seconds=0.1):
        assert found[measure.name].reason is None and 0.5 < found[measure.name].value < 1e5
