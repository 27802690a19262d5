"""What a run keeps in its folder, and how a finished one is opened again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_elastic.architecture import Architecture
from hf_elastic.checkpoint.exporting import ExportReport
from hf_elastic.checkpoint.run_record import DIGESTS, PARENT, RESULT_FILE, TEXT, RunRecord, read_record
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import CheckpointError
from hf_elastic.files import given_path
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import Task, TaskData, load_tokenizer, read_config, resolve_task
from hf_elastic.pipeline.texts import Row, digest, read_rows
from hf_elastic.pipeline.training import device_of
from hf_elastic.search import Objective
from hf_elastic.supernet import Supernet

TEACHER_FILE = "teacher.safetensors"
QUALITY_FILE = "quality.json"
LATENCY_FILE = "latency.json"
EXACT_FILE = "exact.json"
SORTED, TRAINED = "sorted", "supernet"
"""Folders of the parent, its neurons and heads sorted, and of the trained supernet of recipe ``best``."""
_REPORTED = {entry.name for entry in fields(ExportReport)} - {"directory"}


@dataclass(frozen=True)
class RunResult:
    """What a run found: the fields that every kind of run has."""

    architecture: Architecture
    report: ExportReport
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    table: str = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)
    folder: Path


def recorded_export(report: ExportReport) -> dict[str, Any]:
    """A report as the record of a run keeps it: without its folder, which may move."""
    return {**{name: value for name, value in asdict(report).items() if name in _REPORTED}, "files": list(report.files)}


def reported_export(record: RunRecord, output: Path) -> ExportReport:
    """How a run exported its model, as recorded."""
    made = {name: value for name, value in record.numbers("export").items() if name in _REPORTED}
    return ExportReport(output, **{**made, "files": tuple(made["files"])})


def text_digest(rows: list[Row], task: Task, options: CompressOptions) -> str:
    """Digest of what a run reads of its data, to notice when a continued run finds other data."""
    labels = (options.label_column,) if task.name == "classification" else ()
    return digest(rows, (options.text_column, *labels))


def parent_digest(model: str) -> str:
    """What tells a checkpoint from another under the same name: its files as they are, or the commit on the Hub."""
    folder = given_path(model)
    if not folder.is_dir():
        return f"commit {read_config(model)._commit_hash}"
    found = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        found.update(file.name.encode())
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def identity_of(options: CompressOptions, rows: list[Row], task: Task) -> dict[str, Any]:
    """What a run that goes on must have begun with: options, and digests of what they name."""
    return {**options.to_dict(), TEXT: text_digest(rows, task, options), PARENT: parent_digest(options.model)}


def require_same_sources(folder: Path, options: CompressOptions, rows: list[Row], *, task: Task) -> None:
    """Checks that text and checkpoint are what a run was made from.

    Raises:
        CheckpointError: one of them is another by now.
    """
    stored = read_record(folder / RESULT_FILE)["options"]
    if text_digest(rows, task, options) != stored.get(TEXT):
        raise CheckpointError(f"the text in {', '.join(options.data)} is not what {folder} was made from; restore it")
    if parent_digest(options.model) != stored.get(PARENT):
        raise CheckpointError(f"the checkpoint {options.model} is not what {folder} was made from; restore it")


def export_dtype(model: str) -> torch.dtype:
    """The dtype in which a run writes what it found: that of the parent's checkpoint, where it is of 16 bits."""
    halves = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return halves.get(str(read_config(model).dtype).removeprefix("torch."), torch.float32)


def teacher_vectors(folder: Path) -> Tensor | None:
    """The parent's embeddings of its validation sentences that a run keeps; ``None`` for other tasks."""
    path = folder / TEACHER_FILE
    return load_file(path)["validation"] if path.is_file() else None


def options_of(record: Mapping[str, Any], *, output: str) -> CompressOptions:
    """Restores the options a run was started with.

    Raises:
        CheckpointError: the record holds other options than this version has.
    """
    options = {name: value for name, value in record["options"].items() if name not in DIGESTS}
    try:
        space, data = options.pop("space"), tuple(options.pop("data"))
        given = ElasticConfig.from_dict(space) if space else None
        return CompressOptions(**options, data=data, output=output, space=given)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the record of the run holds no usable options: {error}") from error


def named_folder(path: str | Path) -> Path:
    """A path whose last part is a name, also where ``.`` or ``..`` was given."""
    folder = Path(path).expanduser()
    return folder if folder.name not in ("", "..") else folder.resolve()


def require_run(folder: Path) -> None:
    """Checks that a folder holds the record of a run.

    Raises:
        CheckpointError: it does not; the message says where that of an output is.
    """
    if not (folder / RESULT_FILE).is_file():
        raise CheckpointError(f"{folder} is no run: it holds no {RESULT_FILE}; give the OUTPUT.run that compress made")
    if read_record(folder / RESULT_FILE)["options"].get("lora"):
        raise CheckpointError(
            f"{folder} is a run of adapters, which is not searched again; hf_elastic.load_adapter loads its 'adapters' "
            "onto the base in 'sorted' (Supernet.from_pretrained), else in 'parent', else onto the checkpoint itself"
        )
    if (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is what a run exported; give the folder of the run itself, OUTPUT.run")


class FinishedRun:
    """A run that is over, opened for more work on what it keeps.

    Args:
        folder: of the run, ``<output>.run``.

    Attributes:
        record: of the run; further stages may be added.
        options: the run was started with.
        task: what the model is for.
        device: where its models go.
        dtype: of its exports.

    Raises:
        CheckpointError: the folder is no run, the run is not finished, or its text or checkpoint is another by now.
    """

    def __init__(self, folder: Path) -> None:
        require_run(folder)
        stored = read_record(folder / RESULT_FILE)
        if not stored["stages"].get("export", {}).get("finished"):
            raise CheckpointError(f"{folder} is a run that is not finished; repeat its compress command first")
        self.folder = folder
        self.options = options_of(stored, output=str(folder.with_name(folder.name.removesuffix(".run"))))
        self.record = RunRecord(folder, stored["options"])
        self.task, self.device = resolve_task(self.options), device_of(self.options)
        self.dtype = export_dtype(self.options.model)
        self._rows = read_rows(self.options.data, text_column=self.options.text_column)
        require_same_sources(folder, self.options, self._rows, task=self.task)

    @cached_property
    def data(self) -> TaskData:
        """The same batches as the run had."""
        return self.task.prepare(load_tokenizer(self.options), self._rows, self.options)

    def supernet(self, name: str) -> Supernet:
        """A supernet that the run keeps, in fp32.

        Raises:
            CheckpointError: it is not there, or broken.
        """
        return Supernet.from_pretrained(self.folder / name, dtype=torch.float32).to(self.device)

    def measures(self, supernet: Supernet) -> list[Objective]:
        """The qualities that the run compared models by."""
        return self.task.measures(supernet, self.data.validation, teacher=teacher_vectors(self.folder))
