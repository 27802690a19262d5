"""Evaluations in processes of their own: the same results, and what becomes of those that die, hang or go wrong."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hf_elastic.errors import ActivationError, SearchError
from hf_elastic.search import Objective, search_subnets
from hf_elastic.search.processes import ProcessExecutor
from tests.training.tiny_training import bert_supernet
from tests.workers.searching import (
    die,
    dying,
    evaluated,
    hang,
    hanging,
    logged,
    objectives,
    problem,
    raising,
    unreliable,
)


@pytest.mark.slow
def test_three_processes_return_what_one_does_where_the_algorithm_asks_nothing_of_results(tmp_path: Path) -> None:
    log = tmp_path / "log"
    executor = ProcessExecutor(partial(logged, str(log)), workers=3)
    options = {"algorithm": "random", "evaluations": 40, "seed": 3, "progress": False}
    together = search_subnets(*problem(), executor=executor, **options)
    assert together.to_json() == search_subnets(*problem(), **options).to_json()
    began = evaluated(log)
    assert len({digest for _, digest in began}) == len(began) == 40
    assert len({process for process, _ in began}) == 3
    assert multiprocessing.active_children() == []
    options["algorithm"] = "nsga2"
    together = search_subnets(*problem(), executor=executor, **options)
    alone = search_subnets(*problem(), **options)
    assert len({e.architecture for e in together.evaluations}) == 40
    assert together.evaluations[:3] == alone.evaluations[:3]  # midpoint, largest, smallest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (dying, "the process of the evaluation ended by signal SIGKILL"),
        (hanging, "no value after timeout=10 seconds"),
    ],
)
def test_an_evaluation_that_dies_or_hangs_fails_alone(build: partial[list[Objective]], cause: str) -> None:
    executor = ProcessExecutor(build, workers=2)
    options = {"algorithm": "random", "evaluations": 9, "seed": 3, "progress": False}
    result = search_subnets(*problem(), executor=executor, timeout=10, **options)
    alone = search_subnets(*problem(), **options)
    lost = {e.architecture for e in alone.evaluations if e.architecture["layers.0.intermediate_size"] == 128}
    assert lost and {f.architecture for f in result.failures} == lost
    assert {f.cause for f in result.failures} == {cause}
    assert result.evaluations == tuple(e for e in alone.evaluations if e.architecture not in lost)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "limit"), [(die, 1800.0), (raising, 1800.0), (hang, 60.0)])
def test_a_process_in_place_of_a_dead_one_may_fail_to_build_but_not_three_times(
    tmp_path: Path, trouble: Callable[[], None], limit: float
) -> None:
    options = {"algorithm": "random", "evaluations": 9, "seed": 3, "progress": False}
    alone = search_subnets(*problem(), **options)
    cases = [((2, 3), False), ((2, 3, 4), True), ((1,), True)]
    for numbers, ends in cases if trouble is not hang else [((2,), False), ((1,), True)]:  # that takes its minutes
        folder = tmp_path / str(numbers)
        folder.mkdir()
        build = partial(unreliable, str(folder), trouble, numbers=numbers)
        executor = ProcessExecutor(build, workers=1, build_timeout=limit)
        if ends:
            with pytest.raises(SearchError, match="before it had its objectives|has no objectives") as caught:
                search_subnets(*problem(), executor=executor, **options)
            assert "\n" not in str(caught.value)
        else:
            result = search_subnets(*problem(), executor=executor, **options)
            (failure,) = result.failures
            assert failure.cause == "the process of the evaluation ended by signal SIGKILL"
            assert result.evaluations == tuple(e for e in alone.evaluations if e.architecture != failure.architecture)
        assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_what_a_process_cannot_use_ends_the_search_in_one_line() -> None:
    for build, words in (
        (raising, "build raised OSError: no weights here"),
        (partial(list, ()), "at least one objective"),
        (partial(dict, a=1), "objectives are Objective"),
    ):
        with pytest.raises(SearchError, match=words) as caught:
            search_subnets(*problem(), executor=ProcessExecutor(build, workers=1), evaluations=5, progress=False)
        assert "\n" not in str(caught.value)
    space, goals = problem()
    with pytest.raises(SearchError, match=r"build returned 'loss', 'parameters', the search has 'loss'"):
        executor = ProcessExecutor(objectives, workers=1)
        search_subnets(space, goals[:1], executor=executor, evaluations=5, progress=False)
    assert multiprocessing.active_children() == []


def test_unusable_arguments_are_named() -> None:
    with pytest.raises(SearchError, match="cannot be sent to another process"):
        ProcessExecutor(lambda: [], workers=1)
    for workers in (0, 1.5, True):
        with pytest.raises(SearchError, match="is not a positive integer"):
            ProcessExecutor(objectives, workers=workers)  # type: ignore[arg-type]
    for seconds in (0, -1.0, float("inf"), "1"):
        with pytest.raises(SearchError, match="build_timeout="):
            ProcessExecutor(objectives, workers=1, build_timeout=seconds)  # type: ignore[arg-type]
    executor = ProcessExecutor(objectives, workers=1)
    for options, word in (({"executor": executor}, "executor="), ({"timeout": 3.0}, "timeout=")):
        with pytest.raises(SearchError, match=word):
            search_subnets(*problem(), algorithm="exact", progress=False, **options)  # type: ignore[arg-type]
    for timeout in (0, -1.0, float("inf"), "1"):
        with pytest.raises(SearchError, match="timeout="):
            search_subnets(*problem(), timeout=timeout, progress=False)  # type: ignore[arg-type]


def test_a_supernet_that_another_thread_uses_ends_the_search_and_is_no_failure_of_an_architecture(
    tmp_path: Path,
) -> None:
    supernet = bert_supernet()
    calls = []

    def activated(architecture: object) -> float:
        calls.append(architecture)
        with supernet.activate(architecture):  # type: ignore[arg-type]
            return float(len(calls))

    goals, url = [Objective("calls", activated)], f"sqlite:///{tmp_path / 's.db'}"
    options = {"evaluations": 6, "storage": url, "progress": False}
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with supernet.activate(supernet.space.smallest()):
            held.set()
            release.wait(timeout=60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(timeout=60)
    with pytest.raises(ActivationError, match="second thread"):
        search_subnets(supernet.space, goals, **options)  # type: ignore[arg-type]
    release.set()
    other.join()
    assert len(calls) == 1
    result = search_subnets(supernet.space, goals, **options)  # type: ignore[arg-type]
    assert len(result.evaluations) == 6 and result.failures == ()
