"""Part ``lora`` of ``run.py``: fixed-rank LoRA on a dropped-layers encoder against ours at equal measured speed.

Both children of all-MiniLM-L6-v2 are as fast by the clock (part ``cuts`` makes them); each gets a new classifier for
banking77 and LoRA of rank 8 on all its linear layers, for the same steps on the same rows. Ours is also trained with
elastic ranks, of which a search keeps half of the parameters. Accuracy is on test rows; one ratio per seed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from against_cuts import Encoder, data_file, dropped_layers
from comparing import Line, silent, valued
from measuring import Bar
from transformers import PreTrainedModel

import hf_elastic as he
from hf_elastic.pipeline.study import Plan, Study

PART = "lora"
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
RANK, RANKS = 8, [2, 4, 8]
BETTER = Bar("at least", 1.0)


def lines(options: argparse.Namespace) -> list[Line]:
    """Accuracies of both, and of elastic ranks against fixed ones on the same child.

    Raises:
        Missing: the encoder or the data is not here.
    """
    work = Path(options.work) / PART
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows = {name: str(data_file(options, "banking77", f"{name}.jsonl")) for name in ("train", "test")}
    encoder = Encoder(options, work)
    _, theirs, _ = dropped_layers(encoder)[1]  # two layers
    mine, speeds, alike = encoder.as_fast_as(theirs)
    accuracies: dict[str, list[float]] = {"theirs": [], "ours": [], "elastic": []}
    for seed in range(options.seeds):
        for name, folder in (("theirs", theirs.folder), ("ours", mine.folder)):
            plan = Plan(model=str(folder), seed=seed, steps=options.steps, evaluations=40, label="category", **rows)
            study = Study(plan, work / f"{name}-{seed}", say=silent)
            accuracies[name].append(study.fixed("LoRA", rank=RANK, targets=TARGETS)[0]["accuracy"])
        found = study.elastic("elastic", _elastic(seed), within={"adapter_parameters": 0.5}, judged_by="loss")
        accuracies["elastic"] += [row["accuracy"] for row in found if row["subnet"] == "found"]
    note = f"{speeds[0]:.2f}x and {speeds[1]:.2f}x measured; {options.steps} steps each"
    note += "" if alike else "; not equally fast, so not judged"
    child = "our child, fixed-rank LoRA"
    return [
        valued(
            (PART, child, "last 2 of 6 layers dropped, fixed-rank LoRA", "accuracy on banking77"), accuracies["ours"],
            accuracies["theirs"], bar=BETTER if alike else None, note=note,
        ),
        valued(
            (PART, "our child, elastic LoRA, half of the parameters", child, "accuracy on banking77"),
            accuracies["elastic"], accuracies["ours"], bar=Bar("at least", 0.995),
            note="merged, both are the same model: equal speed by construction",
        ),
    ]  # fmt: skip


def _elastic(seed: int):  # type: ignore[no-untyped-def]
    def make(model: PreTrainedModel, head: Sequence[str]) -> he.Supernet:
        config = he.ElasticLoraConfig(
            r=RANK, lora_alpha=2 * RANK, ranks=RANKS, target_modules=TARGETS, exclude_modules=".*pooler.*",
            modules_to_save=list(head),
        )  # fmt: skip
        return he.add_lora(model, config, seed=seed)

    return make
