"""``recover``: a short distillation of an extracted or refitted model from its parent, with the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.distillation import layer_pairs
from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.files import only_worker
from hf_elastic.fingerprints import fingerprint
from hf_elastic.layers import evaluating
from hf_elastic.repair.distilling import (
    Collator,
    DistillingTrainer,
    Lesson,
    TaughtFeatures,
    timed_steps,
    without_traces,
)
from hf_elastic.repair.features import Batch, Feature, Rows, check_features, data_digest, read_features, vocabulary_size
from hf_elastic.repair.recovery_record import RecoveryRecord
from hf_elastic.repair.recovery_settings import RecoverSettings
from hf_elastic.repair.teacher_cache import (
    CacheIdentity,
    SignalReader,
    TeacherCache,
    cache_settings,
    filled_cache,
    planned,
)
from hf_elastic.routers import require_unrouted
from hf_elastic.training.order import InOrder, training_order
from hf_elastic.training.preparation import prepared_for_distillation
from hf_elastic.training.resume import last_complete_checkpoint
from hf_elastic.training.targets import Distillation, Target

if TYPE_CHECKING:
    from hf_elastic.adapters import Lora

TEACHER_FOLDER = "teacher"

_PROBE_BATCHES = 9  # the first of them warms up
_OVERHEAD = 1.1  # collation, logging and checkpoints


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did.

    Attributes:
        steps: optimizer steps in all.
        resumed_from: step of the checkpoint that the run went on from, 0 where it began anew.
        step_seconds: measured before the training, ``None`` where ``steps`` was given.
        losses: logged means, ``(step, loss)``, from the beginning of the run.
    """

    steps: int
    resumed_from: int
    step_seconds: float | None
    losses: tuple[tuple[int, float], ...]


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | TeacherCache,
    data: Rows,
    *,
    output: str | Path,
    target: Target | Distillation = "logits",
    minutes: float | None = None,
    steps: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lora: Lora | None = None,
    cache: bool | None = None,
    top_k: int | None = None,
    kept_layers: Sequence[int] | None = None,
    freeze_embeddings: bool | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    max_length: int = 1024,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    on_report: Callable[[RecoverReport], object] | None = None,
) -> PreTrainedModel:
    """Distils a smaller model from its parent for some minutes, in place, with the stock Trainer.

    Killed and called again with the same arguments, it goes on from the last whole checkpoint in ``output`` and ends
    with the same bits on a CPU. Dropout is off meanwhile.

    Args:
        model: an extracted or refitted model, or any other without adapters; trained in place. It must start from the
            same weights when a run is continued.
        teacher: its parent, of the same vocabulary; or what :func:`cache_teacher` kept of it for the same data.
        data: rows with ``input_ids`` and maybe ``attention_mask``, ``token_type_ids``, ``labels``; or conversations
            with ``messages``, of which only what the assistant says is scored. Labels per token say which positions of
            logits are compared (-100: not); states are compared at every token, since answers attend to prompts.
        output: folder of the run: its record (``result.json``), checkpoints, and the teacher's cache. One process at a
            time works there.
        target: ``"logits"``, ``"embeddings"``, ``"last_hidden_state"`` or ``"hidden_states"``; or a
            :class:`Distillation` with temperature, divergence, pooling, weights. A name alone compares states by
            their relative distance and leaves the loss of the labels out.
        minutes: how long the training may take here, with the teacher's passes. A few steps are timed first; the number
            of steps that follows is noted in ``output`` and kept when the run is continued.
        steps: how many optimizer steps, instead.
        tokenizer: whose chat template renders conversations.
        lora: train adapters and merge them into the model: a rank, or a ``peft.LoraConfig``. By default every weight
            is trained.
        cache: whether the teacher runs once over the examples that the steps see, is kept on disk, and is not needed
            any more; by default for logits and embeddings. Otherwise it runs beside the student.
        top_k: how many classes of cached logits are told apart; by default 64, or all where there are fewer.
        kept_layers: which of the teacher's layers the model consists of, for ``"hidden_states"`` where it has fewer.
        freeze_embeddings: whether embedding tables stay as they are; by default unless logits are compared.
        batch_size: examples that the model sees at once.
        learning_rate: peak of the schedule. By default ``0.2 / hidden_size``, at most 1e-3, for all weights (the
            inverse width of Yang et al. 2022, arXiv 2203.03466, Table 3, set at 5e-4 for 384), and 5e-4 for adapters.
        max_length: longest conversation in tokens.
        seed: of the order of examples and of the adapters.
        arguments: more of :class:`transformers.TrainingArguments`, such as ``{"bf16": True, "use_cpu": True,
            "gradient_accumulation_steps": 4}``.
        on_report: called with what was done.

    Returns:
        ``model``, in evaluation mode, on the device where it was.

    Raises:
        DataError: the data is empty or cannot be read by the models.
        TrainingError: model and teacher do not fit each other, a setting is out of range, or the loss is not finite.
        CheckpointError: ``output`` holds something else, or another run.
        UnsupportedModelError: the model has routers.
    """
    _check_kinds(model, teacher)
    plan = planned(target)
    settings = RecoverSettings(
        plan=plan,
        output=Path(output).expanduser(),
        minutes=minutes,
        steps=steps,
        lora=lora,
        cache=_cached(plan, teacher, asked=cache),
        top_k=top_k,
        kept_layers=None if kept_layers is None else tuple(kept_layers),
        freeze_embeddings=plan.target != "logits" if freeze_embeddings is None else freeze_embeddings,
        batch_size=batch_size,
        learning_rate=_default_rate(model, lora) if learning_rate is None else learning_rate,
        seed=seed,
        arguments=dict(arguments or {}),
    )
    features = read_features(data, tokenizer=tokenizer, max_length=max_length)
    report = _Recovery(model, teacher, features, settings=settings).run()
    if on_report is not None:
        on_report(report)
    return model


