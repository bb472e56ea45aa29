"""Steps one at a time by ``cuda_fused``: a launch that is prepared once for all steps alike."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends.fused import plans, scans
from flashrnn.jit import launch
from flashrnn.kernels import call, source
from flashrnn.problem import Problem


class Steps:
    """Launches of the scan's kernel for T = 1 and tensors of one layout, each prepared once.

    The new states may take the place of those before the step: in every kernel of many steps the
    thread that writes an element of the last states is the only one that has read it for a result,
    and other threads get h of it only from this thread. A kernel of one step need not be so: it is
    taken for other memory alone.
    """

    def __init__(self, problem: Problem, R: Tensor, b: Tensor) -> None:
        self._problem, self._R, self._b = problem, R, b
        self._is_float32 = problem.dtype == torch.float32
        self._precision = source.precision_of(problem)
        self._prepared: dict[tuple[object, ...], _Step] = {}
        self._lock = threading.Lock()

    def __call__(self, wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
        """See :data:`flashrnn.backends.Run`."""
        if out is None:
            out = states.new_empty(states.shape)
        elif out.data_ptr() % 16:
            # Kernels may write several states at once. What PyTorch allocates begins so.
            return out.copy_(self(wx, states, None))
        else:
            # So that autograd knows that its values change, as if an operation of PyTorch wrote it.
            torch.autograd.graph.increment_version(out)
        if not self._problem.B:
            return out
        # Of float32, as PyTorch is set at this time.
        precision = source.precision_of(self._problem) if self._is_float32 else self._precision
        where = plans.stream_of(self._problem)
        in_place = out.data_ptr() == states.data_ptr()
        if where is None:
            # The scratch memory of a launch in a graph is the graph's.
            found = self._prepare(precision, wx, states, out, in_place)
        else:
            # Launches on two streams may overlap, so each stream has scratch memory of its own.
            key = wx.data_ptr() % 16, precision, where, in_place
            found = self._prepared.get(key) or self._remember(
                key, self._prepare(precision, wx, states, out, in_place)
            )
        if found.copies_wx:
            wx = wx.clone(memory_format=torch.contiguous_format)
        with self._lock:
            found.launch(wx, states, out)
        return out

    def _remember(self, key: tuple[object, ...], prepared: _Step) -> _Step:
        with self._lock:
            while len(self._prepared) >= MOST_STEPS:
                # Its scratch memory goes back to its stream, behind the launches that use it.
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = prepared
        return prepared

    def _prepare(
        self, precision: str, wx: Tensor, states: Tensor, out: Tensor, in_place: bool
    ) -> _Step:
        problem = self._problem
        every_state = wx.new_empty(len(states), problem.B, 1, problem.N, problem.D)
        tensors = {
            # What differs from step to step comes first.
            "Wx": wx.unsqueeze(1),
            "initial": states.unsqueeze(2),
            "last_states": out,
            "R": self._R,
            "b": self._b,
            "states": every_state,
        }
        options = source.forward_options(False)
        addresses, layout = call.FORWARD.read(tensors)
        gpu = plans.gpu_of(problem)
        given = problem, gpu, False, precision, options, layout
        prepared = scans.prepare(*given, in_place=in_place)
        if prepared.copied:
            copy = wx.clone(memory_format=torch.contiguous_format)
            return self._prepare(precision, copy, states, out, in_place)._replace(copies_wx=True)
        with torch.inference_mode(False):
            # Later steps write it too, within inference mode or not.
            memory, of_scratch, zeros = scans.scratch_memory(prepared.scratch, wx)
        addresses += of_scratch
        ((kernel, shape, packing),) = prepared.launches
        return _Step(
            kernel.kept(shape, packing(addresses), zeros),
            packing.places(3, len(addresses)),
            (kernel, every_state, *memory),
        )


MOST_STEPS = 16


class _Step(NamedTuple):
    """A launch that lacks the addresses of a step's tensors.

    Attributes:
        kept: the launch, on the stream that it was prepared for.
        places: which of its arguments are the addresses of wx, states and out.
        held: what must be there for as long as the launch: its kernel, and memory that is its own,
            packets and the states in the problem's dtype.
        copies_wx: whether the kernel needs a copy of wx, whose rows are aligned.
    """

    kept: launch.Kept
    places: tuple[int, ...]
    held: tuple[object, ...]
    copies_wx: bool = False

    def launch(self, wx: Tensor, states: Tensor, out: Tensor) -> None:
        """Enqueue it; one thread at a time."""
        arguments, (of_wx, of_states, of_out) = self.kept.arguments, self.places
        arguments[of_wx] = wx.data_ptr()
        arguments[of_states] = states.data_ptr()
        arguments[of_out] = out.data_ptr()
        self.kept.enqueue()
