"""What PyTorch does with a layer: derivatives, graphs, transforms, autocast, hooks, scripts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import flashrnn.nn as ours
from flashrnn import problem
from flashrnn.nn import precision, stack
from tests.nn.against import assert_same, both_paths, every_kind, pair, random, run, states, tensors


class Cudnn:
    """torch.backends.cudnn as it was before it had a setting for RNNs."""

    def __init__(self, allow_tf32):
        self.allow_tf32 = allow_tf32


class TestTransforms:
    @every_kind
    def test_printed_form_and_arguments_by_position(self, kind):
        args = (5, 7, 2, False, True, 0.5, True)
        if kind == "RNN":
            args = (5, 7, 2, "relu", False, True, 0.5, True)
        if kind == "LSTM":
            args = (*args, 3)
        mine, theirs = getattr(ours, kind)(*args), getattr(nn, kind)(*args)
        assert repr(mine) == repr(theirs)
        assert isinstance(mine, getattr(nn, kind))
        assert "heads=2, backend='vanilla'" in repr(ours.LSTM(2, 4, heads=2, backend="vanilla"))
        assert repr(ours.Recurrent("slstm", 2, 4)) == "Recurrent('slstm', 2, 4)"

    @every_kind
    @both_paths
    def test_second_derivatives(self, kind, backend):
        mine, _ = pair(kind, 2, 3, backend=backend)
        arguments = [
            tensor.requires_grad_() for tensor in (random(3, 2, 2), *tensors(states(mine, 2)))
        ]

        def run_(x, *hx):
            return tuple(tensors(mine(x, hx if kind == "LSTM" else hx[0])))

        assert torch.autograd.gradcheck(run_, arguments)
        assert torch.autograd.gradgradcheck(run_, arguments)

    @every_kind
    def test_one_graph_without_the_types(self, kind):
        """PyTorch compiles no instance of torch.nn's classes with fullgraph=True."""
        name = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[kind]
        layer = ours.Recurrent(name, 3, 4, bidirectional=True, batch_first=True)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 3, 3)
        mine, gradients = run(layer, x)
        given_, their_gradients = run(compiled, x)
        assert_same(mine, given_, 1e-6)
        assert_same(gradients, their_gradients, 1e-5)

    # Dynamo's, of a tensor that it resumes with; it means to hide it.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @every_kind
    def test_compiled_with_a_break_in_the_graph(self, kind, monkeypatch):
        """What is not in the graph is computed as it is without one, by PyTorch's kernels."""
        layer = nn.Sequential(nn.Linear(3, 3), getattr(ours, kind)(3, 4))
        torch._dynamo.reset()
        x = torch.randn(5, 2, 3)
        expected = layer(x)
        monkeypatch.delattr(stack, "_in_turn")
        assert_same(torch.compile(layer, backend="aot_eager")(x), expected, 1e-6)

    @every_kind
    @both_paths
    def test_exported(self, kind, backend):
        mine, _ = pair(kind, 5, 6, 2, backend=backend, dtype=torch.float32)
        x = torch.randn(4, 3, 5)
        program = torch.export.export(mine.eval(), (x,))
        assert_same(program.module()(x), mine(x), 1e-6)

    @every_kind
    def test_an_ensemble_by_vmap(self, kind):
        """PyTorch's own kernels have none."""
        models = [pair(kind, 5, 6)[0] for _ in range(2)]
        weights, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        x = random(4, 3, 5)

        def one(weights, buffers):
            return torch.func.functional_call(base, (weights, buffers), (x,))

        outputs, _ = torch.vmap(one)(weights, buffers)
        assert_same(list(outputs), [model(x)[0] for model in models])

    @every_kind
    @both_paths
    def test_autocast(self, kind, backend):
        mine, theirs = pair(kind, 8, 16, 2, backend=backend, dtype=torch.float32)
        x, hx = torch.randn(9, 3, 8), states(mine, 3)
        with torch.autocast("cpu", torch.bfloat16):
            given_, expected = tensors(mine(x, hx)), tensors(theirs(x, hx))
            loss = mine(x)[0].float().sum()
        for a, e in zip(given_, expected, strict=True):
            torch.testing.assert_close(a.float(), e.float(), rtol=4e-2, atol=4e-2)
        loss.backward()
        assert all(weight.grad.dtype == torch.float32 for weight in mine.parameters())

    def test_float32_on_a_gpu_follows_the_setting_of_torchs_layers(self, monkeypatch):
        gpu = torch.device("cuda")
        cudnn = torch.backends.cudnn
        before = cudnn.rnn.fp32_precision
        try:
            for setting, allowed in (("tf32", True), ("ieee", False)):
                cudnn.rnn.fp32_precision = setting
                assert precision.config_on(gpu).allow_tf32 is allowed
        finally:
            cudnn.rnn.fp32_precision = before
        for allowed in (False, True):  # PyTorch without that setting.
            monkeypatch.setattr(problem.torch.backends, "cudnn", Cudnn(allowed))
            assert precision.config_on(gpu).allow_tf32 is allowed
        assert precision.config_on(torch.device("cpu")) is None

    @every_kind
    @both_paths
    def test_another_default_device(self, kind, backend):
        """As a program has it that sets it to its GPU: what is given says where a call computes."""
        layer = getattr(ours, kind)(5, 6, bidirectional=True, backend=backend)
        x, bounds = torch.randn(4, 3, 5), torch.tensor([0, 5, 5, 12])
        reset = torch.eye(4, 3).bool()
        packed = pack_padded_sequence(x, torch.tensor([4, 2, 3]), enforce_sorted=False)

        def results():
            rows = layer(x.flatten(0, 1), cu_seqlens=bounds)
            return [layer(packed)[0].data, layer(x, reset=reset)[0], rows[0], layer(x)[0]]

        expected = results()
        try:
            torch.set_default_device("meta")
            given = results()
        finally:
            torch.set_default_device("cpu")
            torch.set_default_device(None)
        assert all(map(torch.equal, given, expected))

    @every_kind
    def test_hooks_and_training_mode(self, kind):
        layer = getattr(ours, kind)(5, 6)
        seen = []
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer(torch.randn(4, 3, 5).requires_grad_())[0].sum().backward()
        assert seen == ["forward", "backward"]
        assert layer.train() is layer and not layer.eval().training

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted(self):
        """As torch.nn's layer with the same weights."""

        class Holder(nn.Module):
            def __init__(self, rnn):
                super().__init__()
                self.rnn = rnn

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.rnn(x)[0]

        layer = ours.LSTM(5, 6)
        x = torch.randn(4, 3, 5)
        assert_same(torch.jit.script(Holder(layer))(x), layer(x)[0], 1e-6)


