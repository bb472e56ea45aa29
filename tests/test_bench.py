"""The benchmark: it times the right calls, refuses wrong results, and keeps its rows."""

import csv
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from flashrnn import backends
from flashrnn.__main__ import main
from flashrnn.bench import (
    check,
    cold_start,
    command,
    contender,
    figure,
    memory,
    report,
    running,
    timing,
)
from flashrnn.bench.case import Case
from flashrnn.bench.contender import BOTH, FORWARD, TIMES, Contender, Found
from flashrnn.bench.ours import DEFAULT, Ours
from flashrnn.bench.peers import Attention, TorchNN
from flashrnn.bench.running import Contestants, plan
from flashrnn.bench.stamp import FIELDS, collect
from flashrnn.bench.suites import GOALS, SUITES, WIDTH, Entry, Mark, Selection
from flashrnn.bench.upstream import Upstream
from tests.problems import BUILT_IN

CPU = torch.device("cpu")
TINY = Case("lstm", B=2, T=5, N=2, D=3, dtype=torch.float32)
STAMP = dict.fromkeys(FIELDS, "") | {"device": "Abacus", "torch": "2", "date": "2026-01-02T03"}


# Timing


def test_repetitions_take_turns_on_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(timing, "CPU_CACHE", 1000)
    seen = []

    def run(x, w):
        seen.append((x.data_ptr(), w.data_ptr(), torch.is_grad_enabled()))
        return x * w

    x, w = (torch.randn(50, requires_grad=True) for _ in range(2))  # 200 bytes
    taken = timing.measure(run, [x], [w], backward=False, seconds=0.001)
    # A copy of x and of a gradient are 400 bytes: five fill 1000 bytes twice.
    inputs = [pointer for pointer, *_ in seen[-taken.repetitions :]]
    assert len(set(inputs)) == min(5, taken.repetitions) and x.data_ptr() not in inputs
    assert all(a != b for a, b in itertools.pairwise(inputs))
    assert {(weight, grad) for _, weight, grad in seen} == {(w.data_ptr(), False)}
    assert timing.FEWEST <= taken.repetitions <= timing.MOST
    assert 0 < taken.q1 <= taken.median <= taken.q3


def test_backward_asks_for_every_gradient_with_a_dense_one(monkeypatch):
    asked = []
    grad = torch.autograd.grad

    def noted(output, leaves, gradient):
        asked.append((len(leaves), bool(gradient.is_contiguous() and gradient.std() > 0)))
        return grad(output, leaves, gradient)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    x, w = (torch.randn(50, requires_grad=True) for _ in range(2))
    timing.measure(lambda x, w: x * w, [x], [w], backward=True, seconds=0.0)
    assert len(asked) == 2 + timing.FEWEST and set(asked) == {(2, True)}
    assert x.grad is None


@pytest.mark.parametrize(
    ("seconds", "once", "count"), [(0.1, 10, 10), (0.1, 1000, 3), (10, 0.01, 200), (0.5, 0, 200)]
)
def test_repetitions_follow_the_time_that_there_is(seconds, once, count):
    assert timing._count(seconds, once, timing.FEWEST) == count


def test_median_and_quartiles(monkeypatch):
    clock = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 50.0])  # once, to warm up, five times
    monkeypatch.setattr(timing, "_by_wall_clock", lambda call, n: list(itertools.islice(clock, n)))
    monkeypatch.setattr(timing, "_count", lambda seconds, once, fewest: 1 if fewest == 1 else 5)
    x = torch.randn(5)
    assert timing.measure(lambda x: x, [x], [], False, 1) == timing.Timing(3, 2, 4, 5)


# Checks


@pytest.fixture
def short(monkeypatch):
    """Cuts of so few steps that a sequence of 7 is longer."""
    monkeypatch.setattr(contender, "STEPS", 4)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("function", BUILT_IN)
@pytest.mark.parametrize(
    "contestant",
    [
        Ours("vanilla"),
        Ours("auto", product=True),
        TorchNN(torch.float32, full_width=False),
        TorchNN(torch.float32, full_width=True),
        Attention(),
    ],
    ids=lambda contestant: contestant.name,
)
def test_contenders_compute_what_their_reference_does(contestant, function):
    case = replace(TINY, function=function, T=7)
    if contestant.refusal(case, CPU, True):
        assert (function, type(contestant)) == ("slstm", TorchNN)
        return
    torch.manual_seed(0)
    found = contestant.times(case, CPU, seconds=0.0)
    assert list(found) == [FORWARD, BOTH]
    for measured in found.values():
        assert measured.reason is None and measured.value > 0 and measured.unit == "ms"
        assert measured.error < 1e-5
    assert found[BOTH].gradient_error < 1e-5 and found[FORWARD].gradient_error is None
    with torch.no_grad():
        work = contestant.prepare(case, CPU)
        whole, reference = work.run(*work.leaves), work.reference(*work.leaves)
    torch.testing.assert_close(whole, reference)
    assert whole.shape[work.time] == case.T


