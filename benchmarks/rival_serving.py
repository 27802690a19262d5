"""The rival's end of a comparison across two processes: steps that the other process asks for, one line each.

A line of JSON comes in, ``{"step": name, "given": {...}}``; one goes out, ``{"seconds": s, "found": {...}}`` or
``{"error": text}``. Seconds are those that the step spent inside :class:`Stopwatch`, read in this process, so that
neither the pipe nor what a step prepares and checks is counted. Needs torch only, and nothing of hf_elastic.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, TypeVar

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Result = TypeVar("Result")
Step = Callable[..., Mapping[str, Any] | None]


class Stopwatch:
    """Adds up the time of the calls that count."""

    def __init__(self, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.seconds = 0.0

    def __call__(self, call: Callable[[], Result]) -> Result:
        began = self.clock()
        result = call()
        self.seconds += self.clock() - began
        return result

    def taken(self) -> float:
        """Seconds since the last reading, which starts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def answer(line: str, steps: Mapping[str, Step], stopwatch: Stopwatch) -> dict[str, Any]:
    """Runs what a line asks for; whatever goes wrong is an answer as well."""
    stopwatch.taken()
    try:
        asked = json.loads(line)
        found = steps[asked["step"]](**asked["given"])
    except Exception as error:  # the rival raises whatever it likes, and the other process has to know
        text = str(error).strip() or "no text"
        return {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
    return {"seconds": stopwatch.taken(), "found": dict(found or {})}


def serve(make: Callable[[Stopwatch], Mapping[str, Step]], given: Sequence[str] | None = None) -> None:
    """Answers lines until there are none; what libraries print goes to standard error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    stopwatch = Stopwatch(options.clock)
    with answering() as out:
        steps = make(stopwatch)
        for line in sys.stdin:
            print(json.dumps(answer(line, steps, stopwatch)), file=out, flush=True)


def answering() -> TextIO:
    """Standard output for answers alone: descriptor 1 leads to standard error from now on."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")
