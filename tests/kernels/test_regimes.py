"""What is asked of every regime's CUDA kernels, run as C++ on the CPU.

The emulation (tests/emulation.h) lets copies to shared memory, and what CTAs send each other,
arrive late and out of order, and holds warps up at random, so a missing wait shows. It has neither
the tensor cores' own rounding nor all races of a GPU.
"""

import pytest
import torch

from flashrnn import Cell, Stepper, flashrnn
from flashrnn.kernels import source
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import (
    LAYOUTS,
    OPTIONS,
    absent_gradients_are_zeros,
    all_strided,
    at_odd_addresses,
    clips_h,
    continues_exactly,
    gives_the_same_bits,
    hold_to_vanilla,
    keeps_a_nan_to_its_sequence_and_head,
    others_keep_their_bits,
    same_without_gradients,
)
from tests.kernels.regimes import (
    CLUSTER_MMA,
    CLUSTER_WGMMA,
    CLUSTER_WGMMA_BACKWARD,
    GRID_WGMMA,
    PER_STEP,
    REGIMES,
    SINGLE_CTA,
    SINGLE_CTA_TILES,
    SIXTEEN_BITS,
    STREAMED,
    VARIANTS,
    has_plans,
    take,  # noqa: F401
)
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import call, random_inputs, relative_error, sparse

pytestmark = needs_compiler


def cases(regimes, further, quick=lambda regime, *rest: regime in REGIMES):
    """Parameters for each of the regimes, and those that ``further`` gives for each.

    Those that are not quick are marked as slow: one of each kind is enough to see that a regime
    works, all are needed to see that nothing else has broken.
    """
    return [
        pytest.param(
            regime,
            *rest,
            id="-".join(map(_name, (regime, *rest))),
            marks=[] if quick(regime, *rest) else pytest.mark.slow,
        )
        for regime in regimes
        for rest in further(regime)
    ]


def more_cases(further, quick):
    """Of all regimes and, slow, of several tiles of a CTA, whose rows are copied otherwise."""
    return cases(
        [*REGIMES, SINGLE_CTA_TILES[-1]],
        further,
        lambda regime, *rest: regime in REGIMES and quick(regime, *rest),
    )


def _name(value):
    if isinstance(value, Cell):
        return value.name
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.").replace(" ", "")


every_regime = pytest.mark.parametrize("regime", REGIMES, ids=str)
every_shape = pytest.mark.parametrize("regime", cases([*REGIMES, *VARIANTS], lambda _: [()]))
SMALL_HEADS = (PER_STEP, SINGLE_CTA, *SINGLE_CTA_TILES)
# Only one direction is their own, and it takes long here: a quick run asks less of them.
WGMMA = (GRID_WGMMA[0], STREAMED[0], CLUSTER_WGMMA[0], CLUSTER_WGMMA_BACKWARD[0])
# A cell and a dtype that a quick run compiles in any case: tests that need no other take these.
COMPILED = ("lstm", torch.bfloat16)
# Of the CTAs of other regimes one waits for what another sends.
EXCHANGING = [x for x in REGIMES if x not in SMALL_HEADS]


def kinds_and_dtypes(regime):
    """LSTM in all dtypes; other cells in float32 and, by turns, in one dtype of 16 bits: the other
    has the same plans. Of the same kernels in another shape each cell once, and each dtype once."""
    found = []
    for i, kind in enumerate(regime.cells):
        in_another_shape = {torch.float16, torch.float32}
        left_out = {SIXTEEN_BITS[i % 2]} if regime in REGIMES else in_another_shape
        for dtype in regime.dtypes:
            if (kind == "lstm" or dtype not in left_out) and has_plans(
                regime, kind, regime.B, 3, 2, regime.D, dtype=dtype
            ):
                found.append((kind, dtype))
    return found


@pytest.mark.parametrize(
    ("regime", "kind", "dtype"),
    cases(
        [*REGIMES, *VARIANTS],
        kinds_and_dtypes,
        lambda regime, *rest: (
            (rest == COMPILED and regime in (*REGIMES, SINGLE_CTA_TILES[0]))
            or (rest == (sparse, regime.dtypes[-1]) and regime in REGIMES and regime not in WGMMA)
        ),
    ),
)
def test_equals_vanilla(take, regime, kind, dtype):  # noqa: F811
    hold_to_vanilla(take(regime).backend, kind, regime.B, 4, 2, regime.D, dtype)


def sizes_and_dtypes(regime):
    kind = size_kind(regime)
    dtypes = [torch.bfloat16, torch.float32] if regime is PER_STEP else [torch.bfloat16]
    return [
        (sizes, dtype)
        for sizes in regime.sizes
        for dtype in dtypes
        if has_plans(regime, kind, *sizes, dtype=dtype)
    ]


def size_kind(regime):
    return "lstm" if regime in SMALL_HEADS else "slstm"


@pytest.mark.parametrize(
    ("regime", "sizes", "dtype"),
    cases(
        [*REGIMES, *VARIANTS],
        sizes_and_dtypes,
        lambda regime, *rest: regime in REGIMES and rest == (regime.sizes[1], torch.bfloat16),
    ),
)
def test_sizes(take, regime, sizes, dtype):  # noqa: F811
    hold_to_vanilla(take(regime).backend, size_kind(regime), *sizes, dtype)


