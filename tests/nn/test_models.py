"""Models of other packages, from PyPI, compute the same with their layers replaced by ours.

They are not among this package's requirements: ``make test-models`` makes an environment that has
them. Each is small, with random weights, and in float64 but where it says otherwise.
"""

import copy

import pytest
import torch
from torch import nn

import flashrnn.nn as ours
from tests.nn.against import BACKENDS, assert_same, tensors

pytestmark = [
    pytest.mark.models,
    # Of other packages, which are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("backend", BACKENDS),
]


def package(name):
    return pytest.importorskip(
        name, reason="`make test-models` installs it", exc_type=(ImportError, OSError, RuntimeError)
    )


def assert_same_model(model, compute, backend, layers, *, dtype=torch.float64, tolerance=1e-10):
    """Results and gradients of ``compute(model)``, before and after its layers are replaced."""
    torch.manual_seed(1)
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    report = ours.replace(twin, backend=backend)
    assert len(report.swapped) == layers and not report.left, report
    found = []
    for either in (model, twin):
        torch.manual_seed(2)
        results = tensors(compute(either))
        sum((y * torch.sin(torch.arange(y.numel()).view_as(y))).sum() for y in results).backward()
        found.append([*results, *(w.grad for w in either.parameters() if w.grad is not None)])
    assert len(found[0]) > 4
    assert_same(*found, tolerance)


def test_encodec(backend):
    """Two layers over time between convolutions; the layer's output is added to its input."""
    transformers = package("transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, upsampling_ratios=[2, 2]
    )
    model = transformers.EncodecModel(config)
    x = torch.randn(2, 1, 64).double()
    assert_same_model(model, lambda m: [m.decoder(m.encoder(x))], backend, 2)


def test_tacotron2(backend):
    """A packed, bidirectional encoder; a decoder of cells, whose calls have states."""
    models = package("torchaudio.models")
    model = models.Tacotron2(
        n_mels=5,
        symbol_embedding_dim=8,
        encoder_embedding_dim=8,
        encoder_n_convolution=1,
        decoder_rnn_dim=8,
        attention_rnn_dim=8,
        attention_hidden_dim=4,
        attention_location_n_filter=2,
        attention_location_kernel_size=3,
        prenet_dim=4,
        postnet_n_convolution=2,
        postnet_embedding_dim=4,
    )
    tokens, lengths = torch.randint(0, 148, (3, 7)), torch.tensor([7, 5, 2])
    mel, mel_lengths = torch.randn(3, 5, 6).double(), torch.tensor([6, 6, 4])
    assert_same_model(model, lambda m: m(tokens, lengths, mel, mel_lengths)[:3], backend, 1)


def test_deepspeech(backend):
    """An RNN with the rectifier, in both directions."""
    models = package("torchaudio.models")
    model = models.DeepSpeech(6, n_hidden=8, n_class=5, dropout=0.0)
    x = torch.randn(2, 1, 9, 6).double()
    assert_same_model(model, lambda m: [m(x)], backend, 1)


def test_hdemucs(backend):
    """Two layers in both directions within residual branches, over frames cut out of a signal."""
    models = package("torchaudio.models")
    model = models.HDemucs(
        ["a", "b"], audio_channels=1, channels=4, nfft=1024, depth=4, dconv_lstm=2
    )
    x = torch.randn(1, 1, 4096).double()
    layers = sum(isinstance(layer, nn.LSTM) for layer in model.modules())
    assert layers
    assert_same_model(model, lambda m: [m(x)], backend, layers)


def test_deepar(backend):
    """States from the context continue into samples."""
    package("gluonts.torch")
    from gluonts.torch.model.deepar.module import DeepARModel

    model = DeepARModel(
        freq="D",
        context_length=6,
        prediction_length=3,
        num_feat_dynamic_real=2,
        num_feat_static_real=1,
        num_feat_static_cat=1,
        cardinality=[3],
        hidden_size=8,
        num_layers=2,
        lags_seq=[1, 2],
        num_parallel_samples=2,
    )
    past, static = model._past_length, torch.tensor([[0], [2]])

    def compute(model):
        parameters, _, _, _, state = model.unroll_lagged_rnn(
            static,
            torch.ones(2, 1).double(),
            torch.ones(2, past, 2).double(),
            torch.linspace(1, 2, 2 * past).view(2, past).double(),
            torch.ones(2, past).double(),
            torch.ones(2, 3, 2).double(),
            torch.ones(2, 3).double(),
        )
        return [*parameters, *state]

    assert_same_model(model, compute, backend, 1)


def test_recurrent_ppo(backend):
    """A step at a time where an episode starts, else the sequence; starts come as floats."""
    package("sb3_contrib")
    import gymnasium
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    space = gymnasium.spaces.Box(-1, 1, (3,))
    model = RecurrentActorCriticPolicy(
        space, gymnasium.spaces.Discrete(2), lambda _: 1e-3, net_arch=[4], lstm_hidden_size=8
    )
    state = (torch.randn(1, 2, 8), torch.randn(1, 2, 8))
    observations, actions = torch.randn(10, 3), torch.randint(0, 2, (10,))
    starts = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0, 0])

    def compute(model):
        return model.evaluate_actions(observations, actions, RNNStates(state, state), starts)

    # It converts observations to float32.
    assert_same_model(model, compute, backend, 2, dtype=torch.float32, tolerance=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_torchrl(backend, cell):
    """Trajectories cut where ``is_init`` is set, run as a batch of padded ones."""
    package("torchrl")
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    names = ["h", "c"] if cell == "lstm" else ["h"]
    module = LSTMModule if cell == "lstm" else GRUModule
    keys = {
        "in_keys": ["x", *names],
        "out_keys": ["y", *(("next", name) for name in names)],
    }
    model = module(input_size=3, hidden_size=4, num_layers=2, **keys)
    is_init = torch.zeros(2, 5, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[0, 3] = is_init[1, 1] = True
    data = TensorDict({"x": torch.randn(2, 5, 3).double(), "is_init": is_init}, [2, 5])
    for name in names:
        data[name] = torch.randn(2, 5, 2, 4).double()

    def compute(model):
        with set_recurrent_mode(True):
            return [model(data.clone())["y"]]

    assert_same_model(model, compute, backend, 1)


def test_sequencer(backend):
    """Both directions over rows and columns of an image, as batches of many short sequences."""
    package("timm")
    from timm.models.sequencer import Sequencer2d

    model = Sequencer2d(
        img_size=16,
        num_classes=3,
        layers=(1, 1),
        patch_sizes=(4, 1),
        embed_dims=(8, 8),
        hidden_sizes=(4, 4),
        mlp_ratios=(1.0, 1.0),
    )
    x = torch.randn(2, 3, 16, 16).double()
    assert_same_model(model, lambda m: [m(x)], backend, 4)
