"""Additive objectives as integers: what each combination of each group adds to each dimension of an exact search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hf_elastic.errors import SearchError
from hf_elastic.search.front import nondominated
from hf_elastic.search.limits import Limit
from hf_elastic.search.objective import AdditiveTable, Combination, Objective
from hf_elastic.space import Architecture, SearchSpace, Value

Integers = NDArray[np.int64]
Picks = NDArray[np.int32]
"""``(N, groups)``: of each architecture the position of the combination that each group takes."""

_BITS = 61  # of a sum over all groups: one more is for the sign, one for the distance to a limit
_EXACT = 2**53  # below, every integer is a float
_FAR = 2**62  # beyond every sum
_ROWS = 1 << 14  # architectures whose terms are Python numbers at a time
_TRUSTED = 2**50  # a value is trusted to this share of its magnitude when it is compared with a limit


@dataclass(frozen=True)
class Dimension:
    """An objective or a limited cost in integers, smaller is better.

    Integers whose sum stays below 2^61 are what they were. Anything else becomes multiples of a power of two small
    enough to use 61 bits, eight more than a float has: sums are exact and the same in any order.

    Args:
        contributions: Per group ``(combinations,)``.
        goal: Whether it is minimised; else it is only limited.
        ceiling: No architecture with a larger sum keeps the limit; None when each keeps it, or there is no limit.
            Where a sum says less than the value rounded to a float, there is a margin, and some with a sum up to the
            ceiling miss the limit.
    """

    contributions: tuple[Integers, ...]
    goal: bool
    ceiling: int | None

    def least(self) -> list[int]:
        """Return the smallest contribution of each group."""
        return [int(column.min()) for column in self.contributions]


@dataclass(frozen=True)
class AdditiveProblem:
    """Hold the additive objectives and limited costs of one space.

    Args:
        space: The search space.
        objectives: What is optimised, then the limited costs that are not.
        goals: How many of the objectives are optimised.
        limits: The limits.
        tables: The table of each objective.
        combinations: Canonical combinations of each group.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    goals: int
    limits: tuple[Limit, ...]
    tables: tuple[AdditiveTable, ...]
    combinations: tuple[tuple[Combination, ...], ...]

    @classmethod
    def of(
        cls, space: SearchSpace, goals: Sequence[Objective], *, limits: Sequence[Limit], known: Mapping[str, Objective]
    ) -> AdditiveProblem:
        """Return the problem of objectives and limits.

        Raises:
            SearchError: One of them has no table, one that does not fit the space, or one with other groups.
        """
        names = {goal.name for goal in goals}
        objectives = (*goals, *(known[limit.name] for limit in limits if limit.name not in names))
        tables = tuple(_table_of(objective) for objective in objectives)
        fitting = [_fitted(objective, table, space) for objective, table in zip(objectives, tables, strict=True)]
        for objective, table in zip(objectives, tables, strict=True):
            if table.groups != tables[0].groups:
                raise SearchError(
                    f"the tables of {objectives[0].name!r} and {objective.name!r} group the choices differently, "
                    "algorithm='exact' adds up equal groups; make both tables of one supernet"
                )
        return cls(space, objectives, len(goals), tuple(limits), tables, fitting[0])

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the choices of each group."""
        return self.tables[0].groups

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names of the choices that stand in several groups."""
        counts = Counter(name for names in self.groups for name in names)
        return frozenset(name for name, count in counts.items() if count > 1)

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What decides: every objective, and each other cost whose limit excludes something."""
        found = [self.dimension(position) for position in range(len(self.objectives))]
        return tuple(dimension for dimension in found if dimension.goal or dimension.ceiling is not None)

    def dimension(self, position: int) -> Dimension:
        """Return one of the objectives in integers."""
        objective = self.objectives[position]
        columns, constant = self._columns[position], Fraction(self.tables[position].constant)
        largest = max(float(np.abs(column).max()) for column in columns)
        bits = math.frexp(largest)[1] + len(columns).bit_length()  # every sum is below 2^bits
        whole = bits <= _BITS and all(bool((column == np.rint(column)).all()) for column in columns)
        exponent = 0 if whole else _BITS - bits
        units = tuple(np.rint(np.ldexp(objective.sign * column, exponent)).astype(np.int64) for column in columns)
        scale, magnitude = Fraction(2) ** exponent, abs(constant) + Fraction(2) ** bits
        exact = whole and constant.denominator == 1 and magnitude <= _EXACT
        margin = 0 if exact else len(columns) + math.ceil(magnitude * scale / _TRUSTED)
        goal, most = position < self.goals, sum(int(column.max()) for column in units)
        for limit in self.limits:
            bound = math.floor(objective.sign * (Fraction(limit.bound) - constant) * scale)
            if limit.name == objective.name and most > bound - margin:
                return Dimension(units, goal=goal, ceiling=max(-_FAR, min(bound + margin, _FAR)))
        return Dimension(units, goal=goal, ceiling=None)

    def classes(self, group: int) -> tuple[list[Combination], NDArray[np.intp]]:
        """Return which values the shared choices of a group take together, and which of them each combination has."""
        names = self.groups[group]
        places = [place for place, name in enumerate(names) if name in self.shared]
        taken = [tuple(combination[place] for place in places) for combination in self.combinations[group]]
        numbers = {values: number for number, values in enumerate(dict.fromkeys(taken))}
        return list(numbers), np.array([numbers[values] for values in taken])

    def undominated(self, group: int, dimensions: Sequence[Dimension]) -> NDArray[np.intp]:
        """Return the combinations of a group that no other one of the same class dominates, class by class."""
        columns = [dimension.contributions[group] for dimension in dimensions]
        return nondominated(columns, keys=self.classes(group)[1])

    def agrees(self, picks: Sequence[int]) -> bool:
        """Say whether one combination of each group gives every shared choice one value."""
        values: dict[str, Value] = {}
        rows = zip(self.groups, self.combinations, picks, strict=True)
        pairs = [pair for names, listed, pick in rows for pair in zip(names, listed[pick], strict=True)]
        return all(values.setdefault(name, value) == value for name, value in pairs)

    def values(self, picks: Picks) -> tuple[list[float], ...]:
        """Return the values of each objective, as the tables give them."""
        return tuple(
            _sums(table.constant, columns, picks) for table, columns in zip(self.tables, self._columns, strict=True)
        )

    def within(self, values: Sequence[Sequence[float]]) -> NDArray[np.intp]:
        """Return the positions of the architectures that keep every limit, from what :meth:`values` returned."""
        position = {objective.name: place for place, objective in enumerate(self.objectives)}
        kept = [
            all(limit.allows(row[position[limit.name]]) for limit in self.limits) for row in zip(*values, strict=True)
        ]
        return np.flatnonzero(kept)

    def architectures(self, picks: Picks) -> list[Architecture]:
        """Return the architectures that take the picked combinations, which agree: they are canonical as those are."""
        entries: dict[str, NDArray[np.object_]] = {}
        for group, (names, listed) in enumerate(zip(self.groups, self.combinations, strict=True)):
            for name, of_each in zip(names, zip(*listed, strict=True), strict=True):
                entries[name] = np.array(of_each, dtype=object)[picks[:, group]]
        rows = zip(*(entries[name] for name in self.space.names), strict=True)
        return [Architecture(dict(zip(self.space.names, row, strict=True))) for row in rows]

    @cached_property
    def _columns(self) -> tuple[tuple[NDArray[np.float64], ...], ...]:
        """Per objective and group ``(combinations,)`` contributions as the table has them."""
        return tuple(
            tuple(
                np.array([float(entries[combination]) for combination in listed])
                for entries, listed in zip(table.tables, self.combinations, strict=True)
            )
            for table in self.tables
        )


def _sums(constant: float, columns: Sequence[NDArray[np.float64]], picks: Picks) -> list[float]:
    found: list[float] = []
    for start in range(0, len(picks), _ROWS):
        part = picks[start : start + _ROWS]
        terms = np.stack([column[part[:, group]] for group, column in enumerate(columns)], axis=1)  # (rows, groups)
        found += [math.fsum([constant, *row]) for row in terms.tolist()]
    return found


def _table_of(objective: Objective) -> AdditiveTable:
    if objective.additive is None:
        raise SearchError(
            f"algorithm='exact' needs objectives and limits that are sums over groups of choices, {objective.name!r} "
            "has no table; give it additive=AdditiveTable(...), or use algorithm='nsga2'"
        )
    return objective.additive


def _fitted(objective: Objective, table: AdditiveTable, space: SearchSpace) -> tuple[tuple[Combination, ...], ...]:
    try:
        return table.combinations(space)
    except SearchError as error:
        raise SearchError(f"algorithm='exact' cannot use {objective.name!r}: {error}") from None
