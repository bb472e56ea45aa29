"""Backend ``cuda_fused`` without a GPU; see test_cuda.py for how.

The emulation gives copies to shared memory as late as a GPU may, so a missing wait shows.
"""

import pytest
import torch

from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.fused import DTYPES, OPTIONS, all_strided, hold_to_vanilla, poisoned  # noqa: F401
from tests.problems import BUILT_IN, call, random_inputs, relative_error, sparse, wide


def check(*problem, **options):
    hold_to_vanilla("cuda_fused", *problem, **options)


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN."""


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, wide], ids=str)
def test_equals_vanilla(on_the_cpu, kind, dtype):
    check(kind, 7, 5, 2, 40, dtype)
