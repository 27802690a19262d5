"""The parts of docs/when-not.md that are made of numbers: points at which something else is better."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from render import machine, table

Found = Mapping[str, Any]


def parts(found: Found) -> dict[str, str]:
    """What stands between the marks of the page, by their names."""
    crossovers = found["crossovers"]
    return {
        "int8": int8(found.get("runtimes")),
        "cuts": cuts(crossovers["cuts"], crossovers["settings"]["worth"], found),
        "zeros": zeros(crossovers["zeros"], crossovers["settings"]["hidden"], found),
        "machine": machine(crossovers["environment"]),
    }


def _times(row: Mapping[str, Any]) -> str:
    return f"{row['speed-up']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"


def int8(result: Mapping[str, Any] | None) -> str:
    """The parent and ours in their fastest runtime, as floats and as integers; from which speed-up on a cut helps."""
    if result is None:
        return "`benchmarks/runtimes.py` measures this; there is no result of it here."
    speed = next(name for name in reversed(result["rows"][0]) if name.startswith("speed-up "))
    fastest = max((row for row in result["rows"] if row["model"] == "parent"), key=lambda row: row[speed])
    rows = [row for row in result["rows"] if row["runtime"] in ("torch", fastest["runtime"])]
    shown = [
        {"model": row["model"], "runtime": row["runtime"], "weights": row["weights"], "STS-B": f"{row['spearman']:.4f}",
         "of the parent's": f"{row['kept']:.1%}", speed: f"{row[speed]:.2f}x"}
        for row in rows
    ]  # fmt: skip
    return "\n\n".join([table(shown), _verdict(rows, fastest["runtime"], speed), machine(result["environment"])])


def _verdict(rows: Sequence[Mapping[str, Any]], runtime: str, speed: str) -> str:
    alone = next(r for r in rows if (r["model"], r["runtime"], r["weights"]) == ("parent", runtime, "int8"))
    ours = [row for row in rows if row["model"] != "parent"]
    floats = [row for row in ours if row["weights"] != "int8"]
    good = [row for row in floats if row[speed] >= alone[speed] and row["kept"] >= alone["kept"]]
    faster = sorted(
        (row for row in ours if row["weights"] == "int8" and row[speed] > alone[speed]), key=lambda r: r[speed]
    )
    lines = [f"INT8 alone is {alone[speed]:.2f}x as fast as the parent in torch and keeps {alone['kept']:.1%}."]
    if good:
        lines.append(f"As fast and as good in floats: {', '.join(row['model'] for row in good)}.")
    else:
        lines.append(f"None of the {len(floats)} cuts in floats is as fast and as good.")
    if faster:
        first = faster[0]
        lines.append(
            f"**The crossover is INT8's own speed-up**: up to {alone[speed]:.1f}x take INT8 alone; beyond it a cut "
            f"helps on top ({first['model']} with INT8: {first[speed]:.2f}x at {first['kept']:.1%})."
        )
    else:
        lines.append("**No cut measured here was faster on top of INT8 than INT8 alone.**")
    return " ".join(lines)


def cuts(rows: Sequence[Mapping[str, Any]], worth: float, found: Found) -> str:
    """Speed-up by the width of the FFN that is left, and from which cut on it is felt."""
    whole = rows[0]["FFN width"]
    shown = [
        {"FFN width": f"{row['FFN width']:,}", "of the parent's": f"{row['FFN width'] / whole:.0%}",
         "parameters left": f"{row['parameters left']:.1%}",
         "if time followed parameters": f"{row['if time followed']:.2f}x", "measured speed-up": _times(row)}
        for row in rows
    ]  # fmt: skip
    felt = list(itertools.takewhile(lambda row: row["low"] >= worth, sorted(rows, key=lambda row: row["FFN width"])))
    worst = max(row["worst"] for row in found["predicted-speedup"]["worst"])
    lines = [table(shown)]
    if felt:
        lines.append(
            f"**The crossover is {felt[-1]['parameters left']:.0%} of the parameters**: this cut, which leaves "
            f"{felt[-1]['FFN width'] / whole:.0%} of the FFN's width, and all larger ones are surely "
            f"{worth - 1:.0%} faster."
        )
    else:
        lines.append(f"**No cut measured here is surely {worth - 1:.0%} faster.**")
    odd = next((row for row in rows if row["FFN width"] % 2), None)
    if odd is not None and odd["high"] < 1:
        lines.append(f"A width that suits no kernel ({odd['FFN width']:,}) is slower than the parent.")
    lines.append(
        f"A speed-up that a table predicts is up to {worst:.1%} off the one that is measured "
        f"([benchmarks](benchmarks.md)): one below {1 + worst:.2f} is not told from none."
    )
    return "\n\n".join(lines)


def zeros(rows: Sequence[Mapping[str, Any]], hidden: int, found: Found) -> str:
    """Speed of a layer with zeros, and from which share on a sparse kernel is faster than the dense one."""
    dense = {row["zeros"]: row for row in rows if row["served as"].startswith("dense")}
    sparse = {row["zeros"]: row for row in rows if row["served as"].startswith("sparse")}
    shown = [
        {"zeros": f"{share:.0%}", "dense matrix with zeros in it": _times(dense[share]),
         "sparse matrix (CSR)": _times(sparse[share])}
        for share in dense
    ]  # fmt: skip
    lines = [f"A linear layer of {hidden} by {4 * hidden:,} with zeros, over the same layer without:", table(shown)]
    faster = [share for share in sparse if sparse[share]["low"] > 1]
    half = next(row for row in found["sqft-banking77"]["summary"] if row["method"].startswith("SparsePEFT"))
    sentence = (
        f"**The crossover is {min(faster):.0%} zeros** for a sparse kernel"
        if faster
        else f"**A sparse kernel is slower up to {max(sparse):.0%} zeros**"
    )
    lines.append(
        f"{sentence}; zeros in a dense matrix never gain time. What `sparsify_` is measured at is half: "
        f"{half['zeros']:.0%} zeros keep {half['kept']:.1%} of LoRA's accuracy on banking77."
    )
    return "\n\n".join(lines)
