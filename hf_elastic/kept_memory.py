"""Memory of a process that is timed: kept between forwards, so that none pays for asking the system for it again."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_NEVER = -1
_LARGEST_THRESHOLD = 32 * 2**20  # to which glibc raises its threshold by itself, the other one to twice as much
_USUAL_MMAPS = 65536
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = ("malloc.trim_threshold", "malloc.mmap_threshold", "malloc.mmap_max", "malloc.top_pad")
_LOCK = threading.Lock()
_OPEN: list[None] = []  # an entry for each block that is open, in whichever thread


def keeps_memory() -> bool:
    """Whether :func:`steady_memory` does something: with glibc, unless its user has set when memory is given back."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    own = any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)
    return platform.libc_ver()[0] == "glibc" and not own


@contextmanager
def steady_memory() -> Iterator[None]:
    """Lets glibc keep freed memory while a function that it decorates, or a ``with`` block, runs.

    By default glibc gives large pieces back to the system and gets new ones, page by page, with the next forward.
    Whether it does depends on what the process did before and on how large the pieces are, so the same two models
    compare otherwise from one process to the next. With all of it kept, which is what a server with an allocator of
    its own has, they compare by what they compute. That is so in the main thread; other threads get part of it. The
    heap may grow by a few pieces more than are in use.

    Afterwards memory is given back. The thresholds of the process are then those that glibc arrives at by itself where
    large pieces are used, and stay there. As a decorator it ends behind the function's own variables, models among
    them. Where :func:`keeps_memory` is false, nothing changes.
    """
    if not keeps_memory():
        yield
        return
    library = ctypes.CDLL(None)
    try:
        with _LOCK:
            _OPEN.append(None)
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _NEVER)
        yield
    finally:
        with _LOCK:
            _OPEN.pop()
            if not _OPEN:
                library.mallopt(_MMAP_MAX, _USUAL_MMAPS)
                library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
                library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
                library.malloc_trim(0)
