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
        system; ``"gpus"``: name, compute capability and memory in bytes of each, and its
        ``"backends"``, ``None`` for one that runs there, else why not; ``"backends"``: in the
        order in which ``backend="auto"`` prefers them, ``None`` for one that runs here, on some
        GPU or on the CPU, else why not on the first GPU; ``"functions"``: names of the cells.
    """
    gpus = [_gpu(k) for k in range(torch.cuda.device_count())]
    versions: dict[str, str | None] = {
        "flashrnn": flashrnn.__version__,
        "python": platform.python_version(),
    }
    return {
        "versions": versions | {name: _version(*names) for name, names in PACKAGES.items()},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "gpus": gpus,
        "backends": _anywhere([gpu["backends"] for gpu in gpus]),
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
        "backends": _reasons(torch.device("cuda", index)),
    }


def _reasons(device: torch.device) -> dict[str, str | None]:
    return {name: backends.load(name).unavailable(device) for name in backends.PREFERENCE}


def _anywhere(of_gpus: list[dict[str, str | None]]) -> dict[str, str | None]:
    """Backend to ``None`` if it runs on some device of this machine, else why not on a GPU."""
    # Without a GPU a backend says of it that there is none.
    of_gpus = of_gpus or [_reasons(torch.device("cuda"))]
    somewhere = [_reasons(torch.device("cpu")), *of_gpus]
    return {
        name: None if any(found[name] is None for found in somewhere) else reason
        for name, reason in of_gpus[0].items()
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
        (f"backend {name}", _where(name, reason, found["gpus"]))
        for name, reason in found["backends"].items()
    ]
    rows.append(("functions", ", ".join(found["functions"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _where(name: str, reason: str | None, gpus: list[dict[str, Any]]) -> str:
    if reason is not None:
        return f"not here: {reason}"
    refusals = [
        f"not on GPU {k}: {gpu['backends'][name]}"
        for k, gpu in enumerate(gpus)
        if gpu["backends"][name] is not None
    ]
    return "; ".join(["runs here", *refusals])


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
