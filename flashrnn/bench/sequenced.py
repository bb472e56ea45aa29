"""Calls whose sequences are cut, differ in length or run in both directions, beside plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from flashrnn import flashrnn
from flashrnn.bench.case import Case, leaf
from flashrnn.bench.contender import Contender, Work
from flashrnn.bench.ours import Ours
from flashrnn.bench.peers import TorchNN, as_flashrnn

PLAIN, RESET, EQUAL, UNIFORM, PACKED, BOTH, H = (
    "plain call",
    "resets",
    "equal lengths",
    "uniform lengths",
    "packed",
    "both directions",
    "h alone",
)
# Of each option, for a table's reader.
MEANING = {
    PLAIN: "no option",
    RESET: "one step in a hundred is cut from the one before",
    EQUAL: "all lengths are T, on the device",
    UNIFORM: "lengths uniform in 1 to T, on the device; padded",
    PACKED: "the same sequences without padding",
    BOTH: "2·N heads, half of them backwards: twice the work of the plain call",
    H: "only h is returned of every step",
}
RESETS = 0.01


def lengths_of(case: Case) -> Tensor:
    """Uniform in 1 to T; the same numbers for all who compute a case."""
    return torch.randint(1, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Sequenced(Contender):
    """``auto`` with one of the options above, on a given Wx.

    Attributes:
        option: a key of ``MEANING``.
    """

    option: str

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return self.option

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return f"{MEANING[self.option]}; Wx given; gradients of Wx, R, b; [B, T, ...]"

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        return None

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        if self.option == BOTH:
            case = replace(case, N=2 * case.N)
        work = Ours("auto").prepare(case, device)
        if self.option == PACKED:
            total = int(lengths_of(case).sum())
            sizes = (1, total, *work.inputs[0].shape[2:])
            work = replace(work, inputs=(leaf(*sizes, dtype=case.dtype, device=device),))
        options = cache(_options(self.option, case, device))

        def run(backend: str, Wx: Tensor, R: Tensor, b: Tensor) -> Tensor:
            given = options(Wx.shape[1])
            every = flashrnn(Wx, R, b, function=case.function, backend=backend, **given)[0]
            # Of h alone a view: the gradient of a choice takes zeros and a copy.
            return every.squeeze(0) if len(every) == 1 else every[0]

        return replace(
            work,
            run=lambda *leaves: run("auto", *leaves),
            reference=lambda *leaves: run("vanilla", *leaves),
            causal=self.option != BOTH,
        )


def _options(option: str, case: Case, device: torch.device) -> Callable[[int], dict[str, Any]]:
    """The arguments of a call of the first so many steps, or rows of a packed batch."""
    lengths = lengths_of(case).to(device)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    cuts = torch.rand(case.B, case.T, device=device) < RESETS
    given: dict[str, Callable[[int], dict[str, Any]]] = {
        PLAIN: lambda steps: {},
        RESET: lambda steps: {"reset": cuts[:, :steps].contiguous()},
        EQUAL: lambda steps: {"lengths": torch.full_like(lengths, steps)},
        UNIFORM: lambda steps: {"lengths": lengths.clamp_max(steps)},
        PACKED: lambda rows: {"cu_seqlens": bounds.clamp_max(rows)},
        BOTH: lambda steps: {"reverse": [n >= case.N // 2 for n in range(case.N)]},
        H: lambda steps: {"return_states": "h"},
    }
    return given[option]


@dataclass(frozen=True)
class PackedTorchNN(TorchNN):
    """``torch.nn`` on a ``PackedSequence``, which is made of a padded batch and padded again.

    Attributes:
        equal: whether all sequences have T steps.
    """

    equal: bool = False

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return f"{super().name}, PackedSequence"

    def output(self, module: nn.RNNBase, x: Tensor, case: Case) -> Tensor:
        """See :class:`TorchNN`."""
        packed = pack_padded_sequence(x, self._lengths(case), enforce_sorted=False)
        return pad_packed_sequence(module(packed)[0], total_length=case.T)[0]

    def reference(self, case: Case, *leaves: Tensor) -> Tensor:
        """See :class:`TorchNN`."""
        lengths = self._lengths(case).clamp_max(len(leaves[0])).to(leaves[0].device)
        return as_flashrnn(case.function, *leaves, lengths=lengths)

    def _lengths(self, case: Case) -> Tensor:
        return torch.full((case.B,), case.T) if self.equal else lengths_of(case)


@dataclass(frozen=True)
class TorchRL(Contender):
    """``torchrl.modules.LSTMModule`` with resets, by its Triton kernels, if torchrl is installed.

    One layer of the case's D inputs and D units, as :class:`~peers.TorchNN` without full width, in
    float32 whatever the case's dtype is: its default, whose products are TF32.

    Attributes:
        backend: its ``recurrent_backend``. Others than ``"triton"`` run on a CPU too.
    """

    backend: str = "triton"

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return f"torchrl {_version_of_torchrl() or ''}".rstrip() + f", {self.backend}"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return (
            f"1×{case.D}, float32 and TF32; {MEANING[RESET]}; with the product of input and W, "
            "and a TensorDict; gradients of x and all weights; [B, T, ...]"
        )

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        if case.function != "lstm":
            return f"it is measured as an LSTM, not as {case.function}"
        if _version_of_torchrl() is None:
            return "torchrl is not installed; pip install torchrl"
        if self.backend == "triton" and device.type != "cuda":
            return "its Triton kernels run on a GPU"
        return None

    def prepare(self, case: Case, device: torch.device) -> Work:
        """See :class:`Contender`."""
        from tensordict import TensorDict
        from torchrl.modules import LSTMModule

        module = LSTMModule(
            input_size=case.D,
            hidden_size=case.D,
            in_keys=["x", "h", "c"],
            out_keys=["output", ("next", "h"), ("next", "c")],
            recurrent_backend=self.backend,
            default_recurrent_mode=True,
            device=device,
        )
        rows = case.B, case.T
        cuts = torch.rand(rows, device=device) < RESETS
        # What resets go back to. A new TensorDict each time: the module writes its results there.
        zeros = torch.zeros(*rows, 1, case.D, device=device)

        def run(x: Tensor, *weights: Tensor) -> Tensor:
            given = {"x": x, "h": zeros, "c": zeros, "is_init": cuts.unsqueeze(-1)}
            output: Tensor = module(TensorDict(given, batch_size=rows))["output"]
            return output

        def reference(x: Tensor, *weights: Tensor) -> Tensor:
            reset = cuts[:, : x.shape[1]]
            return as_flashrnn("lstm", x.transpose(0, 1), *weights, reset=reset).transpose(0, 1)

        return Work(
            (leaf(*rows, case.D, dtype=torch.float32, device=device),),
            # The module holds its weights itself.
            tuple(module.parameters()),
            run=run,
            reference=reference,
            time=1,
            ours=False,
        )


@cache
def _version_of_torchrl() -> str | None:
    try:
        return metadata.version("torchrl")
    except metadata.PackageNotFoundError:
        return None
