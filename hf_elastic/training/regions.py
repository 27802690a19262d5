"""Unions of active regions: which entries of each parameter some subnet of a step used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""Half-open bounds per dimension of an index box."""

Boxes = tuple[tuple[slice, ...], ...]
"""Disjoint index boxes; ``()`` covers nothing."""


class ActiveUnion:
    """Collect what several architectures have active, and say it as disjoint boxes.

    Boxes of different architectures overlap without being nested (one is wide in rows, the other in columns),
    so each new box is cut by those already held: an update that runs over the boxes touches every entry once.
    """

    def __init__(self) -> None:
        self._boxes: dict[str, list[Box]] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def clear(self) -> None:
        """Forget everything."""
        self._boxes.clear()
        self._count = 0

    def add(self, regions: Mapping[str, Boxes], parameters: Mapping[str, Tensor]) -> None:
        """Add what one architecture has active.

        Args:
            regions: boxes by name of the parameter, as :meth:`hf_elastic.Supernet.active_regions` returns
                them. A parameter that is not named is wholly active (one of a layer that can be skipped is
                named by some architectures and not by others).
            parameters: the parameters by name, for their shapes.
        """
        if self._count == 0:
            self._boxes = {name: [] for name in regions}
        self._count += 1
        self._boxes = {name: held for name, held in self._boxes.items() if name in regions}
        for name, held in self._boxes.items():
            for box in regions[name]:
                held.extend(_cut(_bounds(box, parameters[name]), held))

    def boxes(self, name: str, parameter: Tensor) -> Boxes | None:
        """Return the active entries of a parameter as disjoint boxes, ``None`` where all of it is active."""
        held = self._boxes.get(name)
        if held is None or sum(_volume(box) for box in held) == parameter.numel():
            return None
        return tuple(tuple(slice(start, stop) for start, stop in box) for box in held)


def _bounds(box: tuple[slice, ...], parameter: Tensor) -> Box:
    # A box may name fewer dimensions than the parameter has: the others are wholly active.
    named = [s.indices(size)[:2] for s, size in zip(box, parameter.shape, strict=False)]
    return (*named, *((0, size) for size in parameter.shape[len(box) :]))


def _volume(box: Box) -> int:
    volume = 1
    for start, stop in box:
        volume *= max(0, stop - start)
    return volume


def _cut(box: Box, others: list[Box]) -> list[Box]:
    """Return disjoint boxes that cover ``box`` without ``others``."""
    pieces = [box] if _volume(box) else []
    for other in others:
        pieces = [rest for piece in pieces for rest in _minus(piece, other)]
    return pieces


def _minus(box: Box, other: Box) -> Iterator[Box]:
    """Yield at most two boxes per dimension that cover ``box`` without ``other``."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True)]
    if any(start >= stop for start, stop in common):
        yield box
        return
    for axis, (start, stop) in enumerate(common):
        low, high = box[axis]
        before, after = tuple(common[:axis]), box[axis + 1 :]
        if low < start:
            yield (*before, (low, start), *after)
        if stop < high:
            yield (*before, (stop, high), *after)
