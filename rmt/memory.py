"""Freed memory, kept for the next step: pages given back to the system are faulted in again, 4 KiB at a time."""

import ctypes
import sys

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MIB = 2**20


def keep_freed_memory() -> bool:
    """Tells this process's allocator to keep what is freed. Returns whether it can; glibc alone can.

    By default glibc maps every large block anew and gives it back when it is freed. A training step frees and allocates
    the same few GiB of activations again and again, and each 4 KiB of them costs a page fault: `bench/train_step.py
    --malloc default` shows how much. `rmt` commands call this; a library's user decides. Blocks above 1 GiB are mapped
    all the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_THRESHOLD, 1024 * MIB), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])
