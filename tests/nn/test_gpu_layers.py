"""Layers on a GPU to torch.nn's in float64 on the CPU; steps, models, graphs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import flashrnn.nn as ours
from flashrnn.nn import at_once, stepping
from tests.fused import nobody_waits
from tests.nn.against import every_kind, leaf, states, tensors
from tests.problems import relative_error

pytestmark = [
    pytest.mark.gpu,
    # PyTorch's: of a product that is the first thing in a thread, and of its own layers, whose
    # weights cuDNN does not take in bfloat16.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part"),
]

DEVICE = "cuda"
features, units, T, B = 24, 64, 12, 4

# A dtype, whether PyTorch may use TF32, and what errors of results and gradients may be, relative
# to float64. In 16 bits: twice that of `vanilla` on a CPU, the rounding of what is stored. In
# float32 the kernels' products are three of split operands, right to about 1e-6.
SETTINGS = {
    "float16": (torch.float16, False, 2 * 2**-11, 3 * 2**-11),
    "bfloat16": (torch.bfloat16, False, 2 * 2**-8, 3 * 2**-8),
    "float32": (torch.float32, False, 2e-6, 2e-6),
    # Its operands are cut, by some kernels not to the nearest.
    "tf32": (torch.float32, True, 2 * 2**-10, 3 * 2**-10),
}

CASES = {
    "one layer": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "packed": {"num_layers": 2, "bidirectional": True, "lengths": [7, 12, 3, 7]},
    "heads": {"heads": 2},
    "two directions of heads": {"heads": 2, "bidirectional": True},
    "packed, two directions, projection": {
        "proj_size": 32,
        "bidirectional": True,
        "lengths": [7, 12, 3, 7],
    },
    "projection": {"num_layers": 2, "proj_size": 32},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    """The dtype, and the bounds of errors of results and of gradients."""
    dtype, tf32, *bounds = SETTINGS[request.param]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    yield dtype, *bounds
    # As PyTorch has them.
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def on_gpu(kind, dtype, **options):
    torch.manual_seed(0)
    return getattr(ours, kind)(features, units, device=DEVICE, dtype=dtype, **options)


def in_float64(layer, **options):
    """A layer of the same weights on the CPU: torch.nn's, or of several heads our definition."""
    kinds = ours if "heads" in options else nn
    found = getattr(kinds, type(layer).__name__)(features, units, dtype=torch.float64, **options)
    found.load_state_dict(layer.state_dict())
    return found


def run(layer, x, hx, lengths, weight_of):
    """The results, and the gradients of everything."""
    x, hx = leaf(x), leaf(hx)
    given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    results = tensors(layer(given, hx))
    torch.autograd.backward(results, [weight_of(y) for y in results])
    weights = [weight for _, weight in sorted(layer.named_parameters())]
    return results, [tensor.grad for tensor in (x, *tensors(hx), *weights)]


def moved(value, dtype, device):
    if isinstance(value, tuple):
        return tuple(moved(item, dtype, device) for item in value)
    return value.to(device, dtype)


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(kind, case, setting):
    if "proj_size" in CASES[case] and kind != "LSTM":
        pytest.skip("only an LSTM has a projection")
    dtype, of_results, of_gradients = setting
    options = dict(CASES[case])
    lengths = options.pop("lengths", None)
    layer = on_gpu(kind, dtype, **options)
    reference = in_float64(layer, **options)
    x = torch.randn((B, T, features) if layer.batch_first else (T, B, features)).to(dtype).double()
    hx = moved(moved(states(reference, B), dtype, "cpu"), torch.float64, "cpu")

    def weight_of(y):
        generator = torch.Generator().manual_seed(y.numel())
        return torch.randn(y.shape, generator=generator).to(dtype).to(y)

    expected, true_gradients = run(reference, x, hx, lengths, weight_of)
    given, gradients = run(
        layer, moved(x, dtype, DEVICE), moved(hx, dtype, DEVICE), lengths, weight_of
    )
    for found, true, bound in (
        (given, expected, of_results),
        (gradients, true_gradients, of_gradients),
    ):
        assert len(found) == len(true)
        for mine, theirs in zip(found, true, strict=True):
            assert mine.dtype == dtype and mine.device.type == DEVICE
            assert relative_error(mine.cpu(), theirs) <= bound


