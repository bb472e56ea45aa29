"""The fused backends on a GPU, at real sizes."""

import gc
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch

from flashrnn import Stepper, calls, flashrnn, recurrent_layer
from flashrnn.backends import cuda_fused
from flashrnn.backends.fused import plans, scans
from flashrnn.cells import resolve
from flashrnn.kernels import registry
from flashrnn.kernels.cluster import ClusterWgmmaBackwardPlan, wgmma_backward_plan, wgmma_plan
from flashrnn.kernels.grid import GridWgmmaPlan
from flashrnn.kernels.grid import wgmma_plan as grid_wgmma_plan
from flashrnn.kernels.streamed import StreamedPlan
from flashrnn.kernels.streamed import plan as streamed_plan
from flashrnn.problem import Problem
from tests.fused import (  # noqa: F401
    DTYPES,
    OPTIONS,
    PRODUCTS,
    all_strided,
    at_odd_addresses,
    contains_what_is_beyond_float16,
    hold_to_vanilla,
    others_keep_their_bits,
    poisoned,
    put,
    same_bits_from_a_graph,
    same_pattern_as_vanilla,
    tf32,
    with_gaps,
)
from tests.gpus import alone
from tests.layers import NAMES, layer_inputs, results, two_nodes
from tests.padding import with_additional_units
from tests.problems import (
    BUILT_IN,
    Inputs,
    call,
    gentle_inputs,
    gradients,
    random_inputs,
    random_weights,
    relative_error,
    root,
    sparse,
    undefined,
    wide,
)
from tests.residuals import backward_from_residuals
from tests.sequences import KINDS, hold_ragged_to_vanilla, random_ragged
from tests.test_graphs import TABLES, check_table, table_inputs

pytestmark = pytest.mark.gpu

LARGEST_HEAD = {"triton": 128}


@pytest.fixture(autouse=True)
def _poisoned(poisoned):  # noqa: F811
    """See :func:`tests.fused.poisoned`."""


@pytest.fixture(params=["cuda_fused", "triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture(params=["cuda_fused", "cuda_fused-groups", "triton", "cuda"])
def where(request):
    """A backend, and how much wider its heads are: several thread blocks share a wide one."""
    backend, _, groups = request.param.partition("-")
    return backend, 8 if groups else 1


def run(backend, kind, inputs):
    outputs = call(kind, inputs, backend=backend)
    return outputs, gradients(outputs, inputs)


SIZES = [(1, 1, 1, 16), (7, 2, 5, 40), (24, 64, 1, 96), (7, 64, 5, 41), (16, 64, 2, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (16, 64, 2, 320), (7, 3, 1, 640)], ids=str)
def test_equals_vanilla(backend, kind, dtype, sizes):
    if sizes[-1] > LARGEST_HEAD.get(backend, sizes[-1]):
        pytest.skip("a head larger than this backend takes")
    hold_to_vanilla(backend, kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    # Tiles of 4 and 8, in CTAs of three, six, four and twelve; the last CTA lacks sequences.
    [
        *[(125, 33, 12, 64), (250, 33, 12, 64), (250, 9, 24, 32), (200, 9, 24, 32)],
        *[(300, 9, 12, 41), (500, 9, 24, 16)],
    ],
    ids=str,
)
def test_several_tiles_of_small_heads(kind, dtype, sizes):
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(
            (name, sizes)
            for name in ("cuda_fused", "triton")
            for sizes in [(7, 777, 1, 40), (256, 16, 12, 64), (300, 3, 1, 128)]
        ),
        *(
            ("cuda_fused", sizes)
            for sizes in [
                (777, 2, 1, 200),
                (64, 9, 12, 256),
                (9, 100, 2, 512),
                (33, 16, 1, 768),
                (200, 9, 1, 768),
                (4, 300, 1, 768),
                (9, 16, 1, 2048),
                (4, 3, 1, 2560),
            ]
        ),
        *(("cuda", sizes) for sizes in [(7, 777, 1, 40), (2, 3, 1, 4096), (256, 4, 1, 768)]),
    ],
    ids=str,
)
def test_large(name, sizes):
    hold_to_vanilla(name, "lstm", *sizes, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        *[(260, 12, 1, 768), (300, 5, 2, 330), (260, 5, 1, 1000)],
        # Heads that a cluster has room for.
        *[(250, 9, 1, 512), (130, 30, 2, 384), (255, 9, 3, 256), (200, 9, 6, 136)],
    ],
    ids=str,
)
def test_many_sequences_of_a_large_head(kind, dtype, sizes):
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        *[(16, 100, 3, 256), (9, 40, 5, 192), (16, 64, 6, 160), (70, 20, 1, 384), (5, 30, 2, 136)],
        # Two blocks of sequences, fragments in shared memory, units that a block lacks.
        *[(40, 9, 5, 248), (32, 9, 12, 192), (64, 9, 3, 256)],
    ],
    ids=str,
)
def test_heads_that_clusters_share(kind, sizes):
    hold_to_vanilla("cuda_fused", kind, *sizes, torch.bfloat16, "cuda")


