"""The journal of a search in a database: an Optuna study of evaluated trials, and claims beside it."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from hf_elastic.architecture import shown
from hf_elastic.errors import ElasticError, StorageError
from hf_elastic.search.claims import Claim, ClaimTable, is_orphan
from hf_elastic.search.identity import Identity
from hf_elastic.search.journal import Proposal, Record
from hf_elastic.search.samplers import TrialEncoding

DEFAULT_STUDY_NAME = "hf_elastic"
_IDENTITY = "hf_elastic:identity"  # study attribute: what the study was made for
_PLANNED = "hf_elastic:planned"  # study attribute: evaluations planned when it was made
_ARCHITECTURE = "hf_elastic:architecture"  # trial attribute: values by name of the choice
_DIGEST = "hf_elastic:digest"  # trial attribute: digest of the architecture; other trials are not ours
_FAILURE = "hf_elastic:failure"  # trial attribute: cause of a failed evaluation
_STUDY_ATTRS = "hf_elastic:study_attrs"  # trial attribute: what the sampler changed at the study
_SQLITE_TIMEOUT = 120.0  # seconds to wait for another process that is writing
_RENEWALS_PER_LEASE = 4
_MOST_LOST = 5  # processes that one architecture may take down before it counts as failed
_MAX_FAILURE = 500  # characters
_POSTGRES = "postgresql+psycopg"
_OPENINGS = 8
_RETRIES = (0.1, 5.0)  # seconds: first and longest pause while a server is away
# What keeps a connection that died without a word (a switch, a lost node) from being waited for: seconds, but the last.
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}
_CROWDED_WORDS = ("too many clients", "too many connections", "remaining connection slots", "starting up")
_RACE_WORDS = ("already exists", "UNIQUE", "unique", "Duplicate", "locked")
# Optuna says RuntimeError to tables of another version and ImportError to a missing database driver; the last
# three come from contents that are not what we or Optuna wrote.
_DATABASE_ERRORS = (
    SQLAlchemyError,
    StorageInternalError,
    RuntimeError,
    ImportError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
)

_T = TypeVar("_T")


class _Away:
    """Instead of an answer: the server cannot be reached."""


class DatabaseJournal:
    """Share a search among processes through a database.

    Args:
        url: SQLAlchemy URL, such as ``sqlite:///search.db``.
        encoding: Translation of the space.
        identity: What the study has to be made for.
        planned: Evaluations planned; it counts when this search is the one that makes the study.
        study_name: Which of the searches in the database.
        lease_seconds: How long a claim holds when its process on another host stops renewing it.
        sleep: What to wait with while a server is away or has no connection left.

    Raises:
        StorageError: The database is unreachable, unreadable, or holds another search under this name.
    """

    def __init__(
        self,
        url: str,
        encoding: TrialEncoding,
        identity: Identity,
        *,
        planned: int,
        study_name: str | None,
        lease_seconds: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._shown_url = _checked_url(url)
        self._sleep = sleep
        self._encoding = encoding
        self._lease_seconds = lease_seconds
        self._read: set[str] = set()
        self._trials_read = 0
        name = study_name or DEFAULT_STUDY_NAME
        with self._errors("opened"):
            self._storage = self._first_or_not(lambda: _open_database(url))
            self._study = self._open_study(name, identity, planned=planned)
            self.planned = int(self._study.user_attrs[_PLANNED])
            study_id = self._storage.get_study_id_from_name(name)
            engine = self._storage.engine
            self._claims = self._first_or_not(lambda: ClaimTable(engine, study_id, lease_seconds=lease_seconds))

    def read(self) -> list[Record]:
        """Return the records that finished since the last call, by number."""
        return self._talk("read", self._new_records)

    def adopt(self, held: Collection[str] = ()) -> Proposal | None:
        """Take over the claim of an owner that is gone; close claims whose outcome is already recorded."""
        return self._talk("read", lambda: self._adopted(held))

    def claim(self, proposal: Proposal, *, budget: int, after: int | None = None) -> bool:
        """Claim an architecture; see :meth:`~hf_elastic.search.journal.Journal.claim`."""
        payload = json.dumps(
            {
                "indices": self._encoding.space.encode(proposal.architecture),
                "trial_attrs": proposal.trial_attrs,
                "study_attrs": proposal.study_attrs,
                "lost": 0,
            }
        )
        digest = proposal.architecture.digest
        return self._talk("written", lambda: self._claims.insert(digest, payload, budget=budget, after=after))

    def open_digests(self) -> frozenset[str]:
        """Return the architectures claimed, by anyone, and not finished."""
        claims = self._talk("read", self._claims.open_claims)
        return frozenset(claim.digest for claim in claims) - self._read

    def is_full(self, budget: int) -> bool:
        """Say whether the claims, finished ones included, use up the budget."""
        return self._talk("read", self._claims.count) >= budget

    def slots(self) -> dict[str, int]:
        """Return the position of each claim, by digest: the order in which evaluations began."""
        return self._talk("read", self._claims.slots)

    @contextmanager
    def keep_claim(self, proposal: Proposal, *, timeout: float | None = None) -> Iterator[None]:
        """Renew the claim from a thread while the context is open.

        Where an evaluation hangs so that not even its ``timeout`` interrupts it, the claim is left to others at last.
        """
        self.rest()
        over = threading.Event()
        limit = math.inf if timeout is None else time.monotonic() + timeout + self._lease_seconds
        arguments = (over, proposal.architecture.digest, limit)
        thread = threading.Thread(target=self._renew_until, args=arguments, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def finish(self, proposal: Proposal, values: tuple[float, ...] | None, failure: str | None) -> None:
        """Add the trial and close the claim; a claim that was taken over is left to its new owner."""
        digest = proposal.architecture.digest
        changed = dict(proposal.study_attrs)
        # One attribute instead of a parameter per choice, for each of which Optuna would query the database.
        notes: dict[str, Any] = {_DIGEST: digest, _ARCHITECTURE: dict(proposal.architecture)}
        if failure is not None:
            notes[_FAILURE] = failure[:_MAX_FAILURE]
        trial = create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values,
            user_attrs=notes,
            system_attrs={**proposal.trial_attrs, **({_STUDY_ATTRS: changed} if changed else {})},
        )
        self._talk("written", lambda: self._record_own(digest, trial))

    def release(self, proposal: Proposal) -> None:
        """Hand the claim back without an outcome: whoever looks next adopts it."""
        with self._errors("written"):
            self._claims.hand_back(proposal.architecture.digest)

    def rest(self) -> None:
        """Free the connections for a while: a thousand workers that evaluate shall not hold a thousand of them."""
        self._storage.engine.dispose()

    def close(self) -> None:
        """Free the connections, and what is still claimed."""
        self._claims.close()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _open_study(self, name: str, identity: Identity, *, planned: int) -> optuna.Study:
        """Open or make the study, and make sure that it is one of this very search."""
        study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            directions=[objective.direction for objective in identity.objectives],
            load_if_exists=True,
        )
        found = study.user_attrs.get(_IDENTITY)
        if found is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_PLANNED, planned)  # first, so that what has an identity has a plan
            study.set_user_attr(_IDENTITY, identity.to_data())
            return study
        differences = identity.differences(found)
        if differences:
            raise StorageError(
                f"storage {self._shown_url} holds, as study {name!r}, {differences}; "
                "pass another study_name= or storage="
            )
        return study

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Raise what goes wrong in the database as a one-line :class:`StorageError`."""
        try:
            yield
        except ElasticError:
            raise
        except _DATABASE_ERRORS as error:
            if isinstance(error, ImportError) and "psycopg'" in str(error):
                raise StorageError(
                    f'storage {self._shown_url} needs the package psycopg: pip install "hf-elastic[postgres]"'
                ) from error
            raise StorageError(
                f"storage {self._shown_url} cannot be {action}: {_reason(error)}; check the file or server, "
                "or pass another storage="
            ) from error

    def _talk(self, action: str, call: Callable[[], _T]) -> _T:
        """Return what ``call`` returns; where a server went away, try for as long as a lease holds.

        What was written although the answer got lost does no harm: a claim that we do not know of runs out, and of two
        records of one architecture the first counts.
        """
        until, pause = time.monotonic() + self._lease_seconds, _RETRIES[0]
        with self._errors(action):
            while True:
                found = self._answer(call, last=time.monotonic() > until)
                if not isinstance(found, _Away):
                    return found
                self.rest()
                self._sleep(pause)
                pause = min(2 * pause, _RETRIES[1])

    def _first_or_not(self, make: Callable[[], _T]) -> _T:
        """Return what ``make`` returns, which makes tables unless they are there.

        Processes that start together race to make them; the loser finds them at its next look. A server that has no
        connection left, as it may be when many start at once, is asked for as long as a lease holds.
        """
        races, until, pause = 0, time.monotonic() + self._lease_seconds, _RETRIES[0]
        while True:
            try:
                return make()
            except (IntegrityError, OperationalError, ProgrammingError, StorageInternalError) as error:
                crowded = any(word in str(error) for word in _CROWDED_WORDS) and time.monotonic() < until
                races += not crowded
                if not crowded and (races == _OPENINGS or not any(word in str(error) for word in _RACE_WORDS)):
                    raise
            self._sleep(pause)
            pause = min(2 * pause, _RETRIES[1])

    @staticmethod
    def _answer(call: Callable[[], _T], *, last: bool) -> _T | _Away:
        """Return what ``call`` returns, or that there was nobody to answer, unless this is the last try."""
        try:
            return call()
        except (DBAPIError, StorageInternalError) as error:
            if last or not _is_outage(error):
                raise
            return _Away()

    def _new_records(self) -> list[Record]:
        records = []
        trials = self._study.get_trials(deepcopy=False)
        # Trials are added finished and one after the other, so what was read before stays as it was.
        new, self._trials_read = trials[self._trials_read :], len(trials)
        for trial in new:
            digest = trial.user_attrs.get(_DIGEST)
            # The same digest twice: an owner came back after it had been given up. The first one counts.
            if digest is not None and digest not in self._read and trial.state.is_finished():
                self._read.add(digest)
                records.append(self._record(trial))
        return records

    def _adopted(self, held: Collection[str]) -> Proposal | None:
        for claim in self._claims.open_claims():
            if claim.digest in self._read:
                self._claims.mark_done(claim.digest)
            elif claim.digest not in held and is_orphan(claim) and (proposal := self._taken_over(claim)) is not None:
                return proposal
        return None

    def _record_own(self, digest: str, trial: FrozenTrial) -> None:
        if self._claims.is_mine(digest):
            self._study.add_trial(trial)
            self._claims.mark_done(digest)

    def _taken_over(self, claim: Claim) -> Proposal | None:
        """Return the proposal of a claim that is ours now; None when it is not, or has cost too many their lives."""
        data = json.loads(claim.payload)
        lost = data["lost"] + (not claim.handed_back)
        if not self._claims.take_over(claim, json.dumps({**data, "lost": lost})):
            return None
        proposal = self._proposal(claim.payload)
        if lost < _MOST_LOST:
            return proposal
        self.finish(proposal, None, f"{lost} processes ended or fell silent while they evaluated it")
        return None

    def _renew_until(self, over: threading.Event, digest: str, limit: float) -> None:
        while not over.wait(self._lease_seconds / _RENEWALS_PER_LEASE) and time.monotonic() < limit:
            try:
                self._claims.renew(digest)
            except SQLAlchemyError:
                continue  # the next renewal may come through; finish() asks whether the claim is ours
            self.rest()

    def _record(self, trial: FrozenTrial) -> Record:
        attrs = {key: value for key, value in trial.system_attrs.items() if key != _STUDY_ATTRS}
        architecture = self._encoding.space.canonical(trial.user_attrs[_ARCHITECTURE])
        proposal = Proposal(architecture, attrs, trial.system_attrs.get(_STUDY_ATTRS, {}))
        values = tuple(trial.values) if trial.state == TrialState.COMPLETE else None
        return Record(trial.number, proposal, values, trial.user_attrs.get(_FAILURE))

    def _proposal(self, payload: str) -> Proposal:
        data = json.loads(payload)
        architecture = self._encoding.space.decode(data["indices"])
        return Proposal(architecture, data["trial_attrs"], data["study_attrs"])


