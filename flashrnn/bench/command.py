"""The command line of ``python -m flashrnn bench``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flashrnn import available_functions
from flashrnn.bench import arena, compared, figure, report, running, stamp, upstream
from flashrnn.bench.errors import BenchError
from flashrnn.bench.ours import DEFAULT, Ours
from flashrnn.bench.running import PEERS, Contestants
from flashrnn.bench.suites import SUITES, Selection
from flashrnn.config import SUPPORTED_DTYPES, parse_dtype

INTERRUPTED = 130
FILE = "results.csv"
IN_TURNS = [name for name, suite in SUITES.items() if suite.measures]
SUITE_LIST = "\n".join(f"  {name:11} {suite.title}" for name, suite in SUITES.items())

DESCRIPTION = f"""\
Measures this package's backends beside what else there is for the same task, in one run on this
machine. Each configuration is checked against vanilla in float64 before it is timed; one whose
results are wrong has no time. Rows go into FOLDER/{FILE} as they come, and figures beside it.

suites:
{SUITE_LIST}
  all         those of the GPU; on a machine without one, cpu

A time is the median of repeated calls after some that warm up, by CUDA events; in parentheses stand
the quartiles. Inputs take turns, so that none is found in the cache. Backends are
{", ".join(DEFAULT)}; the ending +Wx has the input
multiplied by W within the measured time, as torch.nn does.

