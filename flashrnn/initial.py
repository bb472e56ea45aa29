"""The initial states of a call that is given none."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrnn import backends
from flashrnn.config import DEFAULT, FlashRNNConfig
from flashrnn.problem import Problem, as_dtype_has_it, carry_dtype


def initial_states(problem: Problem, config: FlashRNNConfig, direct: bool = False) -> Tensor:
    """``config.initial_val`` as states ``[S, B, 1, N, D]``, a view of one number a state.

    Args:
        problem: the problem.
        config: the call's.
        direct: whether :func:`flashrnn.backends.is_direct` is known to hold.
    """
    dtype, device = carry_dtype(problem.dtype), problem.device
    sizes = (len(problem.cell.states), problem.B, 1, problem.N, problem.D)
    if config is DEFAULT:
        return _zeros_of(sizes, dtype, device, direct)
    values = config.initial_values(problem.cell.states)
    if not any(values):
        return _zeros_of(sizes, dtype, device, direct)
    values = tuple(as_dtype_has_it(value, dtype) for value in values)
    if len(set(values)) == 1:
        # Filled where it is needed: no copy from the host, none to wait for.
        start = torch.full((), values[0], dtype=dtype, device=device)
    else:
        start = torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1, 1)
    return start.expand(sizes)


# A number for each dtype on each device; and such numbers expanded, by their sizes.
_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_expanded_zeros: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}
_MOST_EXPANDED = 1024


def _zeros_of(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, direct: bool
) -> Tensor:
    """Zeros, one number in memory, the same for as long as they may be shared."""
    if not direct and backends.recorded():
        return torch.zeros((), dtype=dtype, device=device).expand(sizes)
    found = _expanded_zeros.get((sizes, dtype, device))
    if found is not None:
        return found
    if (dtype, device) not in _zeros:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros((), dtype=dtype, device=device).expand(sizes)  # The graph's own.
        with torch.inference_mode(False):
            # Copied from the host, which waits for it: every stream then sees it.
            _zeros[dtype, device] = torch.tensor(0.0, dtype=dtype, device=device)
    with torch.inference_mode(False):
        found = _zeros[dtype, device].expand(sizes)
    if len(_expanded_zeros) >= _MOST_EXPANDED:
        _expanded_zeros.clear()
    _expanded_zeros[sizes, dtype, device] = found
    return found
