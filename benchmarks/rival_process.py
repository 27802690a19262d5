"""Our end of a comparison across two processes: makes the rival's environment, starts it, asks for steps in turns."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
READY = "installed.json"
"""File in an environment that says which commands made it."""

Pip = tuple[str, ...]
Timed = Callable[[], float]


class RivalError(RuntimeError):
    """A rival cannot be installed or does not do a step; the text goes into the table."""


@dataclass(frozen=True)
class Environment:
    """How a rival's environment is made.

    Attributes:
        name: of the rival, and of its folder.
        package: as pip knows it, with its version.
        commands: arguments of pip, one after the other.
        script: in this folder, run by the environment's Python.
    """

    name: str
    package: str
    commands: tuple[Pip, ...]
    script: str

    def __str__(self) -> str:
        return self.package.replace("==", " ")


def installed(environment: Environment, work: Path) -> Path:
    """Python of the rival's environment, made on first use.

    Raises:
        RivalError: pip failed; its last line is in the text.
    """
    folder = work.resolve() / environment.name
    python = folder / "bin" / "python"
    commands = [list(command) for command in environment.commands]
    ready = folder / READY
    if ready.is_file() and json.loads(ready.read_text(encoding="utf-8")) == commands:
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)], environment)
    for command in commands:
        print(f"{environment.name}: pip {' '.join(command)}", flush=True)
        _run([str(python), "-m", "pip", *command], environment)
    ready.write_text(json.dumps(commands) + "\n", encoding="utf-8")
    return python


def _run(command: Sequence[str], environment: Environment) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"pip ended with {done.returncode}").splitlines()
        errors = [line for line in said if line.startswith("ERROR")]
        raise RivalError(f"{environment.package} cannot be installed: {(errors or said)[-1]}")


@dataclass(frozen=True)
class Answer:
    """What a step gave.

    Attributes:
        seconds: that counted.
        found: what it tells besides.
    """

    seconds: float
    found: dict[str, Any]


class Rival:
    """A running rival; used as a context manager, at whose end the process ends.

    Args:
        python: of its environment.
        script: that serves its steps.
        log: file for what it prints.
        options: of :func:`rival_serving.serve`.
        patience: seconds to wait for an answer.
    """

    def __init__(
        self, python: Path, script: Path, *, log: Path, options: Sequence[str] = (), patience: float = 600.0
    ) -> None:
        self.name, self.log, self.patience = script.stem, log, patience
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(python), str(script), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env={**kept, **quiet},
            )  # fmt: skip

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def run(self, step: str, **given: Any) -> Answer:
        """Has the rival do a step.

        Raises:
            RivalError: it failed, ended, or took longer than the patience.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({"step": step, "given": given}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise RivalError(f"{self.name} ended before {step}: {self._last_words()}") from None
        ready, _, _ = select.select([stdout], [], [], self.patience)
        if not ready:
            self.process.kill()
            raise RivalError(f"{self.name} gave no answer to {step} in {self.patience:g} s")
        line = stdout.readline()
        if not line:
            raise RivalError(f"{self.name} ended in {step}: {self._last_words()}")
        said = json.loads(line)
        if "error" in said:
            raise RivalError(f"{self.name} failed in {step}: {said['error']}")
        return Answer(said["seconds"], said["found"])

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def in_turns(calls: Sequence[Timed], *, rounds: int, warmup: int = 1) -> list[tuple[float, ...]]:
    """Seconds that each call gives, in rounds; another one is first in each round, so that drift hits all alike."""
    for _ in range(warmup):
        for call in calls:
            call()
    found = []
    for number in range(rounds):
        seconds = [0.0] * len(calls)
        for step in range(len(calls)):
            place = (number + step) % len(calls)
            seconds[place] = calls[place]()
        found.append(tuple(seconds))
    return found
