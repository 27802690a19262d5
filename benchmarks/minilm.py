"""What a compressed sentence encoder is worth to its users: STS-B against its parent, and the table of its run.

    python benchmarks/minilm.py OUTPUT --parent FOLDER [--json FILE]

``OUTPUT`` is what ``compress`` wrote. STS-B pairs come from the data folder (``HF_ELASTIC_DATA``, by default
``../shared/data`` beside the repository); they are for judging only, nothing is trained or chosen on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder that compress wrote")
    parser.add_argument("--parent", required=True, help="folder of the parent")
    parser.add_argument("--data", default=os.environ.get("HF_ELASTIC_DATA", str(_BESIDE)))
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    pairs = Path(options.data) / "glue" / "stsb_dev.jsonl"
    if not pairs.is_file():
        sys.exit(f"no {pairs}: set HF_ELASTIC_DATA to the folder of data")
    machine = environment()
    print_environment(machine)
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    record = json.loads((Path(options.output) / "result.json").read_text(encoding="utf-8"))
    parent, small = sts(options.parent, rows), sts(options.output, rows)
    table = [
        {"model": name, "spearman": value, "kept": value / parent}
        for name, value in (("parent", parent), ("small", small))
    ]
    print_table(table)
    stages = record["stages"]
    write_json(
        options.json,
        {
            "environment": machine,
            "pairs": len(rows),
            "stsb": table,
            "compared": [{k: v for k, v in row.items() if k != "architecture"} for row in stages["compare"]["rows"]],
            "architecture": stages["search"]["architecture"],
            "plan": stages["plan"],
            "seconds": {name: stage.get("seconds") for name, stage in stages.items()},
        },
    )


if __name__ == "__main__":
    main()
