"""Part ``sizes`` of ``run.py``: several sizes from one run against a dedicated run for each.

One ``compress --recipe fast`` and one ``family`` of it, against one ``compress --recipe fast`` per size, each at the
speed-up that is asked for, on the same encoder and text. Errors are those of cosines of STS-B pairs against the
parent's; the aim is to cost at most 1.3 runs, and to keep within 1 % of what each dedicated run keeps of the parent's
STS-B.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from against_cuts import Missing, data_file, parent_folder
from comparing import Line, line
from measuring import Bar

from hf_elastic import CompressOptions, compress
from hf_elastic.pipeline import export_family

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
            say=_silent,
        )  # fmt: skip
        return time.perf_counter() - began

    alone = {speedup: run(f"alone-{speedup}", speedup) for speedup in SPEEDUPS}
    one = run("one", SPEEDUPS[-1])
    began = time.perf_counter()
    export_family(work / "one.run", [f"{speedup}@{SETTING}" for speedup in SPEEDUPS], say=_silent)
    family = time.perf_counter() - began
    ratios = [(one + family) / spent for spent in alone.values()]
    middle = float(np.median(list(alone.values())))
    low, high = min(ratios), max(ratios)
    met = "yes" if float(np.median(ratios)) <= COST.value else "NO"
    note = f"the run {one:.0f} s, its family {family:.0f} s; {len(SPEEDUPS)} dedicated runs {sum(alone.values()):.0f} s"
    found = [
        line(
            PART, f"one run and its family of {len(SPEEDUPS)}", "one dedicated run", "seconds", ours=one + family,
            theirs=middle, ratio=float(np.median(ratios)), low=low, high=high, pairs=len(ratios), bar=str(COST),
            met=met, note=note,
        )
    ]  # fmt: skip
    return found + kept(parent, pairs, work)


def kept(parent: str, pairs: Path, work: Path) -> list[Line]:
    """STS-B of each size of the family over that of the dedicated run, pairs of sentences drawn again."""
    import json

    from runtimes import embedded, opened
    from scipy.stats import spearmanr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parent)
    rows: list[dict[str, Any]] = [json.loads(row) for row in pairs.read_text(encoding="utf-8").splitlines()]
    scores = np.array([row["score"] for row in rows])

    def cosines(folder: Path) -> np.ndarray:
        first, second = (
            embedded(opened(folder), tokenizer, [row[n] for row in rows]) for n in ("sentence1", "sentence2")
        )
        found: np.ndarray = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
        return found

    found, generator = [], np.random.default_rng(0)
    for speedup in SPEEDUPS:
        both = [cosines(work / "one.family" / f"{speedup}x"), cosines(work / f"alone-{speedup}")]
        drawn = [generator.integers(0, len(rows), size=len(rows)) for _ in range(1000)]
        ratios = [
            float(spearmanr(both[0][d], scores[d]).statistic / spearmanr(both[1][d], scores[d]).statistic)
            for d in drawn
        ]  # fmt: skip
        ours, theirs = (float(spearmanr(values, scores).statistic) for values in both)
        low, high = (float(v) for v in np.quantile(ratios, [0.025, 0.975]))
        found.append(
            line(
                PART, f"{speedup}x of the family", "a dedicated run", "Spearman on STS-B", ours=ours, theirs=theirs,
                ratio=ours / theirs, low=low, high=high, pairs=len(rows), bar=str(KEPT),
                met="yes" if ours / theirs >= KEPT.value else "NO",
            )
        )  # fmt: skip
    return found


def _silent(text: str) -> None:
    del text


__all__ = ["Missing", "lines"]
