"""How much memory something holds on to when it is done again and again: objects, blocks of memory, resident bytes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Growth:
    """What there is more at the end than after the warm-up.

    Attributes:
        objects: that the garbage collector tracks.
        blocks: of memory that Python's allocator has given away: every number, string and object is one at least.
        resident: bytes of the process; what tensors take is in them.
    """

    objects: int
    blocks: int
    resident: int

    @property
    def none(self) -> bool:
        """Whether it is no growth: of thousands of rounds, one object or number each would be more."""
        return self.objects < 150 and self.blocks < 1000 and self.resident < 24 * 2**20


def growth_of(
    action: Callable[[int], object], *, rounds: int, warm: int, settle: Callable[[], object] = lambda: None
) -> Growth:
    """Does something ``warm`` times, and then ``rounds`` times between two looks at the memory.

    Args:
        action: told how often it was done before.
        rounds: that are looked at.
        warm: before that, so that caches are full.
        settle: called before each look; empties caches of other makers that are bounded, but not so soon.
    """
    for number in range(warm):
        action(number)
    settle()
    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    try:
        before = _looked_at()
        for number in range(warm, warm + rounds):
            action(number)
        settle()
        after = _looked_at()
    finally:
        gc.unfreeze()
    return Growth(*(end - start for start, end in zip(before, after, strict=True)))


def _looked_at() -> tuple[int, int, int]:
    gc.collect()
    gc.collect()
    return len(gc.get_objects()) + gc.get_freeze_count(), sys.getallocatedblocks(), psutil.Process().memory_info().rss
