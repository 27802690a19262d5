"""Where architectures are evaluated: in this process, or wherever an :class:`Executor` takes them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from hf_elastic.errors import ActivationError, SearchError
from hf_elastic.search.objective import Objective
from hf_elastic.space import Architecture

_MAX_CAUSE = 400  # characters


@dataclass(frozen=True)
class Outcome:
    """What came of one evaluation.

    Args:
        architecture: What was evaluated.
        values: One finite number per objective; None when the evaluation failed.
        failure: Cause of the failure, one line.
    """

    architecture: Architecture
    values: tuple[float, ...] | None
    failure: str | None = None


class Executor(Protocol):
    """Evaluate architectures, up to :attr:`workers` at a time."""

    @property
    def workers(self) -> int:
        """How many architectures may be under evaluation at once."""

    @property
    def blocks(self) -> bool:
        """Whether :meth:`wait` comes back only when an evaluation ends, however long it takes."""

    def start(self, objectives: Sequence[Objective], *, timeout: float | None) -> None:
        """Get ready for a search.

        Args:
            objectives: Those of the search.
            timeout: Seconds after which an evaluation has failed, if there is a limit.
        """

    def submit(self, architecture: Architecture) -> None:
        """Take one more architecture; at most :attr:`workers` are taken and not yet handed out by :meth:`wait`."""

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Return what has finished: at least one outcome, unless ``seconds`` passed before."""

    def close(self) -> None:
        """Drop what is not finished, and free everything."""


class LocalExecutor:
    """Evaluate one architecture at a time, in this thread."""

    workers = 1
    blocks = True

    def __init__(self) -> None:
        self._objectives: tuple[Objective, ...] = ()
        self._timeout: float | None = None
        self._next: Architecture | None = None

    def start(self, objectives: Sequence[Objective], *, timeout: float | None) -> None:
        """Remember the objectives.

        Raises:
            SearchError: There is a time limit, and nothing here that could interrupt an evaluation.
        """
        main = threading.current_thread() is threading.main_thread()
        if timeout is not None and not (main and "SIGALRM" in vars(signal)):
            raise SearchError(
                "timeout= interrupts an evaluation by SIGALRM, which needs the main thread of a process on Unix; pass "
                "executor=ProcessExecutor(...)"
            )
        self._objectives, self._timeout = tuple(objectives), timeout

    def submit(self, architecture: Architecture) -> None:
        """Keep the architecture until :meth:`wait`."""
        self._next = architecture

    def wait(self, seconds: float | None) -> list[Outcome]:
        """Evaluate what was submitted, however long that takes."""
        architecture, self._next = self._next, None
        assert architecture is not None
        return [measured(architecture, self._objectives, timeout=self._timeout)]

    def close(self) -> None:
        """Do nothing."""


def measured(architecture: Architecture, objectives: Sequence[Objective], *, timeout: float | None = None) -> Outcome:
    """Return the value of every objective, or the cause why there is none.

    Args:
        architecture: What to evaluate.
        objectives: By what.
        timeout: Seconds that all objectives together may take, if there is a limit. It interrupts Python code of the
            main thread, not a call into native code that never returns.

    Raises:
        ActivationError: The supernet is in use elsewhere, which says nothing about the architecture.
    """
    try:
        with _alarm(timeout):
            return _measured(architecture, objectives)
    except _Alarm:
        assert timeout is not None
        return Outcome(architecture, None, too_late(timeout))


def _measured(architecture: Architecture, objectives: Sequence[Objective]) -> Outcome:
    values: list[float] = []
    for objective in objectives:
        try:
            value = objective(architecture)
        except ActivationError:
            raise
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
            cause = f"{objective.name}: {type(error).__name__}: {reason}"
            return Outcome(architecture, None, cause[:_MAX_CAUSE])
        if not math.isfinite(value):
            return Outcome(architecture, None, f"{objective.name}: {value} is not a finite number")
        values.append(value)
    return Outcome(architecture, tuple(values))


def too_late(timeout: float) -> str:
    """Return the cause of a failure by time."""
    return f"no value after timeout={timeout:g} seconds"


class _Alarm(BaseException):
    """The time of an evaluation is over; no ``except Exception`` of an objective shall catch it."""


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raise :class:`_Alarm` in this thread when the block takes longer; another's alarm clock goes on afterwards."""
    if seconds is None:
        yield
        return

    running = True

    def ring(number: int, frame: FrameType | None) -> None:
        if running:
            raise _Alarm

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            running = False  # should it ring before this line, what follows is still done
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            passed = time.monotonic() - began
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), every)
