"""Writes a graph and what travels with it to a folder: whole or not at all, compared with torch before it appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.checkpoint.companions import copy_companions
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.errors import CheckpointError, DataError, ElasticError, ExportError
from hf_elastic.files import read_json, whole_folder, write_json
from hf_elastic.runtimes.graphs import (
    Arrays,
    GraphReport,
    Int8,
    Run,
    TextGraph,
    check_graph,
    longest_checked,
    require_equal,
    shown,
    traceable,
)
from hf_elastic.runtimes.opening import first_line, open_model, positions_of, require_positions, require_unrouted_graph
from hf_elastic.supernet_folder import save_generation_config, write_code

RUNTIME_FILE = "runtime.json"
FORMAT = 1
Batch = Mapping[str, Tensor]


class GraphWriter(Protocol):
    """A runtime that graphs are written for.

    Attributes:
        runtime: its name.
        model_file: where the graph stands in a folder; where sentence-transformers and Optimum look for it.
        packages: that decide about what was written.
    """

    runtime: str
    model_file: str
    packages: tuple[str, ...]

    def write(self, graph: TextGraph, path: Path) -> None:
        """Traces a graph and writes it in fp32."""

    def quantize(self, path: Path, *, int8: Int8, feeds: Sequence[Arrays]) -> None:
        """Makes the weights of a written graph integers, in place; ``feeds`` is what a static one is calibrated on."""

    def open(self, path: Path, *, threads: int | None = None) -> Run:
        """Loads a written graph to run it on the CPU."""


@dataclass(frozen=True)
class GraphOptions:
    """How a graph is written; see :func:`hf_elastic.runtimes.export_onnx`."""

    int8: Int8 | None = None
    calibration: Iterable[Batch] | None = None
    with_past: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    parent: str | Path | None = None
    overwrite: bool = False


def export_graph(
    writer: GraphWriter, source: str | Path | PreTrainedModel, output: str | Path, *, options: GraphOptions
) -> GraphReport:
    """Writes a model for a runtime, see :func:`hf_elastic.runtimes.export_onnx`."""
    if options.int8 not in (None, "dynamic", "static"):
        raise ExportError(f"int8={options.int8!r} is not one of None, 'dynamic', 'static'")
    batches = list(options.calibration or ()) if options.int8 == "static" else []
    if options.int8 == "static" and (options.with_past or not batches):
        _refuse_static(with_past=options.with_past)
    model = open_model(source)
    require_unrouted_graph(model.config, form=writer.runtime)
    parent = options.parent or (model.config._name_or_path if isinstance(source, PreTrainedModel) else source)
    with whole_folder(output, overwrite=options.overwrite) as folder, traceable(model) as taken:
        path = folder / writer.model_file
        path.parent.mkdir(parents=True)
        graph = _graph(taken, with_past=options.with_past)
        with _in_a_line(f"{writer.runtime} holds no {type(taken).__name__} with free batch and length"):
            writer.write(graph, path)
        with _in_a_line(f"{writer.runtime} does not run the graph of a {type(taken).__name__}"):
            difference, _ = check_graph(graph, writer.open(path))
        require_equal(difference, runtime=writer.runtime)
        rounded = None if options.int8 is None else _rounded(writer, graph, path, int8=options.int8, batches=batches)
        names = _write_beside(model, parent, folder, tokenizer=options.tokenizer)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        found = GraphReport(
            Path(output), writer.model_file, writer.runtime, options.int8, tuple(graph.inputs), tuple(graph.outputs),
            difference, rounded, size, names,
        )  # fmt: skip
        write_json(folder / RUNTIME_FILE, _record(found, writer.packages))
    return found


def _graph(model: PreTrainedModel, *, with_past: bool) -> TextGraph:
    room, needed = positions_of(model.config), longest_checked(with_past=with_past)
    if room is not None and room < needed:
        raise ExportError(
            f"a graph is compared with torch on up to {needed} tokens, but a {type(model).__name__} of this size has "
            f"positions for {room}; convert a model of more (max_position_embeddings)"
        )
    with _in_a_line(f"a {type(model).__name__} does not run on padded token ids"):
        return TextGraph(model, with_past=with_past).eval()


def _rounded(writer: GraphWriter, graph: TextGraph, path: Path, *, int8: Int8, batches: Sequence[Batch]) -> float:
    """Makes weights integers; how far outputs moved, as a share of the largest."""
    feeds = [
        completed({n: np.asarray(t) for n, t in batch.items() if n in graph.inputs}, graph.inputs) for batch in batches
    ]
    longest = max((feed["input_ids"].shape[-1] for feed in feeds), default=0)
    require_positions(graph.model.config, longest, cure="cut the text of the calibration there (--sequence-length)")
    with _in_a_line(f"{writer.runtime} makes no integers (int8={int8!r}) of a {type(graph.model).__name__}"):
        writer.quantize(path, int8=int8, feeds=feeds)
        off, largest = check_graph(graph, writer.open(path))
    return off / max(largest, 1e-12)


@contextmanager
def _in_a_line(saying: str) -> Iterator[None]:
    """Says in one line what code of others raised; tracers, runtimes and quantisers raise whatever they like."""
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:
        raise ExportError(f"{saying}: {first_line(error)}") from error


def _refuse_static(*, with_past: bool) -> None:
    if with_past:
        raise ExportError("int8='static' is calibrated on whole sequences; leave with_past, or take int8='dynamic'")
    raise DataError("int8='static' needs calibration=, a list of batches (dicts of input_ids and attention_mask)")


def completed(feed: Arrays, inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """A feed of exactly these inputs; a mask that is not given is all ones, token types are zeros.

    Token types are passed over where the graph has none, as tokenizers give them to any model.

    Raises:
        DataError: another input is missing, or is none of the graph.
    """
    if "input_ids" not in feed:
        raise DataError(f"a batch has no input_ids, only {', '.join(sorted(feed)) or 'nothing'}")
    ids = np.asarray(feed["input_ids"])
    known = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), **feed}
    if missing := [name for name in inputs if name not in known]:
        raise DataError(f"the graph takes {shown(inputs)}; missing: {shown(missing)}")
    if unknown := sorted(feed.keys() - {*inputs, "token_type_ids"}):
        raise DataError(f"the graph takes {shown(inputs)}, not {shown(unknown)}")
    return {name: np.asarray(known[name]) for name in inputs}


def _write_beside(
    model: PreTrainedModel, parent: str | Path, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, ...]:
    """Config, code, tokenizer, modules and the record of the export; names of the files."""
    model.config.save_pretrained(folder)
    save_generation_config(model, folder)
    write_code(model, folder)
    copy_companions(parent or "", folder, tokenizer=tokenizer)
    if parent and (Path(parent) / ARCHITECTURE_FILE).is_file():
        shutil.copyfile(Path(parent) / ARCHITECTURE_FILE, folder / ARCHITECTURE_FILE)
    files = {p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(folder / "onnx")}
    return tuple(sorted(str(p.relative_to(folder)) for p in files if not p.is_relative_to(folder / "openvino")))


def _record(report: GraphReport, packages: Sequence[str]) -> dict[str, Any]:
    names = ("model_file", "runtime", "int8", "max_difference", "int8_difference", "size")
    return {
        "format": FORMAT,
        **{name: getattr(report, name) for name in names},
        "inputs": list(report.inputs),
        "outputs": list(report.outputs),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }


def read_runtime_record(folder: Path) -> dict[str, Any]:
    """Reads what :func:`export_graph` noted.

    Raises:
        CheckpointError: the folder holds no graph that was written here.
    """
    if not (folder / RUNTIME_FILE).is_file():
        raise CheckpointError(f"{folder} has no {RUNTIME_FILE}, so it holds no graph that hf_elastic exported")
    record = read_json(folder / RUNTIME_FILE)
    kinds = {"model_file": str, "runtime": str, "inputs": list, "outputs": list}
    if record.get("format") != FORMAT or any(not isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{folder / RUNTIME_FILE} is not of format {FORMAT}: {json.dumps(record)[:80]}")
    return record
