"""The command line: ``python -m tests.stress [PART ...]``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flashrnn.backends import PREFERENCE, load
from tests.stress import fuzz, limits, machine
from tests.stress.running import Check, Result, run_in_a_child

FUSED = tuple(name for name in PREFERENCE if name != "vanilla")


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, and what the machine is."""

    backends: tuple[str, ...]
    device: str
    seconds: float
    seed: int
    workers: int


Queue = Iterable[Check]


@dataclass(frozen=True)
class Part:
    """A part of the program.

    Attributes:
        description: one line.
        queues: its checks; a process for each queue, all at once.
        alone: whether nothing else may run meanwhile.
        ahead: queues that run before a part that runs alone on a GPU, beside others: they compile.
        needs_gpu: whether it is left out where there is none.
        names_checks: whether each check is announced; else there are too many.
    """

    description: str
    queues: Callable[[Settings], list[Queue]]
    alone: bool = False
    ahead: Callable[[Settings], list[Queue]] = lambda settings: []
    needs_gpu: bool = True
    names_checks: bool = True


def each(
    settings: Settings, *functions: Callable[[str], None], seconds: float = 240
) -> list[Check]:
    """Checks of every backend, in turn."""
    return [
        Check(f"{function.__name__} {backend}", partial(function, backend), seconds)
        for function in functions
        for backend in settings.backends
    ]


def _fuzz(settings: Settings) -> list[Queue]:
    return [
        fuzz.cases(
            settings.backends, settings.device, settings.seed, settings.seconds, k, settings.workers
        )
        for k in range(settings.workers)
    ]


def _side_by_side(settings: Settings, *functions: Callable[[str], None]) -> list[Queue]:
    """A queue for each backend."""
    return [each(_of(settings, backend), *functions) for backend in settings.backends]


def _graphs(settings: Settings) -> list[Queue]:
    captured = each(settings, machine.captured_at_the_first_call)
    return [
        *_side_by_side(settings, machine.replayed),
        [x for x in captured if x.name != "captured_at_the_first_call triton"],
    ]


def _processes(settings: Settings) -> list[Queue]:
    return [each(settings, machine.for_some_seconds)] * 2


def _threads(settings: Settings) -> list[Queue]:
    return _side_by_side(
        settings, machine.first_calls_at_once, machine.first_calls_of_one_cell_at_once
    )


def _of(settings: Settings, backend: str) -> Settings:
    return Settings((backend,), settings.device, settings.seconds, settings.seed, settings.workers)


def _contexts(settings: Settings) -> list[Queue]:
    alone = (machine.on_the_cpu_without_cuda, machine.in_a_forked_child)
    return [
        [Check(function.__name__, function) for function in alone],
        each(settings, machine.in_a_thread_with_no_context, machine.in_a_green_context),
        each(settings, machine.in_a_thread_with_another_context),
    ]


LARGE: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {
    # Many sequences; few heads of long sequences; many heads; states that are more than gates.
    "cuda_fused": [
        ("lstm", (180_000, 4, 12, 64)),
        ("lstm", (1, 16_500, 512, 64)),
        ("lstm", (1, 700_000, 1, 768)),
        ("lstm", (1, 700_000, 3, 256)),
        ("lstm", (260, 2_100, 1, 1000)),
        ("lstm", (250, 4_300, 1, 512)),
        ("cascade", (180_000, 3, 12, 64)),
    ],
    "triton": [
        ("lstm", (180_000, 4, 12, 64)),
        ("lstm", (1, 16_500, 512, 64)),
        ("cascade", (180_000, 3, 12, 64)),
    ],
    "cuda": [
        ("lstm", (180_000, 4, 12, 64)),
        ("lstm", (1, 16_500, 512, 64)),
        ("cascade", (180_000, 3, 12, 64)),
    ],
}
FAR_APART = {
    "cuda_fused": [(3, 4, 3, 64), (16, 5, 2, 256), (16, 5, 1, 768)],
    "triton": [(3, 4, 3, 64)],
    "cuda": [(3, 4, 3, 64)],
}


