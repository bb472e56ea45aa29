"""The precision of float32 on a GPU, as torch.nn's layers have it."""

from __future__ import annotations

import torch

from flashrnn.config import FlashRNNConfig
from flashrnn.problem import rnn_tf32_allowed


def config_on(device: torch.device) -> FlashRNNConfig | None:
    """On a GPU float32 follows the setting that torch.nn's layers follow there."""
    if device.type != "cuda":
        return None
    if torch.compiler.is_compiling():
        from flashrnn.backends import constants

        return _WITH_TF32 if constants.rnn_tf32_allowed() else _WITHOUT_TF32
    return _WITH_TF32 if rnn_tf32_allowed() else _WITHOUT_TF32


_WITH_TF32, _WITHOUT_TF32 = FlashRNNConfig(allow_tf32=True), FlashRNNConfig(allow_tf32=False)
