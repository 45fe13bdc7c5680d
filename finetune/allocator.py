"""Memory allocation of the process: keep freed blocks, and use large pages. No torch here: it runs before torch loads.

A network's activations are blocks of tens of megabytes that are freed and wanted again in every batch. glibc gives such
blocks back to the system each time, and the system clears every page again: on a virtual machine that took half of the
processor's time (docs/log.md has the figures). Both settings only change where memory comes from.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_THRESHOLD = 32 * 2**20  # the most that glibc's mallopt(3) takes for M_MMAP_THRESHOLD on 64-bit systems
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch's switch: ask for transparent huge pages for large tensors


def tune_allocator() -> None:
    """Set up the process for large, short-lived blocks; does nothing where the system is not Linux with glibc.

    Settings that the user has made in the environment are left as they are.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