@pytest.mark.usefixtures("short")
def test_the_first_steps_of_the_whole_are_those_of_the_cut():
    """Exactly, in float64, the gradients too; and what follows them is looked at as well."""
    torch.manual_seed(0)
    case = replace(TINY, T=7, dtype=torch.float64)
    work = Ours("vanilla").prepare(case, CPU)
    gradient = work.weights_of_loss()
    assert gradient.shape[1] == 4
    truth, plain = work.truths(gradient, backward=True)
    verdict = check.judge(work.given(gradient, True), truth, plain)
    assert verdict.reason is None and max(verdict.output, verdict.gradient) < 1e-14

    late = replace(work, run=lambda *leaves: late_nan(work.run(*leaves)))
    verdict = check.judge(late.given(gradient, True), truth, plain)
    assert verdict.reason == "wrong: something is not finite"


def late_nan(h):
    h = h.clone()
    h[:, -1] = torch.nan
    return h


@dataclass(frozen=True)
class Flawed(Ours):
    """A backend with a flaw, a function of h and the leaves."""

    flaw: object = None

    def prepare(self, case, device):
        work = super().prepare(case, device)
        return replace(work, run=lambda *leaves: self.flaw(work.run(*leaves), *leaves))


@pytest.mark.parametrize(
    ("flaw", "forward", "both"),
    [
        (lambda h, *_: h * 1.001, "the output is off by 0.001", "the output is off by 0.001"),
        (lambda h, Wx, R, b: h + (R - R.detach()).sum(), None, "gradient 1 is off by"),
        (lambda h, *_: h.bfloat16().float(), "the output is off by 0.00", "the output is off by"),
        (lambda h, *_: h.roll(1, 0), "the output is off by 1", "the output is off by 1"),
    ],
    ids=["inexact", "gradient of R", "bfloat16 for float32", "sequences confused"],
)
def test_a_wrong_result_has_no_time(flaw, forward, both):
    torch.manual_seed(0)
    found = Flawed("vanilla", flaw=flaw).times(TINY, CPU, seconds=0.0)
    for measured, words in zip(found.values(), (forward, both), strict=True):
        if words is None:
            assert measured.reason is None and measured.value > 0
        else:
            assert measured.reason.startswith("wrong: ") and words in measured.reason
            assert measured.value is None and measured.error >= 0


