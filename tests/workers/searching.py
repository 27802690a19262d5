"""Searches whose evaluations sleep, hang or kill, in this process or in one that a test starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hf_elastic
from hf_elastic.search import Objective, search_subnets
from hf_elastic.space import Architecture, SearchSpace
from tests.search.toy import widths_problem

ROOT = Path(hf_elastic.__file__ or f"{os.getcwd()}/hf_elastic/__init__.py").parents[1]
# A process that only searches needs no torch, so ours skip what `import hf_elastic` registers with transformers.
BARE_PACKAGE = (
    "import sys, types; package = types.ModuleType('hf_elastic'); package.__path__ = ['hf_elastic'];"
    "package.__file__ = None; sys.modules['hf_elastic'] = package;"
)


def problem() -> tuple[SearchSpace, list[Objective]]:
    """Widths of five layers, a loss and a cost."""
    return widths_problem(layers=5)


def objectives() -> list[Objective]:
    """The objectives of :func:`problem`."""
    return problem()[1]


def logged(log: str, *, seconds: float = 0.0, until: str = "") -> list[Objective]:
    """Objectives that write down who evaluates what, and then sleep, or wait for a file."""
    loss, cost = objectives()

    def function(architecture: Architecture) -> float:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} {architecture.digest}\n")
        while until and not Path(until).exists():
            time.sleep(0.02)
        time.sleep(seconds)
        return float(loss.function(architecture))

    return [Objective("loss", function), cost]


def troubled(trouble: Callable[[], None]) -> list[Objective]:
    """Objectives that get into trouble where the first layer is of 128 neurons."""
    loss, cost = objectives()

    def function(architecture: Architecture) -> float:
        if architecture["layers.0.intermediate_size"] == 128:
            trouble()
        return float(loss.function(architecture))

    return [Objective("loss", function), cost]


def die() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Take far too long."""
    time.sleep(600)


dying, hanging = partial(troubled, die), partial(troubled, hang)


def unreliable(folder: str, trouble: Callable[[], None], *, numbers: tuple[int, ...]) -> list[Objective]:
    """Objectives of which one evaluation kills; the builds with these numbers get into trouble, counted from 1."""
    made = Path(folder)
    number = next(number for number in range(1, 100) if _is_first(made / str(number)))
    if number in numbers:
        trouble()
    loss, cost = objectives()

    def function(architecture: Architecture) -> float:
        if _is_first(made / "killed"):
            die()
        return float(loss.function(architecture))

    return [Objective("loss", function), cost]


def _is_first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def raising() -> list[Objective]:
    """No objectives."""
    raise OSError("no weights here")


def main(options: dict[str, Any]) -> None:
    """Search in this process and write the result down."""
    chosen = {
        name: options[name] for name in ("evaluations", "storage", "lease_seconds", "algorithm") if name in options
    }
    result = search_subnets(
        problem()[0],
        logged(options["log"], seconds=options.get("seconds", 0.0), until=options.get("until", "")),
        seed=3,
        progress=False,
        **chosen,
    )
    Path(options["output"]).write_text(result.to_json())


def start(**options: Any) -> subprocess.Popen[str]:
    """Run :func:`main` in a process of its own."""
    code = f"{BARE_PACKAGE} import json; from tests.workers.searching import main; main(json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def evaluated(log: Path) -> list[tuple[int, str]]:
    """Return process and digest of every evaluation that began."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def wait_for(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)
