"""The two trainings of a run: the supernet near the limit, then the subnet that was found."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_elastic.errors import TrainingError
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import Batch, Feature, Task, TaskData
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import Distillation, ElasticTrainer, SamplingRule, last_complete_checkpoint

_PROBE_STEPS = 8
_BATCHES_PER_POOL = 50
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
    sentences = task.name == "embedding"
    lengths = [len(feature["input_ids"]) if sentences else 0 for feature in data.train]
    order = training_order(lengths, batch_size=options.batch_size, steps=steps, seed=options.seed)
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=rule,
        distill=Distillation(target=task.target, teacher=teacher, state_distance="relative"),
        args=_arguments(options, folder=folder, steps=steps, bf16=bf16),
        train_dataset=_InOrder(data.train, order),
        data_collator=data.collate,
    )
    with prepared_for_distillation(supernet.model, freeze_embeddings=sentences):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))


class _InOrder(Dataset[Feature]):
    """Examples in the order in which all steps of a training see them."""

    def __init__(self, features: Sequence[Feature], order: Sequence[int]) -> None:
        self.features, self.order = features, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Feature:
        return self.features[self.order[position]]


def training_order(lengths: Sequence[int], *, batch_size: int, steps: int, seed: int) -> list[int]:
    """Which examples the batches of all steps hold: ``steps · batch_size`` indices, a pure function of the seed.

    Every epoch is shuffled anew, and batches are made of examples of similar length (less padding) out of 50
    batches. The samplers of the Trainer draw from the random state that all libraries share, so with them a training
    that is continued after its first epoch sees other batches than one that was not interrupted.
    """
    order: list[int] = []
    epoch, pool = 0, _BATCHES_PER_POOL * batch_size
    while len(order) < steps * batch_size:
        rng = random.Random(f"{seed}/{epoch}")
        shuffled = list(range(len(lengths)))
        rng.shuffle(shuffled)
        pools = [sorted(shuffled[s : s + pool], key=lengths.__getitem__) for s in range(0, len(shuffled), pool)]
        grouped = [index for pooled in pools for index in pooled]
        batches = [grouped[s : s + batch_size] for s in range(0, len(grouped), batch_size)]
        whole = [batch for batch in batches if len(batch) == batch_size] or batches
        rng.shuffle(whole)
        order += [i for batch in whole for i in batch]
        epoch += 1
    return order[: steps * batch_size]


@contextmanager
def prepared_for_distillation(model: nn.Module, *, freeze_embeddings: bool) -> Iterator[None]:
    """Inside, dropout is off (a short distillation underfits) and embedding tables are frozen where asked."""
    modules = list(model.modules())
    dropouts = [(m, "p", m.p) for m in modules if isinstance(m, nn.Dropout)]
    # LLaMA's attention holds its rate as a number
    rates = [(m, "attention_dropout", getattr(m, "attention_dropout", None)) for m in modules]
    switched = dropouts + [entry for entry in rates if isinstance(entry[2], float)]
    tables = [m.weight for m in modules if freeze_embeddings and isinstance(m, nn.Embedding) and m.weight.requires_grad]
    for module, name, _ in switched:
        setattr(module, name, 0.0)
    for weight in tables:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for module, name, rate in switched:
            setattr(module, name, rate)
        for weight in tables:
            weight.requires_grad_(True)


def _arguments(options: CompressOptions, *, folder: Path, steps: int, bf16: bool) -> TrainingArguments:
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
        save_steps=max(1, steps // _SAVES),
        save_total_limit=2,
        logging_steps=max(1, steps // 20),
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
