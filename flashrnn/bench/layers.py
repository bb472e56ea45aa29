"""Whole layers, the input product included: ``recurrent_layer``, and the modules of ``nn``.

What they compute is what a module of ``torch.nn`` with the same weights and input computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import flashrnn, nn, recurrent_layer
from flashrnn.bench.case import Case, leaf
from flashrnn.bench.contender import Contender, Work
from flashrnn.bench.peers import MODULES, as_flashrnn, converted, lacking


@dataclass(frozen=True)
class Layer(Contender):
    """``flashrnn.recurrent_layer`` with one head, as many inputs as units."""

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return "recurrent_layer"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return "with the product of input and W; gradients of x, W, R, b; h alone; [B, T, ...]"

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        return lacking(case.function)

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`. The numbers are those of :class:`~peers.TorchNN`."""
        module = MODULES[case.function](case.D, case.D, device=device, dtype=case.dtype)
        x = leaf(case.T, case.B, case.D, dtype=case.dtype, device=device)
        with torch.no_grad():
            W, *others = module.parameters()
            weights = (W.view(-1, 1, case.D, case.D), *converted(case.function, *others))

        def reference(x: Tensor, W: Tensor, R: Tensor, b: Tensor) -> Tensor:
            Wx = linear(x, W.flatten(0, 2)).unflatten(-1, W.shape[:3])
            return flashrnn(Wx, R, b, function=case.function, backend="vanilla")[0][0]

        return Work(
            (x.detach().transpose(0, 1).contiguous().requires_grad_(),),
            tuple(each.clone().requires_grad_() for each in weights),
            # As the modules of flashrnn.nn call it: of h alone, a view.
            run=lambda x, W, R, b: recurrent_layer(
                x, W, R, b, function=case.function, return_states="h"
            )[0].squeeze(0),
            reference=reference,
            time=1,
            ours=True,
        )


@dataclass(frozen=True)
class Stack(Contender):
    """``LSTM``, ``GRU`` or ``RNN`` of a package, of several layers or directions.

    Attributes:
        package: ``flashrnn.nn`` or ``torch.nn``.
        layers: how many, of D inputs and D units each.
        directions: 1, or 2: then all but the first layer have 2·D inputs.
    """

    package: ModuleType
    layers: int
    directions: int

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        layers = f"{self.layers} layer" + "s" * (self.layers > 1)
        return f"{self.package.__name__}, {layers}" + ", bidirectional" * (self.directions > 1)

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return "with the products of input and W; gradients of x and all weights; [T, B, ...]"

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        return lacking(case.function)

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`. The numbers are the same for both packages."""
        kind = MODULES[case.function]
        x = leaf(case.T, case.B, case.D, dtype=case.dtype, device=device)
        sizes = (case.D, case.D, self.layers)
        options = {"bidirectional": self.directions > 1, "device": device, "dtype": case.dtype}
        theirs = kind(*sizes, **options)
        module = getattr(self.package, kind.__name__)(*sizes, **options)
        module.load_state_dict(theirs.state_dict())

        def reference(x: Tensor, *weights: Tensor) -> Tensor:
            given = iter(weights)
            for _ in range(self.layers):
                found = []
                for direction in range(self.directions):
                    towards = x.flip(0) if direction else x
                    h = as_flashrnn(case.function, towards, *(next(given) for _ in range(4)))
                    found.append(h.flip(0) if direction else h)
                x = torch.cat(found, -1)
            return x

        return Work(
            (x,),
            tuple(module.parameters()),
            # The module holds its weights itself.
            run=lambda x, *weights: module(x)[0],
            reference=reference,
            time=0,
            ours=self.package is nn,
            causal=self.directions == 1,
        )
