"""Part ``sizes`` of ``run.py``: several sizes from one run against a dedicated run for each.

One ``compress --recipe fast`` and one ``family`` of it, against one ``compress --recipe fast`` per size, each at the
speed-up that is asked for, on the same encoder and text: what both cost, the aim is at most 1.3 runs. A model that
turns out slower keeps more, so quality is compared at equal measured speed: the family is asked again, as
``hf-elastic family`` says it should where a speed is missed, until the clock finds its model as fast as the dedicated
one. The aim is to keep at least 99 % of what that one keeps of STS-B.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from against_cuts import ALIKE, ATTEMPTS, TOLERANCE, data_file, parent_folder
from comparing import Line, line, silent
from measuring import Bar, Interval, judged
from runtimes import cosines, opened
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from hf_elastic import CompressOptions, compress
from hf_elastic.pipeline import export_family
from hf_elastic.runtimes import measure_folders
from hf_elastic.tables.timing import typical

PART = "sizes"
SPEEDUPS = ("1.25", "1.5", "2")
SETTING = "16x128"
COST, KEPT = Bar("at most", 1.3), Bar("at least", 0.99)


def lines(options: argparse.Namespace) -> list[Line]:
    """The cost of all sizes in runs, and what each keeps.

    Raises:
        Missing: the encoder or the data is not here.
    """
    parent, work = parent_folder(options), Path(options.work) / PART
    text, pairs = data_file(options, "wikitext2", "valid.txt"), data_file(options, "glue", "stsb_dev.jsonl")
    shutil.rmtree(work, ignore_errors=True)  # a run that goes on would take no time
    work.mkdir(parents=True)

    def run(name: str, speedup: str) -> float:
        began = time.perf_counter()
        compress(
            CompressOptions(parent, (str(text),), str(work / name), speedup=f"{speedup}@{SETTING}", recipe="fast"),
            say=silent,
        )  # fmt: skip
        return time.perf_counter() - began

    one = run("one", SPEEDUPS[-1])  # first, so that what is cold is ours
    began = time.perf_counter()
    export_family(work / "one.run", [f"{speedup}@{SETTING}" for speedup in SPEEDUPS], say=silent)
    family = time.perf_counter() - began
    alone = {speedup: run(f"alone-{speedup}", speedup) for speedup in SPEEDUPS}
    found = []
    for speedup, spent in alone.items():
        ratio = (one + family) / spent
        found.append(
            line(
                PART, f"one run and its family of {len(SPEEDUPS)}", f"a dedicated run for {speedup}x", "seconds",
                ours=one + family, theirs=spent, **judged(Interval(ratio, ratio, ratio, 1), COST),
                note=f"the run {one:.0f} s, its family {family:.0f} s",
            )
        )  # fmt: skip
    return found + kept(parent, pairs, work, options)


def kept(parent: str, pairs: Path, work: Path, options: argparse.Namespace) -> list[Line]:
    """STS-B of each size of the family over that of the dedicated run, pairs of sentences drawn again.

    No bar where the clock does not find them alike.
    """
    tokenizer = AutoTokenizer.from_pretrained(parent)
    rows: list[dict[str, Any]] = [json.loads(row) for row in pairs.read_text(encoding="utf-8").splitlines()]
    scores = np.array([row["score"] for row in rows])

    found, generator = [], np.random.default_rng(0)
    for speedup in SPEEDUPS:
        alone = work / f"alone-{speedup}"
        mine, speeds, alike = as_fast_as(Path(parent), alone, options, run=work / "one.run", asked=float(speedup))
        both = [cosines(opened(folder), tokenizer, rows) for folder in (mine, alone)]
        drawn = [generator.integers(0, len(rows), size=len(rows)) for _ in range(1000)]
        ratios = [
            float(spearmanr(both[0][d], scores[d]).statistic / spearmanr(both[1][d], scores[d]).statistic)
            for d in drawn
        ]  # fmt: skip
        ours, theirs = (float(spearmanr(values, scores).statistic) for values in both)
        low, high = (float(v) for v in np.quantile(ratios, [0.025, 0.975]))
        ratio = Interval(ours / theirs, low, high, len(rows))
        bar = KEPT if alike else None
        # Its median, not only the end of its interval, has to reach the bar.
        met = "" if bar is None else ("yes" if ratio.median >= bar.value else "NO")
        found.append(
            line(
                PART, f"a size of the family, as fast ({speeds[1]:.2f}x)", f"a dedicated run for {speedup}x",
                "Spearman on STS-B", ours=ours, theirs=theirs,
                **{**judged(ratio, bar), "met": met},
                note=f"{speeds[0]:.2f}x and {speeds[1]:.2f}x measured"
                + ("" if alike else f"; not equally fast after {ATTEMPTS} attempts, so not judged"),
            )
        )  # fmt: skip
    return found


def as_fast_as(
    parent: Path, theirs: Path, options: argparse.Namespace, *, run: Path, asked: float
) -> tuple[Path, tuple[float, float], bool]:
    """A model of the family at the measured speed of another, the speed-ups of both, and whether these are alike."""
    for attempt in range(ATTEMPTS):
        output = run.with_name(f"{theirs.name}-family-{attempt}")
        (size,) = export_family(run, [f"{asked:.2f}@{SETTING}"], output=output, say=silent).sizes
        mine = output / size.name
        times = measure_folders(
            {"parent": parent, "ours": mine, "theirs": theirs}, batch_size=16, length=128, threads=options.threads,
            seconds=options.seconds,
        )  # fmt: skip
        whole = typical(times["parent"].samples)
        speeds = whole / typical(times["ours"].samples), whole / typical(times["theirs"].samples)
        if TOLERANCE <= speeds[0] / speeds[1] <= ALIKE:
            return mine, speeds, True
        asked = max(1.01, asked * 1.005 * speeds[1] / speeds[0])
    return mine, speeds, False
