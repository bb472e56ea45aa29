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
        batch: sequences a step and process.
        learning_rate: until the longest length is reached.
        mastered: the accuracy at which sequences get longer.
        settle: steps after that, while the learning rate falls to zero.
    """

    steps: int
    batch: int
    learning_rate: float
    mastered: float
    settle: int


def train(
    model: nn.Module, automaton: Automaton, schedule: Schedule, seed: int, world: World
) -> int:
    """Train on sequences whose length grows with the network's accuracy, from 3 up to 40.

    Args:
        model: ``model(tokens [B, T]) -> (logits [B, T, states], _)``.
        automaton: what to follow; its state is the label at every position.
        schedule: see :class:`Schedule`.
        seed: of the data; every process draws its own.
        world: the processes that train together.

    Returns:
        How many steps it took.
    """
    tqdm = optional("tqdm").tqdm
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    # Lengths are common to all processes, sequences are not.
    lengths = torch.Generator().manual_seed(seed)
    sequences = torch.Generator().manual_seed((seed + 1) * 10_000 + world.rank)
    longest, settling = SHORTEST, 0
    step = 0
    with tqdm(total=schedule.steps, disable=not world.leads, unit="step") as bar:
        for step in range(1, schedule.steps + 1):
            T = int(torch.randint(SHORTEST, longest + 1, (), generator=lengths))
            tokens, labels = automaton.sample(schedule.batch, T, sequences)
            tokens, labels = tokens.to(world.device), labels.to(world.device)
            logits, _ = model(tokens)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * (1 - settling / schedule.settle)
            optimizer.step()

            right = (logits.argmax(-1) == labels).all(1).double().mean()
            mean_loss, accuracy = world.mean(loss.item(), right.item())
            if longest == LONGEST:
                settling += 1
            elif accuracy >= schedule.mastered:
                longest += 1
            bar.update()
            bar.set_postfix_str(f"loss {mean_loss:.4f}, right {accuracy:.0%}, length ≤ {longest}")
            if settling == schedule.settle:
                bar.total = step
                break
    return step


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
        seed: of the data, which is not that of the training.
        world: the processes, each of which tests its share of 1024 sequences a length.
        lengths: which ones.
    """
    model.eval()
    generator = torch.Generator().manual_seed((seed + 2) * 10_000 - 1 - world.rank)
    share = world.share(TEST_SEQUENCES)
    accuracy = {}
    for T in lengths:
        tokens, labels = automaton.sample(share.stop - share.start, T, generator)
        logits, _ = model(tokens.to(world.device))
        right = (logits.argmax(-1).cpu() == labels).all(1).sum().item()
        (mean_right,) = world.mean(right)
        accuracy[T] = mean_right * world.size / TEST_SEQUENCES
    return accuracy


def table(accuracy: dict[int, float]) -> str:
    """Accuracy by length as text."""
    rows = [f"{T:>8}   {right:>8.2%}" for T, right in accuracy.items()]
    return "\n".join(["  length   all right", *rows])


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
