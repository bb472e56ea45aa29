"""sLSTM cells of TiRex (the package ``tirex-ts`` 1.4.2) computed by this one.

TiRex-2 does not need this: it calls ``flashrnn`` itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn

# What was replaced, by class and name.
_replaced: dict[tuple[Any, str], Any] = {}


def patch(backend: str = "auto", dtype: str | None = "bfloat16") -> None:
    """Have this package compute TiRex's sLSTM cells, of both of its backends, in the whole process.

    Args:
        backend: one of this package's.
        dtype: to compute in; TiRex's own is bfloat16. ``None``: that of the inputs.

    Raises:
        ImportError: tirex-ts is not installed, or has not the class of version 1.4.2.
    """
    from tirex.models.slstm.cell import sLSTMCell

    def scan(cell: Any, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """h after every step, ``[T, B, N · D]``, and the last states, ``[S, B, N · D]``."""
        sizes = cell.config
        T, B, G, N, D = input.shape
        config = FlashRNNConfig(
            function="slstm",
            input_shape="TBGHD",
            output_shape="STBHD",
            recurrent_shape="HPGD",
            bias_shape="HGD",
        )
        every, last = flashrnn(
            input,
            cell._recurrent_kernel_.view(N, D, G, D),
            cell._bias_.view(N, G, D),
            state.view(sizes.num_states, 1, B, N, D),
            config=config,
            backend=backend,
            dtype=input.dtype if dtype is None else dtype,
        )
        return every[0].reshape(T, B, N * D), last.reshape(-1, B, N * D)

    unpatch()
    for name in ("_impl_torch", "_impl_cuda"):
        _replaced[sLSTMCell, name] = getattr(sLSTMCell, name)
        setattr(sLSTMCell, name, scan)


def unpatch() -> None:
    """Undo :func:`patch`; does nothing if it was not called."""
    while _replaced:
        (owner, name), theirs = _replaced.popitem()
        setattr(owner, name, theirs)
