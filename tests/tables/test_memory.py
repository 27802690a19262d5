"""Memory that is kept between forwards: no page is asked for twice, and afterwards it is given back."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from hf_elastic.tables import memory
from hf_elastic.tables.memory import steady_memory

MEBIBYTES = 64  # beyond what glibc ever keeps by itself
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")


def faults() -> int:
    """Pages that the system had to give to make and free one large tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MEBIBYTES * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_memory_is_kept_between_forwards_and_given_back_afterwards() -> None:
    faults()
    before = resident()
    with steady_memory():
        faults()
        assert max(faults() for _ in range(5)) < MEBIBYTES // 4  # in pages of 2 MiB a new tensor takes twice as many
    assert resident() < before + MEBIBYTES * 2**20 // 4
    assert min(faults() for _ in range(5)) >= MEBIBYTES // 4


@glibc
def test_memory_is_given_back_where_what_is_timed_fails() -> None:
    before = resident()
    with pytest.raises(KeyboardInterrupt), steady_memory():
        faults()
        raise KeyboardInterrupt
    assert resident() < before + MEBIBYTES * 2**20 // 4


def test_where_there_is_no_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str | None) -> object:
        raise AssertionError("a library was opened")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", never)
    with steady_memory():
        torch.ones(4)
