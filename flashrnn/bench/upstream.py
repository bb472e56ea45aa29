"""The upstream package, PyPI's ``flashrnn``, which has the same import name as this one.

So it runs in a separate process (``upstream_child.py``), one for each case: it compiles for every
batch size, and a failure ends only that process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from flashrnn.bench import check, timing
from flashrnn.bench.case import Case
from flashrnn.bench.contender import TIMES, Contender, Found, Work
from flashrnn.bench.errors import BenchError
from flashrnn.bench.ours import Ours

BACKENDS = ("cuda_fused", "cuda", "triton_fused")
PATIENCE = 400  # seconds for a case; its fused kernels take up to 100 to compile.


@dataclass(frozen=True)
class Upstream(Contender):
    """A backend of the upstream package.

    Attributes:
        backend: its name there.
        folder: where ``flashrnn`` is, as after ``pip install --target FOLDER flashrnn``.
    """

    backend: str
    folder: Path

    @property
    def name(self) -> str:
        """See :class:`Contender`."""
        return f"upstream {self.backend}"

    def includes(self, case: Case, device: torch.device) -> str:
        """See :class:`Contender`."""
        return (
            "Wx given; gradients of Wx, R, b; [B, T, ...], which it permutes; a process of its own"
        )

    def refusal(self, case: Case, device: torch.device, backward: bool) -> str | None:
        """See :class:`Contender`."""
        if case.function == "gru" and self.backend == "cuda_fused":
            return "upstream runs its cuda in the place of a fused GRU"
        return None

    def prepare(self, case: Case, device: torch.device) -> Work:
        """The data, and the reference; what is timed runs in another process."""
        return replace(Ours("vanilla").prepare(case, device), ours=False)

    def times(self, case: Case, device: torch.device, seconds: float) -> dict[str, Found]:
        """See :class:`Contender`."""
        return {
            name: self.attempt(
                case, device, backward, partial(self._time, case, device, backward, seconds)
            )
            for name, backward in TIMES.items()
        }

    def _time(self, case: Case, device: torch.device, backward: bool, seconds: float) -> Found:
        work = self.prepare(case, device)
        gradient = work.weights_of_loss()
        with tempfile.TemporaryDirectory() as folder:
            request, response = Path(folder) / "request.pt", Path(folder) / "response.pt"
            torch.save(
                {
                    "leaves": [x.detach() for x in work.leaves],
                    "gradient": gradient,
                    "function": case.function,
                    "backend": self.backend,
                    "dtype": case.dtype_name,
                    "backward": backward,
                    "seconds": seconds,
                },
                request,
            )
            self._run(request, response)
            answer = torch.load(response, map_location=device, weights_only=True)
        verdict = check.judge(
            check.Results(answer["output"], answer["gradients"], answer["finite"]),
            *work.truths(gradient, backward),
        )
        if verdict.reason:
            return Found.wrong(verdict)
        return Found.timed(timing.Timing(**answer["timing"]), verdict)

    def _run(self, request: Path, response: Path) -> None:
        # With -c the working folder comes first among those where Python looks for modules.
        child = Path(__file__).with_name("upstream_child.py").read_text(encoding="utf-8")
        files = [timing.__file__, check.__file__, str(request), str(response)]
        try:
            done = subprocess.run(
                [sys.executable, "-c", child, *files],
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no result after {PATIENCE} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1])


def check_folder(folder: Path) -> None:
    """Find the package before anything is measured.

    Raises:
        BenchError: it is not there.
    """
    if not (folder / "flashrnn" / "__init__.py").is_file():
        raise BenchError(
            f"--upstream {folder}: no package flashrnn there. "
            f"`pip install --target {folder} flashrnn` installs it"
        )
