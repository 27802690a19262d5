"""Searches by several processes on a real PostgreSQL server: shared, killed, preempted, cut off."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_elastic.errors import StorageError
from hf_elastic.search import search_subnets
from hf_elastic.search.identity import Identity
from hf_elastic.search.interruption import PREEMPTED
from hf_elastic.search.journal import Proposal
from hf_elastic.search.samplers import TrialEncoding
from hf_elastic.search.storage import DatabaseJournal
from tests.workers.postgres_server import PostgresServer
from tests.workers.searching import evaluated, logged, problem, start, wait_for


def open_claims(server: PostgresServer, url: str) -> int:
    database = url.rpartition("/tester@/")[2].partition("?")[0] or url.partition("@/")[2].partition("?")[0]
    ((count,),) = server.query(database, "select count(*) from hf_elastic_claims where not done and lease_until > 0")
    return int(count)


def journal(url: str, *, lease_seconds: float = 600.0) -> DatabaseJournal:
    space, objectives = problem()
    identity = Identity(space, objectives, 0, "nsga2")
    return DatabaseJournal(
        url, TrialEncoding(space), identity, planned=10, study_name=None, lease_seconds=lease_seconds
    )


def test_a_search_on_postgresql_returns_what_one_in_memory_does_and_goes_on_there(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    for evaluations in (12, 20):
        stored = search_subnets(*problem(), evaluations=evaluations, storage=url, seed=3, progress=False)
    alone = search_subnets(*problem(), evaluations=12, seed=3, progress=False)
    assert stored.evaluations[:12] == alone.evaluations and len(stored.evaluations) == 20


@pytest.mark.slow
def test_four_processes_evaluate_each_architecture_once_and_end_with_the_same_result(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url, log = postgres.new_database(), tmp_path / "log"
    outputs = [tmp_path / f"output{number}" for number in range(4)]
    options = {"evaluations": 60, "storage": url, "log": str(log), "seconds": 0.05, "algorithm": "random"}
    processes = [start(output=str(output), **options) for output in outputs]
    for process in processes:
        assert process.communicate(timeout=240)[1] == "" and process.returncode == 0
    began = evaluated(log)
    assert len(began) == len({digest for _, digest in began}) == 60
    assert len({process for process, _ in began}) > 1
    # Random search asks nothing of what is finished, so that the company changes nothing.
    alone = search_subnets(*problem(), algorithm="random", evaluations=60, seed=3, progress=False)
    assert {output.read_text() for output in outputs} == {alone.to_json()}


@pytest.mark.slow
def test_a_killed_worker_loses_its_own_evaluation_only_and_a_preempted_one_hands_it_back(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url, log, gate = postgres.new_database(), tmp_path / "log", tmp_path / "gate"
    options = {"evaluations": 12, "storage": url, "log": str(log), "until": str(gate)}
    preempted = start(output=str(tmp_path / "preempted"), **options)
    wait_for(lambda: len(evaluated(log)) == 1)
    killed = start(output=str(tmp_path / "killed"), **options)
    wait_for(lambda: len(evaluated(log)) == 2)
    (_, handed_back), (_, lost) = evaluated(log)
    assert open_claims(postgres, url) == 2
    preempted.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert preempted.wait(timeout=60) == PREEMPTED == 143 and time.monotonic() - began < 30
    assert open_claims(postgres, url) == 1  # nobody has to wait for a lease of ten minutes
    killed.kill()
    killed.wait(timeout=60)
    gate.touch()
    last = start(output=str(tmp_path / "last"), **options)
    assert last.communicate(timeout=120)[1] == "" and last.returncode == 0
    digests = [digest for _, digest in evaluated(log)]
    assert sorted(digest for digest in digests if digests.count(digest) > 1) == sorted(2 * [handed_back, lost])
    alone = search_subnets(*problem(), evaluations=12, seed=3, progress=False)
    assert {digests[2:][n] for n in range(12)} == {e.architecture.digest for e in alone.evaluations}


def test_a_search_outlives_a_restart_of_its_server(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    space, (loss, cost) = problem()
    restarted = threading.Event()
    calls = 0

    def interrupted(architecture: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            postgres.stop()
            threading.Timer(1.0, lambda: (postgres.start(), restarted.set())).start()
        return float(loss.function(architecture))  # type: ignore[arg-type]

    result = search_subnets(
        space, [replace(loss, function=interrupted), cost], evaluations=10, storage=url, seed=3, progress=False
    )
    assert restarted.wait(timeout=30) and calls == 10
    assert result == search_subnets(space, [loss, cost], evaluations=10, seed=3, progress=False)


def test_sigterm_does_not_wait_for_a_server_that_is_away(postgres: PostgresServer, tmp_path: Path) -> None:
    url, log, gate = postgres.new_database(), tmp_path / "log", tmp_path / "gate"
    process = start(output=str(tmp_path / "output"), log=str(log), until=str(gate), storage=url, evaluations=6)
    wait_for(lambda: len(evaluated(log)) == 1)
    postgres.stop()
    try:
        gate.touch()  # the evaluation ends, and there is nobody to write it down for
        time.sleep(1.0)
        assert process.poll() is None and len(evaluated(log)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == "" and process.returncode == PREEMPTED
    finally:
        process.kill()  # where it waits after all
        postgres.start()
    options: dict[str, Any] = {"evaluations": 6, "seed": 3, "progress": False}
    space, goals = problem()[0], logged(str(log))
    assert search_subnets(space, goals, storage=url, **options) == search_subnets(*problem(), **options)
    assert len(evaluated(log)) == 7  # the first one again


def test_leases_go_by_the_clock_of_the_server(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.new_database()
    one, other = journal(url, lease_seconds=1.0), journal(url, lease_seconds=1.0)
    proposal = Proposal(problem()[0].largest())
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86_400.0)  # a machine that lives in the day before
    assert one.claim(proposal, budget=1)
    monkeypatch.setattr(time, "time", lambda: now() + 86_400.0)
    assert other.adopt() is None
    time.sleep(1.1)
    assert other.adopt() == proposal


def test_no_connection_is_held_during_an_evaluation(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    database = url.partition("@/")[2].partition("?")[0]
    space, (loss, cost) = problem()
    held = []

    def counting(architecture: object) -> float:
        ((count,),) = postgres.query("postgres", f"select count(*) from pg_stat_activity where datname = '{database}'")
        held.append(count)
        return float(loss.function(architecture))  # type: ignore[arg-type]

    search_subnets(space, [replace(loss, function=counting), cost], evaluations=6, storage=url, progress=False)
    assert held == 6 * [0]


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    url = "postgresql://user:secret@127.0.0.1:1/searches"
    with pytest.raises(StorageError) as caught:
        search_subnets(*problem(), evaluations=5, storage=url, progress=False)
    message = str(caught.value)
    assert "\n" not in message and "secret" not in message and "127.0.0.1" in message
    if "psycopg:" not in message:  # the driver is installed
        assert "refused" in message


def test_five_processes_that_one_architecture_takes_down_are_enough(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    proposal = Proposal(problem()[0].largest())
    journals = [journal(url, lease_seconds=0.01) for _ in range(6)]
    assert journals[0].claim(proposal, budget=1)
    for successor in journals[1:5]:
        time.sleep(0.05)
        assert successor.adopt() == proposal
    time.sleep(0.05)
    assert journals[5].adopt() is None
    (record,) = journals[5].read()
    assert record.values is None and record.failure == "5 processes ended or fell silent while they evaluated it"
