"""Several small copies in one launch."""

from flashrnn.kernels.copies.plan import ENTRY, MOST, RECORD, THREADS, program, share

__all__ = ["ENTRY", "MOST", "RECORD", "THREADS", "program", "share"]
