"""Runs cases in forked children that are bounded in memory and time, and adds up what was found."""

from __future__ import annotations

import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_watching import Make, Place, Verdict, Watch, judge, limit_this_process

BATCH = 100
"""Cases that one child runs."""
_KILLED_AFTER = 60.0  # seconds without an answer, whoever else uses the processor
_FAULT = "fault.txt"
KINDS = ("exception", "message", "memory", "time", "write", "code", "asked", "pickle")


@dataclass(frozen=True)
class Target:
    """One entry point.

    Attributes:
        name: of it.
        make: writes the input of a case and returns what is to be called; a pure function of its generator.
        weight: how many cases it gets, beside the others.
    """

    name: str
    make: Make
    weight: int = 10


def shares(targets: Sequence[Target], cases: int) -> dict[str, int]:
    """Cases of each target, in proportion to the weights; together at least ``cases``."""
    whole = sum(target.weight for target in targets)
    return {target.name: -(-cases * target.weight // whole) for target in targets}


def generator(seed: int, target: str, number: int) -> random.Random:
    """The generator of a case: the same in every process."""
    return random.Random(f"{seed}/{target}/{number}")


def run(
    targets: Iterable[Target],
    counts: Mapping[str, int],
    *,
    seed: int,
    folder: Path,
    failing: Path | None = None,
    first: int = 0,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, list[Verdict]]:
    """Runs the cases of all targets.

    Args:
        targets: what to run.
        counts: cases of each, those before ``first`` among them.
        seed: of everything random.
        folder: where cases live while they run; emptied.
        failing: where inputs of findings are kept; nowhere by default.
        first: number of the first case; those before it are left out.
        tell: called with a line when a target is done.
    """
    found = {}
    for target in targets:
        began, verdicts = time.perf_counter(), list[Verdict]()
        while (begin := first + len(verdicts)) < counts[target.name]:
            numbers = range(begin, min(begin + BATCH, counts[target.name]))
            verdicts += _batch(target, numbers, seed=seed, folder=folder, failing=failing)
        found[target.name] = verdicts
        bad = [verdict for verdict in verdicts if verdict.findings]
        tell(f"{target.name}: {len(verdicts)} cases in {time.perf_counter() - began:.0f} s, {len(bad)} findings")
        for verdict in bad[:5]:
            tell(f"  #{verdict.number} {verdict.findings}")
    return found


def _batch(target: Target, numbers: range, *, seed: int, folder: Path, failing: Path | None) -> list[Verdict]:
    """Runs cases in one child; it ends early where a case had to be killed."""
    reading, writing = os.pipe()
    gc.collect()
    gc.freeze()  # so that the child's collections do not walk, and copy, what was there before
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(target, numbers, seed=seed, folder=folder, failing=failing, writing=writing)
    os.close(writing)
    gc.unfreeze()
    verdicts, rest = list[Verdict](), b""
    try:
        while len(verdicts) < len(numbers):
            ready, _, _ = select.select([reading], [], [], _KILLED_AFTER)
            piece = os.read(reading, 2**16) if ready else b""
            if not piece:
                _stop_on_own_fault(folder / _FAULT)
                verdicts.append(_killed(target, numbers[len(verdicts)], hung=not ready))
                break
            *lines, rest = (rest + piece).split(b"\n")
            verdicts += [Verdict(**json.loads(line)) for line in lines]
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if verdicts and verdicts[-1].outcome == "killed" and failing is not None:
        _keep(target, verdicts[-1], place=Place(folder / "case"), failing=failing)
    return verdicts


def _stop_on_own_fault(file: Path) -> None:
    """Raises what a child stumbled over outside of a case: a fault of these tests."""
    if file.is_file():
        trace = file.read_text()
        file.unlink()
        raise RuntimeError(f"no case could be made:\n{trace}")


def _killed(target: Target, number: int, *, hung: bool) -> Verdict:
    kind = {"time": f"no answer in {_KILLED_AFTER:.0f} s"} if hung else {"exception": "the process died"}
    return Verdict(target.name, number, "killed", findings=kind)


def _child(target: Target, numbers: range, *, seed: int, folder: Path, failing: Path | None, writing: int) -> None:
    """Never returns."""
    try:
        _quiet()
        limit_this_process()
        watch = Watch()
        watch.install()
        for number in numbers:
            verdict = run_case(target, number, seed=seed, folder=folder, watch=watch)
            if verdict.findings and failing is not None:
                _keep(target, verdict, place=Place(folder / "case"), failing=failing)
            os.write(writing, json.dumps(verdict.to_dict()).encode() + b"\n")
        os._exit(0)
    except BaseException:
        (folder / _FAULT).write_text(traceback.format_exc(), errors="backslashreplace")
        os._exit(1)


def run_case(target: Target, number: int, *, seed: int, folder: Path, watch: Watch) -> Verdict:
    """Makes and judges one case in this process."""
    place = Place(folder / "case")
    os.chdir(folder)
    place.prepare()
    call = target.make(generator(seed, target.name, number), place)
    return judge(call, Verdict(target.name, number, ""), watch=watch, place=place)


def _quiet() -> None:
    """Warnings and logs of libraries are not read; what is printed to stdout by a case neither."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if "FUZZ_STDERR" not in os.environ:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # of a process that ends with its batch


def _keep(target: Target, verdict: Verdict, *, place: Place, failing: Path) -> None:
    """Keeps the input of a finding, and what was found, to be looked at."""
    kept = failing / f"{target.name}-{verdict.number}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copytree(place.inside, kept / "inside", symlinks=True, dirs_exist_ok=True)
    (kept / "verdict.json").write_text(json.dumps(verdict.to_dict(), indent=1))


def summary(found: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """One row a target: cases, how they ended, and findings of each kind."""
    rows = []
    for name, verdicts in found.items():
        row: dict[str, Any] = {"target": name, "cases": len(verdicts)}
        for outcome in ("accepted", "refused"):
            row[outcome] = sum(verdict.outcome == outcome for verdict in verdicts)
        row |= {kind: sum(kind in verdict.findings for verdict in verdicts) for kind in KINDS}
        row["most MiB"] = round(max((verdict.memory for verdict in verdicts), default=0) / 2**20)
        row["most s"] = round(max((verdict.seconds for verdict in verdicts), default=0.0), 1)
        rows.append(row)
    return rows
