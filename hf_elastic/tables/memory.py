"""Memory of a process that is timed: kept between forwards, so that none pays for asking the system for it again."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_NEVER = -1
_LARGEST_THRESHOLD = 32 * 2**20  # to which glibc raises its threshold by itself, the other one to twice as much
_USUAL_MMAPS = 65536


@contextmanager
def steady_memory() -> Iterator[None]:
    """Lets glibc keep freed memory for the length of a ``with`` block; elsewhere nothing changes.

    By default it gives large pieces back to the system and gets new ones, page by page, with the next forward: whether
    it does depends on what the process did before, and on how large the pieces are. Of MiniLM at 16 x 128 tokens the
    parent lost a fifth of its time to it and a narrow child nothing, until the repair had made the heap larger: the
    child was predicted to be 2.1 times as fast, and turned out to be 1.6 times as fast. So with all of it kept, which
    is what a server with an allocator of its own has, both are timed alike. Afterwards memory is given back, and the
    thresholds are those that glibc itself arrives at in a process that uses large pieces.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _USUAL_MMAPS)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        library.malloc_trim(0)
