"""A call is launched as if it were the first: what is looked up is what would be worked out."""

import itertools
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import FlashRNNConfig, backends, calls, cell, flashrnn, initial, nn, recurrent_layer
from flashrnn.backends import autograd, copies, cuda_fused, few_rows, steps, tables
from flashrnn.backends.fused import compiled, plans, scans
from flashrnn.kernels import call, registry
from flashrnn.kernels import copies as copies_of_a_launch
from tests.emulation import begin_nothing, one_by_one
from tests.gpus import H200, SMALL
from tests.sequences import KINDS, random_ragged


class Launches:
    """Stands in for kernels: keeps what would be launched."""

    def __init__(self):
        self.all = []
        self.gpu = H200

    def kernel(self, entry, parts, shape, device):
        return LaunchedKernel(self, entry, "\n".join(parts.values()), shape)

    def take(self):
        found, self.all = self.all, []
        return found


class LaunchedKernel:
    def __init__(self, launches, entry, text, shape):
        self.launches, self.entry, self.text, self.shape = launches, entry, text, shape

    def launch(self, shape, fields):
        thread = threading.get_ident()
        self.launches.all.append((self.entry, self.text, shape, fields, thread))


RECORDS = {
    **dict.fromkeys(("single_cta_forward", "cluster_mma_forward", "grid_forward"), call.FORWARD),
    **dict.fromkeys(("single_cta_backward", "grid_backward"), call.BACKWARD),
    "cluster_reduce_scatter_backward": call.BACKWARD,
    "recurrent_gradient": call.RECURRENT_GRADIENT,
    "gradient_sums": call.GRADIENT_SUMS,
    "few_rows_product": call.FEW_ROWS_PRODUCT,
    "few_rows_gradients": call.FEW_ROWS_GRADIENTS,
    "copies": copies_of_a_launch.RECORD,
    "make_tables": call.SEQUENCE_TABLES,
    "h_before": call.H_BEFORE,
}


def record_of(launched):
    """That of a launch; calls with options of sequences have the complete one."""
    entry, _, _, fields, _ = launched
    record = RECORDS[entry]
    return record if len(fields) == record.size else record.complete


def named(launched):
    """The fields of a launch by their names."""
    fields, parameters = launched[3], record_of(launched).parameters
    names = [part.split()[-1].lstrip("*") for part in parameters.split(", ")]
    return dict(zip(names, fields, strict=True))


def forget():
    for cached in (*cuda_fused.KERNELS, *tables.KERNELS, plans.refused, registry.best_plan):
        cached.cache_clear()
    calls.problems.clear()
    calls.kept.clear()
    initial._expanded_zeros.clear()


@pytest.fixture
def launches(monkeypatch):
    """Backend ``cuda_fused`` takes tensors on the CPU, and computes nothing."""
    found = Launches()
    forget()
    monkeypatch.setattr(cuda_fused, "unavailable", lambda device: None)
    monkeypatch.setattr(plans, "gpu_of", lambda problem: found.gpu)
    monkeypatch.setattr(scans, "_kernel", found.kernel)
    monkeypatch.setattr(scans, "launch_in_turn", one_by_one)
    monkeypatch.setattr(few_rows, "_kernel", found.kernel)
    monkeypatch.setattr(few_rows, "launch_in_turn", one_by_one)
    monkeypatch.setattr(copies, "_kernel", found.kernel)
    monkeypatch.setattr(copies, "launch_in_turn", one_by_one)
    monkeypatch.setattr(few_rows, "whole", lambda device: found.gpu)
    monkeypatch.setattr(tables, "_kernel", found.kernel)
    monkeypatch.setattr(compiled, "begin_backward", begin_nothing)
    yield found
    forget()


