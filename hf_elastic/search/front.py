"""Which points no other point dominates: smaller is better in every column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]  # (N,) int64 or float64, finite
Columns = Sequence[Column]
Positions = NDArray[np.intp]

_PAIRWISE = 96  # points up to which each is compared with each
_COMPARISONS = 1 << 22  # of one NumPy call


def nondominated(columns: Columns, *, keys: Column | None = None) -> Positions:
    """Return the positions of the points that no other one dominates; of equal points the first only.

    A point dominates another one when it is at most as large in every column and the two differ. One column
    takes a minimum, two a sort and a running minimum, three the divide and conquer of Kung, Luccio and
    Preparata (1975, DOI 10.1145/321906.321910) in O(N log² N); with more columns its two halves are compared
    pair by pair.

    Args:
        columns: At least one, ``(N,)`` each.
        keys: ``(N,)`` integers: only points of the same key dominate each other. By default all are.

    Returns:
        ``(M,)`` positions in ascending order of key, then of the columns, first to last.
    """
    if not len(columns[0]):
        return np.empty(0, np.intp)
    # Sorted lexicographically, only an earlier point dominates a later one. lexsort is stable; two columns need the
    # first one sorted only.
    by = columns[:1] if len(columns) == 2 else columns
    order = np.lexsort(by[::-1] if keys is None else (*by[::-1], keys))
    points = [column[order] for column in columns]
    runs = np.zeros(len(order), np.intp) if keys is None else _numbered(keys[order])
    kept: Positions = order[_undominated(points, runs)]
    return kept


def _numbered(ordered: Column) -> Positions:
    """Return for each entry the number of its run of equal entries, from 0."""
    return np.append(0, np.cumsum(ordered[1:] != ordered[:-1]))


def _undominated(columns: Columns, runs: Positions) -> Positions:
    """Return positions of sorted points that none of their run dominates."""
    if len(columns) == 1:
        first: Positions = np.flatnonzero(np.append(True, runs[1:] != runs[:-1]))
        return first
    if len(columns) == 2:
        return _staircase(columns[0], columns[1], runs)
    bounds = np.searchsorted(runs, np.arange(int(runs[-1]) + 2))
    found = [_conquered(columns, np.arange(start, stop)) for start, stop in pairwise(bounds.tolist())]
    return np.concatenate(found)


def _staircase(x: Column, y: Column, runs: Positions) -> Positions:
    """Return the positions whose ``y`` is smaller than all before in their run, of equal ``x`` the last of them."""
    if runs[-1]:  # ranks, lower from run to run, so that one minimum over all runs starts anew with each
        y = np.unique(y, return_inverse=True)[1].ravel() - runs * len(y)
    least = np.minimum.accumulate(y)
    falls = np.flatnonzero(np.append(True, y[1:] < least[:-1]))
    changes = (x[falls[1:]] != x[falls[:-1]]) | (runs[falls[1:]] != runs[falls[:-1]])
    found: Positions = falls[np.append(changes, True)]
    return found


def _conquered(columns: Columns, positions: Positions) -> Positions:
    """Return those of ``positions`` (ascending) that none of the others dominates or equals before them."""
    if len(positions) <= _PAIRWISE:
        points = [column[positions] for column in columns[1:]]
        covers = _covers(points, points) & np.tri(len(positions), k=-1, dtype=bool)  # (later, earlier)
        alone: Positions = positions[~covers.any(axis=1)]
        return alone
    middle = len(positions) // 2
    earlier, later = (_conquered(columns, half) for half in (positions[:middle], positions[middle:]))
    # All of the earlier are at most as large in the first column, so the others decide.
    covered = _covered([c[later] for c in columns[1:]], [c[earlier] for c in columns[1:]])
    return np.concatenate((earlier, later[~covered]))


def _covered(points: Columns, others: Columns) -> NDArray[np.bool_]:
    """Say of each point whether one of the others is at most as large in every column."""
    if len(points) == 2:
        order = np.argsort(others[0], kind="stable")
        steps = np.minimum.accumulate(others[1][order])
        place = np.searchsorted(others[0][order], points[0], side="right") - 1
        return (place >= 0) & (steps[np.maximum(place, 0)] <= points[1])
    found = np.zeros(len(points[0]), bool)
    for start in range(0, len(others[0]), block := max(1, _COMPARISONS // len(found))):
        left = np.flatnonzero(~found)
        part = [other[start : start + block] for other in others]
        found[left] = _covers([column[left] for column in points], part).any(axis=1)
    return found


def _covers(points: Columns, others: Columns) -> NDArray[np.bool_]:
    """Return ``(N, M)``: whether the other point is at most as large as the point in every column."""
    covers: NDArray[np.bool_] = np.ones((len(points[0]), len(others[0])), bool)
    for point, other in zip(points, others, strict=True):
        covers &= other[None, :] <= point[:, None]
    return covers