@every_kind
def test_packed_sequences_wait_for_nothing(kind):
    layer = on_gpu(kind, torch.bfloat16, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, features, device=DEVICE, dtype=torch.bfloat16)
    packed = pack_padded_sequence(x, torch.tensor([7, 12, 3, 7]), enforce_sorted=False)
    layer(packed)
    with nobody_waits():
        layer(packed)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("option", ["reset", "cu_seqlens"])
def test_options_of_sequences(kind, option, bidirectional, setting):
    """Nobody waits for their values, which lie on the GPU."""
    dtype, of_results, of_gradients = setting
    layer = on_gpu(kind, dtype, num_layers=2, bidirectional=bidirectional)
    reference = in_float64(layer, num_layers=2, bidirectional=bidirectional)
    rows = (T, B) if option == "reset" else (T * B,)
    x = torch.randn(*rows, features).to(dtype)
    hx = moved(states(reference, B), dtype, "cpu")
    given_ = torch.rand(rows) < 0.2 if option == "reset" else torch.tensor([0, 9, 9, 30, T * B])
    weight = torch.randn(*rows, units * (1 + bidirectional)).to(dtype)

    def found(network, device, dtype):
        tensors_ = leaf(moved(x, dtype, device)), leaf(moved(hx, dtype, device))
        y, last = network(*tensors_, **{option: given_.to(device)})
        loss = (y * moved(weight, dtype, device)).sum() + sum(s.sum() for s in tensors(last))
        leaves = (tensors_[0], *tensors(tensors_[1]), *network.parameters())
        return [y, *tensors(last)], torch.autograd.grad(loss, leaves)

    found(layer, DEVICE, dtype)  # Kernels are loaded, which waits.
    on_device = given_.to(DEVICE), x.to(DEVICE), moved(hx, dtype, DEVICE)
    with nobody_waits():
        layer(on_device[1], on_device[2], **{option: on_device[0]})
    for mine, theirs, bound in zip(
        found(layer, DEVICE, dtype),
        found(reference, "cpu", torch.float64),
        (of_results, of_gradients),
        strict=True,
    ):
        for given, true in zip(mine, theirs, strict=True):
            assert relative_error(given.cpu(), true) <= bound


@every_kind
def test_masks(kind, setting, monkeypatch):
    """To our definition with the same masks: in training, and zoneout's mean without."""
    dtype, of_results, of_gradients = setting
    options = {"bidirectional": True, "recurrent_dropout": 0.3, "zoneout": 0.2, "heads": 2}
    layer = on_gpu(kind, dtype, **options)
    reference = in_float64(layer, **options)
    x = torch.randn(T, B, features).to(dtype)
    weight = torch.randn(T, B, 2 * units).to(dtype)
    kept, draw = [], at_once.drawn

    def drawn(like, *args):
        if like.is_cuda:
            kept.append(draw(like, *args))
            return kept[-1]
        return kept.pop(0).to(like)

    monkeypatch.setattr(at_once, "drawn", drawn)
    found = []
    for network, given in ((layer, moved(x, dtype, DEVICE)), (reference, x.double())):
        y, last = network(given.requires_grad_())
        grads = torch.autograd.grad((y * weight.to(y)).sum(), (given, *network.parameters()))
        with torch.no_grad():
            evaluated = network.eval()(given)
        found.append(([y, *tensors(last), *tensors(evaluated)], grads))
    for mine, theirs, bound in zip(*found, (of_results, of_gradients), strict=True):
        for given, true in zip(mine, theirs, strict=True):
            assert relative_error(given.cpu(), true) <= bound


