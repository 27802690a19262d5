"""What a compressed sentence encoder is worth to its users: STS-B against its parent, and the table of its run.

    python benchmarks/minilm.py OUTPUT [OUTPUT ...] --parent FOLDER [--bar SHARE] [--json FILE]

Each ``OUTPUT`` is what ``compress`` wrote, by any recipe; several are runs that differ in their seeds alone, of which
mean and standard deviation are given, and the run's table of the first. STS-B pairs come from the data folder
(``HF_ELASTIC_DATA``, by default ``../shared/data`` beside the repository); they are for judging only, nothing is
trained or chosen on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import environment, print_environment, print_table, write_json
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def sts(model: str, rows: Sequence[dict[str, Any]]) -> float:
    """Spearman correlation of cosine similarities with human scores."""
    encoder = SentenceTransformer(model, device="cpu")
    first, second = (
        encoder.encode([row[name] for row in rows], convert_to_tensor=True, show_progress_bar=False)
        for name in ("sentence1", "sentence2")
    )
    similarities = torch.nn.functional.cosine_similarity(first, second)
    return float(spearmanr(similarities.numpy(), [row["score"] for row in rows]).statistic)


def record_of(output: str) -> dict[str, Any]:
    """Reads what ``compress`` noted about its run.

    Raises:
        SystemExit: there is no such record.
    """
    file = Path(output) / "result.json"
    if not file.is_file():
        sys.exit(f"{output} has no {file.name}: pass folders that compress wrote")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run but for its seed and for where things are; of the text there is a digest."""
    rest = {name: value for name, value in record["options"].items() if name not in ("seed", "output", "data", "model")}
    return {"recipe": "best", **rest}  # older runs knew no other


def architecture_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture of a run: of its search, or, where the recipe has none, of the answer that was repaired."""
    stages = record["stages"]
    stage = stages["search"] if "search" in stages else stages["repair"]
    architecture: dict[str, Any] = stage["architecture"]
    return architecture


def row_of(record: Mapping[str, Any], *, spearman: float, parent: float) -> dict[str, Any]:
    """One output: its quality, its costs as shares of the parent's, and the minutes that its run took."""
    whole, small = record["stages"]["compare"]["rows"][:2]
    spent = sum(stage.get("seconds") or 0.0 for stage in record["stages"].values())
    return {
        "seed": record["options"].get("seed", 0), "spearman": spearman, "kept": spearman / parent,
        "parameters": small["parameters"] / whole["parameters"], "macs": small["macs"] / whole["macs"],
        "speed-up": whole["latency"] / small["latency"], "minutes": spent / 60,
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], *, bar: float | None) -> dict[str, Any]:
    """Mean and standard deviation over the outputs, and whether the mean keeps the bar."""
    kept = [row["kept"] for row in rows]
    mean = statistics.fmean(kept)
    return {
        "outputs": len(rows), "spearman": statistics.fmean(row["spearman"] for row in rows), "kept": mean,
        "spread": statistics.stdev(kept) if len(kept) > 1 else None,
        "bar": None if bar is None else f">= {bar:g}", "met": None if bar is None else mean >= bar,
    }  # fmt: skip


def contents(records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **rest: Any) -> dict[str, Any]:
    """What is written: numbers of all outputs, and the table of the first run."""
    first = records[0]["stages"]
    return {
        **rest,
        "recipe": settings_of(records[0])["recipe"],
        "outputs": list(rows),
        "compared": [{k: v for k, v in row.items() if k != "architecture"} for row in first["compare"]["rows"]],
        "architecture": architecture_of(records[0]),
        "plan": first.get("plan"),
        "seconds": {name: stage.get("seconds") for name, stage in first.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    pairs = Path(options.data) / "glue" / "stsb_dev.jsonl"
    if not pairs.is_file():
        sys.exit(f"no {pairs}: set HF_ELASTIC_DATA to the folder of data")
    records = [record_of(output) for output in options.outputs]
    if any(settings_of(record) != settings_of(records[0]) for record in records):
        sys.exit("the outputs are of runs with different options; pass runs that differ in their seeds alone")
    machine = environment()
    print_environment(machine)
    sentences = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()][: options.pairs]
    parent = sts(options.parent, sentences)
    rows = [
        row_of(record, spearman=sts(output, sentences), parent=parent)
        for output, record in zip(options.outputs, records, strict=True)
    ]
    print_table(rows)
    found = summary(rows, bar=options.bar)
    spread = "" if found["spread"] is None else f" +- {found['spread']:.2%}"
    print(f"parent {parent:.4f}, kept {found['kept']:.2%}{spread} of it by {len(rows)} outputs")
    scores = [{"model": "parent", "spearman": parent, "kept": 1.0}]
    scores.append({"model": "small", "spearman": found["spearman"], "kept": found["kept"]})
    write_json(
        options.json,
        contents(records, rows, environment=machine, pairs=len(sentences), stsb=scores, summary=found),
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="+", metavar="OUTPUT", help="folder that compress wrote")
    parser.add_argument("--parent", required=True, help="folder of the parent")
    parser.add_argument("--bar", type=float, help="share of the parent's STS-B that the mean is to keep")
    parser.add_argument("--pairs", type=int, help="how many of the pairs to take; all by default")
    parser.add_argument("--data", default=os.environ.get("HF_ELASTIC_DATA", str(_BESIDE)))
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
