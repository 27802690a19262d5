"""Searches of which one evaluation runs out of memory, hangs or dies: it alone fails, with its cause in the result."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from hf_elastic.search import Objective, SearchResult, search_subnets
from hf_elastic.search.processes import ProcessExecutor
from tests.search.toy import widths_problem

EVALUATIONS, UNLUCKY = 9, 4  # how many, and which of them meets the fault


def no_memory_for_python() -> None:
    bytearray(1 << 60)


def no_memory_for_torch() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def no_memory_on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")


def hang_in_python() -> None:
    while True:
        time.sleep(0.01)


def hang_for_good() -> None:
    """Hangs as native code does, which no signal but the last interrupts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(3600)


def killed_for_memory() -> None:
    """As the kernel does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What one evaluation meets.

    Attributes:
        act: does it.
        cause: what the result says then.
        workers: processes that evaluate; 0: this one does.
        timeout: seconds that an evaluation may take.
    """

    act: Callable[[], None]
    cause: str
    workers: int = 0
    timeout: float | None = None


FAULTS: Mapping[str, Fault] = {
    "Python has no memory left": Fault(no_memory_for_python, "loss: MemoryError"),
    "torch has no memory left": Fault(no_memory_for_torch, "loss: RuntimeError: [enforce fail at alloc_cpu"),
    "the GPU has no memory left (its error, raised)": Fault(
        no_memory_on_the_gpu, "loss: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    ),
    "an evaluation hangs": Fault(hang_in_python, "no value after timeout=1 seconds", timeout=1.0),
    "a process of an executor hangs for good": Fault(
        hang_for_good, "no value after timeout=6 seconds", workers=2, timeout=6.0
    ),
    "a process of an executor is killed for its memory": Fault(
        killed_for_memory, "the process of the evaluation ended by signal SIGKILL", workers=2
    ),
}


def objectives(name: str | None, digest: str) -> list[Objective]:
    """Those of the toy problem; the loss of one architecture meets a fault."""
    _, (loss, cost) = widths_problem(layers=5)

    def unlucky(architecture: Any) -> float:
        if name is not None and architecture.digest == digest:
            FAULTS[name].act()
        return loss(architecture)

    return [Objective("loss", unlucky), cost]


def search(name: str | None = None, digest: str = "") -> SearchResult:
    """A random search with a fault, or without; what it proposes depends on no value."""
    fault, executor = FAULTS[name] if name is not None else None, None
    if fault is not None and fault.workers:
        executor = ProcessExecutor(partial(objectives, name, digest), workers=fault.workers)
    space, _ = widths_problem(layers=5)
    return search_subnets(
        space, objectives(name, digest), algorithm="random", evaluations=EVALUATIONS, seed=3, progress=False,
        executor=executor, timeout=fault.timeout if fault else None,
    )  # fmt: skip


def evaluated(name: str) -> dict[str, Any]:
    """A line of the table: a search with a fault beside one without."""
    whole = search()
    unlucky = whole.evaluations[UNLUCKY].architecture
    found = search(name, unlucky.digest)
    others = [one for one in whole.evaluations if one.architecture != unlucky]
    failures = SearchResult.from_json(found.to_json()).failures
    return {
        "fault": name,
        "evaluations": EVALUATIONS,
        "failed": len(failures),
        "that_one_alone": [failure.architecture for failure in failures] == [unlucky],
        "others_equal": list(found.evaluations) == others,
        "cause": failures[0].cause if failures else "",
        "cause_is_right": bool(failures) and failures[0].cause.startswith(FAULTS[name].cause),
    }
