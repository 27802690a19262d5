"""SQFT on a real encoder: a half-sparse MiniLM, adapters kept apart, merged sparse, and merged as 4-bit integers.

    python examples/sqft_minilm.py [banking77 | sst2] [--seeds 0 1 2] [--steps 600] [--json FILE]
    python examples/sqft_minilm.py own --data train.jsonl test.jsonl     # columns text and label

The encoder is all-MiniLM-L6-v2 from the Hub, or what ``--model`` names; the rows come from ``HF_ELASTIC_DATA``. Wanda
sets half of the weights of its layers to zero. On that base are trained, for the same steps on the same rows: a new
classifier alone; with LoRA of rank 8, kept apart; with SparsePEFT, merged (one sparse model); and, after GPTQ, with
QA-SparsePEFT, merged (one model of 4-bit integers with the same zeros). Accuracy is on test rows that training has not
seen, of the merged models themselves. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from adapters_minilm import MODEL, RANK, TARGETS, TASKS, files_of

import hf_elastic as he
from hf_elastic.pipeline.study import Plan, Study
from hf_elastic.report import aligned

LORA = "LoRA, kept apart"
SPARSITY, BITS, BAR = 0.5, 4, 0.99


def config(head: Sequence[str], **kind: bool) -> he.ElasticLoraConfig:
    return he.ElasticLoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, exclude_modules=".*pooler.*", modules_to_save=list(head),
        **kind,
    )  # fmt: skip


def one_seed(task: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all methods with one seed."""
    plan = Plan(model=arguments.model, seed=seed, steps=arguments.steps, sparsity=SPARSITY, **files_of(task, arguments))
    study = Study(plan, Path(arguments.output) / f"{task}-{seed}")
    return [
        *study.head_alone("no adapters"),
        *study.fixed(LORA, rank=RANK, targets=TARGETS),
        *study.merged("SparsePEFT, merged", lambda head: config(head, sparse=True)),
        *study.merged(
            "QA-SparsePEFT, merged", lambda head: config(head, sparse=True, quantization_aware=True), bits=BITS
        ),
    ]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds; accuracy also as a share of LoRA's on the same base."""
    lora = {row["seed"]: row["accuracy"] for row in rows if row["method"] == LORA}
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        found.append(
            {
                "method": method, "accuracy": statistics.fmean(row["accuracy"] for row in chosen),
                "spread": statistics.stdev(row["accuracy"] for row in chosen) if len(chosen) > 1 else 0.0,
                "kept": statistics.fmean(row["accuracy"] / lora[row["seed"]] for row in chosen),
                "zeros": chosen[0].get("zeros"), "bits": chosen[0].get("bits"), "seeds": len(chosen),
            }
        )  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "accuracy", "of LoRA's", "zeros", "bits"]]
    for row in rows:
        zeros = "" if row["zeros"] is None else f"{row['zeros']:.1%}"
        accuracy = f"{row['accuracy']:.2%} +- {row['spread']:.2%}"
        lines.append([row["method"], accuracy, f"{row['kept']:.1%}", zeros, str(row["bits"] or "")])
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS), nargs="?", default="banking77")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="rows of the task own: files or data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", default="sqft_minilm", help="folder that keeps what was measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    rows = [row for seed in arguments.seeds for row in one_seed(arguments.task, seed, arguments)]
    means = summary(rows)
    print(f"\n{arguments.task}, half of the weights zero, {len(arguments.seeds)} seeds\n{table(means)}")
    if arguments.json:
        settings = {"task": arguments.task, "steps": arguments.steps, "rank": RANK, "sparsity": SPARSITY, "bits": BITS}
        packages = {name: version(name) for name in ("torch", "transformers", "peft")}
        environment = {**packages, "threads": arguments.threads, "machine": platform.machine()}
        result = {"environment": environment, "settings": settings, "summary": means, "rows": rows}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
