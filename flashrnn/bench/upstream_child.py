"""Runs and times the upstream package; started by ``upstream.py``.

Its ``flashrnn`` is upstream's: of this package it gets two files, by their path.
"""

import dataclasses
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor


def load(name: str, path: str) -> Any:
    """The module in a file."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def main(timing_file: str, check_file: str, request_file: str, response_file: str) -> None:
    """Answer a request."""
    timing, check = load("timing", timing_file), load("check", check_file)
    from flashrnn import flashrnn

    asked = torch.load(request_file, weights_only=True)
    Wx, R, b = (x.requires_grad_() for x in asked["leaves"])
    backward = asked["backward"]

    options = {name: asked[name] for name in ("function", "backend", "dtype")}

    def run(Wx: Tensor, R: Tensor, b: Tensor) -> Tensor:
        return flashrnn(Wx, R, b, **options)[0][0]

    found = check.results(run, (Wx, R, b), 1, 1, asked["gradient"], backward)
    taken = timing.measure(run, (Wx,), (R, b), backward, asked["seconds"])
    answer = {
        "output": found.output.contiguous(),
        "gradients": [x.contiguous() for x in found.gradients],
        "finite": found.finite,
        "timing": dataclasses.asdict(taken),
    }
    torch.save(answer, response_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
