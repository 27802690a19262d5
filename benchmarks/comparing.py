"""One form for all comparisons of ``run.py``: ours, what it is held against, and their ratio with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from measuring import Bar, Clock, Interval, interval, judged, paired_seconds, print_table

Line = dict[str, Any]
"""What is compared and what came out; all lines have :data:`COLUMNS`."""

COLUMNS = (
    "part", "what", "against", "measure", "ours", "theirs", "ratio", "low", "high", "pairs", "bar", "met", "note",
)  # fmt: skip
"""``ratio`` is the median of ours over theirs; ``low`` and ``high`` are its 95 % bootstrap interval."""

ATTEMPTS = 4
"""Models that are asked for, at most, until one is as fast as another."""
_ALIKE = 0.99, 1.05  # of the other's speed: what two timings of one model differ by; faster would be unfair to ours
_NUDGE = 1.005  # beyond what was missed


def line(part: str, what: str, against: str, measure: str = "", **found: Any) -> Line:
    """A line; columns that are not given are empty.

    Raises:
        TypeError: a column is none of :data:`COLUMNS`.
    """
    if unknown := set(found) - set(COLUMNS):
        raise TypeError(f"a line has the columns {', '.join(COLUMNS)}, not {', '.join(sorted(unknown))}")
    given = {"part": part, "what": what, "against": against, "measure": measure, **found}
    made = {name: given.get(name, "") for name in COLUMNS}
    print_table([{name: made[name] for name in COLUMNS if made[name] != ""}])
    return made


def timed(
    names: tuple[str, str, str],
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    pairs: int,
    bar: Bar | None = None,
    note: str = "",
    clock: Clock = time.perf_counter,
    warmup: int = 1,
) -> Line:
    """Seconds of two calls in turns.

    Args:
        names: part, what is measured, and what against.
        ours: our call.
        theirs: the other one.
        pairs: of calls.
        bar: for the ratio, if any.
        note: what one has to know.
        clock: that is read.
        warmup: pairs that do not count.
    """
    found = paired_seconds(ours, theirs, pairs=pairs, warmup=warmup, clock=clock)
    return valued((*names, "seconds"), [a for a, _ in found], [b for _, b in found], bar=bar, note=note)


def valued(
    names: tuple[str, str, str, str],
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    bar: Bar | None = None,
    note: str = "",
) -> Line:
    """Values that belong together in pairs; names are those of :func:`line`."""
    ratio = interval([a / b for a, b in zip(ours, theirs, strict=True)])
    middle = {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
    return line(*names, **middle, **judged(ratio, bar), note=note)


def ratio_of_means(
    names: tuple[str, str, str, str],
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    ratio: Interval | None = None,
    bar: Bar | None = None,
    note: str = "",
) -> Line:
    """Ratio of the means of errors on the same rows, :func:`interval_of_means` unless that is known."""
    middle = {"ours": statistics.fmean(ours), "theirs": statistics.fmean(theirs)}
    return line(*names, **middle, **judged(ratio or interval_of_means(ours, theirs), bar), note=note)


def interval_of_means(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Ratio of the means of values of the same rows, which are drawn again for its interval (10,000 times)."""
    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(first), size=len(first)) for _ in range(10_000)]
    ratios = np.array([first[rows].mean() / second[rows].mean() for rows in draws])
    low, high = (float(v) for v in np.quantile(ratios, [0.025, 0.975]))
    return Interval(float(first.mean() / second.mean()), low, high, len(first))


def alike(ours: float, theirs: float) -> bool:
    """Whether two speed-ups that were timed together may be called equal."""
    return _ALIKE[0] <= ours / theirs <= _ALIKE[1]


def asked_again(asked: float, *, ours: float, theirs: float) -> float:
    """The speed-up to ask for next, where what was asked for gave ``ours`` and not ``theirs``."""
    return max(1.01, asked * _NUDGE * theirs / ours)


def of_row(part: str, what: str, against: str, found: Mapping[str, Any], *, note: str = "") -> Line:
    """A line out of a row of :func:`measuring.row`, whose first call is ours."""
    middle = {"ours": found["first_ms"] / 1e3, "theirs": found["second_ms"] / 1e3}
    kept = {name: found[name] for name in ("ratio", "low", "high", "pairs", "bar", "met")}
    return line(part, what, against, "seconds", **middle, **kept, note=note)


def slope(sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Slope of log(seconds) over log(size), least squares, with its 95 % interval over repeats drawn again.

    Args:
        sizes: of each measurement, at least two different ones.
        seconds: for each size, of each repeat.
    """
    logs = np.log(np.asarray(sizes, dtype=float))
    centred = logs - logs.mean()

    def fitted(values: Sequence[float]) -> float:
        return float(centred @ np.log(np.asarray(values, dtype=float)) / (centred @ centred))

    generator = np.random.default_rng(0)
    drawn = [
        fitted([float(np.median(generator.choice(np.asarray(own, dtype=float), len(own)))) for own in seconds])
        for _ in range(2000)
    ]
    low, high = (float(v) for v in np.quantile(drawn, [0.025, 0.975]))
    return fitted([statistics.median(own) for own in seconds]), low, high


def silent(text: str) -> None:
    """Where progress goes that nobody reads."""
    del text
