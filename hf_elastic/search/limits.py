"""Limits (``within=``): what they mean, which architectures keep them, how others get back."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_elastic.architecture import is_finite, shown
from hf_elastic.errors import InfeasibleError, SearchError
from hf_elastic.search.objective import Direction, Objective
from hf_elastic.space import Architecture, SearchSpace

_DESCENT_BUDGET = 2_000  # cost evaluations spent on finding a first feasible architecture
_FIRST_SAMPLES = 32


@dataclass(frozen=True)
class Limit:
    """Bound one objective: from above when it is minimized, from below when it is maximized.

    Args:
        name: Name of the objective.
        bound: The absolute bound.
        direction: Direction of the objective.
        cost: Whether it is a cost, which is checked before an evaluation.
        unit: Unit of the objective.
    """

    name: str
    bound: float
    direction: Direction = "minimize"
    cost: bool = False
    unit: str = ""

    def allows(self, value: float) -> bool:
        """Say whether ``value`` keeps the limit."""
        return value <= self.bound if self.direction == "minimize" else value >= self.bound

    def excess(self, value: float) -> float:
        """Return by how much of the bound ``value`` misses the limit; 0 when it keeps it."""
        over = value - self.bound if self.direction == "minimize" else self.bound - value
        return max(0.0, over) / (abs(self.bound) or 1.0)

    def best_of(self, values: Iterable[float]) -> float:
        """Return the value nearest to keeping the limit."""
        return min(values) if self.direction == "minimize" else max(values)

    def __str__(self) -> str:
        sign = "<=" if self.direction == "minimize" else ">="
        return f"{self.name} {sign} {self.bound:g}" + (f" {self.unit}" if self.unit else "")


def resolve_limits(
    within: Mapping[str, float] | None, known: Mapping[str, Objective], space: SearchSpace
) -> tuple[Limit, ...]:
    """Turn ``within=`` into absolute limits.

    A float in (0, 1] on a cost is a fraction of the largest architecture's value; any other number is
    absolute.

    Raises:
        SearchError: A name is not known or a value is no finite number.
    """
    limits = []
    for name, value in (within or {}).items():
        if name not in known:
            raise SearchError(f"within= names {name!r}, which is not known; known: {shown(sorted(known))}")
        objective = known[name]
        bound = checked_bound(name, value)
        if is_fraction(value) and objective.cost:
            bound = value * cost_of(objective, space.largest())
        limits.append(Limit(name, bound, objective.direction, objective.cost, objective.unit))
    return tuple(limits)


def checked_bound(name: str, value: object) -> float:
    """Return a limit's value as a float.

    Raises:
        SearchError: It is no finite number.
    """
    if not isinstance(value, int | float) or not is_finite(value):
        raise SearchError(f"within={{{name!r}: ...}} takes a finite number, got {shown([value])}")
    return float(value)


def is_fraction(value: object) -> bool:
    """Say whether a limit on a cost is meant as a fraction: a float in (0, 1] (the integer 1 is not)."""
    return isinstance(value, float) and 0.0 < value <= 1.0


def cost_of(objective: Objective, architecture: Architecture) -> float:
    """Return the cost of ``architecture``.

    Raises:
        SearchError: The cost function fails or gives no finite number.
    """
    try:
        value = objective(architecture)
    except Exception as error:
        raise SearchError(f"cost {objective.name!r} failed on {architecture!r}: {error!r}") from error
    if not math.isfinite(value):
        raise SearchError(f"cost {objective.name!r} of {architecture!r} is {value}, not a finite number")
    return value


class Feasibility:
    """Answer which architectures keep the hard limits, and lead others back to them.

    Args:
        space: The search space.
        limits: All limits; only those on costs are hard.
        known: The objectives behind the limits, by name.
    """

    def __init__(self, space: SearchSpace, limits: Sequence[Limit], known: Mapping[str, Objective]) -> None:
        self._space = space
        self._every_limit = tuple(limits)
        self._limits = tuple(limit for limit in limits if limit.cost)
        self._objectives = {limit.name: known[limit.name] for limit in self._limits}
        self._costs: dict[tuple[str, str], float] = {}  # (name, digest) -> cost
        self._descending = tuple(choice.descending for choice in space.choices)
        self._ranks = tuple({v: rank for rank, v in enumerate(values)} for values in self._descending)
        self._target: Architecture | None = None

    def cost(self, name: str, architecture: Architecture) -> float:
        """Return one limited cost of ``architecture``, computed once."""
        key = (name, architecture.digest)
        if key not in self._costs:
            self._costs[key] = cost_of(self._objectives[name], architecture)
        return self._costs[key]

    def limited_costs(self, architecture: Architecture) -> dict[str, float]:
        """Return every limited cost of ``architecture``."""
        return {name: self.cost(name, architecture) for name in self._objectives}

    def allows(self, architecture: Architecture) -> bool:
        """Say whether ``architecture`` keeps every hard limit."""
        return all(limit.allows(self.cost(limit.name, architecture)) for limit in self._limits)

    def excess(self, architecture: Architecture, values: Mapping[str, float]) -> float:
        """Return by how much an evaluated architecture misses all limits, those on its ``values`` included."""
        return sum(
            limit.excess(self.cost(limit.name, architecture) if limit.cost else values[limit.name])
            for limit in self._every_limit
        )

    def require_some(self) -> None:
        """Check that the hard limits leave something, before anything expensive runs.

        Raises:
            InfeasibleError: Neither the extremes, nor samples, nor a greedy descent keep them.
        """
        if self._target is not None:
            return
        rng = random.Random(0)
        space = self._space
        tried = [space.smallest(), space.largest(), space.midpoint()]
        self._target = next((a for a in tried if self.allows(a)), None)
        # With the usual costs the smallest architecture decides; the rest is for costs that are not monotone.
        for _ in range(_FIRST_SAMPLES if self._target is None else 0):
            tried.append(space.sample(rng))
            if self.allows(tried[-1]):
                self._target = tried[-1]
                return
        if self._target is None:
            self._target = self._descend(tried)

    def repair(self, architecture: Architecture, rng: random.Random) -> Architecture:
        """Return ``architecture``, or the first one that keeps the limits on a random way to one that does.

        The way takes single steps in size (mostly: shrinks one choice at a time, in random order); its
        shortest sufficient part is found by bisection, so what comes out lies just within the limits.
        """
        if not self._limits or self.allows(architecture):
            return architecture
        self.require_some()
        assert self._target is not None
        start, goal = self._as_ranks(architecture), self._as_ranks(self._target)
        steps = [p for p, (a, b) in enumerate(zip(start, goal, strict=True)) for _ in range(abs(a - b))]
        rng.shuffle(steps)
        return self._first_allowed(start, goal, steps)

    def even(self) -> Architecture:
        """Return the largest architecture that keeps the limits with all sizes cut in the same proportion.

        Categorical choices change only when the smallest sizes are still too much. It is the heuristic that a
        search within limits has to beat, as the midpoint is without.
        """
        largest = self._space.largest()
        if self.allows(largest):
            return largest
        self.require_some()
        assert self._target is not None
        start, goal = self._as_ranks(largest), self._as_ranks(self._target)
        steps = []
        for position, choice in enumerate(self._space.choices):
            count = abs(start[position] - goal[position])
            late = choice.kind == "categorical"
            steps += [(late, (step + 1) / count, position) for step in range(count)]
        return self._first_allowed(start, goal, [position for _, _, position in sorted(steps)])

    def _first_allowed(self, start: list[int], goal: list[int], steps: list[int]) -> Architecture:
        """Return an allowed architecture whose predecessor on the way is not; the start is not, the goal is."""
        assert self._target is not None
        low, high, found = 0, len(steps), self._target
        while high - low > 1:  # after `low` steps it is not allowed, after `high` steps it is
            middle = (low + high) // 2
            candidate = self._after(start, goal, steps[:middle])
            if self.allows(candidate):
                high, found = middle, candidate
            else:
                low = middle
        return found

    def _as_ranks(self, architecture: Architecture) -> list[int]:
        return [ranks[v] for ranks, v in zip(self._ranks, architecture.values(), strict=True)]

    def _after(self, start: list[int], goal: list[int], steps: Sequence[int]) -> Architecture:
        ranks = list(start)
        for position in steps:
            ranks[position] += 1 if goal[position] > start[position] else -1
        values = zip(self._space.names, self._descending, ranks, strict=True)
        return self._space.canonical({name: ordered[rank] for name, ordered, rank in values})

    def _excess(self, architecture: Architecture) -> float:
        return sum(limit.excess(self.cost(limit.name, architecture)) for limit in self._limits)

    def _descend(self, tried: list[Architecture]) -> Architecture:
        """Walk from the best architecture tried to one that keeps the limits, choice by choice."""
        best = min(tried, key=lambda a: (self._excess(a), a.digest))
        seen = {a.digest: a for a in tried}
        improved = True
        while improved and len(seen) < _DESCENT_BUDGET:
            improved = False
            for neighbour in neighbours(self._space, best):
                seen[neighbour.digest] = neighbour
                if self._excess(neighbour) < self._excess(best):
                    best, improved = neighbour, True
                if self.allows(best):
                    return best
        raise InfeasibleError(self._explanation(list(seen.values())))

    def _explanation(self, tried: list[Architecture]) -> str:
        parts = []
        for limit in self._limits:
            best = limit.best_of(self.cost(limit.name, a) for a in tried)
            word = "smallest" if limit.direction == "minimize" else "largest"
            parts.append(f"{limit} ({word} reachable: {best:g})")
        return f"no architecture keeps {' and '.join(parts)}; loosen within= or widen the space"


def neighbours(space: SearchSpace, architecture: Architecture) -> Iterable[Architecture]:
    """Yield the architectures that differ in one choice in effect."""
    for name in space.in_effect(architecture):
        for value in space[name].values:
            if value != architecture[name]:
                # A choice that comes into effect by the change has its first value, as canonical() wants it.
                yield space.canonical({**architecture, name: value})
