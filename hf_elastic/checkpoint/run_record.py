"""One atomic ``result.json`` per run: stages, options, numbers, artefacts; everything shown is derived from it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json, write_json

RESULT_FILE = "result.json"
FORMAT = 1
TEXT, PARENT = "text", "parent"
DIGESTS = {TEXT: "text", PARENT: "checkpoint"}
"""Beside the options of a run: digests of what it was made from, and what that is called."""


class RunRecord:
    """The record of a run in a folder; opening it again continues the run.

    Args:
        folder: of the run.
        options: what the run was asked for; must be equal when the run is continued.

    Raises:
        CheckpointError: the folder holds a run with other options, or cannot be read or written.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.path = folder / RESULT_FILE
        if self.path.exists():
            self.data = read_record(self.path)
            self._check(options)
        else:
            self.data = {
                "format": FORMAT,
                "options": dict(options),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optuna")},
                "machine": {"platform": platform.platform(), "python": platform.python_version()},
                "stages": {},
            }
            self.save()

    def _check(self, options: Mapping[str, Any]) -> None:
        old = self.data["options"]
        changed = sorted(name for name in {**old, **options} if old.get(name) != options.get(name))
        if changed and changed[0] in DIGESTS:
            raise CheckpointError(
                f"{self.path.parent} holds a run that was made from another {DIGESTS[changed[0]]} under the same name; "
                "restore it, choose another output, or delete that folder"
            )
        if changed:
            before, now = (_shortened(values.get(changed[0])) for values in (old, options))
            raise CheckpointError(
                f"{self.path.parent} holds a run with {changed[0]}={before}, now {now}; "
                "repeat the command as it was, choose another output, or delete that folder"
            )

    def save(self) -> None:
        """Writes the record, whole or not at all."""
        write_json(self.path, self.data)

    def finished(self, stage: str) -> bool:
        """Whether a stage ended."""
        return bool(self.data["stages"].get(stage, {}).get("finished"))

    def numbers(self, stage: str) -> dict[str, Any]:
        """What a stage recorded."""
        return dict(self.data["stages"].get(stage, {}))

    def note(self, stage: str, **numbers: Any) -> None:
        """Adds numbers to a stage and saves."""
        self.data["stages"].setdefault(stage, {}).update(numbers)
        self.save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Marks a stage as finished, with the seconds it took over all its attempts, when the block ends well."""
        began = time.perf_counter()
        try:
            yield
            self.note(name, finished=True)
        finally:
            spent = self.numbers(name).get("seconds", 0.0) + time.perf_counter() - began
            self.note(name, seconds=round(spent, 3))


def read_record(path: Path) -> dict[str, Any]:
    """Reads a run's ``result.json``.

    Raises:
        CheckpointError: it is missing, broken, or of something else.
    """
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {data.get('format')!r}, this version reads {FORMAT}")
    options, stages = data.get("options"), data.get("stages")
    if (
        not isinstance(options, dict)
        or not isinstance(stages, dict)
        or not all(isinstance(stage, dict) for stage in stages.values())
    ):
        raise CheckpointError(f"{path} is no record of a run: its options or stages are missing")
    return data


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
