"""Many sequences whose R is read at each step; what all regimes share is in ``test_regimes.py``."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flashrnn import FlashRNNConfig
from flashrnn.cells import resolve
from flashrnn.kernels import registry, source, streamed
from flashrnn.kernels.streamed import StreamedPlan
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.gpus import H200, planned
from tests.kernels.regimes import STREAMED, take  # noqa: F401
from tests.machine_code import (
    instructions,
    needs_nvrtc,
    operations_of_steps,
    spills_in_the_loop_of_products,
)
from tests.problems import call, random_inputs, relative_error


def program(kind, D, B=1024, saves=True):
    plan = streamed.plan_forward(planned(kind, B, 1, D, torch.bfloat16), H200, False)
    assert isinstance(plan, StreamedPlan), plan
    return plan.source(resolve(kind), "bfloat16", source.forward_options(saves), piece_bytes=16)


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D"),
    [
        pytest.param(kind, D, marks=[] if (kind, D) == ("lstm", 1024) else pytest.mark.slow)
        for kind in ("lstm", "gru", "elman")
        for D in (512, 768, 1024, 1112)
    ],
)
def test_products_run_asynchronously(kind, D):
    parts = program(kind, D)
    assert not spills_in_the_loop_of_products(parts, "sm_90a")
    # One wait in the loop over chunks and one behind it: where it cannot have products run
    # asynchronously, the compiler has each of them wait for the one before.
    assert len(instructions(parts, "sm_90a", "WARPGROUP.DEPBAR")) == 2


@needs_nvrtc
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_products_by_tf32_run_asynchronously(kind):
    problem = planned(kind, 1024, 1, 768, torch.float32)._replace(allow_tf32=True)
    plan = streamed.plan_forward(problem, H200, False)
    parts = plan.source(resolve(kind), "tf32", source.forward_options(True), piece_bytes=16)
    assert not spills_in_the_loop_of_products(parts, "sm_90a")
    assert len(instructions(parts, "sm_90a", "WARPGROUP.DEPBAR")) == 2
    assert all(name.endswith("x8.F32.TF32") for name in instructions(parts, "sm_90a", "HGMMA"))


@needs_nvrtc
def test_no_warp_waits_for_its_stores_while_it_multiplies():
    """To say that a slot is free orders no stores: with a fence a chunk took twice as long."""
    of_chunk = min(operations_of_steps(program("lstm", 1024), "sm_90a"), key=Counter.total)
    assert of_chunk["SYNCS"]
    assert not of_chunk["MEMBAR"]


@pytest.mark.parametrize(
    ("kind", "B", "D", "chosen"),
    [
        *[("lstm", B, 1024, B >= 512) for B in (64, 256, 512, 1024, 4096)],
        *[("lstm", B, 2048, B >= 256) for B in (16, 64, 256, 1024)],
        *[("gru", 1024, 768, True), ("slstm", 1024, 768, False), ("elman", 512, 2048, True)],
    ],
)
def test_chosen_for_many_sequences(kind, B, D, chosen):
    """By estimates. An H200 was measured to be faster so."""
    plan = registry.best_plan(planned(kind, B, 1, D, torch.bfloat16), H200, False)
    assert isinstance(plan, StreamedPlan) == chosen


def test_float32_needs_tf32():
    problem = planned("lstm", 1024, 1, 768, torch.float32)
    for allowed in (None, False):
        plan = streamed.plan_forward(problem._replace(allow_tf32=allowed), H200, False)
        assert isinstance(plan, str)
    assert streamed.plan_forward(problem._replace(allow_tf32=True), H200, False).itemsize == 4


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "sizes"),
    # Several work tiles a cluster, and tiles that lack sequences, units and a stripe.
    [("lstm", (130, 3, 1, 140)), ("gru", (257, 2, 2, 132))],
    ids=str,
)
def test_tf32(take, kind, sizes):  # noqa: F811
    """What is multiplied is rounded to TF32, to nearest; nothing else is."""
    take(STREAMED[0])
    inputs = random_inputs(kind, *sizes, torch.float32)
    truth = call(kind, inputs.to(torch.float64), backend="vanilla")
    options = {"backend": "cuda_fused", "config": FlashRNNConfig(allow_tf32=True)}
    given = call(kind, inputs, **options)
    assert 1e-6 < relative_error(given[0], truth[0]) < 2**-11
    # Of numbers that TF32 has nothing is lost, in a step.
    exact = {name: getattr(inputs, name).mul(64).round().div(64) for name in ("R", "states")}
    inputs = replace(inputs, Wx=inputs.Wx[:, :1], **exact)
    given, truth = call(kind, inputs, **options), call(kind, inputs, backend="vanilla")
    torch.testing.assert_close(given[0], truth[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B", [1, 4096])
def test_takes_no_head_that_no_other_regime_has(B):
    """For few sequences of such a head backend `cuda` is faster, and B must not decide."""
    problem = planned("lstm", B, 1, 4096, torch.bfloat16, needs_gradient=False)
    assert isinstance(streamed.plan_forward(problem, H200, False), StreamedPlan)
    assert isinstance(registry.best_plan(problem, H200, False), str)
