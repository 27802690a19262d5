"""Runs a folder that was exported for a runtime, on token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.runtimes.graph_folder import GraphWriter, completed, read_runtime_record
from hf_elastic.runtimes.onnx_export import OnnxWriter
from hf_elastic.runtimes.opening import first_line, require_package
from hf_elastic.runtimes.openvino_export import OpenvinoWriter

WRITERS: Mapping[str, GraphWriter] = {"onnx": OnnxWriter(), "openvino": OpenvinoWriter()}


class RuntimeModel:
    """A graph in its runtime.

    Attributes:
        runtime: ``onnx`` or ``openvino``.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        record = read_runtime_record(folder)
        self.runtime: str = record["runtime"]
        if self.runtime not in WRITERS:
            raise CheckpointError(f"{folder} is for {self.runtime!r}; known: {', '.join(WRITERS)}")
        self.inputs, self.outputs = tuple(record["inputs"]), tuple(record["outputs"])
        writer = WRITERS[self.runtime]
        require_package("onnxruntime" if self.runtime == "onnx" else "openvino", extra=self.runtime)
        try:
            self._run = writer.open(folder / record["model_file"], threads=threads)
        except Exception as error:  # runtimes have exceptions of their own
            raise CheckpointError(f"{folder} cannot be loaded by {self.runtime}: {first_line(error)}") from error

    def __call__(self, **arrays: Any) -> dict[str, np.ndarray]:
        """Runs the graph.

        Args:
            arrays: ``input_ids`` and others by name, of numpy or torch; a mask is all ones unless given, token types
                are zeros.

        Returns:
            Outputs by name.

        Raises:
            DataError: an input is missing, or the runtime does not take what was given.
        """
        feed = completed(arrays, self.inputs)
        try:
            return dict(self._run(feed))
        except Exception as error:  # runtimes have exceptions of their own
            sizes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feed.items() if "." not in name)
            raise DataError(f"{self.runtime} does not run the model on {sizes}: {first_line(error)}") from error


def open_runtime(folder: str | Path, *, threads: int | None = None) -> RuntimeModel:
    """Opens a folder that :func:`export_onnx` or :func:`export_openvino` wrote.

    Args:
        folder: what was written.
        threads: that the runtime may use; by default what it chooses.

    Raises:
        CheckpointError: it is none, or cannot be loaded.
        ExportError: the runtime is not installed.
    """
    return RuntimeModel(Path(folder), threads=threads)
