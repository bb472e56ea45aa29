"""The sums that complete the gradients of R and of the bias."""

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import gradient_sums
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.fused import poisoned  # noqa: F401
from tests.gpus import GPUS
from tests.machine_code import needs_nvrtc, spills_in_a_loop
from tests.problems import sparse

# Rows of both sums, and N and D: of a thread for each column, of several, and of the most; columns
# that fill no CTA.
SIZES = [(1, 1, 1, 3), (9, 8, 2, 5), (70, 17, 3, 12), (2, 600, 1, 16), (0, 40, 2, 7)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["gru", sparse], ids=["gru", "sparse"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums(fused_emulation, poisoned, sizes, kind, dtype):  # noqa: F811
    P, B, N, D = sizes
    cell = resolve(kind).traced
    problem = Problem(cell, B, 1, N, D, dtype, torch.device("cpu"), needs_gradient=True)
    generator = torch.Generator().manual_seed(P + B)
    parts = torch.randn(P, len(cell.fed_by("R")), N, D, D, generator=generator)
    d_bias = torch.randn(B, len(cell.gates), N, D, generator=generator)
    found = cuda_fused._sums(problem, parts if P else None, d_bias)
    assert P or found[0] is None
    expected = parts.double().sum(0), d_bias.double().sum(0)[list(cell.fed_by("b"))]
    for given, truth in list(zip(found, expected, strict=True))[0 if P else 1 :]:
        assert given.dtype == dtype and given.shape == truth.shape and given.is_contiguous()
        largest = max(P, B) ** 0.5
        torch.testing.assert_close(
            given.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6 * largest
        )


@needs_nvrtc
@pytest.mark.parametrize(
    "arch", [x if x == "sm_90a" else pytest.param(x, marks=pytest.mark.slow) for x in GPUS]
)
def test_compiles_without_spills(arch):
    assert not spills_in_a_loop(gradient_sums.program(resolve("gru").traced, "bfloat16"), arch)