@every_regime
def test_empty(take, regime):  # noqa: F811
    for B, T in ((0, 3), (3, 0)):
        hold_to_vanilla(take(regime).backend, "slstm", B, T, 2, regime.D, torch.bfloat16)


def options_and_kinds(regime):
    """Each option with cells and dtypes."""
    others = [(kind, regime.dtypes[-1]) for kind in ("gru", "lstm")]
    return [
        (options, *of)
        for options in OPTIONS
        for of in (COMPILED, *(others if regime is PER_STEP else others[:1]))
        # Another regime takes calls without a gradient through R.
        if regime not in CLUSTER_WGMMA_BACKWARD or "gradient_recurrent_cut" not in options
        # Which h are clipped is chance in 16 bits: clips_h has a cell of its own.
        if of != COMPILED or "gradient_recurrent_clipval" in options
    ]


@pytest.mark.parametrize(
    ("regime", "options", "kind", "dtype"),
    more_cases(
        options_and_kinds,
        # Of the two clips, that of the direction that is the regime's own.
        lambda regime, options, *of: (
            of == COMPILED if torch.float32 in regime.dtypes else "forward_clipval" in options
        ),
    ),
)
def test_options(take, regime, options, kind, dtype):  # noqa: F811
    if "forward_clipval" in options and torch.float32 not in regime.dtypes:
        clips_h(take(regime).backend, regime.B, regime.D)
        return
    hold_to_vanilla(take(regime).backend, kind, regime.B, 4, 2, regime.D, dtype, **options)


@pytest.mark.parametrize(
    "regime", [regime for regime in REGIMES if torch.float32 in regime.dtypes], ids=str
)
def test_tf32(take, regime, monkeypatch):  # noqa: F811
    monkeypatch.setattr(source, "precision_of", lambda problem: "tf32")
    inputs = random_inputs("lstm", 3, 3, 1, regime.D + 9, torch.float32)
    truth = call("lstm", inputs.to(torch.float64), backend="vanilla")
    given = call("lstm", inputs, backend=take(regime).backend)
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3


@pytest.mark.parametrize(
    "regime",
    cases(
        [*REGIMES, *VARIANTS],
        lambda _: [()],
        lambda regime: regime.name in ("per_step", "single_cta", "grid", CLUSTER_MMA[0].name),
    ),
)
def test_steps_in_place(take, regime):  # noqa: F811
    """States that a step reads and overwrites: what CTAs read of each other is not of these."""
    dtype, kind = regime.dtypes[-1], regime.most_states
    inputs = random_inputs(kind, regime.B, 3, 2, regime.D, dtype)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    backend = take(regime).backend
    every, last = flashrnn(Wx, R, b, states, kind, backend)
    stepper, carried = Stepper(R, b, kind, backend), states.squeeze(2).clone()
    for t in range(3):
        version = carried._version
        stepper(Wx[:, t], carried, out=carried)
        assert torch.equal(carried.to(dtype), every[:, :, t])
        assert carried._version == version + 1
    assert torch.equal(carried, last.squeeze(2))
    # In memory that begins anywhere, in place and not.
    expected = stepper(Wx[:, 0], carried)
    moved = carried.new_empty(carried.numel() + 1)[1:].view(carried.shape).copy_(carried)
    other = carried.new_empty(carried.numel() + 3)[3:].view(carried.shape)
    assert torch.equal(stepper(Wx[:, 0], moved, out=other), expected)
    assert stepper(Wx[:, 0], moved, out=moved) is moved
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(
    ("regime", "kind", "dtype"),
    more_cases(
        lambda regime: [
            COMPILED,
            *([] if torch.float32 in regime.dtypes else [("gru", torch.float16)]),
        ],
        lambda regime, *of: of == COMPILED,
    ),
)
def test_any_strides(take, regime, kind, dtype):  # noqa: F811
    sizes = (regime.B, 4, 2, regime.D)
    hold_to_vanilla(take(regime).backend, kind, *sizes, dtype, change=all_strided)


@pytest.mark.parametrize(
    ("regime", "dtype", "change"),
    more_cases(
        lambda regime: [
            (dtype, change)
            for dtype in dict.fromkeys((torch.bfloat16, regime.dtypes[-1]))
            # Persistent kernels of large heads load and store element by element, or copy before.
            for change in (at_odd_addresses, *LAYOUTS)
            if regime in SMALL_HEADS or change is at_odd_addresses
        ],
        lambda regime, dtype, change: change is at_odd_addresses and dtype == torch.bfloat16,
    ),
)
def test_any_addresses_and_layouts(take, regime, dtype, change):  # noqa: F811
    sizes = (regime.B, 4, 2, regime.D)
    hold_to_vanilla(take(regime).backend, "lstm", *sizes, dtype, change=change)


