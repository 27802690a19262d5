"""Section of docs/benchmarks.md about ``run.py``: everything against its alternatives, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from run import PARTS

Table = Callable[[Sequence[Mapping[str, Any]]], str]

INTRODUCTION = """`python benchmarks/run.py` makes this table. `ratio` is ours over theirs: the median of calls in
turns, or the ratio of mean errors on the same rows, with its 95 % interval. Below 1 ours takes less time or errs less;
where the measure is a speed-up or a score, above 1 it is faster or keeps more. A slope of 1 is linear growth. `n`
counts pairs, rows or repeats. What is missed is marked NO."""
NOT_COMPARED = """Sizes are below. They are smaller than in the sections that follow, which measure the same at 768 and
more. Not compared here, since nothing else does it: QA-SparsePEFT's merge, routers in closed form, head merging,
relational distillation (their qualities stand in their own sections)."""


def run(result: Mapping[str, Any], table: Table) -> list[str]:
    """The section, of all parts that were run."""
    rows = [row(line) for part in result.values() for line in part["lines"]]
    missed = sum(line["met"] == "NO" for part in result.values() for line in part["lines"])
    judged = sum(line["met"] != "" for part in result.values() for line in part["lines"])
    missing = [name for name in PARTS if name not in result]
    machines: dict[str, list[str]] = {}
    for name, part in result.items():
        found = part["machine"]
        words = (
            f"torch {found['torch']}, transformers {found['transformers']}, python {found['python']}, "
            f"{found['threads']} threads of {found['cores']} cores, {found['machine']}"
        )
        machines.setdefault(words, []).append(
            f"{name} ({part['seconds']:.0f} s, load at its start {found['load_average'][0]:.1f})"
        )
    where = [f"Measured with {words}: {', '.join(parts)}." for words, parts in machines.items()]
    sizes = {
        name: ", ".join(f"{key} {value}" for key, value in part["settings"].items()) for name, part in result.items()
    }
    settings = [f"Settings of {', '.join(of)}: {words}." for words, of in _together(sizes).items()]
    return [
        "## Against the alternatives",
        INTRODUCTION,
        NOT_COMPARED,
        *([f"Parts that have not been run: {', '.join(missing)}."] if missing else []),
        f"Of {judged} lines with a bar {judged - missed} meet it.",
        table(rows),
        *settings,
        *where,
    ]


def _together(words: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by what they have in common."""
    found: dict[str, list[str]] = {}
    for name, value in words.items():
        found.setdefault(value, []).append(name)
    return found


def row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as they are shown."""
    spread = f"{line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}]" if line["ratio"] != "" else ""
    return {
        "part": line["part"], "ours": line["what"], "against": line["against"], "measure": line["measure"],
        "value": line["ours"], "theirs": line["theirs"], "ratio": spread, "n": line["pairs"], "bar": line["bar"],
        "met": line["met"], "note": line["note"],
    }  # fmt: skip
