"""Checks, run in processes that can be killed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_PROCESSES = multiprocessing.get_context("spawn")
_SECONDS_TO_START = 180.0


@dataclass(frozen=True)
class Check:
    """One thing to try.

    Attributes:
        name: by which ``--case`` finds it.
        run: raises where what it looks at is wrong; may return something to count. It goes to
            another process, and so is a function of a module, or a partial of one.
        seconds: after which it is taken to hang.
    """

    name: str
    run: Callable[[], Any]
    seconds: float = 120.0


@dataclass(frozen=True)
class Result:
    """What became of a check; ``failure`` is ``None`` or says what went wrong."""

    part: str
    check: Check
    seconds: float
    failure: str | None
    returned: Any


class Child:
    """A process that runs checks one after another; a new one where the last one is gone."""

    def __init__(self) -> None:
        self._process: Any = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, check: Check) -> tuple[str | None, Any]:
        """What went wrong, if anything, and what the check returned."""
        if self._process is None:
            self._start()
            if not self._connection.poll(_SECONDS_TO_START):
                return self._gone(f"did not start within {_SECONDS_TO_START:g} s")
        try:
            self._connection.recv()  # It is ready.
            self._connection.send(check)
            if not self._connection.poll(check.seconds):
                return self._gone(f"did not end within {check.seconds:g} s, and was killed")
            failure, returned, usable = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            return self._gone(f"its process died with exit code {self._process.exitcode}")
        if not usable:
            self._end()
        return failure, returned

    def _start(self) -> None:
        self._connection, theirs = _PROCESSES.Pipe()
        file, name = tempfile.mkstemp(suffix=".txt")
        os.close(file)
        self._printed = Path(name)
        self._process = _PROCESSES.Process(target=_serve, args=(theirs, name), daemon=True)
        self._process.start()
        theirs.close()

    def _gone(self, what: str) -> tuple[str, None]:
        if self._process.is_alive():
            # It hangs: it prints where each of its threads is.
            os.kill(self._process.pid, signal.SIGUSR1)
            time.sleep(1)
        printed = self._printed.read_text(encoding="utf-8", errors="replace").strip()
        self._end()
        return "\n".join([what, *printed.splitlines()[-40:]]), None

    def _end(self) -> None:
        if self._process is None:
            return
        try:
            # With whatever it started itself.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()
        self._connection.close()
        self._printed.unlink()
        self._process = None


def _serve(connection: Connection, printed: str) -> None:
    """What a child does: checks come in, results go out."""
    os.setsid()
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    while True:
        connection.send("ready")
        try:
            check = connection.recv()
        except EOFError:
            return
        failure, returned, usable = None, None, True
        try:
            returned = check.run()
        except AssertionError as error:
            failure = str(error) or traceback.format_exc(limit=-2).strip()
        except BaseException:
            # What was left behind, a lost context perhaps, must not reach the next check.
            failure, usable = traceback.format_exc(limit=-4).strip(), False
        connection.send((failure, returned, usable))


def run_in_a_child(
    part: str,
    checks: Iterable[Check],
    report: Callable[[Result], None],
    begin: Callable[[Check], None] = lambda check: None,
) -> None:
    """Run checks in turn, in one process for as long as it lives; say when each begins and ends."""
    with Child() as child:
        for check in checks:
            begin(check)
            start = time.monotonic()
            failure, returned = child.run(check)
            report(Result(part, check, time.monotonic() - start, failure, returned))
