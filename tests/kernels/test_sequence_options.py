"""Resets, lengths, packing and directions in the kernels, run as C++ on the CPU."""

from dataclasses import replace

import pytest
import torch

from flashrnn import FlashRNNConfig
from flashrnn.backends import tables
from flashrnn.backends.fused import scans
from flashrnn.cells import resolve
from flashrnn.kernels import registry, sequence_tables, source
from flashrnn.kernels.per_step.plan import plan_step
from flashrnn.kernels.single_cta import plan_gradient, plan_scan, possible_plans
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import OPTIONS, poisoned  # noqa: F401
from tests.gpus import GPUS, planned
from tests.kernels.regimes import GRID, take  # noqa: F401
from tests.machine_code import needs_nvrtc, operations_of_steps, spills_in_a_loop
from tests.patterns import linear
from tests.problems import BUILT_IN, sparse
from tests.sequences import (
    ALL,
    KINDS,
    alternating,
    few_cuts,
    gradients_of,
    hold_empty_sequences_out,
    hold_last_states_out,
    hold_options_of_no_effect,
    hold_padding_out,
    hold_ragged_to_vanilla,
    hold_rows_of_no_sequence,
    hold_to_each_alone,
    random_ragged,
)


@pytest.fixture
def on_the_cpu(fused_emulation, emulation, poisoned):  # noqa: F811
    """Backends ``cuda_fused`` and ``cuda`` are emulated, and what they allocate is NaN."""


every_backend = pytest.mark.parametrize("backend", ["cuda_fused", "cuda"])


every_kind = pytest.mark.parametrize(
    "kinds",
    [pytest.param(x, marks=[] if x in ALL else pytest.mark.slow) for x in KINDS],
    ids=lambda kinds: "-".join(kinds.values()),
)


@needs_compiler
@every_kind
@every_backend
def test_equals_vanilla(on_the_cpu, backend, kinds):
    case = random_ragged("lstm", 7, 5, 3, 24, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla(backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "kinds"),
    alternating([*BUILT_IN, sparse], [torch.float16, torch.float32]),
    ids=str,
)
@every_backend
def test_every_cell_and_dtype(on_the_cpu, backend, kind, dtype, kinds):
    hold_ragged_to_vanilla(backend, random_ragged(kind, 5, 4, 2, 20, dtype=dtype, **kinds))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize(
    "sizes",
    [
        *[(1, 1, 1, 1), (2, 12, 2, 17), (70, 9, 12, 16), (200, 12, 12, 16), (3, 3, 2, 128)],
        # Rows in words, of more than 32 and of few; in pieces of 8 and of 4 bytes.
        *[(3, 12, 2, 71), (70, 9, 2, 15), (5, 12, 2, 20), (5, 12, 2, 54)],
    ],
    ids=str,
)
@every_backend
def test_sizes(on_the_cpu, backend, sizes, kinds):
    hold_ragged_to_vanilla(
        backend, random_ragged("lstm", *sizes, seed=5, dtype=torch.bfloat16, **kinds)
    )


@needs_compiler
@every_backend
@pytest.mark.parametrize("sizes", [(3, 0), (1, 0)], ids=str)
def test_no_steps(on_the_cpu, backend, sizes):
    for kinds in ALL:
        case = random_ragged("lstm", *sizes, 2, 8, dtype=torch.float32, **kinds)
        hold_ragged_to_vanilla(backend, case)


@needs_compiler
@every_backend
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_no_sequence_has_a_step(on_the_cpu, backend, ragged):
    case = random_ragged(
        "lstm", 2, 0 if ragged == "packed" else 3, 2, 8, ragged=ragged, resets="zeros"
    )
    lengths = torch.zeros_like(case.options.get("lengths", torch.zeros(2)))
    options = {"lengths": lengths} if ragged == "lengths" else {}
    case = case.to(torch.float32)
    _, last_states = case.call(backend, **options)
    assert torch.equal(last_states, case.inputs.states)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_backend
def test_options_of_the_config(on_the_cpu, backend, options):
    case = random_ragged("gru", 5, 4, 2, 20, dtype=torch.float32, **ALL[0])
    hold_ragged_to_vanilla(backend, case, config=FlashRNNConfig(**options, initial_val=0.5))


@needs_compiler
@pytest.mark.slow
@every_backend
def test_resets_go_back_to_the_initial_value(on_the_cpu, backend):
    case = random_ragged("lstm", 3, 4, 2, 16, resets="zeros", dtype=torch.float32)
    config = FlashRNNConfig(initial_val=(0.25, -0.5))
    hold_ragged_to_vanilla(backend, case, config=config)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