{", ".join(IN_TURNS[:-1])} and {IN_TURNS[-1]} measure
contenders of their own choice in turns: the host's time until a call returns, the wall clock's over
many calls in a row, the GPU's in a CUDA graph. They run on the CPU too, at small sizes. The summary
at the end says how many cases were faster than torch.nn.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-command and declare its options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help="one or more of the above; default: all")
    add(
        "--function",
        choices=available_functions(),
        help="the cell; default: lstm, or all in the suites that compare cells and in goals",
    )
    add(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES],
        help="of our backends; default: bfloat16, float16 in suites that measure in turns, on the "
        "CPU float32; in goals every row's own, in arena a random one",
    )
    add(
        "--backends",
        metavar="NAMES",
        help="with commas between; default: all, see above; not of suites that measure in turns",
    )
    add(
        "--peers",
        metavar="NAMES",
        default=",".join(PEERS),
        help="with commas between, or none; default: %(default)s; likewise",
    )
    add(
        "--upstream",
        type=Path,
        metavar="FOLDER",
        help="measure the upstream package too, after `pip install --target FOLDER flashrnn`",
    )
    add(
        "--shapes",
        type=int,
        default=arena.SHAPES,
        metavar="COUNT",
        help="of arena: how many; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="of arena: what they are drawn from; default: 0")
    add(
        "--seconds",
        type=float,
        default=240.0,
        help="of arena: for all of them, first calls and checks included; default: %(default)g",
    )
    add("--quick", action="store_true", help="fewer cases and repetitions: all in minutes")
    add(
        "--output",
        type=Path,
        default=Path("flashrnn-bench"),
        metavar="FOLDER",
        help="for figures and rows, which are added to earlier ones; default: %(default)s/",
    )
    add("--commit", metavar="TEXT", help="stamped on the rows; default: what git says, if it does")
    add("--figure", type=Path, metavar="FILE", help="only draw what is in this CSV, beside it")


def run(options: argparse.Namespace) -> int:
    """Measure, or draw; returns the exit code."""
    try:
        if options.figure:
            _draw(options.figure)
            return 0
        return _measure(options)
    except BenchError as error:
        print(f"flashrnn bench: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace) -> int:
    suites = _suites(options.suites or ["all"])
    contestants = _contestants(options)
    selection = Selection(
        options.function,
        parse_dtype(options.dtype) if options.dtype else None,
        options.quick,
        "cuda" if torch.cuda.is_available() else "cpu",
        options.shapes,
        options.seed,
    )
    tasks = running.plan(suites, selection, contestants)
    if not tasks:
        raise BenchError("nothing to measure: no suite has a case with these options")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--output {options.output}: {error.strerror}") from error
    path = options.output / FILE
    found = stamp.collect(running.device_of(SUITES[suites[0]]), options.commit)
    results = report.Results(path, found)
    print(f"{found['device']}, PyTorch {found['torch']}: {', '.join(suites)}; rows go into {path}")
    in_turns: list[list[report.Row]] = []
    try:
        with report.terminal(len(tasks)) as terminal:
            for task, seconds in _within_time(tasks, options.seconds):
                rows = running.measure(task, options.quick, seconds)
                for row in rows:
                    results.add(row)
                terminal.show(rows)
                if SUITES[task.suite].measures:
                    in_turns.append(rows)
            for line in compared.summary(in_turns):
                terminal.say(line)
    except KeyboardInterrupt:
        print(f"\nStopped; what was measured is in {path}.", file=sys.stderr)
        return INTERRUPTED
    finally:
        results.close()
    if any(SUITES[name].axis for name in suites):
        if figure.available():
            _draw(path)
        else:
            print(
                "No figures, for lack of matplotlib. Where there is one: "
                f"python -m flashrnn bench --figure {path}"
            )
    return 0


def _within_time(
    tasks: Sequence[running.Task], seconds: float
) -> Iterator[tuple[running.Task, float]]:
    """Tasks, and how long each may take: those that share some seconds, until these are up."""
    sharing = sum(SUITES[task.suite].shared_time for task in tasks)
    budget, left_out = None, 0
    for task in tasks:
        share: float | None = math.inf
        if SUITES[task.suite].shared_time:
            budget = budget or arena.Budget(seconds, sharing)
            share = budget.share()
        if share is None:
            left_out += 1
        else:
            yield task, share
    if left_out:
        print(f"{left_out} of {sharing} shapes were left out when {seconds:g} s were up: --seconds")


def _draw(path: Path) -> None:
    for drawn in figure.draw(report.read(path), path.parent):
        print(f"Figure: {drawn}")


def _suites(names: list[str]) -> list[str]:
    """The suites that are asked for, ``all`` spelled out, and each of them one for this machine.

    Raises:
        BenchError: an unknown name, suites of GPU and CPU at once, or one of a GPU without one.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    runnable = [name for name, suite in SUITES.items() if suite.device in (here, "any")]
    for name in names:
        if name not in (*SUITES, "all"):
            raise BenchError(f"no suite {name!r}; there are {', '.join(SUITES)}, and all")
        if name != "all" and name not in runnable and SUITES[name].device == "cuda":
            raise BenchError(
                f"suite {name} needs an NVIDIA GPU, and PyTorch sees none. Here it can measure "
                f"{', '.join(runnable)}"
            )
    if "all" in names:
        if here == "cpu":
            print("PyTorch sees no GPU. What can be measured here is suite cpu:", end=" ")
            print(f"{SUITES['cpu'].title}.")
        names = [*(name for name in runnable if here == "cuda" or name == "cpu"), *names]
    chosen = [name for name in SUITES if name in names]
    if len({running.device_of(SUITES[name]) for name in chosen}) > 1:
        raise BenchError("suite cpu takes a run of its own: rows are stamped with one device")
    return chosen


def _contestants(options: argparse.Namespace) -> Contestants:
    peers = () if options.peers == "none" else tuple(options.peers.split(","))
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise BenchError(
            f"--peers {options.peers}: no {unknown[0]!r}; there are {', '.join(PEERS)}"
        )
    backends = tuple(options.backends.split(",")) if options.backends else None
    try:
        for name in backends or ():
            Ours.named(name)
    except ValueError as error:
        raise BenchError(str(error)) from error
    if options.upstream:
        upstream.check_folder(options.upstream)
    return Contestants(backends, peers, options.upstream)
