"""``flashrnn.flashrnn.flashrnn``, upstream's module: what is in it is loaded when asked for."""

from typing import Any

from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn

__all__ = ["FlashRNNConfig", "flashrnn"]

# Underscored there, and used all the same.
_UNDERSCORED = {"_get_config": "get_config", "_zero_state": "zero_state"}


def __getattr__(name: str) -> Any:
    # `from ... import` asks every module for its `__path__`.
    if not name.startswith("__"):
        from flashrnn.compat import names

        known = _UNDERSCORED.get(name, name)
        if known in names.__all__:
            return getattr(names, known)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
