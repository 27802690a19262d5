"""Writes any model we export as OpenVINO IR; shapes are constants of the graph, so any architecture holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.errors import ExportError
from hf_elastic.runtimes.graph_folder import Batch, GraphOptions, export_graph
from hf_elastic.runtimes.graphs import TRACED, Arrays, GraphReport, Int8, Run, TextGraph
from hf_elastic.runtimes.opening import require_package


def export_openvino(
    source: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    int8: Int8 | None = None,
    calibration: Iterable[Batch] | None = None,
    with_past: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    parent: str | Path | None = None,
    overwrite: bool = False,
) -> GraphReport:
    """Writes a model as ``openvino/openvino_model.xml``, with what :func:`export_onnx` writes beside it.

    Args:
        source: folder of a checkpoint, stock or remote-code, or a plain model; computed in fp32.
        output: a folder that does not exist or is empty.
        int8: NNCF's quantisation for OpenVINO: ``dynamic`` rounds weights (OpenVINO may round activations while it
            runs), ``static`` weights and activations, to ranges found on ``calibration``.
        calibration: batches of token ids, for ``static``.
        with_past: a decoder's KV cache goes in and comes out, as in :func:`export_onnx`.
        tokenizer: saved instead of the parent's tokenizer files.
        parent: folder that tokenizer and modules are copied from; by default ``source``.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        ExportError: a package is missing, the model is routed, is an adapter or a supernet, cannot be traced, or the
            runtime's outputs differ by more than 1e-3; nothing is written.
        DataError: ``static`` without batches.
        CheckpointError: the folder cannot be read or written.
    """
    require_package("openvino", *(["nncf"] if int8 else []), extra="openvino")
    options = GraphOptions(int8, calibration, with_past, tokenizer, parent, overwrite)
    return export_graph(OpenvinoWriter(), source, output, options=options)


class OpenvinoWriter:
    """Writes and opens graphs of OpenVINO."""

    runtime = "openvino"
    model_file = "openvino/openvino_model.xml"
    packages: tuple[str, ...] = ("openvino",)

    def write(self, graph: TextGraph, path: Path) -> None:
        """Traces a graph and writes it in fp32.

        Raises:
            ExportError: tracing found that a size cannot be free.
        """
        import openvino

        free = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined]
        shapes = tuple(dict.fromkeys(axes, free) for axes in graph.axes())
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                graph, tuple(graph.example(*TRACED).values()), dynamic_shapes=(shapes,), strict=False
            )
            model = openvino.convert_model(program)
        for port, name, axes in zip(model.inputs, graph.inputs, graph.axes(), strict=True):
            if fixed := [said for axis, said in axes.items() if port.partial_shape[axis].is_static]:
                raise ExportError(f"tracing fixed the {' and '.join(fixed)} of {name}, which must be free")
            port.get_tensor().set_names({name})
        for port, name in zip(model.outputs, graph.outputs, strict=True):
            port.get_tensor().set_names({name})
        openvino.save_model(model, path, compress_to_fp16=False)

    def quantize(self, path: Path, *, int8: Int8, feeds: Sequence[Arrays]) -> None:
        """Makes weights integers by NNCF, in place."""
        import nncf
        import openvino

        model: Any = openvino.Core().read_model(path)
        if int8 == "dynamic":
            made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            data = nncf.Dataset([dict(feed) for feed in feeds])
            made = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
        aside = path.with_name("made.xml")
        openvino.save_model(made, aside, compress_to_fp16=False)
        del model, made
        for suffix in (".xml", ".bin"):
            aside.with_suffix(suffix).replace(path.with_suffix(suffix))

    def open(self, path: Path, *, threads: int | None = None) -> Run:
        """Loads a graph to run it on the CPU in fp32, as torch does; OpenVINO alone might choose bf16."""
        import openvino

        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        names = [port.any_name for port in compiled.outputs]

        def run(feed: Arrays) -> Arrays:
            found = compiled(dict(feed))
            return {name: np.array(found[place]) for place, name in enumerate(names)}

        return run
