"""The stock Trainer with the loss of a distillation in place of the labels'."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_elastic.distillation import IGNORED_LABEL, TopK, top_k_loss
from hf_elastic.errors import TrainingError
from hf_elastic.families import shifts_labels
from hf_elastic.files import read_json, write_json
from hf_elastic.repair.features import Batch, Feature, Padder
from hf_elastic.repair.teacher_cache import TeacherCache, restored_signal
from hf_elastic.training.order import InOrder
from hf_elastic.training.resume import CompleteCheckpointCallback
from hf_elastic.training.targets import Distillation, LossContext, Signal, detached, scored_positions

# What Trainer and accelerate set in a model.
_SET = ("forward", "_original_forward", "_require_grads_hook", "_require_grads_hooks", "_is_accelerate_prepared")
_CHECKPOINTING = ("gradient_checkpointing",)
_TEACHER = "teacher."  # before the names of a batch's rows from the cache


class TaughtFeatures(Sequence[Feature]):
    """Examples with what a cache knows about them.

    Args:
        features: all examples.
        cache: of some or all of them.
        places: where the cache has an example, by its number; by default at that number.
    """

    def __init__(
        self, features: Sequence[Feature], cache: TeacherCache, *, places: Mapping[int, int] | None = None
    ) -> None:
        self.features, self.cache, self.places = features, cache, places

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        rows = self.cache[index if self.places is None else self.places[index]]
        return {**self.features[index], **{_TEACHER + name: values for name, values in rows.items()}}


class Collator:
    """Pads examples into a batch; rows of the teacher stand behind one another."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.pad, self.shifted = Padder(model), shifts_labels(model)

    def __call__(self, features: Sequence[Feature]) -> Batch:
        """Makes a batch."""
        plain = [{name: v for name, v in row.items() if not name.startswith(_TEACHER)} for row in features]
        names = [name for name in features[0] if name.startswith(_TEACHER)]
        batch = self.pad(plain)
        if self.shifted and "labels" in batch and batch["labels"].dim() == 2:
            batch["labels"][:, 0] = IGNORED_LABEL  # no logits are scored against it, yet the Trainer may count it
        return {**batch, **{name: torch.cat([row[name] for row in features]) for name in names}}


class Lesson:
    """How the loss of a batch comes about: which outputs are compared, and where the teacher's come from.

    Args:
        model: the student without adapters.
        plan: what is compared.
        teacher: runs beside the student; ``None`` where batches hold what a cache knows.
        pairs: which hidden states are compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Distillation,
        *,
        teacher: PreTrainedModel | None,
        pairs: tuple[tuple[int, int], ...] | None,
    ) -> None:
        self.plan, self.teacher, self.pairs = plan, teacher, pairs
        self.shifted = shifts_labels(model)

    def taught(self, inputs: Mapping[str, Tensor]) -> Signal | TopK:
        """What the teacher says about a batch."""
        rows = {n.removeprefix(_TEACHER): values for n, values in inputs.items() if n.startswith(_TEACHER)}
        if self.teacher is None:
            return restored_signal(rows, inputs["attention_mask"])
        plain = {name: values for name, values in _plain(inputs).items() if name != "labels"}
        with torch.no_grad():
            return detached(self.plan.signal(self.teacher(**plain, **self.plan.forward_arguments), plain))

    def loss(
        self,
        student: nn.Module,
        inputs: Mapping[str, Tensor],
        *,
        taught: Signal | TopK,
        count: Tensor | float | None = None,
        steps: int = 1,
    ) -> tuple[Tensor, Any]:
        """The loss of a micro-batch, and the student's outputs.

        Args:
            student: maybe with adapters.
            inputs: a batch.
            taught: of :meth:`taught`.
            count: scored labels of all micro-batches of the step.
            steps: how many micro-batches that are.
        """
        plain = _plain(inputs)
        labelled = self.plan.label_weight > 0 and "labels" in plain
        asked = plain if labelled else {name: values for name, values in plain.items() if name != "labels"}
        outputs = student(**asked, **self.plan.forward_arguments)
        context = LossContext(plain, pairs=self.pairs, shifted=self.shifted, count=count, steps=steps)
        signal = self.plan.signal(outputs, plain)
        if isinstance(taught, TopK):
            soft = self._top_k_loss(signal, taught, context)
        else:
            soft = self.plan.loss(signal, taught, context=context)
        loss = self.plan.weight * soft
        scored = plain["labels"].ne(IGNORED_LABEL).sum() if labelled else 0
        if scored:  # the mean over no label is NaN
            share = 1 / steps if count is None else scored / count
            loss = loss + self.plan.label_weight * outputs["loss"] * share
        return loss, outputs

    def _top_k_loss(self, signal: Signal, taught: TopK, context: LossContext) -> Tensor:
        assert isinstance(signal, Tensor)
        mask, count = scored_positions(signal, context)
        student = signal if mask is None else signal[mask.bool()]  # (P, C)
        loss = top_k_loss(
            student, taught, temperature=self.plan.temperature, divergence=self.plan.divergence, count=count
        )
        return loss / context.steps if count is None else loss


def _plain(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in inputs.items() if not name.startswith(_TEACHER)}


class _ReadableConfig(TrainerCallback):
    """Gives the config in a checkpoint the number of layers under its common name, too.

    A Trainer that continues reads the config as one of no model type, and such a one with per-layer shapes must be
    able to count its layers, which GPT-2 calls ``n_layer``.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "config.json"
        if file.is_file():  # adapters are saved without
            write_json(file, {**read_json(file), "num_hidden_layers": kwargs["model"].config.num_hidden_layers})


