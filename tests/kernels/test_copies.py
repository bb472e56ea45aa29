"""Several copies in one launch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrnn.backends import copies
from flashrnn.kernels import copies as plan
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.gpus import GPUS
from tests.machine_code import local_memory, needs_nvrtc


@needs_compiler
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=plan.MOST),
    added=st.lists(st.booleans(), min_size=plan.MOST, max_size=plan.MOST),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_each_has_its_elements_and_no_others(fused_emulation, counts, added, dtype):  # noqa: F811
    sources = [torch.randn(count).to(dtype) for count in counts]
    others = [torch.randn(count).to(dtype) for count in counts]
    # Each behind an element that stays as it is, and before one.
    found = [torch.full((count + 2,), torch.nan, dtype=dtype) for count in counts]
    addresses = []
    for source, other, plus, to in zip(sources, others, added, found, strict=False):
        addresses += [source.data_ptr(), other.data_ptr() if plus else 0, to[1:].data_ptr()]
    copies.enqueue(tuple(counts), addresses, dtype, torch.device("cpu"))
    for source, other, plus, to in zip(sources, others, added, found, strict=False):
        assert torch.equal(to[1:-1], source + other if plus else source)
        assert to[0].isnan() and to[-1].isnan()


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_compiles_without_local_memory(arch):
    """The list of copies is constants of the launch, from which each CTA takes one."""
    assert local_memory(plan.program("bfloat16"), arch) == (0, 0)
