"""ElasticTrainer: several subnets per step, distilled from the largest or from a given teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.families import shifts_labels
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet
from hf_elastic.training.auxiliary import RouterTerm, RoutingLosses, forget_thresholds
from hf_elastic.training.callbacks import Period, SubnetSamplingCallback, check_run, checked_period
from hf_elastic.training.decay import ActiveSliceStep
from hf_elastic.training.fit_layers import FIT_FILE, FitLayers
from hf_elastic.training.periods import announce, check_restored
from hf_elastic.training.preparation import KeptCache
from hf_elastic.training.resume import (
    CompleteCheckpointCallback,
    checked_blocks,
    checked_checkpoint,
    checkpoint_errors,
    last_complete_checkpoint,
)
from hf_elastic.training.router_files import load_beside, save_beside
from hf_elastic.training.sampling import SamplingRule
from hf_elastic.training.sublayers import LayerStates, captured
from hf_elastic.training.targets import Distillation, LossContext, Relation, Signal, detached, state_pairs
from hf_elastic.training.teacher import Teacher

# The mixin stands before any Trainer class; to a type checker it is one.
_Below: Any = Trainer if TYPE_CHECKING else object


@dataclass(frozen=True)
class _Draw:
    """The subnet that is running, and its share of the step's loss."""

    architecture: Architecture
    share: float


