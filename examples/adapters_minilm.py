"""Elastic adapters on a real encoder: ranks alone (Mode A) and with a cut base (Mode B) beside fixed-rank LoRA.

    python examples/adapters_minilm.py banking77 [--seeds 0 1 2] [--steps 600] [--json FILE]
    python examples/adapters_minilm.py sst2
    python examples/adapters_minilm.py own --data train.jsonl test.jsonl     # columns text and label

The encoder is all-MiniLM-L6-v2 from the Hub, or what ``--model`` names; the rows come from ``HF_ELASTIC_DATA``. Every
method trains a new classifier and adapters of rank 8 on all linear layers of the encoder, for the same number of steps
on the same rows; fixed-rank LoRA is also trained at the rank of the budget that Mode A keeps. Mode B learns from the
logits of fixed-rank LoRA besides the labels, and trains the subnet that it found further, which together takes twice as
long as LoRA; ``kept`` is the state before or after that, whichever has the lower loss on validation rows. Accuracy is
on test rows that neither training nor search has seen. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_elastic as he
from hf_elastic.pipeline.study import Plan, Study
from hf_elastic.report import aligned

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DATA = Path(os.environ.get("HF_ELASTIC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TASKS = {
    "banking77": {"train": "banking77/train.jsonl", "test": "banking77/test.jsonl", "label": "category"},
    "sst2": {"train": "glue/sst2_train.jsonl", "test": "glue/sst2_dev.jsonl", "text": "sentence"},
    "own": {},
}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
RANK, RANKS, BUDGET = 8, [2, 4, 8], 0.5
MACS = 0.71  # LoNAS-BERT's (its README: 8.0 of 11.2 G)
FURTHER = 0.5  # of the steps
LORA = "fixed-rank LoRA"


def files_of(task: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Files and columns of a task; of ``own`` those of ``--data``, files or names of data sets."""
    if (task == "own") != bool(arguments.data):
        raise SystemExit("--data TRAIN TEST goes with the task own, and the task own needs it")
    if task == "own":
        return dict(zip(("train", "test"), arguments.data, strict=True))
    return {**TASKS[task], **{name: str(DATA / TASKS[task][name]) for name in ("train", "test")}}


def adapters(head: Sequence[str]) -> he.ElasticLoraConfig:
    return he.ElasticLoraConfig(
        r=RANK, lora_alpha=2 * RANK, ranks=RANKS, target_modules=TARGETS, exclude_modules=".*pooler.*",
        modules_to_save=list(head),
    )  # fmt: skip


def mode_a(study: Study, model: PreTrainedModel, head: list[str]) -> he.Supernet:
    return he.add_lora(model, adapters(head), seed=study.plan.seed)


def mode_b(study: Study, model: PreTrainedModel, head: list[str]) -> he.Supernet:
    heads = model.config.num_attention_heads
    space = he.ElasticConfig(
        intermediate_size=[eighths / 8 for eighths in range(1, 8)],
        num_attention_heads=[heads // 2, 2 * heads // 3, 5 * heads // 6],
    )
    study.sorted_(he.make_elastic(model, space))
    return he.add_lora(model, adapters(head), seed=study.plan.seed)


def one_seed(task: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all methods with one seed."""
    plan = Plan(
        model=arguments.model, seed=seed, steps=arguments.steps, evaluations=arguments.evaluations,
        **files_of(task, arguments),
    )  # fmt: skip
    study = Study(plan, Path(arguments.output) / f"{task}-{seed}")
    rows = [*study.fixed(LORA, rank=RANK, targets=TARGETS)]
    rows += study.fixed(f"{LORA} at Mode A's budget", rank=round(BUDGET * RANK), targets=TARGETS)
    rows += study.elastic("Mode A", partial(mode_a, study), within={"adapter_parameters": BUDGET})
    rows += study.elastic(
        "Mode B", partial(mode_b, study), within={"macs": MACS}, near=True, judged_by="loss", teacher=LORA,
        further=FURTHER,
    )  # fmt: skip
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each subnet of each method; accuracy also as a share of fixed-rank LoRA's."""
    lora = {row["seed"]: row["accuracy"] for row in rows if row["method"] == LORA}
    found = []
    for key in dict.fromkeys((row["method"], row["subnet"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["subnet"]) == key]
        shares = [row["accuracy"] / lora[row["seed"]] for row in chosen]
        found.append(
            {
                "method": key[0], "subnet": key[1],
                "accuracy": statistics.fmean(row["accuracy"] for row in chosen),
                "spread": statistics.stdev(row["accuracy"] for row in chosen) if len(chosen) > 1 else 0.0,
                "kept": statistics.fmean(shares),
                "adapter parameters": statistics.fmean(row["adapter_parameters"] for row in chosen),
                "MACs, merged": statistics.fmean(row["macs_share"] for row in chosen),
                "evaluations": max(row.get("evaluations", 0) for row in chosen),
                "seeds": len(chosen),
            }
        )  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "subnet", "accuracy", "of LoRA's", "adapter parameters", "MACs, merged", "evaluations"]]
    for row in rows:
        lines.append(
            [
                row["method"], row["subnet"], f"{row['accuracy']:.2%} +- {row['spread']:.2%}", f"{row['kept']:.1%}",
                f"{row['adapter parameters']:,.0f}", f"{row['MACs, merged']:.0%}", str(row["evaluations"] or ""),
            ]
        )  # fmt: skip
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="rows of the task own: files or data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--output", default="adapters_minilm", help="folder that keeps what was measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    rows = [row for seed in arguments.seeds for row in one_seed(arguments.task, seed, arguments)]
    means = summary(rows)
    print(f"\n{arguments.task}, {len(arguments.seeds)} seeds\n{table(means)}")
    if arguments.json:
        settings = {"task": arguments.task, "steps": arguments.steps, "rank": RANK, "ranks": RANKS, "macs": MACS}
        packages = {name: version(name) for name in ("torch", "transformers", "peft")}
        environment = {**packages, "threads": arguments.threads, "machine": platform.machine()}
        result = {"environment": environment, "settings": settings, "summary": means, "rows": rows}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
