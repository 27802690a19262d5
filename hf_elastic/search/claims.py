"""Claims on architectures in the database of the search: at most one living owner per architecture."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

_SLOT_RACES = 20  # claims that others may make between our look for a free slot and ours
_METADATA = MetaData()
_CLAIMS = Table(
    "hf_elastic_claims",
    _METADATA,
    Column("study_id", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), primary_key=True),
    # One of 0 .. evaluations - 1: the second unique key is what keeps all processes together to the budget.
    Column("slot", Integer, nullable=False),
    Column("payload", Text, nullable=False),
    Column("owner", String(255), nullable=False),
    Column("lease_until", Float(53), nullable=False),
    Column("done", Boolean, nullable=False),
    UniqueConstraint("study_id", "slot"),
)


@dataclass(frozen=True)
class Claim:
    """A claim that is not done.

    Args:
        digest: Digest of the architecture.
        payload: The proposal as JSON.
        owner: Host, process, start of the process and a nonce.
        lease_until: Seconds since the epoch, by the clock of the database.
        expired: Whether that is over.
    """

    digest: str
    payload: str
    owner: str
    lease_until: float
    expired: bool


class ClaimTable:
    """Insert, renew, take over and finish the claims of one study.

    Args:
        engine: The database.
        study_id: The study the claims belong to.
        lease_seconds: How long a claim holds without being renewed.
    """

    def __init__(self, engine: Engine, study_id: int, *, lease_seconds: float) -> None:
        # Each statement stands for itself, so a transaction around it would only cost two more turns.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._study_id = study_id
        self._lease_seconds = lease_seconds
        self._mine = owner_name()
        self._now = _clock(engine)
        _METADATA.create_all(engine)

    def open_claims(self) -> list[Claim]:
        """Return every claim that is not done, by slot."""
        expired = _CLAIMS.c.lease_until < self._now()
        columns = (_CLAIMS.c.digest, _CLAIMS.c.payload, _CLAIMS.c.owner, _CLAIMS.c.lease_until, expired)
        query = select(*columns).where(self._of_study(), _CLAIMS.c.done.is_(False)).order_by(_CLAIMS.c.slot)
        with self._engine.connect() as connection:
            return [Claim(*row) for row in connection.execute(query)]

    def count(self) -> int:
        """Return the number of claims, done ones included."""
        with self._engine.connect() as connection:
            query = select(func.count()).select_from(_CLAIMS).where(self._of_study())
            return int(connection.execute(query).scalar_one())

    def insert(self, digest: str, payload: str, *, budget: int, after: int | None = None) -> bool:
        """Claim an architecture in a free slot below ``budget``; False when someone has it or no slot is free.

        With ``after``, also when there are not just as many claims.
        """
        for _ in range(_SLOT_RACES):
            count, slot = self._free_slot()
            if slot >= budget or after not in (None, count):
                return False
            row = insert(_CLAIMS).values(
                study_id=self._study_id,
                digest=digest,
                slot=slot,
                payload=payload,
                owner=self._mine,
                lease_until=self._lease(),
                done=False,
            )
            try:
                with self._engine.connect() as connection:
                    connection.execute(row)
                return True
            except IntegrityError:
                if self._is_taken(digest):
                    return False
        return False

    def take_over(self, claim: Claim, payload: str) -> bool:
        """Become the owner of a claim, under a new payload; False when someone was faster or the owner came back."""
        unchanged = and_(_CLAIMS.c.owner == claim.owner, _CLAIMS.c.lease_until == claim.lease_until)
        change = update(_CLAIMS).where(self._open(claim.digest), unchanged)
        with self._engine.connect() as connection:
            values = {"owner": self._mine, "lease_until": self._lease(), "payload": payload}
            return int(connection.execute(change.values(values)).rowcount) == 1

    def renew(self, digest: str) -> bool:
        """Extend the lease of a claim of ours; False when it is no longer ours."""
        change = update(_CLAIMS).where(self._open(digest), _CLAIMS.c.owner == self._mine)
        with self._engine.connect() as connection:
            return int(connection.execute(change.values(lease_until=self._lease())).rowcount) == 1

    def is_mine(self, digest: str) -> bool:
        """Say whether we still own an open claim."""
        query = select(_CLAIMS.c.slot).where(self._open(digest), _CLAIMS.c.owner == self._mine)
        with self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def slots(self) -> dict[str, int]:
        """Return the slot of every claim, by digest."""
        query = select(_CLAIMS.c.digest, _CLAIMS.c.slot).where(self._of_study())
        with self._engine.connect() as connection:
            return {str(digest): int(slot) for digest, slot in connection.execute(query)}

    def mark_done(self, digest: str) -> None:
        """Close a claim whose outcome is recorded, whoever owns it."""
        with self._engine.connect() as connection:
            connection.execute(update(_CLAIMS).where(self._open(digest)).values(done=True))

    def remove(self, digest: str) -> None:
        """Give up a claim of ours without an outcome."""
        with self._engine.connect() as connection:
            connection.execute(delete(_CLAIMS).where(self._open(digest), _CLAIMS.c.owner == self._mine))

    def _lease(self) -> ColumnElement[float]:
        return self._now() + self._lease_seconds

    def _free_slot(self) -> tuple[int, int]:
        """Return the number of claims and the lowest slot that none has: the same unless one was given back."""
        query = select(func.count(), func.max(_CLAIMS.c.slot)).where(self._of_study())
        with self._engine.connect() as connection:
            count, last = connection.execute(query).one()
            if not count or count == last + 1:
                return int(count), int(count)
            taken = connection.execute(select(_CLAIMS.c.slot).where(self._of_study()).order_by(_CLAIMS.c.slot))
            return int(count), _first_free([int(row.slot) for row in taken])

    def _is_taken(self, digest: str) -> bool:
        query = select(_CLAIMS.c.slot).where(self._of_study(), _CLAIMS.c.digest == digest)
        with self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def _of_study(self) -> ColumnElement[bool]:
        return _CLAIMS.c.study_id == self._study_id

    def _open(self, digest: str) -> ColumnElement[bool]:
        return and_(self._of_study(), _CLAIMS.c.digest == digest, _CLAIMS.c.done.is_(False))


def is_orphan(claim: Claim) -> bool:
    """Say whether nobody works on a claim: its lease ran out, or its process on this host is gone."""
    return claim.expired or is_gone(claim.owner)


def owner_name() -> str:
    """Return a name for a new owner in this process: ``host|process id|start of the process|nonce``."""
    process = psutil.Process()
    return f"{_host()}|{process.pid}|{process.create_time():.2f}|{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Say whether an owner's process certainly no longer runs: it ran on this host, and is not there."""
    host, process_id, started, _ = owner.rsplit("|", 3)
    if host != _host():
        return False
    try:
        process = psutil.Process(int(process_id))
        return f"{process.create_time():.2f}" != started or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _clock(engine: Engine) -> Callable[[], ColumnElement[float]]:
    """Return the time in seconds since the epoch as an expression: the server's, as clocks of machines differ."""
    if engine.dialect.name == "postgresql":
        return lambda: cast(func.extract("epoch", func.clock_timestamp()), Float(53))
    return lambda: literal(time.time(), Float(53))


def _first_free(taken: Sequence[int]) -> int:
    return next((free for free, slot in enumerate(taken) if free != slot), len(taken))


def _host() -> str:
    """Return the host, and where process ids are numbered per container, the container."""
    namespace = Path("/proc/self/ns/pid")
    numbering = os.readlink(namespace) if namespace.is_symlink() else ""
    return f"{socket.gethostname()[:150]}{numbering}"
