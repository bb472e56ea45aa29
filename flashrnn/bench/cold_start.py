"""The time to the first results of a fresh process, with empty caches and with full ones."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from flashrnn.bench.case import Case
from flashrnn.bench.contender import Found
from flashrnn.bench.ours import Ours

# The variables that name the cache folders of this package, of Triton and of CUDA.
CACHES = ("FLASHRNN_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
STAGES = ("start of PyTorch", "first forward", "first training step")
STATES = ("empty caches", "filled caches")
MEASURES = tuple(f"{stage}, {state}" for state in STATES for stage in STAGES)


def measure(
    contender: Ours, case: Case, device: torch.device, repetitions: int
) -> dict[str, Found]:
    """Seconds of each stage of a fresh process.

    Args:
        contender: who computes.
        case: what.
        device: where.
        repetitions: how often, each with an empty folder for all caches, used twice.
    """
    seconds: dict[str, list[float]] = {name: [] for name in MEASURES}

    def repeat() -> None:
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory() as folder:
                for state in STATES:
                    stages = _run(contender, case, device, Path(folder))
                    for stage, taken in zip(STAGES, stages, strict=True):
                        seconds[f"{stage}, {state}"].append(taken)

    refused = contender.attempt(case, device, True, repeat)
    if isinstance(refused, Found):
        return dict.fromkeys(MEASURES, refused)
    return {
        name: Found(statistics.median(taken), "s", min(taken), max(taken), repetitions)
        for name, taken in seconds.items()
    }


def _run(contender: Ours, case: Case, device: torch.device, folder: Path) -> list[float]:
    package = Path(__file__).parents[2]
    child = Path(__file__).with_name("cold_start_child.py").read_text(encoding="utf-8")
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **{name: str(folder / name) for name in CACHES},
        "PYTHONPATH": os.pathsep.join(paths),
    }
    sizes = {name: getattr(case, name) for name in ("function", "B", "T", "N", "D")}
    asked = {"backend": contender.backend, "device": str(device), "dtype": case.dtype_name, **sizes}
    # With -c Python looks for modules in the working folder, which is empty.
    done = subprocess.run(
        [sys.executable, "-c", child, json.dumps(asked)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word of why"])[-1])
    stages: list[float] = json.loads(done.stdout)
    return stages
