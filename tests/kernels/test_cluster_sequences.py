"""Resets, lengths, packing and directions of heads that clusters compute, run as C++ on the CPU.

The longest of a cluster's sequences says how often its CTAs exchange values: a CTA that counted
otherwise would wait for ever, or leave while others still send to it. The emulation complains of
both.
"""

from dataclasses import replace

import pytest
import torch

from flashrnn import FlashRNNConfig
from flashrnn.cells import resolve
from flashrnn.kernels import cluster, source
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import OPTIONS, at_odd_address, strided
from tests.gpus import GPUS, LARGER, planned
from tests.kernels.regimes import (
    CLUSTER_BACKWARD,
    CLUSTER_MMA,
    CLUSTER_WGMMA,
    take,  # noqa: F401
)
from tests.machine_code import needs_nvrtc, spills_in_the_loop_of_products
from tests.problems import BUILT_IN, Inputs, sparse
from tests.sequences import (
    ALL,
    KINDS,
    alternating,
    hold_ragged_to_vanilla,
    hold_to_each_alone,
    random_ragged,
)

REGIMES = [*CLUSTER_MMA, *CLUSTER_WGMMA]
# Two clusters for each head: the sizes of regimes.py with few sequences leave one.
TWO = CLUSTER_MMA[3]
BF16 = torch.bfloat16


def some(values, quick):
    """Parameters, of which those that are not quick are slow."""
    return [pytest.param(x, marks=[] if quick(x) else pytest.mark.slow) for x in values]


def named(value):
    return "-".join(value.values()) if isinstance(value, dict) else str(value)


every_regime = pytest.mark.parametrize("regime", some(REGIMES, lambda x: x is TWO), ids=str)
every_kind = pytest.mark.parametrize("kinds", some(KINDS, lambda x: x in ALL), ids=named)
all_kinds = pytest.mark.parametrize("kinds", ALL, ids=named)


@needs_compiler
@every_kind
@pytest.mark.parametrize("regime", some([TWO, CLUSTER_WGMMA[0]], lambda x: x is TWO), ids=str)
def test_equals_vanilla(take, regime, kinds):  # noqa: F811
    case = random_ragged("lstm", regime.B, 5, 2, 136, dtype=BF16, **kinds)
    hold_ragged_to_vanilla(take(regime).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "kind", "kinds"),
    [
        *((regime, "lstm", kinds) for regime in REGIMES for kinds in ALL),
        *alternating([TWO, CLUSTER_WGMMA[0]], ["elman", "gru", "slstm", sparse]),
    ],
    ids=named,
)
def test_every_shape_and_cell(take, regime, kind, kinds):  # noqa: F811
    case = random_ragged(kind, regime.B, 4, 2, regime.D, dtype=torch.float16, **kinds)
    hold_ragged_to_vanilla(take(regime).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "kinds"), alternating(BUILT_IN, [BF16, torch.float32]), ids=named
)
def test_backward_behind_the_grids_forward(take, kind, dtype, kinds):  # noqa: F811
    """Clusters compute float32 and any number of units backward alone.

    Four CTAs have no registers for sLSTM's float32 R beside all options of sequences.
    """
    case = random_ragged(kind, CLUSTER_BACKWARD.B, 4, 2, CLUSTER_BACKWARD.D, dtype=dtype, **kinds)
    hold_ragged_to_vanilla(take(replace(CLUSTER_BACKWARD, gpu=LARGER)).backend, case)


@needs_compiler
@pytest.mark.slow
@all_kinds
@pytest.mark.parametrize("sizes", [(1, 1, 1, 136), (20, 12, 3, 152), (41, 3, 1, 192)], ids=str)
@pytest.mark.parametrize("regime", [TWO, CLUSTER_WGMMA[0], CLUSTER_WGMMA[2]], ids=str)
def test_sizes(take, regime, sizes, kinds):  # noqa: F811
    """Many steps, so that rings and buffers come round; clusters that end at different steps."""
    case = random_ragged("lstm", *sizes, seed=5, dtype=BF16, **kinds)
    hold_ragged_to_vanilla(take(regime).backend, case)


@needs_compiler
@every_regime
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_clusters_without_a_step(take, regime, ragged):  # noqa: F811
    """No CTA of them waits or sends: their states are the initial ones, their gradients pass."""
    sequences = 33
    case = random_ragged("lstm", sequences, 2, 1, 136, ragged=ragged, dtype=BF16)
    lengths = torch.zeros(sequences, dtype=torch.int64)
    lengths[3] = 2
    if ragged == "lengths":
        options = {"lengths": lengths}
    else:
        options = {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths]).cumsum(0)}
        Wx = case.inputs.Wx.detach()[:, :2].clone().requires_grad_()
        case = replace(case, inputs=replace(case.inputs, Wx=Wx))
    case = replace(case, options=case.options | options, lengths=lengths.tolist())
    hold_ragged_to_vanilla(take(regime).backend, case)
    without = lengths == 0
    _, last = case.call("cuda_fused")
    assert torch.equal(last[:, without], case.inputs.states[:, without])


