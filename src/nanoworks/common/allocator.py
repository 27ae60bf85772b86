"""Keep freed memory in the process instead of returning it to the kernel after every tensor.

A training step on a CPU allocates and frees the same buffers again and again. With glibc's defaults each
large one is mapped, faulted in page by page and unmapped: 15-20% of a small model's step.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve tensors from its heap and not to shrink it; return whether it did.

    Affects the whole process from then on; its memory never falls below its peak. Does nothing
    where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  (musl has a mallopt that does nothing)
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    results = [mallopt(key, value) for key, value in settings.items()]
    return all(result == 1 for result in results)
