"""What a search found: evaluations, the Pareto front, and the best architecture within limits."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_elastic.architecture import MAX_JSON_CHARACTERS, is_finite, read_json_object, shown
from hf_elastic.errors import CheckpointError, ElasticError, InfeasibleError, SearchError
from hf_elastic.files import given_path, write_json
from hf_elastic.search.front import nondominated
from hf_elastic.search.limits import Limit, resolve_limits
from hf_elastic.search.objective import DIRECTIONS, Objective
from hf_elastic.space import Architecture, SearchSpace

_FORMAT = "hf_elastic.search_result"


@dataclass(frozen=True)
class Evaluation:
    """One evaluated architecture.

    Args:
        architecture: What was evaluated.
        values: Value of each objective, then of each limited cost, by name.
        feasible: Whether it keeps the limits of the search.
        number: Position in the order of evaluation, from 0.
    """

    architecture: Architecture
    values: Mapping[str, float]
    feasible: bool
    number: int


@dataclass(frozen=True)
class Failure:
    """An architecture whose evaluation failed.

    Args:
        architecture: What was to be evaluated.
        cause: One line.
        number: Position in the order of evaluation, from 0.
    """

    architecture: Architecture
    cause: str
    number: int


@dataclass(frozen=True)
class Goal:
    """An objective without its function: what remains of it in a saved result."""

    name: str
    direction: str
    unit: str = ""
    cost: bool = False

    @property
    def sign(self) -> int:
        """1 when smaller is better, -1 when larger is better."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True, repr=False)