def zeros(*sizes, dtype=torch.bfloat16, offset=0, extra=0, requires_grad=False):
    """Zeros that begin so many elements behind an aligned address, their rows so much apart."""
    *outer, D = sizes
    rows = torch.zeros(*outer, D + extra, dtype=dtype)
    if offset:
        room = torch.zeros(rows.numel() + offset, dtype=dtype)[offset:]
        rows = room.view(rows.shape)
    return rows[..., :D].requires_grad_(requires_grad)


CHOICES = st.fixed_dictionaries(
    {
        "B": st.sampled_from([1, 4, 9]),
        "T": st.sampled_from([1, 8]),
        "N": st.sampled_from([1, 2]),
        "D": st.sampled_from([24, 64, 256]),
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "offset": st.sampled_from([0, 0, 0, 1, 2, 4]),
        "extra": st.sampled_from([0, 0, 0, 4, 8]),
        "expanded": st.booleans(),
        "states": st.sampled_from([None, "one", "each"]),
        "requires_grad": st.booleans(),
        "clipval": st.sampled_from([None, None, 0.5, 2.0]),
        "function": st.sampled_from(["lstm", "gru"]),
        "gpu": st.sampled_from([H200, SMALL]),
        "reset": st.sampled_from([None, None, "zeros", "sequence", "step"]),
        "lengths": st.sampled_from([None, None, 1, 2]),
        "reverse": st.sampled_from([False, False, True]),
        "return_states": st.sampled_from(["all", "all", "h", "last"]),
    }
)


def options_of(choice):
    """Those of sequences."""
    B, T, N, D = (choice[name] for name in "BTND")
    options = {name: choice[name] for name in ("reverse", "return_states")}
    if choice["lengths"]:
        options["lengths"] = torch.full((B,), min(T, choice["lengths"]))
    if choice["reset"]:
        options["reset"] = torch.zeros(B, T, dtype=torch.bool)
    if choice["reset"] in ("sequence", "step"):
        S, rows = (
            2 if choice["function"] == "lstm" else 1,
            1 if choice["reset"] == "sequence" else T,
        )
        options["reset_states"] = torch.zeros(S, B, rows, N, D)
    return options


def made(launches, choice):
    """What a call launches, forward and backward, but for where its results lie."""
    launches.gpu = choice["gpu"]
    B, T, N, D = (choice[name] for name in "BTND")
    dtype, requires_grad = choice["dtype"], choice["requires_grad"]
    Gw, Gr, Gb, S = (4, 4, 4, 2) if choice["function"] == "lstm" else (3, 3, 4, 1)
    layout = {name: choice[name] for name in ("offset", "extra")}
    Wx = zeros(1 if choice["expanded"] else B, T, Gw, N, D, dtype=dtype, **layout)
    Wx = Wx.expand(B, T, Gw, N, D).requires_grad_(requires_grad)
    R, b = zeros(Gr, N, D, D, dtype=dtype), zeros(Gb, N, D, dtype=dtype, **layout)
    starts = {None: 0, "one": 1, "each": B}[choice["states"]]
    states = zeros(S, starts, 1, N, D, dtype=torch.float32, **layout) if starts else None
    clipval = choice["clipval"]
    config = FlashRNNConfig(forward_clipval=clipval, gradient_recurrent_clipval=clipval)
    try:
        found, _ = flashrnn(
            *(Wx, R, b, states, choice["function"], "cuda_fused"),
            config=config if clipval else None,
            **options_of(choice),
        )
    except ValueError as error:
        assert launches.take() == []
        return str(error)
    if requires_grad:
        found.sum().backward()
    return launched(launches, Wx, R, b, states)


def launched(launches, *given):
    """All launches, but for where their results lie."""
    given = {x.data_ptr(): "given" for x in given if x is not None}
    launched = launches.take()
    fields = [named(one) for one in launched]
    for one, values in zip(launched, fields, strict=True):
        for operand in record_of(one).operands:
            # A copy, or what was allocated, may lie elsewhere the next time.
            values[operand.name] = given.get(values[operand.name], bool(values[operand.name]))
    return [(*one[:3], values) for one, values in zip(launched, fields, strict=True)]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.lists(CHOICES, min_size=2, max_size=4))
