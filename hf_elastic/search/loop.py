"""The search loop: claim, evaluate, record, until the budget is used or nothing is left."""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from hf_elastic.errors import SearchError, StorageError
from hf_elastic.search.executors import Executor, Outcome
from hf_elastic.search.interruption import Interruption
from hf_elastic.search.journal import Journal, Proposal, Record
from hf_elastic.search.limits import Feasibility, Limit
from hf_elastic.search.objective import Objective
from hf_elastic.search.progress import SearchProgress
from hf_elastic.search.results import Evaluation, Failure
from hf_elastic.space import Architecture

_HOPELESS = 5  # failures in a row, without any success, after which the objective is taken to be broken
_WAITS = (0.02, 10.0)  # seconds: first and longest pause while other processes finish
_LONGER = 1.5  # factor from one pause to the next
_RACES = (0.005, 0.1)  # seconds: first and longest pause after others were faster


@dataclass(frozen=True)
class Fixed:
    """An architecture that is evaluated whatever the algorithm proposes, and what it is called."""

    label: str
    architecture: Architecture


class ProposalSource(Protocol):
    """Where the loop gets architectures from."""

    @property
    def ordered(self) -> bool:
        """Whether proposals depend on nothing but what is taken, so that they come in one order if claimed in it."""

    def observe(self, record: Record) -> None:
        """Take a finished record into account."""

    def dress(self, architecture: Architecture, taken: Collection[str]) -> Proposal:
        """Return a proposal of a given architecture, when so many others are taken."""

    def propose(self, taken: Collection[str]) -> Proposal | None:
        """Return a proposal whose digest is not ``taken``, or None when there is none left."""


