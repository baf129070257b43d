"""The allocator of the process: glibc's is told to keep freed memory, which the next step asks for again."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), as in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30  # bytes of free memory at the heap's end that are not given back
# Bytes of an allocation that is mapped by itself, and given back when it is freed. Older versions of glibc take no
# more than the second.
MAPPED = (1 << 28, 1 << 25)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system after every tensor.

    By default it maps each tensor of a few dozen megabytes anew, and the system hands it over page by page, zeroed:
    scores of MHAR took up to two thirds more time so, training steps a tenth.

    Returns:
        Whether it was told so: not on another system, and not where the environment sets this itself
        (`GLIBC_TUNABLES`, `MALLOC_...`).
    """
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if told or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mapped = any(mallopt(MMAP_THRESHOLD, size) for size in MAPPED)
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and mapped