@contextmanager
def preferred(monkeypatch, module, rank):
    """A regime's plans are chosen by this rank, whatever they take, and before other regimes'."""
    caches = (module.best_plan, registry.best_plan, registry.plan_steps, scans.prepare)

    def forget():
        for cache in caches:
            cache.cache_clear()
        calls.kept.clear()

    monkeypatch.setattr(module, "estimated_cycles", lambda plan, *_: rank(plan) - 1000)
    forget()
    yield
    forget()


def taken(kind, sizes, dtype, expected):
    """Skip the test unless a plan of this class computes the problem."""
    B, T, N, D = sizes
    backward = expected is ClusterWgmmaBackwardPlan
    device = torch.device("cuda")
    problem = Problem(resolve(kind).traced, B, T, N, D, dtype, device, needs_gradient=True)
    plan = plans.plan_of(problem, backward, plans.gpu_of(problem))
    if not isinstance(plan, expected):
        pytest.skip(f"this GPU does not compute such a head by a {expected.__name__}")


def gives_the_same_bits_fifty_times(*sizes):
    """Whatever order things arrive in: with many steps and all of the GPU."""
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    first = call("lstm", inputs, backend="cuda_fused")
    for _ in range(50):
        again = call("lstm", inputs, backend="cuda_fused")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.fixture(
    params=[(2, 1), (3, 1), (5, 1), (3, 2), (5, 2), (8, 2)],
    ids="{0[0]}x8 sequences in {0[1]}".format,
)
def many_sequences_in_clusters(request, monkeypatch):
    """Clusters that own so many in such parts are chosen before others."""
    n_tiles, parts = request.param

    def rank(plan):
        return abs(plan.n_tiles - n_tiles) + 100 * (plan.parts != parts) - plan.warpgroups

    with preferred(monkeypatch, wgmma_plan, rank):
        yield


@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize("sizes", [(50, 40, 1, 768), (20, 9, 2, 520), (90, 9, 3, 136)], ids=str)
def test_clusters_of_many_sequences(many_sequences_in_clusters, kind, sizes):
    hold_to_vanilla("cuda_fused", kind, *sizes, torch.bfloat16, "cuda")


def test_same_bits_of_clusters_of_many_sequences(many_sequences_in_clusters):
    gives_the_same_bits_fifty_times(300, 200, 1, 768)


@pytest.mark.parametrize("kinds", KINDS, ids=lambda x: "-".join(x.values()))
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_options_of_clusters_of_many_sequences(many_sequences_in_clusters, kind, kinds):
    case = random_ragged(kind, 90, 20, 1, 520, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@pytest.fixture(
    params=[(2, 2, 2, 1), (2, 2, 2, 2), (2, 2, 8, 2), (4, 3, 4, 1), (2, 1, 4, 2), (2, 4, 4, 2)],
    ids="{0[1]} warpgroups of {0[0]} CTAs, {0[2]}x8 sequences in {0[3]}".format,
)
def grid_wgmma(request, monkeypatch):
    """Groups of clusters of such a shape compute forward scans, or of one next to it."""
    size, warpgroups, n_tiles, batch_tiles = request.param

    def rank(plan):
        differs = 4 * (plan.size != size) + 2 * (plan.warpgroups != warpgroups)
        differs += plan.batch_tiles != batch_tiles
        return 16 * differs + abs(plan.n_tiles - n_tiles)

    with preferred(monkeypatch, grid_wgmma_plan, rank):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        # A step, and few; units and sequences that tiles lack; several heads, and rounds of groups.
        *[(1, 1, 1, 136), (50, 40, 1, 768), (90, 9, 3, 264), (300, 5, 1, 1000), (70, 3, 1, 1536)],
    ],
    ids=str,
)
def test_groups_of_clusters(grid_wgmma, kind, sizes, dtype):
    taken(kind, sizes, dtype, GridWgmmaPlan)
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda")