@every_backend
def test_same_bits_as_each_sequence_alone(on_the_cpu, backend, ragged):
    case = random_ragged("lstm", 4, 6, 2, 16, seed=2, ragged=ragged, dtype=torch.bfloat16)
    hold_to_each_alone(backend, case)


@needs_compiler
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
@every_backend
def test_values_out_of_range_write_nothing_elsewhere(on_the_cpu, backend, ragged, monkeypatch):
    """Values that nobody checked: the emulation's allocations are NaN around what is written."""
    case = random_ragged("lstm", 3, 4, 1, 16, ragged=ragged, dtype=torch.float32)
    total = case.inputs.Wx.shape[1]
    name, given, meant = (
        ("cu_seqlens", [-5, total + 9, 2, total - 1], [0, total, total, total])
        if ragged == "packed"
        else ("lengths", [-1, 99, 2], [0, 4, 2])
    )
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    runs = [case.call(backend, **{name: torch.tensor(x)}) for x in (given, meant)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@needs_compiler
@every_backend
@pytest.mark.parametrize("reverse", ["none", "some"])
def test_padding_reaches_nothing(on_the_cpu, backend, reverse):
    hold_padding_out(backend, reverse)


@needs_compiler
@every_backend
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_the_start_of_an_empty_sequence_reaches_no_gradient(on_the_cpu, backend, ragged):
    hold_empty_sequences_out(backend, ragged)


@needs_compiler
@every_backend
@pytest.mark.parametrize(
    "ragged", ["lengths", pytest.param("packed", marks=pytest.mark.slow)], ids=str
)
def test_the_end_of_a_sequence_reaches_no_gradient(on_the_cpu, backend, ragged):
    hold_last_states_out(backend, ragged)


@needs_compiler
@every_backend
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
def test_so_many_sequences_that_pytorch_makes_their_tables(on_the_cpu, backend, kinds, monkeypatch):
    monkeypatch.setattr(sequence_tables, "MOST_SEQUENCES", 4)
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    case = random_ragged("lstm", 5, 4, 2, 16, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla(backend, case)


@needs_compiler
@every_backend
@pytest.mark.parametrize("reverse", ["none", "some"])
def test_rows_of_no_sequence_are_zero(on_the_cpu, backend, reverse, monkeypatch):
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    hold_rows_of_no_sequence(backend, reverse)


@needs_compiler
@pytest.mark.parametrize(
    "D",
    [
        # Few threads share a row, and its place is looked up a chunk ahead; so many that it is not;
        # rows that begin between two words.
        16,
        pytest.param(68, marks=pytest.mark.slow),
        pytest.param(19, marks=pytest.mark.slow),
        pytest.param(71, marks=pytest.mark.slow),
    ],
)
def test_lengths_and_resets_to_zeros_need_no_list_of_rows(on_the_cpu, monkeypatch, D):
    """R's gradient of chunks of 32 rows: some are of two sequences, some of no step."""
    monkeypatch.setattr(tables, "Before", None)
    lengths, kinds = [90, 20, 0, 49], {"resets": "zeros", "ragged": "lengths"}
    case = random_ragged("lstm", 4, 90, 1, D, dtype=torch.bfloat16, **kinds)
    options = case.options | {"lengths": torch.tensor(lengths)}
    hold_ragged_to_vanilla("cuda_fused", replace(case, options=options, lengths=lengths))


@pytest.fixture
def wide_ctas(on_the_cpu, monkeypatch):
    """CTAs of one tile of 8 sequences."""

    def plan(*of):
        return next(x for x in possible_plans(*of) if x.sequences == 8)

    monkeypatch.setattr(registry, "SMALL_HEADS", (plan,))


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [
        (torch.bfloat16, {"resets": "zeros"}),
        (torch.float32, {"resets": "zeros", "ragged": "lengths"}),
        *(
            pytest.param(
                dtype, {"resets": resets, "ragged": ragged, "reverse": reverse}, marks=slow
            )
            for slow in [pytest.mark.slow]
            for dtype in (torch.float16, torch.float32)
            for resets in ("none", "zeros", "sequence", "step")
            for ragged, reverse in [("none", "some"), ("lengths", "none"), ("lengths", "some")]
        ),
    ],
    ids=str,
)
def test_steps_like_a_plain_call_s_and_others_by_turns(wide_ctas, dtype, kinds):
    """Of a CTA of 8 sequences, and one of fewer."""
    case = random_ragged("lstm", 11, 24, 2, 16, dtype=dtype, **kinds)
    if kinds["resets"] != "none":
        case = few_cuts(case)
    if kinds.get("ragged") == "lengths":
        lengths = [24, 24, 22, 24, 1, 0, 13, 24, 0, 1, 24]
        case = replace(
            case, options=case.options | {"lengths": torch.tensor(lengths)}, lengths=lengths
        )
    hold_ragged_to_vanilla("cuda_fused", case)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_options_of_no_effect_change_no_bit(wide_ctas, dtype):
    hold_options_of_no_effect("cuda_fused", 11, 12, 1, 16, dtype)


@needs_compiler
@pytest.mark.parametrize("ragged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_single_step_that_is_cut(wide_ctas, ragged):
    kinds = {"resets": "zeros", "ragged": "lengths" if ragged else "none"}
    case = random_ragged("lstm", 9, 1, 1, 16, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "planted"),
    [("lstm", torch.nan), (linear, torch.inf)],
    ids=["nan", "infinity"],
)
def test_nothing_passes_a_reset(wide_ctas, kind, planted, dtype):
    """Not even what is no number: 0 times it would be none either."""
    case = few_cuts(random_ragged(kind, 9, 24, 1, 16, resets="zeros", dtype=dtype))
    cut, runs = case.options["reset"], []
    # Steps from which on a cut sequence is what it is, whatever came before.
    after = cut.cumsum(1) == cut.sum(1, keepdim=True)
    after &= cut.any(1, keepdim=True)
    for value in (0.0, planted):
        Wx = case.inputs.Wx.detach().clone()
        Wx[~after & cut.any(1, keepdim=True)] = value
        changed = replace(case, inputs=replace(case.inputs, Wx=Wx.requires_grad_()))
        states, last_states = changed.call("cuda_fused")
        given = torch.where(after[..., None, None], states, 0.0)
        (gradient,) = torch.autograd.grad(given.sum(), changed.inputs.Wx)
        runs.append((states[:, after], last_states, gradient[after]))
        left = states[0][~after & cut.any(1, keepdim=True)]
    assert not left.isfinite().any()
    for given, expected in zip(*runs, strict=True):
        assert torch.equal(given, expected) and given.isfinite().all()


@needs_compiler
@pytest.mark.slow
def test_no_kernel_of_its_own_for_lengths_or_directions(on_the_cpu):
    for seed in (1, 2):
        case = random_ragged(
            "elman", 2, 3, 2, 16, seed, ragged="lengths", reverse="some", dtype=torch.bfloat16
        )
        # Lengths that are all 3 would be left out.
        options = {"reverse": [seed == 1, seed == 2], "lengths": torch.tensor([3, seed])}
        case = replace(case, options=case.options | options)
        gradients_of(case, case.call("cuda_fused"))
    assert scans.scan_kernel.cache_info().currsize == 2
    assert scans.gradient_kernel.cache_info().currsize == 1


FIELDS = [
    {"resets": True},
    {"resets": True, "starts": True},
    {"ragged": True},
    {"resets": True, "ragged": True},
    {"reverse": True},
    {"resets": True, "starts": True, "ragged": True, "packed": True, "reverse": True},
]


COMPILED = [
    ("lstm", (16, 12, 64), "bfloat16", "sm_90a"),
    *(("lstm", (16, 12, 64), "bfloat16", arch) for arch in GPUS if arch != "sm_90a"),
    ("lstm", (300, 6, 128), "bfloat16", "sm_90a"),
    ("lstm", (64, 8, 96), "bfloat16", "sm_90a"),
    ("slstm", (64, 12, 64), "bfloat16", "sm_80"),
    *((kind, (100, 12, 64), "bfloat16", "sm_90a") for kind in ("lstm", "gru")),
    ("slstm", (100, 24, 32), "bfloat16", "sm_90a"),
    ("lstm", (16, 12, 64), "float32", "sm_90a"),
]


def directions_of(fields, turn):
    """Both directions, each with the last of the fields; either with every other one, by turns."""
    *others, everything = fields
    yield from ((bool((turn + i) % 2), other) for i, other in enumerate(others))
    yield from ((backward, everything) for backward in (False, True))


@needs_nvrtc
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "kind",
    ["lstm", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gru", "elman", "slstm", sparse))],
    ids=str,
)
def test_both_copies_of_a_step_have_the_same_arithmetic(kind, backward):
    """Else a sequence's bits would depend on where others are cut or end: which copy of the code
    runs is decided for all sequences of a CTA."""
    problem = planned(kind, 64, 12, 64, torch.bfloat16)._replace(
        needs_gradient=True, ragged=True, resets=backward, returned=1
    )
    plan = plan_scan(problem, GPUS["sm_90a"], backward)
    options = source.options_of(problem, backward, 1)
    parts = plan.source(resolve(kind).traced, "bfloat16", options, piece_bytes=16)
    arithmetic = "FFMA", "FMUL", "FADD", "MUFU", "HMMA"
    first, second = operations_of_steps(parts, "sm_90a")
    assert first["HMMA"] and [first[x] for x in arithmetic] == [second[x] for x in arithmetic]


@needs_nvrtc
@pytest.mark.parametrize(
    ("case", "turn"),
    [pytest.param(x, i % 2, marks=pytest.mark.slow if i else []) for i, x in enumerate(COMPILED)],
    ids=str,
)
def test_compiles_without_spills(case, turn):
    kind, sizes, precision, arch = case
    cell, dtype = resolve(kind), getattr(torch, precision)
    quick = arch == "sm_90a" and sizes == (16, 12, 64)
    for backward, fields in directions_of(FIELDS[-1:] if quick else FIELDS, turn):
        problem = planned(kind, *sizes, dtype)._replace(returned=1, **fields)
        plan = plan_scan(problem, GPUS[arch], backward)
        options = source.backward_options(False, False, 1, False)
        options = options if backward else source.forward_options(True)
        options = (*options, *source.sequence_options(problem))
        parts = plan.source(cell, precision, options, piece_bytes=16)
        assert not spills_in_a_loop(parts, arch), (fields, backward)
    B, N, D = sizes
    plan = plan_gradient(len(cell.fed_by("R")), B * 64, N, D, dtype.itemsize, GPUS[arch])
    for fields in FIELDS[turn::2]:
        options = source.gradient_options(planned(kind, *sizes, dtype)._replace(**fields))
        assert not spills_in_a_loop(plan.source(cell, precision, 16, options), arch), fields


@needs_compiler
@pytest.mark.slow
@every_backend
def test_an_operator_of_a_graph_has_all_options(on_the_cpu, backend):
    case = random_ragged("lstm", 3, 4, 2, 16, dtype=torch.float32, **ALL[0])
    expected = gradients_of(case, case.call(backend))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda lengths: case.call(backend, lengths=lengths),
        fullgraph=True,
        backend="aot_eager",
    )
    found = gradients_of(case, compiled(case.options["lengths"]))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], msg=name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("returned", ["h", "last"])
