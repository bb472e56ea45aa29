"""A small workload for compute-sanitizer: ``python -m tests.sanitized BACKEND [steps]``.

It covers every tiling of the kernels, without and with options of sequences, at sizes that a
sanitizer can finish. With ``steps`` the backend computes step by step, with the library's product,
wherever it can.
"""

import sys

import pytest
import torch

from tests.problems import call, gradients, random_inputs, sparse
from tests.sequences import KINDS, gradients_of, random_ragged
from tests.steps import by_steps

WORKLOAD = [
    ("lstm", (3, 4, 2, 64), torch.bfloat16),
    ("gru", (17, 3, 2, 24), torch.float16),
    ("slstm", (5, 4, 1, 128), torch.bfloat16),
    (sparse, (2, 3, 1, 41), torch.float32),
    ("lstm", (300, 2, 2, 32), torch.bfloat16),
    ("lstm", (40, 2, 8, 64), torch.float32),
    ("lstm", (125, 3, 12, 64), torch.bfloat16),
    ("slstm", (250, 2, 12, 64), torch.float16),
    ("gru", (200, 2, 24, 25), torch.bfloat16),
    ("lstm", (3, 4, 2, 256), torch.bfloat16),
    ("gru", (9, 3, 1, 320), torch.float16),
    ("elman", (40, 3, 1, 256), torch.float16),
    ("slstm", (9, 4, 1, 136), torch.bfloat16),
    ("gru", (40, 3, 5, 248), torch.bfloat16),
    ("lstm", (3, 4, 2, 260), torch.bfloat16),
    ("slstm", (40, 2, 1, 768), torch.bfloat16),
    ("gru", (180, 2, 1, 1000), torch.float16),
    ("lstm", (130, 3, 1, 512), torch.bfloat16),
    ("lstm", (250, 3, 1, 768), torch.bfloat16),
    (sparse, (2, 3, 1, 200), torch.float32),
]

if __name__ == "__main__":
    backend, *way = sys.argv[1:]
    if way == ["steps"]:
        by_steps(pytest.MonkeyPatch())
    for kind, sizes, dtype in WORKLOAD:
        inputs = random_inputs(kind, *sizes, dtype, "cuda")
        # Beyond what small heads in float32 can split.
        with torch.no_grad():
            inputs.states[0, 0] *= 1e-12
        gradients(call(kind, inputs, backend=backend), inputs)
        torch.cuda.synchronize()
        # Lengths and packed rows with resets, in both directions; sequences without a step.
        for kinds in KINDS[-2:]:
            case = random_ragged(kind, *sizes, dtype=dtype, device="cuda", **kinds)
            gradients_of(case, case.call(backend))
            torch.cuda.synchronize()
    print(
        f"{backend} {way}: ran {len(WORKLOAD)} problems, each without and with options of sequences"
    )
