"""Part ``sizes`` of ``run.py``: several sizes from one run against a dedicated run for each.

One ``compress --recipe fast`` and one ``family`` of it, against one ``compress --recipe fast`` per size, each at the
speed-up that is asked for, on the same encoder and text: what both cost, the aim is at most 1.3 runs. A model that
turns out slower keeps more, so quality is compared at equal measured speed: the whole family is asked for again, as
``hf-elastic family`` says one should where a speed is missed, until the clock has found each size as fast as the
dedicated model, or it is that model; what that takes longer is not in the cost. The aim is to keep at least 99 % of
what that one keeps of STS-B.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from against_cuts import data_file, parent_folder
from comparing import ATTEMPTS, Line, alike, asked_again, line, silent
from measuring import Bar, Interval, judged
from runtimes import cosines, opened
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from hf_elastic import CompressOptions, InfeasibleError, compress
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
    for speedup, size in equally_fast(Path(parent), work, options).items():
        both = [cosines(opened(folder), tokenizer, rows) for folder in (size.folder, work / f"alone-{speedup}")]
        drawn = [generator.integers(0, len(rows), size=len(rows)) for _ in range(1000)]
        ratios = [
            float(spearmanr(both[0][d], scores[d]).statistic / spearmanr(both[1][d], scores[d]).statistic)
            for d in drawn
        ]  # fmt: skip
        ours, theirs = (float(spearmanr(values, scores).statistic) for values in both)
        low, high = (float(v) for v in np.quantile(ratios, [0.025, 0.975]))
        ratio = Interval(ours / theirs, low, high, len(rows))
        bar = KEPT if size.alike else None
        # Its median, not only the end of its interval, has to reach the bar.
        met = "" if bar is None else ("yes" if ratio.median >= bar.value else "NO")
        found.append(
            line(
                PART, f"a size of the family, as fast ({size.theirs:.2f}x)", f"a dedicated run for {speedup}x",
                "Spearman on STS-B", ours=ours, theirs=theirs, **{**judged(ratio, bar), "met": met}, note=size.note,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Size:
    """A size of a family beside the model of a dedicated run.

    Attributes:
        folder: of the size.
        first: speed-up of the size that was first exported for what was asked.
        ours, theirs: speed-ups, timed together.
        attempts: families that were made until then.
        same: whether both have the same weights, byte for byte, and so are as fast whatever the clock says.
    """

    folder: Path
    first: float
    ours: float
    theirs: float
    attempts: int
    same: bool

    @property
    def alike(self) -> bool:
        """Whether both are as fast."""
        return self.same or alike(self.ours, self.theirs)

    @property
    def note(self) -> str:
        """What the line says of speeds."""
        said = f"{self.ours:.2f}x and {self.theirs:.2f}x measured; {self.first:.2f}x as first asked, family "
        if self.same:
            return f"{said}{self.attempts}; the same weights, byte for byte"
        return f"{said}{self.attempts}" + ("" if self.alike else "; not equally fast, so not judged")


def equally_fast(parent: Path, work: Path, options: argparse.Namespace) -> dict[str, Size]:
    """Sizes of a whole family each, which is asked for again until all were as fast as the dedicated models.

    Returns:
        By speed-up the first size that was, or the last one that there is.
    """
    asked = {speedup: float(speedup) for speedup in SPEEDUPS}
    found: dict[str, Size] = {}
    for attempt in range(1, ATTEMPTS + 1):
        output = work / f"family-{attempt}"
        try:
            made = export_family(
                work / "one.run", [f"{value:.2f}@{SETTING}" for value in asked.values()], output=output, say=silent
            )
        except InfeasibleError:  # faster than the space is: what was found before stays
            if not found:
                raise
            break
        mine = dict(zip(SPEEDUPS, (output / size.name for size in made.sizes), strict=True))
        folders = {**mine, **{f"alone {speedup}": work / f"alone-{speedup}" for speedup in SPEEDUPS}, "parent": parent}
        times = measure_folders(
            folders, batch_size=16, length=128, threads=options.threads, seconds=2 * options.seconds
        )
        faster = {name: typical(times["parent"].samples) / typical(own.samples) for name, own in times.items()}
        for speedup, folder in mine.items():
            before = found.get(speedup)
            if before is not None and before.alike:  # found; timed again it would only differ by noise
                continue
            ours, theirs = faster[speedup], faster[f"alone {speedup}"]
            same = weights(folder) == weights(work / f"alone-{speedup}")
            found[speedup] = Size(folder, before.first if before else ours, ours, theirs, attempt, same)
            if not found[speedup].alike:
                asked[speedup] = asked_again(asked[speedup], ours=ours, theirs=theirs)
        if all(size.alike for size in found.values()):
            break
    return found


def weights(folder: Path) -> bytes:
    """The file of a model's weights."""
    return (folder / "model.safetensors").read_bytes()
