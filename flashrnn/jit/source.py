"""Generated Python source as a module that exists in memory only.

No file is written, so no other file can be put in its place.
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

    A text that was loaded recently gives the same module again. Triton reads a function's source
    through :mod:`inspect`, which finds it for as long as the module exists.
    """
    # Triton identifies functions by their module's name, also in its cache on disk.
    name = f"flashrnn_cell_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    # A text may be loaded again while its first module is still in use. Each has lines of its own.
    filename = f"<{name} {next(_count)}>"
    module = ModuleType(name)
    module.__file__ = filename
    exec_text = compile(text, filename, "exec", dont_inherit=True)
    # With None for the time of the last change, linecache never looks for a file.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    weakref.finalize(module, linecache.cache.pop, filename, None)
    exec(exec_text, vars(module))
    return module
