"""What the folder of a recovery says about its run, so that only the same run is continued there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_elastic.checkpoint.run_record import RESULT_FILE, RunRecord, read_record
from hf_elastic.errors import CheckpointError
from hf_elastic.files import LOCK_FILE

STAGE = "recover"
"""The stage of a recovery in its ``result.json``."""


class RecoveryRecord:
    """What a run folder says about its run: models, data, settings, and the number of steps.

    Args:
        folder: of the run; it is made when something is noted.
        identity: of the run that is to be begun or continued there.

    Raises:
        CheckpointError: the folder holds another run, or something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, dict(identity)
        self.steps: int | None = None
        self.step_seconds: float | None = None
        if not (folder / RESULT_FILE).is_file():
            if folder.exists() and (not folder.is_dir() or any(f.name != LOCK_FILE for f in folder.iterdir())):
                raise CheckpointError(f"{folder} holds no run of recover(); give another folder")
            return
        found = read_record(folder / RESULT_FILE)
        if found["stages"] and STAGE not in found["stages"]:
            raise CheckpointError(f"{folder} holds no run of recover(); give another folder")
        if difference := _difference(found["options"], self._identity):
            raise CheckpointError(f"{folder} holds a run with {difference}; give another folder, or delete it")
        if not (stage := found["stages"].get(STAGE)):
            return  # killed at its very start
        try:
            self.steps, self.step_seconds = int(stage["steps"]), stage["step_seconds"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / RESULT_FILE} describes no run of recover(): {error!r}") from error

    def note(self, *, steps: int, step_seconds: float | None) -> None:
        """Writes what is to be done."""
        self.steps, self.step_seconds = steps, step_seconds
        RunRecord(self._folder, self._identity).note(STAGE, steps=steps, step_seconds=step_seconds)

    @contextmanager
    def training(self) -> Iterator[Callable[[Sequence[tuple[int, float]]], None]]:
        """Yields what to tell the logged losses, and notes whether the block ended well and its seconds so far."""
        record = RunRecord(self._folder, self._identity)
        with record.stage(STAGE):
            yield lambda losses: record.note(STAGE, losses=[{"step": step, "loss": loss} for step, loss in losses])


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    if found.get("model") != wanted["model"]:
        return "other weights of the model at its beginning (a run is continued from the model it began with)"
    for name in ("teacher", "data"):
        if found.get(name) != wanted[name]:
            return f"other {name}" if name == "data" else f"another {name}"
    before, now = found.get("settings", {}), wanted["settings"]
    changed = [f"{name}={before.get(name)!r} instead of {now[name]!r}" for name in now if before.get(name) != now[name]]
    return changed[0] if changed else None