@every_kind
def test_steps_are_the_sequence(kind, setting):
    dtype, of_results, _ = setting
    layer = on_gpu(kind, dtype, num_layers=2)
    x = torch.randn(T, B, features, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        # By the steppers that the first loop leaves, with other weights.
        for _ in range(2):
            expected, last = layer(x)
            state, steps = None, []
            for x_t in x:
                y, state = layer.step(x_t, state)
                steps.append(y)
            # In 16 bits a step's states are rounded, those within a sequence are not.
            for mine, of_layer in zip(
                tensors((torch.stack(steps), state)), tensors((expected, last)), strict=True
            ):
                assert relative_error(mine, of_layer) <= 2 * of_results
            for weight in layer.parameters():
                weight.data.mul_(0.7)
    assert len(stepping._kept[layer]) == 2


@every_kind
@pytest.mark.parametrize("heads", [1, 2])
def test_a_loop_of_cells_is_the_layer(kind, heads, setting):
    dtype, of_results, _ = setting
    layer = on_gpu(kind, dtype, heads=heads)
    cell = getattr(ours, f"{kind}Cell")(features, units, device=DEVICE, dtype=dtype, heads=heads)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(T, B, features, device=DEVICE, dtype=dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            expected, last = layer(x)
            state = None
            for x_t in x:
                state = cell(x_t, state)
            given = tensors(state)
            assert relative_error(given[0], expected[-1]) <= 2 * of_results
            for mine, of_layer in zip(given, tensors(last), strict=True):
                assert relative_error(mine, of_layer[0]) <= 2 * of_results


class Model(nn.Module):
    """A recurrent network as programs write it."""

    def __init__(self, kind):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.rnn = getattr(nn, kind)(features, units, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * units, 5)

    def forward(self, x):
        return self.head(self.rnn(self.norm(x))[0]).sum(1)


@every_kind
def test_a_model_with_its_layers_replaced(kind, setting):
    dtype, _, of_gradients = setting
    torch.manual_seed(0)
    model = Model(kind).to(DEVICE, dtype)
    x = torch.randn(B, T, features, device=DEVICE, dtype=dtype)

    def output_and_gradients():
        model.zero_grad()
        output = model(x)
        output.float().square().mean().backward()
        return [output, *(weight.grad for weight in model.parameters())]

    theirs = output_and_gradients()
    assert ours.replace(model) and isinstance(model.rnn, ours.LSTM | ours.GRU | ours.RNN)
    mine = output_and_gradients()
    for given, expected in zip(mine, theirs, strict=True):
        # Both are off, and the layers before and behind round too.
        assert relative_error(given, expected) <= 3 * of_gradients


# Inductor uses what PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_in_one_graph():
    torch.manual_seed(0)
    layer = ours.Recurrent("lstm", features, units, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(T, B, features, device=DEVICE, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)

    def run_once(network):
        layer.zero_grad()
        output, (h, c) = network(x)
        (output.float().square().sum() + h.float().sum() + c.float().sum()).backward()
        return [output, h, c, *(weight.grad for weight in layer.parameters())]

    for given, expected in zip(run_once(compiled), run_once(layer), strict=True):
        assert relative_error(given, expected) <= 2 * 3 * 2**-8


@every_kind
def test_recorded_by_a_cuda_graph(kind):
    layer = on_gpu(kind, torch.bfloat16, num_layers=2, bidirectional=True).eval()
    one_way = on_gpu(kind, torch.bfloat16).eval()
    x = torch.randn(T, B, features, device=DEVICE, dtype=torch.bfloat16)

    def results():
        return tensors(layer(x)) + tensors(one_way.step(x[0]))

    with torch.no_grad():
        results()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = results()
        # A graph reads inputs and weights as they are when it runs.
        x.mul_(-0.5)
        one_way.weight_hh_l0.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for given, expected in zip(recorded, results(), strict=True):
            assert relative_error(given, expected) <= 2 * 2**-8


def test_slstm(setting):
    """In sequence and step by step."""
    dtype, of_results, of_gradients = setting
    torch.manual_seed(0)
    layer = ours.sLSTM(units, heads=2, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        layer.recurrent_weight.normal_(std=0.1)
    reference = ours.sLSTM(units, heads=2, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, units).to(dtype)
    weight = torch.randn(B, T, units).to(dtype)
    found = []
    for network, given in ((layer, x.to(DEVICE)), (reference, x.double())):
        given.requires_grad_()
        y, _ = network(given)
        y.backward(weight.to(y))
        found.append([y, given.grad, *(parameter.grad for parameter in network.parameters())])
    # Convolution and norm round too: on a CPU to 1.3 times the bounds of the other layers.
    for k, (mine, theirs) in enumerate(zip(*found, strict=True)):
        assert relative_error(mine.cpu(), theirs) <= 3 * (of_gradients if k else of_results)
    with torch.no_grad():
        state, steps = None, []
        for x_t in x.to(DEVICE).unbind(1):
            y, state = layer.step(x_t, state)
            steps.append(y)
    assert relative_error(torch.stack(steps, 1), found[0][0]) <= 3 * of_results
    assert len(stepping._kept[layer]) == 1