class SearchResult:
    """Hold every evaluation of a search and answer questions about them.

    Args:
        space: The search space.
        objectives: The objectives, without their functions.
        within: The limits as they were given.
        limits: The limits as absolute bounds.
        seed: Seed of the search.
        algorithm: Name of the algorithm.
        evaluations: Successful evaluations, in order.
        failures: Failed ones, in order.
        even_architecture: The largest architecture within the limits whose sizes are all cut in proportion.
        references: Cost of the largest architecture by name: what fractions in ``within=`` are fractions of.
        known: Objectives with functions, by name, while the result has not been saved and loaded.
    """

    space: SearchSpace
    objectives: tuple[Goal, ...]
    within: Mapping[str, float]
    limits: tuple[Limit, ...]
    seed: int
    algorithm: str
    evaluations: tuple[Evaluation, ...]
    failures: tuple[Failure, ...] = ()
    even_architecture: Architecture | None = None
    references: Mapping[str, float] = field(default_factory=dict)
    known: Mapping[str, Objective] = field(default_factory=dict, repr=False, compare=False)

    @property
    def feasible(self) -> tuple[Evaluation, ...]:
        """Evaluations that keep the limits of the search."""
        return tuple(evaluation for evaluation in self.evaluations if evaluation.feasible)

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """Pareto-optimal feasible evaluations, best in the first objective first; of equal values all."""
        feasible = self.feasible
        if not feasible:
            return ()
        points = [self._oriented(evaluation) for evaluation in feasible]
        kept = nondominated([np.array(column) for column in zip(*points, strict=True)])
        best = {points[place] for place in kept}
        found = [(values, e) for values, e in zip(points, feasible, strict=True) if values in best]
        equal = Counter(values for values, _ in found)
        # A digest takes longer to compute than all else here, and is asked of what ties only.
        found.sort(key=lambda pair: (pair[0], pair[1].architecture.digest if equal[pair[0]] > 1 else ""))
        return tuple(evaluation for _, evaluation in found)

    @property
    def midpoint(self) -> Evaluation | None:
        """Evaluation of the midpoint architecture, the heuristic that a search has to beat."""
        return self.of(self.space.midpoint())

    @property
    def even(self) -> Evaluation | None:
        """Evaluation of the largest architecture within the limits whose sizes are all cut in proportion."""
        return None if self.even_architecture is None else self.of(self.even_architecture)

    @property
    def largest(self) -> Evaluation | None:
        """Evaluation of the largest architecture; None when the limits exclude it."""
        return self.of(self.space.largest())

    @property
    def smallest(self) -> Evaluation | None:
        """Evaluation of the smallest architecture; None when the limits exclude it."""
        return self.of(self.space.smallest())

    def __str__(self) -> str:
        front = self.front
        failed = f", {len(self.failures)} failed" if self.failures else ""
        kept = f", {len(self.feasible)} keep {_joined(self.limits)}" if self.limits else ""
        text = f"{self.algorithm}, seed {self.seed}: {len(self.evaluations)} evaluations{failed}{kept}"
        if not front:
            return text
        ranges = [(goal, [e.values[goal.name] for e in front]) for goal in self.objectives]
        spans = [f"{goal.name} {min(of):g} to {max(of):g}{goal.unit and ' ' + goal.unit}" for goal, of in ranges]
        return f"{text}; front of {len(front)}: {', '.join(spans)}"

    def __repr__(self) -> str:
        return f"<SearchResult {self}>"  # of thousands of evaluations all fields are pages

    def of(self, architecture: Architecture) -> Evaluation | None:
        """Return the evaluation of ``architecture``, or None when it was not evaluated."""
        return next((e for e in self.evaluations if e.architecture == architecture), None)

    def best(self, name: str, within: Mapping[str, float] | None = None) -> Evaluation:
        """Return the feasible evaluation with the best value of an objective or limited cost.

        Args:
            name: The objective.
            within: Further limits, on top of those of the search: absolute, or for a cost a float in (0, 1]
                as a fraction of the largest architecture's value.

        Raises:
            SearchError: A name is not known.
            InfeasibleError: Nothing that was evaluated keeps the limits.
        """
        goals = {goal.name: goal for goal in self._goals()}
        if name not in goals:
            raise SearchError(f"the search has no objective {name!r}; it has {shown(goals)}")
        sign = goals[name].sign
        limits = self._more_limits(within or {})
        candidates = self.feasible
        if not candidates:
            raise InfeasibleError(f"none of {len(self.evaluations)} evaluations keeps {_joined(self.limits)}")
        allowed = [e for e in candidates if all(limit.allows(self._value(e, limit.name)) for limit in limits)]
        if not allowed:
            raise InfeasibleError(self._explanation(candidates, limits))
        return min(allowed, key=lambda e: (sign * self._value(e, name), e.architecture.digest))

    def to_json(self) -> str:
        """Return the result as a JSON object; equal results give equal texts."""
        return json.dumps(self._to_data(), allow_nan=False)

    def _to_data(self) -> dict[str, Any]:
        names = [goal.name for goal in self._goals()]
        return {
            "format": _FORMAT,
            "version": 1,
            "space": json.loads(self.space.to_json()),
            "objectives": [vars(goal) for goal in self.objectives],
            "within": dict(self.within),
            "limits": [vars(limit) for limit in self.limits],
            "references": dict(self.references),
            "seed": self.seed,
            "algorithm": self.algorithm,
            "even": None if self.even_architecture is None else self.space.encode(self.even_architecture),
            "names": names,
            "evaluations": [
                {
                    "number": e.number,
                    "indices": self.space.encode(e.architecture),
                    "values": [e.values[name] for name in names],
                    "feasible": e.feasible,
                }
                for e in self.evaluations
            ],
            "failures": [
                {"number": f.number, "indices": self.space.encode(f.architecture), "cause": f.cause}
                for f in self.failures
            ],
        }

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        """Read what :meth:`to_json` wrote; the objectives are without their functions.

        Raises:
            SearchError: The text is not such a JSON object.
        """
        data = read_json_object(text, what="a search result", error=SearchError)
        if data.get("format") != _FORMAT or data.get("version") != 1:
            raise SearchError(f"not a search result: its format is {shown([data.get('format')])}, not {_FORMAT!r} 1")
        try:
            return _from_data(data)
        except ElasticError as error:
            raise SearchError(f"not a search result: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SearchError(f"not a search result: {type(error).__name__} {str(error)[:120]}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, which is replaced as a whole or not at all; its folder is made.

        Raises:
            CheckpointError: The file cannot be written.
        """
        write_json(Path(path), self._to_data())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read a saved result.

        Raises:
            CheckpointError: The file cannot be read.
            SearchError: It holds no search result.
        """
        try:
            file = given_path(path)
            if file.stat().st_size > MAX_JSON_CHARACTERS:
                raise CheckpointError(f"search result {path} is larger than {MAX_JSON_CHARACTERS} bytes")
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"search result {path} is no text file") from error
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"search result {path} cannot be read: {error.strerror}") from error
        return cls.from_json(text)

    def _goals(self) -> list[Goal]:
        """Return the objectives, then the costs that are limited without being objectives."""
        names = {goal.name for goal in self.objectives}
        extra = [Goal(x.name, x.direction, x.unit, x.cost) for x in self.limits if x.name not in names]
        return [*self.objectives, *extra]

    def _oriented(self, evaluation: Evaluation) -> tuple[float, ...]:
        return tuple(goal.sign * evaluation.values[goal.name] for goal in self.objectives)

    def _value(self, evaluation: Evaluation, name: str) -> float:
        if name in evaluation.values:
            return evaluation.values[name]
        return self.known[name](evaluation.architecture)

    def _more_limits(self, within: Mapping[str, float]) -> tuple[Limit, ...]:
        known = dict(self.known)
        for goal in self._goals():
            # A saved result answers fractions from the references it was saved with.
            known.setdefault(goal.name, goal_objective(goal, self.references))
        return resolve_limits(within, known, self.space)

    def _explanation(self, candidates: Sequence[Evaluation], limits: Sequence[Limit]) -> str:
        parts = []
        for limit in limits:
            nearest = limit.best_of(self._value(e, limit.name) for e in candidates)
            parts.append(f"{limit} (nearest of {len(candidates)} evaluated: {nearest:g})")
        return f"no evaluated architecture keeps {' and '.join(parts)}; loosen within= or search again"


