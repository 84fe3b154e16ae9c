"""Memory that one training step frees and the next one needs again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USERS = {"GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
# Where glibc's own adjustment of the two ends.
_LARGEST_BLOCK, _LARGEST_REST = 2**25, 2**26


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps what is freed, as far as it can; afterwards the system gets back what is free.

    Otherwise it may hand a step's activations back after every step, and the next one waits until the system has
    filled as much memory with zeros: up to a fifth of a training's processor time. About as much memory is held
    meanwhile as the training takes at its peak. On other systems nothing happens, nor where the user's environment has
    settings of its own for glibc's memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and not _USERS & os.environ.keys() else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # How it was before cannot be asked; a process that has freed the largest of its blocks is at these.
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_REST)
        libc.malloc_trim(0)
