"""Copies of tensors into rows of another length, several in one launch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrnn.backends import padding
from flashrnn.backends.protocols import Kind
from flashrnn.kernels import padding as plan
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.fused import poisoned  # noqa: F401
from tests.gpus import GPUS, planned
from tests.machine_code import local_memory, needs_nvrtc

DTYPES = torch.bfloat16, torch.float16, torch.float32


def right(x, kind, width, rows):
    """What a copy is to have, element by element."""
    columns = torch.arange(width)
    beyond = columns >= x.shape[-1]
    found = x[..., columns.where(~beyond, torch.tensor(0))]
    if kind is not Kind.GATES:
        found = torch.where(beyond, torch.zeros((), dtype=x.dtype), found)
    if kind is Kind.WEIGHTS:
        indices = torch.arange(rows)
        found = found[..., indices.where(indices < x.shape[-2], torch.tensor(0)), :]
    return found


@st.composite
def tensors(draw):
    """Tensors of up to five dimensions, contiguous or not, and how long their rows are to be."""
    rows, found = draw(st.integers(1, 40)), []
    for _ in range(draw(st.integers(1, plan.MOST))):
        kind, dtype = draw(st.sampled_from(Kind)), draw(st.sampled_from(DTYPES))
        least = 2 if kind is Kind.WEIGHTS else 1
        shape = draw(st.lists(st.integers(1, 5), min_size=least, max_size=5))
        shape[-1] = draw(st.integers(1, 40))
        if kind is Kind.WEIGHTS:
            shape[-2] = draw(st.integers(1, 40))
        order = draw(st.permutations(range(len(shape))))
        x = torch.randn([shape[i] for i in order]).to(dtype)
        x = x.permute([order.index(i) for i in range(len(shape))])
        if draw(st.booleans()):  # Every second of rows, and one start for all.
            x = x.repeat_interleave(2, 0)[::2][:1].expand(shape)
        # Whole pieces of 16 bytes, longer or shorter, or any number of elements.
        width = draw(st.one_of(st.integers(1, 6).map(lambda n: 8 * n), st.integers(1, 40)))
        found.append((x, kind, width))
    return found, rows


@needs_compiler
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tensors())
def test_each_has_its_elements(fused_emulation, poisoned, drawn):  # noqa: F811
    wanted, rows = drawn
    given = [x for x, _, _ in wanted]
    resize = padding.resizing(wanted, rows, given[0].device)
    for found, (x, kind, width) in zip(resize(given), wanted, strict=True):
        expected = right(x, kind, width, rows)
        assert found.is_contiguous() and found.dtype == x.dtype
        assert torch.equal(found, expected), (x.shape, x.stride(), kind, width, rows)


def test_calls_of_too_many_elements_are_not_padded():
    problem = planned("lstm", 4096, 1, 1999, torch.bfloat16)
    assert not padding.too_large(problem._replace(T=256), features=8000)
    assert padding.too_large(problem._replace(T=1024), features=0)
    # A layer's input may be larger.
    assert padding.too_large(problem._replace(T=256), features=8193)


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_compiles_without_local_memory(arch):
    """The list of copies is constants of the launch, from which each CTA takes one."""
    assert local_memory(plan.program(), arch) == (0, 0)