def goal_objective(goal: Goal, references: Mapping[str, float]) -> Objective:
    """Return an objective that can tell nothing but the value of the largest architecture."""
    return Objective(
        goal.name,
        lambda largest: references[goal.name],
        direction="minimize" if goal.direction == "minimize" else "maximize",
        cost=goal.cost,
        unit=goal.unit,
    )


def _joined(limits: Iterable[Limit]) -> str:
    return " and ".join(str(limit) for limit in limits) or "the limits"


def _from_data(data: Mapping[str, Any]) -> SearchResult:
    space = SearchSpace.from_json(json.dumps(data["space"]))
    names = [_typed(name, str) for name in data["names"]]
    goals = tuple(_stated(Goal, goal) for goal in data["objectives"])
    limits = tuple(_stated(Limit, limit) for limit in data["limits"])
    directions = {*(goal.direction for goal in goals), *(limit.direction for limit in limits)}
    if not directions <= set(DIRECTIONS):
        raise ValueError("a direction is neither minimize nor maximize")
    if not {entry.name for entry in (*goals, *limits)} <= set(names):
        raise ValueError("an objective or a limit has no values")
    return SearchResult(
        space=space,
        objectives=goals,
        within={name: _number(value) for name, value in data["within"].items()},
        limits=limits,
        seed=_typed(data["seed"], int),
        algorithm=_typed(data["algorithm"], str),
        evaluations=tuple(
            Evaluation(
                architecture=space.decode(entry["indices"]),
                values=dict(zip(names, map(_number, entry["values"]), strict=True)),
                feasible=_typed(entry["feasible"], bool),
                number=_typed(entry["number"], int),
            )
            for entry in data["evaluations"]
        ),
        failures=tuple(
            Failure(space.decode(entry["indices"]), _typed(entry["cause"], str), _typed(entry["number"], int))
            for entry in data["failures"]
        ),
        even_architecture=None if data["even"] is None else space.decode(data["even"]),
        references={name: _number(value) for name, value in data["references"].items()},
    )


def _stated(kind: type[Any], entry: Any) -> Any:
    """An objective or a limit whose fields are what they should be."""
    found = kind(**entry)
    for value, wanted in ((found.name, str), (found.unit, str), (found.cost, bool)):
        _typed(value, wanted)
    if isinstance(found, Limit):
        _number(found.bound)
    return found


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _number(value: Any) -> Any:
    """Return a finite number as it is: an integer limit means something else than a fraction."""
    if not is_finite(value):
        raise TypeError(f"expected a finite number, got {shown([value])}")
    return value