class _StepCallback(TrainerCallback):
    """Keeps the slices of a step together with the Trainer's own order of events."""

    def __init__(self, supernet: Supernet, slices: ActiveSliceStep, *, fit: FitLayers | None) -> None:
        self.supernet = supernet
        self.slices = slices
        self.fit = fit
        self.micro_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        announce(self, state, samples=True)
        check_run(self.supernet, args, model=kwargs["model"])
        forget_thresholds(self.supernet)
        self.slices.start(kwargs["optimizer"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_restored(self.supernet, state)

    on_train_end = on_epoch_begin  # a run that was over when it was resumed has no epoch

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.slices.forget()
        self.micro_step = 0
        if self.fit is not None:
            self.fit.zero_grad()  # the Trainer does so for the model alone

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.micro_step += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.slices.before_step(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.slices.after_step()


class ElasticTrainerMixin(_Below):
    """Train a supernet; put it before a Trainer class: ``class Mine(ElasticTrainerMixin, SFTTrainer): ...``.

    Each micro-batch runs the subnets of the sampling rule one after another: activate, forward, backward.
    Their gradients add up to that of the *mean* of their losses, so a learning rate means what it means for
    one model. Loss, clipping, accumulation, logging and saving are those of the Trainer below;
    ``compute_loss`` of that Trainer gives the loss of the labels. Outside a step the largest subnet is
    active, also after an exception.

    Args:
        supernet: What to train; the Trainer's ``model`` is ``supernet.model``.
        sampling: Which subnets a step runs.
        distill: ``False``: labels only. ``True``: ``Distillation()``, in-place distillation of logits. Or a
            :class:`~hf_elastic.training.targets.Distillation`.
        per: ``"step"``: the same subnets for all micro-batches of an optimizer step; ``"micro_batch"``:
            others for each.
        eval_architectures: Architectures that ``evaluate()`` runs besides the largest, by name; the metrics
            of ``small`` start with ``eval_small_``.
        freeze_inactive: Whether entries that no subnet of the step used keep their value; otherwise momentum
            may still move those that were used earlier.
        routing: Factors of the losses that routers add, of a model that has some; by default
            :class:`~hf_elastic.training.auxiliary.RoutingLosses`.

    Attributes:
        fit_layers: Maps of the student's states to the teacher's width, for ``Distillation(fit=True)``.

    Raises:
        TrainingError: The arguments do not go together.
        UnsupportedModelError: Student or teacher of a relational distillation is of a family that we do not know.
        ArchitectureError: An architecture is not a point of the supernet's space.
    """

    def __init__(
        self,
        *args: Any,
        supernet: Supernet,
        sampling: SamplingRule,
        distill: bool | Distillation = False,
        per: Period = "step",
        eval_architectures: Mapping[str, Architecture | Mapping[str, Value]] | None = None,
        freeze_inactive: bool = False,
        routing: RoutingLosses | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("model_init") is not None:
            raise TrainingError("model_init would replace the supernet's model; leave it out")
        if any(isinstance(callback, SubnetSamplingCallback) for callback in kwargs.get("callbacks") or ()):
            raise TrainingError("ElasticTrainer samples by itself; leave out SubnetSamplingCallback, give sampling=")
        self.supernet = supernet
        self.sampling = sampling
        self.per = checked_period(per)
        self.distillation = Distillation() if distill is True else (distill or None)
        self.eval_architectures = {
            name: supernet.space.canonical(architecture) for name, architecture in (eval_architectures or {}).items()
        }
        self._elastic_slices = ActiveSliceStep(supernet, freeze_inactive=freeze_inactive)
        self._elastic_draw: _Draw | None = None
        self._elastic_teacher: Signal | None = None
        self._elastic_outputs_apart = False  # whether those of the loss are of a forward without gradient
        self._elastic_routers = RouterTerm(supernet, routing)
        self._elastic_cache = KeptCache(supernet.base.config)
        teaches = None if self.distillation is None else Teacher(self.distillation, supernet)
        if not args:
            kwargs.setdefault("model", supernet.model)
        with checkpoint_errors():
            super().__init__(*args, **kwargs)
        if teaches is not None:
            teaches.prepare(self.args.device)
        self._elastic_teaching = teaches
        self._elastic_relation: Relation | None = None
        self.fit_layers: FitLayers | None = None
        if self.distillation is not None and self.distillation.target == "relational":
            self._relate(self.distillation)
        self._elastic_events = _StepCallback(supernet, self._elastic_slices, fit=self.fit_layers)
        self.add_callback(self._elastic_events)
        self.add_callback(CompleteCheckpointCallback())

    def _relate(self, plan: Distillation) -> None:
        self._elastic_relation = Relation(plan, self.supernet, seed=self.args.seed)
        self.fit_layers = self._elastic_relation.fit
        if self.fit_layers is None:
            return
        if self.lr_scheduler is not None:
            raise TrainingError(
                "the scheduler in optimizers= knows nothing of the fit layers that are added to the optimizer; give "
                "optimizers=(optimizer, None) and choose lr_scheduler_type="
            )
        self.fit_layers.to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, as the Trainer below does, and let it train the fit layers too."""
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if self.fit_layers is None:
            return optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        decay = optimizer.defaults.get("weight_decay", 0.0) if given else self.args.weight_decay
        if not all(id(parameter) in held for parameter in self.fit_layers.parameters()):
            for group in self.fit_layers.parameter_groups(weight_decay=decay):
                optimizer.add_param_group(group)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.fit_layers is None:
            return super()._clip_grad_norm(model)
        both = [*model.parameters(), *self.fit_layers.parameters()]
        return self.accelerator.clip_grad_norm_(both, self.args.max_grad_norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_errors(folder):
            if self.args.should_save:  # before what the Trainer writes last
                save_beside(self.supernet, folder)
                if self.fit_layers is not None:
                    self.fit_layers.save_to(folder)
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checked_blocks(resume_from_checkpoint, self.supernet)
        load_beside(self.supernet, resume_from_checkpoint)
        if self.fit_layers is not None:
            self.fit_layers.load_from(resume_from_checkpoint)
        elif (Path(resume_from_checkpoint) / FIT_FILE).is_file():
            raise CheckpointError(
                f"{resume_from_checkpoint} was saved by a run with fit layers, which this run has not; give "
                "Distillation(target='relational', fit=True), or start again"
            )
        # That of sentence-transformers takes no model.
        super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Begin behind the last epoch where a run was over when it was resumed: the loop asks behind a step only."""
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _load_best_model(self) -> None:
        if self.fit_layers is not None:
            self.fit_layers.load_from(str(self.state.best_model_checkpoint))
        load_beside(self.supernet, str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as ``Trainer.train``; ``resume_from_checkpoint=True`` takes the newest *whole* checkpoint.

        Raises:
            CheckpointError: There is no whole checkpoint, or the one that was named is not whole.
            TrainingError: The run would break a promise.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(
                    f"no whole checkpoint in {self.args.output_dir}; to start where there may be none, pass "
                    "resume_from_checkpoint=hf_elastic.last_complete_checkpoint(output_dir)"
                )
            resume_from_checkpoint = found
        elif resume_from_checkpoint:
            resume_from_checkpoint = checked_checkpoint(resume_from_checkpoint)
        if self._elastic_teaching is not None:
            self._elastic_teaching.check()
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self._elastic_slices.release()
            self._elastic_cache.restore()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of every subnet of the step; return the mean of their losses, detached."""
        draws = self._drawn()
        losses: list[Tensor] = []
        self._elastic_teacher = None
        try:
            for number, architecture in enumerate(draws, start=1):
                # DDP exchanges gradients once, in the backward of the last subnet.
                exchange = nullcontext() if number == len(draws) else self.accelerator.no_sync(model)
                with exchange, self.supernet.activate(architecture), self._elastic_routers.listening():
                    self._elastic_slices.record()
                    self._elastic_draw = _Draw(architecture, share=1 / len(draws))
                    losses.append(super().training_step(model, dict(inputs), num_items_in_batch))
        finally:
            self._elastic_draw = self._elastic_teacher = None
        if self.fit_layers is not None and self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            self.fit_layers.average_gradients()  # they are outside of what DDP wraps
        return torch.stack(losses).sum()

    def _drawn(self) -> Sequence[Architecture]:
        """Return the subnets of this micro-batch; the largest first, whose outputs the others may need."""
        micro_step = self._elastic_events.micro_step if self.per == "micro_batch" else 0
        drawn = self.sampling.draw(self.supernet.space, self.state.global_step, micro_step)
        largest = self.supernet.space.largest()
        return sorted(drawn, key=lambda architecture: architecture != largest)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of the active subnet: that of the labels, of the distillation, or both.

        In an evaluation this is the loss of the labels; without labels it is that of the distillation.
        """
        given = self._pop_teacher_column(inputs)
        share = 1.0 if self._elastic_draw is None else self._elastic_draw.share
        if self.distillation is None or (self._elastic_draw is None and self._has_labels(inputs)):
            # Outputs that nobody asked for would cost a trainer of TRL another forward.
            found = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            loss, outputs = found if return_outputs else (found, None)
        else:
            loss, outputs = self._distilled_loss(model, inputs, given, num_items_in_batch=num_items_in_batch)
        steps = self._normalisation(num_items_in_batch).get("steps", 1)
        loss = self._elastic_routers.added_to(loss, divisor=steps)
        loss = loss if share == 1.0 else loss * share
        return (loss, outputs) if return_outputs else loss

    def _distilled_loss(
        self, model: nn.Module, inputs: dict[str, Any], given: Tensor | None, *, num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        plan = self.distillation
        assert plan is not None
        relation, in_place = self._elastic_relation, plan.teacher is None and given is None
        asked = {**inputs, **plan.forward_arguments}
        hard: Tensor | None = None
        self._check_replaceable(inputs)
        if self._has_labels(inputs) and not (relation is not None and plan.label_weight == 0 and not in_place):
            hard, outputs, states = self._run_labelled(model, asked, num_items_in_batch=num_items_in_batch)
        else:
            outputs, states = self._run_unlabelled(model, asked)
        signal = plan.signal(outputs, inputs, states=states)
        if in_place and self._elastic_draw is not None and hard is None:
            raise TrainingError(
                "the batch has neither labels nor a teacher's embeddings, so nothing can be learned; "
                f"give Distillation(teacher=model), or a column 'labels' or {plan.teacher_column!r}"
            )
        if in_place and self._is_largest():
            self._elastic_teacher = detached(signal)
            assert hard is not None
            return hard, outputs
        if self._elastic_teacher is None or self._elastic_draw is None:
            self._elastic_teacher = self._compute_teacher_signal(inputs) if given is None else given
        context = LossContext(
            inputs=inputs,
            pairs=self._compared_layers(),
            shifted=shifts_labels(self.supernet.model),
            fit=self.fit_layers,
            **self._normalisation(num_items_in_batch),
        )
        soft = plan.weight * plan.loss(signal, self._elastic_teacher, context=context)
        if hard is None or plan.label_weight == 0:
            return soft, outputs
        return soft + plan.label_weight * hard, outputs

    def _check_replaceable(self, inputs: Mapping[str, Any]) -> None:
        """Check that distillation would not replace, unseen, a loss that the Trainer below computes without labels."""
        if not self._has_labels(inputs) and super().compute_loss.__func__ is not Trainer.compute_loss:
            raise TrainingError(
                f"{type(self).__name__} computes a loss of its own of batches without labels, which distillation would "
                "replace; leave out distill="
            )

    def _run_labelled(
        self, model: nn.Module, asked: dict[str, Any], *, num_items_in_batch: Any
    ) -> tuple[Tensor, Any, LayerStates | None]:
        """Compute the loss of the labels, and outputs and states that gradients flow through.

        A trainer of TRL computes its loss without logits; those that it returns are of a forward without gradient.
        """
        if not self._elastic_outputs_apart:
            with captured(None if self._elastic_relation is None else self._elastic_relation.student) as seen:
                hard, outputs = super().compute_loss(
                    model, asked, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
            follows = any(isinstance(value, Tensor) and value.requires_grad for value in outputs.values())
            if follows or not torch.is_grad_enabled():
                return hard, outputs, seen.states()
            self._elastic_outputs_apart = True
        else:
            hard = super().compute_loss(model, asked, num_items_in_batch=num_items_in_batch)
        outputs, states = self._run_unlabelled(model, asked)
        return hard, outputs, states

    def _run_unlabelled(self, model: nn.Module, asked: dict[str, Any]) -> tuple[Any, LayerStates | None]:
        """Run the active subnet without labels; return its output, and its states where they are compared."""
        plain = {name: value for name, value in asked.items() if name not in self.label_names}
        if self._elastic_relation is None:
            return model(**plain), None
        with captured(self._elastic_relation.student) as seen:
            # DDP waits for the parameters behind whatever its module returns, so it must return the states too, and
            # the loss must take them from there: the head that leads to the output may have no part in it.
            joined = self.model.register_forward_hook(lambda module, args, output: (output, seen.states()))
            try:
                outputs, states = model(**plain)
            finally:
                joined.remove()
        return outputs, states

    def _compared_layers(self) -> tuple[tuple[int, int], ...] | None:
        """Return which entries of the states of the active subnet and of the teacher are compared, ``None``: all."""
        if self._elastic_relation is not None:
            return self._elastic_relation.pairs
        assert self.distillation is not None
        return state_pairs(self.supernet, self.supernet.active) if self.distillation.target == "hidden_states" else None

    def _is_largest(self) -> bool:
        return self._elastic_draw is not None and self._elastic_draw.architecture == self.supernet.space.largest()

    def _has_labels(self, inputs: Mapping[str, Any]) -> bool:
        return bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)

    def _pop_teacher_column(self, inputs: dict[str, Any]) -> Tensor | None:
        """Take the teacher's embeddings out of the inputs, which the model does not accept."""
        if self.distillation is None:
            return None
        given = inputs.pop(self.distillation.teacher_column, None)
        return given if self.distillation.target == "embeddings" else None

    def _compute_teacher_signal(self, inputs: Mapping[str, Any]) -> Signal:
        assert self._elastic_teaching is not None
        place = None if self._elastic_relation is None else self._elastic_relation.teacher
        with self.accelerator.autocast():
            return self._elastic_teaching.signal(inputs, labels=self.label_names, place=place)

    def _normalisation(self, num_items_in_batch: Any) -> dict[str, Any]:
        """Return what a distillation loss is divided by to accumulate as the Trainer's own loss does."""
        if self._elastic_draw is None:
            return {}
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        if not scaled:
            return {}  # the Trainer divides what compute_loss returns by the number of micro-batches
        steps = self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            return {"steps": steps}
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return {"steps": steps, "count": num_items_in_batch / ranks}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch; without labels the loss is that of the distillation, and ``compute_metrics`` gets
        the subnet's and the teacher's signal (embeddings, for instance) as predictions and labels; none of a
        relational distillation, which has too many."""
        inputs = dict(inputs)
        if self.distillation is None or self._has_labels(inputs):
            self._pop_teacher_column(inputs)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        teacher, self._elastic_teacher = self._elastic_teacher, None
        if prediction_loss_only or self._elastic_relation is not None:
            return loss.detach(), None, None
        return loss.detach(), detached(self.distillation.signal(outputs, inputs)), teacher

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the largest subnet (or what is active), then each of ``eval_architectures`` by name.

        Returns:
            The metrics of all; those of the architecture ``small`` start with ``{metric_key_prefix}_small_``.
        """
        metrics: dict[str, float] = {}
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if not several:  # for a dict of data sets the Trainer calls this method for each of them
            for name, architecture in self.eval_architectures.items():
                with self.supernet.activate(architecture):
                    prefix = f"{metric_key_prefix}_{name}"
                    metrics |= super().evaluate(eval_dataset, ignore_keys, metric_key_prefix=prefix)
        return metrics | super().evaluate(eval_dataset, ignore_keys, metric_key_prefix=metric_key_prefix)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.distillation is not None and self.distillation.teacher_column not in self._signature_columns:
            self._signature_columns.append(self.distillation.teacher_column)


class ElasticTrainer(ElasticTrainerMixin, Trainer):
    """Train a supernet with the Trainer of transformers; see :class:`ElasticTrainerMixin`.

    Example:
        >>> hf_elastic.ElasticTrainer(
        ...     supernet=supernet, sampling=hf_elastic.SandwichRule(seed=0), distill=True, args=args,
        train_dataset=train
        ... ).train()
    """
