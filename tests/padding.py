"""Additional units wherever a call may have them, whatever the estimates say."""

from functools import lru_cache

import pytest

from flashrnn.backends import cuda_fused
from flashrnn.kernels import registry


def with_additional_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they cost the host nothing."""
    monkeypatch.setattr(registry, "_HOST_OF_PADDING", (-(10**9), -(10**9)))
    for module, name in ((registry, "padded_units"), (cuda_fused, "_padded_units")):
        # With caches of their own.
        monkeypatch.setattr(module, name, lru_cache(getattr(module, name).__wrapped__))