def test_a_call_launches_what_it_would_if_it_were_the_first(launches, choices):
    first = []
    for choice in choices:
        forget()
        first.append(made(launches, choice))
    forget()
    for _ in range(2):
        assert [made(launches, choice) for choice in choices] == first


LAYERS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([nn.LSTM, nn.GRU]),
        "B": st.sampled_from([1, 2]),
        "T": st.integers(1, 2),
        "units": st.sampled_from([12, 64, 256]),
        "heads": st.sampled_from([1, 2]),
        "layers": st.sampled_from([1, 2]),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "autocast": st.sampled_from([None, None, torch.float16, torch.bfloat16]),
        "grad": st.sampled_from(["weights", "x", "states", "none", "disabled"]),
        "states": st.booleans(),
        "gpu": st.sampled_from([H200, SMALL]),
    }
)


def made_by_layer(launches, choice):
    """The same of a layer of torch.nn's form."""
    launches.gpu = choice["gpu"]
    B, T, units = (choice[name] for name in ("B", "T", "units"))
    names = "heads", "batch_first", "bias", "dtype"
    layer = choice["kind"](
        16, units, choice["layers"], backend="cuda_fused", **{name: choice[name] for name in names}
    )
    layer.requires_grad_(choice["grad"] in ("weights", "disabled"))
    x = torch.zeros(*((B, T) if choice["batch_first"] else (T, B)), 16, dtype=choice["dtype"])
    x.requires_grad_(choice["grad"] == "x")
    hx = None
    if choice["states"]:
        hx = [
            torch.zeros(choice["layers"], B, units, dtype=choice["dtype"])
            for _ in layer.cell.states
        ]
        hx[0].requires_grad_(choice["grad"] == "states")
        hx = tuple(hx) if len(hx) > 1 else hx[0]
    autocast = torch.autocast("cpu", choice["autocast"], enabled=choice["autocast"] is not None)
    with torch.set_grad_enabled(choice["grad"] != "disabled"), autocast:
        output, _ = layer(x, hx)
    if output.requires_grad:
        output.float().sum().backward()
    return launched(launches)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.lists(LAYERS, min_size=2, max_size=4))
def test_a_layer_launches_what_it_would_if_it_were_the_first(launches, choices):
    first = []
    for choice in choices:
        forget()
        first.append(made_by_layer(launches, choice))
    forget()
    for _ in range(2):
        assert [made_by_layer(launches, choice) for choice in choices] == first


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_compiled_meanwhile_is_what_a_call_with_options_runs(launches, kind, monkeypatch):
    """The usual programs, whose gradients are those of the states that are returned.

    There are so many rows that R's gradient is in parts.
    """
    begun = []
    monkeypatch.setattr(compiled, "begin_backward", lambda *problem: begun.append(problem))
    case = random_ragged("lstm", 3, 1000, 2, 64, dtype=torch.bfloat16, **kind)
    every_state, last_states = case.call("cuda_fused")
    asked = last_states if kind.get("return_states") == "last" else every_state
    asked.backward(torch.zeros_like(asked))
    (problem,) = begun
    *of_forward, of_few_rows = problem
    usual = cuda_fused.programs(*of_forward, False, of_few_rows)
    usual += cuda_fused.programs(*of_forward, True, of_few_rows)
    assert [one[1] for one in launches.take()] == ["\n".join(x.values()) for x in usual]


def inputs(D=64, dtype=torch.bfloat16, requires_grad=False, B=2):
    sizes = (B, 3, 4, 1, D), (4, 1, D, D), (4, 1, D)
    return [torch.zeros(*size, dtype=dtype, requires_grad=requires_grad) for size in sizes]


