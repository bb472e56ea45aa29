"""Backend ``cuda_fused`` without a GPU; see test_cuda.py for how.

The emulation lets copies to shared memory arrive as late as a GPU may, so a missing wait shows.
"""

import itertools

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.backends.gradients import select
from flashrnn.cells import resolve
from flashrnn.kernels import head, program
from flashrnn.problem import Problem
from flashrnn.tiling import GPU, GradientPlan, HeadPlan, plan_gradient, plan_head
from tests.emulation import H200, clusters_of, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import (  # noqa: F401
    LAYOUTS,
    OPTIONS,
    all_strided,
    at_odd_addresses,
    check_clipped,
    continues_exactly,
    hold_to_vanilla,
    keeps_a_nan_to_its_sequence_and_head,
    others_keep_their_bits,
    poisoned,
    same_without_gradients,
)
from tests.machine_code import spills_in_a_loop
from tests.patterns import (
    BAD_AT_ZERO,
    bounded_follows_vanilla,
    follows_vanilla,
    ignores_what_is_not_there,
)
from tests.problems import BUILT_IN, call, gradients, random_inputs, relative_error, sparse, wide
from tests.test_jit import needs_nvrtc

A100 = GPU(108, 166912, shifts_registers=False, multiplies_by_groups=False)
RTX_4090 = GPU(128, 101376, shifts_registers=False, multiplies_by_groups=False)
GPUS = {
    "sm_80": A100,
    "sm_86": RTX_4090,
    "sm_89": RTX_4090,
    "sm_90a": H200,
    "sm_100": GPU(
        148, 232448, shifts_registers=False, multiplies_by_groups=False, clusters=clusters_of(148)
    ),
    "sm_120": RTX_4090,
}


def problem(kind, B, N, D, dtype, needs_gradient=True):
    device = torch.device("cuda")
    return Problem(resolve(kind), B, 64, N, D, dtype, device, needs_gradient=needs_gradient)


# ---- plans


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("gpu", [A100, RTX_4090, H200], ids=["A100", "RTX 4090", "H200"])
def test_plans_fit_the_gpu_and_cover_the_problem(gpu, backward):
    for kind, D in itertools.product([*BUILT_IN, sparse, wide], [1, 16, 40, 41, 96, 127, 128]):
        for B, N, dtype in itertools.product(
            [1, 7, 16, 64, 300], [1, 12], [torch.bfloat16, torch.float32]
        ):
            plan = plan_head(problem(kind, B, N, D, dtype), gpu, backward)
            if isinstance(plan, str):
                # A large head's matrix is more than a multiprocessor holds: of a built-in cell on
                # an H200 never, elsewhere in float32.
                assert D > 64 and "shared memory" in plan, (kind, D)
                assert kind is wide or (gpu != H200 and dtype == torch.float32), (kind, D)
                continue
            assert plan.sequences * plan.grid(B, N) >= B * N
            assert plan.shared_memory <= gpu.shared_memory
            assert plan.stages >= 3 and plan.threads(D) <= 1024


def test_few_sequences_make_small_tiles_and_many_do_not():
    tiles = [
        plan_head(problem("lstm", B, 12, 64, torch.bfloat16), H200, False).sequences
        for B in (1, 16, 64, 256)
    ]
    assert tiles == [2, 2, 4, 8]


def test_a_plan_says_why_there_is_none():
    assert "128" in plan_head(problem("lstm", 1, 1, 129, torch.bfloat16), H200, False)


@pytest.mark.parametrize("gpu", [RTX_4090, H200], ids=["RTX 4090", "H200"])
@pytest.mark.parametrize("D", [1, 24, 64, 100, 128])
def test_gradient_plans_fit_the_gpu_and_cover_every_row_once(gpu, D):
    rows_and_heads = itertools.product((1, 31, 1000, 260_000, 10**10), (1, 12))
    for (rows, N), recurrent in itertools.product(rows_and_heads, (1, 3, 4, 7, 16, 70)):
        for itemsize in (2, 4):
            plan = plan_gradient(recurrent, rows, N, D, itemsize, gpu)
            assert isinstance(plan, GradientPlan)
            assert plan.gates * plan.groups >= recurrent
            assert (plan.parts - 1) * plan.rows < rows <= plan.parts * plan.rows
            assert plan.rows <= 2**14
            assert plan.shared_memory <= gpu.shared_memory


# ---- the machine code


