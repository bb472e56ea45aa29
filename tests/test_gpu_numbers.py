"""The CUDA backends on a GPU with infinite and tiny numbers, odd addresses and large sizes."""

import pytest
import torch

from flashrnn import FlashRNNConfig, flashrnn
from flashrnn.backends.fused import scans
from tests.fused import (  # noqa: F401
    DTYPES,
    LAYOUTS,
    check_clipped,
    hold_to_vanilla,
    poisoned,
)
from tests.patterns import (
    BAD_AT_ZERO,
    bounded_follows_vanilla,
    follows_vanilla,
    ignores_what_is_not_there,
)
from tests.problems import BUILT_IN, Inputs, call, random_inputs, relative_error
from tests.terms import SIZES as SIZES_OF_TERMS
from tests.terms import keeps_every_term, leaves_other_sequences_alone

pytestmark = pytest.mark.gpu

# For single CTAs, clusters, CTA groups of the grid and many sequences; D that tiles do not divide.
SIZES = [(3, 3, 2, 20), (3, 3, 2, 64), (9, 3, 3, 200), (5, 3, 1, 771), (70, 3, 1, 768)]
MANY = [(200, 2, 1, 770), (130, 2, 1, 520)]


@pytest.fixture(autouse=True)
def _poisoned(poisoned):  # noqa: F811
    """See :func:`tests.fused.poisoned`."""


@pytest.fixture(params=["cuda_fused", "cuda"])
def backend(request):
    return request.param


@pytest.mark.parametrize("clipval", [None, 1.0], ids="clipped to {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, *MANY], ids=str)
def test_finite_infinite_and_nan_where_vanilla_has_them(backend, sizes, dtype, clipval):
    # Of what is stored as float16 `cuda` cannot tell what was infinite before it was rounded.
    stored = backend == "cuda" and dtype == torch.float16 and clipval is not None
    but = ("inf", "-inf") if stored else ()
    follows_vanilla(backend, *sizes, dtype=dtype, device="cuda", clipval=clipval, but=but)


@pytest.mark.parametrize("forward_clipval", [None, 0.5, 1e39], ids="clipped to {}".format)
@pytest.mark.parametrize("kind", ["elman", "lstm"])
@pytest.mark.parametrize(
    "sizes", [*SIZES, (2, 2, 1, 16), (64, 9, 12, 64), (9, 20, 2, 128)], ids=str
)
def test_bounded_h_takes_care_where_it_must(backend, sizes, kind, forward_clipval):
    bounded_follows_vanilla(backend, kind, *sizes, device="cuda", forward_clipval=forward_clipval)


@pytest.mark.parametrize("sizes", SIZES_OF_TERMS)
@pytest.mark.parametrize("D", [16, 64, 100, 128])
def test_every_term_has_its_precision(D, sizes):
    keeps_every_term("cuda_fused", D, sizes, device="cuda", B=17)


@pytest.mark.parametrize("bound", [1e-6, 1e6, 1e15])
@pytest.mark.parametrize("sizes", ["ordinary", "tinier", "larger", "spread", "spread, large"])
def test_every_term_has_its_precision_whatever_the_bound(bound, sizes):
    keeps_every_term("cuda_fused", 64, sizes, bound, device="cuda", B=17)


@pytest.mark.parametrize("kind", ["elman", "lstm"])
@pytest.mark.parametrize("D", [16, 64, 100, 128])
@pytest.mark.parametrize("B", [3, 64])
def test_what_float16_cannot_hold_leaves_other_sequences_alone(kind, D, B):
    leaves_other_sequences_alone("cuda_fused", kind, B, 50, 12, D, device="cuda")


@pytest.mark.parametrize("T", [1, 200])
@pytest.mark.parametrize("D", [16, 64, 100, 128])
@pytest.mark.parametrize("kind", BUILT_IN)
def test_float32_is_as_precise_as_three_products_are(kind, D, T):
    """Without TF32, of small heads; the bound is a tenth of what all backends are held to."""
    for B in (2, 64):
        inputs = random_inputs(kind, B, T, 3, D, torch.float32, "cuda", seed=T)
        with torch.no_grad():
            given = call(kind, inputs, backend="cuda_fused")
            again = call(kind, inputs, backend="cuda_fused")
            truth = call(kind, inputs.to(torch.float64), backend="vanilla")
        assert all(torch.equal(x, y) for x, y in zip(given, again, strict=True))
        assert all(relative_error(x, y) <= 1e-6 for x, y in zip(given, truth, strict=True))


@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, *MANY, (3, 3, 2, 41), (3, 3, 1, 131)], ids=str)
def test_units_that_are_not_there_reach_no_sum(backend, sizes, dtype, kind):
    ignores_what_is_not_there(backend, kind, *sizes, dtype=dtype, device="cuda")


