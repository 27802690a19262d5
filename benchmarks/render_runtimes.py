"""Section of docs/benchmarks.md about CPU runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[[Any], str]


def runtimes(result: Mapping[str, Any], table: Table) -> list[str]:
    """The parent and ours in torch, OpenVINO and ONNX Runtime, in floats and INT8."""
    rows, found = result["rows"], result["verdict"]
    settings = [name.removeprefix("ms ") for name in rows[0] if name.startswith("ms ")]
    lines = []
    for row in rows:
        line = {"model": row["model"], "runtime": row["runtime"], "weights": row["weights"]}
        for setting in settings:
            line[f"ms at {setting}"] = row[f"ms {setting}"]
            line[f"speed-up at {setting}"] = f"{row[f'speed-up {setting}']:.2f}x"
        line |= {"STS-B": f"{row['spearman']:.4f}", "of the parent's": f"{row['kept']:.1%}", "MB": f"{row['MB']:.1f}"}
        lines.append(line)
    exported = max(row["difference"] for row in rows)
    verdict = "met" if found["met"] else "**NOT met**"
    best = "" if found["best"] is None else f", by {found['best']}: {found['speed-up']:.2f}x at {found['kept']:.1%}"
    return [
        "## CPU runtimes: INT8 alone, ours, and both",
        "`benchmarks/runtimes.py`: all-MiniLM-L6-v2 and what `compress` makes of it, each as it is and exported. INT8 "
        f"is the runtimes' own: static, weights and activations, calibrated on {result['lines']} lines of text. STS-B: "
        f"{result['pairs']} pairs that nothing was chosen or calibrated on. Times are medians of forwards in turns; "
        "speed-ups are over the parent in torch. Outputs of the exports of floats equal torch's within "
        f"{exported:.1e}.",
        table(lines),
        f"Aim: {found['bar']} at 16 sequences: {verdict}{best}.",
    ]
