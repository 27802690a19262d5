"""``compress``: the whole path from a checkpoint to a smaller one, in one call; and its steps one at a time."""

from hf_elastic.pipeline.lora_run import LoraResult, LoraRun
from hf_elastic.pipeline.nested import FamilyResult, export_family
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.run import CompressResult, CompressRun, compress
from hf_elastic.pipeline.steps import front_row, open_for_export, open_supernet, search_run

__all__ = [
    "CompressOptions",
    "CompressResult",
    "CompressRun",
    "FamilyResult",
    "LoraResult",
    "LoraRun",
    "compress",
    "export_family",
    "front_row",
    "open_for_export",
    "open_supernet",
    "search_run",
]
