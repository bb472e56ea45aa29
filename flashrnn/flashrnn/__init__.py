"""Upstream's import paths. What they name is in :mod:`flashrnn.compat`.

As there, ``flashrnn.flashrnn`` is the function, ``from flashrnn.flashrnn import ...`` finds this
package, and ``flashrnn.flashrnn.flashrnn`` a module of it.
"""

# From the module of that name, so that it is loaded before the function takes the name.
from flashrnn.flashrnn.flashrnn import FlashRNNConfig, flashrnn

__all__ = ["FlashRNNConfig", "flashrnn"]