def test_a_peer_with_confused_gates_is_found_out():
    torch.manual_seed(0)
    work = TorchNN(torch.float32, full_width=True).prepare(TINY, CPU)
    confused = replace(
        work,
        reference=lambda x, W, R, *biases: work.reference(x, W, R.roll(len(R) // 4, 0), *biases),
    )
    gradient = work.weights_of_loss()
    verdict = check.judge(work.given(gradient, True), *confused.truths(gradient, True))
    assert verdict.reason.startswith("wrong: the output is off by")


def test_sixteen_bits_are_held_to_twice_vanilla():
    torch.manual_seed(0)
    case = replace(TINY, dtype=torch.bfloat16, T=8, D=16)
    assert Ours("vanilla").times(case, CPU, seconds=0.0)[BOTH].reason is None
    coarse = Flawed("vanilla", flaw=lambda h, *_: (h * 64).round() / 64 + 0 * h)
    assert "the output is off by" in coarse.times(case, CPU, seconds=0.0)[FORWARD].reason


# Reasons


def test_the_backends_own_reasons_stand_in_the_rows(monkeypatch):
    module = backends.load("cuda")
    monkeypatch.setattr(module, "unavailable", lambda device: None)
    monkeypatch.setattr(
        module, "unsupported", lambda problem: "no backward" if problem.needs_gradient else None
    )
    monkeypatch.delattr(module, "forward")
    monkeypatch.setattr(module, "run", backends.load("vanilla").run, raising=False)
    found = Ours("cuda").times(TINY, CPU, seconds=0.0)
    assert found[FORWARD].value > 0 and found[BOTH] == Found(reason="no backward")
    monkeypatch.setattr(module, "unavailable", lambda device: "no GPU")
    assert Ours("cuda").times(TINY, CPU, 0.0) == dict.fromkeys(TIMES, Found(reason="no GPU"))
    assert Ours("cuda").memory(TINY, CPU) == dict.fromkeys(memory.MEASURES, Found(reason="no GPU"))


def test_a_failure_is_a_row():
    def fail(h, *_):
        raise torch.OutOfMemoryError("tried to allocate a lot\nand more")

    found = Flawed("vanilla", flaw=fail).times(TINY, CPU, seconds=0.0)
    assert found[FORWARD].reason == "failed: OutOfMemoryError: tried to allocate a lot"


def test_auto_says_whom_it_took():
    assert Ours("auto", product=True).includes(TINY, CPU).startswith("auto takes vanilla; with the")


# Suites


def test_every_backend_takes_part_under_its_name():
    """Whatever `flashrnn.backends` lists: a new one needs no change here."""
    assert DEFAULT[: len(backends.PREFERENCE)] == backends.PREFERENCE
    assert [Ours.named(name).name for name in DEFAULT] == list(DEFAULT)


def test_heads_share_a_width_or_are_single():
    cases = [entry.case for entry in SUITES["head-dim"].entries(Selection())]
    assert [(c.N, c.D) for c in cases if c.D <= WIDTH] == [
        (48, 16), (24, 32), (12, 64), (6, 128), (3, 256), (2, 384), (1, 768)
    ]  # fmt: skip
    assert all(c.N == 1 for c in cases if c.D > WIDTH) and cases[-1].D == 2560


@pytest.mark.parametrize(
    ("suite", "axis", "ends"), [("batch", "B", (1, 256)), ("length", "T", (256, 4096))]
)
def test_what_the_suites_vary(suite, axis, ends):
    values = [getattr(entry.case, axis) for entry in SUITES[suite].entries(Selection())]
    assert (min(values), max(values)) == ends


@pytest.mark.parametrize("suite", SUITES)
def test_quick_cases_are_fewer_and_options_reach_every_case(suite):
    entries = SUITES[suite].entries
    assert 0 < len(entries(Selection(quick=True))) <= len(entries(Selection()))
    chosen = entries(Selection("gru", torch.bfloat16))
    assert {(e.case.function, e.case.dtype) for e in chosen} == {("gru", torch.bfloat16)}


def test_every_goal_is_measured_by_the_backend_that_has_it():
    with GOALS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tasks = plan(["goals"], Selection(), Contestants())
    assert len(tasks) == len(rows)
    for row, task in zip(rows, tasks, strict=True):
        case, marks = task.entry.case, task.entry.marks
        assert task.contenders == (Ours(row["backend"]),)
        assert [str(getattr(case, name)) for name in ("function", *"BTND")] == [
            row[name] for name in ("function", *"BTND")
        ]
        assert case.dtype_name == row["dtype"]
        assert marks[FORWARD].goal == float(row["goal_fw_ms"])
        assert marks[BOTH].goal == float(row["goal_fwbw_ms"])
        assert marks[FORWARD].peer == row["best_peer"]
    chosen = plan(["goals"], Selection(), Contestants(backends=("cuda",)))
    assert len(chosen) == sum(row["backend"] == "cuda" for row in rows)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_goal_in_tf32_is_float32_computed_so(tf32, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    monkeypatch.setattr(
        "flashrnn.bench.contender.judge",
        lambda given, *truths, tf32: (
            seen.append((matmul.allow_tf32, tf32)) or check.judge(given, *truths, tf32=tf32)
        ),
    )
    monkeypatch.setattr(running, "device_of", lambda suite: CPU)
    entry = Entry(replace(TINY, tf32=tf32))
    rows = running.measure(running.Task("goals", entry, (Ours("vanilla"),)), quick=True)
    assert seen == [(tf32, tf32)] * 2 and not matmul.allow_tf32
    assert {row.dtype for row in rows} == {"tf32" if tf32 else "float32"}
    assert all(row.value for row in rows)


def test_memory_is_held_against_upstreams_scheme():
    """LSTM 16, 12×64: 2 states and 4 gates of 16 · 1024 · 768 numbers of 2 bytes."""
    entries = SUITES["memory"].entries(Selection("lstm"))
    mark = entries[0].marks[memory.HELD]
    assert (mark.peer_value, mark.goal) == (144, None) and "computed" in mark.peer


def test_peers_are_chosen():
    def names(suite, entry, **options):
        return [each.name for (each,) in Contestants(**options).of(SUITES[suite], entry)]

    entry = Entry(TINY)
    peers = names("batch", entry, backends=("vanilla",))
    assert peers[0] == "vanilla" and peers[-1] == "attention" and len(peers) == 8
    assert "torch.nn float16, one head" in peers and "torch.nn float32, full width" in peers
    single = names("batch", Entry(replace(TINY, N=1)), backends=("vanilla",))
    assert not any("full width" in name for name in single)
    assert names("cpu", entry, backends=("vanilla",), peers=("nn",)) == [
        "vanilla", "torch.nn float32, one head", "torch.nn float32, full width"
    ]  # fmt: skip
    upstream = names("batch", entry, backends=("vanilla",), peers=(), upstream=Path("x"))
    assert upstream[1:] == ["upstream cuda_fused", "upstream cuda", "upstream triton_fused"]
    assert names("cold-start", entry) == list(backends.PREFERENCE)


# Rows


def row(value=1.5, suite="head-dim", name="triton", measure=FORWARD, **sizes):
    found = Found(value, "ms", value, value, 3, 1e-3) if value else Found(reason="too wide")
    case = replace(TINY, **sizes)
    mark = Mark(0.25, "somebody", 3.0)
    return report.Row.of(suite, name, case, "Wx given", measure, found, mark)


def test_a_row_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    results = report.Results(tmp_path / "a.csv", STAMP)
    results.add(row())
    (first,) = report.read(tmp_path / "a.csv")
    assert (first["value"], first["goal"], first["peer"]) == ("1.5", "0.25", "somebody")
    assert (first["device"], first["dtype"], first["includes"]) == ("Abacus", "float32", "Wx given")
    results.add(row(None))
    results.close()
    again = report.Results(tmp_path / "a.csv", STAMP | {"device": "Slide rule"})
    again.add(row())
    again.close()
    rows = report.read(tmp_path / "a.csv")
    assert [r["device"] for r in rows] == ["Abacus", "Abacus", "Slide rule"]
    assert (rows[1]["value"], rows[1]["reason"]) == ("", "too wide")


def test_a_stamp_says_where_and_when():
    stamp = collect(CPU, "abc")
    assert tuple(stamp) == FIELDS and stamp["commit"] == "abc"
    assert stamp["torch"] == torch.__version__.split("+")[0] or stamp["torch"] == torch.__version__
    assert "threads" in stamp["device"] and stamp["date"].endswith("+00:00")


def test_lines_for_people():
    rows = [row(), row(None, measure=BOTH)]
    first, second = report.lines(rows)
    assert first.split(maxsplit=1) == [
        "triton", "forward                          1.5 ms  (1.5 to 1.5)  goal 0.25  somebody: 3"
    ]  # fmt: skip
    assert second.split(maxsplit=3)[-1] == "too wide"
    (only,) = report.lines([row(None), row(None, measure=BOTH)])
    assert only.split(maxsplit=1) == ["triton", "too wide"]
    assert report.headline(rows[0]) == "head-dim: lstm 2×3, B 2, T 5, float32"


@pytest.mark.parametrize(
    ("value", "text"), [(0.55231, "0.552"), (12.34, "12.3"), (837.6, "838"), (12345.6, "12346")]
)
def test_numbers(value, text):
    assert report.number(value) == text


# Figures


def written(tmp_path, rows):
    results = report.Results(tmp_path / "results.csv", STAMP)
    for each in rows:
        results.add(each)
    results.close()
    return report.read(tmp_path / "results.csv")


def test_figures_are_of_rows_that_differ_in_the_axis_alone(tmp_path):
    rows = written(
        tmp_path,
        [
            row(9.0, D=64, N=12),
            row(2.0, D=64, N=12),  # Measured again: the last counts.
            row(3.0, D=768, N=1),
            row(None, D=1024, N=1),
            row(4.0, D=64, N=12, measure=BOTH),
            row(5.0, function="gru", D=64, N=12),
            row(6.0, suite="batch", B=1),
            row(6.0, suite="goals"),
            row(7.0, suite="cpu", name="vanilla"),
        ],
    )
    figures = {drawn.name: drawn for drawn in figure.arrange(rows)}
    assert set(figures) == {
        "head-dim-lstm-B2-T5-float32",
        "head-dim-gru-B2-T5-float32",
        "batch-lstm-2x3-T5-float32",
        "cpu-2x3-B2-T5-float32",
    }
    lines = figures["head-dim-lstm-B2-T5-float32"].lines
    assert lines[FORWARD]["triton"] == {64: 2.0, 768: 3.0}
    assert lines[BOTH]["triton"] == {64: 4.0}
    assert "Abacus" in figures["cpu-2x3-B2-T5-float32"].title


def test_what_was_measured_apart_is_drawn_as_such(tmp_path):
    sizes = {"B": 16, "T": 1024, "dtype": torch.bfloat16}
    (drawn,) = figure.arrange(written(tmp_path, [row(D=64, N=12, **sizes)]))
    before = drawn.lines[BOTH][figure.BEFORE]
    assert before[768] == 6.98 and 512 not in before
    assert drawn.lines[FORWARD][figure.BEFORE][64] == 1.99  # The best of three rows' peers.


def test_figures_are_written_and_new_names_have_a_style(tmp_path, capsys):
    rows = [
        row(value, name=name, measure=measure, D=D, N=768 // D)
        for name, value in (("triton", 1.0), ("of next year", 2.0))
        for measure in TIMES
        for D in (16, 768)
    ]
    written(tmp_path, [*rows, *(row(2.0, suite="functions", function=f) for f in BUILT_IN)])
    assert main(["bench", f"--figure={tmp_path / 'results.csv'}"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    for name in ("head-dim-lstm-B2-T5-float32", "functions-2x3-B2-T5-float32"):
        assert {f"{name}.svg", f"{name}.png"} <= names
    assert capsys.readouterr().out.count("Figure: ") == 4


def test_lines_are_told_apart_without_colour():
    seen = [(style.marker, style.line, style.hollow) for style in figure.STYLES.values()]
    peers = [name for name in figure.STYLES if name.startswith("torch.nn")]
    # Of torch.nn's lines, three dtypes share a marker each; all others have one of their own.
    assert len(set(seen)) == len(seen) - len(peers) + 2


# Processes of their own

# An LSTM without options, as the upstream package would be called; one of its backends is wrong.
UPSTREAM = """
import torch

def flashrnn(Wx, R, b, function, backend, dtype):
    assert (function, dtype) == ("lstm", "float32")
    if backend == "cuda":
        raise RuntimeError("nvcc is not to be found")
    h = c = torch.zeros_like(Wx[:, 0, 0])
    steps = []
    for x in Wx.unbind(1):
        i, f, z, o = (x + torch.einsum("gndp,bnp->bgnd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = (o if backend == "cuda_fused" else z).sigmoid() * c.tanh()
        steps.append(torch.stack([h, c]))
    return torch.stack(steps, 2), steps[-1].unsqueeze(2)
"""


@pytest.mark.slow
def test_upstream_runs_in_its_own_process_under_the_same_name(tmp_path):
    (tmp_path / "flashrnn").mkdir()
    (tmp_path / "flashrnn" / "__init__.py").write_text(UPSTREAM)
    found = Upstream("cuda_fused", tmp_path).times(TINY, CPU, seconds=0.0)
    assert all(measured.value > 0 and measured.error < 1e-5 for measured in found.values())
    assert found[BOTH].gradient_error < 1e-5
    found = Upstream("triton_fused", tmp_path).times(TINY, CPU, seconds=0.0)
    assert all(measured.reason.startswith("wrong: ") for measured in found.values())
    found = Upstream("cuda", tmp_path).times(TINY, CPU, seconds=0.0)
    assert found[BOTH].reason == "failed: RuntimeError: RuntimeError: nvcc is not to be found"
    gru = Upstream("cuda_fused", tmp_path).times(replace(TINY, function="gru"), CPU, seconds=0.0)
    assert "in the place of a fused GRU" in gru[FORWARD].reason


@pytest.mark.slow
def test_cold_starts_are_of_fresh_processes_with_caches_of_their_own(tmp_path, monkeypatch):
    probe = tmp_path / "probe.txt"
    child = Path(cold_start.__file__).with_name("cold_start_child.py")
    noted = (
        f"import os\nwith open({str(probe)!r}, 'a') as probe:\n"
        "    print(os.getpid(), os.environ['TRITON_CACHE_DIR'], os.getcwd(), file=probe)\n"
    )
    source = child.read_text()
    read_text = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **options: noted + source if path == child else read_text(path, **options),
    )
    found = cold_start.measure(Ours("vanilla"), TINY, CPU, repetitions=1)
    assert tuple(found) == cold_start.MEASURES
    assert all(measured.value > 0 and measured.unit == "s" for measured in found.values())
    empty, filled = (line.split() for line in read_text(probe).splitlines())
    assert empty[0] != filled[0] and empty[1:] == filled[1:]
    assert empty[1].startswith(empty[2]) and not Path(empty[2]).exists()


def test_cold_starts_have_reasons_too():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = cold_start.measure(Ours("cuda"), TINY, CPU, repetitions=1)
    assert {measured.reason for measured in found.values()} == {
        backends.load("cuda").unavailable(CPU)
    }


# The command


@pytest.fixture
def tiny(monkeypatch):
    """Suite cpu of two tiny cases, on a machine without a GPU."""
    entries = [
        Entry(replace(TINY, function=function), ("vanilla", "cuda")) for function in ("lstm", "gru")
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(SUITES, "cpu", replace(SUITES["cpu"], entries=lambda _: entries))


@pytest.mark.usefixtures("tiny")
def test_without_a_gpu_it_says_what_it_measures_and_does_so(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main(["bench", "--quick", f"--output={folder}", "--peers=nn", "--commit=abc"]) == 0
    printed = capsys.readouterr().out
    assert "What can be measured here is suite cpu: vanilla and torch.nn on the CPU." in printed
    assert "cpu: gru 2×3, B 2, T 5, float32" in printed
    rows = report.read(folder / command.FILE)
    assert len(rows) == 2 * 4 * 2 and {r["commit"] for r in rows} == {"abc"}
    for each in rows:
        assert bool(each["value"]) == (each["contender"] != "cuda")
        assert bool(each["reason"]) == (each["contender"] == "cuda")
    assert (folder / "cpu-2x3-B2-T5-float32.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_stopped_keeps_what_it_had(tmp_path, monkeypatch, capsys):
    measure, calls = running.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(running, "measure", interrupted)
    assert main(["bench", f"--output={tmp_path}", "--peers=none"]) == 130
    assert f"Stopped; what was measured is in {tmp_path / command.FILE}" in capsys.readouterr().err
    assert len(report.read(tmp_path / command.FILE)) == 2 * 2


@pytest.mark.usefixtures("tiny")
def test_without_matplotlib_rows_remain_to_be_drawn_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = ["bench", f"--output={tmp_path}", "--backends=vanilla", "--peers=none"]
    assert main(arguments) == 0
    path = tmp_path / command.FILE
    assert f"python -m flashrnn bench --figure {path}" in capsys.readouterr().out
    assert main(["bench", f"--figure={path}"]) == 2
    assert "figures need matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["head-dim"], "suite head-dim needs an NVIDIA GPU, and PyTorch sees none. Here it can"),
        (["heads"], "no suite 'heads'; there are head-dim, batch"),
        (["--backends=vanila"], "unknown backend 'vanila'. Did you mean 'vanilla'?"),
        (["--peers=nn,jax"], "--peers nn,jax: no 'jax'; there are nn, attention"),
        (["--upstream=."], "--upstream .: no package flashrnn there. `pip install --target ."),
        (["--output=file.txt"], "--output file.txt: File exists"),
        (["--figure=none.csv"], "none.csv: No such file or directory"),
        (["--figure=file.txt"], "file.txt has other columns"),
        (["--figure=empty.csv"], "no times to draw; figures are made of the suites head-dim"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_done_is_said_in_a_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("a,b\n1,2\n")
    report.Results(tmp_path / "empty.csv", STAMP).close()
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("flashrnn bench: ") and printed.count("\n") == 1
    assert words in printed


def test_help_names_every_suite_and_backend(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*SUITES, *DEFAULT, "--figure", "--upstream"))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*DEFAULT, "nn", "attention"])
def test_times_and_memory_on_a_gpu(name):
    case = Case("lstm", B=2, T=70, N=2, D=32, dtype=torch.bfloat16)
    contestant: Contender = {
        "nn": TorchNN(torch.float16, full_width=True),
        "attention": Attention(),
    }.get(name) or Ours.named(name)
    device = torch.device("cuda")
    if reason := contestant.refusal(case, device, True):
        pytest.skip(reason)
    for measured in contestant.times(case, device, seconds=0.01).values():
        assert measured.reason is None and measured.value > 0
    held, peak = (measured.value for measured in contestant.memory(case, device).values())
    assert 0 < held <= peak