def scan_launched(launches):
    """The only launch but for that of the options' tables."""
    *others, scan = launches.take()
    assert [one[0] for one in others] in ([], ["make_tables"])
    return scan


def launched_by(launches, *tensors, **options):
    flashrnn(*tensors, backend="cuda_fused", **options)
    return scan_launched(launches)


def test_each_call_has_the_addresses_and_strides_of_its_tensors(launches):
    for _ in range(3):
        Wx, R, b = inputs()
        states = torch.zeros(2, 2, 1, 1, 64)
        fields = named(launched_by(launches, Wx, R, b, states))
        for name, tensor in {"Wx": Wx, "R": R, "b": b, "initial": states}.items():
            assert fields[name] == tensor.data_ptr()
        strides = [fields[f"Wx_{dim}"] for dim in "btgnd"]
        assert tuple(strides) == Wx.stride()
        other = Wx.transpose(0, 1).contiguous().transpose(0, 1)
        fields = named(launched_by(launches, other, R, b, states))
        assert tuple(fields[f"Wx_{dim}"] for dim in "btgnd") == other.stride() != Wx.stride()


def test_rows_that_begin_anywhere_have_a_kernel_of_their_own(launches):
    """Whether they do is asked of each call: PyTorch gives views any address."""
    Wx, R, b = inputs()
    found = [Wx]
    for offset in (2, 4):
        found.append(torch.zeros(Wx.numel() + offset, dtype=Wx.dtype)[offset:].view(Wx.shape))
    texts = [launched_by(launches, x, R, b)[1] for x in 2 * found]
    assert texts[:3] == texts[3:]
    assert all(x != y for x, y in itertools.combinations(texts[:3], 2))


@pytest.mark.parametrize("D", [64, 256])
def test_rows_that_a_kernel_cannot_read_are_copied_at_each_call(launches, D):
    Wx, R, b = inputs(D=D)
    odd = torch.zeros(Wx.numel() + 1, dtype=Wx.dtype)[1:].view(Wx.shape)
    for x, is_copied in [(Wx, False), (odd, True), (Wx, False), (odd, True)]:
        fields = named(launched_by(launches, x, R, b))
        assert (fields["Wx"] != x.data_ptr()) == is_copied
        assert fields["Wx"] % 16 == 0 and fields["R"] == R.data_ptr()


def test_a_part_of_a_gpu_has_launches_of_its_own(launches):
    shapes = []
    for launches.gpu in (H200, SMALL, H200, SMALL):
        shapes.append(launched_by(launches, *inputs(D=256, B=64))[2])
    assert shapes[0] == shapes[2] != shapes[1] == shapes[3]


def test_gates_are_saved_while_a_gradient_may_be_asked_for(launches):
    x = inputs(requires_grad=True)
    saved = []
    for enabled in (True, False, True, False):
        with torch.set_grad_enabled(enabled):
            saved.append(bool(named(launched_by(launches, *x))["gates"]))
    assert saved == [True, False, True, False]
    assert named(launched_by(launches, *(one.detach() for one in x)))["gates"] == 0


def test_a_layers_gradient_is_asked_for_at_each_call(launches):
    """Of each of its tensors alone, after a call without gradients too."""
    sizes = (2, 3, 64), (4, 1, 64, 64), (4, 1, 64, 64), (4, 1, 64)
    for k in range(4):
        tensors = [torch.zeros(*size, dtype=torch.bfloat16) for size in sizes]
        tensors[k].requires_grad_()
        for enabled in (False, True, False, True):
            with torch.set_grad_enabled(enabled):
                found, _ = recurrent_layer(*tensors, backend="cuda_fused")
            assert found.requires_grad == enabled
            product, scan = launches.take()
            assert product[0] == "few_rows_product" and bool(named(scan)["gates"]) == enabled


