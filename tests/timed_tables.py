"""What the tests of latency tables share: a clock that follows a formula, and what an interrupted measurement does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_elastic import CheckpointError, Supernet


class FormulaTimer:
    """Seconds by a formula of the forward that would run, asked once per forward.

    Args:
        truth: the formula.
        noise: typical share that is added to it.
        fails_at: the call at which it is interrupted.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, truth: Callable[[Any], float], *, noise: float = 0.0, fails_at: int | None = None) -> None:
        self.truth, self.noise, self.fails_at = truth, noise, fails_at
        self.calls, self.known = 0, dict[Any, float]()
        self.rng = random.Random(0)

    def __call__(self, call: Any) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        if call not in self.known:
            self.known[call] = self.truth(call)
        return self.known[call] * (1 + self.noise * abs(self.rng.gauss(0, 1)))


def check_an_interrupted_measurement_goes_on(
    measured: Callable[..., Any], timer: Callable[..., FormulaTimer], supernet: Supernet, *, file: Path, call: str
) -> None:
    """Interrupts a measurement in its third round and goes on, twice.

    Args:
        measured: measures a table of a supernet by a timer.
        timer: makes one.
        supernet: of which the table is.
        file: where the table is to be kept.
        call: the function that an unfinished table says to call.
    """
    seen: list[tuple[int, int]] = []
    whole = measured(supernet, timer(), rounds=5)
    count = len(whole.variants)
    with pytest.raises(KeyboardInterrupt):
        measured(supernet, timer(fails_at=count * 3 + 4), rounds=5, path=file)
    half = type(whole).load(file)
    assert len(half.rounds) == 2
    with pytest.raises(CheckpointError, match=f"interrupted after 2 rounds; call {call} with"):
        half.predict(supernet, supernet.space.largest())
    going_on = timer()
    table = measured(supernet, going_on, rounds=5, path=file, progress=lambda *now: seen.append(now))
    assert going_on.calls == count * (1 + 3)  # a round to warm up, three that were missing
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert (table.rounds, table.fit) == (whole.rounds, whole.fit)
    unused = timer()
    assert measured(supernet, unused, rounds=5, path=file) == table
    assert unused.calls == 0
