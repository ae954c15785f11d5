"""Memory of a process that runs for months: what is no longer used goes back to the machine.

Batches end in reference cycles with their tensors, which wait for a full collection; in a process with hundreds of
thousands of objects that are never freed (the libraries), Python hardly ever makes one. And the C library keeps what
was freed: a load of many shapes leaves it in pieces. Measured with 16 rows of a small model: 10 MB more per 100 replies
without these two, none with them.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache


def settle() -> None:
    """Take all that exists now for what stays: collections look at newer objects alone and take milliseconds."""
    gc.collect()
    gc.freeze()


def tidy() -> None:
    """Free cycles, and give the machine back what is free."""
    gc.collect()
    trim = _trimming()
    if trim is not None:
        trim(0)


@cache
def _trimming() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; other C libraries have none."""
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