def _cached(plan: Distillation, teacher: PreTrainedModel | TeacherCache, *, asked: bool | None) -> bool:
    """Whether the teacher's output is kept: as asked for, else what is small and can be kept."""
    if not isinstance(teacher, TeacherCache):
        default = plan.target == "embeddings" or (plan.target == "logits" and plan.divergence != "mse")
        return default if asked is None else asked
    if asked is False:
        raise TrainingError("cache=False asks for a teacher that runs, and teacher is a TeacherCache; pass the model")
    return True


def _default_rate(model: PreTrainedModel, lora: Lora | None) -> float:
    return 5e-4 if lora is not None else min(1e-3, 0.2 / int(model.config.hidden_size))


class _Recovery:
    """One recovery, begun or continued."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | TeacherCache,
        features: Sequence[Feature],
        *,
        settings: RecoverSettings,
    ) -> None:
        self.model, self.teacher, self.features = model, teacher, features
        self.settings, self.plan = settings, settings.plan
        self.collate = Collator(model)
        self.pairs: tuple[tuple[int, int], ...] | None = None

    def run(self) -> RecoverReport:
        """Trains; the model is in evaluation mode afterwards, also after an error."""
        check_features(self.features, self.model)
        _check_trainable(self.model, adapters=self.settings.lora is not None)
        device = self.settings.training_arguments(steps=1).device
        try:
            with ExitStack() as stack:
                stack.enter_context(_placed(self.model, device))
                stack.enter_context(without_traces(self.model))
                teaching = stack.enter_context(ExitStack())  # until the teacher is not needed any more
                if not isinstance(self.teacher, TeacherCache):
                    _check_pair(self.model, self.teacher, self.plan)
                    teaching.enter_context(_placed(self.teacher, device))
                    teaching.enter_context(evaluating(self.teacher))
                self._try()
                identity = self._identity()
                RecoveryRecord(self.settings.output, identity)  # what is no run of ours is left untouched
                stack.enter_context(only_worker(self.settings.output))
                record = RecoveryRecord(self.settings.output, identity)
                student = stack.enter_context(self._student())
                stack.enter_context(
                    prepared_for_distillation(student, freeze_embeddings=self.settings.freeze_embeddings)
                )
                steps = self._steps(student, record)
                examples = self._examples(steps)
                if self.settings.cache:
                    teaching.close()
                with record.training() as tell:
                    report = self._train(student, examples, record)
                    _check_finite(self.model)
                    tell(report.losses)
            return report
        finally:
            self.model.eval()

    def _try(self) -> None:
        """Runs both models on two examples, so that what does not fit is said before any work."""
        if isinstance(self.teacher, TeacherCache):
            self._check_cache(self.teacher)
        elif self.settings.cache:
            reader = SignalReader(self.teacher, self.plan, top_k=self.settings.top_k)
            reader.start(self.collate(self.features[:2]))
        self.pairs = self._pairs()
        batch = self._batch(range(min(2, len(self.features))))
        lesson = self._lesson()
        with evaluating(self.model), torch.no_grad():
            loss, outputs = lesson.loss(self.model, batch, taught=lesson.taught(batch))
        if isinstance(self.teacher, TeacherCache) and self.plan.target == "logits":
            classes = outputs["logits"].shape[-1]
            if classes != self.teacher.classes:
                raise TrainingError(
                    f"the model's logits have {classes} classes, those of the cached teacher {self.teacher.classes}"
                )
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss of the first examples is {float(loss)} before any training: the model or its teacher gives "
                "NaN or infinity; look at their weights and dtypes"
            )

    def _check_cache(self, cache: TeacherCache) -> None:
        top_k = self.settings.top_k if self.settings.top_k is not None else cache.identity.settings.get("top_k")
        kept = cache_settings(self.plan, top_k=top_k, classes=cache.classes)
        asked = CacheIdentity(cache.identity.teacher, data_digest(self.features), kept)
        if difference := cache.identity.difference(asked):
            raise CheckpointError(f"{cache.folder} holds a teacher cache of {difference}; run cache_teacher() anew")
        if cache.vocabulary != vocabulary_size(self.model):
            raise _other_vocabulary(cache.vocabulary, self.model)

    def _pairs(self) -> tuple[tuple[int, int], ...] | None:
        """Which hidden states of the model stand for which of the teacher's: ``None`` for each with its equal."""
        if self.plan.target != "hidden_states":
            return None
        own, kept = int(self.model.config.num_hidden_layers), self.settings.kept_layers
        if isinstance(self.teacher, TeacherCache):
            layers = len(self.teacher[0]) - 1
        else:
            layers = int(self.teacher.config.num_hidden_layers)
        if kept is None and own == layers:
            return None
        if kept is None or len(kept) != own:
            raise TrainingError(
                f"the model has {own} layers, the teacher {layers}: say which of the teacher's layers the model has, "
                f"kept_layers=({', '.join(map(str, range(min(own, 3))))}, ...), or take target='last_hidden_state'"
            )
        entries = [entry for _, entry in layer_pairs(kept, layers=layers)]
        return tuple(enumerate(entries))

    def _lesson(self, *, cached: bool = False) -> Lesson:
        online = None if cached or isinstance(self.teacher, TeacherCache) else self.teacher
        return Lesson(self.model, self.plan, teacher=online, pairs=self.pairs)

    def _batch(self, chosen: Sequence[int]) -> Batch:
        """Examples as a batch on the model's device, with what a given cache knows about them."""
        taught: Sequence[Feature] = self.features
        if isinstance(self.teacher, TeacherCache):
            taught = TaughtFeatures(self.features, self.teacher)
        batch = self.collate([taught[index] for index in chosen])
        return {name: values.to(self.model.device) for name, values in batch.items()}

    def _identity(self) -> dict[str, Any]:
        if isinstance(self.teacher, TeacherCache):
            teacher = self.teacher.identity.teacher
        else:
            teacher = fingerprint(self.teacher)
        return {
            "model": fingerprint(self.model),
            "teacher": teacher,
            "data": data_digest(self.features),
            "settings": self.settings.to_dict(),
        }

    @contextmanager
    def _student(self) -> Iterator[nn.Module]:
        if self.settings.lora is None:
            yield self.model
            return
        from hf_elastic.adapters import adapted

        with adapted(self.model, self.settings.lora, seed=self.settings.seed) as student:
            yield student

    def _steps(self, student: nn.Module, record: RecoveryRecord) -> int:
        """The number of steps: as noted, as asked for, or as many as take the time."""
        if record.steps is None:
            own = None
            steps = self.settings.steps
            if steps is None:
                own, teaching = self._timed(student)
                steps = self._affordable(own, teaching)
            record.note(steps=steps, step_seconds=own)
        assert record.steps is not None
        return record.steps

    def _timed(self, student: nn.Module) -> tuple[float, float]:
        """Seconds of a step, and of the teacher's part of it."""
        size = self.settings.examples_per_step
        order = self._order(_PROBE_BATCHES)
        starts = range(0, len(order), size)
        batches = [self._batch(order[start : start + self.settings.batch_size]) for start in starts]
        student.train()
        own, teaching = timed_steps(student, self._lesson(), batches, dtype=self.settings.dtype)
        return own * self.settings.accumulation, teaching * self.settings.accumulation

    def _affordable(self, own: float, teaching: float) -> int:
        assert self.settings.minutes is not None
        once = self.settings.cache and not isinstance(self.teacher, TeacherCache)
        epoch = max(1, len(self.features) // self.settings.examples_per_step)
        return affordable_steps(
            60 * self.settings.minutes / _OVERHEAD, student=own, teacher=teaching, epoch=epoch if once else None
        )

    def _order(self, steps: int) -> list[int]:
        lengths = [len(feature["input_ids"]) for feature in self.features]
        return training_order(lengths, batch_size=self.settings.examples_per_step, steps=steps, seed=self.settings.seed)

    def _examples(self, steps: int) -> InOrder:
        """All examples in the order of the steps; what a cache is to know of them is computed here."""
        order = self._order(steps)
        if isinstance(self.teacher, TeacherCache):
            return InOrder(TaughtFeatures(self.features, self.teacher), order)
        if not self.settings.cache:
            return InOrder(self.features, order)
        seen = sorted(set(order))
        cache = filled_cache(
            self.teacher,
            [self.features[index] for index in seen],
            self.settings.output / TEACHER_FOLDER,
            plan=self.plan,
            top_k=self.settings.top_k,
            batch_size=self.settings.batch_size,
        )
        places = {index: place for place, index in enumerate(seen)}
        return InOrder(TaughtFeatures(self.features, cache, places=places), order)

    def _train(self, student: nn.Module, examples: InOrder, record: RecoveryRecord) -> RecoverReport:
        assert record.steps is not None
        trainer = DistillingTrainer(
            student,
            self.settings.training_arguments(steps=record.steps),
            lesson=self._lesson(cached=self.settings.cache),
            examples=examples,
            collate=self.collate,
        )
        checkpoint = last_complete_checkpoint(self.settings.output)
        trainer.train(resume_from_checkpoint=checkpoint)
        logged = [(int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
        began = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
        return RecoverReport(record.steps, began, record.step_seconds, tuple(logged))


def affordable_steps(seconds: float, *, student: float, teacher: float, epoch: int | None) -> int:
    """How many steps fit into a time, at least one.

    Args:
        seconds: the time.
        student: seconds of a step without the teacher.
        teacher: seconds of the teacher's part.
        epoch: steps behind which the teacher has seen every example and is not run again; ``None``: it always runs.
    """
    steps = seconds / (student + teacher)
    if epoch is not None and steps > epoch:
        steps = (seconds - epoch * teacher) / student
    return max(1, int(steps))


@contextmanager
def _placed(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Moves a model to a device for the length of the block."""
    before = model.device
    if before == device:
        yield
        return
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(before)  # type: ignore[arg-type]


def _check_kinds(model: object, teacher: object) -> None:
    if getattr(model, "peft_config", None) is not None:
        raise TrainingError("the model has adapters already; merge them first: model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise TrainingError(
            f"recover() trains a model of transformers, got {type(model).__name__}; extract() one first"
        )
    require_unrouted(model, "recover()")
    if not isinstance(teacher, nn.Module | TeacherCache):
        raise TrainingError(f"the teacher must be a model or a TeacherCache, got {type(teacher).__name__}")


def _check_finite(model: PreTrainedModel) -> None:
    """Checks what the last step left, which no loss has seen."""
    if bad := next((name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None):
        raise TrainingError(f"{bad} is not finite after the last step: lower learning_rate and begin in a new folder")


def _check_trainable(model: PreTrainedModel, *, adapters: bool) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if adapters:
        return
    if not trained:
        raise TrainingError("every weight of the model is frozen; unfreeze some, or pass lora=")
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise TrainingError(
            "weights in float16 cannot be trained: call model.float() first (arguments={'bf16': True} still computes "
            "in half precision), or pass lora="
        )


def _check_pair(model: PreTrainedModel, teacher: PreTrainedModel, plan: Distillation) -> None:
    if teacher is model:
        raise TrainingError("model and teacher are one object; extract() or copy the model first")
    if vocabulary_size(model) != vocabulary_size(teacher):
        raise _other_vocabulary(vocabulary_size(teacher), model)
    own, other = int(model.config.hidden_size), int(teacher.config.hidden_size)
    if plan.target != "logits" and own != other:
        raise TrainingError(
            f"the model's hidden size is {own}, its teacher's {other}, so {plan.target} cannot be compared; "
            "take target='logits'"
        )


def _other_vocabulary(size: int, model: PreTrainedModel) -> TrainingError:
    return TrainingError(
        f"the teacher reads {size} tokens, the model {vocabulary_size(model)}; they must share one vocabulary"
    )
