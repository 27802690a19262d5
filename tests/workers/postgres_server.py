"""A PostgreSQL server of one's own, from the binaries of this machine: in a temporary folder, on a unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy

UNPRIVILEGED = "postgres"  # the server refuses to run as root, so root starts it as this user
_READY_WITHIN = 60.0  # seconds


def binaries() -> Path | None:
    """Return the folder of the newest server that is installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    return installed[-1].parent if installed else None


def why_not() -> str | None:
    """Return why no server can be started here; None when one can."""
    if os.name != "posix":
        return "the server is started for Unix only"
    if binaries() is None:
        return "PostgreSQL's server is not installed (Debian: postgresql)"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(UNPRIVILEGED)
        except KeyError:
            return f"PostgreSQL does not run as root, and there is no user {UNPRIVILEGED!r}"
    return None


class PostgresServer:
    """A running server; one database is as good as another to a search, so each caller makes its own.

    Args:
        folder: For its files and its socket; removed by whoever made it.
        settings: Of the server, ``name=value``.
    """

    def __init__(self, folder: Path, settings: Sequence[str] = ()) -> None:
        self._folder = folder
        self._settings = tuple(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._run("initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        self.start()

    def _options(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {"cwd": self._folder}
        group = pwd.getpwnam(UNPRIVILEGED).pw_gid
        return {"cwd": self._folder, "user": UNPRIVILEGED, "group": group, "extra_groups": []}

    def _command(self, *command: str | Path) -> list[str]:
        folder = binaries()
        assert folder is not None
        return [str(folder / command[0]), *map(str, command[1:])]

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(self._command(*command), check=False, capture_output=True, text=True, **self._options())
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start the server and wait until it answers."""
        arguments: list[str | Path] = ["-D", self._folder / "data", "-k", self._folder]
        for setting in ("listen_addresses=", *self._settings):
            arguments += ["-c", setting]
        with (self._folder / "log").open("ab") as log:
            command = self._command("postgres", *arguments)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._options())
        until = time.monotonic() + _READY_WITHIN
        while True:
            try:
                self.query("postgres", "select 1")
                return
            except sqlalchemy.exc.OperationalError:
                assert self._process.poll() is None and time.monotonic() < until, (self._folder / "log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """End the server, and every connection with it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # "fast": rolls back, and does not wait for clients
        self._process.wait(timeout=_READY_WITHIN)

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        self._databases += 1
        name = f"search{self._databases}"
        self.query("postgres", f"create database {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql+psycopg://tester@/{database}?host={self._folder}"

    def query(self, database: str, text: str) -> list[tuple[Any, ...]]:
        """Return the rows that a statement gives, in a connection of its own."""
        engine = sqlalchemy.create_engine(self.url(database), poolclass=sqlalchemy.pool.NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            result = connection.execute(sqlalchemy.text(text))
            return [tuple(row) for row in result] if result.returns_rows else []


@contextmanager
def running_server(settings: Sequence[str] = ()) -> Iterator[PostgresServer]:
    """Run a server while the block is open, and leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="hf-elastic-pg-"))  # short, as the path of a socket has to be
    server = None
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, UNPRIVILEGED)
        server = PostgresServer(folder, settings)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
