"""Variational dropout and zoneout: cells with gates that random masks feed.

A fused kernel draws no random numbers. What is random at a step comes as a gate that ``Wx`` alone
feeds, of zeros and ones, drawn before the call. So it is exact, seeded as all of PyTorch is, and
takes the memory of a gate for each mask, in ``Wx`` and in what is kept for the backward pass.

Variational dropout (Gal & Ghahramani, 2016, arXiv:1512.05287) drops units of h where the recurrent
matrix reads them, the same at all steps of a sequence. Zoneout (Krueger et al., 2017,
arXiv:1606.01305) lets units of a state stay as they were at a step; without training, each goes
that far from what it was.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.signature import Gate
from flashrnn.cells.spec import Cell


class Masks(NamedTuple):
    """What is random within a layer.

    Attributes:
        trained: the cell with gates for it.
        evaluated: the cell without training.
        dropout: the probability with which the recurrent matrix reads 0 for a unit of h.
        zoneout: for each state, the probability with which a unit stays as it was.
    """

    trained: Cell
    evaluated: Cell
    dropout: float
    zoneout: tuple[float, ...]

    @classmethod
    def of(cls, cell: Cell, dropout: float, zoneout: float | Sequence[float]) -> Masks | None:
        """The masks of a cell; ``None`` where all probabilities are 0.

        Args:
            cell: the cell.
            dropout: see above; less than 1.
            zoneout: one probability for all states, or one for each.

        Raises:
            ValueError: what is no such probability.
        """
        names = cell.states
        each = tuple(zoneout) if isinstance(zoneout, Sequence) else (zoneout,) * len(names)
        if len(each) != len(names) or not all(_is_number(p) and 0 <= p <= 1 for p in each):
            raise ValueError(
                f"zoneout={zoneout!r}; accepted is a probability, from 0 to 1, or a tuple with one "
                f"for each of {', '.join(names)}"
            )
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(
                f"recurrent_dropout={dropout!r}; accepted is a probability less than 1"
            )
        if not (dropout or any(each)):
            return None
        dropout, each = float(dropout), tuple(map(float, each))
        return cls(
            trained(cell, dropout, each),
            evaluated(cell, each) if any(each) else cell,
            dropout,
            each,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Trained:
    """The step of :func:`trained`, whose gates end with the masks."""

    inner: Cell
    scale: float | None
    zoned: tuple[bool, ...]

    @property
    def __wrapped__(self) -> Any:
        """What the cell computes, for whoever looks for captured values."""
        return self.inner.step

    def __call__(self, states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count = len(self.inner.gates)
        masks = list(gates[count:])
        if self.scale is None:
            return tuple(self._stayed(states, gates[:count], masks))
        read = masks.pop(0)
        after = self._stayed(states[1:], gates[:count], masks)
        return torch.where(read > 0.5, after[0] * self.scale, 0.0), *after

    def _stayed(
        self, before: tuple[Tensor, ...], gates: tuple[Tensor, ...], masks: list[Tensor]
    ) -> list[Tensor]:
        after = list(self.inner.step(before, gates))
        zoned = [k for k, is_zoned in enumerate(self.zoned) if is_zoned]
        for k, stay in zip(zoned, masks, strict=True):
            after[k] = torch.where(stay > 0.5, before[k], after[k])
        return after


@dataclass(frozen=True)
class _Evaluated:
    """The step of :func:`evaluated`."""

    inner: Cell
    zoneout: tuple[float, ...]

    @property
    def __wrapped__(self) -> Any:
        """What the cell computes, for whoever looks for captured values."""
        return self.inner.step

    def __call__(self, states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        after = self.inner.step(states, gates)
        return tuple(
            p * x + (1 - p) * y if p else y
            for p, x, y in zip(self.zoneout, states, after, strict=True)
        )


def trained(cell: Cell, dropout: float, zoneout: Sequence[float]) -> Cell:
    """A cell with the masks of training.

    Args:
        cell: the cell.
        dropout: the probability with which the recurrent matrix reads 0 for a unit of h. If it is
            not 0, the cell has a state more, before its others: h as that matrix reads it.
        zoneout: for each state, the probability with which a unit stays as it was.

    Returns:
        The cell, whose last gates are masks, fed by ``Wx`` alone: 1 for a unit that is read, if
        ``dropout`` is not 0; and 1 for one that stays, for each state with a probability.
    """
    states, masks = cell.states, []
    if dropout:
        states, masks = (_unlike("r", cell.states), *cell.states), ["read"]
    masks += [f"stay_{name}" for name, p in zip(cell.states, zoneout, strict=True) if p]
    taken = [gate.name for gate in cell.gates]
    gates = (*cell.gates, *(Gate(_unlike(name, taken), ("Wx",)) for name in masks))
    scale = 1 / (1 - dropout) if dropout else None
    return Cell(cell.name, states, gates, _Trained(cell, scale, tuple(p > 0 for p in zoneout)))


def evaluated(cell: Cell, zoneout: Sequence[float]) -> Cell:
    """A cell with zoneout's mean in place of its masks, as it is without training."""
    return Cell(cell.name, cell.states, cell.gates, _Evaluated(cell, tuple(zoneout)))


def _unlike(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def drawn(like: Tensor, dropped: Tensor | None, zoneout: Sequence[float], N: int, D: int) -> Tensor:
    """The masks of :func:`trained` for rows ``[B, T]``: ``[B, T, masks, N, D]``.

    Args:
        like: whose device and dtype they have, and whose first two dimensions.
        dropped: where h is not read, ``[B or 1, T or 1, N, D]`` of bool; ``None``: there is none.
        zoneout: as there.
        N: the number of heads.
        D: their units.
    """
    sizes = *like.shape[:2], N, D
    masks = [] if dropped is None else [(~dropped).expand(sizes)]
    masks += [bernoulli(sizes, p, like.device) for p in zoneout if p]
    return torch.stack(masks, 2).to(like.dtype)


def bernoulli(sizes: Sequence[int], probability: float, device: torch.device) -> Tensor:
    """Of bool, each ``True`` with a probability."""
    # Of float32: PyTorch's default may be bfloat16, of which there are 256 numbers from 0 to 1.
    return torch.rand(sizes, dtype=torch.float32, device=device) < probability
