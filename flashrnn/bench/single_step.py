"""A step at a time, as in generation: ``flashrnn.Stepper``, which holds R and b."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashrnn import Stepper
from flashrnn.bench.case import Case
from flashrnn.bench.contender import Contender, Work
from flashrnn.bench.ours import Ours
from flashrnn.cells import resolve
from flashrnn.problem import carry_dtype


@dataclass(frozen=True)
class Stepping(Contender):
    """``flashrnn.Stepper`` on given Wx and states; it writes into given memory.

    It has no gradients, and a case's T is 1.
    """

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return "Stepper"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return "Wx, states and memory for the new states given"

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        return "a single step has no gradients" if backward else None

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        work = Ours("vanilla").prepare(case, device)
        R, b = (x.detach() for x in work.weights)
        stepper = Stepper(R, b, function=case.function)
        sizes = (len(resolve(case.function).states), case.B, case.N, case.D)
        states = torch.zeros(sizes, dtype=carry_dtype(case.dtype), device=device)
        # Views are made here: what is timed is the step alone.
        wx, out = work.inputs[0].detach()[:, 0], torch.empty_like(states)
        h = out[0].unsqueeze(1)

        def run(*leaves: Tensor) -> Tensor:
            stepper(wx, states, out=out)
            return h

        return replace(work, run=run)
