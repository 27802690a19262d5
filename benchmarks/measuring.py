"""What the benchmarks share: paired timing, bootstrap intervals, bars, the machine, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

_RESAMPLES = 10_000
_PACKAGES = ("torch", "transformers", "numpy")

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` is the sum over threads: with one thread, a way to measure on a machine that others use as well."""


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Bar:
    """A value to keep. It is met when the interval includes it or lies on the right side of it."""

    kind: Literal["at most", "at least"]
    value: float

    def met(self, found: Interval) -> bool:
        return found.low <= self.value if self.kind == "at most" else found.high >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.kind == 'at most' else '>='} {self.value:g}"


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Median of ``values`` and the 95 % percentile bootstrap interval of that median."""
    sample = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(sample), size=(_RESAMPLES, len(sample)))
    medians = np.median(sample[draws], axis=1)  # (resamples,)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(float(np.median(sample)), float(low), float(high), len(sample))


def paired_seconds(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    pairs: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> list[tuple[float, float]]:
    """Times two calls one right after the other, which first alternating, so that drift hits both alike."""
    for _ in range(warmup):
        first()
        second()
    found = []
    for number in range(pairs):
        if number % 2 == 0:
            a = seconds(first, clock=clock)
            b = seconds(second, clock=clock)
        else:
            b = seconds(second, clock=clock)
            a = seconds(first, clock=clock)
        found.append((a, b))
    return found


def seconds(call: Callable[[], object], *, clock: Clock = time.perf_counter) -> float:
    """Time of one call that runs on a CPU."""
    began = clock()
    call()
    return clock() - began


def row(
    name: Mapping[str, str], pairs: Sequence[tuple[float, float]], *, bar: Bar | None, scale: float = 1.0
) -> dict[str, Any]:
    """One line of a table: the ratio ``first / second · scale`` over pairs, against a bar.

    Args:
        name: columns that say what was measured.
        pairs: seconds of the two calls.
        bar: to keep, if any.
        scale: factor of every ratio.
    """
    ratio = interval([a / b * scale for a, b in pairs])
    return {
        **name,
        "first_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "second_ms": 1e3 * statistics.median(b for _, b in pairs),
        **judged(ratio, bar),
    }


def judged(found: Interval, bar: Bar | None) -> dict[str, Any]:
    """Columns of an interval and of its bar."""
    return {
        "ratio": found.median, "low": found.low, "high": found.high, "pairs": found.count,
        "bar": "" if bar is None else str(bar), "met": "" if bar is None else ("yes" if bar.met(found) else "NO"),
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, threads and machine that the numbers belong to."""
    return {
        **{package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()} {_processor()}",
        "load_average": list(os.getloadavg()),
    }


def _processor() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"({names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()})"


def started(threads: int) -> dict[str, Any]:
    """Begins a benchmark of real checkpoints, without the noise of loading them; prints and returns the machine."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = environment()
    print_environment(machine)
    return machine


def print_environment(found: Mapping[str, Any]) -> None:
    """Prints :func:`environment` in one line."""
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "load_average"))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of equal columns, numbers to the right."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [[_cell(line.get(column, "")) for column in columns] for line in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    numeric = [isinstance(rows[0].get(column), int | float) for column in columns]
    for line in ([columns], cells):
        for entries in line:
            padded = [
                entry.rjust(width) if right else entry.ljust(width)
                for entry, width, right in zip(entries, widths, numeric, strict=True)
            ]
            print("  ".join(padded).rstrip(), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def write_json(path: str | None, contents: Mapping[str, Any]) -> None:
    """Writes the results where ``--json`` said, if it did."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(f"written: {target}")
