"""Resets, lengths, packing and directions on a GPU, by every backend that has them."""

from dataclasses import replace

import pytest
import torch

from flashrnn import FlashRNNConfig, flashrnn
from flashrnn.backends import cuda_fused
from flashrnn.backends.fused import plans
from flashrnn.kernels import grid, registry
from tests.fused import OPTIONS, at_odd_address, nobody_waits, poisoned, strided  # noqa: F401
from tests.gpus import planned
from tests.problems import BUILT_IN, Inputs, sparse
from tests.sequences import (
    BACKENDS,
    KINDS,
    few_cuts,
    gradients_of,
    hold_empty_sequences_out,
    hold_last_states_out,
    hold_options_of_no_effect,
    hold_padding_out,
    hold_ragged_to_vanilla,
    hold_rows_of_no_sequence,
    random_ragged,
)
from tests.tables import hold_to_pytorch, random_options

pytestmark = pytest.mark.gpu
# With h of every step: where the last states alone are asked for, errors of their gradients are
# those of all steps that they came through, beside which the bounds of other gradients mean little.
ALL = [{**kinds, "return_states": "h"} for kinds in KINDS[-2:]]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _poisoned(poisoned):  # noqa: F811
    """See :func:`tests.fused.poisoned`."""


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def clusters():
    """Skips where no cluster computes a head of more than 128 units with options of sequences."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs a GPU that launches clusters of thread blocks")


# The last head dimension is one that a cluster computes.
@pytest.fixture(params=[*((backend, 32) for backend in BACKENDS), ("cuda_fused", 256)], ids=str)
def backend_and_D(request):
    if request.param[1] > 128:
        request.getfixturevalue("clusters")
    return request.param


# Of several thread blocks a head: one sequence, an odd number of units, float32, several tiles,
# more of them than groups at once.
LARGE = [
    ((1, 40, 1, 2048), torch.bfloat16),
    ((5, 40, 1, 1000), torch.bfloat16),
    ((3, 20, 2, 333), torch.float16),
    ((16, 20, 1, 768), torch.float32),
    ((100, 33, 1, 768), torch.bfloat16),
    ((256, 20, 1, 768), torch.bfloat16),
    ((200, 12, 8, 260), torch.bfloat16),
]


@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize(("sizes", "dtype"), LARGE, ids=str)
@pytest.mark.parametrize("kind", ["lstm", pytest.param("slstm", marks=pytest.mark.slow)])
def test_large_heads(kind, sizes, dtype, kinds):
    case = random_ragged(kind, *sizes, seed=4, dtype=dtype, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)
    runs = [gradients_of(case, case.call("cuda_fused")) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(x, runs[0][name]) for name, x in run.items())


@pytest.mark.parametrize("kinds", KINDS, ids=lambda x: "-".join(x.values()))
@pytest.mark.parametrize("D", [200, 512])
def test_each_option_of_large_heads(D, kinds):
    case = random_ragged("lstm", 40, 20, 2, D, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


# CTAs of 2 and of 8 sequences; groups of several batch tiles; a cluster.
@pytest.mark.parametrize(
    "sizes", [(16, 40, 12, 64), (64, 40, 12, 64), (64, 40, 1, 768), (16, 40, 1, 256)], ids=str
)
@pytest.mark.parametrize(
    "kinds",
    [
        {"resets": "zeros"},
        {"resets": "step"},
        {"resets": "zeros", "ragged": "lengths"},
        {"resets": "sequence", "ragged": "lengths", "reverse": "some"},
    ],
    ids=lambda x: "-".join(x.values()),
)
def test_few_cuts(sizes, kinds):
    """Steps that are like a plain call's, and others between them."""
    case = random_ragged("lstm", *sizes, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", few_cuts(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 40, 12, 64), (64, 40, 12, 64)], ids=str)
def test_options_of_no_effect_change_no_bit(sizes, dtype):
    """In 16 bits. In float32 they may: kernels with options are programs of their own, in which the
    compiler fuses other products with sums."""
    hold_options_of_no_effect("cuda_fused", *sizes, dtype, "cuda")


@pytest.mark.parametrize("regime", ["plan_scan", "plan_wgmma_forward"])
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
def test_large_heads_by_groups_all_over_the_gpu(monkeypatch, regime, kinds):
    """Forward by this kernel and backward by the grid's, whatever is reckoned to be faster."""

    def taken(problem, gpu, backward):
        plan = getattr(grid, "plan_scan" if backward else regime)(problem, gpu, backward)
        return plan if isinstance(plan, str) else replace(plan, estimated_cycles=-1.0)

    # The other is for calls of few sequences: whether there is a plan is asked with one.
    monkeypatch.setattr(registry, "LARGE_HEADS", (taken, grid.plan_scan))
    caches = (registry.best_plan, plans.refused, plans.without_plan)
    for cached in (*caches, *cuda_fused.KERNELS):
        cached.cache_clear()
    try:
        case = random_ragged("lstm", 300, 20, 1, 768, dtype=torch.bfloat16, device="cuda", **kinds)
        problem = planned("lstm", 300, 1, 768, torch.bfloat16)
        if isinstance(reason := taken(problem, plans.gpu_of(problem), False), str):
            pytest.skip(f"the kernel is not for this GPU: {reason}")
        hold_ragged_to_vanilla("cuda_fused", case)
    finally:
        for cached in (*caches, *cuda_fused.KERNELS):
            cached.cache_clear()


@pytest.mark.parametrize("ragged", ["none", "lengths", "packed"])
@pytest.mark.parametrize("resets", ["none", "zeros", "sequence", "step"])
def test_tables_equal_what_pytorch_makes(ragged, resets):
    """Of lengths of either dtype, some out of range, and of strided tensors."""
    for seed, (B, T) in enumerate([(1, 1), (7, 3), (64, 1024), (1000, 40), (4096, 9), (4097, 9)]):
        for reverse in ("none", "some"):
            problem, sequences, initial = random_options(
                *(B, T, 3, 40),
                ragged=ragged,
                resets=resets,
                reverse=reverse,
                dtype=DTYPES[seed % 3],
                integers=torch.int64 if seed % 2 else torch.int32,
                strided=bool(seed // 2 % 2),
                seed=seed,
                device="cuda",
            )
            if problem.is_sequenced:
                hold_to_pytorch(problem, sequences, initial)


LAST = {"return_states": "last"}
LONG = (16, 70, 12, 64)
CASES = [(sizes, kinds) for sizes in (LONG, (70, 33, 3, 32)) for kinds in KINDS]
# A gradient of the last states alone has come through every step, at each of which stored
# pre-activations were rounded: after 70 steps its error is beyond what is allowed where every step
# has a gradient.
CASES.remove((LONG, LAST))


@pytest.mark.parametrize(
    ("sizes", "kinds"), CASES, ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else str(x)
)
def test_equals_vanilla(backend, sizes, kinds):
    case = random_ragged("lstm", *sizes, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla(backend, case)


def test_last_states_alone_have_the_bits_of_a_plain_call(backend):
    case = random_ragged("lstm", *LONG, dtype=torch.bfloat16, device="cuda", **LAST)
    leaves = list(case.inputs.tensors().values())
    (_, last), (_, plain) = case.call(backend), case.call(backend, return_states="all")
    weight = torch.randn_like(plain)
    found, expected = (torch.autograd.grad(x, leaves, weight) for x in (last, plain))
    for x, y in zip((last, *found), (plain, *expected), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_every_cell_and_dtype(backend, kind, dtype, kinds):
    for D in (48, 23):
        case = random_ragged(kind, 9, 20, 2, D, dtype=dtype, device="cuda", **kinds)
        hold_ragged_to_vanilla(backend, case)


@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (300, 20, 6, 128), (64, 40, 8, 96), (600, 12, 12, 64), (3, 130, 2, 16)]
)
def test_sizes(backend, sizes, kinds):
    case = random_ragged("lstm", *sizes, seed=5, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla(backend, case)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_config(backend, options):
    case = random_ragged("gru", 9, 20, 2, 40, dtype=torch.float32, device="cuda", **ALL[0])
    config = FlashRNNConfig(**options, initial_val=0.5)
    hold_ragged_to_vanilla(backend, case, config=config)


@pytest.mark.parametrize("change", [strided, at_odd_address])
def test_any_layout(backend, change):
    case = random_ragged("lstm", 9, 20, 2, 40, dtype=torch.bfloat16, device="cuda", **ALL[0])
    inputs = {name: change(x) for name, x in case.inputs.tensors().items()}
    case = replace(case, inputs=Inputs(**inputs), reset_states=change(case.reset_states))
    hold_ragged_to_vanilla(backend, case)


@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(26, 40, 1, 61), (300, 9, 2, 15), (40, 20, 1, 123)], ids=str)
def test_rows_that_begin_anywhere(sizes, dtype, kinds):
    case = random_ragged("gru", *sizes, dtype=dtype, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_same_bits_twice(backend_and_D, ragged):
    backend, D = backend_and_D
    case = random_ragged(
        *("lstm", 40, 64, 4, 2 * D),
        resets="step",
        ragged=ragged,
        reverse="some",
        dtype=torch.bfloat16,
        device="cuda",
    )
    runs = [gradients_of(case, case.call(backend)) for _ in range(2)]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_values_out_of_range_do_no_harm(backend_and_D, ragged):
    """On a GPU nobody looks at them; they are what the nearest right ones are."""
    backend, D = backend_and_D
    case = random_ragged("lstm", 4, 9, 2, D, ragged=ragged, dtype=torch.bfloat16, device="cuda")
    total = case.inputs.Wx.shape[1]
    name, given, meant = (
        ("cu_seqlens", [-5, total + 9, 2, total - 1, 5], [0, total, total, total, total])
        if ragged == "packed"
        else ("lengths", [-1, 2**31 - 1, 2, 9], [0, 9, 2, 9])
    )
    runs = [case.call(backend, **{name: torch.tensor(x, device="cuda")}) for x in (given, meant)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_lengths_on_either_side_are_not_waited_for(backend_and_D):
    backend, D = backend_and_D
    case = random_ragged("lstm", 4, 9, 2, D, ragged="lengths", dtype=torch.bfloat16, device="cuda")
    lengths = case.options["lengths"]
    expected = case.call(backend)
    torch.cuda.synchronize()
    with nobody_waits():
        given = case.call(backend, lengths=lengths)
    from_cpu = case.call(backend, lengths=lengths.cpu())
    for x, y, z in zip(expected, given, from_cpu, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its imports.
def test_compiled_whole_and_once_for_all_lengths(backend_and_D):
    backend, D = backend_and_D
    case = random_ragged("lstm", 4, 9, 2, D, **ALL[0], dtype=torch.bfloat16, device="cuda")
    torch.compiler.reset()
    # Outside, since Dynamo of 2.11 does not follow what makes a dict of the inputs.
    given_always = {**case.inputs.tensors(), **case.options, "reset_states": case.reset_states}
    compiled = torch.compile(
        lambda lengths: flashrnn(
            **{**given_always, "function": "lstm", "backend": backend, "lengths": lengths}
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for values in ([9, 2, 3, 0], [1, 9, 9, 4]):
            lengths = torch.tensor(values, device="cuda")
            given = gradients_of(case, compiled(lengths))
            expected = gradients_of(case, case.call(backend, lengths=lengths))
            for name, x in given.items():
                assert torch.equal(x, expected[name]), name


def test_recorded_as_a_graph(backend_and_D):
    """Lengths and flags of a replay are those that memory holds then."""
    backend, D = backend_and_D
    case = random_ragged(
        *("lstm", 4, 9, 2, D),
        resets="sequence",
        ragged="lengths",
        reverse="some",
        dtype=torch.bfloat16,
        device="cuda",
    )
    lengths, reset = case.options["lengths"].clone(), case.options["reset"].clone()
    options = {"lengths": lengths, "reset": reset}
    with torch.no_grad():
        case.call(backend, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = case.call(backend, **options)
        lengths.copy_(torch.tensor([3, 9, 0, 5]))
        reset.logical_not_()
        graph.replay()
        expected = case.call(backend, **options)
    for x, y in zip(given, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_a_step_of_training_recorded_as_a_graph(backend_and_D, ragged):
    """Its tables too are made anew at each replay, forward and backward."""
    backend, D = backend_and_D
    case = random_ragged(
        *("lstm", 4, 9, 2, D),
        resets="sequence",
        ragged=ragged,
        reverse="some",
        dtype=torch.bfloat16,
        device="cuda",
    )
    name = "lengths" if ragged == "lengths" else "cu_seqlens"
    values, reset = case.options[name].clone(), case.options["reset"].clone()
    weight = torch.randn_like(case.call(backend)[0])

    def step():
        states, _ = case.call(backend, **{name: values, "reset": reset})
        gradients = torch.autograd.grad(states, list(case.leaves().values()), weight)
        # Not the autograd graph: its nodes belong to the stream that they were made on.
        return states.detach(), *gradients

    apart = torch.cuda.Stream()
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):
        step()
    torch.cuda.current_stream().wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    if ragged == "lengths":
        values.copy_(torch.tensor([3, 9, 0, 5]))
    else:
        values[1] = values[2]
    reset.logical_not_()
    graph.replay()
    for x, y in zip(given, step(), strict=True):
        assert torch.equal(x, y)


def test_auto_takes_a_fused_backend():
    """In float64 there is none; with an option that a fused one has, it is still taken."""
    case = random_ragged("lstm", 4, 9, 2, 32, **ALL[0], dtype=torch.bfloat16, device="cuda")
    given, expected = case.call("auto"), case.call(BACKENDS[0])
    assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))
    inputs = case.to(torch.float64).inputs.tensors()
    assert flashrnn(**inputs, return_states="h")[0].shape[0] == 1


@pytest.mark.parametrize("reverse", ["none", "all", "some"])
def test_padding_reaches_nothing(backend, reverse):
    hold_padding_out(backend, reverse, "cuda")


@pytest.mark.parametrize("reverse", ["none", "some"])
def test_rows_of_no_sequence_are_zero(backend, reverse):
    hold_rows_of_no_sequence(backend, reverse, "cuda")


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_the_start_of_an_empty_sequence_reaches_no_gradient(backend, ragged):
    hold_empty_sequences_out(backend, ragged, "cuda")


LARGE = [(B, 40, N, D) for N, D in ((1, 256), (1, 512), (2, 768)) for B in (1, 9, 20)]
# As in ALL: with h of every step.
LARGE_KINDS = [kinds for kinds in KINDS if kinds != LAST and kinds not in KINDS[-2:]]


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("kinds", [*LARGE_KINDS, *ALL], ids=lambda kinds: "-".join(kinds.values()))
@pytest.mark.parametrize("sizes", [*LARGE, (70, 33, 1, 512), (200, 12, 2, 768)], ids=str)
def test_heads_of_clusters(sizes, kinds):
    case = random_ragged("lstm", *sizes, seed=3, dtype=torch.bfloat16, device="cuda", **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_heads_of_clusters_of_every_cell(kind, dtype, kinds):
    # The last CTA of a cluster has all its units, and not.
    for D in (256, 136):
        case = random_ragged(kind, 20, 20, 2, D, dtype=dtype, device="cuda", **kinds)
        hold_ragged_to_vanilla("cuda_fused", case)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_clusters_without_a_step(ragged):
    """Whose CTAs neither wait nor send."""
    lengths = torch.zeros(100, dtype=torch.int64, device="cuda")
    lengths[3] = 9
    case = random_ragged("lstm", 100, 9, 2, 256, dtype=torch.bfloat16, device="cuda")
    options = {"lengths": lengths}
    if ragged == "packed":
        case = replace(case, inputs=replace(case.inputs, Wx=case.inputs.Wx[3:4].detach()))
        options = {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths]).cumsum(0)}
    case.inputs.Wx.requires_grad_()
    case = replace(case, options=case.options | options, lengths=lengths.tolist())
    hold_ragged_to_vanilla("cuda_fused", case)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("D", [256, 768])
def test_heads_of_clusters_are_not_left_to_another_backend(D):
    case = random_ragged("lstm", 9, 9, 1, D, dtype=torch.bfloat16, device="cuda", **ALL[0])
    given, expected = case.call("auto"), case.call("cuda_fused")
    assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))


@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_the_end_of_a_sequence_reaches_no_gradient(backend, ragged):
    hold_last_states_out(backend, ragged, "cuda")
