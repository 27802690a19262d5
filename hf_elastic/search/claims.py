"""Claims on architectures in the database of the search: at most one living owner per architecture."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Sequence
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
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

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
        lease_until: Seconds since the epoch.
    """

    digest: str
    payload: str
    owner: str
    lease_until: float


class ClaimTable:
    """Insert, renew, take over and finish the claims of one study.

    Args:
        engine: The database.
        study_id: The study the claims belong to.
        lease_seconds: How long a claim holds without being renewed.
    """

    def __init__(self, engine: Engine, study_id: int, *, lease_seconds: float) -> None:
        self._engine = engine
        self._study_id = study_id
        self._lease_seconds = lease_seconds
        self._mine = owner_name()
        _METADATA.create_all(engine)

    def open_claims(self) -> list[Claim]:
        """Return every claim that is not done, by slot."""
        columns = (_CLAIMS.c.digest, _CLAIMS.c.payload, _CLAIMS.c.owner, _CLAIMS.c.lease_until)
        query = select(*columns).where(self._of_study(), _CLAIMS.c.done.is_(False)).order_by(_CLAIMS.c.slot)
        with self._engine.connect() as connection:
            return [Claim(*row) for row in connection.execute(query)]

    def count(self) -> int:
        """Return the number of claims, done ones included."""
        with self._engine.connect() as connection:
            query = select(func.count()).select_from(_CLAIMS).where(self._of_study())
            return int(connection.execute(query).scalar_one())

    def insert(self, digest: str, payload: str, *, budget: int) -> bool:
        """Claim an architecture in the first free slot below ``budget``; False when that failed."""
        with self._engine.connect() as connection:
            slot = _first_free([int(row.slot) for row in connection.execute(self._slots())])
        if slot >= budget:
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
            with self._engine.begin() as connection:
                connection.execute(row)
        except IntegrityError:
            return False
        return True

    def take_over(self, claim: Claim) -> bool:
        """Become the owner of a claim; False when someone was faster or the owner came back."""
        unchanged = and_(_CLAIMS.c.owner == claim.owner, _CLAIMS.c.lease_until == claim.lease_until)
        change = update(_CLAIMS).where(self._open(claim.digest), unchanged)
        with self._engine.begin() as connection:
            result = connection.execute(change.values(owner=self._mine, lease_until=self._lease()))
            return int(result.rowcount) == 1

    def renew(self, digest: str) -> bool:
        """Extend the lease of a claim of ours; False when it is no longer ours."""
        change = update(_CLAIMS).where(self._open(digest), _CLAIMS.c.owner == self._mine)
        with self._engine.begin() as connection:
            return int(connection.execute(change.values(lease_until=self._lease())).rowcount) == 1

    def is_mine(self, digest: str) -> bool:
        """Say whether we still own an open claim."""
        query = select(_CLAIMS.c.slot).where(self._open(digest), _CLAIMS.c.owner == self._mine)
        with self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def mark_done(self, digest: str) -> None:
        """Close a claim whose outcome is recorded, whoever owns it."""
        with self._engine.begin() as connection:
            connection.execute(update(_CLAIMS).where(self._open(digest)).values(done=True))

    def remove(self, digest: str) -> None:
        """Give up a claim of ours without an outcome."""
        with self._engine.begin() as connection:
            connection.execute(delete(_CLAIMS).where(self._open(digest), _CLAIMS.c.owner == self._mine))

    def is_orphan(self, claim: Claim) -> bool:
        """Say whether nobody works on a claim: its lease ran out, or its process on this host is gone."""
        return claim.lease_until < time.time() or is_gone(claim.owner)

    def _lease(self) -> float:
        return time.time() + self._lease_seconds

    def _slots(self) -> Select[tuple[int]]:
        return select(_CLAIMS.c.slot).where(self._of_study()).order_by(_CLAIMS.c.slot)

    def _of_study(self) -> ColumnElement[bool]:
        return _CLAIMS.c.study_id == self._study_id

    def _open(self, digest: str) -> ColumnElement[bool]:
        return and_(self._of_study(), _CLAIMS.c.digest == digest, _CLAIMS.c.done.is_(False))


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


def _first_free(taken: Sequence[int]) -> int:
    return next((free for free, slot in enumerate(taken) if free != slot), len(taken))


def _host() -> str:
    """Return the host, and where process ids are numbered per container, the container."""
    namespace = Path("/proc/self/ns/pid")
    numbering = os.readlink(namespace) if namespace.is_symlink() else ""
    return f"{socket.gethostname()[:150]}{numbering}"
