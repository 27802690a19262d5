"""From a subnet to an ordinary Hugging Face checkpoint: extraction, export, files beside the weights."""

from hf_elastic.checkpoint.exporting import ExportReport, export, save_quantized
from hf_elastic.checkpoint.extraction import extract

__all__ = ["ExportReport", "export", "extract", "save_quantized"]
