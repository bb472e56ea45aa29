"""The command line of ``python -m flashrnn demo``."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from flashrnn import available_functions
from flashrnn.config import SUPPORTED_DTYPES
from flashrnn.demo import figure, language, state_tracking
from flashrnn.demo.automata import AUTOMATA
from flashrnn.demo.distributed import World, join
from flashrnn.demo.errors import DemoError
from flashrnn.demo.model import RecurrentNetwork
from flashrnn.demo.output import check_writable

TASKS = (*AUTOMATA, "text")
INTERRUPTED = 130

DESCRIPTION = """\
Trains a small recurrent network, on a GPU if there is one, and writes a figure.

tasks:
  parity  is the number of ones so far odd? Trained on lengths 3 to 40 that grow with the
          network's accuracy, tested up to 256. Well under a minute.
  mod     arithmetic modulo 5 from left to right: the running value. About a minute.
  s5      the product of a stream of swaps of two out of five elements, the word problem of
          the permutation group S5. Some four minutes.
  text    a character language model: bits per character on held-out text, and a sample.
          Python's own reference text, or --text FILE. Some three minutes. Ctrl-C saves; the
          same command again goes on.

The times are those of one core of a CPU.
"""
EPILOG = """\
several processes, each on a GPU of its own if there are GPUs:
  torchrun --nproc-per-node 2 -m flashrnn demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-command and declare its options."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--task", choices=TASKS, help="default: parity, or text where --text is given")
    add("--text", type=Path, metavar="FILE", help="learn from this UTF-8 file (task text)")
    add(
        "--function",
        choices=available_functions(),
        default="slstm",
        help="the cell; default: %(default)s",
    )
    add(
        "--backend",
        default="auto",
        metavar="NAME",
        help="as in flashrnn(): auto, or one of those that `info` lists; default: %(default)s",
    )
    add(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; default: cuda where there is a GPU, else cpu",
    )
    add(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES],
        default="float32",
        help="dtype of the recurrence; the parameters stay float32; default: %(default)s",
    )
    add("--steps", type=_positive, metavar="N", help="train N steps; at most N, but for text")
    add("--seed", type=_seed, default=0, metavar="N", help="default: %(default)s")
    add(
        "--output",
        type=Path,
        default=Path("flashrnn-demo"),
        metavar="FOLDER",
        help="for figures and checkpoints; default: %(default)s/",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted are whole numbers from 1 on")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; accepted are whole numbers from 0 to {2**31 - 1}"
        )
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Train, test, draw; returns the exit code."""
    try:
        if options.text and options.task not in (None, "text"):
            raise DemoError(f"--text goes with --task text, not with --task {options.task}")
        figure.check()
        with join(options.device) as world:
            if options.text or options.task == "text":
                return _language(options, world)
            return _state_tracking(options, world)
    except DemoError as error:
        print(f"flashrnn demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED


def _network(
    options: argparse.Namespace, world: World, tokens: int, outputs: int, size: tuple[int, int, int]
) -> RecurrentNetwork:
    """A network of ``size`` (layers, N, D), the same in every process, that has run once.

    Raises:
        DemoError: the backend cannot run it.
    """
    torch.manual_seed(options.seed)
    layers, N, D = size
    network = RecurrentNetwork(
        tokens, outputs, layers, options.function, N, D, options.backend, options.dtype
    ).to(world.device)
    try:
        network(torch.zeros(1, 1, dtype=torch.int64, device=world.device))
    except ValueError as error:
        raise DemoError(str(error)) from error
    if world.leads:
        parameters = sum(p.numel() for p in network.parameters())
        processes = f", {world.size} processes" if world.size > 1 else ""
        print(
            f"{options.function}: layers {layers}, heads {N}, units a head {D}, "
            f"parameters {parameters:,}; {options.dtype} on {world.device.type}{processes}"
        )
    return network


def _state_tracking(options: argparse.Namespace, world: World) -> int:
    automaton = AUTOMATA[options.task or "parity"]()
    schedule = state_tracking.SCHEDULES[automaton.name]
    schedule = replace(schedule, steps=options.steps or schedule.steps)
    states, tokens = automaton.table.shape
    picture = options.output / f"{automaton.name}-{options.function}.png"
    if world.leads:
        check_writable(picture)
        print(f"Task {automaton.name}: {automaton.title}")
    size = state_tracking.SIZES[automaton.name]
    network = _network(options, world, tokens, states, size)

    begun = time.perf_counter()
    trained = state_tracking.train(network, automaton, schedule, options.seed, world)
    seconds = time.perf_counter() - begun
    accuracy = state_tracking.test(network, automaton, options.seed, world)
    if world.leads:
        print(state_tracking.report(trained, seconds, accuracy))
        title = f"{automaton.title[0].upper()}{automaton.title[1:]}, {options.function}"
        state_tracking.plot(picture, title, accuracy, chance=1 / states)
        print(f"Figure: {picture}")
    return 0


def _language(options: argparse.Namespace, world: World) -> int:
    schedule = language.Schedule()
    schedule = replace(schedule, steps=options.steps or schedule.steps)
    text = language.read(options.text) if options.text else language.python_reference()
    corpus = language.Corpus.of(text, shortest=schedule.length + 1)
    name = f"text-{options.text.stem}" if options.text else "text"
    picture = options.output / f"{name}-{options.function}.png"
    kept = options.output / f"{name}-{options.function}.pt"
    count = len(corpus.characters)
    if world.leads:
        check_writable(picture, kept)
        print(
            f"Text: {options.text or 'the reference that comes with Python'}, {len(text):,} "
            f"characters, {count} different ones; the last tenth is held out"
        )
    network = _network(options, world, count, count, language.SIZE)
    settings = {
        "text": corpus.digest,
        "function": options.function,
        "dtype": options.dtype,
        "seed": options.seed,
        **asdict(schedule),
    }
    trained = language.train(network, corpus, schedule, options.seed, world, kept, settings)
    if not world.leads:
        return 0 if trained.finished else INTERRUPTED
    if not trained.finished:
        print(
            f"Stopped at step {trained.steps} of {schedule.steps} and saved {kept}.\n"
            "The same command again goes on from there."
        )
        return INTERRUPTED
    title = f"Character language model, {options.function}"
    print(language.report(trained))
    print(f"\nA sample:\n\n{language.sample(network, corpus, options.seed, world.device)}\n")
    language.plot(picture, title, trained.history)
    print(f"Figure: {picture}\nCheckpoint: {kept}")
    return 0
