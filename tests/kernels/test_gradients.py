"""What follows a backward scan: the products that sum over all rows."""

import pytest
import torch

from flashrnn.backends import gradients


@pytest.mark.parametrize("parts", [1, 4, 16])
@pytest.mark.parametrize("strided", [False, True])
def test_products_in_parts_are_those_of_the_whole(monkeypatch, parts, strided):
    monkeypatch.setattr(gradients, "_parts", lambda a, b: parts)
    a = torch.randn(64, 7 if strided else 5, dtype=torch.float64)[:, :5]
    b = torch.randn(64, 3, dtype=torch.float64)
    torch.testing.assert_close(gradients.over_rows(a, b), a.t() @ b, rtol=1e-12, atol=1e-12)


def test_h_before_each_step_is_copied_to_each_place():
    """By words of 8 bytes, where rows are a whole number of them and begin at one, or elements."""
    for width, offset in ((4, 0), (4, 1), (3, 0)):
        h = torch.randn(offset + 2 * 3 * width).bfloat16()[offset:].view(2, 3, 1, width)
        initial = torch.randn(2, 1, 1, width)
        found = gradients._shifted(initial, h, 3)
        before = torch.cat([initial.bfloat16(), h[:, :-1]], 1).view(6, 1, 1, width)
        assert torch.equal(found, before.expand(-1, 3, -1, -1))


@pytest.mark.gpu
def test_long_products_by_tf32(monkeypatch):
    """They are summed in parts, and right."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    a, b = torch.randn(65536, 256, device="cuda"), torch.randn(65536, 64, device="cuda")
    assert gradients._parts(a, b) == 16 and gradients._parts(a[1:], b[1:]) == 1
    for x, y in ((a, b), (a[1:], b[1:])):
        given, expected = gradients.over_rows(x, y), x.double().t() @ y.double()
        assert (given - expected).norm() / expected.norm() < 2e-3
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert gradients._parts(a, b) == 1