def programs(kind, B, N, D, precision, gpu):
    kind = resolve(kind)
    dtype = getattr(torch, precision.replace("tf32", "float32"))
    plans = [plan_head(problem(kind, B, N, D, dtype), gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, HeadPlan) for plan in plans), plans
    gradient = plan_gradient(len(kind.fed_by("R")), B * 64, N, D, dtype.itemsize, gpu)
    return [
        head.forward_source(kind, precision, D, plans[0], True, True),
        head.backward_source(kind, precision, D, plans[1], True, False, False),
        head.gradient_source(kind, precision, D, gradient, True),
    ]


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("kind", ["lstm", "slstm", wide], ids=str)
def test_compiles_for_every_architecture_without_spills(kind, arch):
    for parts in programs(kind, 16, 12, 64, "bfloat16", GPUS[arch]):
        assert not spills_in_a_loop(parts, arch), list(parts)[-1]


@needs_nvrtc
@pytest.mark.parametrize(
    ("sizes", "precision"),
    [
        *(
            (sizes, "bfloat16")
            for sizes in [(1, 1, 16), (256, 12, 64), (16, 6, 128), (300, 6, 128), (64, 8, 96)]
        ),
        *((sizes, "float32") for sizes in [(1, 1, 16), (16, 12, 64), (16, 6, 128)]),
        ((16, 12, 64), "tf32"),
    ],
    ids=str,
)
def test_compiles_for_every_plan_without_spills(sizes, precision):
    for parts in programs("lstm", *sizes, precision, H200):
        assert not spills_in_a_loop(parts, "sm_90a"), list(parts)[-1]


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
    float y[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) y[i] = x[1024 * i + threadIdx.x];
    for (int t = 0; t < n; ++t) {
#pragma unroll
        for (int i = 0; i < 64; ++i) y[i] = y[i] * y[(i + 17) % 64] + x[t];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) x[1024 * i + threadIdx.x] = y[i];
}
"""


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_a_spill_would_be_noticed(arch):
    assert spills_in_a_loop({"spilling": SPILLING}, arch)


# ---- around the kernels


def test_gates_are_selected_without_asking_the_host(monkeypatch):
    """A CUDA graph records no copy of indices from the host."""
    gates = torch.randn(2, 4, 3)
    expected = gates.index_select(1, torch.tensor([0, 2, 3]))
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(select(gates, 1, (0, 2, 3)), expected)
    assert select(gates, 1, (1, 2)).data_ptr() == gates[:, 1].data_ptr()
    assert select(gates, 1, ()).shape == (2, 0, 3)


@pytest.fixture
def tf32_setting():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch has only the older setting, allow_tf32")
    before = matmul.fp32_precision
    yield matmul
    matmul.allow_tf32 = False
    matmul.fp32_precision = before


def test_tf32_may_be_allowed_by_either_setting(tf32_setting):
    for name, value, precision in [
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "float32"),
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "float32"),
    ]:
        setattr(tf32_setting, name, value)
        assert program.precision_of(torch.float32) == precision, name
    assert program.precision_of(torch.bfloat16) == "bfloat16"


# ---- the kernels


def check(*problem, **options):
    hold_to_vanilla("cuda_fused", *problem, **options)


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN."""


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in [*BUILT_IN, sparse, wide]),
        *((kind, torch.float32) for kind in ["lstm", "gru", "slstm"]),
        ("lstm", torch.float16),
    ],
    ids=str,
)
def test_equals_vanilla(on_the_cpu, kind, dtype):
    check(kind, 7, 5, 2, 40, dtype)


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        # Rows that begin anywhere.
        (2, 5, 3, 17),
        # Tiles of 4, of 8, and more steps than the ring has slots.
        (70, 2, 12, 16),
        (200, 12, 12, 16),
        # The largest head.
        (3, 2, 1, 128),
    ],
    ids=str,
)
def test_sizes(on_the_cpu, sizes):
    check("lstm", *sizes, torch.bfloat16)


@needs_compiler
def test_fragments_in_shared_memory(on_the_cpu):
    # A gate's rows are 14 fragments.
    assert plan_head(problem("lstm", 2, 1, 112, torch.float32), H200, False).held < 4 * 14
    check("lstm", 2, 3, 1, 112, torch.float32)