class SearchLoop:
    """Run one process's share of a search.

    Args:
        objectives: What to evaluate.
        source: Where proposals come from.
        journal: Where claims and records are kept.
        executor: Where architectures are evaluated; started.
        limits: Limits that say what is feasible.
        feasibility: The costs behind the hard limits.
        progress: What to tell about it.
        interruption: When signals may end the search.
        timeout: Seconds that an evaluation may take, if there is a limit.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        source: ProposalSource,
        journal: Journal,
        *,
        executor: Executor,
        limits: Sequence[Limit],
        feasibility: Feasibility,
        progress: SearchProgress,
        interruption: Interruption,
        timeout: float | None = None,
    ) -> None:
        self._objectives = tuple(objectives)
        self._source = source
        self._journal = journal
        self._executor = executor
        self._limits = tuple(limits)
        self._feasibility = feasibility
        self._progress = progress
        self._interruption = interruption
        self._timeout = timeout
        self._labels: dict[str, str] = {}
        self._seen: set[str] = set()
        self._running: dict[str, tuple[Proposal, ExitStack]] = {}
        self._evaluations: list[Evaluation] = []
        self._failures: list[Failure] = []
        self._failed_in_a_row = 0
        self._nothing_left = False
        self._pause = _WAITS[0]
        self._race = _RACES[0]
        self._jitter = random.Random(secrets.randbits(64))  # of pauses only: nothing that is kept depends on it

    def run(self, fixed: Sequence[Fixed], budget: int) -> tuple[tuple[Evaluation, ...], tuple[Failure, ...]]:
        """Evaluate until ``budget`` architectures are finished, by whomever, or none is left.

        Raises:
            SearchError: Every evaluation failed.
            StorageError: The storage failed.
            ActivationError: A supernet that is measured is in use in another thread.
        """
        self._labels = {one.architecture.digest: one.label for one in fixed}
        self._synchronise()
        self._progress.resume()
        try:
            while len(self._seen) < budget:
                self._fill(fixed, budget)
                if len(self._seen) >= budget or (not self._step() and not self._synchronise()):
                    break
        except BaseException:
            # Interrupted: whoever goes on, maybe this very process, shall not have to wait for the lease.
            self._hand_back()
            raise
        return self._in_order()

    def _fill(self, fixed: Sequence[Fixed], budget: int) -> None:
        """Start evaluations until the executor has its hands full or nothing can be claimed now."""
        while len(self._running) < self._executor.workers:
            proposal = self._next(fixed, budget)
            if proposal is None:
                return
            keeping = ExitStack()
            self._running[proposal.architecture.digest] = (proposal, keeping)
            # Where the executor comes back whatever an evaluation does, it is the executor that keeps to the time.
            limit = self._timeout if self._executor.blocks else None
            keeping.enter_context(self._journal.keep_claim(proposal, timeout=limit))
            self._executor.submit(proposal.architecture)
            self._pause, self._race = _WAITS[0], _RACES[0]

    def _next(self, fixed: Sequence[Fixed], budget: int) -> Proposal | None:
        """Return a proposal we claimed; None when others were faster or nothing is left to claim."""
        being_evaluated = self._journal.open_digests()
        self._synchronise()  # in this order: what is no longer under evaluation has its record by now
        adopted = self._journal.adopt(self._running)
        if adopted is not None:
            return adopted
        taken = self._seen | being_evaluated
        self._nothing_left = len(taken) >= budget
        if self._nothing_left:
            return None
        waiting = (one.architecture for one in fixed if one.architecture.digest not in taken)
        given = next(waiting, None)
        proposal = self._source.propose(taken) if given is None else self._source.dress(given, taken)
        if proposal is None:
            self._nothing_left = True
            return None
        if self._journal.claim(proposal, budget=budget, after=len(taken) if self._source.ordered else None):
            return proposal
        self._nothing_left = self._journal.is_full(budget)
        return None

    def _step(self) -> bool:
        """Wait for outcomes and record them; False when neither we nor others evaluate anything."""
        if self._running:
            full = len(self._running) == self._executor.workers
            with self._interruption.let_in():
                outcomes = self._executor.wait(None if full else self._next_pause())
            for outcome in outcomes:
                self._finish(outcome)
            return True
        if self._nothing_left and not self._journal.open_digests():
            return False
        self._journal.rest()
        self._interruption.sleep(self._next_pause())
        return True

    def _next_pause(self) -> float:
        """Return for how long to wait: briefly when others were faster, longer and longer when nothing is left."""
        if self._nothing_left:
            pause, self._pause = self._pause, min(_LONGER * self._pause, _WAITS[1])
            return pause
        race, self._race = self._race, min(2 * self._race, _RACES[1])
        return self._jitter.uniform(0.0, race)

    def _finish(self, outcome: Outcome) -> None:
        digest = outcome.architecture.digest
        proposal, keeping = self._running[digest]
        keeping.close()
        self._journal.finish(proposal, outcome.values, outcome.failure)
        del self._running[digest]
        self._failed_in_a_row = 0 if outcome.failure is None else self._failed_in_a_row + 1
        if self._failed_in_a_row >= _HOPELESS and not self._evaluations:
            raise SearchError(
                f"the first {self._failed_in_a_row} evaluations all failed; the last: {outcome.failure}; "
                "mend the objective and search with a new study_name= or storage="
            )

    def _hand_back(self) -> None:
        """Give up our claims without outcomes."""
        for proposal, keeping in self._running.values():
            with suppress(StorageError):
                keeping.close()
                self._journal.release(proposal)
        self._running.clear()

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

    def _in_order(self) -> tuple[tuple[Evaluation, ...], tuple[Failure, ...]]:
        """Return what is finished, numbered in the order in which it was begun, whatever took longer."""
        if not self._evaluations:
            raise SearchError(f"all {len(self._failures)} evaluations failed; the first: {self._failures[0].cause}")
        slots = self._journal.slots()
        ended = [(one.number, one.architecture.digest) for one in self._evaluations]
        ended += [(one.number, one.architecture.digest) for one in self._failures]
        begun = sorted((slots.get(digest, number), number) for number, digest in ended)
        place = {number: position for position, (_, number) in enumerate(begun)}
        evaluations = [replace(one, number=place[one.number]) for one in self._evaluations]
        failures = [replace(one, number=place[one.number]) for one in self._failures]
        return tuple(sorted(evaluations, key=_number)), tuple(sorted(failures, key=_number))


def _number(one: Evaluation | Failure) -> int:
    return one.number
