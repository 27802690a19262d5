"""Memory that is kept between forwards: no page is asked for twice, and afterwards it is given back."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import block_models
import pytest
import torch
from timed_tables import FormulaTimer
from tiny_models import supernet_of, tiny

from hf_elastic.costs import measure_latency
from hf_elastic.kept_memory import keeps_memory, steady_memory
from hf_elastic.runtimes import measure_folders
from hf_elastic.tables.block_latencies import measure_block_latency_table
from hf_elastic.tables.latencies import measure_latency_table
from hf_elastic.tables.timing import Setting, Timer, measure_models

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")

# In a process of its own: what others did in this one decides about its heap. A piece of 64 MiB is beyond what glibc
# ever takes from the heap by itself; a page may have 2 MiB.
MEASURED = """
import resource, sys
import torch
from hf_elastic.kept_memory import steady_memory

def faults(count, size):
    found = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(size * 2**18) for _ in range(count)]
        del pieces
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

before = faults(3, 12), faults(1, 64), resident()
try:
    with steady_memory():
        with steady_memory():
            faults(1, 1)
        inside = faults(3, 12), faults(1, 64)
        if "fails" in sys.argv:
            raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
grown = resident() - before[2]
answer = [before[:2], inside, grown, [faults(3, 12), faults(1, 64)]]
"""


def in_a_process(code: str, *given: str, **environment: str) -> Any:
    """What ``answer`` is at the end of code that runs in a process of its own."""
    end = "\nimport json\nprint(json.dumps(answer))"
    paths = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", code + end, *given], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    return json.loads(ran.stdout.splitlines()[-1])


@glibc
@pytest.mark.parametrize("end", ["returns", "fails"])
def test_memory_is_kept_inside_and_given_back_afterwards(end: str) -> None:
    before, inside, grown, after = in_a_process(MEASURED, end)
    assert before[1] >= 8 and max(inside) <= 4
    assert grown < 16  # MiB
    assert after[0] <= 4 and after[1] >= 8  # as in a process that glibc has seen use large pieces


@glibc
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_what_the_user_has_set_stays(name: str, value: str) -> None:
    before, inside, _, after = in_a_process(MEASURED, **{name: value})
    assert min(found[1] for found in (before, inside, after)) >= 8


def test_other_settings_of_the_allocator_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = keeps_memory()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keeps_memory() == found


def test_where_there_is_no_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str | None) -> object:
        raise AssertionError("a library was opened")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", never)
    with steady_memory():
        torch.ones(4)


def another_thread() -> int:
    """What a block here still keeps once another thread has had one."""

    def other() -> None:
        with warnings.catch_warnings(), steady_memory():
            pass

    with steady_memory():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return second()


def second() -> int:
    """Fewest pages that the system gives for a large tensor after others of the same size were freed.

    Not those of each: aligned memory needs a little more than what is free behind a piece that was freed.
    """
    found = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])


class Watching(FormulaTimer):
    """A timer that looks at how memory is kept while something is timed."""

    def __init__(self) -> None:
        super().__init__(lambda call: 0.5)
        self.found: list[int] = []

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.found:
            self.found.append(second())
        return super().__call__(call)


def _models(timer: Timer) -> None:
    supernet = supernet_of("bert")
    measure_models({"one": supernet.model}, Setting.of(supernet, length=8), rounds=3, timer=timer)


def _calls(timer: Timer) -> None:
    measure_latency({"one": lambda: timer("one")}, repeats=3)


def _blocks(timer: Timer) -> None:
    measure_block_latency_table(block_models.supernet_of("elastic_bert"), widths=2, length=8, rounds=3, timer=timer)


MEASURING: dict[str, Callable[[Timer], object]] = {
    "latency table": lambda timer: measure_latency_table(supernet_of("bert"), length=8, rounds=3, timer=timer),
    "block latency table": _blocks,
    "models": _models,
    "folders": lambda timer: measure_folders({"one": tiny("bert")}, length=8, rounds=3, timer=timer),
    "calls": _calls,
}


def watched() -> dict[str, int]:
    """Pages that a large tensor needs while something is timed, by what times it; beside the name of a thread."""
    found = {"another thread": another_thread()}
    for name, measuring in MEASURING.items():
        timer = Watching()
        measuring(timer)
        found[name] = max(timer.found)
    return found


@pytest.fixture(scope="module")
def pages() -> dict[str, int]:
    """What :func:`watched` finds in a process of its own: what other tests did here has decided about this one's."""
    found: dict[str, int] = in_a_process("import test_kept_memory; answer = test_kept_memory.watched()")
    return found


@glibc
@pytest.mark.parametrize("name", MEASURING)
def test_everything_that_times_models_keeps_memory_meanwhile(pages: dict[str, int], name: str) -> None:
    assert pages[name] <= 4


@glibc
def test_a_block_of_another_thread_does_not_end_this_one(pages: dict[str, int]) -> None:
    assert pages["another thread"] <= 4


def after_a_failure() -> tuple[int, list[str]]:
    """Pages of a large tensor in a block after an allocation has failed, and what was said."""
    ThreadPoolExecutor(1).submit(int).result()  # glibc looks for memory elsewhere once there was a thread
    with pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**50)
    with warnings.catch_warnings(record=True) as said, steady_memory():
        found = second()
    return found, [str(warning.message) for warning in said]


@glibc
def test_a_process_that_ran_out_of_memory_is_told_that_it_is_kept_in_part_only() -> None:
    found, said = in_a_process("import test_kept_memory; answer = test_kept_memory.after_a_failure()")
    assert found >= 8  # glibc has no way back to the heap; where it has one, the warning should go
    assert len(said) == 1 and "in part only" in said[0] and "new process" in said[0]


@glibc
def test_another_thread_is_told_that_memory_is_kept_in_part_only() -> None:
    with pytest.warns(UserWarning, match="not the main thread"), ThreadPoolExecutor(1) as pool:
        pool.submit(steady_memory()(torch.ones), 4).result()
