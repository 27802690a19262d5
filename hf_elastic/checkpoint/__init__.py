"""From a subnet to an ordinary Hugging Face checkpoint: extraction, export, and the files beside the weights."""

from .exporting import ExportReport, export
from .extraction import extract

__all__ = ["ExportReport", "export", "extract"]
