"""What the experiments on ELM share: a small causal supernet of six candidate blocks on TinyStories.

The supernet has the depth of its teacher, stories260K: five layers of 128 dimensions, FFNs of 32 to 192 neurons. Text
of the training split is cut into blocks of 128 tokens of the teacher's vocabulary; the last twentieth is held out to
choose by, and what is reported is of TinyStories' validation pieces.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import print_table, write_json
from stories import Batch, load_parent
from transformers import LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

import hf_elastic as he
from hf_elastic.layers import seeded
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.training import SamplingRule

LAYERS, HIDDEN, HEADS, BOTTLENECK = 5, 128, 8, 32
START, LARGEST, STEP = 32, 192, 32
TOKENS, BATCH = 128, 8


@dataclass(frozen=True)
class Texts:
    """Blocks of tokens to train on, and batches: to calibrate, to choose and to report by."""

    train: list[dict[str, list[int]]]
    calibration: list[Batch]
    search: list[Batch]
    validation: list[Batch]
    teacher: LlamaForCausalLM


def prepare(folder: Path, *, blocks: int | None = None) -> Texts:
    """Cuts TinyStories into blocks of the teacher's tokens."""
    teacher, tokenizer = load_parent(folder, "stories260K")

    def cut(name: str) -> list[list[int]]:
        text = (folder / "tinystories" / name).read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
        ids = tokenizer.encode(text)
        return [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS, TOKENS)]

    rows = cut("train_944k.txt")[:blocks]
    held = max(4, len(rows) // 20)
    validation = cut("valid_even.txt")[: 512 if blocks is None else blocks]
    train = [{"input_ids": row, "labels": row} for row in rows[:-held]]
    return Texts(train, batches(rows[:64]), batches(rows[-held:]), batches(validation), teacher)


def batches(rows: Sequence[list[int]], *, size: int = 32) -> list[Batch]:
    """Batches of blocks."""
    made = [torch.tensor(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


def config(*, width: int = START, largest: int = LARGEST, **changes: Any) -> Any:
    """Config of the supernet, all blocks of one width."""
    return config_class("elastic_gpt2")(
        vocab_size=512, n_positions=512, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=largest,
        bottleneck_size=BOTTLENECK, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        candidate_blocks=list(BLOCKS), candidate_widths=[[width] * len(BLOCKS)] * LAYERS, **changes,
    )  # fmt: skip


def make(settings: Any, *, seed: int) -> PreTrainedModel:
    """A new model with weights of a seed."""
    with seeded(seed):
        return model_class("elastic_gpt2", "ElasticGPT2ForCausalLM")(settings)


def collate(rows: Sequence[dict[str, list[int]]]) -> Batch:
    """Stacks blocks."""
    ids = torch.tensor([row["input_ids"] for row in rows])  # (B, T)
    return {"input_ids": ids, "labels": ids.clone()}


def train(
    supernet: he.Supernet,
    texts: Texts,
    rule: SamplingRule,
    *,
    steps: int,
    seed: int,
    distill: he.Distillation | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    learning_rate: float = 2e-3,
) -> float:
    """Trains with the labels, and with a distillation if there is one; returns the seconds that took."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=learning_rate,
            lr_scheduler_type="linear", warmup_steps=max(1, steps // 10), weight_decay=0.01, max_grad_norm=1.0,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10_000, use_cpu=True, seed=seed,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = he.ElasticTrainer(
            supernet=supernet, sampling=rule, distill=distill or False, args=args, train_dataset=texts.train,
            data_collator=collate, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().metrics["train_runtime"])


@torch.no_grad()
def loss_of(model: torch.nn.Module, data: Sequence[Batch]) -> float:
    """Mean loss per token."""
    model.eval()
    return statistics.fmean(float(model(**batch).loss) for batch in data)


def path_losses(supernet: he.Supernet, paths: Sequence[he.Architecture], data: Sequence[Batch]) -> list[float]:
    """Losses of paths with the weights of the supernet."""
    losses = []
    for path in paths:
        with supernet.activate(path):
            losses.append(loss_of(supernet.model, data))
    return losses


def random_paths(supernet: he.Supernet, count: int, *, seed: int) -> list[he.Architecture]:
    """Different paths, each block drawn uniformly."""
    rng, found = random.Random(seed), dict[he.Architecture, None]()
    while len(found) < count:
        found.setdefault(supernet.space.sample(rng))
    return list(found)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:,.0f} +- {spread:,.0f}" if mean > 1000 else f"{mean:.3f} +- {spread:.3f}"


def add_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """Adds the arguments that all experiments have."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--blocks", type=int, help="Blocks of text, by default all.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")


def write_results(
    rows: Sequence[dict[str, Any]], *, by: str, numbers: Sequence[str], options: Any, extra: dict[str, Any]
) -> None:
    """Prints of every method the mean and the standard deviation over seeds, and writes them with all rows."""
    means = []
    for name in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == name]
        means.append({by: name, **{number: mean_and_spread([row[number] for row in own]) for number in numbers}})
    print_table(means)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    write_json(options.json, {**extra, "settings": settings, "summary": means, "rows": list(rows)})
