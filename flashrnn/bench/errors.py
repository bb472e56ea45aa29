"""Errors that stop the benchmark with a message instead of a traceback."""

from __future__ import annotations


class BenchError(Exception):
    """Something that the user can put right; the message says how."""
