"""One additive objective under several limits: a mixed-integer program, solved by HiGHS and checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hf_elastic.errors import SearchError
from hf_elastic.search.contributions import AdditiveProblem, Dimension, Picks
from hf_elastic.space import Value

_SECONDS = 600.0  # of one call of HiGHS
_CALLS = 100
_TOTAL = 1e6  # dimensions are scaled to sums of at most this: HiGHS computes to about 1e-6
_GAP = 1e-5  # what HiGHS may leave, scaled, between its answer and the bound it proves
_OPTIMAL, _INFEASIBLE = 0, 2


def minimize(problem: AdditiveProblem, dimensions: Sequence[Dimension], *, accepts: Callable[[Picks], bool]) -> Picks:
    """Return one architecture that minimizes the first dimension within the ceilings of all; none if there is none.

    ``x[g, k]`` in {0, 1} says whether group ``g`` takes combination ``k``, and groups that share a choice agree::

        minimize    Σ c[g, k]·x[g, k]
        subject to  Σ_k x[g, k] = 1                             for each group
                    Σ_{k with value v} x[g, k] = y[choice, v]   for each shared choice, its values and groups
                    Σ a[g, k]·x[g, k] <= ceiling                for each dimension that has one

    HiGHS (Huangfu and Hall 2018, DOI 10.1007/s12532-017-0130-5) is asked for a gap of zero but computes in floats. So
    an answer is rounded and summed up in integers, and taken when it keeps the limits and meets the bound that HiGHS
    proved: in integers to less than one unit, else to 1e-11 of the largest sum. If not, it is excluded and HiGHS is
    called again.

    Args:
        problem: Groups, combinations and shared choices.
        dimensions: What is minimized, then what is limited only.
        accepts: Whether an architecture ``(1, groups)`` keeps the limits; ceilings have a margin.

    Raises:
        SearchError: HiGHS comes to no proven answer.
    """
    best, least = np.empty((0, len(problem.groups)), np.int32), np.inf
    if any(d.ceiling is not None and sum(d.least()) > d.ceiling for d in dimensions):
        return best
    program = _Program.of(problem, dimensions)
    for _ in range(_CALLS):
        answer = program.solved()
        if answer is None:
            return best
        chosen, bound = answer
        picks = program.architecture(chosen)
        if problem.agrees(picks[0]) and accepts(picks) and (value := float(program.objective[chosen].sum())) < least:
            best, least = picks, value
        if least <= bound + program.gap:
            return best
        program.rows.append(_Row(chosen, np.ones(len(chosen)), upper=len(chosen) - 1))
    raise SearchError(f"HiGHS came to no proven answer in {_CALLS} calls; round the costs to coarser steps")


@dataclass(frozen=True)
class _Row:
    """A linear constraint."""

    variables: NDArray[np.intp]
    coefficients: NDArray[np.float64]
    upper: float
    lower: float = -np.inf


@dataclass(frozen=True)
class _Program:
    """The program as HiGHS takes it: first the variables of each group, then those of shared choices.

    Args:
        picks: Per group the combinations that none of their class dominates.
        offsets: Where the variables of each group start.
        objective: ``(variables,)`` coefficients, scaled.
        gap: By how much an answer may exceed the proven bound, scaled.
        rows: The constraints.
    """

    picks: list[NDArray[np.intp]]
    offsets: NDArray[np.intp]
    objective: NDArray[np.float64]
    gap: float
    rows: list[_Row]

    @classmethod
    def of(cls, problem: AdditiveProblem, dimensions: Sequence[Dimension]) -> _Program:
        """Return the program of a problem."""
        picks = [problem.undominated(group, dimensions) for group in range(len(problem.groups))]
        offsets = np.append(0, np.cumsum([len(chosen) for chosen in picks]))
        every = np.arange(offsets[-1])
        rows = [_Row(every[a:b], np.ones(b - a), 1.0, 1.0) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        agreeing = list(_agreeing(problem, picks, offsets))
        scaled = [_Scaled.of(dimension, picks) for dimension in dimensions]
        rows += agreeing
        rows += [
            _Row(every, one.coefficients, one.upper(dimension.ceiling))
            for one, dimension in zip(scaled, dimensions, strict=True)
            if dimension.ceiling is not None
        ]
        count = max(int(row.variables.max()) for row in rows) + 1
        objective = np.append(scaled[0].coefficients, np.zeros(count - len(every)))
        return cls(picks, offsets, objective, max(scaled[0].unit / 2, _GAP), rows)

    def solved(self) -> tuple[NDArray[np.intp], float] | None:
        """Return the variables that are taken, one per group, and the proven bound; None when nothing is feasible.

        Raises:
            SearchError: HiGHS stops without an answer.
        """
        sizes = [len(row.variables) for row in self.rows]
        entries = np.concatenate([row.coefficients for row in self.rows])
        variables = np.concatenate([row.variables for row in self.rows])
        matrix = csr_array(
            (entries, variables, np.append(0, np.cumsum(sizes))), shape=(len(self.rows), len(self.objective))
        )
        answer = milp(
            self.objective,
            integrality=np.arange(len(self.objective)) < self.offsets[-1],
            bounds=Bounds(0.0, 1.0),
            constraints=LinearConstraint(matrix, [row.lower for row in self.rows], [row.upper for row in self.rows]),
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
        if answer.status == _INFEASIBLE:
            return None
        if answer.status != _OPTIMAL:
            reason = " ".join(str(answer.message).split())
            raise SearchError(f"HiGHS stopped without an answer ({reason}); drop a limit, or round costs")
        ranges = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return np.array([a + int(np.argmax(answer.x[a:b])) for a, b in ranges]), float(answer.mip_dual_bound)

    def architecture(self, chosen: NDArray[np.intp]) -> Picks:
        """Return the combinations ``(1, groups)`` of the variables that are taken."""
        places = chosen - self.offsets[:-1]
        return np.array([[picks[place] for picks, place in zip(self.picks, places, strict=True)]], np.int32)


@dataclass(frozen=True)
class _Scaled:
    """A dimension in floats that start at zero in each group and add up to at most 1e6.

    Args:
        coefficients: Of the variables of all groups.
        unit: The step by which sums differ at least.
        step: The same in the integers of the dimension.
        start: The smallest sum, in those integers.
    """

    coefficients: NDArray[np.float64]
    unit: float
    step: int
    start: int

    @classmethod
    def of(cls, dimension: Dimension, picks: Sequence[NDArray[np.intp]]) -> _Scaled:
        """Scale the contributions of the picked combinations."""
        columns = [column[chosen] for column, chosen in zip(dimension.contributions, picks, strict=True)]
        above = [column - column.min() for column in columns]
        step = int(np.gcd.reduce(np.concatenate(above))) or 1
        unit = min(1.0, _TOTAL / max(1, sum(int(column.max()) for column in above) // step))
        return cls(np.concatenate(above) // step * unit, unit, step, sum(int(column.min()) for column in columns))

    def upper(self, ceiling: int) -> float:
        """Return the ceiling, half a unit above the largest sum allowed."""
        return ((ceiling - self.start) // self.step + 0.5) * self.unit


def _agreeing(problem: AdditiveProblem, picks: Sequence[NDArray[np.intp]], offsets: NDArray[np.intp]) -> Iterator[_Row]:
    """Yield the constraints that tie each value of each shared choice to one variable in all groups."""
    numbers: dict[tuple[str, Value], int] = {}
    for group, names in enumerate(problem.groups):
        for place, name in enumerate(names):
            if name not in problem.shared:
                continue
            taken = [problem.combinations[group][pick][place] for pick in picks[group]]
            for value in problem.space[name].values:
                number = numbers.setdefault((name, value), int(offsets[-1]) + len(numbers))
                having = [int(offsets[group]) + k for k, other in enumerate(taken) if other == value]
                yield _Row(np.array([*having, number]), np.array([1.0] * len(having) + [-1.0]), 0.0, 0.0)
