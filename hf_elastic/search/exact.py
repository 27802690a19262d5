"""Exact search: the complete Pareto front of additive objectives, or the one optimum within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hf_elastic.errors import InfeasibleError, SearchError
from hf_elastic.search.contributions import AdditiveProblem, Dimension, Picks
from hf_elastic.search.folding import MOST_LINKS, count_links, fold
from hf_elastic.search.front import nondominated
from hf_elastic.search.highs import minimize
from hf_elastic.search.limits import Limit
from hf_elastic.search.objective import Objective
from hf_elastic.search.results import Evaluation
from hf_elastic.space import Architecture, SearchSpace

MOST_FOUND = 250_000  # architectures of a front; of a hundred choices each they take a gigabyte
_DISTRUST = 1e-6  # of the magnitude of a table's terms: by how much an objective may differ from its table


class ExactSearch:
    """Find the front of additive objectives within limits, without evaluating architectures.

    The front is complete: every vector of values on it is attained by one of the architectures found. Of those that
    attain the same vector one is found, in every process the same. Dynamic programming does it
    (:func:`~hf_elastic.search.folding.fold`), except for one objective under several limits, or with too many values
    of shared choices: that one optimum is left to HiGHS (:func:`~hf_elastic.search.highs.minimize`).

    Args:
        space: The search space.
        goals: What is optimised.
        limits: The limits.
        known: The objectives that limits may name.

    Raises:
        SearchError: An objective or a limited cost is no sum over groups of choices, its table does not fit, or it is
            not what its table says.
    """

    def __init__(
        self, space: SearchSpace, goals: Sequence[Objective], *, limits: Sequence[Limit], known: Mapping[str, Objective]
    ) -> None:
        self._problem = AdditiveProblem.of(space, goals, limits=limits, known=known)
        self._check([space.midpoint(), space.largest(), space.smallest()])

    def front(self, *, progress: bool = False) -> tuple[Evaluation, ...]:
        """Return the evaluations on the front, best in the first objective first.

        Raises:
            InfeasibleError: No architecture keeps the limits.
            SearchError: There is too much to keep for the front to be computed, or an objective is not what its table
                says.
        """
        problem = self._problem
        picks = _solved(problem, problem.dimensions, accepts=self._accepts, progress=progress)
        values = problem.values(picks)
        allowed = problem.within(values)
        if not len(allowed):
            raise InfeasibleError(self._explanation())
        goals = zip(problem.objectives[: problem.goals], values, strict=False)
        kept = allowed[nondominated([goal.sign * np.array(column)[allowed] for goal, column in goals])]
        if len(kept) > MOST_FOUND:
            raise SearchError(
                f"the front has {len(kept)} architectures, algorithm='exact' returns at most {MOST_FOUND}; "
                "round a cost to coarser steps, or search one objective within limits"
            )
        found = problem.architectures(picks[kept])
        self._check([found[place] for place in sorted({0, len(found) // 2, len(found) - 1})])
        named = {objective.name: column for objective, column in zip(problem.objectives, values, strict=True)}
        return tuple(
            Evaluation(architecture, {name: column[place] for name, column in named.items()}, True, number)
            for number, (architecture, place) in enumerate(zip(found, kept, strict=True))
        )

    def evaluate(self, architecture: Architecture) -> Evaluation:
        """Return what the tables say about one architecture."""
        pairs = zip(self._problem.objectives, self._problem.tables, strict=True)
        values = {objective.name: table.value(architecture) for objective, table in pairs}
        feasible = all(limit.allows(values[limit.name]) for limit in self._problem.limits)
        return Evaluation(architecture, values, feasible, 0)

    def _accepts(self, picks: Picks) -> bool:
        return len(self._problem.within(self._problem.values(picks))) > 0

    def _check(self, architectures: Sequence[Architecture]) -> None:
        """Compare objectives with their tables, for some architectures."""
        for objective, table in zip(self._problem.objectives, self._problem.tables, strict=True):
            for architecture in architectures:
                terms = table.terms(architecture)
                try:
                    value = objective(architecture)
                except Exception as error:
                    raise SearchError(f"objective {objective.name!r} failed on {architecture!r}: {error!r}") from error
                if not abs(value - math.fsum(terms)) <= _DISTRUST * math.fsum(map(abs, terms)):
                    raise SearchError(
                        f"the table of {objective.name!r} is not one of that objective: {architecture!r} has "
                        f"{math.fsum(terms):g} by the table and {value:g} by the function; make the table again"
                    )

    def _explanation(self) -> str:
        """Say which limits leave nothing, what each cost could reach alone, or that only all at once is too much."""
        problem, parts, reachable = self._problem, [], True
        names = [objective.name for objective in problem.objectives]
        for limit in problem.limits:
            position = names.index(limit.name)
            alone = replace(problem.dimension(position), goal=True, ceiling=None)
            best = problem.values(_solved(problem, [alone], accepts=lambda _: True))[position][0]
            word = "smallest" if limit.direction == "minimize" else "largest"
            parts.append(f"{limit} ({word} reachable: {best:g})")
            reachable = reachable and limit.allows(best)
        together = " at once" if reachable else ""
        return f"no architecture keeps {' and '.join(parts)}{together}; loosen within= or widen the space"


def _solved(
    problem: AdditiveProblem,
    dimensions: Sequence[Dimension],
    *,
    accepts: Callable[[Picks], bool],
    progress: bool = False,
) -> Picks:
    """Return what may be on the front: a superset, which keeps the limits but for rounding."""
    links = count_links(problem)
    goals = sum(dimension.goal for dimension in dimensions)
    if goals == 1 and (links > MOST_LINKS or len(dimensions) > 2):
        return minimize(problem, dimensions, accepts=accepts)
    if links > MOST_LINKS:
        raise SearchError(
            f"algorithm='exact' with several objectives takes at most {MOST_LINKS} values that choices shared between "
            f"groups have together, here are {links}; search one objective within limits, or use algorithm='nsga2'"
        )
    return fold(problem, dimensions, progress=progress)
