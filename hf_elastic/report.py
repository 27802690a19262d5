"""Tables made from a run's ``result.json``; numbers are computed, never typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]



def comparison_table(rows: Sequence[Row], *, quality: Sequence[str], seq_len: int) -> str:
    """The table of a run: one row a model, costs as absolute numbers and shares of the first row (the parent).

    Args:
        rows: each with name, parameters, total_parameters, macs, latency (seconds or ``None``), loadability, and
            the measured qualities by name.
        quality: names of the qualities, in order.
        seq_len: the length for which MACs are counted.
    """
    parent = rows[0]
    header = ["", "parameters", "with embeddings", f"MACs at {seq_len}", "latency", "speed-up", *quality, "loads as"]
    lines = [header]
    for row in rows:
        lines.append([
            str(row["name"]),
            _share(row["parameters"], parent["parameters"]),
            _share(row["total_parameters"], parent["total_parameters"]),
            _share(row["macs"], parent["macs"]),
            "-" if row["latency"] is None else f"{row['latency'] * 1e3:.1f} ms",
            "-" if row["latency"] is None else f"{parent['latency'] / row['latency']:.2f}x",
            *(f"{row[name]:.4f}" for name in quality),
            str(row["loadability"]),
        ])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width, the first to the left and the others to the right, a rule below the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return "\n".join([shown[0].rstrip(), "-" * len(shown[0]), *(line.rstrip() for line in shown[1:])])


def _share(value: float, whole: float) -> str:
    return f"{count(value)} ({value / whole:.0%})" if whole else count(value)


def count(number: float) -> str:
    """A number with a unit: 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def stage_times(record: Mapping[str, Any]) -> str:
    """How long each stage of a run took."""
    stages = record.get("stages", {})
    lines = [["stage", "seconds"], *([name, f"{stage.get('seconds', 0.0):.1f}"] for name, stage in stages.items())]
    return aligned(lines)
