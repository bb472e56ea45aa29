"""The sums that complete the gradients of R and of the bias."""

import pytest
import torch

from flashrnn.backends.fused import scans
from flashrnn.cells import resolve
from flashrnn.kernels import call, gradient_sums, source
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler, one_by_one  # noqa: F401
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
    truths = {"d_R": parts.double().sum(0), "d_b": d_bias.double().sum(0)[list(cell.fed_by("b"))]}
    if not P:
        del truths["d_R"]
    found = {name: torch.full(x.shape, torch.nan, dtype=dtype) for name, x in truths.items()}
    given = {"parts": parts} if P else {}
    addresses, layout = call.GRADIENT_SUMS.read({"d_bias": d_bias, **given, **found})
    launches = scans.sums(problem, source.precision_of(problem), P, layout)
    one_by_one([(to.kernel, to.shape, to.packing(addresses)) for to in launches])
    for name, truth in truths.items():
        given, largest = found[name], max(P, B) ** 0.5
        torch.testing.assert_close(
            given.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6 * largest
        )


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", sparse], ids=["lstm", "gru", "sparse"])
@pytest.mark.parametrize("rows", [(3, 5), (600, 1), (7, 100)], ids=str)
def test_gradients_of_R_and_b(fused_emulation, poisoned, rows, kind, dtype):  # noqa: F811
    """Few rows take one launch, which completes the gradient of the bias, too."""
    (B, T), N, D = rows, 2, 20
    cell = resolve(kind).traced
    problem = Problem(cell, B, T, N, D, dtype, torch.device("cpu"), needs_gradient=True)
    generator = torch.Generator().manual_seed(B)

    def random(*sizes, dtype=dtype):
        return torch.randn(*sizes, generator=generator).to(dtype)

    d_gates, h = random(B, T, len(cell.gates), N, D), random(1, B, T, N, D)
    initial = random(1, B, 1, N, D, dtype=torch.float32)
    d_bias = random(B, len(cell.gates), N, D, dtype=torch.float32)
    found = (
        d_gates.new_empty(len(cell.fed_by("R")), N, D, D),
        d_gates.new_empty(len(cell.fed_by("b")), N, D),
    )
    tensors = {"initial": initial, "states": h, "d_gates": d_gates, "d_bias": d_bias}
    tensors |= {"d_R": found[0], "d_b": found[1]}
    if dtype == torch.float32:
        tensors["h_initial"] = initial[0]
    addresses, layout = call.BACKWARD.read(tensors)
    precision = source.precision_of(problem)
    of_R = scans.plan_of_R(problem, GPUS["sm_90a"])
    units = scans.units_of_parts(problem, of_R)
    layout = layout.with_scratch(call.Scratch(parts=units))
    launches = scans.after_scan(problem, of_R, precision, layout)
    assert (len(launches) == 1) == (units == 0)
    parts = torch.full((units, 4), torch.nan)
    addresses += [parts.data_ptr()] if units else []
    one_by_one([(to.kernel, to.shape, to.packing(addresses)) for to in launches])
    before = torch.cat([initial[0].to(dtype), h[0, :, :-1]], 1).double()
    of_R = d_gates.double()[:, :, list(cell.fed_by("R"))]
    truths = (
        torch.einsum("btgnd,btnp->gndp", of_R, before),
        d_bias.double().sum(0)[list(cell.fed_by("b"))],
    )
    for given, truth in zip(found, truths, strict=True):
        assert given.dtype == dtype and given.is_contiguous()
        torch.testing.assert_close(
            given.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * (B * T) ** 0.5
        )


@needs_nvrtc
@pytest.mark.parametrize(
    "arch", [x if x == "sm_90a" else pytest.param(x, marks=pytest.mark.slow) for x in GPUS]
)
def test_compiles_without_spills(arch):
    assert not spills_in_a_loop(gradient_sums.program(resolve("gru").traced, "bfloat16"), arch)
