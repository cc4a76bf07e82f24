# SPDX-License-Identifier: Apache-2.0
"""Lets the C library keep the memory that one private step frees for the next.

A private step holds every layer's output gradients until all norms are known and frees them together. glibc gives
the top of its heap back to the system then, and the next step faults it in again, a page of zeros at a time: a third
of what privacy cost a small model. On a GPU torch's own allocator keeps memory in the same way.
"""

import ctypes
import functools
import os
import sys

KEPT_BYTES = 2**31 - 1
"""Freed memory at the top of the heap that is kept; the largest value that glibc takes."""

LARGEST_BLOCK = 32 << 20
"""Blocks below are of the heap, larger ones are mapped one by one; glibc moves its own threshold as far as this."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@functools.cache
def keep_freed_memory() -> bool:
    """Set glibc's thresholds for this process, once; return whether they were set.

    Nothing is set without glibc, or where the environment sets one of them (``MALLOC_TRIM_THRESHOLD_``, ...,
    ``GLIBC_TUNABLES``).
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name in os.environ for name in _VARIABLES) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    return all(
        library.mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1
        for option, value in ((_M_MMAP_THRESHOLD, LARGEST_BLOCK), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    )
