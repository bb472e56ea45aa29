"""What is built and installed: a wheel with every file, in an environment of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# The example of upstream's page, at sizes for a CPU.
EXAMPLE = """
import torch
from flashrnn import flashrnn

device = torch.device("cpu")
dtype = torch.bfloat16
B, T, N, D, G, S = 2, 8, 3, 16, 4, 2

Wx = torch.randn([B, T, G, N, D], device=device, dtype=dtype, requires_grad=True)
R = torch.randn([G, N, D, D], device=device, dtype=dtype, requires_grad=True)
b = torch.randn([G, N, D], device=device, dtype=dtype, requires_grad=True)
states_initial = torch.randn([S, B, 1, N, D], device=device, dtype=dtype, requires_grad=True)

states, last_states = flashrnn(
    Wx, R, b, states=states_initial, function="lstm", backend="vanilla"
)
hidden_state = states[0]
hidden_state.sum().backward()
assert states.shape == (S, B, T, N, D) and Wx.grad.isfinite().all()
print(__import__("flashrnn").__file__)
"""


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        **options,
    ).stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of an sdist of this project, and that of the name alone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    (source / "packaging").mkdir(parents=True)
    for name in ("flashrnn", "packaging/flashrnn"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = (
        "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    )
    sdist = python("-c", build, folder, cwd=source).splitlines()[-1]
    wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    python(*wheel, folder / sdist)
    python(*wheel, source / "packaging" / "flashrnn")
    ours, name = folder.glob("flashrnn_jit-*.whl"), folder.glob("flashrnn-*.whl")
    return next(ours), next(name)


@pytest.fixture
def environment(tmp_path):
    """The Python of an environment that has PyTorch, and nothing of this project."""
    venv.create(tmp_path / "environment", with_pip=False)
    scheme = {"base": str(tmp_path / "environment"), "platbase": str(tmp_path / "environment")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    import torch

    # Behind its own packages; what is installed here as editable is not found this way.
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return tmp_path / "environment" / "bin" / "python"


def install(environment, *arguments):
    return python("-m", "pip", "--python", environment, "install", "--no-index", *arguments)


@pytest.mark.slow
def test_the_wheel_of_the_sdist_has_every_file(wheels):
    with zipfile.ZipFile(wheels[0]) as archive:
        packed = {name for name in archive.namelist() if name.startswith("flashrnn/")}
    tracked = subprocess.run(
        ["git", "ls-files", "flashrnn"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("needs a clone: git says which files there are")
    assert packed == set(tracked.stdout.split())
    with zipfile.ZipFile(wheels[1]) as archive:
        assert all(".dist-info/" in name for name in archive.namelist())


@pytest.mark.slow
def test_the_wheel_runs_the_example_where_nothing_else_is_installed(wheels, environment, tmp_path):
    install(environment, "--no-deps", wheels[0])
    run = [environment, "-I", "-c", EXAMPLE]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(environment.parents[1]))


@pytest.mark.slow
def test_the_name_satisfies_what_asks_for_upstream(wheels, environment):
    install(environment, "--no-deps", "--ignore-installed", *wheels)
    for wanted in ("flashrnn>=1.0.8", "flashrnn==1.0.8"):
        # From no index: it would fail where it is not satisfied.
        assert "already satisfied: flashrnn" in install(environment, "--no-deps", wanted)


@pytest.mark.slow
def test_upstream_installed_before_is_told_at_import(wheels, environment, tmp_path):
    install(environment, "--no-deps", wheels[0])
    find = "import importlib.util as u; print(u.find_spec('flashrnn').origin)"
    folder = Path(
        subprocess.run(
            [environment, "-I", "-c", find], capture_output=True, text=True
        ).stdout.strip()
    ).parent
    (folder / "flashrnn" / "cuda_init.py").touch()
    run = [environment, "-I", "-c", "import flashrnn"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "cuda_init.py is a file of upstream's" in done.stderr
    assert "flashrnn-jit 0.1.0" in done.stderr
