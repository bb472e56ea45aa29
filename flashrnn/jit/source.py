"""Generated Python source as a module that exists in memory alone.

No file is written, so none can be put in its place: what runs is compiled from the text itself.
"""

from __future__ import annotations

import hashlib
import itertools
import linecache
import weakref
from functools import lru_cache
from types import ModuleType

_count = itertools.count()


@lru_cache(maxsize=256)
def load_source(text: str) -> ModuleType:
    """The module with this text.

    Texts that were asked for lately give the same module again. Triton reads a function's text
    through :mod:`inspect`, which finds it for as long as the module is in use.
    """
    # Triton tells functions apart by their module's name, on disk too.
    name = f"flashrnn_cell_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    # Two modules of one text, of which one is forgotten, share no lines.
    filename = f"<{name} {next(_count)}>"
    module = ModuleType(name)
    module.__file__ = filename
    exec_text = compile(text, filename, "exec", dont_inherit=True)
    # Lines without a time of change are never looked for in a file.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    weakref.finalize(module, linecache.cache.pop, filename, None)
    exec(exec_text, vars(module))
    return module
