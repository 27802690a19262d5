"""Where an architecture runs, and how it gets there: ONNX, OpenVINO, GGUF, the rules of vLLM.

Everything is imported when it is first used: neither torch nor a runtime is loaded before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_elastic.late_imports import on_first_use

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ imports on first use
    from hf_elastic.runtimes.gguf_export import GgufReport as GgufReport
    from hf_elastic.runtimes.gguf_export import export_gguf as export_gguf
    from hf_elastic.runtimes.graphs import GraphReport as GraphReport
    from hf_elastic.runtimes.matrix import RunsWhere as RunsWhere
    from hf_elastic.runtimes.matrix import runs_where as runs_where
    from hf_elastic.runtimes.matrix import runs_where_folder as runs_where_folder
    from hf_elastic.runtimes.matrix import runs_where_space as runs_where_space
    from hf_elastic.runtimes.onnx_export import export_onnx as export_onnx
    from hf_elastic.runtimes.openvino_export import export_openvino as export_openvino
    from hf_elastic.runtimes.runtime_latencies import measure_folders as measure_folders
    from hf_elastic.runtimes.runtime_latencies import runtime_latency as runtime_latency
    from hf_elastic.runtimes.runtime_model import RuntimeModel as RuntimeModel
    from hf_elastic.runtimes.runtime_model import open_runtime as open_runtime
    from hf_elastic.runtimes.vllm_rules import broken_vllm_rules as broken_vllm_rules

_HOMES = {
    "gguf_export": ("GgufReport", "export_gguf"),
    "graphs": ("GraphReport",),
    "runtime_latencies": ("measure_folders", "runtime_latency"),
    "matrix": ("RunsWhere", "runs_where", "runs_where_folder", "runs_where_space"),
    "onnx_export": ("export_onnx",),
    "openvino_export": ("export_openvino",),
    "runtime_model": ("RuntimeModel", "open_runtime"),
    "vllm_rules": ("broken_vllm_rules",),
}

__all__ = [
    "GgufReport",
    "GraphReport",
    "RunsWhere",
    "RuntimeModel",
    "broken_vllm_rules",
    "export_gguf",
    "export_onnx",
    "export_openvino",
    "measure_folders",
    "open_runtime",
    "runs_where",
    "runs_where_folder",
    "runs_where_space",
    "runtime_latency",
]

__getattr__, __dir__ = on_first_use(globals(), _HOMES)
