"""What is killed: each operation does its work in a folder by the public API, and goes on where something is there.

An operation is run again in the very same folder after it was killed, with the same arguments, as its user would do it:
trainings resume from the last complete checkpoint, searches from their storage, and the rest simply starts again.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("", "training", "adapters", "pipeline"))

import elm_runs
import tiny_checkpoints
import torch
from grown_run import growing
from killed_compress import PLAN
from killed_run import elastic_trainer
from lora_models import randomise
from tiny_models import tiny
from tiny_models import tokenizer as tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    SchedulerType,
    Trainer,
    TrainingArguments,
)

import hf_elastic as he
from hf_elastic.pipeline import goal, run
from hf_elastic.pipeline.compressed_base import Compression, compress_checkpoint
from hf_elastic.training import CompleteCheckpointCallback

GROWN = "in the middle of an epoch"  # the case of grown_run.py
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 12, "ranks": [2, 4], "target_modules": "all-linear"}


@dataclass(frozen=True)
class Operation:
    """Something to kill.

    Attributes:
        work: does it, from a folder of inputs into a folder.
        inputs: makes the inputs, once.
        start: makes what is in the folder before the first attempt, such as an older result that is replaced.
        goes_on: how the next attempt begins, in words.
        holds: what the finished folder has to load as (names of ``looking.LOADERS``), or looking would show nothing.
    """

    work: Callable[[Path, Path], object]
    inputs: Callable[[Path], object] = lambda inputs: None
    start: Callable[[Path, Path], object] = lambda inputs, folder: None
    goes_on: str = "starts again"
    holds: tuple[str, ...] = ("stock",)


# -- training ----------------------------------------------------------------------------------------------------------


def supernet_training(inputs: Path, folder: Path) -> None:
    trainer = elastic_trainer(str(folder / "run"))
    trainer.args.lr_scheduler_type = SchedulerType.CONSTANT  # at a rate of zero, a step too many would not be seen
    trainer.train(resume_from_checkpoint=he.last_complete_checkpoint(folder / "run"))
    trainer.supernet.save_pretrained(folder / "supernet", overwrite=True)


def growth(inputs: Path, folder: Path) -> None:
    trainer, callback = growing(GROWN, str(folder))
    trainer.args.lr_scheduler_type = SchedulerType.CONSTANT
    trainer.add_callback(CompleteCheckpointCallback())
    trainer.train(resume_from_checkpoint=he.last_complete_checkpoint(folder / GROWN))
    callback.supernet.save_pretrained(folder / "supernet", overwrite=True)


def adapter_training(inputs: Path, folder: Path) -> None:
    supernet = he.add_lora(tiny("llama"), he.ElasticLoraConfig(**LORA, task_type="CAUSAL_LM"), seed=2)
    args = TrainingArguments(
        str(folder / "run"), max_steps=5, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
        lr_scheduler_type="constant", report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    sampling = he.SubnetSamplingCallback(supernet, he.RandomSubnet(seed=5))
    callbacks = [sampling, he.SubnetStatistics(supernet), CompleteCheckpointCallback()]
    trainer = Trainer(supernet.model, args, train_dataset=texts(24), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=he.last_complete_checkpoint(folder / "run"))
    he.extract_adapter(supernet, supernet.space.midpoint()).save_pretrained(folder / "adapter", overwrite=True)


def texts(count: int) -> list[dict[str, Tensor]]:
    """Rows of token ids with themselves as labels."""
    ids = torch.randint(3, 61, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """The same, four rows at a time."""
    rows = texts(4 * count)
    return [{k: torch.stack([row[k] for row in rows[n : n + 4]]) for k in rows[0]} for n in range(0, len(rows), 4)]


# -- search and repair -------------------------------------------------------------------------------------------------


def classifier(inputs: Path) -> None:
    tiny("bert", "sequence").save_pretrained(inputs / "parent")
    tiny_tokenizer().save_pretrained(inputs / "parent")


def elastic_classifier(inputs: Path) -> he.Supernet:
    model = BertForSequenceClassification.from_pretrained(inputs / "parent")
    return he.make_elastic(model, he.ElasticConfig(intermediate_size=[16, 32, 48], num_attention_heads=[1, 2, 4]))


def labelled() -> list[dict[str, Tensor]]:
    return [{**batch, "labels": batch["input_ids"][:, 0] % 3} for batch in batches()]


def search(inputs: Path, folder: Path) -> None:
    supernet = elastic_classifier(inputs)
    objectives = [he.objectives.loss(supernet, labelled()), he.objectives.macs(supernet, seq_len=16)]
    result = he.search_subnets(
        supernet.space, objectives, evaluations=16, seed=3, storage=f"sqlite:///{folder}/search.db", progress=False
    )
    result.save(folder / "result.json")


def refit(inputs: Path, folder: Path) -> None:
    supernet = elastic_classifier(inputs)
    he.sort_by_importance_(supernet, labelled())
    found = supernet.space.midpoint()
    small = he.refit(supernet, found, batches(16))
    he.export(supernet, found, folder / "small", model=small, overwrite=True)


# -- exports -----------------------------------------------------------------------------------------------------------


def export(inputs: Path, folder: Path) -> None:
    """Replaces an older export, which is of another architecture."""
    supernet = elastic_classifier(inputs)
    he.export(supernet, uneven(supernet), folder / "out", overwrite=True)


def uneven(supernet: he.Supernet) -> he.Architecture:
    """An architecture of several widths, which stock classes do not load."""
    return supernet.space.canonical({**supernet.space.largest(), "layers.0.intermediate_size": 16})


def older_export(inputs: Path, folder: Path) -> None:
    supernet = elastic_classifier(inputs)
    he.export(supernet, supernet.space.smallest(), folder / "out")


def language_model(inputs: Path) -> None:
    tiny_checkpoints.language_model(inputs / "parent")
    tiny_checkpoints.write_text(inputs / "text.txt", count=40)


def sparsify(inputs: Path, folder: Path) -> None:
    """As ``hf-elastic sparsify``, which does not write where something is."""
    if not (folder / "sparse").exists():
        options = he.CompressOptions(
            str(inputs / "parent"), (str(inputs / "text.txt"),), str(folder / "sparse"), sequence_length=24,
            batch_size=8, device="cpu",
        )  # fmt: skip
        compress_checkpoint(options, Compression("sparsify", {"method": "wanda", "sparsity": 0.5}), say=silent)


def silent(text: str) -> None:
    """Takes what would be printed."""


def decoder(inputs: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(inputs / "parent")


def quantise(inputs: Path, folder: Path) -> None:
    """Replaces an older checkpoint, which has more bits."""
    model = decoder(inputs)
    he.quantize_(model, batches(), bits=4, group_size=16)
    he.save_quantized(model, folder / "packed", overwrite=True)


def older_integers(inputs: Path, folder: Path) -> None:
    model = decoder(inputs)
    he.quantize_(model, bits=8, group_size=32, method="rtn")
    he.save_quantized(model, folder / "packed")


def sparse_base_and_adapter(inputs: Path) -> None:
    language_model(inputs)
    model = decoder(inputs)
    he.sparsify_(model, sparsity=0.5, method="magnitude")
    model.save_pretrained(inputs / "sparse")
    supernet = he.add_lora(model, he.ElasticLoraConfig(**LORA, sparse=True, task_type="CAUSAL_LM"))
    randomise(supernet.model)
    supernet.model.save_pretrained(inputs / "adapter")


def merge(inputs: Path, folder: Path) -> None:
    _merge(inputs, folder, largest=False)


def older_merge(inputs: Path, folder: Path) -> None:
    _merge(inputs, folder, largest=True)


def _merge(inputs: Path, folder: Path, *, largest: bool) -> None:
    supernet = he.load_adapter(AutoModelForCausalLM.from_pretrained(inputs / "sparse"), inputs / "adapter")
    point = supernet.space.largest() if largest else supernet.space.smallest()
    he.export(supernet, point, folder / "merged", merge=True, overwrite=True, source=str(inputs / "parent"))


# -- whole runs --------------------------------------------------------------------------------------------------------


def encoder_and_text(inputs: Path) -> None:
    tiny_checkpoints.sentence_encoder(inputs / "parent")
    tiny_checkpoints.write_text(inputs / "text.txt")


def compress(inputs: Path, folder: Path) -> None:
    """Recipe ``best``; how many steps it trains, and latencies, must not depend on the time they take."""
    run.training_plan = lambda *args, **kwargs: dict(PLAN)  # type: ignore[assignment]
    for name in ("measure_latency_table", "measure_models"):
        plain = getattr(goal, name)
        setattr(goal, name, functools.partial(plain, timer=tiny_checkpoints.parameter_seconds, rounds=3))
    options = tiny_checkpoints.options(
        inputs / "parent", inputs / "text.txt", folder / "small", minutes=1.0, sequence_length=12
    )
    run.CompressRun(options, say=silent).run()


def masked_model_and_text(inputs: Path) -> None:
    tiny_checkpoints.masked_model(inputs / "parent")
    tiny_checkpoints.write_text(inputs / "text.txt")


def make_elm(inputs: Path, folder: Path) -> None:
    elm_runs.prepare(setattr)
    he.make_elm(elm_runs.options(inputs / "parent", inputs / "text.txt", folder / "small"), say=silent)


CHECKPOINT, STORAGE, STAGE = "resumes from the last complete checkpoint", "goes on from its storage", "goes on by stage"

OPERATIONS: Mapping[str, Operation] = {
    "supernet training": Operation(supernet_training, goes_on=CHECKPOINT, holds=("checkpoint",)),
    "growth": Operation(growth, goes_on=CHECKPOINT, holds=("checkpoint",)),
    "adapter training": Operation(adapter_training, goes_on=CHECKPOINT, holds=("checkpoint", "adapter")),
    "search": Operation(search, classifier, goes_on=STORAGE, holds=()),
    "refit": Operation(refit, classifier),
    "sparsify": Operation(sparsify, language_model),
    "quantise": Operation(quantise, language_model, older_integers),
    "merge": Operation(merge, sparse_base_and_adapter, older_merge),
    "export": Operation(export, classifier, older_export),
    "compress": Operation(compress, encoder_and_text, goes_on=STAGE, holds=("stock", "supernet")),
    "make_elm": Operation(make_elm, masked_model_and_text, goes_on=STAGE, holds=("stock", "supernet")),
}


def prepared(name: str, root: Path) -> tuple[Path, Path]:
    """Makes the folder of inputs, and one with what is there before the first attempt."""
    inputs, start = root / "inputs", root / "start"
    for folder in (inputs, start):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    OPERATIONS[name].inputs(inputs)
    OPERATIONS[name].start(inputs, start)
    return inputs, start
