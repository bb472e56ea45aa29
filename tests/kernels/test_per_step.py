"""Backend ``cuda``: a launch for each step. What all regimes share is in ``test_regimes.py``."""

import pytest
import torch

from flashrnn.backends import cuda, cuda_fused, requirements
from flashrnn.backends.fused import plans
from flashrnn.cells import resolve
from flashrnn.jit import nvrtc
from flashrnn.kernels import source
from flashrnn.kernels.per_step.plan import plan_step
from flashrnn.problem import Problem
from tests.emulation import emulation, needs_compiler  # noqa: F401
from tests.fused import LAYOUTS, at_odd_addresses, check_clipped, hold_to_vanilla, poisoned  # noqa: F401
from tests.gpus import GPUS, H200
from tests.machine_code import needs_nvrtc, spills_in_a_loop
from tests.problems import BUILT_IN, call, random_inputs, sparse, wide
from tests.sequences import alternating
from tests.test_graphs import everything, more

PRECISIONS = ("bfloat16", "float16", "float32", "tf32")
directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])

# ---- the machine code


def program(kind, B, N, D, precision, backward):
    cell = resolve(kind)
    plan = plan_step(cell, B, N, D, precision, backward)
    options = source.forward_options(True)
    if backward:
        options = source.backward_options(False, False, len(cell.states), given_last=False)
    return plan.source(cell, precision, options)


# One of each pair of a cell and an architecture that a quick run compiles.
QUICK = {("lstm", "sm_80"), ("slstm", "sm_90a"), (wide, "sm_120")}


@needs_nvrtc
@directions
@pytest.mark.parametrize(
    ("kind", "arch", "precisions"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK else pytest.mark.slow)
        for case in alternating(
            (*BUILT_IN, sparse, wide, everything, more),
            GPUS,
            [("bfloat16", "float32"), ("float32", "bfloat16")],
        )
    ],
    ids=str,
)
def test_compiles_for_every_architecture_without_spills(kind, arch, precisions, backward):
    """The precisions are those of forward and backward."""
    parts = program(kind, 16, 1, 768, precisions[backward], backward)
    assert not spills_in_a_loop(parts, arch)


@needs_nvrtc
@pytest.mark.slow
@directions
@pytest.mark.parametrize(
    ("sizes", "precision", "kinds"),
    alternating(
        [(16, 12, 64), (256, 1, 768), (7, 5, 41), (16, 1, 4096)],
        PRECISIONS,
        [("lstm", "slstm"), ("slstm", "lstm")],
    ),
    ids=str,
)
def test_compiles_for_every_plan_without_spills(sizes, precision, kinds, backward):
    """One cell forward, and another one backward."""
    assert not spills_in_a_loop(program(kinds[backward], *sizes, precision, backward), "sm_90a")


# ---- the kernels


@pytest.fixture
def on_the_cpu(emulation, poisoned):  # noqa: F811
    """Backend ``cuda`` is emulated, and what it allocates is NaN."""


@needs_compiler
def test_a_schedule_of_clips_compiles_once(on_the_cpu):
    for clipval in (0.1, 0.2, 1e39, 1e-50):
        check_clipped("cuda", clipval)
    # One forward, one backward.
    assert cuda._program.cache_info().currsize == 2


# ---- what it says of itself


def test_says_why_it_cannot():
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in cuda.unavailable(torch.device("cuda"))
    assert "cpu" in cuda.unavailable(torch.device("cpu"))
    values = {"cell": resolve("lstm"), "B": 1, "T": 1, "N": 1, "D": 1, "dtype": torch.float32}
    double = Problem(**{**values, "dtype": torch.float64}, device=torch.device("cuda"))
    assert "float64" in cuda.unsupported(double)
    assert cuda.unsupported(Problem(**values, device=torch.device("cuda"))) is None


def test_the_compiler_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(requirements, "missing_gpu", lambda device: None)
    compiler = requirements._unavailable_compiler.__wrapped__
    monkeypatch.setattr(requirements, "_unavailable_compiler", compiler)
    monkeypatch.setattr(nvrtc, "_version", lambda: 1 / 0)
    with pytest.raises(ValueError, match=r'pip install "flashrnn-jit\[cuda\]"'):
        call("lstm", random_inputs("lstm", 1, 1, 1, 1, torch.float32), backend="cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda_fused"])
def test_sizes_beyond_what_kernels_count_to_are_refused(name, monkeypatch):
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    backend = {"cuda": cuda, "cuda_fused": cuda_fused}[name]
    device = torch.device("cuda")

    def reason(B, T, N, D, needs_gradient=False):
        cell = resolve("elman").traced
        return backend.unsupported(
            Problem(cell, B, T, N, D, torch.bfloat16, device, needs_gradient)
        )

    assert "B is 2147483648" in reason(2**31, 1, 1, 1)
    assert "T is 2147483648" in reason(1, 2**31, 1, 1)
    assert "N · D is 2147483648" in reason(1, 1, 2**30, 2)
    assert "thread blocks" in reason(2**20, 1, 2**16, 16)
    assert reason(2**31 - 1, 3, 1, 1) is None
    assert reason(64, 2**31 - 1, 1, 1) is None
    # Whose R's gradient has more rows than 32 bits count.
    rows = reason(2**16, 2**16, 1, 1, needs_gradient=True)
    assert rows is None if name == "cuda_fused" else "B · T is 4294967296" in rows


@pytest.mark.parametrize("backend", [cuda, cuda_fused], ids=["cuda", "cuda_fused"])
def test_rows_that_32_bits_do_not_number_are_refused(backend, monkeypatch):
    """With resets, rows and what sequences start with have numbers of one range."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    cell, device = resolve("elman").traced, torch.device("cuda")

    def reason(T, **options):
        problem = Problem(cell, 2, T, 1, 1, torch.bfloat16, device, returned=1, **options)
        return backend.unsupported(problem)

    assert reason(2**30 - 1, ragged=True) is None
    assert "B · T is 2147483648" in reason(2**30, ragged=True)
    assert reason(2**30 - 2, resets=True) is None
    assert "B · T is 2147483646" in reason(2**30 - 1, resets=True)
