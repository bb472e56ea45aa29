"""What PyTorch itself offers for the same task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from flashrnn import flashrnn
from flashrnn.bench.case import Case, leaf
from flashrnn.bench.contender import Contender, Work
from flashrnn.cells import resolve
from flashrnn.nn.modes import mode_of
from flashrnn.nn.weights import bias, recurrent_matrix

MODULES: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def lacking(function: str) -> str | None:
    """Why torch.nn cannot do a function; ``None`` where it can."""
    return None if function in MODULES else f"torch.nn has no {function}"


@dataclass(frozen=True)
class TorchNN(Contender):
    """``torch.nn.LSTM``, ``GRU`` or ``RNN`` in a dtype of its own.

    It has no heads: it runs either one head of the case's D units, which is an N-th of the work,
    or one dense layer of the same N·D units.

    Attributes:
        dtype: of its input and weights.
        full_width: whether it has N·D units.
    """

    dtype: torch.dtype
    full_width: bool

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        width = "full width" if self.full_width else "one head"
        return f"torch.nn {str(self.dtype).removeprefix('torch.')}, {width}"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        units = case.N * case.D if self.full_width else case.D
        return (
            f"1×{units}, dense; with the product of input and W; gradients of x and all weights; "
            "[T, B, ...]; PyTorch's default of tf32"
        )

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        return lacking(case.function)

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        units = case.N * case.D if self.full_width else case.D
        module = MODULES[case.function](units, units, device=device, dtype=self.dtype)
        module.flatten_parameters()
        return Work(
            (leaf(case.T, case.B, units, dtype=self.dtype, device=device),),
            tuple(module.parameters()),
            # The module holds its weights itself.
            run=lambda x, *weights: self.output(module, x, case),
            reference=lambda *leaves: self.reference(case, *leaves),
            time=0,
            ours=False,
        )

    def output(self, module: nn.RNNBase, x: Tensor, case: Case) -> Tensor:
        """What is timed: h of every step, ``[T, B, D]``."""
        return module(x)[0]

    def reference(self, case: Case, *leaves: Tensor) -> Tensor:
        """The same by ``vanilla``."""
        return as_flashrnn(case.function, *leaves)


def as_flashrnn(
    function: str,
    x: Tensor,
    W: Tensor,
    R: Tensor,
    b_input: Tensor,
    b_recurrent: Tensor,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """h of every step, ``[T, B, D]``, of a module of ``torch.nn`` with these weights, by vanilla.

    The orders of its gates are in README.md.
    """
    Wx = linear(x, W).unflatten(-1, (-1, 1, R.shape[1])).transpose(0, 1)
    R, b = converted(function, R, b_input, b_recurrent)
    states, _ = flashrnn(
        Wx, R, b, function=function, backend="vanilla", lengths=lengths, reset=reset
    )
    return states[0].flatten(2).transpose(0, 1)


def converted(
    function: str, R: Tensor, b_input: Tensor, b_recurrent: Tensor
) -> tuple[Tensor, Tensor]:
    """``R`` and ``b`` as :func:`flashrnn.flashrnn` takes them, out of a module of ``torch.nn``."""
    mode, D = mode_of(resolve(function)), R.shape[1]
    b = bias(mode, [b_input, b_recurrent])
    return recurrent_matrix(mode, R).view(-1, 1, D, D), b.view(-1, 1, D)


@dataclass(frozen=True)
class Attention(Contender):
    """Causal ``scaled_dot_product_attention`` with the case's heads, in the case's dtype."""

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return "attention"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return "causal, q, k, v given; gradients of q, k, v; [B, N, T, D]"

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        q, k, v = (
            leaf(case.B, case.N, case.T, case.D, dtype=case.dtype, device=device) for _ in range(3)
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        return Work((q, k, v), (), run=attend, reference=attend, time=2, ours=False)
