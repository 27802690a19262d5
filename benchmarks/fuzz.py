"""Hostile input in the face of everything that reads a file: what is accepted, what is refused, and what must not be.

    python benchmarks/fuzz.py --cases 20000 --seed 0 --json benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --reproduce "adapter folder" 17 --seed 0

Valid inputs are changed in their structure, their sizes, their bytes and their names (tests/fuzz says how), each case a
pure function of (seed, target, number). Cases run in forked children whose memory and time are bounded. Fine is what
returns, and what raises an ``ElasticError`` of one line. Findings are other exceptions, messages of several lines, more
than 512 MiB or 10 s for a case, files written outside of the output folder, code or processes that a file started, and
pickles that were read. Inputs of findings are kept in ``--failing``.
"""

from __future__ import annotations

import argparse
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
from measuring import environment, print_environment, print_table, write_json  # noqa: E402


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
        machine, began = environment(), time.perf_counter()
        print_environment(machine)
        found = run(
            chosen, shares(chosen, options.cases), seed=options.seed, folder=Path(folder) / "work",
            failing=Path(options.failing).resolve(), tell=lambda line: print(line, flush=True),
        )  # fmt: skip
    rows = summary(found)
    total = {name: sum(row[name] for row in rows) for name in ("cases", "accepted", "refused", *KINDS)}
    print_table([*rows, {"target": "all", **total, "most MiB": "", "most s": ""}])
    settings = {"cases": options.cases, "seed": options.seed, "seconds": round(time.perf_counter() - began)}
    contents = {"settings": settings, "rows": rows, "findings": examples(found), "environment": machine}
    write_json(options.json, contents)


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
