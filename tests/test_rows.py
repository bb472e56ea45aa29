"""Copies by wide elements: the bits of PyTorch's own, whatever the layout."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrnn import rows

LAYOUTS = st.tuples(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)


def any_bits(count: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN of every kind among them."""
    generator = torch.Generator().manual_seed(count)
    of_bytes = torch.randint(256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return of_bytes.view(dtype)


@settings(max_examples=300, deadline=None)
@given(LAYOUTS)
def test_any_layout_keeps_its_bits(layout):
    """Rows of any width that begin anywhere, with gaps between them."""
    A, B, width, offset, gap, dtype = layout
    pitch = width + gap
    memory = any_bits(offset + A * B * pitch, dtype)
    x = memory.as_strided((B, A, width), (pitch, B * pitch, 1), offset)
    with patch.object(rows, "FEWEST", 1):
        found = rows.contiguous(x)
    wide = rows.widened(x)[0].contiguous().view(dtype)
    for each in (found, wide):
        assert each.is_contiguous() and each.shape == x.shape and each.dtype == dtype
        assert torch.equal(each.view(torch.uint8), x.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("width", "offset", "expected"),
    [(64, 0, torch.complex128), (64, 4, torch.int64), (60, 0, torch.int64), (63, 0, torch.float16)],
)
def test_the_widest_elements_of_which_rows_consist(width, offset, expected):
    x = torch.zeros(offset + 3 * 4 * width, dtype=torch.float16)[offset:].view(3, 4, width)
    assert x.data_ptr() % 16 == offset * 2 % 16
    assert rows.widened(x.transpose(0, 1))[0].dtype == expected
    # Of several all.
    assert rows.widened(torch.zeros(2, 64, dtype=torch.float16), x)[0].dtype == expected


def test_is_differentiable_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(rows, "FEWEST", 1)
    x = torch.randn(3, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(rows.contiguous(x.transpose(0, 1)).square().sum(), x)
    assert torch.equal(gradient, 2 * x)
