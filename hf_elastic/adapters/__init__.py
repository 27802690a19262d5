"""Low-rank adapters: the only code that imports peft."""

from __future__ import annotations

from hf_elastic.adapters.merged import Lora, adapted, described

__all__ = ["Lora", "adapted", "described"]
