"""Evaluate architectures in processes of their own, which may hang or die without harm to the search."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hf_elastic.architecture import shown
from hf_elastic.errors import ActivationError, SearchError
from hf_elastic.search.executors import Outcome, measured, too_late
from hf_elastic.search.objective import Objective, check_objectives
from hf_elastic.space import Architecture

ObjectivesFactory = Callable[[], Sequence[Objective]]
_READY, _RAISED, _DONE, _UNUSABLE = "ready", "raised", "done", "unusable"
_MOST_UNBUILT = 3  # children in a row that cannot build their objectives before the search ends


class ProcessExecutor:
    """Evaluate in ``workers`` child processes, each with objectives (and so a supernet) of its own.

    Children are spawned: they import the module of ``build`` anew, call it once, and then evaluate one architecture
    after another. One that dies, or takes longer than the search's ``timeout=``, costs its evaluation only: that
    fails with its cause, and another child takes its place. One that fails to build its objectives is replaced too,
    but the third in a row ends the search, and the first if none ever had any. A script that is run itself must start
    the search below ``if __name__ == "__main__":``, as always with spawned processes.

        >>> def objectives():
        ...     supernet = he.Supernet.from_pretrained("supernet")
        ...     return [he.objectives.loss(supernet, validation()), he.objectives.macs(supernet)]
        >>> executor = he.ProcessExecutor(objectives, workers=4)
        >>> he.search_subnets(space, objectives(), executor=executor)

    An executor serves one search at a time.

    Args:
        build: A function without arguments, found by its name in a module (or a ``functools.partial`` of one), that
            returns the same objectives as the search is given.
        workers: How many processes.
        build_timeout: Seconds after which a child that has not built its objectives is taken to hang.

    Raises:
        SearchError: ``build`` cannot be pickled, ``workers`` is no positive integer, or ``build_timeout`` no positive
            number.
    """

    blocks = False

    def __init__(self, build: ObjectivesFactory, *, workers: int, build_timeout: float = 1800.0) -> None:
        if not isinstance(build_timeout, int | float) or not 0 < build_timeout < math.inf:
            raise SearchError(f"build_timeout={build_timeout!r} is not a positive number of seconds")
        if type(workers) is not int or workers < 1:
            raise SearchError(f"workers={workers!r} is not a positive integer")
        try:
            pickle.dumps(build)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            reason = str(error).split("\n", 1)[0]
            raise SearchError(
                f"build={shown([build])} cannot be sent to another process ({reason}); pass a function of a module, or "
                "a functools.partial of one"
            ) from error
        self._build = build
        self._workers = workers
        self._build_timeout = build_timeout
        self._unbuilt: int | None = None  # children in a row that could not build, once one could
        self._children: list[_Child] = []
        self._names: tuple[str, ...] = ()
        self._timeout: float | None = None

    @property
    def workers(self) -> int:
        """How many processes evaluate."""
        return self._workers

    def start(self, objectives: Sequence[Objective], *, timeout: float | None) -> None:
        """Start the children; they build their objectives while the search goes on."""
        self.close()
        self._names, self._timeout = tuple(objective.name for objective in objectives), timeout
        self._unbuilt = None
        self._children = [self._spawned() for _ in range(self._workers)]

    def submit(self, architecture: Architecture) -> None:
        """Give the architecture to an idle child."""
        child = min((child for child in self._children if child.architecture is None), key=_unready)
        child.architecture = architecture
        if child.ready:
            self._send(child)

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return what has finished: at least one outcome, unless ``seconds`` passed before.

        Raises:
            SearchError: A child cannot build the objectives, or builds others.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            outcomes = [outcome for child in list(self._children) if (outcome := self._looked_at(child)) is not None]
            left = None if until is None else until - time.monotonic()
            if outcomes or (left is not None and left <= 0):
                return outcomes
            ends = [child.deadline - time.monotonic() for child in self._children if child.deadline is not None]
            limits = [*ends, *([left] if left is not None else [])]
            # A process that ends closes its pipe, which counts as readable.
            connection.wait([child.pipe for child in self._children], max(0.0, min(limits)) if limits else None)

    def close(self) -> None:
        """End the children, whatever they do."""
        for child in self._children:
            child.end()
        self._children = []

    def _spawned(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._build, self._names), name="hf-elastic evaluation")
        process.start()
        theirs.close()
        return _Child(process, ours, deadline=time.monotonic() + self._build_timeout)

    def _send(self, child: _Child) -> None:
        child.deadline = None if self._timeout is None else time.monotonic() + self._timeout
        with suppress(OSError):  # a child that just died is noticed at the next look
            child.pipe.send(child.architecture)

    def _looked_at(self, child: _Child) -> Outcome | None:
        """Return the outcome of a child that has one; take note of what else it says, and replace a dead one."""
        while child.pipe.poll():
            try:
                kind, content = child.pipe.recv()
            except (EOFError, OSError):
                return self._dead(child)
            if kind == _UNUSABLE:
                raise SearchError(f"a process of executor= has no use for its objectives: {content}")
            if kind == _RAISED:
                self._built_nothing(child, f"a process of executor= has no objectives: {content}")
                return None
            child.deadline = None
            if kind == _DONE:
                child.architecture = None
                return Outcome(*content)
            child.ready, self._unbuilt = True, 0
            if child.architecture is not None:
                self._send(child)
        if child.deadline is None or time.monotonic() < child.deadline:
            return None
        if not child.ready:
            late = f"a process of executor= has no objectives after build_timeout={self._build_timeout:g} seconds"
            self._built_nothing(child, f"{late}; pass a longer one, or see where build= hangs")
            return None
        assert self._timeout is not None
        return self._replaced(child, too_late(self._timeout))

    def _dead(self, child: _Child) -> Outcome | None:
        child.process.join()
        code = child.process.exitcode or 0
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        if not child.ready:
            cause = f"a process of executor= ended {how} before it had its objectives; its own words are above"
            self._built_nothing(child, f"{cause}. A script starts the search below: if __name__ == '__main__':")
            return None
        return self._replaced(child, f"the process of the evaluation ended {how}")

    def _replaced(self, child: _Child, failure: str) -> Outcome | None:
        child.end()
        self._children[self._children.index(child)] = self._spawned()
        return None if child.architecture is None else Outcome(child.architecture, None, failure)

    def _built_nothing(self, child: _Child, cause: str) -> None:
        """Give what the child should have evaluated to another, which may have more luck.

        Raises:
            SearchError: None ever could build its objectives, or the last few could not.
        """
        if self._unbuilt is None or self._unbuilt + 1 >= _MOST_UNBUILT:
            raise SearchError(cause)
        self._unbuilt += 1
        child.end()
        another = self._children[self._children.index(child)] = self._spawned()
        another.architecture = child.architecture


@dataclass(eq=False)
class _Child:
    """A process, the pipe to it, what it has been given, and until when it has to have built or evaluated it."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    architecture: Architecture | None = None
    deadline: float | None = None

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _unready(child: _Child) -> bool:
    return not child.ready


def _serve(pipe: Connection, build: ObjectivesFactory, names: tuple[str, ...]) -> None:
    """Evaluate what comes through the pipe until it is closed; runs in a child."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # which go to a whole group: the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    try:
        objectives = check_objectives(build())
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        pipe.send((_RAISED, f"build raised {type(error).__name__}: {reason}"))
        return
    built = tuple(objective.name for objective in objectives)
    if built != names:
        pipe.send((_UNUSABLE, f"build returned {shown(built)}, the search has {shown(names)}"))
        return
    pipe.send((_READY, None))
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            outcome = _evaluated(pipe.recv(), objectives)
            pipe.send((_DONE, outcome) if isinstance(outcome, tuple) else (_UNUSABLE, outcome))


def _end_with_parent() -> None:
    """End this process when its parent does, also in the middle of an evaluation."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _evaluated(architecture: Architecture, objectives: Sequence[Objective]) -> tuple[object, ...] | str:
    try:
        outcome = measured(architecture, objectives)
    except ActivationError as error:
        return str(error)
    return outcome.architecture, outcome.values, outcome.failure