def test_large_heads_return_what_is_asked_for(take, returned):  # noqa: F811
    backend = take(GRID).backend
    for grad in (True, False):
        case = random_ragged("lstm", 3, 2, 1, 131, return_states=returned, dtype=torch.bfloat16)
        with torch.set_grad_enabled(grad):
            every, last_states = case.call(backend, return_states="all")
            states, last = case.call(backend)
        assert states.shape[0] == (returned == "h")
        assert torch.equal(states, every[: len(states)]) and torch.equal(last, last_states)
    hold_ragged_to_vanilla(backend, case)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "arch", "turn"),
    alternating([(16, 12, 64), (64, 1, 768)], ["sm_90a", "sm_80"], [0, 1]),
    ids=str,
)
def test_a_step_compiles_without_spills(sizes, arch, turn):
    cell = resolve("lstm")
    for backward, fields in directions_of(FIELDS, turn):
        problem = planned("lstm", *sizes, torch.bfloat16)._replace(returned=1, **fields)
        plan = plan_step(cell, *sizes, "bfloat16", backward, sequenced=True)
        options = source.backward_options(False, False, 1, False)
        options = options if backward else source.forward_options(True)
        parts = plan.source(cell, "bfloat16", (*options, *source.sequence_options(problem)))
        assert not spills_in_a_loop(parts, arch), (fields, backward)


@needs_compiler
@every_backend
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
def test_same_bits_without_gradients(on_the_cpu, backend, kinds):
    """Where less is stored: nothing for a backward pass, and only the states that are asked for."""
    case = random_ragged("lstm", 5, 4, 2, 16, dtype=torch.bfloat16, **kinds)
    expected = case.call(backend)
    with torch.no_grad():
        given = case.call(backend)
    for x, y in zip(given, expected, strict=True):
        assert torch.equal(x, y)


@needs_compiler
@every_backend
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
def test_autocast_of_another_dtype_changes_nothing(on_the_cpu, backend, kinds):
    """It would refuse to join tensors of two dtypes of 16 bits."""
    case = random_ragged("lstm", 3, 4, 1, 16, dtype=torch.float16, **kinds)
    expected = case.call(backend, dtype="float16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.call(backend, dtype="float16")
    assert all(map(torch.equal, found, expected))
