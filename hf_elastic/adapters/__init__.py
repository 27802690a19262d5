"""Low-rank adapters: the only code that imports peft."""

from __future__ import annotations

from hf_elastic.adapters.configuration import ElasticLoraConfig
from hf_elastic.adapters.extraction import ExtractedAdapter, extract_adapter
from hf_elastic.adapters.loading import add_lora, fixed_lora, load_adapter, load_fixed_lora
from hf_elastic.adapters.merged import Lora, adapted, described
from hf_elastic.adapters.selection import SubnetStatistics

__all__ = [
    "ElasticLoraConfig",
    "ExtractedAdapter",
    "Lora",
    "SubnetStatistics",
    "adapted",
    "add_lora",
    "described",
    "extract_adapter",
    "fixed_lora",
    "load_adapter",
    "load_fixed_lora",
]
