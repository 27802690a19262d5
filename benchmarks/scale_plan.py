"""Plans a search over a model of 70B parameters with 1,000 workers, and writes the tables of docs/scale.md.

    python benchmarks/scale_plan.py

What a worker costs its database is read from ``benchmarks/results/workers.json``; the sizes of the model and what the
hardware is taken to do are the constants below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "results" / "workers.json", HERE.parent / "docs" / "scale.md"

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 80, 8192, 28672, 64, 8, 128_256
WORKERS, EVALUATIONS = 1000, 20_000
TOKENS = 262_144  # of validation text in one evaluation
PEAK, SHARE = 989e12, 0.4  # bf16 FLOP a second of one accelerator of 80 GB, and the part of it that a forward reaches
ACCELERATORS = 2  # of one worker
STORE, LOCAL = 20e9, 3e9  # bytes a second of the shared file system in all, and of one node's own disk
LEASE = 600.0  # seconds; renewed four times as often
IDLE = 10.0  # seconds between two looks of a worker that has nothing left to do
KINDS = {"bf16": 2.0, "INT4, groups of 128": 0.5 + 2.0 / 128}  # bytes per weight


def weights() -> dict[str, float]:
    """Parameters of the model: of its layers, and of its embeddings."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * (HIDDEN // HEADS * KV_HEADS)
    return {"layers": LAYERS * (attention + 3 * HIDDEN * FFN), "embeddings": 2 * VOCABULARY * HIDDEN}


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """A Markdown table of what, how much, and from what that follows."""
    return ["| what | figure | from |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]


def plan(measured: Mapping[str, Any]) -> list[str]:
    """The tables of the page."""
    counted = weights()
    total = sum(counted.values())
    evaluation = 2 * total * TOKENS / (PEAK * SHARE * ACCELERATORS)
    rate = WORKERS / evaluation
    alone, fast = measured["per_evaluation"]["postgresql"], measured["no_sleep"]["postgresql"]
    busy = rate * alone["seconds"]
    here = f"{fast['workers']} workers on {measured['cpus']} CPUs, server included"
    checkpoint, kept = 2 * total, measured["rows"]["bytes_per_evaluation"] * EVALUATIONS
    peak = f"{SHARE:.0%} of {ACCELERATORS} x {PEAK / 1e12:.0f} TFLOP/s"
    held = [
        ("parameters", f"{total / 1e9:.1f} B", f"{LAYERS} layers of {HIDDEN} x {FFN}, {VOCABULARY:,} tokens"),
        *((f"weights of one worker, {kind}", size(total * each), "whole supernet; a subnet is a view of it")
          for kind, each in KINDS.items()),
        ("what the search itself holds", "a few MB a worker", "space, finished evaluations, one study in memory"),
        ("training the supernet", size(16 * total), "bf16 weights, gradients; fp32 copy, two moments; over all ranks"),
    ]  # fmt: skip
    moved = [
        ("checkpoint to every worker", size(WORKERS * checkpoint), f"{WORKERS} x {size(checkpoint)}"),
        ("from one shared file system", duration(WORKERS * checkpoint / STORE), f"at {size(STORE)} a second in all"),
        ("from each node's own disk", duration(checkpoint / LOCAL), f"at {size(LOCAL)} a second, once it is there"),
        ("an architecture, to or from the database", size(alone["bytes"]), "statements and values of one evaluation"),
        ("left in the database", size(kept), f"{EVALUATIONS:,} evaluations"),
    ]  # fmt: skip
    seen = [
        ("one evaluation", duration(evaluation), f"{TOKENS:,} tokens, {peak}"),
        ("evaluations a second", f"{rate:.1f}", f"{WORKERS} workers"),
        ("the whole search", duration(EVALUATIONS / rate), f"{EVALUATIONS:,} evaluations"),
        ("statements a second", f"{rate * alone['statements']:.0f}", f"{alone['statements']:.1f} an evaluation"),
        ("connections made a second", f"{rate * alone['connections']:.1f}", f"{alone['connections']:.2f} of each"),
        ("connections open at a time", f"{max(1.0, busy):.1f}", f"{1e3 * alone['seconds']:.1f} ms of statements each"),
        ("renewals a second", f"{WORKERS / (LEASE / 4):.1f}", f"a lease of {LEASE:.0f} s, renewed at a quarter of it"),
        ("looks a second of workers that wait for the last", f"{WORKERS / IDLE:.0f}", f"every {IDLE:.0f} s"),
        ("claims a second that were reached", f"{fast['evaluations_a_second']:.0f}", here),
    ]  # fmt: skip
    return [
        "### What is held where", "", *table(held), "", "### What is moved", "", *table(moved), "",
        "### What the database sees", "", *table(seen),
    ]  # fmt: skip


def sharing(measured: Mapping[str, Any]) -> list[str]:
    """What sharing a search costs, as measured."""
    lines = ["| database | workers | evaluations | distinct | of linear, first to last | with start and end |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in measured["shared"].items():
        lines.append(
            f"| {name} | {found['workers']} | {found['evaluations']} of {found['seconds_each']:g} s | "
            f"{found['distinct']} | {found['evaluating_over_linear']:.3f} | {found['in_all_over_linear']:.3f} |"
        )
    load = f"load average {measured['load_before']:.1f} before and {measured['load_after']:.1f} after"
    return [*lines, "", f"PostgreSQL {measured['postgresql']}, {measured['cpus']} CPUs, {load}."]


def filled(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with what stands between the marks of ``name`` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no {start} ... {end}")
    return f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{after}"


def main() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    page = filled(PAGE.read_text(encoding="utf-8"), "plan", plan(measured))
    PAGE.write_text(filled(page, "sharing", sharing(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
