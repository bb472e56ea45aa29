"""A plugin of pytest that spreads workers over GPUs and writes failures as they come.

    python -m pytest -p tests.several_gpus --gpus 0,1 --failures failures.txt -m gpu -n 32

Worker k gets one of the GPUs, in turn. Sixteen workers a GPU keep it busy: most of a test's time is
that of a compiler. The file of failures is there even if the run is stopped at a time limit. A test
whose kernel waits for ever is a failure too: its worker ends after so many seconds, since nothing
else stops such a kernel, and another worker goes on.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("several GPUs")
    group.addoption("--gpus", default="0", help="their numbers, with commas between")
    group.addoption("--failures", type=Path, help="a file that gets each failure's report")
    group.addoption("--longest", type=float, default=180.0, help="seconds that a test may take")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        gpus = config.getoption("--gpus").split(",")
        # Before anything asks CUDA what there is.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]
    elif config.getoption("--failures"):
        config.pluginmanager.register(Failures(config.getoption("--failures")))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if "PYTEST_XDIST_WORKER" in os.environ:
        faulthandler.dump_traceback_later(item.config.getoption("--longest"), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Failures:
    """Writes them; of the process that collects the workers' reports."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