class DistillingTrainer(Trainer):
    """The stock Trainer, whose loss is a lesson's.

    Args:
        student: what is trained, maybe with adapters.
        args: of the Trainer.
        lesson: the loss.
        examples: in the order in which the steps see them.
        collate: makes batches of them.
    """

    def __init__(
        self,
        student: nn.Module,
        args: TrainingArguments,
        *,
        lesson: Lesson,
        examples: InOrder,
        collate: Callable[..., Batch],
    ) -> None:
        super().__init__(
            student,
            args,
            train_dataset=examples,
            data_collator=collate,
            callbacks=[_ReadableConfig(), CompleteCheckpointCallback()],
        )
        self.lesson = lesson
        # The loss below is divided as the Trainer's own: by the labels of the step, or by its micro-batches.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of the distillation.

        Raises:
            TrainingError: it is not finite.
        """
        with self.accelerator.autocast():
            taught = self.lesson.taught(inputs)
        loss, outputs = self.lesson.loss(
            model,
            inputs,
            taught=taught,
            count=None if num_items_in_batch is None else max(int(num_items_in_batch), 1),
            steps=self.current_gradient_accumulation_steps,
        )
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss of step {self.state.global_step + 1} is {float(loss)}: lower learning_rate, or train in "
                "float32 or bfloat16 where float16 overflows"
            )
        return (loss, outputs) if return_outputs else loss


@contextmanager
def without_traces(model: PreTrainedModel) -> Iterator[None]:
    """Takes back at the end what a Trainer leaves in a model: no ``use_cache``, checkpointing, autocast of forward.

    Checkpointing with adapters hooks the embeddings twice, and transformers can remove only one of the hooks.
    """
    hooks = model.get_input_embeddings()._forward_hooks
    known = set(hooks)
    objects = [(model.config, ("use_cache",)), (model, _SET), *((m, _CHECKPOINTING) for m in model.modules())]
    before = [{name: vars(thing)[name] for name in names if name in vars(thing)} for thing, names in objects]
    try:
        yield
    finally:
        for (thing, names), values in zip(objects, before, strict=True):
            for name in names:
                vars(thing).pop(name, None)
            vars(thing).update(values)
        for number in hooks.keys() - known:
            del hooks[number]


def timed_steps(
    student: nn.Module, lesson: Lesson, batches: Sequence[Batch], *, dtype: torch.dtype | None
) -> tuple[float, float]:
    """Measures mean seconds of a training step and of the teacher's forward; no weight changes.

    Args:
        student: in training mode, maybe with adapters.
        lesson: with its teacher.
        batches: on the student's device; the first warms up.
        dtype: what to compute in besides float32, under autocast.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    copies = [parameter.detach().clone() for parameter in trained]  # what the optimizer moves
    optimizer, device = torch.optim.AdamW(copies), trained[0].device
    times = []
    for batch in batches:
        began = _now(device)
        with _computing(device, dtype):
            taught = lesson.taught(batch)
        middle = _now(device)
        with _computing(device, dtype):
            loss, _ = lesson.loss(student, batch, taught=taught)
        loss.backward()
        for copied, parameter in zip(copies, trained, strict=True):
            copied.grad, parameter.grad = parameter.grad, None
        optimizer.step()
        times.append((_now(device) - middle, middle - began))
    counted = times[1:] or times  # means, not medians: batches differ in length, and all of them must be paid for
    own, teaching = (sum(column) / len(counted) for column in zip(*counted, strict=True))
    return own, teaching


def _computing(device: torch.device, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