def _open_database(url: str) -> RDBStorage:
    arguments: dict[str, Any] = {}
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        arguments["connect_args"] = {"timeout": _SQLITE_TIMEOUT}
    if parsed.drivername == "postgresql":  # for which SQLAlchemy 2.0 takes another driver than 2.1
        parsed = parsed.set(drivername=_POSTGRES)
    if parsed.drivername == _POSTGRES:
        given = {name: value for name, value in _LIBPQ.items() if name not in parsed.query}
        arguments["connect_args"] = given
    storage = RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs=arguments)
    _add_indexes(storage.engine)
    return storage


def _add_indexes(engine: Engine) -> None:
    """Make the indexes that Optuna would have made, had its process not been killed behind their table.

    SQLite commits each of these statements by itself, and Optuna never looks at a table again that is there. Without
    the index of their names there would soon be two studies of one name, which nobody could open.
    """
    for table in BaseModel.metadata.sorted_tables:
        for index in table.indexes:
            index.create(engine, checkfirst=True)


def _is_outage(error: BaseException) -> bool:
    """Say whether a server, not a file, could not be reached, so that it may come back."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OperationalError | InterfaceError):
        cause = cause.__cause__
    return cause is not None and type(cause.orig).__module__.partition(".")[0] != "sqlite3"


def _checked_url(url: object) -> str:
    """Return the URL without its password.

    Raises:
        StorageError: It is no database URL, or one of a database that no other process could see.
    """
    try:
        parsed = make_url(url) if isinstance(url, str) else None
    except ArgumentError:
        parsed = None
    if parsed is None:
        raise StorageError(f"storage={shown([url])} is no database URL; write for example sqlite:///search.db")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StorageError(f"storage={shown([url])} names no file; write sqlite:///search.db, or storage=None")
    return parsed.render_as_string(hide_password=True)


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost message: the database's own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    return str(error).split("\n", 1)[0][:200] or type(error).__name__
