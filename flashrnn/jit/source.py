"""Generated Python source as a module, kept in the cache folder.

Triton reads a function's text from its file, so the text needs one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def cache_folder() -> Path:
    """``$FLASHRNN_CACHE_DIR``, or ``flashrnn`` in the user's cache folder."""
    given = os.environ.get("FLASHRNN_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashrnn"


def load_source(text: str) -> ModuleType:
    """The module with this text, the same one whenever the text is the same.

    Processes may race for the file: each writes its own and renames it into place. Where the
    cache folder cannot be written, a temporary file takes its place.
    """
    name = f"flashrnn_cell_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, _file(name, text))
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _file(name: str, text: str) -> Path:
    path = cache_folder() / f"{name}.py"
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, text)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="flashrnn-")) / f"{name}.py"
        _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".py")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
