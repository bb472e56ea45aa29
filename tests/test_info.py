"""``python -m flashrnn`` and its sub-command ``info``."""

import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashrnn import __version__, available_functions, backends, info
from flashrnn.__main__ import main, make_parser


def test_json_says_which_backends_run_and_why_the_others_do_not(monkeypatch, capsys):
    """The reason comes from the backend itself, and nothing else is printed."""
    monkeypatch.setattr(backends.load("vanilla"), "unavailable", lambda device: "it has a cold")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["backends"]) == list(backends.PREFERENCE)
    assert found["backends"]["vanilla"] == "it has a cold"
    assert found["functions"] == list(available_functions())
    assert found["versions"]["flashrnn"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["versions"]) >= {"triton", "cuda-core", "cuda-bindings", "nvrtc"}
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_text_names_backends_with_their_reasons(monkeypatch, capsys):
    monkeypatch.setattr(backends.load("vanilla"), "unavailable", lambda device: "it has a cold")
    monkeypatch.setitem(info.PACKAGES, "triton", ("no-such-distribution",))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    rows = {tuple(row.split(maxsplit=2)) for row in printed.splitlines()}
    assert ("backend", "vanilla", "not here: it has a cold") in rows
    assert ("triton", "not", "installed") in rows


def test_gpus_are_described():
    found = info.collect() | {
        "gpus": [gpu("GPU of the year", "9.0")],
    }
    row = next(row for row in info.as_text(found).splitlines() if row.startswith("GPU 0"))
    assert row.split(maxsplit=2)[2] == "GPU of the year, compute capability 9.0, 80 GiB"


def gpu(name, capability, **refusals):
    return {
        "name": name,
        "compute_capability": capability,
        "memory": 80 << 30,
        "backends": {backend: refusals.get(backend) for backend in backends.PREFERENCE},
    }


def test_each_gpu_says_which_backends_run_on_it(monkeypatch):
    """One that runs on any of them runs here."""
    gpus = [gpu("old", "7.5", cuda="it is old"), gpu("new", "9.0", triton="not today")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(info, "_gpu", gpus.__getitem__)
    found = info.collect()
    assert set(found["backends"].values()) == {None}
    rows = info.as_text(found).splitlines()
    said = {row.split()[1]: row.split(maxsplit=2)[2] for row in rows if row.startswith("backend")}
    assert said["cuda_fused"] == "runs here"
    assert said["cuda"] == "runs here; not on GPU 0: it is old"
    assert said["triton"] == "runs here; not on GPU 1: not today"


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_found():
    (first, *_) = info.collect()["gpus"]
    assert first["name"] == torch.cuda.get_device_name(0)


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "flashrnn", "info", "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["backends"]["vanilla"] is None


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    printed = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "python -m flashrnn" in printed
    if arguments[0] == "demo":
        assert "torchrun --nproc-per-node 2 -m flashrnn demo" in printed


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["info", "--jason"]])
def test_unknown_commands_are_refused_with_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert "COMMAND" in printed or "info, demo" in printed or "--jason" in printed


def test_the_commands_that_readme_prints_are_ones():
    readme = Path(__file__).parent.parent / "README.md"
    found = re.findall(
        r"^(?:python|torchrun .*) -m flashrnn (.*)$",
        readme.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {"info", "demo"} <= {command.split()[0] for command in found}
    for command in found:
        make_parser().parse_args(shlex.split(command, comments=True))
