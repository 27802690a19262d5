"""Hostile input in the face of everything that reads a file: what is accepted, what is refused, and what must not be.

    python benchmarks/fuzz.py --cases 20000 --seed 0 --json benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --reproduce "adapter folder" 17 --seed 0

Valid inputs are changed in their structure, their sizes, their bytes and their names (tests/fuzz says how), each case a
pure function of (seed, target, number). Cases run in forked children whose memory and time are bounded. Fine is what
returns, and what raises an ``ElasticError`` of one line. Findings are other exceptions, messages of several lines, more
than 512 MiB or 10 s of the processor for a case, files written outside of the output folder, code or processes that a
file started, and pickles that were read. Inputs of findings are kept in ``--failing``. The file is written behind each
target; with ``--target``, what it has of the others is kept, as long as cases and seed are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fuzz"))

from fuzz_running import KINDS, Target, run, shares, summary  # noqa: E402  # found only behind the line above
from fuzz_targets import prepared  # noqa: E402
from fuzz_watching import Verdict  # noqa: E402
from measuring import environment, print_environment, print_table  # noqa: E402


def examples(found: dict[str, list[Verdict]]) -> list[dict[str, Any]]:
    """The first finding of each target, kind and message, with how many there are of them; without folders of here."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, verdicts in found.items():
        for verdict in verdicts:
            for kind, text in verdict.findings.items():
                said = re.sub(r"/\S*?/work/case/", "", text)
                row = {"target": name, "kind": kind, "case": verdict.number, "what": said[:200], "times": 0}
                rows.setdefault((name, kind, said[:60]), row)["times"] += 1
    return list(rows.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; repeatable")
    parser.add_argument("--reproduce", nargs=2, metavar=("TARGET", "NUMBER"), help="one case alone, with its traceback")
    parser.add_argument("--failing", default="runs/fuzz", help="folder for inputs of findings")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as targets:
        if options.reproduce:
            _reproduce(targets, options, Path(folder))
            return
        chosen = [target for target in targets if not options.target or target.name in options.target]
        machine, counts = environment(), shares(targets, options.cases)
        print_environment(machine)
        made = kept(options, [target for target in targets if target not in chosen])
        made["environment"] = machine
        for target in chosen:
            began = time.perf_counter()
            found = run(
                [target], counts, seed=options.seed, folder=Path(folder) / "work",
                failing=Path(options.failing).resolve(), tell=lambda line: print(line, flush=True),
            )  # fmt: skip
            made["rows"] += [{**row, "seconds": round(time.perf_counter() - began)} for row in summary(found)]
            made["findings"] += examples(found)
            in_order(made, targets)
            if options.json:
                Path(options.json).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    names = ("cases", "accepted", "refused", *KINDS, "seconds")
    total = {name: sum(row[name] for row in made["rows"]) for name in names}
    print_table([*made["rows"], {"target": "all", "most MiB": "", "most s": "", **total}])


def kept(options: argparse.Namespace, others: Sequence[Target]) -> dict[str, Any]:
    """What the file has of targets that are not run now, if its cases are of the same number and seed."""
    settings, names = {"cases": options.cases, "seed": options.seed}, {target.name for target in others}
    old: dict[str, Any] = {"settings": None}
    if options.json and Path(options.json).is_file():
        old = json.loads(Path(options.json).read_text(encoding="utf-8"))
    if old["settings"] != settings:
        return {"settings": settings, "rows": [], "findings": []}
    return {**old, **{part: [row for row in old[part] if row["target"] in names] for part in ("rows", "findings")}}


def in_order(made: dict[str, Any], targets: Sequence[Target]) -> None:
    """Puts the lines of targets in the order of these."""
    order = [target.name for target in targets]
    for part in ("rows", "findings"):
        made[part].sort(key=lambda row: order.index(row["target"]))


def _reproduce(targets: Sequence[Target], options: argparse.Namespace, folder: Path) -> None:
    name, number = options.reproduce[0], int(options.reproduce[1])
    target = next(target for target in targets if target.name == name)
    verdict = run(
        [target], {name: number + 1}, seed=options.seed, folder=folder / "work", first=number,
        failing=Path(options.failing).resolve(),
    )[name][0]  # fmt: skip
    print(f"{name} {number}: {verdict.outcome} {verdict.error}\n{verdict.findings}\n{verdict.trace}")


if __name__ == "__main__":
    main()
