"""Packages that use sLSTM cells, with ours in the place of theirs: small random models, on the CPU.

`make test-clients` installs them; elsewhere these tests are skipped.
"""

import importlib.util
import sys

import pytest
import torch

from flashrnn import FlashRNNConfig, flashrnn
from flashrnn.nn import sLSTM
from tests.problems import relative_error

pytestmark = [
    pytest.mark.clients,
    pytest.mark.slow,
    # Theirs, of what they ask of PyTorch.
    pytest.mark.filterwarnings("default"),
]


def needs(package, distribution):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {distribution}: make test-clients")


xlstm = needs("xlstm", "xlstm 2.0.6")
tirex = needs("tirex", "tirex-ts 1.4.2")
tirex2 = needs("tirex2", "tirex-2 0.4.0")


@pytest.fixture
def cells(monkeypatch):
    """Puts our cells into xlstm's; as it was afterwards."""
    # Its module looks for a CUDA compiler when it is imported.
    monkeypatch.setenv("CUDA_HOME", sys.prefix)
    from flashrnn.compat import xlstm

    yield xlstm
    xlstm.unpatch()


@pytest.fixture
def forecasts():
    from flashrnn.compat import tirex

    yield tirex
    tirex.unpatch()


def gradients(outputs, leaves):
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def hold_together(theirs, ours, bound):
    assert len(theirs) == len(ours) > 0
    for expected, given in zip(theirs, ours, strict=True):
        assert given.shape == expected.shape and given.dtype == expected.dtype
        assert relative_error(given, expected) <= bound or torch.equal(given, expected)


