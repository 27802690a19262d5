"""The two trainings of a run: the supernet near the limit, then the subnet that was found."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import Batch, Task, TaskData
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import Distillation, ElasticTrainer, SamplingRule, last_complete_checkpoint

_PROBE_STEPS = 4
_SAVES = 5


def train_phase(
    supernet: Supernet,
    rule: SamplingRule,
    *,
    task: Task,
    data: TaskData,
    options: CompressOptions,
    folder: Path,
    steps: int,
    bf16: bool,
    teacher: nn.Module,
) -> None:
    """Trains the subnets of a rule for a number of steps; continues from the newest whole checkpoint of ``folder``.

    Everything is distilled from a frozen copy of the parent: a sentence encoder the state of every token after the
    last layer, without labels; other models their logits, with the labels of the text beside them.
    """
    prepare_for_distillation(supernet.model, freeze_embeddings=task.name == "embedding")
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=rule,
        distill=Distillation(target=task.target, teacher=teacher, state_distance="relative"),
        args=_arguments(options, task, folder=folder, steps=steps, bf16=bf16),
        train_dataset=data.train,
        data_collator=data.collate,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


def prepare_for_distillation(model: nn.Module, *, freeze_embeddings: bool) -> None:
    """Turns dropout off (a short distillation underfits) and freezes embedding tables where asked."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if freeze_embeddings and isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def _arguments(options: CompressOptions, task: Task, *, folder: Path, steps: int, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        bf16=bf16,
        use_cpu=device_of(options) == "cpu",
        train_sampling_strategy="group_by_length" if task.name == "embedding" else "random",
        remove_unused_columns=False,
        save_steps=max(1, steps // _SAVES),
        save_total_limit=2,
        logging_steps=max(1, steps // 20),
        report_to="none",
        seed=options.seed,
        dataloader_pin_memory=False,
    )


def device_of(options: CompressOptions) -> str:
    """``cpu`` or ``cuda``."""
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def step_seconds(
    supernet: Supernet, architectures: tuple[Architecture, ...], *, batches: list[Batch], bf16: bool
) -> float:
    """Measures a forward and backward of random subnets on training batches, without changing a weight."""
    model, times = supernet.model, []
    model.train()
    for index in range(_PROBE_STEPS + 1):
        batch = {name: t.to(model.device) for name, t in batches[index % len(batches)].items()}
        began = time.perf_counter()
        mixed = torch.autocast(model.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
        with supernet.activate(architectures[index % len(architectures)]):
            with mixed:
                output = model(**batch)[0]
            output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    model.eval()
    return statistics.median(times[1:])


def random_batches(data: TaskData, *, size: int, count: int = _PROBE_STEPS) -> list[Batch]:
    """A few training batches spread over the lengths of the examples, as length-grouped sampling gives them."""
    ordered = sorted(data.train, key=lambda feature: len(feature["input_ids"]))
    starts = [int(len(ordered) * (i + 0.5) / count) for i in range(count)]
    return [data.collate(ordered[min(s, max(0, len(ordered) - size)) :][:size]) for s in starts]