class Calls(torch.nn.Module):
    """A layer, and how it is called."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *given):
        return self.call(self.layer, *given)


def call_packed(layer, data, batch_sizes):
    return layer(PackedSequence(data, batch_sizes))[0].data


def call_step(layer, x):
    return layer.step(x)[0]


@every_kind
class TestAnyBatch:
    """What is recorded of one batch holds for batches of any size, as of torch.nn's layers."""

    @pytest.mark.filterwarnings("ignore")
    def test_traced(self, kind):
        layer = getattr(ours, kind)(3, 4)
        traced = torch.jit.trace(layer, torch.randn(3, 2, 3))
        for B in (1, 7, 200):
            x = torch.randn(5, B, 3)
            assert_same(traced(x), layer(x), 1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_traced_of_packed_sequences_and_steps(self, kind):
        layer = getattr(ours, kind)(3, 4)
        x = pack_sequence([torch.randn(n, 3) for n in (3, 2)])
        traced = torch.jit.trace(Calls(layer, call_packed), (x.data, x.batch_sizes))
        for lengths in ([3], [4, 2, 1]):
            x = pack_sequence([torch.randn(n, 3) for n in lengths])
            assert_same(traced(x.data, x.batch_sizes), layer(x)[0].data, 1e-6)
        step, x = torch.jit.trace(Calls(layer, call_step), torch.randn(2, 3)), torch.randn(5, 3)
        assert_same(step(x), layer.step(x)[0], 1e-6)

    @pytest.mark.parametrize("heads", [1, 2])
    def test_exported(self, kind, heads):
        layer = getattr(ours, kind)(3, 4, heads=heads).eval()
        x, rows, B = torch.randn(3, 7, 3), torch.randn(7, 3), torch.export.Dim("B", min=2)
        for module, given, dim, sizes in (
            (layer, x, 1, {"input": {1: B}}),
            (Calls(layer, call_step), rows, 0, {"given": ({0: B},)}),
        ):
            few = given.narrow(dim, 0, 2).contiguous()
            exported = torch.export.export(module, (few,), dynamic_shapes=sizes)
            assert_same(exported.module()(given), module(given), 1e-6)
