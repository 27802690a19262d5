"""One worker: it joins the search in the database, or begins it, and evaluates until the search is over."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_elastic.errors import SearchError
from hf_elastic.files import require_writable
from hf_elastic.search import SearchResult, search_subnets
from hf_elastic.search.executors import Executor, LocalExecutor, Outcome
from hf_elastic.search.objective import Objective
from hf_elastic.search.processes import ProcessExecutor
from hf_elastic.space import Architecture
from hf_elastic.workers.problem import objectives_of, problem_of


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is started with; the same for all workers of a search.

    Attributes:
        source: see :func:`hf_elastic.workers.problem.problem_of`.
        storage: URL of the database, such as ``postgresql://user@host/searches`` or ``sqlite:///search.db``.
        name: of the study in the database; that of the source unless given.
        within: limits of the search by name of a cost or objective.
        evaluations: how many architectures all workers together evaluate.
        algorithm: as for :func:`hf_elastic.search_subnets`.
        seed: of the search.
        processes: evaluate in so many child processes, each with a model of its own; 0: in the worker itself.
        timeout: seconds after which an evaluation has failed; none unless given.
        lease: seconds after which a worker on another host that gives no sign of life has lost its evaluation.
        result: JSON file for the result; none unless given.
    """

    source: str
    storage: str
    name: str | None = None
    within: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 200
    algorithm: str = "nsga2"
    seed: int = 0
    processes: int = 0
    timeout: float | None = None
    lease: float = 600.0
    result: str | None = None

    @property
    def study(self) -> str:
        """Name of the study."""
        return self.name or Path(self.source).name.removesuffix(".run") or self.source


def work(options: WorkerOptions, *, say: Callable[[str], None] = print) -> SearchResult:
    """Evaluates until the search is over, by whichever workers, and returns its result, which is the same for all.

    A worker that is killed loses its own evaluation only, which another takes over. SIGTERM hands it back at once and
    raises ``SystemExit(143)``; SIGINT hands it back and raises ``KeyboardInterrupt``.

    Args:
        options: what to work on.
        say: where lines about it go.

    Raises:
        CheckpointError: the file for the result could not be written.
        ElasticError: what :func:`hf_elastic.workers.problem.problem_of` and :func:`hf_elastic.search_subnets` raise.
    """
    began = time.monotonic()
    if options.result is not None:
        require_writable(Path(options.result))
    problem = problem_of(options.source, within=options.within)
    executor = _Told(_executor(options), [objective.name for objective in problem.objectives], say)
    say(f"worker {socket.gethostname()}:{os.getpid()} in study {options.study!r}, {len(problem.space)} choices")
    result = search_subnets(
        problem.space,
        problem.objectives,
        algorithm=options.algorithm,
        evaluations=options.evaluations,
        within=options.within or None,
        storage=options.storage,
        study_name=options.study,
        seed=options.seed,
        progress=False,
        lease_seconds=options.lease,
        executor=executor,
        timeout=options.timeout,
    )
    say(
        f"study {options.study!r} is over: {len(result.evaluations)} evaluated, {len(result.failures)} failed; "
        f"{executor.count} of them here, in {time.monotonic() - began:.0f} s"
    )
    if options.result is not None:
        result.save(options.result)
    return result


class _Told:
    """An executor that counts and tells what finishes in it."""

    def __init__(self, inner: Executor, names: Sequence[str], say: Callable[[str], None]) -> None:
        self._inner, self._names, self._say = inner, names, say
        self.count = 0

    @property
    def workers(self) -> int:
        return self._inner.workers

    @property
    def blocks(self) -> bool:
        return self._inner.blocks

    def start(self, objectives: Sequence[Objective], *, timeout: float | None) -> None:
        self._inner.start(objectives, timeout=timeout)

    def submit(self, architecture: Architecture) -> None:
        self._inner.submit(architecture)

    def wait(self, seconds: float | None) -> list[Outcome]:
        outcomes = self._inner.wait(seconds)
        for outcome in outcomes:
            self.count += 1
            told = outcome.failure
            if outcome.values is not None:
                pairs = zip(self._names, outcome.values, strict=True)
                told = ", ".join(f"{name} {value:.5g}" for name, value in pairs)
            self._say(f"{outcome.architecture.digest[:8]}: {told}")
        return outcomes

    def close(self) -> None:
        self._inner.close()


def _executor(options: WorkerOptions) -> Executor:
    if type(options.processes) is not int or options.processes < 0:
        raise SearchError(f"processes={options.processes!r} is not an integer of at least 0")
    if options.processes == 0:
        return LocalExecutor()
    build = partial(objectives_of, options.source, tuple(options.within.items()))
    return ProcessExecutor(build, workers=options.processes)