def with_random_weights(model):
    """Their own leave R at 0 and some gates closed."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        noise = torch.randn(parameter.shape, generator=generator) * scale
        with torch.no_grad():
            parameter.copy_(noise)
    return model


@xlstm
@pytest.mark.parametrize("function", ["slstm", "lstm"])
@pytest.mark.parametrize("options", [{}, {"gradient_recurrent_cut": False, "num_heads": 1}])
def test_xlstm_cell(cells, function, options):
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    torch.manual_seed(0)
    config = sLSTMCellConfig(
        **{"hidden_size": 24, "num_heads": 3, "backend": "vanilla", "function": function} | options
    )
    cell = with_random_weights(sLSTMCell(config))
    x = torch.randn(2, 7, 4 * 24, requires_grad=True)
    leaves = [x, *cell.parameters()]

    def results():
        y, state = cell(x)
        again, last = cell(x.flip(1), state)  # From states that a step has left.
        return (y, state, again, last, *cell.step(x[:, :1], state))

    theirs = results()
    cells.patch()
    ours = results()
    hold_together(theirs, ours, 2e-6)
    # Of h: through m, which only scales c and n, no gradient flows here.
    hold_together(gradients(theirs[::2], leaves), gradients(ours[::2], leaves), 2e-5)
    cells.unpatch()
    assert all(map(torch.equal, results(), theirs))


@xlstm
def test_xlstm_cuda_cells_need_no_compiler(cells):
    """Their parameters lie in another order; a model saved by one kind gives the same with ours."""
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    torch.manual_seed(0)
    config = sLSTMCellConfig(hidden_size=24, num_heads=3, dtype="float32", backend="vanilla")
    vanilla = with_random_weights(sLSTMCell(config))
    cells.patch()
    config = sLSTMCellConfig(hidden_size=24, num_heads=3, dtype="float32", backend="cuda")
    cuda = sLSTMCell(config)
    with torch.no_grad():
        outside = vanilla._recurrent_kernel_int2ext(vanilla._recurrent_kernel_)
        cuda._recurrent_kernel_.copy_(cuda._recurrent_kernel_ext2int(outside))
        cuda._bias_.copy_(cuda._bias_ext2int(vanilla._bias_int2ext(vanilla._bias_)))
    x = torch.randn(2, 7, 4 * 24)
    hold_together(vanilla(x), cuda(x), 1e-6)


@xlstm
def test_xlstm_layer_in_sequence_and_step_by_step(cells):
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    torch.manual_seed(0)
    config = sLSTMLayerConfig(embedding_dim=24, num_heads=3, backend="vanilla")
    layer = with_random_weights(sLSTMLayer(config)).eval()
    x = torch.randn(2, 6, 24, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def results():
        state, steps = {}, []
        for x_t in x.split(1, dim=1):
            y, state = layer.step(x_t, **state)
            steps.append(y)
        return layer(x), torch.cat(steps, dim=1)

    theirs = results()
    cells.patch()
    ours = results()
    hold_together(theirs, ours, 1e-5)
    assert relative_error(ours[1], ours[0]) <= 1e-5
    # Steps change the state of the convolution in place.
    hold_together(gradients(theirs[:1], leaves), gradients(ours[:1], leaves), 1e-4)


@xlstm
@pytest.mark.parametrize("options", [{}, {"conv1d_kernel_size": 0, "group_norm_weight": False}])
def test_xlstm_layer_as_ours(cells, options):
    """nn.sLSTM has its parameters, its first values, its results and its steps."""
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    torch.manual_seed(0)
    config = sLSTMLayerConfig(
        **{"embedding_dim": 24, "num_heads": 3, "backend": "vanilla", "_num_blocks": 4} | options,
        _block_idx=2,
    )
    theirs = sLSTMLayer(config)
    assert torch.equal(sLSTM.from_xlstm(theirs).bias, sLSTM(24, heads=3, block=2, blocks=4).bias)
    theirs = with_random_weights(theirs)
    ours = sLSTM.from_xlstm(theirs)
    x = torch.randn(2, 6, 24, requires_grad=True)
    y, expected = ours(x)[0], theirs(x)
    hold_together([expected], [y], 1e-5)
    hold_together(gradients([expected], [x]), gradients([y], [x]), 1e-4)
    theirs_state, ours_state = {}, None
    for x_t in x.detach().unbind(1):
        expected, theirs_state = theirs.step(x_t[:, None], **theirs_state)
        y, ours_state = ours.step(x_t, ours_state)
        hold_together([expected[:, 0]], [y], 1e-5)


@xlstm
@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_xlstm_layer_of_each_kind_as_ours(cells, backend):
    """Its two kinds of cells keep biases and R in different orders."""
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    cells.patch()  # Its cuda cells are made and run without a compiler.
    torch.manual_seed(0)
    config = sLSTMLayerConfig(embedding_dim=24, num_heads=3, backend=backend, dtype="float32")
    theirs = with_random_weights(sLSTMLayer(config))
    x = torch.randn(2, 6, 24)
    hold_together([theirs(x)], [sLSTM.from_xlstm(theirs)(x)[0]], 1e-5)


@xlstm
def test_xlstm_language_model(cells):
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    torch.manual_seed(0)
    config = xLSTMLMModelConfig(
        mlstm_block=mLSTMBlockConfig(
            mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
        ),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=4),
            feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        ),
        context_length=16,
        num_blocks=3,
        embedding_dim=32,
        slstm_at=[0, 2],
        vocab_size=11,
    )
    model = xLSTMLMModel(config)
    model.reset_parameters()
    model.eval()
    tokens = torch.randint(11, (2, 9))
    leaves = list(model.parameters())

    def results():
        state, steps = {}, []
        for token in tokens.split(1, dim=1):
            logits, state = model.step(token, state=state)
            steps.append(logits)
        return model(tokens), torch.cat(steps, dim=1)

    theirs = results()
    cells.patch()
    ours = results()
    hold_together(theirs, ours, 1e-5)
    hold_together(gradients(theirs[:1], leaves), gradients(ours[:1], leaves), 1e-4)


@tirex
def test_tirex_cell_is_nearer_to_float64_than_its_own(forecasts):
    """Its own rounds all states to bfloat16 at every step; ours carries them in float32."""
    from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell

    torch.manual_seed(0)
    cell = with_random_weights(sLSTMCell(sLSTMBlockConfig(embedding_dim=32, num_heads=2), "torch"))
    x = torch.randn(3, 24, 4 * 32)
    config = FlashRNNConfig(function="slstm", recurrent_shape="HPGD", bias_shape="HGD")
    (h, *_), _ = flashrnn(
        x.bfloat16().double().view(3, 24, 4, 2, 16),
        cell._recurrent_kernel_.bfloat16().double().view(2, 16, 4, 16),
        cell._bias_.bfloat16().double().view(2, 4, 16),
        config=config,
    )
    h = h.transpose(1, 2)
    with torch.no_grad():
        theirs, their_state = cell(x, None)
        forecasts.patch()
        ours, our_state = cell(x, None)
        forecasts.patch(dtype=None)
        full = cell(x, None)[0]
    assert ours.shape == theirs.shape and our_state.shape == their_state.shape
    assert ours.dtype == theirs.dtype == torch.float32
    assert relative_error(ours, h) <= min(3e-3, relative_error(theirs, h))
    wide = flashrnn(
        x.view(3, 24, 4, 2, 16),
        cell._recurrent_kernel_.view(2, 16, 4, 16),
        cell._bias_.view(2, 4, 16),
        config=config,
    )[0][0]
    torch.testing.assert_close(full, wide.transpose(1, 2))


@tirex
def test_tirex_forecast(forecasts):
    from tirex.models.tirex import TiRexZero

    torch.manual_seed(0)
    model = TiRexZero(
        backend="torch",
        model_config={
            "input_patch_size": 8,
            "output_patch_size": 8,
            "quantiles": [0.1, 0.5, 0.9],
            "block_kwargs": {"embedding_dim": 32, "num_heads": 2, "num_blocks": 2},
            "input_ff_dim": 32,
        },
        train_ctx_len=64,
    )
    with_random_weights(model).eval()
    context = torch.randn(3, 64).cumsum(1)
    expected, _ = model._forecast_quantiles(context, prediction_length=16)
    forecasts.patch()
    given, _ = model._forecast_quantiles(context, prediction_length=16)
    assert given.shape == expected.shape and given.isfinite().all()
    assert not torch.equal(given, expected)  # Ours computed it,
    assert relative_error(given, expected) <= 0.03  # to what 16 bits allow.
    forecasts.unpatch()
    assert torch.equal(model._forecast_quantiles(context, prediction_length=16)[0], expected)


@tirex2
def test_tirex2_layer_calls_ours():
    """It asks for bfloat16 and vanilla, in layouts of its own, and gets float32 on the CPU."""
    from tirex2.model.component.flashrnn_slstm import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    torch.manual_seed(0)
    config = FlashRNNLayerConfig(
        embedding_dim=24, num_heads=3, backend="vanilla", recurrent_shape="HPGD", bias_shape="HGD"
    )
    layer = with_random_weights(sLSTMFlashRNNLayer(config, block_idx=0, num_blocks=2)).eval()
    x = torch.randn(2, 7, 24)
    y = layer(x)
    state, steps = {"slstm_state": None}, []
    for x_t in x.split(1, dim=1):
        y_t, state = layer.step(x_t, **state)
        steps.append(y_t)
    assert y.dtype == torch.float32 and state["slstm_state"].shape == (4, 2, 1, 3, 8)
    torch.testing.assert_close(torch.cat(steps, dim=y.shape.index(7)), y)
    gates = (layer.fgate(x), layer.igate(x), layer.zgate(x), layer.ogate(x))
    Wx = torch.stack(gates, dim=2).view(2, 7, 4, 3, 8)
    R, b = layer.get_R().permute(2, 0, 3, 1), layer.get_bias().transpose(0, 1)
    h = flashrnn(Wx, R, b, function="slstm")[0][0]
    torch.testing.assert_close(layer.group_norm(h), y)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), y)


def slstm_step_by_step(Wx, R, b, states):
    """xLSTM's equations (Beck et al., 2024), in TiRex-2's layouts, in the tensors' dtype."""
    h, c, n, m = states.squeeze(2)
    every = []
    for Wx_t in Wx.unbind(1):
        gates = Wx_t + torch.einsum("bhp,hpgd->bghd", h, R) + b.transpose(0, 1)
        i, f, z, o = gates.unbind(1)
        decayed = torch.nn.functional.logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(i, decayed))
        c = torch.exp(decayed - m) * c + torch.exp(i - m) * torch.tanh(z)
        n = torch.exp(decayed - m) * n + torch.exp(i - m)
        h = torch.sigmoid(o) * c / n
        every.append(torch.stack([h, c, n, m]))
    return torch.stack(every, dim=2), torch.stack([h, c, n, m]).unsqueeze(2)


