"""Where and when figures were measured."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from flashrnn import info

QUERY = {"driver": "driver_version", "max_sm_clock": "clocks.max.sm", "power_limit": "power.limit"}
PACKAGES = ("flashrnn", "python", "torch", "triton", "cuda-core", "nvrtc")
FIELDS = ("date", "commit", "device", *QUERY, *PACKAGES, "cuda", "cudnn", "platform")


def collect(device: torch.device, commit: str | None) -> dict[str, str]:
    """What identifies a measurement: a text for each of ``FIELDS``, empty for what is not there.

    Args:
        device: where it is made.
        commit: of the package; ``None``: what git says of the folder it lies in.
    """
    versions = info.collect()["versions"]
    stamp: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": _cpu(),
        **{name: versions[name] for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }
    if device.type == "cuda":
        stamp |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_driver(device),
        }
    return {name: str(stamp.get(name) or "") for name in FIELDS}


def _commit() -> str:
    """Empty without git, and where this file is none of the repository around it."""
    folder, git = Path(__file__).parent, shutil.which("git")

    def ask(*words: str) -> str:
        command = [str(git), "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if not git or not ask("ls-files", Path(__file__).name):
        return ""
    return ask("describe", "--always", "--dirty", "--abbrev=12")


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.is_file():
        rows = table.read_text(encoding="utf-8").splitlines()
        names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def _driver(device: torch.device) -> dict[str, str]:
    """Driver, highest clock and power limit, as nvidia-smi has them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if not shutil.which("nvidia-smi"):
        return {}
    command = [
        "nvidia-smi",
        # PyTorch's numbers are not nvidia-smi's where CUDA_VISIBLE_DEVICES hides a GPU.
        f"--id={index if uuid is None else f'GPU-{uuid}'}",
        f"--query-gpu={','.join(QUERY.values())}",
        "--format=csv,noheader",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(QUERY):
        return {}
    return dict(zip(QUERY, values, strict=True))