def test_autocast_dtypes_and_settings_are_asked_for_at_each_call(launches):
    x = inputs(dtype=torch.float32)

    def precision(**options):
        return launched_by(launches, *x, **options)[1]

    full = precision()
    with torch.autocast("cpu", torch.bfloat16):
        bfloat16 = precision()
        ignored = precision(config=FlashRNNConfig(enable_automatic_mixed_precision=False))
    with torch.autocast("cpu", torch.float16):
        float16 = precision()
    assert len({full, bfloat16, float16}) == 3 and ignored == full
    assert precision(dtype="bfloat16") == precision(dtype=torch.bfloat16) == bfloat16
    assert precision(config=FlashRNNConfig(dtype="float16")) == float16
    assert precision() == full
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert precision() != full
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert precision() == full


def test_what_a_cell_captures_is_asked_for_at_each_call(launches):
    factor = [2.0]

    @cell(states=("h",), gates=("a", "b", "c", "d"))
    def scaled(states, gates):
        a, b, c, d = gates
        return (torch.tanh(factor[0] * a + b + c + d),)

    texts = []
    for factor[0] in (2.0, 3.0, 2.0):
        texts.append(launched_by(launches, *inputs(), function=scaled)[1])
    assert texts[0] == texts[2] != texts[1]


def test_what_does_not_fit_is_refused_after_calls_that_did(launches):
    Wx, R, b = inputs()
    launched_by(launches, Wx, R, b)
    bad = [
        ((Wx, R[:3], b), {}, ValueError, "R holds 3 gates"),
        ((Wx, R.float(), b), {}, TypeError, "accepted is one dtype"),
        ((Wx, R, b), {"dtype": ["bfloat16"]}, TypeError, "dtype"),
        ((Wx, R, b), {"dtype": torch.int32}, TypeError, "dtype"),
        ((Wx, R, b.to("meta")), {}, ValueError, "one device"),
        ((Wx, R, b), {"backend": "cuda_fast"}, ValueError, "unknown backend"),
        ((Wx, R, b), {"function": "gru"}, ValueError, "gates"),
        ((Wx, R.to_sparse(), b), {}, TypeError, "layout sparse_coo"),
        ((Wx, [R], b), {}, TypeError, "R is list"),
    ]
    for tensors, options, error, message in bad:
        with pytest.raises(error, match=message):
            flashrnn(*tensors, **{"backend": "cuda_fused", **options})
    assert launches.take() == []
    launched_by(launches, Wx, R, b)