@tirex2
def test_tirex2_forecast(monkeypatch):
    from tirex2 import TimeseriesType
    from tirex2.api_adapter.forecast import ForecastModel
    from tirex2.model.component import flashrnn_slstm
    from tirex2.model.tirex2 import TiRex2

    torch.manual_seed(0)
    sizes = {"embedding_dim": 32, "num_heads": 2}
    block = {
        "time_mixer": {"model_type": "bi-slstm", "num_slstm_heads": 2, **sizes},
        "variate_mixer": sizes,
        "dropout": 0.0,
        "eps": 1e-6,
    }
    patches = {"input_patch_size": 8, "output_patch_size": 8}
    model = TiRex2(
        stack_config={"templates": {"block": block}, "recipe": ["block", "block"]},
        num_blocks=2,
        embedding_dim=32,
        quantiles=[0.1, 0.5, 0.9],
        tokenizer_cfg={"input_patch_stride": 8, **patches},
        scaler_cfg={},
        h_expand=2,
        context_len=64,
        future_len=16,
        input_ff_dim=32,
        act_func="SiLU",
        dropout=0.0,
        device="cpu",
        **patches,
    )
    with_random_weights(model).eval()
    series = TimeseriesType(
        target=torch.randn(2, 64).cumsum(1), past_covariates=None, future_covariates=None
    )

    def forecast():
        found = ForecastModel(model).forecast([series], prediction_length=16, output_type="torch")
        return found[0]

    given = forecast()
    calls = []

    def plain(self, Wx, R, b, config, states=None):
        calls.append(Wx.shape)
        zeros = self.zero_state(Wx.shape[0], Wx)
        return slstm_step_by_step(Wx, R, b, zeros if states is None else states)

    monkeypatch.setattr(flashrnn_slstm._FlashRNNLayer, "slstm_flashrnn", plain)
    assert relative_error(given, forecast()) <= 1e-6 and len(calls) >= 2
