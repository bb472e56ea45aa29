"""LSTMCell, GRUCell and RNNCell stand wherever torch.nn's stood, and layers go step by step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import flashrnn.nn as ours
from tests.nn.against import (
    BACKENDS,
    assert_same,
    both_paths,
    every_kind,
    leaf,
    pair,
    states,
    tensors,
)


def cells(kind, *args, backend="auto", dtype=torch.float64, **options):
    theirs = getattr(nn, f"{kind}Cell")(*args, dtype=dtype, **options)
    mine = getattr(ours, f"{kind}Cell")(*args, dtype=dtype, backend=backend, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def hidden(kind, *shape):
    h = torch.randn(shape, dtype=torch.float64)
    return (h, torch.randn(shape, dtype=torch.float64)) if kind == "LSTM" else h


class TestCells:
    @every_kind
    @both_paths
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)])
    def test_states_and_gradients(self, kind, backend, bias, batch):
        options = [{"nonlinearity": "tanh"}, {"nonlinearity": "relu"}] if kind == "RNN" else [{}]
        for option in options:
            mine, theirs = cells(kind, 3, 5, backend=backend, bias=bias, **option)
            x = torch.randn(*batch, 3, dtype=torch.float64)
            for hx in (None, hidden(kind, *batch, 5)):
                found = []
                for cell in (mine, theirs):
                    cell.zero_grad()
                    xi, hi = leaf(x), leaf(hx)
                    results = cell(xi, hi)
                    sum(y.square().sum() for y in tensors(results)).backward()
                    leaves = (xi, *tensors(hi), *cell.parameters())
                    found.append([*tensors(results), *(tensor.grad for tensor in leaves)])
                assert_same(*found)

    @every_kind
    def test_numbers_names_and_form_are_torchs(self, kind):
        torch.manual_seed(0)
        mine = getattr(ours, f"{kind}Cell")(3, 5)
        torch.manual_seed(0)
        theirs = getattr(nn, f"{kind}Cell")(3, 5)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert_same(list(mine.parameters()), list(theirs.parameters()), 0)
        assert repr(mine) == repr(theirs) and isinstance(mine, type(theirs))
        assert_same(copy.deepcopy(mine)(torch.ones(2, 3)), theirs(torch.ones(2, 3)), 0)

    @every_kind
    @both_paths
    def test_a_loop_of_steps_is_the_layer(self, kind, backend):
        cell, _ = cells(kind, 3, 5, backend=backend)
        layer, _ = pair(kind, 3, 5)
        layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
        x, hx = torch.randn(6, 2, 3, dtype=torch.float64), None
        for x_t in x:
            hx = cell(x_t, hx)
        _, last = layer(x)
        assert_same(tensors(hx), [state[0] for state in tensors(last)])

    @every_kind
    @both_paths
    def test_errors(self, kind, backend):
        mine, theirs = cells(kind, 3, 5, backend=backend)
        for args in (
            (torch.randn(2, 2, 3).double(),),
            (torch.randn(2, 4).double(),),
            (torch.randn(2, 3),),
            (torch.randn(2, 3).double(), hidden(kind, 3, 5)),
            (torch.randn(2, 3).double(), hidden(kind, 2, 4)),
            (torch.randn(2, 3).double(), hidden(kind, 1, 2, 5)),
            (torch.randn(2, 3).double(), hidden(kind, 5)),
            (torch.randn(3).double(), hidden(kind, 2, 5)),
        ):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                theirs(*args)
            with pytest.raises(expected.type):
                mine(*args)

    @pytest.mark.parametrize("count", [1, 3])
    def test_hx_of_another_number_of_states(self, count):
        cell, h = ours.LSTMCell(3, 5, backend="vanilla"), torch.randn(2, 5)
        with pytest.raises(RuntimeError, match=f"hx has {count} tensors; accepted are 2, h, c"):
            cell(torch.randn(2, 3), (h,) * count)

    def test_hx_in_one_tensor(self):
        """As torch.nn takes it of a single row."""
        mine, theirs = cells("LSTM", 3, 5, backend="vanilla")
        x, hx = torch.randn(3).double(), torch.randn(2, 5).double()
        assert_same(mine(x, hx), theirs(x, hx))

    @every_kind
    @both_paths
    def test_heads_are_those_of_the_layer(self, kind, backend):
        made = []
        for name, layers in ((f"{kind}Cell", ()), (kind, (1,))):
            torch.manual_seed(0)
            options = {"heads": 3, "backend": backend, "dtype": torch.float64}
            made.append(getattr(ours, name)(4, 6, *layers, **options))
        cell, layer = made
        given = {f"{name}_l0": weight for name, weight in cell.state_dict().items()}
        assert_same(list(given.values()), list(layer.state_dict().values()), 0)
        assert list(given) == list(layer.state_dict())
        x, hx, gradients = torch.randn(5, 2, 4, dtype=torch.float64), hidden(kind, 2, 6), []
        steps, state = [], hx
        for x_t in x:
            state = cell(x_t, state)
            steps.append(tensors(state)[0])
        start = tuple(s[None] for s in hx) if kind == "LSTM" else hx[None]
        output, last = layer(x, start)
        assert_same([torch.stack(steps), *(s[None] for s in tensors(state))], [output, last])
        for network, y in ((cell, steps[-1]), (layer, output[-1])):
            gradients.append(torch.autograd.grad(y.square().sum(), list(network.parameters())))
        assert_same(*gradients)
        alone, batch = tensors(cell(x[0, 0])), tensors(cell(x[0, :1]))
        assert_same(alone, [s[0] for s in batch])
        assert "heads=3" in repr(cell)

    def test_heads_that_are_none(self):
        for heads in (0, 4, -1):
            with pytest.raises(ValueError, match="accepted is a multiple of heads"):
                ours.GRUCell(3, 6, heads=heads)
        with pytest.raises(TypeError, match="heads should be of type int"):
            ours.GRUCell(3, 6, heads=2.0)

    @every_kind
    def test_one_graph(self, kind):
        mine, _ = cells(kind, 3, 5, backend="vanilla")
        torch.compiler.reset()
        compiled = torch.compile(mine, backend="eager", fullgraph=True)
        x = torch.randn(4, 3, dtype=torch.float64)
        for hx in (None, hidden(kind, 4, 5)):
            assert_same(compiled(x, hx), mine(x, hx))

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="unknown backend 'tritom'"):
            ours.LSTMCell(3, 4, backend="tritom")


class TestSteps:
    @every_kind
    @both_paths
    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}])
    def test_they_are_the_sequence(self, kind, backend, options):
        for extra in ({}, {"proj_size": 2} if kind == "LSTM" else {"num_layers": 1}):
            layer, _ = pair(kind, 3, 5, backend=backend, **{"num_layers": 2, **options, **extra})
            x, state = torch.randn(4, 2, 3, dtype=torch.float64), states(layer, 2)
            expected = layer(x.transpose(0, 1) if layer.batch_first else x, state)
            steps = []
            for x_t in x:
                y, state = layer.step(x_t, state)
                steps.append(y)
            assert_same((torch.stack(steps, int(layer.batch_first)), state), expected)

    @every_kind
    @both_paths
    def test_of_one_sequence(self, kind, backend):
        layer, _ = pair(kind, 3, 5, 2, backend=backend)
        x = torch.randn(3, dtype=torch.float64)
        y, state = layer.step(x)
        output, last = layer(x[None])
        assert_same((y, state), (output[0], last))

    def test_of_another_cell(self):
        layer = ours.Recurrent("slstm", 3, 4, 2, heads=2)
        x = torch.randn(3, 2, 3)
        y, state = layer.step(x[0])
        y, state = layer.step(x[1], state)
        assert_same((y, state), (layer(x[:2])[0][1], layer(x[:2])[1]), 1e-6)

    @every_kind
    def test_dropout_between_layers(self, kind):
        layer, _ = pair(kind, 3, 5, 2, dropout=1.0)
        x = torch.randn(2, 3, dtype=torch.float64)
        assert_same(layer.step(x)[0], layer(x[None])[0][0])

    @both_paths
    @pytest.mark.parametrize("batch", [(2,), ()])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_weights_that_a_hook_makes(self, backend, batch, batch_first):
        """Steps have them as they are now, like a call: pruned ones are made before each."""
        layer, _ = pair("LSTM", 3, 5, backend=backend, batch_first=batch_first)
        prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
        x, before = torch.randn(*batch, 3, dtype=torch.float64), states(layer, *batch)
        time = len(batch) if batch_first else 0
        with torch.no_grad():
            layer.weight_hh_l0_orig.mul_(2)
            given = layer.step(x, before)
            output, after = layer(x.unsqueeze(time), before)
        assert_same(given, (output.squeeze(time), after))

    def test_errors(self):
        with pytest.raises(ValueError, match="a step has no end"):
            ours.LSTM(3, 4, bidirectional=True).step(torch.randn(2, 3))
        for backend in BACKENDS:
            layer = ours.LSTM(3, 4, backend=backend)
            with pytest.raises(ValueError, match="1D or 2D"):
                layer.step(torch.randn(2, 2, 3))
            with pytest.raises(RuntimeError, match="input_size"):
                layer.step(torch.randn(2, 4))
            with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
                layer.step(torch.randn(2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
            with pytest.raises(TypeError, match="tuple of tensors"):
                layer.step(torch.randn(2, 3), torch.zeros(1, 2, 4))


class TestStatesOfCells:
    """Callers change them in place, and detach them, between steps."""

    @pytest.mark.parametrize("options", [{}, {"heads": 2}, {"backend": "vanilla"}], ids=str)
    @every_kind
    def test_in_place(self, kind, options):
        cell, x = getattr(ours, f"{kind}Cell")(3, 4, **options), torch.randn(2, 3)
        for state in tensors(cell(x)):
            state.detach_().mul_(2)
        if kind == "LSTM":
            given = cell(x)
            for state in given:
                state *= torch.tensor([[1.0], [0.0]])
            sum(state.sum() for state in given).backward()
            assert cell.weight_ih.grad.abs().sum() > 0

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @every_kind
    def test_scripted(self, kind):
        """As torch.nn's cell with the same weights."""
        cell, x = getattr(ours, f"{kind}Cell")(3, 4), torch.randn(2, 3)
        model = nn.Sequential(cell) if kind != "LSTM" else cell
        assert_same(torch.jit.script(model)(x), cell(x), 1e-6)
        assert type(cell) is getattr(ours, f"{kind}Cell") and cell.heads == 1
        with pytest.raises(ValueError, match="no heads: this one has 2"):
            torch.jit.script(getattr(ours, f"{kind}Cell")(3, 4, heads=2))


@every_kind
def test_a_step_within_autocast_has_the_dtypes_of_a_call(kind):
    layer, x = getattr(ours, kind)(3, 4), torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, expected = layer.step(x), layer(x[None])
    dtypes = [[y.dtype for y in tensors(found)] for found in (given, expected)]
    assert dtypes[0] == dtypes[1]
