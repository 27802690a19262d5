"""What kills, full disks, folders that are read-only and failing evaluations do to every operation.

    python benchmarks/faults.py --points 12 --json benchmarks/results/faults.json

Tiny models on the CPU; nothing is timed, so other work may run beside it. The harness is that of ``tests/faults``: each
operation runs to the end once, then is killed at as many random points as asked for, looked at, started again and
compared. With ``--operations``, what the file has of others is kept. ``docs/reliability.md`` shows the result.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import killing
import refusing
from evaluating import FAULTS, evaluated
from measuring import environment
from operations import OPERATIONS


def say(text: str) -> None:
    print(text, flush=True)


def measured(names: Sequence[str], folder: Path, *, points: int, refusals: int, seed: int) -> dict[str, Any]:
    """Kills and refusals of each operation, and searches of which one evaluation fails.

    Args:
        names: of the operations.
        folder: where they work.
        points: kills of each.
        refusals: writes of each that a limit or a full disk refuses; and once a folder that is read-only.
        seed: of all points.
    """
    kills, refused, short = [], [], []
    why_not = refusing.why_no_mounts()
    kinds = [kind for kind in ("limit", "tmpfs") if why_not is None or kind == "limit"]
    asked = [(kinds[number % len(kinds)], number) for number in range(refusals)]
    asked += [] if why_not else [("read-only", 0)]
    for name in names:
        harness = killing.Harness(name, folder / name.replace(" ", "-"), seed=seed)
        rounds = killing.killed(harness, points=points, say=say)
        kills.append(killing.summary(name, rounds, harness=harness))
        short += [killing.told(one) for one in rounds if one.short]
        found = [refusing.refused(harness, kind, number) for kind, number in asked]
        for one in found:
            say(refusing.told(one))
        refused.append(refusing.summary(name, found))
        short += [refusing.told(one) for one in found if refusing.short(one)]
    rows = []
    for name in FAULTS:
        rows.append(evaluated(name))
        say(str(rows[-1]))
    settings = {"points": points, "refusals": refusals, "seed": seed, "no mounts": why_not}
    return {
        "settings": settings, "kills": kills, "refusals": refused, "evaluations": rows,
        "short": [text.replace(str(folder), "") for text in short], "environment": environment(),
    }  # fmt: skip


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new result, with the lines about operations that it has not taken from an old one of the same settings."""
    names = {row["operation"] for row in new["kills"]}
    if old["settings"] != new["settings"] or names == set(OPERATIONS):
        return new
    kept = {
        part: sorted(
            [*new[part], *(row for row in old[part] if row["operation"] not in names)],
            key=lambda row: list(OPERATIONS).index(row["operation"]),
        )
        for part in ("kills", "refusals")
    }
    short = [*new["short"], *(line for line in old["short"] if line.split(":")[0] not in names)]
    return {**new, **kept, "short": short}


def main(words: Sequence[str] | None = None) -> None:
    parser = killing.arguments(__doc__)
    parser.add_argument("--refusals", type=int, default=6, help="full disks of each operation")
    given = parser.parse_args(words)
    killing.quiet()
    with tempfile.TemporaryDirectory(prefix="hf-elastic-faults-") as folder:
        found = measured(
            given.operations, Path(folder), points=given.points, refusals=given.refusals, seed=given.seed
        )  # fmt: skip
    if given.json is not None and given.json.exists():
        found = joined(json.loads(given.json.read_text(encoding="utf-8")), found)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