def moved_by(offset):
    """Every input begins so many elements after a multiple of 16 bytes."""

    def moved(x):
        room = x.new_empty(x.numel() + offset)[offset:]
        return room.view(x.shape).copy_(x.detach()).requires_grad_()

    return lambda inputs: Inputs(**{name: moved(x) for name, x in inputs.tensors().items()})


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 3, 2, 24), (9, 3, 3, 256), (140, 2, 1, 768)], ids=str)
def test_any_addresses(backend, sizes, dtype, offset):
    hold_to_vanilla(backend, "lstm", *sizes, dtype, "cuda", change=moved_by(offset))


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 3, 2, 24), (9, 3, 3, 256), (140, 2, 1, 768)], ids=str)
def test_any_layouts(backend, sizes, dtype, change):
    hold_to_vanilla(backend, "lstm", *sizes, dtype, "cuda", change=change)


@pytest.mark.parametrize("clipval", [1e39, 3e38, 0.1, 1e-3, 1e-50])
def test_clips(backend, clipval):
    check_clipped(backend, clipval, "cuda")


@pytest.mark.parametrize("D", [32, 256, 768])
def test_a_schedule_of_clips_loads_no_kernel(D):
    caches = scans.scan_kernel, scans.gradient_kernel, scans.sums_kernel
    inputs = random_inputs("lstm", 4, 3, 1, D, torch.bfloat16, "cuda")
    counts = set()
    for step in range(5):
        clipval = 1.0 + step / 8
        config = FlashRNNConfig(gradient_recurrent_clipval=clipval, forward_clipval=clipval)
        call("lstm", inputs, backend="cuda_fused", config=config)[0].sum().backward()
        counts.add(tuple(cache.cache_info().currsize for cache in caches))
    assert len(counts) == 1


@pytest.mark.parametrize(("N", "D"), [(12, 64), (3, 256), (1, 768)])
def test_indices_past_32_bits(backend, N, D):
    """The last sequences of so many that what is saved of them has more than 2³¹ elements."""
    T, last = 3, 8
    B = 2**31 // (T * 4 * N * D) + 1024
    few = random_inputs("lstm", last, T, N, D, torch.bfloat16, "cuda")

    def filled(x, dimension):
        sizes = list(x.shape)
        sizes[dimension] = B - last
        return torch.cat([x.new_zeros(sizes), x.detach()], dimension).requires_grad_()

    states = filled(few.states, 1)
    Wx = filled(few.Wx, 0)
    outputs = flashrnn(Wx, few.R, few.b, states, function="lstm", backend=backend)
    d_Wx, d_initial = torch.autograd.grad(outputs[0][:, -last:].sum(), [Wx, states])
    exact, plain = few.to(torch.float64), few
    truth = call("lstm", exact, backend="vanilla")
    right = torch.autograd.grad(truth[0].sum(), [exact.Wx, exact.states])
    near = call("lstm", plain, backend="vanilla")
    close = torch.autograd.grad(near[0].sum(), [plain.Wx, plain.states])
    for given, true, other in (
        (outputs[0][:, -last:], truth[0], near[0]),
        (outputs[1][:, -last:], truth[1], near[1]),
        (d_Wx[-last:], right[0], close[0]),
        (d_initial[:, -last:], right[1], close[1]),
    ):
        assert relative_error(given, true) <= 2 * relative_error(other, true) + 2**-9
    assert not d_Wx[:-last].any()


def test_more_rows_than_32_bits_count():
    """R's gradient is a sum over more than 2³² steps, of which only the last sequence's matter."""
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    B, T = 2**16 + 1, 2**16
    Wx = torch.zeros(B, T, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
    Wx[-1].normal_()
    R = torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    b = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device="cuda")
    states, _ = flashrnn(Wx, R, b, function="elman", backend="cuda_fused")
    (d_R,) = torch.autograd.grad(states[0, -1].sum(), [R])
    alone, _ = flashrnn(Wx[-1:].clone(), R, b, function="elman", backend="cuda_fused")
    (expected,) = torch.autograd.grad(alone.sum(), [R])
    torch.testing.assert_close(states[0, -1], alone[0, 0])
    torch.testing.assert_close(d_R, expected, rtol=2e-2, atol=0.0)
