"""Exact number of canonical points of a search space, without listing them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hf_elastic.architecture import Value
from hf_elastic.errors import SpaceError

Conditions = tuple[tuple[int, frozenset[Value]], ...]  # position of the choice named, values that satisfy it


@dataclass(frozen=True)
class _Open:
    """A choice not yet decided while counting: its conditions that are not yet known to hold."""

    position: int
    pending: Conditions


def count_points(values: tuple[tuple[Value, ...], ...], conditions: tuple[Conditions, ...]) -> int:
    """Count canonical points by branching on deciding choices and multiplying independent components.

    Values that satisfy the same conditions are one branch, components that share no condition are counted
    apart, and a component met again is looked up: a depth choice over all layers costs one pass per depth,
    not one per point.

    Args:
        values: Values of each choice, in declared order.
        conditions: Conditions of each choice; they name earlier choices.

    Raises:
        SpaceError: Hundreds of choices decide over each other in one chain.
    """
    counts: dict[frozenset[_Open], int] = {}

    def count_all(unresolved: list[_Open]) -> int:
        product = 1
        for component in _components(unresolved):
            product *= count_component(component)
        return product

    def count_component(component: list[_Open]) -> int:
        if len(component) == 1:
            return len(values[component[0].position])
        key = frozenset(component)
        if key not in counts:
            counts[key] = branch(component)
        return counts[key]

    def branch(component: list[_Open]) -> int:
        # The earliest choice names no earlier one, so nothing is pending for it: it is in effect.
        first, rest = component[0], component[1:]
        tests = [allowed for o in rest for position, allowed in o.pending if position == first.position]
        branches = Counter(tuple(v in test for test in tests) for v in values[first.position])
        representative = {tuple(v in test for test in tests): v for v in values[first.position]}
        return sum(
            times * count_all(_decided(rest, first.position, representative[signature]))
            for signature, times in branches.items()
        )

    try:
        return count_all([_Open(position, pending) for position, pending in enumerate(conditions)])
    except RecursionError:
        raise SpaceError("the conditions of this space are nested too deeply to count its size") from None


def _decided(rest: list[_Open], position: int, value: Value) -> list[_Open]:
    """Return what stays open once the choice at ``position`` takes ``value``."""
    off: set[int] = set()
    remaining: list[_Open] = []
    for entry in rest:
        if any(p in off or (p == position and value not in allowed) for p, allowed in entry.pending):
            off.add(entry.position)
        elif any(p == position for p, _ in entry.pending):
            remaining.append(_Open(entry.position, tuple(c for c in entry.pending if c[0] != position)))
        else:
            remaining.append(entry)
    return remaining


def _components(entries: list[_Open]) -> list[list[_Open]]:
    """Split into groups that share no condition, each in declared order."""
    parent = {entry.position: entry.position for entry in entries}

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    for entry in entries:
        for position, _ in entry.pending:
            parent[root(entry.position)] = root(position)
    groups: dict[int, list[_Open]] = {}
    for entry in entries:
        groups.setdefault(root(entry.position), []).append(entry)
    return list(groups.values())
