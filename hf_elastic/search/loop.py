"""The search loop: claim, evaluate, record, until the budget is used or nothing is left."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hf_elastic.errors import SearchError, StorageError
from hf_elastic.search.journal import Journal, Proposal, Record
from hf_elastic.search.limits import Feasibility, Limit
from hf_elastic.search.objective import Objective
from hf_elastic.search.progress import SearchProgress
from hf_elastic.search.results import Evaluation, Failure
from hf_elastic.space import Architecture

_HOPELESS = 5  # failures in a row, without any success, after which the objective is taken to be broken
_WAITS = (0.02, 1.0)  # seconds: first and longest pause while other processes finish
_MAX_CAUSE = 400  # characters


@dataclass(frozen=True)
class Fixed:
    """An architecture that is evaluated whatever the algorithm proposes, and what it is called."""

    label: str
    architecture: Architecture


class ProposalSource(Protocol):
    """Where the loop gets architectures from."""

    def observe(self, record: Record) -> None:
        """Take a finished record into account."""

    def dress(self, architecture: Architecture) -> Proposal:
        """Return a proposal of a given architecture."""

    def propose(self, seen: Container[str]) -> Proposal | None:
        """Return a proposal whose digest is not ``seen``, or None when there is none left."""


class SearchLoop:
    """Run one process's share of a search.

    Args:
        objectives: What to evaluate.
        source: Where proposals come from.
        journal: Where claims and records are kept.
        limits: Limits that say what is feasible.
        feasibility: The costs behind the hard limits.
        progress: What to tell about it.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        source: ProposalSource,
        journal: Journal,
        *,
        limits: Sequence[Limit],
        feasibility: Feasibility,
        progress: SearchProgress,
    ) -> None:
        self._objectives = tuple(objectives)
        self._source = source
        self._journal = journal
        self._limits = tuple(limits)
        self._feasibility = feasibility
        self._progress = progress
        self._labels: dict[str, str] = {}
        self._seen: set[str] = set()
        self._evaluations: list[Evaluation] = []
        self._failures: list[Failure] = []
        self._failed_in_a_row = 0
        self._nothing_left = False

    def run(self, fixed: Sequence[Fixed], budget: int) -> tuple[tuple[Evaluation, ...], tuple[Failure, ...]]:
        """Evaluate until ``budget`` architectures are finished, by whomever, or none is left.

        Raises:
            SearchError: Every evaluation failed.
            StorageError: The storage failed.
        """
        self._labels = {one.architecture.digest: one.label for one in fixed}
        self._synchronise()
        self._progress.resume()
        wait = _WAITS[0]
        while len(self._seen) < budget:
            proposal = self._next(fixed, budget)
            if proposal is not None:
                self._evaluate(proposal)
                wait = _WAITS[0]
            elif not self._nothing_left or self._journal.open_digests():
                time.sleep(wait)
                wait = min(2 * wait, _WAITS[1])
            elif not self._synchronise():
                break
            self._synchronise()
        if not self._evaluations:
            raise SearchError(f"all {len(self._failures)} evaluations failed; the first: {self._failures[0].cause}")
        return tuple(self._evaluations), tuple(self._failures)

    def _next(self, fixed: Sequence[Fixed], budget: int) -> Proposal | None:
        """Return a proposal we claimed; None when others were faster or nothing is left to claim."""
        adopted = self._journal.adopt()
        if adopted is not None:
            return adopted
        self._nothing_left = self._journal.is_full(budget)
        if self._nothing_left:
            return None
        taken = self._seen | self._journal.open_digests()
        waiting = (one.architecture for one in fixed if one.architecture.digest not in taken)
        given = next(waiting, None)
        proposal = self._source.propose(taken) if given is None else self._source.dress(given)
        if proposal is None:
            self._nothing_left = True
            return None
        return proposal if self._journal.claim(proposal, budget=budget) else None

    def _evaluate(self, proposal: Proposal) -> None:
        try:
            with self._journal.keep_claim(proposal):
                values, failure = self._measure(proposal.architecture)
        except BaseException:
            # Interrupted: whoever goes on, maybe this very process, shall not have to wait for the lease.
            with suppress(StorageError):
                self._journal.release(proposal)
            raise
        self._journal.finish(proposal, values, failure)
        self._failed_in_a_row = 0 if failure is None else self._failed_in_a_row + 1
        if self._failed_in_a_row >= _HOPELESS and not self._evaluations:
            raise SearchError(
                f"the first {self._failed_in_a_row} evaluations all failed; the last: {failure}; "
                "mend the objective and search with a new study_name= or storage="
            )

    def _measure(self, architecture: Architecture) -> tuple[tuple[float, ...] | None, str | None]:
        """Return the value of every objective, or the cause why there is none."""
        values = []
        for objective in self._objectives:
            try:
                value = objective(architecture)
            except Exception as error:
                reason = str(error).split("\n", 1)[0]
                return None, f"{objective.name}: {type(error).__name__}: {reason}"[:_MAX_CAUSE]
            if not math.isfinite(value):
                return None, f"{objective.name}: {value} is not a finite number"
            values.append(value)
        return tuple(values), None

    def _synchronise(self) -> int:
        """Take in what finished since the last time; return how much that was."""
        records = self._journal.read()
        for record in records:
            self._take_in(record)
        return len(records)

    def _take_in(self, record: Record) -> None:
        architecture = record.proposal.architecture
        number = len(self._seen)
        self._seen.add(architecture.digest)
        self._source.observe(record)
        feasible = False
        if record.values is None:
            self._failures.append(Failure(architecture, record.failure or "unknown cause", number))
        else:
            values = {o.name: value for o, value in zip(self._objectives, record.values, strict=True)}
            for name, cost in self._feasibility.limited_costs(architecture).items():
                values.setdefault(name, cost)
            feasible = all(limit.allows(values[limit.name]) for limit in self._limits)
            self._evaluations.append(Evaluation(architecture, values, feasible, number))
        label = self._labels.get(architecture.digest, "include")
        if label != "include":
            self._progress.say(label, record.values)
        self._progress.advance(record.values, feasible=feasible)
