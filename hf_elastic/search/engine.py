"""The entry to a search: check what was asked, choose the engine, run it, gather the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from hf_elastic.architecture import shown
from hf_elastic.errors import InfeasibleError, SearchError
from hf_elastic.search.exact import ExactSearch
from hf_elastic.search.executors import Executor, LocalExecutor
from hf_elastic.search.identity import Identity
from hf_elastic.search.interruption import Interruption
from hf_elastic.search.journal import Journal, MemoryJournal
from hf_elastic.search.limits import Feasibility, Limit, cost_of, resolve_limits
from hf_elastic.search.loop import Fixed, ProposalSource, SearchLoop
from hf_elastic.search.objective import Objective, check_objectives, known_objectives
from hf_elastic.search.progress import SearchProgress
from hf_elastic.search.proposals import (
    LISTABLE,
    Generator,
    ListProposer,
    Proposer,
    RandomGenerator,
    SamplerGenerator,
    list_feasible,
)
from hf_elastic.search.results import Evaluation, Failure, Goal, SearchResult
from hf_elastic.search.samplers import TrialEncoding, algorithm_identity, algorithm_name, sampler_factory
from hf_elastic.search.storage import DatabaseJournal
from hf_elastic.space import Architecture, SearchSpace

Algorithm = str | BaseSampler | Callable[[int], BaseSampler]
SourceFor = Callable[[int], ProposalSource]
"""From the number of evaluations planned when the search began to where its proposals come from."""

DEFAULT_EVALUATIONS = 200


def search_subnets(
    space: SearchSpace,
    objectives: Sequence[Objective],
    *,
    algorithm: Algorithm = "nsga2",
    evaluations: int | None = None,
    within: Mapping[str, float] | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    include: Sequence[Architecture] = (),
    progress: bool = True,
    lease_seconds: float = 600.0,
    executor: Executor | None = None,
    timeout: float | None = None,
) -> SearchResult:
    """Search a space for architectures that are good in every objective within limits.

    ``algorithm="exact"`` evaluates nothing and finds the complete Pareto front of objectives that are sums over groups
    of choices (:attr:`Objective.additive`), of any space, in seconds; with one objective, its optimum within the
    limits. See :class:`~hf_elastic.search.exact.ExactSearch`.

    The midpoint architecture and those in ``include`` are always evaluated, the largest and the smallest
    unless the limits exclude them; within limits also the largest one whose sizes are all cut in proportion.
    No architecture is evaluated twice. What is proposed is a function of ``seed``, of what is under evaluation and
    of the finished evaluations only: with a storage, a search that was killed and is started again ends as if it had
    not been, and any number of processes started with the same arguments share the work and return the same result. A
    storage takes only the search it was made for: the same space, objectives, algorithm, limits and seed. With more
    ``evaluations`` the search is continued, as if by the algorithm it was begun with: NSGA-II keeps the
    population that the first call planned.

    Several evaluations at once (processes that share a storage, or an ``executor``) leave the result of ``"random"``
    and ``"exhaustive"`` what it is with one. Other algorithms propose before they know all that one evaluation after
    another would have told them: NSGA-II's first generation is the same, what follows depends on what finishes first.

    With a storage or an executor, SIGTERM (a preempted job) and SIGINT hand back at once what is under evaluation,
    unless the program handles them itself; SIGTERM then raises ``SystemExit(143)``.

    Args:
        space: The search space.
        objectives: What to optimise; any number.
        algorithm: ``"nsga2"``, ``"tpe"``, ``"random"``, ``"exhaustive"``, ``"exact"``, a function from a seed to an
            Optuna sampler (preferred), or an Optuna sampler.
        evaluations: How many distinct architectures may be evaluated, over all processes and restarts, failed
            ones included; 200 unless given, for ``"exhaustive"`` all; not for ``"exact"``.
        within: Limits by name of an objective or a related cost. A float in (0, 1] on a cost is a fraction of
            the largest architecture's; any other number is absolute. Upper bounds, lower ones for what is
            maximized. Limits on costs are hard: what exceeds them is shrunk or redrawn, not evaluated.
        storage: None, or a database URL such as ``"sqlite:///search.db"``; not for ``"exact"``.
        study_name: Which search in the storage.
        seed: Seed of all proposals.
        include: Architectures that are always evaluated.
        progress: Whether to show a bar with the time left and, except for ``"exact"``, the best so far.
        lease_seconds: After this time without a sign of life from another host its claim is taken over.
        executor: Where architectures are evaluated, such as
            :class:`~hf_elastic.search.processes.ProcessExecutor`; one at a time in this thread unless given. Not for
            ``"exact"``.
        timeout: Seconds after which an evaluation has failed. Without an executor only Python code is interrupted, in
            the main thread; a process of an executor is ended whatever it does. Not for ``"exact"``.

    Raises:
        SearchError: An argument is not usable, or every evaluation fails.
        ActivationError: A supernet that is measured is in use in another thread.
        InfeasibleError: The limits exclude everything (raised before anything is evaluated).
        StorageError: The storage cannot be used, or holds another search.
    """
    goals = check_objectives(objectives)
    _check_numbers(evaluations=evaluations, seed=seed, lease_seconds=lease_seconds, timeout=timeout)
    known = known_objectives(goals)
    limits = resolve_limits(within, known, space)
    result = partial(
        SearchResult,
        space=space,
        objectives=tuple(Goal(o.name, o.direction, o.unit, o.cost) for o in goals),
        within=dict(within or {}),
        limits=limits,
        seed=seed,
        algorithm=algorithm_name(algorithm),
        references={o.name: cost_of(o, space.largest()) for o in known.values() if o.cost},
        known=known,
    )
    feasibility = Feasibility(space, limits, known)
    if algorithm == "exact":
        _check_exact(evaluations=evaluations, storage=storage, executor=executor, timeout=timeout)
        exact = ExactSearch(space, goals, limits=limits, known=known)
        evaluated, even = _solved(exact, feasibility, space=space, include=include, progress=progress)
        return result(evaluations=evaluated, even_architecture=even)
    _check_measured(limits, goals)
    _check_portable(goals, storage=storage, executor=executor)
    feasibility.require_some()
    fixed = _always_evaluated(space, feasibility, include, even=feasibility.even())
    encoding = TrialEncoding(space)
    # Claims in memory end with the process, so there a signal may do what it always does.
    interruption = Interruption(active=executor is not None or storage is not None)
    with _quiet_optuna(), interruption:
        source_for, budget = _proposal_source(
            algorithm,
            encoding,
            feasibility,
            goals=goals,
            limited=bool(limits),
            fixed=fixed,
            evaluations=evaluations,
            seed=seed,
        )
        journal: Journal = MemoryJournal(planned=budget)
        if storage is not None:
            identity = Identity(space, goals, seed, algorithm_identity(algorithm), limits=limits, known=known)
            shared = partial(DatabaseJournal, study_name=study_name, lease_seconds=lease_seconds)
            journal = shared(storage, encoding, identity, planned=budget, sleep=interruption.sleep)
        with closing(journal):
            evaluated, failures = _evaluated(
                goals,
                source_for(journal.planned),
                journal,
                executor=executor,
                limits=limits,
                feasibility=feasibility,
                fixed=fixed,
                budget=budget,
                progress=progress,
                interruption=interruption,
                timeout=timeout,
            )
    return result(evaluations=evaluated, failures=failures, even_architecture=feasibility.even())


def _evaluated(
    goals: Sequence[Objective],
    source: ProposalSource,
    journal: Journal,
    *,
    executor: Executor | None,
    limits: Sequence[Limit],
    feasibility: Feasibility,
    fixed: Sequence[Fixed],
    budget: int,
    progress: bool,
    interruption: Interruption,
    timeout: float | None,
) -> tuple[tuple[Evaluation, ...], tuple[Failure, ...]]:
    """Return what the loop evaluates; leave nothing running and nothing claimed."""
    with ExitStack() as ending:
        bar = SearchProgress(goals, total=budget, shown=progress)
        ending.callback(bar.close)
        runs_in: Executor = executor or LocalExecutor()
        ending.callback(runs_in.close)
        runs_in.start(goals, timeout=timeout)
        loop = SearchLoop(
            goals,
            source,
            journal,
            executor=runs_in,
            limits=limits,
            feasibility=feasibility,
            progress=bar,
            interruption=interruption,
            timeout=timeout,
        )
        return loop.run(fixed, budget)


def _solved(
    exact: ExactSearch,
    feasibility: Feasibility,
    *,
    space: SearchSpace,
    include: Sequence[Architecture],
    progress: bool,
) -> tuple[tuple[Evaluation, ...], Architecture | None]:
    """Return what is always evaluated, then the front, and the largest architecture cut in proportion."""
    for architecture in include:  # before minutes of work
        space.validate(architecture)
    front = exact.front(progress=progress)
    even: Architecture | None = None
    # The way to the even architecture starts from one that keeps the limits, found by descent: limits that only few
    # architectures keep may leave it without one, though the front is not empty.
    with suppress(InfeasibleError):
        even = feasibility.even()
    given = [one.architecture for one in _always_evaluated(space, feasibility, include, even=even)]
    found = [*map(exact.evaluate, given), *(one for one in front if one.architecture not in given)]
    return tuple(replace(one, number=number) for number, one in enumerate(found)), even


def _proposal_source(
    algorithm: Algorithm,
    encoding: TrialEncoding,
    feasibility: Feasibility,
    *,
    goals: Sequence[Objective],
    limited: bool,
    fixed: Sequence[Fixed],
    evaluations: int | None,
    seed: int,
) -> tuple[SourceFor, int]:
    """Return how to make the source of proposals, and how many architectures are evaluated in all.

    Raises:
        SearchError: The algorithm is unknown, or does not fit the space or the number of evaluations.
    """
    space = encoding.space
    if algorithm == "exhaustive":
        return _exhaustive(space, feasibility, fixed=fixed, evaluations=evaluations)
    budget = min(DEFAULT_EVALUATIONS if evaluations is None else evaluations, space.size)
    if len(fixed) > budget:
        raise SearchError(
            f"evaluations={evaluations} are fewer than the {len(fixed)} architectures that are always "
            f"evaluated ({shown(one.label for one in fixed)}); give at least {len(fixed)}"
        )
    if algorithm != "random":  # an unusable one shall not first make a study
        sampler_factory(algorithm, encoding, goals, evaluations=budget)

    def source_for(planned: int) -> ProposalSource:
        generator: Generator = RandomGenerator(space)
        if algorithm != "random":
            factory = sampler_factory(algorithm, encoding, goals, evaluations=planned)
            excess = feasibility.excess if limited else None
            generator = SamplerGenerator(encoding, factory, goals, excess=excess)
        return Proposer(space, feasibility, generator, seed=seed)

    return source_for, budget


def _exhaustive(
    space: SearchSpace, feasibility: Feasibility, *, fixed: Sequence[Fixed], evaluations: int | None
) -> tuple[SourceFor, int]:
    if space.size > LISTABLE:
        raise SearchError(
            f"algorithm='exhaustive' lists at most {LISTABLE} architectures, this space has {space.size}; "
            "use algorithm='nsga2', or fewer values per choice"
        )
    listed = list_feasible(space, feasibility)
    points = len({*(a.digest for a in listed), *(one.architecture.digest for one in fixed)})
    if evaluations is not None and evaluations < points:
        raise SearchError(
            f"algorithm='exhaustive' evaluates all {points} architectures, evaluations={evaluations} are too "
            "few; leave evaluations= out, or use algorithm='nsga2'"
        )
    return lambda planned: ListProposer(listed), points


def _always_evaluated(
    space: SearchSpace, feasibility: Feasibility, include: Sequence[Architecture], *, even: Architecture | None
) -> tuple[Fixed, ...]:
    """Return the midpoint, the extremes within the limits, and what the caller wants, each once."""
    extremes = (Fixed("largest", space.largest()), Fixed("smallest", space.smallest()))
    wanted = [Fixed("midpoint", space.midpoint())]
    wanted += [] if even is None else [Fixed("even", even)]
    wanted += [extreme for extreme in extremes if feasibility.allows(extreme.architecture)]
    for architecture in include:
        space.validate(architecture)
        wanted.append(Fixed("include", space.canonical(architecture)))
    first: dict[str, Fixed] = {}
    for one in wanted:
        first.setdefault(one.architecture.digest, one)
    return tuple(first.values())


def _check_numbers(*, evaluations: int | None, seed: int, lease_seconds: float, timeout: float | None) -> None:
    if evaluations is not None and (type(evaluations) is not int or evaluations < 1):
        raise SearchError(f"evaluations={evaluations!r} is not a positive integer")
    if type(seed) is not int:
        raise SearchError(f"seed={seed!r} is not an integer")
    for name, value in (("lease_seconds", lease_seconds), ("timeout", timeout)):
        if value is None and name == "timeout":
            continue
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SearchError(f"{name}={value!r} is not a positive number of seconds")


def _check_exact(
    *, evaluations: int | None, storage: str | None, executor: Executor | None, timeout: float | None
) -> None:
    if executor is not None or timeout is not None:
        name = "timeout" if executor is None else "executor"
        raise SearchError(f"algorithm='exact' evaluates nothing, {name}= does not apply; leave it out")
    if evaluations is not None:
        raise SearchError(
            f"algorithm='exact' adds up tables and evaluates nothing, evaluations={evaluations} does not apply; "
            "leave it out"
        )
    if storage is not None:
        raise SearchError(
            f"algorithm='exact' takes seconds and keeps nothing, storage={storage!r} does not apply; leave it out and "
            "save the result"
        )


def _check_measured(limits: Sequence[Limit], goals: Sequence[Objective]) -> None:
    names = {goal.name for goal in goals}
    for limit in limits:
        if not limit.cost and limit.name not in names:
            raise SearchError(
                f"within= limits {limit.name!r}, which is measured but no objective of this search; add it"
            )


def _check_portable(goals: Sequence[Objective], *, storage: str | None, executor: Executor | None) -> None:
    bound = [goal.name for goal in goals if not goal.portable]
    if bound and (storage is not None or executor is not None):
        shared_by = "executor=" if storage is None else "storage="
        raise SearchError(
            f"objective {shown(bound)} has a scale of its own in every process, which {shared_by} would mix; give "
            "it one by reference=, in seconds of the largest architecture"
        )


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep Optuna from logging each step, and from warning about what is experimental, while we search."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
