"""The table of a run: every model on the same sentences, latencies interleaved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import costs, objectives
from hf_elastic.checkpoint import extract
from hf_elastic.declaration import Loadability as Allowed
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import Task, load_model
from hf_elastic.pipeline.training import device_of
from hf_elastic.repair.refitting import repaired_shapes
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.streams import Batch
from hf_elastic.supernet import Loadability, Supernet
from hf_elastic.tables.timing import Setting, measure_models, typical

_LATENCY_SECONDS = 6.0
Form = Callable[[Supernet, Architecture], Loadability]
Measures = Callable[[Supernet], Sequence[Objective]]


@dataclass(frozen=True)
class Candidate:
    """One row to be: a subnet of a supernet, as it is or repaired on calibration batches first."""

    name: str
    supernet: Supernet
    architecture: Architecture
    calibration: Sequence[Batch] = ()

    def ready(self) -> AbstractContextManager[object]:
        """Inside it the supernet has the weights that the row is about."""
        if not self.calibration:
            return nullcontext()
        shapes = self.supernet.layer_shapes(self.architecture)
        return repaired_shapes(self.supernet, shapes, self.calibration, judged=False)


def compare(
    candidates: Sequence[Candidate], *, measures: Measures, form: Form, setting: Setting
) -> list[dict[str, Any]]:
    """Rows of the table: costs, measured qualities, and latency of each model as it would be exported.

    Args:
        candidates: the first is the parent.
        measures: the objectives of a supernet that become columns.
        form: how an architecture would be written.
        setting: in which latencies are measured, and in which dtype.
    """
    rows, models = [], {}
    for candidate in candidates:
        supernet, point = candidate.supernet, candidate.architecture
        loadability = form(supernet, point)
        with candidate.ready():
            values = objectives.evaluated(measures(supernet), point)
            rows.append(table_row(candidate, values, loadability=loadability))
            models[candidate.name] = extract(supernet, point, loadability=loadability)
    for model in models.values():
        cast_parameters_(model, getattr(torch, setting.dtype))
    timed = measure_models(models, setting, seconds=_LATENCY_SECONDS)
    return [{**row, "latency": typical(timed[row["name"]].samples)} for row in rows]


def table_row(candidate: Candidate, values: Mapping[str, float], *, loadability: Loadability) -> dict[str, Any]:
    """A row without its latency: costs, and qualities that were measured."""
    supernet, point = candidate.supernet, candidate.architecture
    return {
        "name": candidate.name,
        "parameters": costs.parameters(supernet, point),
        "total_parameters": costs.total_parameters(supernet, point),
        "macs": costs.macs(supernet, point, seq_len=costs.LATENCY_TOKENS),
        "loadability": loadability,
        "architecture": dict(point),
        **recorded(values),
    }


def written_form(supernet: Supernet, architecture: Architecture, *, allowed: Allowed) -> Loadability:
    """How an architecture is written: compact where the options allow remote code, rather than padded."""
    form = supernet.loadability(architecture)
    compact = allowed == "any" and supernet.family.static_type is not None
    return "remote-code" if form == "stock-padded" and compact else form


def load_exported(task: Task, options: CompressOptions, *, folder: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint in the dtype of the export, on the device of the run; without a folder the parent's."""
    model: Any = load_model(task, options, folder=folder)
    model = model.to(device_of(options))
    cast_parameters_(model, dtype)
    return model  # type: ignore[no-any-return]


def recorded(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as a record keeps them."""
    return {name: finite(value) for name, value in values.items()}


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters, but not the frequencies of rotary embeddings."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def finite(value: float) -> float | None:
    """A number that JSON can hold; ``None`` for what a cut model broke."""
    return value if math.isfinite(value) else None
