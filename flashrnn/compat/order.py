"""The order of ``flashrnn()``'s arguments: ours, and upstream's."""

from __future__ import annotations

from typing import Any

from flashrnn.config import FlashRNNConfig

_ORDERS = (
    "after function come, by position, either backend, or upstream's config, backend and dtype. "
    "By name there is no order: flashrnn(..., config=config, backend=name, dtype=dtype)"
)


def by_position(
    further: tuple[Any, ...], config: FlashRNNConfig | None, backend: str, dtype: Any
) -> tuple[FlashRNNConfig | None, str, Any]:
    """config, backend and dtype of a call with more than five positional arguments.

    Args:
        further: the sixth and what follows: a backend's name; or upstream's config (or ``None``),
            backend and dtype.
        config: what was given by name, as the two below.
        backend: ...
        dtype: ...

    Raises:
        TypeError: both orders mixed, too many arguments, or one that is given twice.
    """
    first = further[0]
    if isinstance(first, str):
        if len(further) > 1:
            raise TypeError(f"{first!r} and {len(further) - 1} more after function; {_ORDERS}")
        if backend != "auto":
            raise TypeError(f"backend is given twice, {first!r} and {backend!r}; {_ORDERS}")
        return config, first, dtype
    if first is not None and not isinstance(first, FlashRNNConfig):
        raise TypeError(f"the sixth argument is {type(first).__name__}; {_ORDERS}")
    if len(further) > 3:
        raise TypeError(f"{5 + len(further)} arguments by position; {_ORDERS}")
    found: dict[str, Any] = {"config": config, "backend": backend, "dtype": dtype}
    # Cut to one length: within Dynamo of PyTorch 2.9 zip() is strict whenever it is told which.
    for name, value in zip(tuple(found)[: len(further)], further, strict=True):
        if value is not None and found[name] not in (None, "auto"):
            raise TypeError(f"{name} is given twice, by position and by name; {_ORDERS}")
        found[name] = found[name] if value is None else value
    return found["config"], found["backend"], found["dtype"]