@pytest.mark.parametrize(
    ("regime", "kind"),
    more_cases(
        lambda regime: [(kind,) for kind in dict.fromkeys(("lstm", regime.most_states))],
        lambda regime, kind: kind == "lstm",
    ),
)
def test_no_gradient_asked_for(take, regime, kind):  # noqa: F811
    assert same_without_gradients(take(regime).backend, regime.D, regime.B, kind)


@every_regime
def test_continues_a_sequence_exactly(take, regime):  # noqa: F811
    assert continues_exactly(take(regime).backend, regime.D, regime.B)


@pytest.mark.parametrize(
    ("regime", "kind"),
    [
        *cases(EXCHANGING, lambda _: [("lstm",)]),
        *cases([CLUSTER_MMA[0]], lambda _: [("elman",)], lambda *_: False),
        *cases([*CLUSTER_MMA[1:]], lambda _: [("lstm",), ("elman",)]),
        *cases([CLUSTER_WGMMA[0]], lambda _: [("gru",)], lambda *_: False),
        *cases([*CLUSTER_WGMMA[1:]], lambda _: [("lstm",), ("gru",)]),
        *cases([*CLUSTER_WGMMA_BACKWARD[1:]], lambda _: [("lstm",), ("gru",)]),
    ],
)
def test_same_bits_in_whatever_order_things_arrive(take, regime, kind):  # noqa: F811
    D = 192 if regime in CLUSTER_WGMMA else regime.D
    assert gives_the_same_bits(take(regime).backend, kind, regime.B, 4, 2, D)


@pytest.mark.parametrize(
    "regime", cases(REGIMES, lambda _: [()], lambda regime: regime is SINGLE_CTA)
)
def test_absent_gradients(take, regime):  # noqa: F811
    assert absent_gradients_are_zeros(take(regime).backend, regime.B, 3, 2, regime.D)


@every_shape
def test_a_nan_stays_in_its_sequence_and_head(take, regime):  # noqa: F811
    backend = take(regime).backend
    assert keeps_a_nan_to_its_sequence_and_head(backend, max(4, regime.B), regime.D)


@pytest.mark.parametrize(
    ("regime", "dtype"),
    more_cases(
        lambda regime: [(x,) for x in regime.dtypes[::2]],
        lambda regime, dtype: regime is SINGLE_CTA and dtype == torch.float32,
    ),
)
def test_others_keep_their_bits(take, regime, dtype):  # noqa: F811
    sizes = max(4, regime.B), regime.D
    backend, kind = take(regime).backend, regime.most_states
    assert others_keep_their_bits(backend, *sizes, dtype, kind=kind)


def test_others_keep_their_bits_where_one_needs_care(take):  # noqa: F811
    options = {"kind": "lstm", "where": "states"}
    assert others_keep_their_bits(take(SINGLE_CTA).backend, 4, 20, torch.float32, **options)


def patterns(regime):
    if regime in SMALL_HEADS:
        heads = [20] if regime is PER_STEP else [16, 20]
        return [(D, dtype, clip) for D in heads for dtype in regime.dtypes for clip in (None, 1.0)]
    if torch.float32 in regime.dtypes:
        dtypes = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, 1.0)]
        return [(regime.D, *dtype) for dtype in dtypes]
    return [(regime.D, dtype, 1.0) for dtype in regime.dtypes]


@pytest.mark.parametrize(
    ("regime", "D", "dtype", "clipval"),
    more_cases(
        patterns,
        lambda regime, D, dtype, clipval: (
            dtype == torch.bfloat16
            and D != 16
            and (clipval is None) == (torch.float32 in regime.dtypes)
            and regime not in WGMMA
        ),
    ),
)
def test_finite_infinite_and_nan_where_vanilla_has_them(take, regime, D, dtype, clipval):  # noqa: F811
    # Of a stored float16 nothing tells whether it was infinite before it was rounded, and a clip
    # contains it.
    told = regime is not PER_STEP or dtype != torch.float16 or clipval is None
    but = () if told else ("inf", "-inf")
    N = 1 if regime.B > 16 else 2
    sizes = (3 if regime.B < 16 else regime.B, 3, N, D)
    follows_vanilla(take(regime).backend, *sizes, dtype=dtype, but=but, clipval=clipval)


@pytest.mark.parametrize(
    ("regime", "kind", "D", "dtype"),
    more_cases(
        lambda regime: [
            (kind, D, dtype)
            for kind in BAD_AT_ZERO
            for D, dtype in (
                [(20, torch.float32), (19 if regime is PER_STEP else 24, torch.bfloat16)]
                if regime in SMALL_HEADS
                else [(regime.D, torch.bfloat16)]
            )
            if has_plans(regime, kind, regime.B, 3, 1, D, dtype=dtype)
        ],
        lambda regime, kind, D, dtype: (
            kind is BAD_AT_ZERO[2] and dtype == torch.bfloat16 and regime not in WGMMA
        ),
    ),
)
def test_units_that_are_not_there_reach_no_sum(take, regime, kind, D, dtype):  # noqa: F811
    sizes = (regime.B, 3, 1 if regime.B > 16 else 2, D)
    ignores_what_is_not_there(take(regime).backend, kind, *sizes, dtype=dtype)
