"""Many sequences whose R is read at each step; what all regimes share is in ``test_regimes.py``."""

from collections import Counter

import pytest
import torch

from flashrnn.cells import resolve
from flashrnn.kernels import registry, source, streamed
from flashrnn.kernels.streamed import StreamedPlan
from tests.gpus import H200, planned
from tests.machine_code import (
    instructions,
    needs_nvrtc,
    operations_of_steps,
    spills_in_the_loop_of_products,
)


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
