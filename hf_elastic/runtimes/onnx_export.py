"""Writes any model we export as ONNX, for ONNX Runtime; shapes are constants of the graph, so any architecture fits."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.errors import ExportError
from hf_elastic.runtimes.graph_folder import Batch, GraphOptions, export_graph
from hf_elastic.runtimes.graphs import TRACED, Arrays, GraphReport, Int8, Run, TextGraph
from hf_elastic.runtimes.opening import require_package

_SINGLE_FILE = 2**31 - 2**24  # bytes of a protobuf message


def export_onnx(
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
    """Writes a model as ``onnx/model.onnx``, with tokenizer, config and sentence-transformers modules beside it.

    Batch and length are free. ONNX Runtime's outputs are compared with torch's on random token ids with padding before
    the folder appears. The folder is laid out as sentence-transformers and Optimum expect one.

    Args:
        source: folder of a checkpoint, stock or remote-code, or a plain model; computed in fp32.
        output: a folder that does not exist or is empty.
        int8: ONNX Runtime's own quantisation: ``dynamic`` rounds weights and, while it runs, activations; ``static``
            rounds activations to ranges found on ``calibration``.
        calibration: batches of token ids, for ``static``.
        with_past: a decoder's KV cache goes in and comes out, so that it can decode step by step; an empty cache is a
            prefill. Without, the graph gives the logits of all tokens.
        tokenizer: saved instead of the parent's tokenizer files.
        parent: folder that tokenizer and modules are copied from; by default ``source``.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        ExportError: a package is missing, the model is routed, is an adapter or a supernet, cannot be traced, or the
            runtime's outputs differ by more than 1e-3; nothing is written.
        DataError: ``static`` without batches.
        CheckpointError: the folder cannot be read or written.
    """
    require_package("onnx", "onnxscript", "onnxruntime", extra="onnx")
    options = GraphOptions(int8, calibration, with_past, tokenizer, parent, overwrite)
    return export_graph(OnnxWriter(), source, output, options=options)


class OnnxWriter:
    """Writes and opens graphs of ONNX Runtime."""

    runtime = "onnx"
    model_file = "onnx/model.onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")

    def write(self, graph: TextGraph, path: Path) -> None:
        """Traces a graph and writes it in fp32.

        Raises:
            ExportError: tracing found that a size cannot be free.
        """
        with _quiet():
            program: Any = torch.onnx.export(
                graph,
                tuple(graph.example(*TRACED).values()),
                dynamo=True,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=(graph.axes(),),
                verbose=False,
            )
        for value, axes in zip(program.model.graph.inputs, graph.axes(), strict=True):
            if fixed := [name for axis, name in axes.items() if isinstance(value.shape[axis], int)]:
                raise ExportError(f"tracing fixed the {' and '.join(fixed)} of {value.name}, which must be free")
        program.save(str(path), external_data=_weight_bytes(graph) > _SINGLE_FILE)

    def quantize(self, path: Path, *, int8: Int8, feeds: Sequence[Arrays]) -> None:
        """Makes weights integers by ``onnxruntime.quantization``, in place."""
        from onnxruntime import quantization

        with tempfile.TemporaryDirectory(dir=path.parent.parent) as aside, _quiet():
            made = Path(aside) / path.name
            external = any(file != path for file in path.parent.iterdir())
            shared: Any = {"per_channel": True, "use_external_data_format": external}
            if int8 == "dynamic":
                quantization.quantize_dynamic(path, made, weight_type=quantization.QuantType.QInt8, **shared)
            else:
                quantization.quantize_static(
                    path, made, _Reader(feeds), weight_type=quantization.QuantType.QInt8,
                    op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True}, **shared,
                )  # fmt: skip
            for file in path.parent.iterdir():
                file.unlink()
            for file in Path(aside).iterdir():
                file.rename(path.parent / file.name)

    def open(self, path: Path, *, threads: int | None = None) -> Run:
        """Loads a graph to run it on the CPU."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(feed: Arrays) -> Arrays:
            return dict(zip(names, session.run(names, dict(feed)), strict=True))

        return run


class _Reader:
    """Hands batches to ONNX Runtime's calibration one by one."""

    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        found = next(self._rest, None)
        return None if found is None else dict(found)


def _weight_bytes(graph: TextGraph) -> int:
    tensors = [*graph.parameters(), *graph.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what exporters say about themselves from the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root", "")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