def test_options_that_do_not_fit_are_refused_after_calls_that_did(launches):
    Wx, R, b = inputs(B=2)
    lengths, cu_seqlens = torch.tensor([3, 1]), torch.tensor([0, 2, 3])
    reset, starts = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 2, 1, 1, 64)
    packed = Wx[:1]
    fitting = [
        (Wx, {"lengths": lengths}),
        (packed, {"cu_seqlens": cu_seqlens}),
        (Wx, {"reset": reset, "reset_states": starts}),
        (Wx, {"reverse": True}),
        (Wx, {"reverse": [True]}),
        (Wx, {"return_states": "h"}),
    ]
    bad = [
        (Wx, {"lengths": lengths + 1}, ValueError, "values from 2 to 4"),
        (Wx, {"lengths": lengths - 2}, ValueError, "values from -1 to 1"),
        (Wx, {"lengths": lengths.short()}, TypeError, "int16"),
        (Wx, {"lengths": [3, 1]}, TypeError, "lengths is list"),
        (Wx, {"lengths": lengths[:1]}, ValueError, "lengths has shape"),
        (packed, {"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "do not fall"),
        (packed, {"cu_seqlens": cu_seqlens - 1}, ValueError, "from -1 to 2"),
        (Wx, {"reset": reset.int()}, TypeError, "int32"),
        (Wx, {"reset": reset[:, :2]}, ValueError, "reset has shape"),
        (Wx, {"reset_states": starts}, ValueError, "without reset"),
        (Wx, {"reset": reset, "reset_states": starts[:1]}, ValueError, "reset_states has shape"),
        (Wx, {"reverse": 1}, TypeError, "reverse is int"),
        (Wx, {"reverse": [1]}, TypeError, "accepted are bools"),
        (Wx, {"reverse": [True, False]}, ValueError, "2 elements"),
        (Wx, {"return_states": "c"}, ValueError, "return_states is 'c'"),
        (Wx, {"return_states": ["h"]}, ValueError, "return_states is"),
    ]
    for x, options in 2 * fitting:
        launched_by(launches, x, R, b, **options)
    for x, options, error, message in bad:
        with pytest.raises(error, match=message):
            flashrnn(x, R, b, backend="cuda_fused", **options)
    assert launches.take() == []
    for x, options in fitting:
        launched_by(launches, x, R, b, **options)


def test_a_call_with_options_works_nothing_out_anew(launches, monkeypatch):
    """Nor does a layer: what was found to fit is not checked again, but for values."""
    Wx, R, b = inputs(requires_grad=True)
    x, W = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.zeros(4, 1, 64, 64).bfloat16()
    reset, starts = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, 1, 1, 64)
    options = {"reset": reset, "reset_states": starts, "lengths": torch.tensor([3, 1])}

    def both():
        flashrnn(Wx, R, b, backend="cuda_fused", **options)
        recurrent_layer(x, W, R, b, backend="cuda_fused", **options)
        return launches.take()

    first = both()
    monkeypatch.setattr(calls, "accepted", None)
    again = both()
    assert [one[:3] for one in again] == [one[:3] for one in first]


def test_the_gradient_of_starts_is_asked_for_at_each_call(launches):
    """Of it alone, after a call without gradients too."""
    Wx, R, b = inputs()
    reset, starts = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 2, 1, 1, 64)
    for needed in (False, True, False, True):
        starts.requires_grad_(needed)
        options = {"reset": reset, "reset_states": starts}
        found, _ = flashrnn(Wx, R, b, backend="cuda_fused", **options)
        assert found.requires_grad == needed
        assert bool(named(scan_launched(launches))["gates"]) == needed


class Launched(TorchDispatchMode):
    """Keeps the names of operations that launch something on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returned = func.overloadpacket.__name__, func._schema.returns
        is_view = all(x.alias_info and not x.alias_info.is_write for x in returned)
        if not (is_view or "empty" in name or name in ("_unsafe_view", "unsafe_split")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kinds.values()))
@pytest.mark.parametrize("D", [16, 136])
def test_options_take_a_launch_beside_the_scan(launches, monkeypatch, D, kinds):
    """Of lengths on a GPU too, which nobody waits for; D = 136 has one more for R's gradient."""
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    for module in (backends, autograd):
        # What the mode below does: it would make operators of the calls.
        monkeypatch.setattr(module, "recorded", lambda: False)
    case = random_ragged("lstm", 5, 4, 2, D, dtype=torch.bfloat16, **kinds)
    makes = kinds.keys() & {"resets", "ragged"}
    for _ in range(2):
        launches.take()
        with Launched() as forward:
            results = case.call("cuda_fused")
        ours = [one[0] for one in launches.take()]
        assert ours[:-1] == ["make_tables"] * bool(makes)
        result = results[kinds.get("return_states") == "last"]
        gradient = torch.zeros_like(result)
        with Launched() as backward:
            torch.autograd.grad(result, case.inputs.R, gradient)
        ours = [one[0] for one in launches.take()]
        looked_up = bool(makes or "reverse" in kinds)
        assert ours.count("make_tables") == looked_up
        assert len(ours) == 2 + looked_up * (1 if D == 16 else 2)
    assert forward.names == []
    # Kernels add to the gradient of what resets go back to. The product for R's gradient of a large
    # head is PyTorch's.
    allowed = ["zeros", "new_zeros"] if kinds.get("resets") in ("sequence", "step") else []
    allowed += ["bmm", "clone", "copy_", "sum"] if D > 128 else []
    assert {*backward.names} <= {*allowed}, backward.names


