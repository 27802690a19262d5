"""The table of hostile input in docs/reliability.md, from benchmarks/results/fuzz.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from render import machine, table

NAMES = {
    "exception": "other exceptions", "message": "messages of several lines", "memory": "over memory",
    "time": "over time",
    "write": "writes outside", "code": "code run", "asked": "asked to run code", "pickle": "pickles read",
}  # fmt: skip


def parts(found: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page, by their names."""
    if "fuzz" not in found:
        return dict.fromkeys(
            ("fuzz", "fuzz findings"), "`benchmarks/fuzz.py` finds this out; there is no result of it here."
        )
    result = found["fuzz"]
    return {"fuzz": _cases(result), "fuzz findings": _findings(result["findings"])}


def _cases(result: Mapping[str, Any]) -> str:
    rows, settings = result["rows"], result["settings"]
    columns = ("cases", "accepted", "refused", *NAMES)
    whole = {"target": "**all**", **{name: sum(row[name] for row in rows) for name in columns}}
    lines = [
        {
            "target": row["target"], "cases": row["cases"], "accepted": row["accepted"],
            "refused by `ElasticError`": row["refused"],
            **{shown: row[name] for name, shown in NAMES.items()},
        }
        for row in (*rows, whole)
    ]  # fmt: skip
    command = f"python benchmarks/fuzz.py --cases {settings['cases']} --seed {settings['seed']}"
    return "\n\n".join(
        [
            f"`{command} --json benchmarks/results/fuzz.json`, {sum(row['seconds'] for row in rows) / 60:.0f} minutes:",
            table(lines),
            machine(result["environment"]),
        ]
    )


def _findings(findings: list[Mapping[str, Any]]) -> str:
    if not findings:
        return "Nothing in this run."
    lines = [
        {
            "target": row["target"], "what": NAMES[row["kind"]], "times": row["times"], "first case": row["case"],
            "said": f"`{_cell(row['what'])}`",
        }
        for row in findings
    ]  # fmt: skip
    return table(lines)


def _cell(text: str) -> str:
    """A message inside a cell of a table."""
    return " ".join(text[:150].split()).replace("|", "/").replace("`", "'")
