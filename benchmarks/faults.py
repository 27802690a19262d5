"""What kills, full disks, folders that are read-only and failing evaluations do to every operation.

    python benchmarks/faults.py --points 18 --json benchmarks/results/faults.json

Tiny models on the CPU; nothing is timed, so other work may run beside it. The harness is that of ``tests/faults``: each
operation runs to the end once, then is killed at as many random points as asked for, looked at, started again and
compared. The file is written behind each operation; with ``--operations``, what it has of others is kept, as long as
the other options are the same. ``docs/reliability.md`` shows the result.
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

Found = dict[str, Any]
Settings = dict[str, Any]


def say(text: str) -> None:
    print(text, flush=True)


def measured(name: str, folder: Path, settings: Settings) -> Found:
    """Kills and refusals of an operation: a line of each table, and what fell short.

    Args:
        name: of the operation.
        folder: where it works.
        settings: ``points``: kills; ``refusals``: writes that a limit or a full disk refuses, and once a folder that
            is read-only; ``seed`` of all points; ``no mounts``: why no disk can be full, if so.
    """
    mounts = settings["no mounts"] is None
    kinds = ["limit", "tmpfs"] if mounts else ["limit"]
    asked = [(kinds[number % len(kinds)], number) for number in range(settings["refusals"])]
    asked += [("read-only", 0)] if mounts else []
    harness = killing.Harness(name, folder, seed=settings["seed"])
    rounds = killing.killed(harness, points=settings["points"], say=say)
    found = [refusing.refused(harness, kind, number) for kind, number in asked]
    for one in found:
        say(refusing.told(one))
    short = [killing.told(one) for one in rounds if one.short]
    short += [refusing.told(one) for one in found if refusing.short(one)]
    return {
        "kills": [killing.summary(name, rounds, harness=harness)],
        "refusals": [refusing.summary(name, found)],
        "short": [text.replace(str(folder), "") for text in short],
    }


def joined(made: Found, found: Found, name: str) -> Found:
    """What was made so far, with new lines about an operation."""
    order = list(OPERATIONS)
    kept = {
        part: sorted(
            [*found[part], *(row for row in made[part] if row["operation"] != name)],
            key=lambda row: order.index(row["operation"]),
        )
        for part in ("kills", "refusals")
    }
    short = [*found["short"], *(line for line in made["short"] if line.split(":")[0] != name)]
    return {**made, **kept, "short": sorted(short, key=lambda line: order.index(line.split(":")[0]))}


def begun(file: Path | None, settings: Settings) -> Found:
    """What a file has, if it was made with these settings; or else nothing yet."""
    old = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {"settings": None}
    empty: Found = {part: [] for part in ("kills", "refusals", "evaluations", "short")}
    return {**(old if old["settings"] == settings else empty), "settings": settings, "environment": environment()}


def main(words: Sequence[str] | None = None) -> None:
    parser = killing.arguments(__doc__)
    parser.add_argument("--refusals", type=int, default=6, help="full disks of each operation")
    given = parser.parse_args(words)
    killing.quiet()
    settings: Settings = {
        "points": given.points, "refusals": given.refusals, "seed": given.seed, "no mounts": refusing.why_no_mounts()
    }  # fmt: skip
    made = begun(given.json, settings)

    def write() -> None:
        if given.json is not None:
            given.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    for name in given.operations:
        with tempfile.TemporaryDirectory(prefix="hf-elastic-faults-") as folder:
            made = joined(made, measured(name, Path(folder) / name.replace(" ", "-"), settings), name)
        write()
    made["evaluations"] = []
    for name in FAULTS:  # last, as all before are forks of this process
        made["evaluations"].append(evaluated(name))
        say(str(made["evaluations"][-1]))
    write()


if __name__ == "__main__":
    main()
