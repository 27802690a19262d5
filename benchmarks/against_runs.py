"""Part ``sizes`` of ``run.py``: several sizes from one run against a dedicated run for each.

One ``compress --recipe fast`` and one ``family`` of it, against one ``compress --recipe fast`` per size, each at the
speed-up that is asked for, on the same encoder and text. Errors are those of cosines of STS-B pairs against the
parent's; the aim is to cost at most 1.3 runs, and to keep within 1 % of what each dedicated run keeps of the parent's
STS-B.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from against_cuts import TOLERANCE, data_file, parent_folder
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

    No bar where the clock finds them not alike: a slower child would keep more.
    """
    tokenizer = AutoTokenizer.from_pretrained(parent)
    rows: list[dict[str, Any]] = [json.loads(row) for row in pairs.read_text(encoding="utf-8").splitlines()]
    scores = np.array([row["score"] for row in rows])

    found, generator = [], np.random.default_rng(0)
    for speedup in SPEEDUPS:
        folders = {"ours": work / "one.family" / f"{speedup}x", "alone": work / f"alone-{speedup}"}
        times = measure_folders(
            {"parent": Path(parent), **folders}, batch_size=16, length=128, threads=options.threads,
            seconds=options.seconds,
        )  # fmt: skip
        speeds = [typical(times["parent"].samples) / typical(times[name].samples) for name in folders]
        alike = speeds[0] >= TOLERANCE * speeds[1]
        both = [cosines(opened(folder), tokenizer, rows) for folder in folders.values()]
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
                PART, f"{speedup}x of the family", "a dedicated run", "Spearman on STS-B", ours=ours, theirs=theirs,
                **{**judged(ratio, bar), "met": met},
                note=f"{speeds[0]:.2f}x and {speeds[1]:.2f}x measured"
                + ("" if alike else "; ours is slower, so not judged"),
            )
        )  # fmt: skip
    return found
