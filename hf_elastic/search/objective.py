"""What a search optimises or limits: a named, directed function of an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_elastic.architecture import shown
from hf_elastic.errors import SearchError
from hf_elastic.space import Architecture, Value

Direction = Literal["minimize", "maximize"]
DIRECTIONS: tuple[Direction, ...] = ("minimize", "maximize")


@dataclass(frozen=True)
class AdditiveTable:
    """Hold an objective that is a sum over groups of choices (one layer is one group).

    The objective of an architecture is ``constant + sum(table[values of the group's choices])``.

    Args:
        groups: Names of the choices of each group; together they are all choices, each once.
        tables: Per group the contribution of each combination of values, keyed in the order of the names.
        constant: What every architecture has.
    """

    groups: tuple[tuple[str, ...], ...]
    tables: tuple[Mapping[tuple[Value, ...], float], ...]
    constant: float = 0.0

    def value(self, architecture: Mapping[str, Value]) -> float:
        """Return the objective of ``architecture``."""
        rows = zip(self.groups, self.tables, strict=True)
        return self.constant + sum(table[tuple(architecture[n] for n in names)] for names, table in rows)


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
        additive: The function as a table, when it is a sum over groups of choices.
        fingerprint: What the function depends on besides the architecture (a digest of data and weights);
            a storage refuses to mix two.

    Raises:
        SearchError: The name is empty or the direction unknown.
    """

    name: str
    function: Callable[[Architecture], float]
    direction: Direction = "minimize"
    cost: bool = False
    unit: str = ""
    related: Callable[[], Mapping[str, Objective]] | None = field(default=None, repr=False)
    additive: AdditiveTable | None = field(default=None, repr=False)
    fingerprint: str = ""

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
