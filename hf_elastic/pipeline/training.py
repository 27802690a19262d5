"""The two trainings of a run: the supernet near the limit, then the subnet that was found."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_elastic.errors import TrainingError
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import Batch, Task, TaskData
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import Distillation, ElasticTrainer, SamplingRule, last_complete_checkpoint
from hf_elastic.training.order import InOrder, training_order
from hf_elastic.training.preparation import prepared_for_distillation

_PROBE_STEPS = 8
_SAVES = 5
_OVERHEAD = 1.3  # optimizer, collation, checkpoints and logging, as measured on MiniLM


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
) -> list[dict[str, float]]:
    """Trains the subnets of a rule for a number of steps; continues from the newest whole checkpoint of ``folder``.

    Everything is distilled from a frozen copy of the parent: a sentence encoder the state of every token after the
    last layer, without labels; other models their logits, with the labels of the text beside them.

    Returns:
        Losses by step.
    """
    sentences = task.name == "embedding"
    lengths = [len(feature["input_ids"]) if sentences else 0 for feature in data.train]
    order = training_order(lengths, batch_size=options.batch_size, steps=steps, seed=options.seed)
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=rule,
        distill=Distillation(target=task.target, teacher=teacher, state_distance="relative"),
        args=arguments_of(options, folder=folder, steps=steps, bf16=bf16),
        train_dataset=InOrder(data.train, order),
        data_collator=data.collate,
    )
    with prepared_for_distillation(supernet.model, freeze_embeddings=sentences):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return noted_losses(trainer)


def noted_losses(trainer: Trainer) -> list[dict[str, float]]:
    """Losses of a training by step."""
    log = trainer.state.log_history
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry]


def arguments_of(options: CompressOptions, *, folder: Path, steps: int, bf16: bool) -> TrainingArguments:
    """The Trainer's settings of a training of so many steps."""
    log = max(1, steps // 20)
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        adam_beta2=0.98,
        bf16=bf16,
        use_cpu=device_of(options) == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # a loss is the mean since the last one was noted, so no checkpoint may lie between two
        save_steps=log * max(1, 20 // _SAVES),
        save_total_limit=2,
        logging_steps=log,
        report_to="none",
        seed=options.seed,
        dataloader_pin_memory=False,
    )


def device_of(options: CompressOptions) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        TrainingError: a GPU is asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device='cuda', but torch finds no GPU here; use device='cpu' or 'auto'")
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def training_plan(
    supernet: Supernet, pool: tuple[Architecture, ...], *, data: TaskData, options: CompressOptions
) -> dict[str, Any]:
    """Turns minutes into numbers of steps, by what a few steps of subnets take here.

    Args:
        supernet: its weights do not change.
        pool: the subnets that are trained.
        data, options: of the run.

    Returns:
        ``bf16``, ``seconds_per_step``, ``supernet_steps`` and ``found_steps``.
    """
    if not options.minutes:
        return {"bf16": False, "seconds_per_step": 0.0, "supernet_steps": 0, "found_steps": 0}
    batches = random_batches(data, size=options.batch_size)
    tried = {"auto": (False, True), "fp32": (False,), "bf16": (True,)}[options.precision]
    seconds = {bf16: step_seconds(supernet, pool, batches=batches, bf16=bf16) for bf16 in tried}
    bf16 = tried[0] if len(tried) == 1 else seconds[True] < 0.95 * seconds[False]
    steps = max(1, round(60 * options.minutes / (_OVERHEAD * seconds[bf16])))
    first = round(steps * options.share) if options.recipe == "best" else 0
    return {"bf16": bf16, "seconds_per_step": seconds[bf16], "supernet_steps": first, "found_steps": steps - first}


def step_seconds(
    supernet: Supernet, architectures: tuple[Architecture, ...], *, batches: list[Batch], bf16: bool
) -> float:
    """Measures training steps: forward and backward of subnets and the teacher's forward; no weight changes."""
    model, times = supernet.model, []
    try:
        for index in range(_PROBE_STEPS + 1):
            batch = {name: t.to(model.device) for name, t in batches[index % len(batches)].items()}
            began = _now(model.device)
            _probe(supernet, architectures[index % len(architectures)], batch=batch, bf16=bf16)
            times.append(_now(model.device) - began)
    finally:
        model.eval()
    return statistics.fmean(times[1:])  # not the median: batches differ in length, and all of them must be paid for


def _probe(supernet: Supernet, architecture: Architecture, *, batch: Batch, bf16: bool) -> None:
    model = supernet.model
    mixed = torch.autocast(model.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    model.eval()
    with mixed, torch.no_grad(), supernet.activate(supernet.space.largest()):
        model(**batch)  # what the teacher costs
    model.train()
    with supernet.activate(architecture):
        with mixed:
            output = model(**batch)[0]
        output.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_batches(data: TaskData, *, size: int, count: int = _PROBE_STEPS) -> list[Batch]:
    """A few training batches spread over the lengths of the examples, as length-grouped sampling gives them."""
    ordered = sorted(data.train, key=lambda feature: len(feature["input_ids"]))
    starts = [int(len(ordered) * (i + 0.5) / count) for i in range(count)]
    return [data.collate(ordered[min(s, max(0, len(ordered) - size)) :][:size]) for s in starts]
