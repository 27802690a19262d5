"""Sections of docs/benchmarks.md about routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[[Any], str]


def routing(result: Mapping[str, Any], table: Table) -> list[str]:
    """Time and MACs of routed forwards."""
    options, rows = result["options"], result["rows"]
    prefill = [_line(row) for row in rows if "MACs left" in row]
    decode = [_line(row) for row in rows if "MACs left" not in row]
    return [
        "## Routing: what is left out, and the time that it saves",
        f"`benchmarks/routing.py`: {options['layers']} layers x {options['hidden']}, one row of {options['length']} "
        f"tokens, {options['threads']} threads; each kind of router at half of its capacity in all layers. `time` is "
        "that of the routed model over the parent's, `saved` the share of time saved over the share of MACs left out "
        "(bar for FFN tokens), with intervals.",
        table(prefill),
        "One decoding step on a cache of 128 tokens:",
        table(decode),
        "What routers add:",
        table(result["routers"]),
    ]


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are shown."""
    shown = ("family", "what", "half", "MACs left", "time", "saved", "bar", "met")
    if "MACs left" not in row:
        return {name: row[name] for name in shown[:3]} | {"time": row["time"]}
    return {name: row.get(name, "") for name in shown}
