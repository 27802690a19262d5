"""A PostgreSQL server for the tests of workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers.postgres_server import PostgresServer, running_server, why_not


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server; skips where none can be started."""
    pytest.importorskip("psycopg", reason='the driver is missing: pip install "hf-elastic[postgres]"')
    if reason := why_not():
        pytest.skip(reason)
    with running_server(["fsync=off", "max_connections=50"]) as server:
        yield server
