"""``compress``: the whole path from a checkpoint to a smaller one, in one call; and its steps one at a time.

``make_elm`` is the path of ELM, from a teacher and text to a new small model.
"""

from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.elm_run import ElmResult, ElmRun, make_elm
from hf_elastic.pipeline.lora_run import LoraResult, LoraRun
from hf_elastic.pipeline.nested import FamilyResult, export_family
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.run import CompressResult, CompressRun, compress
from hf_elastic.pipeline.steps import front_row, open_for_export, open_supernet, search_run

__all__ = [
    "CompressOptions",
    "CompressResult",
    "CompressRun",
    "ElmOptions",
    "ElmResult",
    "ElmRun",
    "FamilyResult",
    "LoraResult",
    "LoraRun",
    "compress",
    "export_family",
    "front_row",
    "make_elm",
    "open_for_export",
    "open_supernet",
    "search_run",
]
