"""Several small copies in one launch."""

from flashrnn.kernels.copies.plan import (
    ENTRY,
    MOST,
    MOST_RESULTS,
    RECORD,
    THREADS,
    program,
    share,
    share_results,
)

__all__ = [
    "ENTRY",
    "MOST",
    "MOST_RESULTS",
    "RECORD",
    "THREADS",
    "program",
    "share",
    "share_results",
]