@needs_compiler
@every_regime
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_same_bits_as_each_sequence_alone(take, regime, ragged):  # noqa: F811
    case = random_ragged("lstm", regime.B, 6, 1, 136, seed=2, ragged=ragged, dtype=BF16)
    hold_to_each_alone(take(regime).backend, case, range(0, regime.B, 3))


@needs_compiler
@pytest.mark.parametrize("regime", some(REGIMES, lambda x: x is TWO), ids=str)
@all_kinds
def test_same_bits_without_gradients(take, regime, kinds):  # noqa: F811
    """Where less is stored: nothing for a backward pass, and only the states that are asked for."""
    case = random_ragged("lstm", regime.B, 4, 2, regime.D, dtype=BF16, **kinds)
    backend = take(regime).backend
    expected = case.call(backend)
    with torch.no_grad():
        given = case.call(backend)
    for x, y in zip(given, expected, strict=True):
        assert torch.equal(x, y)


@needs_compiler
@pytest.mark.slow
@all_kinds
@pytest.mark.parametrize("change", [strided, at_odd_address])
@pytest.mark.parametrize("regime", [TWO, CLUSTER_WGMMA[0]], ids=str)
def test_any_layout(take, regime, change, kinds):  # noqa: F811
    case = random_ragged("lstm", regime.B, 4, 2, 136, dtype=BF16, **kinds)
    inputs = {name: change(x) for name, x in case.inputs.tensors().items()}
    case = replace(case, inputs=Inputs(**inputs), reset_states=change(case.reset_states))
    hold_ragged_to_vanilla(take(regime).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@all_kinds
def test_options_of_the_config(take, options, kinds):  # noqa: F811
    # Which h are clipped is chance to a gradient in 16 bits.
    case = random_ragged("gru", 9, 4, 2, 136, dtype=torch.float16, **kinds)
    config = FlashRNNConfig(**options, initial_val=0.5)
    backend = take(TWO).backend
    if "forward_clipval" not in options:
        hold_ragged_to_vanilla(backend, case, config=config)
        return
    with torch.no_grad():
        given, expected = (case.call(x, config=config) for x in (backend, "vanilla"))
    for x, y in zip(given, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)


@needs_compiler
@pytest.mark.slow
@all_kinds
def test_gradients_that_are_not_finite(take, kinds):  # noqa: F811
    """Such a step is computed again, from what memory holds: also behind a reset and backwards."""
    case = random_ragged("lstm", 9, 5, 2, 136, dtype=BF16, **kinds)
    backend, found = take(TWO).backend, []
    for by in (backend, "vanilla"):
        _, last_states = case.call(by)
        weight = torch.ones_like(last_states)
        weight[1, case.lengths.index(5), 0, 0, 7] = torch.inf
        gradient = torch.autograd.grad(last_states, case.inputs.Wx, weight)[0]
        found.append(gradient.isfinite())
    assert torch.equal(*found) and not found[0].all()


FIELDS = [
    {"resets": True},
    {"ragged": True, "reverse": True},
    {"resets": True, "ragged": True, "packed": True, "reverse": True},
]


COMPILED = [
    ("lstm", (16, 1, 512), torch.bfloat16, "sm_90a"),
    ("lstm", (9, 2, 256), torch.bfloat16, "sm_100"),
    ("lstm", (9, 1, 768), torch.float16, "sm_90a"),
    ("slstm", (9, 1, 768), torch.bfloat16, "sm_90a"),
    ("slstm", (1, 1, 256), torch.bfloat16, "sm_90a"),
    ("slstm", (40, 2, 256), torch.bfloat16, "sm_100"),
    ("gru", (20, 2, 768), torch.float16, "sm_90a"),
    ("elman", (9, 1, 1024), torch.bfloat16, "sm_90a"),
    ("lstm", (9, 1, 512), torch.float32, "sm_90a"),
    ("lstm", (64, 1, 768), torch.bfloat16, "sm_90a"),
]


@needs_nvrtc
@pytest.mark.parametrize(
    ("case", "turn"),
    [pytest.param(x, i % 2, marks=pytest.mark.slow if i else []) for i, x in enumerate(COMPILED)],
    ids=str,
)
def test_compiles_without_spills(case, turn):
    """With all options, and either direction with some of them by turns."""
    kind, sizes, dtype, arch = case
    cell = resolve(kind)
    quick = sizes == (16, 1, 512)
    compiled = 0
    for plan_scan in (
        cluster.plan_mma_forward,
        cluster.plan_wgmma_forward,
        cluster.plan_backward,
    ):
        backward = plan_scan is cluster.plan_backward
        some = FIELDS[(turn + backward) % 2]
        for fields in FIELDS[-1:] if quick else (some, FIELDS[-1]):
            problem = planned(kind, *sizes, dtype)._replace(returned=1, **fields)
            plan = plan_scan(problem, GPUS[arch], backward)
            if isinstance(plan, str):
                continue
            options = source.options_of(problem, backward, 1)
            parts = plan.source(cell, source.precision_of(problem), options, piece_bytes=16)
            assert not spills_in_the_loop_of_products(parts, arch), (fields, plan)
            compiled += 1
    assert compiled