@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_layer_of_few_rows_launches_nothing_of_pytorchs(
    launches, monkeypatch, kind, dtype, batch_first, trained
):
    """Forward: its product, its scan, and what brings weights and results from one form into the
    other."""
    for module in (backends, autograd):
        monkeypatch.setattr(module, "recorded", lambda: False)
    layer = kind(16, 16, batch_first=batch_first, dtype=dtype, backend="cuda_fused")
    layer.requires_grad_(trained)
    x = torch.zeros(2, 3, 16, dtype=dtype)
    layer(x)  # The zeros that states start from are made once.
    launches.take()
    with Launched() as forward:
        layer(x)
    assert forward.names == []
    ours = ["few_rows_product", "single_cta_forward"]
    if kind is nn.GRU:
        ours.insert(0, "copies")
    if dtype == torch.float16 or not batch_first:
        ours.append("copies")
    assert [one[0] for one in launches.take()] == ours


@pytest.mark.slow
def test_what_records_or_transforms_a_call_is_asked_for_at_each_call(launches):
    Wx, R, b = inputs(dtype=torch.float32)
    launched_by(launches, Wx, R, b)
    with FakeTensorMode(allow_non_fake_inputs=True):
        flashrnn(Wx, R, b, backend="cuda_fused")
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="transform"):
        flashrnn(Wx, R, b, backend="cuda_fused")
    with pytest.raises(ValueError, match="transform"):
        torch.func.vmap(lambda x: flashrnn(x, R, b, backend="cuda_fused"))(Wx.unsqueeze(0))
    assert launches.take() == []
    launched_by(launches, Wx, R, b)


def test_caches_have_a_bound(launches, monkeypatch):
    monkeypatch.setattr(calls, "_MOST_PROBLEMS", 5)
    monkeypatch.setattr(calls, "_MOST_KEPT", 5)
    monkeypatch.setattr(initial, "_MOST_EXPANDED", 5)
    for B in range(1, 20):
        launched_by(launches, *inputs(B=B))
        launched_by(launches, *inputs(B=B))
        assert len(calls.problems) <= 5 and len(initial._expanded_zeros) <= 5
        assert len(calls.kept) <= 5
    for cached in (*cuda_fused.KERNELS, *steps.KERNELS, *tables.KERNELS, plans.refused):
        assert cached.cache_info().maxsize is not None


def test_nothing_kept_holds_the_users_step(launches):
    """Caches know a cell as traced; the function and what it refers to are the user's."""

    @cell(states=("h",), gates=("a", "b", "c", "d"))
    def own(states, gates):
        return (torch.tanh(gates[0] + gates[1] + gates[2] + gates[3]),)

    x = inputs()
    for backend in ("cuda_fused", "vanilla"):
        flashrnn(*x, function=own, backend=backend)
    assert all(problem.step is None for problem in calls.problems.values())


def test_threads_launch_each_its_own(launches):
    """At once, with shapes of their own and with the same."""
    barrier, wanted = threading.Barrier(4), {}

    def work(k):
        mine = []
        wanted[threading.get_ident()] = mine
        tensors = [inputs(B=B) for B in (1 + k % 2, 3 + k, 1 + k % 2)]
        barrier.wait()
        for Wx, R, b in itertools.chain.from_iterable([tensors] * 20):
            flashrnn(Wx, R, b, backend="cuda_fused")
            mine.append((Wx.data_ptr(), R.data_ptr(), b.data_ptr(), Wx.shape[0]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {}
    for one in launches.take():
        fields = named(one)
        found.setdefault(one[-1], []).append(tuple(fields[name] for name in ("Wx", "R", "b", "B")))
    assert len(wanted) == 4 and found == wanted