def _indices(settings: Settings) -> list[Queue]:
    """Two queues, of which each takes 30 GB; what takes more waits for the other one's end."""
    large = {backend: _large(_of(settings, backend)) for backend in settings.backends}
    longest = large.pop("cuda_fused", [])
    rest = [*itertools.chain(*large.values()), *each(settings, limits.more_rows_than_32_bits_count)]
    return [queue for queue in (longest, rest) if queue]


def _large(settings: Settings) -> list[Check]:
    checks = []
    for backend in settings.backends:
        for name, sizes in LARGE[backend]:
            run = partial(limits.large_problem, name, *sizes, backend)
            checks.append(Check(f"{backend} {name} {sizes}".replace(" ", "_"), run))
        for sizes in FAR_APART[backend]:
            run = partial(limits.far_apart, "lstm", *sizes, backend)
            checks.append(Check(f"{backend} far apart {sizes}".replace(" ", "_"), run))
    return checks


def _with_device(settings: Settings, function: Callable[[str, str], None]) -> list[Check]:
    return [
        Check(f"{function.__name__} {backend}", partial(function, backend, settings.device), 240)
        for backend in settings.backends
    ]


PARTS = {
    "fuzz": Part(
        "random calls of hostile cells, held to vanilla", _fuzz, needs_gpu=False, names_checks=False
    ),
    "foreign": Part(
        "long products and spinning kernels on other streams beside kernels that wait for others",
        lambda s: _side_by_side(
            s, machine.beside_products, machine.beside_spinning_kernels, machine.beside_itself
        ),
    ),
    "priorities": Part(
        "streams of high and of low priority at once",
        lambda s: [each(s, machine.at_two_priorities)],
    ),
    "graphs": Part("CUDA graphs, replayed in turn with other inputs", _graphs),
    "processes": Part("two processes at once on one GPU", _processes),
    "threads": Part("threads with streams of their own, first calls at once", _threads),
    "contexts": Part("other contexts, green ones, CPU tensors in a forked child", _contexts),
    "nan": Part(
        "NaN and inf stay in their sequence, head and unit",
        lambda s: [_with_device(s, limits.isolated)],
        needs_gpu=False,
    ),
    "indices": Part("tensors and strides past 2³¹ elements", _indices, alone=True),
    "memory": Part(
        "calls that do not fit, kernels loaded when memory is full",
        lambda s: [each(s, limits.calls_that_do_not_fit, limits.first_calls_when_memory_is_full)],
        alone=True,
        ahead=lambda s: [each(s, limits.compile_first_calls)],
    ),
    "growth": Part(
        f"{limits.CALLS} calls of new sizes, clip values and cells: memory and time level off",
        lambda s: [_with_device(s, limits.many_calls)],
        alone=True,
        ahead=lambda s: [[check] for check in _with_device(s, limits.compile_many_calls)],
        needs_gpu=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; accepted are {', '.join(PARTS)}")
    if options.case and len(options.parts) != 1:
        parser.error("--case needs the one PART that it belongs to")
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12}{part.description}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # Triton reads it when it is imported, here and in the children.
        os.environ["TRITON_INTERPRET"] = "1"
    settings = Settings(
        backends=tuple(options.backend or _available(device)),
        device=device,
        seconds=options.seconds,
        seed=options.seed,
        workers=max(1, min(8, 3 * (os.cpu_count() or 1) // 8)),
    )
    chosen = {name: PARTS[name] for name in options.parts or PARTS}
    if options.case:
        ((name, part),) = chosen.items()
        return _run_here(_find(part, options.case, settings))
    return _run(chosen, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--list", action="store_true", help="say what parts there are")
    parser.add_argument("--seconds", type=float, default=45, help="for how long to fuzz (45)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other cases")
    parser.add_argument(
        "--backend", action="append", choices=FUSED, help="default: all that run here"
    )
    parser.add_argument("--case", help="run one check of one PART, in this process")
    return parser


def _available(device: str) -> list[str]:
    """Under Triton's interpreter that is one; the others' kernels need a GPU."""
    return [name for name in FUSED if load(name).unavailable(torch.device(device)) is None]


def _find(part: Part, name: str, settings: Settings) -> Check:
    if name.startswith("seed:"):
        return fuzz.case_check(int(name.removeprefix("seed:")), settings.backends, settings.device)
    queues = [*part.queues(settings), *part.ahead(settings)]
    checks = [check for queue in queues for check in queue]
    found = [check for check in checks if check.name == name]
    if not found:
        known = "\n  ".join(check.name for check in checks)
        raise SystemExit(f"no check {name!r}; there are\n  {known}")
    return found[0]


def _run_here(check: Check) -> int:
    try:
        returned = check.run()
    except AssertionError as error:
        print(f"FAILED {check.name}: {error}")
        return 1
    print(f"{check.name} is right" + (f": {returned}" if returned else ""))
    return 0


def _run(chosen: dict[str, Part], settings: Settings) -> int:
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    skipped = [name for name, part in chosen.items() if part.needs_gpu and settings.device == "cpu"]
    start = time.monotonic()

    def say(what: str) -> None:
        # In one piece: threads say something at once.
        print(f"{time.monotonic() - start:4.0f} s  {what}\n", end="", flush=True)

    def begin(name: str, check: Check) -> None:
        if chosen[name].names_checks:
            say(f"{name}: {check.name}")

    def report(result: Result) -> None:
        results[result.part].append(result)
        if result.failure is not None:
            say(_failure(result))

    def run_part(name: str, stage: str, queues: list[Queue]) -> None:
        began = time.monotonic()
        say(f"--- {name}{stage} begins")
        _at_once(
            partial(run_in_a_child, name, queue, report, partial(begin, name)) for queue in queues
        )
        failures = sum(x.failure is not None for x in results[name])
        took = time.monotonic() - began
        say(f"--- {name}{stage} took {took:.0f} s, {failures} failures so far")

    running = [name for name in chosen if name not in skipped]
    alone = [name for name in running if chosen[name].alone]
    first = [(name, "", chosen[name].queues(settings)) for name in running if name not in alone]
    if settings.device == "cuda":
        ahead = [(name, ", compiled ahead,", chosen[name].ahead(settings)) for name in alone]
        first += [stage for stage in ahead if stage[2]]
    _at_once(partial(run_part, *stage) for stage in first)
    for name in alone:
        run_part(name, "", chosen[name].queues(settings))
    return _summary(results, skipped, time.monotonic() - start)


def _at_once(works: Iterable[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _failure(result: Result) -> str:
    """What went wrong, and the line that shows it again."""
    again = f"python -m tests.stress {result.part} --case '{result.check.name}'"
    return f"FAILED {result.part}: {result.failure}\n  again: {again}"


def _summary(results: dict[str, list[Result]], skipped: list[str], seconds: float) -> int:
    print(f"\n{'part':12}{'checks':>8}{'seconds':>9}{'failures':>10}")
    for name, found in results.items():
        if name in skipped:
            print(f"{name:12}{'needs a GPU':>27}")
            continue
        failures = sum(result.failure is not None for result in found)
        print(f"{name:12}{len(found):8}{sum(x.seconds for x in found):9.0f}{failures:10}")
    counts = _counts(x.returned for found in results.values() for x in found)
    for kind, counter in counts.items():
        print(f"{kind}: " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
    failures = [x for found in results.values() for x in found if x.failure is not None]
    every = sorted(itertools.chain(*results.values()), key=lambda x: -x.seconds)
    print("longest: " + ", ".join(f"{x.part} {x.check.name} {x.seconds:.0f} s" for x in every[:12]))
    print(f"{len(failures)} failures in {seconds:.0f} s")
    for result in failures[:20]:
        print(_failure(result).splitlines()[-1].strip())
    return 1 if failures else 0


def _counts(returned: Iterable[Any]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for kinds in returned:
        for kind, names in (kinds or {}).items():
            counts.setdefault(kind, Counter()).update(names)
    return counts


if __name__ == "__main__":
    sys.exit(main())
