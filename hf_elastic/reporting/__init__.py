"""Reports of runs: one page, figures, and parent and child side by side."""

from __future__ import annotations

from hf_elastic.reporting.trying import try_models
from hf_elastic.reporting.writing import write_figures, write_report

__all__ = ["try_models", "write_figures", "write_report"]
