"""Training on an automaton with a length curriculum, and testing far beyond its lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flashrnn.demo.automata import Automaton
from flashrnn.demo.distributed import World
from flashrnn.demo.errors import optional
from flashrnn.demo.figure import Line, draw

SHORTEST, LONGEST = 3, 40
TEST_LENGTHS = (40, 64, 96, 128, 192, 256)
TEST_SEQUENCES = 1024
GOAL = 0.99


@dataclass(frozen=True)
class Schedule:
    """How a task is trained.

    Attributes:
        steps: at most so many.
        batch: sequences a step, over all processes.
        learning_rate: until the longest length is reached.
        mastered: the accuracy at the longest length so far at which sequences get longer.
        settle: steps once all lengths are mastered, while the learning rate falls to zero.
    """

    steps: int
    batch: int
    learning_rate: float
    mastered: float
    settle: int


SCHEDULES = {
    "parity": Schedule(steps=1500, batch=128, learning_rate=5e-3, mastered=0.9, settle=150),
    "mod": Schedule(steps=8000, batch=128, learning_rate=5e-3, mastered=0.9, settle=800),
    "s5": Schedule(steps=8000, batch=128, learning_rate=5e-3, mastered=0.95, settle=1200),
}
# Layers, heads and units a head.
SIZES = {"parity": (1, 4, 16), "mod": (1, 1, 64), "s5": (1, 1, 128)}


@dataclass(frozen=True)
class Trained:
    """What a training came to: its steps, and the longest length that it mastered, or 0."""

    steps: int
    mastered: int


def train(
    model: nn.Module, automaton: Automaton, schedule: Schedule, seed: int, world: World
) -> Trained:
    """Train on sequences whose length grows with the network's accuracy, from 3 up to 40.

    Args:
        model: ``model(tokens [B, T]) -> (logits [B, T, states], _)``.
        automaton: what to follow; its state is the label at every position.
        schedule: see :class:`Schedule`.
        seed: of the data.
        world: the processes that train together.
    """
    tqdm = optional("tqdm").tqdm
    model.train()
    parallel = world.wrap(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(seed)
    share = world.share(schedule.batch)
    longest, settling = SHORTEST, 0
    step = 0
    with tqdm(total=schedule.steps, disable=not world.leads, unit="step") as bar:
        while step < schedule.steps and settling < schedule.settle:
            T = _length(longest, generator)
            tokens, labels = (
                x[share].to(world.device) for x in automaton.sample(schedule.batch, T, generator)
            )
            logits, _ = parallel(tokens)
            # The processes' gradients are averaged: times their number makes that the sum.
            scale = world.size / (schedule.batch * T)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * scale
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * (1 - settling / schedule.settle)
            optimizer.step()
            step += 1

            right = (logits.argmax(-1) == labels).all(1).sum()
            total_loss, total_right = world.sum(loss.item(), right.item())
            accuracy = total_right / schedule.batch
            if settling:
                settling += 1
            elif longest == T and accuracy >= schedule.mastered:
                longest, settling = min(longest + 1, LONGEST), int(longest == LONGEST)
            bar.update()
            bar.set_postfix_str(
                f"loss {total_loss / world.size:.4f}, right {accuracy:.0%}, length ≤ {longest}"
            )
        bar.total = step
    mastered = LONGEST if settling else longest - 1
    return Trained(step, mastered if mastered >= SHORTEST else 0)


def _length(longest: int, generator: torch.Generator) -> int:
    """Every other time in the mean the longest length so far, by which progress is judged."""
    any_length, coin = torch.randint(1 << 30, (2,), generator=generator).tolist()
    return longest if coin % 2 else SHORTEST + any_length % (longest - SHORTEST + 1)


@torch.no_grad()
def test(
    model: nn.Module,
    automaton: Automaton,
    seed: int,
    world: World,
    lengths: tuple[int, ...] = TEST_LENGTHS,
) -> dict[int, float]:
    """Accuracy by length: the fraction of sequences with the right state at every position.

    Args:
        model: as in :func:`train`.
        automaton: as in :func:`train`.
        seed: of the data, from 0 to 2³¹ − 1; the training's sequences are others.
        world: the processes, each of which tests its share of 1024 sequences a length.
        lengths: which ones.
    """
    model.eval()
    # No seed below 2³¹ is the complement of another.
    generator = torch.Generator().manual_seed(~seed & 0xFFFF_FFFF)
    share = world.share(TEST_SEQUENCES)
    accuracy = {}
    for T in lengths:
        tokens, labels = (x[share] for x in automaton.sample(TEST_SEQUENCES, T, generator))
        logits, _ = model(tokens.to(world.device))
        (right,) = world.sum((logits.argmax(-1).cpu() == labels).all(1).sum().item())
        accuracy[T] = right / TEST_SEQUENCES
    return accuracy


def report(trained: Trained, seconds: float, accuracy: dict[int, float]) -> str:
    """What was reached, in words and as a table of accuracy by length."""
    if trained.mastered == LONGEST:
        progress = f"all lengths from {SHORTEST} to {LONGEST}"
    elif trained.mastered:
        progress = f"lengths up to {trained.mastered} of {LONGEST}; more --steps may get further"
    else:
        progress = f"not even length {SHORTEST}; more --steps may get further"
    rows = [f"{T:>8}   {right:>8.2%}" for T, right in accuracy.items()]
    longest = max(accuracy)
    verdict = "Reached" if accuracy[longest] >= GOAL else "Not reached"
    return "\n".join(
        [
            f"Mastered in {trained.steps} steps, {seconds:.0f} s: {progress}",
            f"Of {TEST_SEQUENCES} sequences of each length, right at every position:",
            "  length      right",
            *rows,
            f"{verdict}: at least {GOAL:.0%} at length {longest}.",
        ]
    )


def plot(path: Path, title: str, accuracy: dict[int, float], chance: float) -> None:
    """Write the figure of accuracy against length."""
    lengths = list(accuracy)
    lines = [
        Line("right at every position", lengths, [100 * a for a in accuracy.values()], "o"),
        Line("guessing the last position", lengths, [100 * chance] * len(lengths)),
    ]
    draw(
        path,
        title,
        "length of the sequence",
        "sequences (%)",
        lines,
        y_limits=(-2, 104),
        shaded=(SHORTEST, LONGEST, f"trained on ({SHORTEST} to {LONGEST})"),
    )
