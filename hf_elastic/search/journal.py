"""What is kept of a search: proposals, claims on them, and records of finished evaluations.

A journal is the only state of a search. Whoever reads the same records proposes the same architecture next,
which is why a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

    def adopt(self, held: Collection[str] = ()) -> Proposal | None:
        """Take over the claim of an owner that is gone, if there is one that is not ``held`` by this very process."""

    def claim(self, proposal: Proposal, *, budget: int, after: int | None = None) -> bool:
        """Claim an architecture; False when someone was faster or the budget is used up.

        With ``after``, only when there are just as many claims, finished ones included.
        """

    def open_digests(self) -> frozenset[str]:
        """Return the architectures claimed, by anyone, and not finished."""

    def is_full(self, budget: int) -> bool:
        """Say whether the claims, finished ones included, use up the budget."""

    def slots(self) -> Mapping[str, int]:
        """Return the position of each claim, by digest: the order in which evaluations began."""

    def keep_claim(self, proposal: Proposal, *, timeout: float | None = None) -> AbstractContextManager[object]:
        """Renew the claim while the context is open, but not forever when the evaluation has a ``timeout``."""

    def finish(self, proposal: Proposal, values: tuple[float, ...] | None, failure: str | None) -> None:
        """Record the outcome and give up the claim."""

    def release(self, proposal: Proposal) -> None:
        """Hand the claim back without an outcome: whoever looks next adopts it."""

    def rest(self) -> None:
        """Free connections for a while in which there is nothing to read or write."""

    def close(self) -> None:
        """Free connections for good."""


class MemoryJournal:
    """Keep the records of one process in memory.

    Args:
        planned: Evaluations planned.
    """

    def __init__(self, *, planned: int) -> None:
        self.planned = planned
        self._unread: list[Record] = []
        self._open: set[str] = set()
        self._slots: dict[str, int] = {}
        self._finished = 0

    def read(self) -> list[Record]:
        """Return the records that finished since the last call."""
        records, self._unread = self._unread, []
        return records

    def adopt(self, held: Collection[str] = ()) -> Proposal | None:
        """Return None: nobody else is there."""
        return None

    def claim(self, proposal: Proposal, *, budget: int, after: int | None = None) -> bool:
        """Note the claim."""
        digest = proposal.architecture.digest
        self._open.add(digest)
        self._slots[digest] = len(self._slots)
        return True

    def open_digests(self) -> frozenset[str]:
        """Return what is under evaluation."""
        return frozenset(self._open)

    def is_full(self, budget: int) -> bool:
        """Say whether the budget is used up."""
        return len(self._slots) >= budget

    def slots(self) -> dict[str, int]:
        """Return the position of each claim, by digest."""
        return self._slots

    def keep_claim(self, proposal: Proposal, *, timeout: float | None = None) -> AbstractContextManager[object]:
        """Do nothing: there is no one to take the claim."""
        return nullcontext()

    def finish(self, proposal: Proposal, values: tuple[float, ...] | None, failure: str | None) -> None:
        """Keep the record."""
        self._open.remove(proposal.architecture.digest)
        self._unread.append(Record(self._finished, proposal, values, failure))
        self._finished += 1

    def release(self, proposal: Proposal) -> None:
        """Forget the claim; the search is over then, as only an exception releases one."""
        self._open.discard(proposal.architecture.digest)

    def rest(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