@needs_compiler
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (3, 0, 2, 8)], ids=str)
def test_empty(on_the_cpu, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(on_the_cpu, options):
    check("gru", 5, 4, 2, 24, torch.float32, **options)


@needs_compiler
def test_tf32(on_the_cpu, monkeypatch):
    monkeypatch.setattr(program, "precision_of", lambda dtype: "tf32")
    inputs = random_inputs("lstm", 3, 4, 2, 40, torch.float32)
    truth = call("lstm", inputs.to(torch.float64), backend="vanilla")
    given = call("lstm", inputs, backend="cuda_fused")
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3


@needs_compiler
def test_no_kernel_of_its_own_for_a_length(on_the_cpu):
    for T in (2, 40):
        inputs = random_inputs("elman", 1, T, 1, 16, torch.bfloat16)
        gradients(call("elman", inputs, backend="cuda_fused"), inputs)
    assert cuda_fused._head_kernel.cache_info().currsize == 2
    assert cuda_fused._gradient_kernel.cache_info().currsize == 1


@needs_compiler
def test_any_strides(on_the_cpu):
    check("lstm", 3, 4, 2, 24, torch.bfloat16, change=all_strided)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [at_odd_addresses, *LAYOUTS])
def test_any_addresses_and_layouts(on_the_cpu, change, dtype):
    check("lstm", 3, 4, 2, 24, dtype, change=change)


@needs_compiler
@pytest.mark.parametrize("clipval", [None, 1.0], ids="clipped to {}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [16, 20])
def test_finite_infinite_and_nan_where_vanilla_has_them(on_the_cpu, D, dtype, clipval):
    follows_vanilla("cuda_fused", 3, 3, 2, D, dtype=dtype, clipval=clipval)


@needs_compiler
@pytest.mark.parametrize("forward_clipval", [None, 0.5, 1e39], ids="clipped to {}".format)
@pytest.mark.parametrize("kind", ["elman", "lstm"])
def test_bounded_h_takes_care_where_it_must(on_the_cpu, kind, forward_clipval):
    bounded_follows_vanilla("cuda_fused", kind, 3, 4, 2, 20, forward_clipval=forward_clipval)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(on_the_cpu, kind):
    ignores_what_is_not_there("cuda_fused", kind, 3, 3, 2, 20, dtype=torch.float32)
    ignores_what_is_not_there("cuda_fused", kind, 3, 3, 2, 24, dtype=torch.bfloat16)


@needs_compiler
def test_a_schedule_of_clips_compiles_once(on_the_cpu):
    for clipval in (0.1, 0.2, 1e39, 1e-50):
        check_clipped("cuda_fused", clipval)
    assert cuda_fused._head_kernel.cache_info().currsize == 2
    assert cuda_fused._best_plan.cache_info().currsize == 2


@needs_compiler
def test_a_gradient_of_the_last_states_alone(on_the_cpu):
    inputs = random_inputs("lstm", 3, 4, 2, 24, torch.float32)
    weights = [torch.randn(2, 3, 1, 2, 24, generator=torch.Generator().manual_seed(0))]
    leaves = list(inputs.tensors().values())
    found = [
        torch.autograd.grad(call("lstm", inputs, backend=name)[1], leaves, weights)
        for name in ("cuda_fused", "vanilla")
    ]
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(*found, strict=True))


@needs_compiler
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("cuda_fused")


@needs_compiler
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("cuda_fused")


@needs_compiler
def test_a_nan_stays_in_its_sequence_and_head(on_the_cpu):
    assert keeps_a_nan_to_its_sequence_and_head(4, 16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_others_keep_their_bits(on_the_cpu, dtype):
    assert others_keep_their_bits("cuda_fused", 4, 16, dtype)


@needs_compiler
def test_others_keep_their_bits_where_one_needs_care(on_the_cpu):
    options = {"kind": "lstm", "where": "states"}
    assert others_keep_their_bits("cuda_fused", 4, 16, torch.float32, **options)


# ---- what it says of itself


def test_says_why_it_cannot(monkeypatch):
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in cuda_fused.unavailable(torch.device("cuda"))
    assert "cpu" in cuda_fused.unavailable(torch.device("cpu"))
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: RTX_4090)
    assert "float64" in cuda_fused.unsupported(problem("lstm", 1, 1, 16, torch.float64))
    assert "2048 units" in cuda_fused.unsupported(problem("lstm", 1, 1, 2048, torch.float32))
    assert "shared memory" in cuda_fused.unsupported(problem("lstm", 1, 1, 128, torch.float32))
    assert cuda_fused.unsupported(problem("lstm", 1, 1, 64, torch.bfloat16)) is None
