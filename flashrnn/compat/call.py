"""Translates a call with upstream's config and layouts into a call of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flashrnn import functional
from flashrnn.cells.spec import Cell
from flashrnn.config import LAYOUTS, FlashRNNConfig, parse_dtype
from flashrnn.problem import autocast_enabled, carry_dtype

# Upstream's PyTorch versions, which compute in the tensors' dtype.
_PLAIN = ("vanilla", "vanilla_fwbw")
_DTYPES = ("dtype_acc", "dtype_b", "dtype_r", "dtype_w", "dtype_g", "dtype_s", "dtype_a")


class Options(NamedTuple):
    """The options of a config that change what is computed."""

    gradient_recurrent_cut: bool
    gradient_recurrent_clipval: float | None
    forward_clipval: float | None
    enable_automatic_mixed_precision: bool
    dtype: torch.dtype | str | None
    initial_val: Any
    allow_tf32: bool | None

    @property
    def of_upstream(self) -> bool:
        """Whether fields are set that only upstream has: here none."""
        return False

    def initial_values(self, states: Sequence[str]) -> tuple[float, ...]:
        """See :meth:`flashrnn.FlashRNNConfig.initial_values`."""
        return FlashRNNConfig.initial_values(cast(Any, self), states)


def call(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None,
    function: str | Cell,
    backend: str,
    config: FlashRNNConfig,
    dtype: torch.dtype | str | None,
    reset: Tensor | None = None,
    reset_states: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    return_states: str = "all",
) -> tuple[Tensor, Tensor]:
    """:func:`flashrnn.flashrnn` with a config that sets fields of upstream's.

    - ``config.function`` and ``config.backend`` take the place of the call's arguments.
    - ``Wx``, ``R``, ``b``, ``states`` and ``reset_states`` (that of ``states``) come in the
      config's layouts, and both results are returned in that of ``output_shape``: all are permuted
      views. A packed batch has B = 1 there; one without that dimension takes our layouts.
    - ``hidden_dim``, ``num_heads`` and ``head_dim`` are compared with the tensors.
    - All inputs are cast to ``dtype`` (or ``dtype_w``), whatever they are; with the backends
      ``vanilla`` and ``vanilla_fwbw``, and without autocast, what is computed has the dtype of
      ``Wx`` and ``R``, as upstream's plain versions have it.
    - Both results have the dtype ``dtype_s``, or where that is ``None`` that of the computation:
      ``last_states`` are rounded to 16 bits, and continue a sequence as upstream does.

    Raises:
        TypeError: something that is no tensor or no config.
        ValueError: a call whose arguments and config disagree; sizes that are not the tensors';
            dtypes that are not consistent; and what :func:`flashrnn.flashrnn` raises.
    """
    if not isinstance(config, FlashRNNConfig):
        raise TypeError(f"config is {type(config).__name__}; accepted is a FlashRNNConfig")
    function = _agreed("function", function, "lstm", config.function)
    backend = _agreed("backend", backend, "auto", config.backend)
    Wx = _in_our_layout("Wx", Wx, config.input_shape, LAYOUTS["input_shape"])
    R = _in_our_layout("R", R, config.recurrent_shape, LAYOUTS["recurrent_shape"])
    b = _in_our_layout("b", b, config.bias_shape, LAYOUTS["bias_shape"])
    if states is not None:
        states = _in_our_layout("states", states, config.output_shape, LAYOUTS["output_shape"])
    if reset_states is not None:
        reset_states = _in_our_layout(
            "reset_states", reset_states, config.output_shape, LAYOUTS["output_shape"]
        )
    order = permute_to(LAYOUTS["output_shape"], config.output_shape)
    if order is not None and cu_seqlens is not None and Wx.ndim == 4:
        raise ValueError(
            f"Wx has shape {tuple(Wx.shape)} and config.output_shape={config.output_shape!r}; "
            "accepted is a packed batch of five dimensions, [1, total, Gw, N, D]"
        )
    _check_sizes(config, Wx)
    computed, returned = _dtypes(config, backend, dtype, Wx, R)

    options = Options(
        config.gradient_recurrent_cut,
        config.gradient_recurrent_clipval,
        config.forward_clipval,
        config.enable_automatic_mixed_precision,
        None,
        config.initial_val,
        config.allow_tf32,
    )
    every, last = functional.flashrnn(
        Wx,
        R,
        b,
        states,
        function,
        config=cast(FlashRNNConfig, options),
        backend=backend,
        dtype=computed,
        reset=reset,
        reset_states=reset_states,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        return_states=return_states,
    )
    returned = every.dtype if returned is None else returned
    return _permuted(every.to(returned), order), _permuted(last.to(returned), order)


def permute_to(given: str, wanted: str) -> tuple[int, ...] | None:
    """The dimensions of a tensor in the layout ``given``, in the order of ``wanted``.

    ``None`` where there is nothing to permute.

    Raises:
        ValueError: layouts of different letters.

    Example:
        >>> permute_to("BTGHD", "TBHDG")
        (1, 0, 3, 4, 2)
    """
    given, wanted = given.replace("N", "H"), wanted.replace("N", "H")
    if sorted(given) != sorted(wanted):
        raise ValueError(f"layouts {given!r} and {wanted!r}; accepted are two of the same letters")
    return None if given == wanted else tuple(map(given.index, wanted))


def _permuted(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return tensor if order is None else tensor.permute(order)


def _in_our_layout(name: str, tensor: Tensor, given: str, wanted: str) -> Tensor:
    order = permute_to(given, wanted)
    if order is None or not isinstance(tensor, Tensor):
        return tensor  # flashrnn() says what is wrong with it.
    if tensor.ndim != len(given):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; accepted are {len(given)} dimensions, "
            f"[{', '.join(given)}] as config has it"
        )
    return tensor.permute(order)


def _agreed(name: str, argument: Any, default: str, configured: Any) -> Any:
    """What a call and its config ask for; contradictions are an error."""
    if configured is None:
        return argument
    if argument not in (default, configured):
        raise ValueError(
            f"{name}={argument!r} and config.{name}={configured!r}; accepted is one of the two"
        )
    return configured


def _check_sizes(config: FlashRNNConfig, Wx: Tensor) -> None:
    if not isinstance(Wx, Tensor) or Wx.ndim != 5:
        return  # flashrnn() says what is wrong with it.
    N, D = Wx.shape[3:]
    found = {"hidden_dim": N * D, "num_heads": N, "head_dim": D}
    for name, size in config.given_sizes().items():
        if size is not None and size != found[name]:
            raise ValueError(
                f"config.{name}={size}; Wx has {name} {found[name]}: its shape is "
                f"{tuple(Wx.shape)}, [B, T, Gw, N, D]"
            )


def _dtypes(
    config: FlashRNNConfig, backend: str, argument: torch.dtype | str | None, Wx: Tensor, R: Tensor
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype to compute in and the one of the results; ``None``: as flashrnn() decides."""
    asked = next((x for x in (argument, config.dtype, config.dtype_w) if x is not None), None)
    computed = None if asked is None else parse_dtype(asked)
    if not isinstance(Wx, Tensor) or not isinstance(R, Tensor):
        return computed, None  # flashrnn() says what is wrong with them.
    base = Wx.dtype if computed is None else computed
    accepted = (base, carry_dtype(base))
    for name in _DTYPES:
        given = getattr(config, name)
        if given is not None and parse_dtype(given) not in accepted:
            names = " or ".join(str(dtype) for dtype in dict.fromkeys(accepted))
            raise ValueError(
                f"config.{name}={given!r} in a computation in {base}; accepted is {names}"
            )
    cast_by_autocast = config.enable_automatic_mixed_precision and autocast_enabled(Wx.device.type)
    plain = backend in _PLAIN and argument is None and not cast_by_autocast
    if plain and computed is not None and Wx.dtype == R.dtype != computed:
        return None, None
    returned = config.dtype_s
    return computed, None if returned is None else parse_dtype(returned)
