"""Signals and time limits of evaluations in this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_elastic.errors import SearchError
from hf_elastic.search import search_subnets
from hf_elastic.search.claims import ClaimTable
from hf_elastic.search.interruption import PREEMPTED, Interruption
from hf_elastic.space import Architecture
from tests.workers.searching import problem


@pytest.fixture(autouse=True)
def _interrupted_as_usual() -> Iterator[None]:
    """SIGINT as Python handles it: a shell lets what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def searching(function: Any, **options: Any) -> Any:
    """Search with a loss that calls ``function(number of the evaluation)`` first."""
    space, (loss, cost) = problem()
    count = 0

    def measured(architecture: Architecture) -> float:
        nonlocal count
        count += 1
        function(count)
        return float(loss.function(architecture))

    goals = [replace(loss, function=measured), cost]
    return search_subnets(space, goals, **{"evaluations": 8, "seed": 3, "progress": False, **options})


def signalled(number: int) -> Any:
    """Return what sends this process a signal in the fourth evaluation, and then takes a minute."""

    def send(count: int) -> None:
        if count == 4:
            os.kill(os.getpid(), number)
            time.sleep(60)

    return send


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_hands_the_evaluation_back_and_the_search_goes_on_as_if_it_had_not_come(
    tmp_path: Path, number: int, kind: type[BaseException]
) -> None:
    storage = f"sqlite:///{tmp_path / 's.db'}"
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(kind) as caught:
        searching(signalled(number), storage=storage)
    if kind is SystemExit:
        assert caught.value.code == PREEMPTED == 143  # type: ignore[attr-defined]
    assert {n: signal.getsignal(n) for n in before} == before
    went_on = searching(lambda count: None, storage=storage)
    assert went_on == searching(lambda count: None)


def test_a_signal_while_something_is_written_waits_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path / 's.db'}"
    close, closed = ClaimTable.mark_done, []

    def mark_done(table: ClaimTable, digest: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # the record is there, the claim is open
        close(table, digest)
        closed.append(digest)

    monkeypatch.setattr(ClaimTable, "mark_done", mark_done)
    with pytest.raises(SystemExit):
        searching(lambda count: None, storage=storage)
    assert len(closed) == 1
    monkeypatch.setattr(ClaimTable, "mark_done", close)
    evaluations = []
    assert searching(evaluations.append, storage=storage) == searching(lambda count: None)
    assert len(evaluations) == 7


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Interruption(active=True) as interruption, interruption.let_in():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    ended: list[str] = []

    def elsewhere() -> None:
        with Interruption(active=True):
            ended.append("well")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended == ["well"]


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), Interruption(active=True):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def test_an_evaluation_that_takes_too_long_fails_with_its_cause_and_the_search_goes_on() -> None:
    def sleepy(count: int) -> None:
        try:
            time.sleep(60 if count in (2, 5) else 0)
        except Exception as error:  # what an objective catches is not the alarm
            raise AssertionError from error

    left_before = signal.getitimer(signal.ITIMER_REAL)[0]
    began = time.monotonic()
    result = searching(sleepy, timeout=0.5)
    assert time.monotonic() - began < 30
    assert [failure.number for failure in result.failures] == [1, 4]
    assert {failure.cause for failure in result.failures} == {"no value after timeout=0.5 seconds"}
    assert len(result.evaluations) == 6
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    passed = time.monotonic() - began
    assert left == pytest.approx(max(0.0, left_before - passed), abs=2.0) if left_before else left == 0


def test_a_time_limit_in_another_thread_is_refused_with_what_to_do() -> None:
    said: list[str] = []

    def elsewhere() -> None:
        with pytest.raises(SearchError) as caught:
            searching(lambda count: None, timeout=1.0)
        said.append(str(caught.value))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in said[0] and "ProcessExecutor" in said[0]
