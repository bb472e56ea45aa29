"""``python -m flashrnn info``: what is installed, and what runs here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

import flashrnn
from flashrnn import backends

# How a report names what counts for FlashRNN, and the distributions that may bring it.
PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton"),
    "cuda-core": ("cuda-core",),
    "cuda-bindings": ("cuda-bindings",),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
}


def collect() -> dict[str, Any]:
    """What ``info`` reports, as JSON has it.

    Returns:
        ``"versions"``: name to version, ``None`` for what is not installed; ``"cuda"``: the
        CUDA version that PyTorch was built for, or ``None``; ``"platform"``: the operating
        system; ``"gpus"``: name, compute capability and memory in bytes of each;
        ``"backends"``: in the order in which ``backend="auto"`` prefers them, ``None`` for one
        that runs here, else why not; ``"functions"``: names of the cells.
    """
    versions: dict[str, str | None] = {
        "flashrnn": flashrnn.__version__,
        "python": platform.python_version(),
    }
    return {
        "versions": versions | {name: _version(*names) for name, names in PACKAGES.items()},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "gpus": [_gpu(k) for k in range(torch.cuda.device_count())],
        "backends": {name: backends.load(name).unavailable() for name in backends.PREFERENCE},
        "functions": list(flashrnn.available_functions()),
    }


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def as_text(found: dict[str, Any]) -> str:
    """What :func:`collect` found, for people."""
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows.append(("PyTorch's CUDA", found["cuda"] or "none: a build for the CPU"))
    rows.append(("platform", found["platform"]))
    rows += [
        (
            f"GPU {k}",
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory'] / 2**30:.0f} GiB",
        )
        for k, gpu in enumerate(found["gpus"])
    ] or [("GPUs", "none that PyTorch sees")]
    rows += [
        (f"backend {name}", "runs here" if reason is None else f"not here: {reason}")
        for name, reason in found["backends"].items()
    ]
    rows.append(("functions", ", ".join(found["functions"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-command and declare its options."""
    parser.description = (
        "Says which versions are installed, which GPUs there are, and for each backend whether "
        "it runs here or why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for reports")


def run(options: argparse.Namespace) -> int:
    """Print; returns the exit code."""
    found = collect()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0
