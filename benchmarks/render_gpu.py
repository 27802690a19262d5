"""Section of docs/benchmarks.md about absolute figures on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[[Sequence[Mapping[str, Any]]], str]

TEXTS = {
    "subnets": "**Extracted subnets against the parent** (bf16; `ms` are medians, speed-ups medians of paired ratios):",
    "active": "**An active subnet over the same one extracted**, bar 1.1:",
    "routing": "**Routing**: every router lets half in; at full capacity (nothing halved) routers are bypassed, bar "
    "1.03. `saved` is time saved over MACs saved, for FFN tokens bar .8:",
    "commands": "**Commands**: seconds, and the most memory held, the model's weights included:",
}
READING = """What the figures say: one sequence alone does not fill such a device, so that narrower matrices save
nothing and only whole layers do; wide batches save nearly their MACs. Routing pays for gathering with many small
kernels: FFN tokens gain from large batches on; tokens of attention, heads and experts cost time here."""
UNFINISHED = "`quantize_ (gptq)` did not end within the time that this run had, a minute."
LEFT_OUT = ("ratio", "low", "high", "pairs")


def gpu(result: Mapping[str, Any], table: Table) -> list[str]:
    """The section on one device."""
    options, machine = result["settings"], result["environment"]
    sizes = f"{options['layers']} layers x {options['hidden']}, FFN {options['intermediate']}, {options['heads']} heads"
    where = machine.get("gpu", "a CPU")
    paragraphs = [
        f"## On a GPU: {where}",
        f"`benchmarks/gpu.py`: a LLaMA of {sizes}, {options['kv_heads']} key/value heads, random bf16 weights. "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Prefill and decoding as batch x tokens.",
    ]
    for part, rows in result["rows"].items():
        shown = [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in rows]
        paragraphs += [TEXTS[part], table(shown)]
    paragraphs.append(READING)
    if not any("gptq" in row["command"] for row in result["rows"].get("commands", ())):
        paragraphs.append(UNFINISHED)
    return paragraphs
