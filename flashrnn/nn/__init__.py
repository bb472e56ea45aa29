"""Layers with the contract of ``torch.nn``'s, by this package's backends."""

from flashrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from flashrnn.nn.layers import GRU, LSTM, RNN
from flashrnn.nn.modes import elman_relu
from flashrnn.nn.recurrent import Recurrent
from flashrnn.nn.replacing import Replaced, replace, restore
from flashrnn.nn.slstm import SLSTMState, sLSTM

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Replaced",
    "SLSTMState",
    "elman_relu",
    "replace",
    "restore",
    "sLSTM",
]
