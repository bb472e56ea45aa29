"""A training's state in a file, and a clean stop on a signal."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flashrnn.demo.errors import DemoError
from flashrnn.demo.output import write


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a reader finds the old file or the new one, complete.

    Args:
        path: where to.
        content: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        DemoError: the file cannot be written, for example since the disk is full.
    """
    # Python's own files report a full disk; PyTorch's report a failed assertion.
    whole = io.BytesIO()
    torch.save(content, whole)
    write(path, whole.getvalue())


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What was saved, on the CPU; ``None`` where there is no such file.

    Args:
        path: where from.
        settings: what the checkpoint must have under ``"settings"`` for the training to go on.

    Raises:
        DemoError: the file cannot be read, is no checkpoint, or one of a training with other
            settings.
    """
    if not path.exists():
        return None
    way_out = "Move it away, or name another folder with --output"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(content["settings"])
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}. {way_out}") from error
    except Exception as error:
        # A file that is no checkpoint may raise any error.
        raise DemoError(f"{path} is not a checkpoint of this demo. {way_out}") from error
    differing = [
        f"{name} {found.get(name)} there, {settings.get(name)} now"
        for name in {**found, **settings}
        if found.get(name) != settings.get(name)
    ]
    if differing:
        raise DemoError(
            f"{path} holds a training with other settings ({'; '.join(differing)}). "
            f"Repeat its command to go on with it. {way_out}"
        )
    return content


class Stop:
    """Whether somebody asked this process to stop, by Ctrl-C or SIGTERM."""

    requested = False

    def _request(self, signal_number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Note Ctrl-C and SIGTERM instead of ending, so that the step is finished and saved.

    Further signals change nothing: ``torchrun`` sends one more to every process.
    """
    stop = Stop()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop._request) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
