"""Every Python block of README.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from flashrnn.cells import spec

README = Path(__file__).parent.parent / "README.md"
# (line of the block's first line, its text)
BLOCKS = [
    (README.read_text(encoding="utf-8")[: block.start(1)].count("\n") + 1, block[1])
    for block in re.finditer(
        r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


@pytest.fixture(autouse=True)
def _registry_left_as_it_was(monkeypatch):
    monkeypatch.setattr(spec, "_registered", dict(spec._registered))


def run(line: int, text: str) -> dict[str, object]:
    """The names that a block leaves behind; a traceback shows README's line numbers."""
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile("\n" * (line - 1) + text, str(README), "exec"), names)
    return names


def test_there_are_blocks():
    assert len(BLOCKS) == 11


@pytest.mark.parametrize(
    ("line", "text"), [pytest.param(*block, id=f"line {block[0]}") for block in BLOCKS]
)
def test_block(line, text):
    torch.manual_seed(0)
    names = run(line, text)
    # Of a call, of a step, whose states are the last ones, or of a layer.
    results = [name for name in ("states", "last_states", "output", "y") if name in names]
    assert results
    for name in results:
        found = names[name]
        assert all(torch.isfinite(x).all() for x in (found if type(found) is tuple else [found]))


@pytest.mark.gpu
def test_first_call_takes_the_gpu():
    names = run(*next(block for block in BLOCKS if "Wx = " in block[1]))
    assert names["states"].is_cuda
    assert names["Wx"].grad.is_cuda
