"""A character language model: training with checkpoints, bits per character, a sample."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils
from torch.nn.functional import cross_entropy

from flashrnn.demo import checkpoint
from flashrnn.demo.distributed import World
from flashrnn.demo.errors import DemoError, optional
from flashrnn.demo.figure import Line, draw
from flashrnn.demo.model import RecurrentNetwork

# Layers, heads and units a head.
SIZE = (2, 4, 32)
HELD_OUT = 0.1
STREAMS = 16
SAMPLE_CHARACTERS = 400
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Schedule:
    """How the language model is trained.

    Attributes:
        steps: how many, while the learning rate falls to zero.
        batch: windows of text a step, over all processes.
        length: characters of a window.
        learning_rate: the first one.
        evaluate: steps between two looks at the held-out text, each with a checkpoint.
    """

    steps: int = 1200
    batch: int = 32
    length: int = 64
    learning_rate: float = 5e-3
    evaluate: int = 100


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as numbers, in two parts.

    Attributes:
        characters: those that occur, sorted; a character's place is its number.
        training: ``[characters]``, int64, the beginning of the text.
        held_out: ``[characters]``, int64, the end of it.
        digest: tells one text from another.
    """

    characters: str
    training: Tensor
    held_out: Tensor
    digest: str

    @classmethod
    def of(cls, text: str, shortest: int) -> Corpus:
        """Split a text.

        Raises:
            DemoError: the held-out part is shorter than ``shortest``.
        """
        cut = len(text) - int(len(text) * HELD_OUT)
        if len(text) - cut < shortest:
            raise DemoError(
                f"a text of {len(text):,} characters is too short to learn from: "
                f"{math.ceil(shortest / HELD_OUT):,} is the least"
            )
        characters = "".join(sorted(set(text)))
        number = {character: k for k, character in enumerate(characters)}
        numbers = torch.tensor([number[character] for character in text])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(characters, numbers[:cut], numbers[cut:], digest)

    def windows(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random pieces of the training part: ``[batch, length + 1]``, int64."""
        starts = torch.randint(len(self.training) - length, (batch, 1), generator=generator)
        return self.training[starts + torch.arange(length + 1)]


def python_reference() -> str:
    """The reference text that comes with Python: what ``help("if")`` and the like show.

    Raises:
        DemoError: this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise DemoError(
            f"this Python came without its reference ({error}): name a text, --text FILE"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        DemoError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DemoError(f"--text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(
            f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        steps: how many were done.
        finished: whether all steps were done; ``False`` if a signal stopped it.
        history: (step, bits per character of the training text since the entry before, bits
            per character of the held-out text).
    """

    steps: int
    finished: bool
    history: list[tuple[int, float, float]]


def train(
    model: RecurrentNetwork,
    corpus: Corpus,
    schedule: Schedule,
    seed: int,
    world: World,
    path: Path,
    settings: dict[str, Any],
) -> Trained:
    """Train, from the checkpoint on where there is one, until the end or until Ctrl-C.

    An interrupted training that is continued gives the same bits as one without interruption.

    Args:
        model: its outputs are logits of the next character.
        corpus: the text to train on.
        schedule: steps, sizes and learning rate.
        seed: of the choice of windows.
        world: the processes that train together.
        path: the checkpoint, read and written by rank 0 alone.
        settings: what identifies this training; a checkpoint must have the same.

    Raises:
        DemoError: there is a checkpoint, but none of this training; or it cannot be written.
    """
    tqdm = optional("tqdm").tqdm
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    step, nats, history = 0, 0.0, list[tuple[int, float, float]]()
    saved = world.from_leader(checkpoint.load(path, settings) if world.leads else None)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step, nats, history = saved["step"], saved["nats"], [*map(tuple, saved["history"])]
        if world.leads:
            print(f"Going on from step {step} of {schedule.steps}, found in {path}")

    def save() -> None:
        if world.leads:
            content = {
                "settings": settings,
                "step": step,
                "nats": nats,
                "history": history,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
            }
            checkpoint.save(path, content)

    parallel = world.wrap(model)
    share = world.share(schedule.batch)
    bar = tqdm(total=schedule.steps, initial=step, disable=not world.leads, unit="step")
    with bar, checkpoint.stop_on_signal() as stop:
        while step < schedule.steps:
            model.train()
            windows = corpus.windows(schedule.batch, schedule.length, generator)
            inputs, targets = (x[share].to(world.device) for x in (windows[:, :-1], windows[:, 1:]))
            logits, _ = parallel(inputs)
            # The processes' gradients are averaged: times their number makes that the sum.
            scale = world.size / (schedule.batch * schedule.length)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") * scale
            optimizer.zero_grad()
            loss.backward()
            utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * (1 - step / schedule.steps)
            optimizer.step()
            step += 1

            total, stops = world.sum(loss.item(), stop.requested)
            nats += total / world.size
            bar.update()
            since = step - (history[-1][0] if history else 0)
            if since == schedule.evaluate or step == schedule.steps:
                held_out = bits_per_character(model, corpus.held_out, world)
                history.append((step, nats / since / math.log(2), held_out))
                nats = 0.0
                bar.set_postfix_str(f"bits per character: {_latest(history)}")
                save()
            elif stops:
                save()
            if stops:
                break
    return Trained(step, step == schedule.steps, history)


def _latest(history: list[tuple[int, float, float]]) -> str:
    _, training, held_out = history[-1]
    return f"training {training:.2f}, held-out {held_out:.2f}"


@torch.no_grad()
def bits_per_character(model: RecurrentNetwork, text: Tensor, world: World) -> float:
    """How many bits the model needs for a character of a text that it reads from the beginning.

    Args:
        model: on ``world.device``.
        text: ``[characters]``, int64; cut into 16 streams, each read from its beginning to its
            end by one process.
        world: the processes, each of which reads its share of the streams.
    """
    model.eval()
    length = (len(text) - 1) // STREAMS
    inputs, targets = (
        x[: STREAMS * length].view(STREAMS, length)[world.share(STREAMS)] for x in (text, text[1:])
    )
    states, nats = None, 0.0
    for given, expected in zip(inputs.split(256, 1), targets.split(256, 1), strict=True):
        logits, states = model(given.to(world.device), states)
        expected = expected.to(world.device).flatten()
        nats += cross_entropy(logits.flatten(0, 1), expected, reduction="sum").item()
    (total,) = world.sum(nats)
    return total / (STREAMS * length) / math.log(2)


@torch.no_grad()
def sample(model: RecurrentNetwork, corpus: Corpus, seed: int, device: torch.device) -> str:
    """400 characters of the model's own, a character at a time."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    character, states = corpus.held_out[0], None
    written = []
    for _ in range(SAMPLE_CHARACTERS):
        logits, states = model(character.view(1, 1).to(device), states)
        likely = torch.softmax(logits.flatten().cpu().double() / TEMPERATURE, 0)
        character = torch.multinomial(likely, 1, generator=generator)
        written.append(corpus.characters[character])
    return "".join(written)


def report(trained: Trained) -> str:
    """How the bits per character fell, as a table."""
    rows = [f"{step:>8}   {a:>8.3f}   {b:>8.3f}" for step, a, b in trained.history]
    return "\n".join(["Bits per character:", "    step   training   held-out", *rows])


def plot(path: Path, title: str, history: list[tuple[int, float, float]]) -> None:
    """Write the figure of bits per character against steps."""
    steps, training, held_out = zip(*history, strict=True)
    draw(
        path,
        title,
        "step",
        "bits per character",
        [Line("training text", steps, training), Line("held-out text", steps, held_out, "o")],
    )
