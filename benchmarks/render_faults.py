"""The tables of docs/reliability.md about kills, full disks and evaluations that fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from render import machine, table

Found = Mapping[str, Any]
NAMES = {
    "os.mkdir": "a folder made", "os.rmdir": "a folder removed", "os.remove": "a file removed",
    "os.rename": "a rename", "os.fsync": "fsync", "open": "a file opened", "safetensors": "safetensors",
    "torch.save": "torch.save", "database": "a statement of the database", "sqlite3.connect": "the database opened",
}  # fmt: skip


def parts(found: Found) -> dict[str, str]:
    """What stands between the marks of the page, by their names."""
    faults = found.get("faults")
    if faults is None:
        names = ("kills", "refusals", "evaluations", "fell short", "machine")
        return dict.fromkeys(names, "`benchmarks/faults.py` finds this out; there is no result of it here.")
    return {
        "kills": kills(faults),
        "refusals": refusals(faults),
        "evaluations": evaluations(faults),
        "fell short": fell_short(faults["short"]),
        "machine": machine(faults["environment"]),
    }


def kills(faults: Found) -> str:
    """Kills of each operation."""
    rows = [
        {
            "operation": row["operation"],
            "after a kill it": row["goes_on"],
            "kills": row["kills"],
            "at a moment / call / byte": f"{row['moment']} / {row['call']} / {row['byte']}",
            "same bits": f"{row['equal']} of {row['rounds']}",
            "loads and is wrong": row["loads_and_wrong"],
            "left over": row["leftovers"],
            "did not go on": row["failed"],
            "seconds": round(row["seconds"]),
        }
        for row in faults["kills"]
    ]
    heard = sorted({NAMES.get(name, name) for row in faults["kills"] for name in row["what"]})
    settings = faults["settings"]
    return "\n\n".join(
        [
            f"`python benchmarks/faults.py --points {settings['points']} --seed {settings['seed']} --json "
            "benchmarks/results/faults.json`",
            table(rows),
            f"Calls and bytes were of {', '.join(heard)}.",
        ]
    )


def refusals(faults: Found) -> str:
    """Disks that were full and folders that were read-only."""
    rows = [
        {
            "operation": row["operation"],
            "files limited": row["limit"],
            "disk full": row["tmpfs"],
            "read-only": row["read-only"],
            "ElasticError of one line": f"{row['one_line']} of {row['limit'] + row['tmpfs'] + row['read-only']}",
            "other errors": ", ".join(f"`{name}`" for name in row["others"]),
            "something harmed": row["wrong"],
            "left over": row["leftovers"],
            "same bits afterwards": row["equal"],
        }
        for row in faults["refusals"]
    ]
    why_not = faults["settings"]["no mounts"]
    return "\n\n".join([*([f"No disk was full here: {why_not}."] if why_not else []), table(rows)])


def evaluations(faults: Found) -> str:
    """Searches of which one evaluation failed."""
    rows = [
        {
            "one evaluation": row["fault"],
            "failed": f"{row['failed']} of {row['evaluations']}",
            "that one alone": row["that_one_alone"],
            "the others as without": row["others_equal"],
            "cause in the result": f"`{_short(row['cause'])}`",
        }
        for row in faults["evaluations"]
    ]
    return table(rows)


def _short(cause: str, *, most: int = 90) -> str:
    return cause.strip() if len(cause) <= most else cause[: most - 3] + "..."


def fell_short(lines: list[str]) -> str:
    """What the run that the tables are of did not keep, one line each."""
    if not lines:
        return "In this run: nothing."
    plain = [line.replace("'/work/", "'").replace("`", "") for line in lines]  # places in the harness's own folder
    shown = "\n".join(f"* `{_short(line, most=170)}`" for line in plain)
    return f"In this run:\n\n{shown}"
