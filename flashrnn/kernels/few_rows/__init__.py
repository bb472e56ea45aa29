"""Products over few rows, where a call of the library's costs more than the product.

The input product of a layer, and all gradients that follow from those of the gates. Of many rows
they are the library's, or the kernels' of the regimes.
"""

from flashrnn.kernels.few_rows.plan import (
    THREADS,
    Program,
    Summed,
    Tiles,
    gradients,
    product,
    product_tiles,
    scratch,
    shared,
    takes,
    takes_product,
)

__all__ = [
    "THREADS",
    "Program",
    "Summed",
    "Tiles",
    "gradients",
    "product",
    "product_tiles",
    "scratch",
    "shared",
    "takes",
    "takes_product",
]
