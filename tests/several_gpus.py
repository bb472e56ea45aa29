"""A plugin of pytest that spreads workers over GPUs and writes failures as they come.

    python -m pytest -p tests.several_gpus --gpus 0,1 --failures failures.txt -m gpu -n 32

Worker k gets one of the GPUs, in turn. Sixteen workers a GPU keep it busy: most of a test's time is
that of a compiler. The file of failures is there even if the run is stopped at a time limit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("several GPUs")
    group.addoption("--gpus", default="0", help="their numbers, with commas between")
    group.addoption("--failures", type=Path, help="a file that gets each failure's report")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        gpus = config.getoption("--gpus").split(",")
        # Before anything asks CUDA what there is.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]
    elif config.getoption("--failures"):
        config.pluginmanager.register(Failures(config.getoption("--failures")))


class Failures:
    """Writes them; of the process that collects the workers' reports."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
