"""Memory of a process that is timed: kept between forwards, so that none pays for asking the system for it again."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_NEVER = -1
_LARGEST_THRESHOLD = 32 * 2**20  # to which glibc raises its threshold by itself, the other one to twice as much
_USUAL_MMAPS = 65536
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = ("malloc.trim_threshold", "malloc.mmap_threshold", "malloc.mmap_max", "malloc.top_pad")
_NOT_OF_THE_HEAP = 0x4  # in the word before a piece that glibc gave: it comes from an arena beside the main one
_BEYOND_CACHES = 4096  # bytes; smaller pieces may be old ones from a thread's cache
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
    its own has, they compare by what they compute. The heap may grow by a few pieces more than are in use.

    Only the process's heap can be kept whole. Other threads than the main one do not use it, nor does that one once an
    allocation of it has failed: there glibc gives back what is beyond 64 MiB, and a warning says so.

    Afterwards memory is given back. The thresholds of the process are then those that glibc arrives at by itself where
    large pieces are used, and stay there. As a decorator it ends behind the function's own variables, models among
    them. Where :func:`keeps_memory` is false, nothing changes.
    """
    if not keeps_memory():
        yield
        return
    library = ctypes.CDLL(None)
    if not _uses_the_heap(library):
        warnings.warn(
            "memory is kept in part only while models are timed, as this is not the main thread or an allocation "
            "failed in this process before: large models may seem slower than they are; time them in a new process",
            stacklevel=3,
        )
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


def _uses_the_heap(library: ctypes.CDLL) -> bool:
    """Whether glibc gives this thread memory from the process's heap, by the mark that it leaves on each piece."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    piece = library.malloc(_BEYOND_CACHES)
    if not piece:
        return False
    try:
        return not ctypes.c_size_t.from_address(piece - ctypes.sizeof(ctypes.c_size_t)).value & _NOT_OF_THE_HEAP
    finally:
        library.free(piece)
