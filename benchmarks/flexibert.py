"""Every proxy on random FlexiBERT models: its rank correlations beside those of the published per-row metrics.

    python benchmarks/flexibert.py [--rows 60] [--output FOLDER] [--threads 1] [--json FILE]

The models are those of ``flexibert_model.py``, by default in the setting in which the published metrics were computed;
one draw of weights a row. Inputs are words of WikiText-2, hashed into the vocabulary (no tokenizer is at hand), or
random ids where there is no text. Proxies of gradients run on two targets: ``sum``, the sum of the last hidden states,
which the published ones differentiate and which is constant behind a LayerNorm, so that its gradients are rounding
noise; and ``signs``, those states times fixed random signs.

The published metrics are of 128 x 512 tokens (batch and length; OpenWebText). Two of their columns are not what their
names say: ``Jacobian Score Normalized`` is the cosine score and ``Jacobian Score`` another one; ``Activation Distance``
counts each tensor once per layer of all models built before in the same session, because the activation function is one
object that all of them share and that kept the hooks. ``Activation Distance, once`` takes that back.

With ``--output`` every finished row is a line of ``rows.jsonl`` there, and a run that ended early goes on; rows come in
a fixed random order, so that more of them continue fewer.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from flexibert_model import POSITIONS, VOCABULARY, model_of, roles_of_flexibert
from measuring import CLOCKS, print_table, started, write_json
from stories import add_data_argument
from torch import Tensor
from tqdm import tqdm

from hf_elastic.errors import ElasticError
from hf_elastic.proxies import PROXIES, Correlation, Setting, correlation, read_flexibert, score

TARGETS = ("sum", "signs")
OF_GRADIENTS = (
    "fisher", "grad_norm", "snip", "grasp", "jacobian_cosine", "synaptic_saliency", "synaptic_diversity",
    "head_importance", "eznas",
)  # fmt: skip
"""Proxies that the target makes a difference to."""
ONCE = "Activation Distance, once"
PUBLISHED: dict[str, tuple[str, ...]] = {
    "params": ("Number of Parameters",),
    "synaptic_diversity": ("Synaptic Diversity",),
    "synaptic_saliency": ("Synaptic Saliency",),
    "head_importance": ("Head Importance",),
    "jacobian_cosine": ("Jacobian Score Normalized",),
    "attention_confidence": ("Head Confidence",),
    "softmax_confidence": ("Head Softmax Confidence",),
    "activation_distance": ("Activation Distance", ONCE),
}
"""Columns of the file that correspond to a proxy."""

Row = dict[str, Any]


class Rows:
    """Lines of finished rows by their ids; with a folder kept there, below a line of the settings.

    Raises:
        SystemExit: the folder is of a run with other settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.file = None if folder is None else folder / "rows.jsonl"
        self.found: dict[int, Row] = {}
        if self.file is None:
            return
        if self.file.exists():
            # What ends without a line break was being written when the run was stopped.
            lines = [
                line for line in self.file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
            ]
            before, *rows = [json.loads(line) for line in lines] or [settings]
            if before != settings:
                raise SystemExit(
                    f"{self.file} is of a run with other settings: {json.dumps(before)}; give another folder"
                )
            self.found = {row["id"]: row for row in rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = [settings, *self.found.values()]
        self.file.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self.found[row["id"]] = row
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")


def inputs(text: Path, *, batch: int, length: int) -> dict[str, Tensor]:
    """Token ids ``(B, T)``, none the padding's 0: hashed words of a text, or random if there is no such text."""
    if text.is_file():
        words = text.read_text(encoding="utf-8").split()
        ids = torch.tensor([1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words])
        ids = ids.repeat(-(-batch * length // len(ids)))[: batch * length]
    else:
        ids = torch.randint(1, VOCABULARY, (batch * length,), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.view(batch, length)}


def measurements(names: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Proxies and targets; an empty one where it makes no difference."""
    for name in names:
        yield from ((name, target) for target in (targets if name in OF_GRADIENTS else ("",)))


def measured(row: Row, batch: Mapping[str, Tensor], options: argparse.Namespace) -> Row:
    """All scores of a row and the seconds that each took; what cannot be scored says why."""
    model = model_of(row, setting=options.setting, seed=1_000_003 * options.seed + row["id"])
    roles, clock = roles_of_flexibert(model), CLOCKS[options.clock]
    found: Row = {"id": row["id"], "scores": {}, "seconds": {}, "failed": {}}
    for name, target in measurements(options.proxies, options.targets):
        key, began = f"{name}/{target}", clock()
        try:
            found["scores"][key] = score(model, name, batch, target=target or "auto", roles=roles)
        except ElasticError as error:
            found["failed"][key] = str(error)
        found["seconds"][key] = clock() - began
    return found


def published_columns(rows: Sequence[Row], published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The file's columns, and the activation distance with each tensor once."""
    columns = dict(published)
    if "Activation Distance Normalized" in columns:
        tensors = [sum(layer["num_feed_forward"] for layer in row["encoder_layers"]) for row in rows]
        columns[ONCE] = columns["Activation Distance Normalized"] * np.array(tensors)
    return columns


def table(
    found: Mapping[int, Row], truth: Mapping[int, float], columns: Mapping[str, Mapping[int, float]]
) -> list[Row]:
    """One line a proxy, target and published column, over the rows that have a score.

    Args:
        found: finished rows by their ids.
        truth: GLUE by id.
        columns: published metrics, each by id.
    """
    lines = []
    for key in next(iter(found.values()))["seconds"]:
        ids = [number for number, row in found.items() if key in row["scores"]]
        ours, glue = np.array([found[number]["scores"][key] for number in ids]), [truth[number] for number in ids]
        ranked = _ranked(ours, glue)
        name, target = key.split("/")
        line = {
            "proxy": name, "target": target, "rows": len(ids), "Spearman": ranked.spearman if ranked else "",
            "95 %": "{:.2f} to {:.2f}".format(*ranked.spearman_interval) if ranked else "",
            "Kendall": ranked.kendall if ranked else "",
            "seconds": float(np.median([row["seconds"][key] for row in found.values()])),
        }  # fmt: skip
        for column in [c for c in PUBLISHED.get(name, ()) if c in columns] or [""]:
            theirs = np.array([columns[column][number] for number in ids]) if column else None
            lines.append({**line, "published": column, **_beside(ours, theirs, glue)})
    return lines


def _beside(ours: np.ndarray, theirs: np.ndarray | None, glue: Sequence[float]) -> Row:
    """How a published column ranks, how alike the two rank, and the median of their quotient."""
    alone, both = (None, None) if theirs is None else (_ranked(theirs, glue), _ranked(ours, theirs))
    return {
        "its Spearman": alone.spearman if alone else "", "its Kendall": alone.kendall if alone else "",
        "ours with it": both.spearman if both else "",
        "ours / it": float(np.median(ours / theirs)) if theirs is not None and len(ours) else "",
    }  # fmt: skip


def _ranked(scores: Sequence[float] | np.ndarray, truth: Sequence[float] | np.ndarray) -> Correlation | None:
    """The correlation, or nothing where there are too few rows or ties only."""
    try:
        return correlation(scores, truth)
    except ElasticError:
        return None


def noise(found: Mapping[int, Row]) -> float | None:
    """Gradients of ``sum`` as a share of those of ``signs``: the median over the rows of the ratio of ``grad_norm``."""
    keys = [f"grad_norm/{target}" for target in TARGETS]
    pairs = [[row["scores"][key] for key in keys] for row in found.values() if set(keys) <= set(row["scores"])]
    return float(np.median([a / b for a, b in pairs])) if pairs else None


def main(given: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(given)
    file, text = options.data / "flexibert" / "flexibert.jsonl", options.data / "wikitext2" / "valid.txt"
    if not file.is_file():
        print(f"nothing measured: there is no {file}; pass --data or set HF_ELASTIC_DATA")
        sys.exit(0)
    machine = started(options.threads)
    benchmark = read_flexibert(file, setting=options.setting)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    batch = inputs(text, batch=options.batch, length=options.length)
    names = ("setting", "proxies", "targets", "batch", "length", "seed", "clock")
    settings = {name: getattr(options, name) for name in names}
    settings["text"] = "WikiText-2, hashed words" if text.is_file() else "random ids"
    done = Rows(options.output, settings)
    order = np.random.default_rng(0).permutation(len(rows))[: options.rows]
    wanted = [rows[number] for number in order]
    for row in tqdm([row for row in wanted if row["id"] not in done.found], unit="row", disable=None):
        done.add(measured(row, batch, options))
    found = {row["id"]: done.found[row["id"]] for row in wanted}
    ids = [row["id"] for row in rows]
    columns = published_columns(rows, benchmark.published)
    by_id = {name: dict(zip(ids, map(float, values), strict=True)) for name, values in columns.items()}
    lines = table(found, dict(zip(ids, map(float, benchmark.truth), strict=True)), by_id)
    print_table(lines)
    failed = sorted({message for row in found.values() for message in row["failed"].values()})
    write_json(options.json, {
        "environment": machine, "settings": settings, "architectures": len(found), "of": len(rows), "rows": lines,
        "noise": noise(found), "failed": failed,
    })  # fmt: skip


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--rows", type=int, help="how many rows; by default all")
    parser.add_argument("--setting", choices=get_args(Setting), default="published")
    parser.add_argument("--proxies", nargs="+", choices=list(PROXIES), default=list(PROXIES), metavar="NAME")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help=f"tokens of a sequence, at most {POSITIONS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--output", type=Path, help="folder for finished rows, with which a run can go on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where others use the machine too")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args(given)
    if not 1 <= options.length <= POSITIONS or options.batch < 1 or (options.rows is not None and options.rows < 1):
        parser.error(f"--batch and --rows are at least 1, --length from 1 to {POSITIONS}")
    return options


if __name__ == "__main__":
    main()
