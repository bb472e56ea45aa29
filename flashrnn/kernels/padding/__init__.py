"""Several tensors with more units, or without them again, in one launch."""

from flashrnn.kernels.padding.plan import (
    ENTRY,
    MOST,
    MOST_PIECES,
    RECORD,
    THREADS,
    Copy,
    program,
    share,
)

__all__ = ["ENTRY", "MOST", "MOST_PIECES", "RECORD", "THREADS", "Copy", "program", "share"]
