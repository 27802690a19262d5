"""What is kept of a search: proposals, claims on them, and records of finished evaluations.

A journal is the only state of a search. Whoever reads the same records proposes the same architecture next,
which is why a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_elastic.space import Architecture


@dataclass(frozen=True)
class Proposal:
    """An architecture to evaluate, with what the sampler wants to remember about it.

    Args:
        architecture: What to evaluate.
        trial_attrs: What the sampler noted at the trial (such as the generation), JSON-serialisable.
        study_attrs: What it changed at the study while proposing, JSON-serialisable.
    """

    architecture: Architecture
    trial_attrs: Mapping[str, Any] = field(default_factory=dict)
    study_attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A finished evaluation.

    Args:
        number: Position in the storage; increases, may have gaps.
        proposal: What was evaluated.
        values: One finite number per objective; None when the evaluation failed.
        failure: Cause of the failure, one line.
    """

    number: int
    proposal: Proposal
    values: tuple[float, ...] | None
    failure: str | None = None


class Journal(Protocol):
    """Keep records and hand out claims: at most one owner per architecture, at most ``budget`` in all."""

    @property
    def planned(self) -> int:
        """Evaluations that were planned when the search began; it may be continued with more."""

    def read(self) -> list[Record]:
        """Return the records that finished since the last call, by anyone."""

    def adopt(self) -> Proposal | None:
        """Take over the claim of an owner that is gone, if there is one."""

    def claim(self, proposal: Proposal, *, budget: int) -> bool:
        """Claim an architecture; False when someone was faster or the budget is used up."""

    def open_digests(self) -> frozenset[str]:
        """Return the architectures claimed, by anyone, and not finished."""

    def is_full(self, budget: int) -> bool:
        """Say whether the claims, finished ones included, use up the budget."""

    def keep_claim(self, proposal: Proposal) -> AbstractContextManager[object]:
        """Renew the claim while the context is open."""

    def finish(self, proposal: Proposal, values: tuple[float, ...] | None, failure: str | None) -> None:
        """Record the outcome and give up the claim."""

    def release(self, proposal: Proposal) -> None:
        """Give up the claim without an outcome."""

    def close(self) -> None:
        """Free connections."""


class MemoryJournal:
    """Keep the records of one process in memory.

    Args:
        planned: Evaluations planned.
    """

    def __init__(self, *, planned: int) -> None:
        self.planned = planned
        self._unread: list[Record] = []
        self._claimed = 0
        self._finished = 0

    def read(self) -> list[Record]:
        """Return the records that finished since the last call."""
        records, self._unread = self._unread, []
        return records

    def adopt(self) -> Proposal | None:
        """Return None: nobody else is there."""
        return None

    def claim(self, proposal: Proposal, *, budget: int) -> bool:
        """Count the claim."""
        self._claimed += 1
        return True

    def open_digests(self) -> frozenset[str]:
        """Return nothing: the one process evaluates one architecture at a time."""
        return frozenset()

    def is_full(self, budget: int) -> bool:
        """Say whether the budget is used up."""
        return self._claimed >= budget

    def keep_claim(self, proposal: Proposal) -> AbstractContextManager[object]:
        """Do nothing: there is no one to take the claim."""
        return nullcontext()

    def finish(self, proposal: Proposal, values: tuple[float, ...] | None, failure: str | None) -> None:
        """Keep the record."""
        self._unread.append(Record(self._finished, proposal, values, failure))
        self._finished += 1

    def release(self, proposal: Proposal) -> None:
        """Forget the claim."""
        self._claimed -= 1

    def close(self) -> None:
        """Do nothing."""
