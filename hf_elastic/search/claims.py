"""Claims on architectures in the database of the search: at most one living owner per architecture."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
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
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

_SLOT_RACES = 20  # claims that others may make between our look for a free slot and ours
_HANDED_BACK = 0.0  # instead of the end of a lease
_HIDDEN, _ENDED = "hidden", "ended"  # instead of the start of a process: one this user may not ask about, and none
_OWNERS: set[str] = set()  # those of this process whose search is not over
_METADATA = MetaData()
_CLAIMS = Table(
    "hf_elastic_claims",
    _METADATA,
    Column("study_id", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), primary_key=True),
    # 0 .. evaluations - 1 without a gap, as no claim is ever deleted: the second unique key is what keeps all processes
    # together to the budget.
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
        lease_until: Seconds since the epoch, by the clock of the database; 0 when the owner handed it back.
        expired: Whether that is over.
    """

    digest: str
    payload: str
    owner: str
    lease_until: float
    expired: bool

    @property
    def handed_back(self) -> bool:
        """Whether the owner gave it up in good health, which says nothing against the architecture."""
        return self.lease_until == _HANDED_BACK


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

    def close(self) -> None:
        """Leave what is still ours to others, this process among them."""
        _OWNERS.discard(self._mine)

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
            last = connection.execute(select(func.max(_CLAIMS.c.slot)).where(self._of_study())).scalar_one()
            return 0 if last is None else int(last) + 1

    def insert(self, digest: str, payload: str, *, budget: int, after: int | None = None) -> bool:
        """Claim an architecture in the next slot below ``budget``; False when someone has it or no slot is free.

        With ``after``, also when there are not just as many claims.
        """
        for _ in range(_SLOT_RACES):
            slot = self.count()
            if slot >= budget or after not in (None, slot):
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

    def hand_back(self, digest: str) -> None:
        """Leave a claim of ours without an outcome to whoever takes it over first.

        It is not deleted: its place in the order of the search stays, and a record that its former owner may still
        write is never one without a claim.
        """
        change = update(_CLAIMS).where(self._open(digest), _CLAIMS.c.owner == self._mine)
        with self._engine.connect() as connection:
            connection.execute(change.values(lease_until=_HANDED_BACK))

    def _lease(self) -> ColumnElement[float]:
        return self._now() + self._lease_seconds

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
    process_id = os.getpid()
    name = f"{_host()}|{process_id}|{_start(process_id)}|{secrets.token_hex(4)}"
    _OWNERS.add(name)
    return name


def is_gone(owner: str) -> bool:
    """Say whether an owner certainly no longer works: it did on this host, and its process or its search is over."""
    host, process_id, started, _ = owner.rsplit("|", 3)
    if host != _host():
        return False
    found = _start(int(process_id))
    if int(process_id) == os.getpid() and found == started:
        return owner not in _OWNERS
    return found not in (started, _HIDDEN)


def _clock(engine: Engine) -> Callable[[], ColumnElement[float]]:
    """Return the time in seconds since the epoch as an expression: the server's, as clocks of machines differ."""
    if engine.dialect.name == "postgresql":
        return lambda: cast(func.extract("epoch", func.clock_timestamp()), Float(53))
    return lambda: literal(time.time(), Float(53))


def _start(process_id: int) -> str:
    """Return when a process began, as a text that no other process with its number has on this host.

    On Linux in ticks since the host was started, which setting its clock does not change.
    """
    try:
        if psutil.LINUX:
            # Its second field, the name, may hold anything; see proc(5) for the fields: 3 is the state, 22 the start.
            fields = Path(f"/proc/{process_id}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return _ENDED if fields[0] in "ZX" else fields[19]
        process = psutil.Process(process_id)
        return _ENDED if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except (psutil.NoSuchProcess, ProcessLookupError):
        return _ENDED
    except (psutil.AccessDenied, OSError):
        return _HIDDEN if _exists(process_id) else _ENDED


def _exists(process_id: int) -> bool:
    """Say whether there is such a process, also where /proc shows users their own only."""
    if not psutil.POSIX:
        return bool(psutil.pid_exists(process_id))
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _host() -> str:
    """Return this start of the host, and where process ids are numbered per container, the container.

    Machines made from one image may share a name, but not the identity of their last start.
    """
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    start = boot.read_text().strip() if boot.is_file() else ""
    numbering = os.readlink(namespace) if namespace.is_symlink() else ""
    return f"{socket.gethostname()[:150]} {start} {numbering}"
