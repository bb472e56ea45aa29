"""A small workload for compute-sanitizer: ``python -m tests.sanitized BACKEND [WORD ...] [K/N]``.

It covers every tiling of the kernels, without and with options of sequences, at sizes that a
sanitizer can finish. With ``steps`` the backend computes step by step, with the library's product,
wherever it can; with ``padded`` heads have additional units, wherever they can. ``2/4`` is the
second of four parts, which may run at once.
"""

import sys
from dataclasses import replace

import pytest
import torch

from flashrnn import nn, recurrent_layer
from tests.layers import NAMES, layer_inputs, results
from tests.padding import with_additional_units
from tests.problems import call, gradients, random_inputs, sparse
from tests.sequences import KINDS, gradients_of, random_ragged
from tests.steps import by_steps

WORKLOAD = [
    ("lstm", (3, 4, 2, 64), torch.bfloat16),
    ("gru", (17, 3, 2, 24), torch.float16),
    ("slstm", (5, 4, 1, 128), torch.bfloat16),
    (sparse, (2, 3, 1, 41), torch.float32),
    ("lstm", (300, 2, 2, 32), torch.bfloat16),
    ("slstm", (70, 2, 2, 33), torch.float16),
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
    ("lstm", (1030, 3, 1, 264), torch.float16),
    ("gru", (1000, 2, 1, 768), torch.bfloat16),
    ("lstm", (16, 2, 1, 1536), torch.bfloat16),
    ("gru", (16, 2, 1, 2048), torch.bfloat16),
    (sparse, (2, 3, 1, 200), torch.float32),
    # CTAs share the tiles of gradients over so many rows.
    ("lstm", (60, 20, 2, 40), torch.float16),
    ("gru", (60, 20, 1, 136), torch.float32),
    # Rows that are no whole pieces of 16 bytes.
    ("lstm", (3, 5, 2, 133), torch.bfloat16),
    ("gru", (70, 3, 1, 139), torch.float32),
]
# Resets of rows that are not looked up; lengths and packed rows with resets, in both directions,
# and sequences without a step.
OPTIONS = [{"resets": "step"}, *KINDS[-2:]]

if __name__ == "__main__":
    backend, *further = sys.argv[1:]
    if "steps" in further:
        by_steps(pytest.MonkeyPatch())
    if "padded" in further:
        with_additional_units(pytest.MonkeyPatch())
    part, parts = next((map(int, x.split("/")) for x in further if "/" in x), (1, 1))
    mine = WORKLOAD[part - 1 :: parts]
    for kind, sizes, dtype in mine:
        inputs = random_inputs(kind, *sizes, dtype, "cuda")
        # Beyond what small heads in float32 can split.
        with torch.no_grad():
            inputs.states[0, 0] *= 1e-12
        gradients(call(kind, inputs, backend=backend), inputs)
        with torch.no_grad():
            # Of one step, some kernels are others.
            call(kind, replace(inputs, Wx=inputs.Wx[:, :1]), backend=backend)
        # Of few rows a layer's products are kernels of their own. Of an odd number of features they
        # copy elements one by one.
        for features in (24, 33):
            leaves = layer_inputs(kind, *sizes[:2], features, *sizes[2:], dtype, device="cuda")
            results(recurrent_layer, leaves, NAMES, kind, backend)
        if kind == "gru":
            # torch.nn's weights are brought into a call's form, and gradients back.
            B, T, N, D = sizes
            of_torch = {"heads": N, "backend": backend, "device": "cuda", "dtype": dtype}
            x = torch.randn(T, B, 24, device="cuda", dtype=dtype)
            nn.GRU(24, N * D, **of_torch)(x)[0].sum().backward()
        torch.cuda.synchronize()
        for kinds in OPTIONS:
            case = random_ragged(kind, *sizes, dtype=dtype, device="cuda", **kinds)
            gradients_of(case, case.call(backend))
            torch.cuda.synchronize()
    print(
        f"{backend} {further}: ran {len(mine)} problems, each without and with options of sequences"
    )
