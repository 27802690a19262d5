"""SIGTERM and SIGINT, let in only where nothing of a search is half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

PREEMPTED = 128 + signal.SIGTERM
"""Exit status of a search that SIGTERM ended, after it handed back what it was evaluating: 143."""


class Interruption:
    """Raise ``KeyboardInterrupt`` or ``SystemExit(143)`` for SIGINT and SIGTERM, inside :meth:`let_in` only.

    A signal that comes elsewhere (a claim or a record is being written) waits for the next :meth:`let_in`; a second
    one does not wait. Handlers that somebody else has set are left alone, and so is everything when this is no main
    thread, where Python does not allow to set any.

    Args:
        active: whether to do anything.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._pending: int | None = None
        self._allowed = False

    def __enter__(self) -> Interruption:
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, default in defaults.items() if self._active else ():
            if signal.getsignal(number) is default:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._raise()

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Let signals in while the block is open."""
        self._allowed = True
        try:
            if self._pending is not None:
                self._raise()
            yield
        finally:
            self._allowed = False

    def sleep(self, seconds: float) -> None:
        """Sleep, and let signals in meanwhile."""
        with self.let_in():
            time.sleep(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._pending is not None
        self._pending = number
        if self._allowed or again:
            self._raise()

    def _raise(self) -> None:
        number, self._pending = self._pending, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(PREEMPTED)