def test_same_bits_of_groups_of_clusters(grid_wgmma):
    taken("lstm", (200, 300, 1, 1024), torch.bfloat16, GridWgmmaPlan)
    gives_the_same_bits_fifty_times(200, 300, 1, 1024)


@pytest.mark.parametrize("kinds", KINDS, ids=lambda x: "-".join(x.values()))
@pytest.mark.parametrize(
    ("kind", "sizes"),
    # One round of groups, and several.
    [("lstm", (90, 20, 1, 520)), ("gru", (90, 20, 1, 520)), ("lstm", (300, 7, 1, 1000))],
    ids=str,
)
def test_options_of_groups_of_clusters(grid_wgmma, kind, sizes, kinds):
    taken(kind, sizes, torch.bfloat16, GridWgmmaPlan)
    case = random_ragged(kind, *sizes, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


def test_groups_of_clusters_in_a_graph(grid_wgmma):
    """A cooperative launch of clusters, whose counters are set to zero at each replay."""
    sizes = (70, 20, 1, 1024)
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    taken("lstm", sizes, torch.bfloat16, GridWgmmaPlan)

    def step():
        with torch.no_grad():
            return call("lstm", inputs, backend="cuda_fused")

    step()
    assert same_bits_from_a_graph(step, inputs)


def test_widest_heads_of_groups_of_clusters(grid_wgmma):
    """All of the GPU's registers and shared memory hold R, and few sequences fit beside it."""
    taken("lstm", (40, 9, 1, 2048), torch.bfloat16, GridWgmmaPlan)
    hold_to_vanilla("cuda_fused", "lstm", 40, 9, 1, 2048, torch.bfloat16, "cuda")


@pytest.fixture(params=[16, 32, 48, 64], ids="tiles of {} units".format)
def streamed(request, monkeypatch):
    """R is read at each step, for tiles of so many units, or of fewer where more have no room."""
    with preferred(monkeypatch, streamed_plan, lambda plan: abs(plan.units - request.param)):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "elman", sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        # A step, and few; units, stripes and sequences that tiles lack; several heads; and work
        # tiles of one step that clusters compute in turn.
        *[(1, 1, 1, 136), (130, 40, 1, 768), (300, 9, 3, 264), (1000, 5, 1, 1000)],
        (4100, 3, 1, 512),
    ],
    ids=str,
)
def test_streamed(streamed, kind, sizes, dtype):
    taken(kind, sizes, dtype, StreamedPlan)
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize(
    "sizes",
    [(300, 6, 1, 430), (70, 9, 2, 333), (700, 5, 1, 1150), (3, 70, 1, 157), (9, 64, 2, 430)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
def test_padded_heads(monkeypatch, kind, sizes):
    """Of a call and of a layer, by the kernels of heads whose rows are multiples of 16 bytes."""
    computed, forward = [], cuda_fused.forward

    def noting(problem, *arguments, **further):
        computed.append(problem.D)
        return forward(problem, *arguments, **further)

    monkeypatch.setattr(cuda_fused, "forward", noting)
    with_additional_units(monkeypatch)
    B, T, N, D = sizes
    hold_to_vanilla("cuda_fused", kind, *sizes, torch.bfloat16, "cuda")
    leaves = layer_inputs(kind, B, T, 41, N, D, torch.bfloat16, device="cuda")
    given = results(recurrent_layer, leaves, NAMES, kind, "cuda_fused")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = results(two_nodes, exact, NAMES, kind, "vanilla")
    for name, one, other in zip(OF_LAYERS, given, truth, strict=True):
        assert relative_error(one, other) <= 1e-2, name
    assert all(output.is_contiguous() for output in given[:2])
    assert set(computed) == {-(-D // 8) * 8}


@pytest.mark.parametrize("tf32", [True], indirect=True)
@pytest.mark.parametrize(
    "sizes", [(130, 20, 1, 768), (300, 9, 3, 260), (1000, 5, 1, 1000)], ids=str
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_streamed_by_tf32(streamed, kind, sizes, tf32):  # noqa: F811
    taken(kind, sizes, torch.float32, StreamedPlan)
    inputs = random_inputs(kind, *sizes, torch.float32, "cuda")
    truth, right = run("vanilla", kind, inputs.to(torch.float64))
    given, mine = run("cuda_fused", kind, inputs)
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3
    assert all(relative_error(mine[name], right[name]) < 2e-3 for name in right)


def test_same_bits_streamed(streamed):
    taken("lstm", (600, 200, 1, 1024), torch.bfloat16, StreamedPlan)
    gives_the_same_bits_fifty_times(600, 200, 1, 1024)


def test_streamed_in_a_graph(streamed):
    """A cooperative launch of clusters, whose counters are set to zero at each replay."""
    sizes = (300, 20, 1, 1024)
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    taken("lstm", sizes, torch.bfloat16, StreamedPlan)

    def step():
        with torch.no_grad():
            return call("lstm", inputs, backend="cuda_fused")

    step()
    assert same_bits_from_a_graph(step, inputs)


@pytest.fixture(
    params=[(2, 1), (4, 1), (2, 3), (4, 4), (4, 5)], ids="{0[0]} columns, {0[1]}x8".format
)
def wgmma_backward(request, monkeypatch):
    """Clusters of such a shape compute backward scans by wgmma, or of one next to it."""
    columns, n_tiles = request.param

    def rank(plan):
        return abs(plan.n_tiles - n_tiles) + 8 * (plan.columns != columns)

    with preferred(monkeypatch, wgmma_backward_plan, rank):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        # A step, two, and few; units and sequences that tiles lack; several rounds of clusters.
        *[(1, 1, 1, 136), (3, 2, 1, 512), (50, 40, 1, 768), (41, 9, 2, 513)],
        *[(20, 9, 2, 640), (90, 9, 3, 129), (700, 5, 2, 256)],
    ],
    ids=str,
)
def test_clusters_backward_by_wgmma(wgmma_backward, kind, sizes, dtype):
    taken(kind, sizes, dtype, ClusterWgmmaBackwardPlan)
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize(
    "options", [x for x in OPTIONS if "gradient_recurrent_cut" not in x], ids=str
)
def test_options_backward_by_wgmma(wgmma_backward, options):
    sizes = (41, 9, 2, 513)
    taken("gru", sizes, torch.float16, ClusterWgmmaBackwardPlan)
    # Some of so many h lie beside their clip. Whether their gradients pass is decided by rounding,
    # that of the saved pre-activations too. Vanilla does not round these; once it does, it errs two
    # to five times as much.
    clips_h = "forward_clipval" in options
    with backward_from_residuals() if clips_h else nullcontext():
        hold_to_vanilla("cuda_fused", "gru", *sizes, torch.float16, "cuda", **options)


def test_same_bits_backward_by_wgmma(wgmma_backward):
    """Whatever order things arrive in: with many steps and all of the GPU, a hundred times."""
    sizes = (280, 64, 1, 768)
    taken("lstm", sizes, torch.bfloat16, ClusterWgmmaBackwardPlan)
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    outputs = call("lstm", inputs, backend="cuda_fused")
    asked = random_weights(outputs, 1)
    leaves = list(inputs.tensors().values())
    first = torch.autograd.grad(outputs, leaves, asked, retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(outputs, leaves, asked, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_many_steps_backward_by_wgmma(wgmma_backward):
    """Barriers go round a thousand times."""
    sizes = (64, 2000, 1, 512)
    taken("lstm", sizes, torch.bfloat16, ClusterWgmmaBackwardPlan)
    hold_to_vanilla("cuda_fused", "lstm", *sizes, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 128, 200, 768])
@pytest.mark.parametrize(("kind", "where"), [("slstm", "Wx"), ("lstm", "states")])
def test_others_keep_their_bits(backend, kind, where, D, dtype):
    if LARGEST_HEAD.get(backend, D) < D:
        pytest.skip("a head larger than this backend takes")
    assert others_keep_their_bits(backend, 17, D, dtype, "cuda", kind, where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_R_sums_millions_of_rows(dtype):
    """Of one sign, so that what each addition cuts off adds up.

    4,000 rows are a part's here: 1,500 products of float32, each of which cuts up to 2⁻²⁴ off.
    """
    T, D = 2**20, 16
    Wx = torch.rand(1, T, 1, 1, D, device="cuda", dtype=dtype).requires_grad_()
    R = torch.full((1, 1, D, D), 0.01, device="cuda", dtype=dtype).requires_grad_()
    b = torch.zeros(1, 1, D, device="cuda", dtype=dtype)
    states, _ = flashrnn(Wx, R, b, function="elman", backend="cuda_fused")
    d_Wx, d_R = torch.autograd.grad(states.sum(), (Wx, R))
    rows, before = d_Wx[0, 1:, 0, 0].double(), states[0, 0, :-1, 0].detach().double()
    assert relative_error(d_R[0, 0], rows.T @ before) < (2**-8 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_operations_are_right_to_float32_accuracy(backend, table):
    D = 16
    # A sum with 0 is not -0.
    gates = torch.stack(table_inputs())[:, : -(len(table_inputs()[0]) % D)] + 0.0
    Wx = gates.view(3, -1, D).movedim(0, 1)[:, None, :, None].cuda()
    R, b = (torch.zeros(3, 1, *size, device="cuda") for size in ((D, D), (D,)))
    states, _ = flashrnn(Wx, R, b, function=table, backend=backend)
    check_table(table, gates, states.reshape(len(table.states), -1).cpu())


@pytest.mark.parametrize("sizes", [(0, 3, 2, 16), (3, 0, 2, 16)], ids=str)
def test_empty(backend, sizes):
    hold_to_vanilla(backend, "lstm", *sizes, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(where, dtype, options):
    backend, wider = where
    # Wider still, more of h is clipped, and rounding decides for more of it whether.
    D = 24 if wider == 1 else 150
    hold_to_vanilla(backend, "lstm", 5, 9, 2, D, dtype, "cuda", **options)


def test_any_strides(where):
    backend, wider = where
    sizes = (3, 4, 2, 24 * wider)
    hold_to_vanilla(backend, "lstm", *sizes, torch.bfloat16, "cuda", change=all_strided)


@pytest.mark.parametrize("sizes", [(3, 4, 2, 24), (16, 4, 3, 256), (200, 3, 1, 768)], ids=str)
def test_at_odd_addresses(sizes):
    change = at_odd_addresses
    hold_to_vanilla("cuda_fused", "lstm", *sizes, torch.bfloat16, "cuda", change=change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [at_odd_addresses, with_gaps])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *(("lstm", sizes) for sizes in [(26, 216, 1, 61), (2000, 5, 1, 61), (300, 9, 12, 15)]),
        *((kind, (435, 40, 1, 71)) for kind in ("elman", "slstm")),
        *(("gru", sizes) for sizes in [(537, 20, 1, 54), (200, 20, 1, 123), (9, 40, 2, 20)]),
        # A step and two.
        *(("lstm", (7, T, 2, 127)) for T in (1, 2)),
    ],
    ids=str,
)
def test_rows_that_begin_anywhere(kind, sizes, change, dtype):
    hold_to_vanilla("cuda_fused", kind, *sizes, dtype, "cuda", change=change)


def test_tf32(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    inputs = random_inputs("lstm", 7, 16, 2, 48, torch.float32, "cuda")
    truth, right = run("vanilla", "lstm", inputs.to(torch.float64))
    given, mine = run(backend, "lstm", inputs)
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3
    assert all(relative_error(mine[name], right[name]) < 2e-3 for name in right)


# What is not finite, and what does not exist, in Triton's products.


@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"])
@pytest.mark.parametrize("kind", [root, undefined, wide], ids=str)
@pytest.mark.parametrize("D", [1, 12, 17, 40, 96, 100])
def test_padding_reaches_no_sum_of_triton(kind, dtype, tf32, D):  # noqa: F811
    inputs = gentle_inputs(kind, 9, 3, 2, D, dtype, "cuda")
    outputs = call(kind, inputs, backend="vanilla")
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, inputs).values()))
    same_pattern_as_vanilla("triton", kind, inputs)


@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"])
@pytest.mark.parametrize("kind", ["elman", "gru", sparse, wide], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize(
    ("name", "at"),
    [("states", (0, 1, 0, 0, 3)), ("R", (0, 0, 2, 5)), ("Wx", (1, 1, -1, 0, 4))],
)
def test_what_is_not_finite_spreads_in_triton_as_in_vanilla(kind, dtype, tf32, value, name, at):  # noqa: F811
    for D in (12, 64, 96):
        inputs = random_inputs(kind, 2, 3, 1, D, dtype, "cuda")
        put(inputs, name, value, *at)
        same_pattern_as_vanilla("triton", kind, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_clips_of_triton_keep_nan(dtype, options):
    inputs = random_inputs("lstm", 2, 4, 2, 12, dtype, "cuda")
    asked = tuple(torch.ones_like(x) for x in call("lstm", inputs, backend="vanilla"))
    asked[1][0, 1, 0, 0, 3] = torch.nan
    same_pattern_as_vanilla("triton", "lstm", inputs, asked, **options)
    put(inputs, "Wx", torch.nan, 0, 2, 0, 1, 5)
    same_pattern_as_vanilla("triton", "lstm", inputs, **options)


@pytest.mark.parametrize("D", [12, 64, 65, 128])
def test_a_clip_of_triton_contains_what_is_beyond_float16(D):
    contains_what_is_beyond_float16("triton", D, "cuda")


# T·G·N·D or S·B·T·N·D passes 2³¹; the second takes some 45 GB.
@pytest.mark.parametrize("sizes", [(1, 2049, 4096, 64), (8, 1025, 2048, 64)], ids=str)
def test_sizes_of_triton_beyond_32_bits(sizes):
    """The last head, alone and as one of many: the same bits, but for sums over all rows."""
    B, T, N, D = sizes
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory on the GPU")
    alone = random_inputs("lstm", B, T, 1, D, torch.bfloat16, "cuda")
    runs = []
    for heads in (1, N):
        leaves = {}
        for name, x in alone.tensors().items():
            dim = 1 if name == "R" else -2
            size = list(x.shape)
            size[dim] = heads
            leaves[name] = torch.zeros(size, dtype=x.dtype, device="cuda")
            leaves[name].narrow(dim, heads - 1, 1).copy_(x.detach())
            leaves[name].requires_grad_()
        outputs = call("lstm", Inputs(**leaves), backend="triton")
        asked = [outputs[0][..., -1:, :], outputs[1][..., -1:, :]]
        slopes = [torch.cos(x.detach()) for x in asked]
        found = torch.autograd.grad(asked, list(leaves.values()), slopes)
        dims = [-2, 1, -2, -2]
        found = [x.narrow(d, heads - 1, 1).clone() for d, x in zip(dims, found, strict=True)]
        names = ["states", "last_states", *(f"d_{name}" for name in leaves)]
        results = [x.detach().clone() for x in asked] + found
        runs.append(dict(zip(names, results, strict=True)))
        del outputs, asked, leaves, found, results
    for name, expected in runs[0].items():
        given = runs[1][name]
        if name in ("d_R", "d_b"):
            # PyTorch adds in an order that depends on the number of heads.
            assert relative_error(given, expected) < 2**-8, name
            continue
        differs = (given != expected).nonzero()
        if len(differs):
            at = tuple(differs[0].tolist())
            raise AssertionError(
                f"{name}{list(at)} is {given[at].item()} among {N} heads, {expected[at].item()} "
                f"alone, and {len(differs) - 1} more of {given.numel()} differ"
            )


def test_a_graph_outlives_what_triton_keeps():
    """A graph launches kernels that belong to a bounded cache."""
    from flashrnn.backends import triton

    inputs = random_inputs("gru", 3, 9, 2, 56, torch.bfloat16, "cuda")

    def step():
        states, _ = call("gru", inputs, backend="triton")
        return states, *torch.autograd.grad(states, inputs.Wx, states.detach())

    expected = [x.detach().clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    triton._fixed_for.cache_clear()
    gc.collect()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.fixture
def expected(where):
    backend, wider = where
    inputs = random_inputs("lstm", 16, 200, 4, 64 * wider, torch.bfloat16, "cuda")
    outputs, found = run(backend, "lstm", inputs)
    torch.cuda.synchronize()
    # Without the graph, whose nodes would tie later runs to this one's stream.
    return backend, inputs, ([x.detach() for x in outputs], found)


def same_again(backend, inputs, result):
    outputs, found = run(backend, "lstm", inputs)
    torch.cuda.current_stream().synchronize()
    same = [torch.equal(x, y) for x, y in zip(outputs, result[0], strict=True)]
    return all([*same, *(torch.equal(found[name], result[1][name]) for name in found)])


def test_same_bits_twice(expected):
    assert same_again(*expected)


# The leaves' nodes are one stream's, the runs are several's.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
@pytest.mark.parametrize("own_stream", [False, True])
def test_threads_at_once(expected, own_stream):
    good = []

    def work():
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            good.append(all(same_again(*expected) for _ in range(10)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_gpu_while_the_first_is_current(where):
    backend, wider = where
    problem = (backend, "lstm", 3, 5, 2, 24 * wider, torch.bfloat16, "cuda:1")
    hold_to_vanilla(*problem)
    # All is compiled now, and the first GPU kept busy for seconds. What is launched there, by way
    # of its access to the second one's memory, comes too late.
    torch.cuda._sleep(10**10)
    hold_to_vanilla(*problem)
    torch.cuda.synchronize()


# Of sparse, Wx feeds gates that are no neighbours.
@pytest.mark.parametrize("kind", ["gru", sparse], ids=str)
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
@pytest.mark.parametrize("used_before", [False, True])
def test_in_a_graph_of_the_users(where, used_before, kind):
    backend, wider = where
    if backend == "triton" and not used_before:
        pytest.skip("Triton compiles at the first call, which no graph can record")
    sizes = (5, 35, 2, 72 * wider) if used_before else (5, 33, 2, 88 * wider)
    inputs = random_inputs(kind, *sizes, torch.bfloat16, "cuda")

    def step():
        states, last_states = call(kind, inputs, backend=backend)
        return states, last_states, *torch.autograd.grad(states, inputs.Wx, states.detach())

    if used_before:
        step()
    # Of another problem: PyTorch makes what its own products need when the first one runs, and
    # cannot in a capture.
    run(backend, "elman", random_inputs("elman", 1, 2, 1, 24 * wider, torch.bfloat16, "cuda"))
    assert same_bits_from_a_graph(step, inputs)


# Inductor uses what PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_whole(backend):
    """torch.compile sees one operator, and gives the same bits."""
    inputs = random_inputs("lstm", 4, 9, 2, 32, torch.bfloat16, "cuda")

    def step(*tensors):
        from flashrnn import flashrnn

        return flashrnn(*tensors, function="lstm", backend=backend)

    compiled = torch.compile(step, fullgraph=True)(*inputs.tensors().values())
    found = gradients(compiled, inputs)
    outputs, expected = run(backend, "lstm", inputs)
    assert all(torch.equal(x, y) for x, y in zip(compiled, outputs, strict=True))
    assert all(torch.equal(found[name], expected[name]) for name in found)


FIRST = """
import sys, time, torch
from tests.problems import call, random_inputs
inputs = random_inputs("lstm", 16, 1024, 12, 64, torch.bfloat16, "cuda")
torch.cuda.synchronize()
start = time.perf_counter()
states, _ = call("lstm", inputs, backend=sys.argv[1])
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@alone
def test_first_result_of_a_shape_is_there_soon(backend, tmp_path):
    environment = {**os.environ, "FLASHRNN_CACHE_DIR": str(tmp_path)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)

    def seconds():
        command = [sys.executable, "-c", FIRST, backend]
        printed = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        return float(printed.stdout)

    assert seconds() < 3.0
    # From the disk; the first call of a process also imports and traces.
    assert min(seconds(), seconds()) < 1.5


LAYERS = [
    ("lstm", (32, 300, 33, 3, 64)),
    ("gru", (20, 400, 256, 2, 128)),
    ("slstm", (16, 300, 512, 1, 256)),
    (sparse, (40, 4, 17, 1, 768)),
]


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize(("kind", "sizes"), LAYERS, ids=str)
def test_a_layer_has_the_bits_of_its_parts(kind, sizes, time_major):
    """Of its results and gradients; where time comes first, its products sum in another order.

    Of such sizes, or of gates that lie apart, the products are the library's.
    """
    B, T, features, N, D = sizes
    x, W, *others = layer_inputs(kind, B, T, features, N, D, torch.bfloat16, device="cuda")
    if time_major:
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    leaves = [x, W, *others]
    outputs = recurrent_layer(*leaves, function=kind, backend="cuda_fused")
    expected = two_nodes(*leaves, kind, "cuda_fused")
    weights = [torch.randn_like(found) for found in outputs]
    given = [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
    true = [*expected, *torch.autograd.grad(expected, leaves, weights)]
    assert outputs[0].grad_fn.name() == "LayerBackward"
    for name, one, other in zip(OF_LAYERS, given, true, strict=True):
        if time_major:
            assert relative_error(one, other) <= 1e-2, name
        else:
            assert torch.equal(one, other), name


OF_LAYERS = ["states", "last_states", "d_x", "d_W", "d_R", "d_b", "d_states"]


# B, T, I, N and D: of small and of large heads, one step and many, rows that begin anywhere.
OF_FEW_ROWS = [
    (9, 1, 120, 1, 120),
    (16, 8, 40, 12, 64),
    (7, 20, 33, 2, 41),
    (16, 64, 256, 1, 256),
    (130, 3, 24, 3, 200),
    (300, 2, 64, 1, 256),
    (2, 3, 512, 1, 1024),
    # CTAs share tiles of sums over so many rows.
    (200, 33, 132, 1, 132),
    (40, 101, 61, 3, 61),
]


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("sizes", OF_FEW_ROWS, ids=str)
def test_a_layer_of_few_rows(kind, sizes, dtype, tf32, time_major):  # noqa: F811
    """Its products are kernels of this package: as near to the truth as the library's, and the
    same bits each time."""
    B, T, features, N, D = sizes
    leaves = layer_inputs(kind, B, T, features, N, D, dtype, device="cuda")
    if time_major:
        x = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
        leaves[0] = x.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    given, again = (results(recurrent_layer, leaves, NAMES, kind, "cuda_fused") for _ in range(2))
    parts = results(two_nodes, leaves, NAMES, kind, "cuda_fused")
    truth = results(two_nodes, exact, NAMES, kind, "vanilla")
    for name, found, twice, near, right in zip(OF_LAYERS, given, again, parts, truth, strict=True):
        assert torch.equal(found, twice), name
        error, allowed = relative_error(found, right), relative_error(near, right)
        # Where it may use TF32, the library computes some products exactly.
        bound = 1.5 * allowed + (2**-10 if torch.backends.cuda.matmul.allow_tf32 else 1e-6)
        assert error <= bound, f"{name}: {error:.3g}, of the parts {allowed:.3g}"


STEPS = [
    (1, 1, 256),
    (16, 1, 768),
    (16, 12, 64),
    (3, 4, 128),
    (5, 2, 41),
    (200, 1, 768),
    (2, 1, 2048),
]


def steps_of(kind, B, N, D, T=5, dtype=torch.bfloat16):
    """Wx of T steps, R, b and states, nothing to differentiate."""
    inputs = random_inputs(kind, B, T, N, D, dtype, "cuda")
    return [x.detach() for x in inputs.tensors().values()]


@pytest.mark.parametrize("sizes", STEPS, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_steps_in_place_are_a_sequence(backend, kind, sizes):
    if sizes[-1] > LARGEST_HEAD.get(backend, sizes[-1]):
        pytest.skip("a head larger than this backend takes")
    for dtype in (torch.bfloat16, torch.float32):
        Wx, R, b, states = steps_of(kind, *sizes, dtype=dtype)
        every, last = flashrnn(Wx, R, b, states, kind, backend)
        stepper, carried = Stepper(R, b, kind, backend), states.squeeze(2).clone()
        for t in range(Wx.shape[1]):
            fresh = stepper(Wx[:, t], carried)
            assert stepper(Wx[:, t], carried, out=carried) is carried
            assert torch.equal(fresh, carried) and torch.equal(carried.to(dtype), every[:, :, t])
        assert torch.equal(carried, last.squeeze(2))


@pytest.mark.parametrize("sizes", [*STEPS, (2, 1, 2048)], ids=str)
def test_steps_allocate_nothing_and_replay(sizes):
    """Given memory, steps need no other; a graph of one is replayed with what the memory holds."""
    Wx, R, b, states = steps_of("lstm", *sizes)
    stepper, wx, start = Stepper(R, b, backend="cuda_fused"), Wx[:, 0].clone(), states.squeeze(2)
    expected = start.clone()
    for t in range(Wx.shape[1]):
        expected = stepper(Wx[:, t], expected)
    carried = start.clone()
    stepper(wx, carried, out=carried)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        stepper(wx, carried, out=carried)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepper(wx, carried, out=carried)
    carried.copy_(start)
    for t in range(Wx.shape[1]):
        wx.copy_(Wx[:, t])
        graph.replay()
    assert torch.equal(carried, expected)


def test_steps_on_two_streams_do_not_meet():
    """One stepper, whose scratch memory is each stream's own."""
    Wx, R, b, states = steps_of("lstm", 16, 1, 768, T=64)
    stepper = Stepper(R, b, backend="cuda_fused")
    starts = [states.squeeze(2).clone(), states.squeeze(2).clone() / 2]
    expected = [start.clone() for start in starts]
    for carried in expected:
        for t in range(Wx.shape[1]):
            stepper(Wx[:, t], carried, out=carried)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for t in range(Wx.shape[1]):
        for stream, carried in zip(streams, starts, strict=True):
            with torch.cuda.stream(stream):
                stepper(Wx[:, t], carried, out=carried)
    torch.cuda.synchronize()
    assert all(map(torch.equal, starts, expected))
