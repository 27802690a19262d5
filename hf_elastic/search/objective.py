"""What a search optimises or limits: a named, directed function of an architecture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from hf_elastic.architecture import shown
from hf_elastic.errors import SearchError
from hf_elastic.space import Architecture, SearchSpace, Value

Direction = Literal["minimize", "maximize"]
DIRECTIONS: tuple[Direction, ...] = ("minimize", "maximize")

Combination = tuple[Value, ...]
"""Values of a group's choices, in the order of the group's names."""


@dataclass(frozen=True)
class AdditiveTable:
    """Hold an objective that is a sum over groups of choices (one layer is one group).

    The objective of an architecture is ``constant + sum(table[values of the group's choices])``, rounded once.
    A choice may stand in several groups (a depth, a width that is one for all layers): it is *shared*, and takes
    one value in all of them. A group holds every choice that the conditions of its choices name, and its table has
    exactly the group's canonical combinations as keys: choices that are not in effect take their first value.

    Args:
        groups: Names of the choices of each group; every choice of the space stands in at least one.
        tables: Per group the contribution of each combination of values, keyed in the order of the names.
        constant: What every architecture has.

    Raises:
        SearchError: Groups and tables do not fit each other, or a contribution is no finite number.
    """

    groups: tuple[tuple[str, ...], ...]
    tables: tuple[Mapping[Combination, float], ...]
    constant: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(tuple(names) for names in self.groups))
        object.__setattr__(self, "tables", tuple(self.tables))
        if len(self.groups) != len(self.tables) or not self.groups:
            raise SearchError(
                f"an additive table has {len(self.groups)} groups and {len(self.tables)} tables; "
                "give one table per group, and at least one group"
            )
        if not _is_finite(self.constant):
            raise SearchError(f"the constant of an additive table is a finite number, got {shown([self.constant])}")
        object.__setattr__(self, "constant", float(self.constant))
        for names, table in zip(self.groups, self.tables, strict=True):
            _check_contributions(names, table)

    def value(self, architecture: Mapping[str, Value]) -> float:
        """Return the objective of ``architecture``.

        Rounded once, so it does not depend on the order of the groups.
        """
        return math.fsum(self.terms(architecture))

    def terms(self, architecture: Mapping[str, Value]) -> list[float]:
        """Return the constant and the contribution of each group."""
        rows = zip(self.groups, self.tables, strict=True)
        return [self.constant, *(table[tuple(architecture[n] for n in names)] for names, table in rows)]

    def combinations(self, space: SearchSpace) -> tuple[tuple[Combination, ...], ...]:
        """Return the canonical combinations of each group, in the order of the space.

        Raises:
            SearchError: The table is not one over ``space``; the message says what it has too much or too little.
        """
        named = {name for names in self.groups for name in names}
        if unknown := sorted(named - set(space.names)):
            raise SearchError(f"its table names {shown(unknown)}, which the space does not have")
        if missing := [name for name in space.names if name not in named]:
            raise SearchError(f"its table says nothing about {shown(missing)}; every choice stands in a group")
        listed: dict[tuple[str, ...], tuple[Combination, ...]] = {}
        for names, table in zip(self.groups, self.tables, strict=True):
            for name in names:
                if absent := [condition.choice for condition in space[name].when if condition.choice not in names]:
                    raise SearchError(
                        f"group {shown(names)} of its table leaves out {shown(absent)}, on which {name!r} depends; "
                        "a choice may stand in several groups"
                    )
            own = subspace(space, names)
            if own.size == len(table) and names not in listed:  # of another size there may be too many to list
                listed[names] = tuple(tuple(point[name] for name in names) for point in own.architectures())
            if own.size != len(table) or not all(combination in table for combination in listed[names]):
                raise SearchError(
                    f"group {shown(names)} of its table has {len(table)} combinations, which are not the {own.size} "
                    "canonical ones of the space; choices that are not in effect take their first value"
                )
        return tuple(listed[names] for names in self.groups)


def subspace(space: SearchSpace, names: Container[str]) -> SearchSpace:
    """Return the space of some choices, in the order of ``space``; with each, those that its conditions name.

    Raises:
        SpaceError: There are none, or a condition names one that is not among them.
    """
    return SearchSpace(choice for choice in space if choice.name in names)


def _check_contributions(names: tuple[str, ...], table: Mapping[Combination, float]) -> None:
    if not names or len(set(names)) != len(names):
        raise SearchError(f"a group of an additive table has one or more distinct names, got {shown(names) or 'none'}")
    for combination, contribution in table.items():
        if not isinstance(combination, tuple) or len(combination) != len(names):
            raise SearchError(
                f"an additive table is keyed by tuples of {len(names)} values, those of {shown(names)}; "
                f"got {shown([combination])}"
            )
        if not _is_finite(contribution):
            raise SearchError(
                f"the contribution of {shown([combination])} to group {shown(names)} of an additive table is a finite "
                f"number, got {shown([contribution])}"
            )


def _is_finite(number: object) -> bool:
    if not isinstance(number, Real):
        return False
    size: Any = abs(number)  # of any size: an int may be no float
    return bool(size <= sys.float_info.max)


@dataclass(frozen=True)
class Objective:
    """Name a function of an architecture and say which way is better.

    Args:
        name: Name used in results and in ``within=``.
        function: Architecture to finite number.
        direction: ``"minimize"`` or ``"maximize"``.
        cost: Cheap, deterministic, computed rather than measured. Limits on a cost are hard: they are checked
            before an expensive evaluation.
        unit: Shown behind the value, such as ``"parameters"`` or ``"ms"``.
        related: Called when needed: further costs of the same supernet that ``within=`` may name.
        additive: The function as a table, when it is a sum over groups of choices; what exact search needs.
        fingerprint: What the function depends on besides the architecture (a digest of data and weights);
            a storage refuses to mix two.
        portable: Whether values of several processes may be compared. Where not, as with seconds that are told on a
            scale found at first use, a search in a storage or with an executor is refused.

    Raises:
        SearchError: The name is empty or the direction unknown.
    """

    name: str
    function: Callable[[Architecture], float]
    direction: Direction = "minimize"
    cost: bool = False
    unit: str = ""
    related: Callable[[], Mapping[str, Objective]] | None = field(default=None, repr=False)
    additive: AdditiveTable | None = field(default=None, repr=False, hash=False)
    fingerprint: str = ""
    portable: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SearchError(f"an objective needs a non-empty name, got {self.name!r}")
        if self.direction not in DIRECTIONS:
            raise SearchError(f"objective {self.name!r} has direction {self.direction!r}; allowed: {shown(DIRECTIONS)}")

    def __call__(self, architecture: Architecture) -> float:
        """Return the value of ``architecture``."""
        return float(self.function(architecture))

    @property
    def sign(self) -> int:
        """1 when smaller is better, -1 when larger is better."""
        return 1 if self.direction == "minimize" else -1


def check_objectives(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """Return the objectives as a tuple.

    Raises:
        SearchError: There are none, one is no :class:`Objective`, or two share a name.
    """
    listed = tuple(objectives)
    if not listed:
        raise SearchError("a search needs at least one objective, got none")
    for objective in listed:
        if not isinstance(objective, Objective):
            raise SearchError(f"objectives are Objective(name, function), got {shown([objective])}")
    names = [objective.name for objective in listed]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise SearchError(f"two objectives are named {shown(sorted(repeated))}; names must be distinct")
    return listed


def known_objectives(objectives: Sequence[Objective]) -> dict[str, Objective]:
    """Return every objective that ``within=`` may name: those of the search, then their related costs."""
    known = {objective.name: objective for objective in objectives}
    for objective in objectives:
        if objective.related is not None:
            for name, other in objective.related().items():
                known.setdefault(name, other)
    return known
