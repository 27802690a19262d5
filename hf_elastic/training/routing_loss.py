"""The loss of routers for the stock Trainer, where a subnet of a supernet is trained per step."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_elastic.errors import TrainingError
from hf_elastic.families import shifts_labels
from hf_elastic.supernet import Supernet
from hf_elastic.training.auxiliary import RouterTerm, RoutingLosses, forget_thresholds
from hf_elastic.training.periods import ReleasedCallback, require_sampling
from hf_elastic.training.router_files import load_beside, save_beside
from hf_elastic.training.targets import Distillation, LossContext, state_pairs
from hf_elastic.training.teacher import Teacher

_SUMMED = "num_items_in_batch"  # of whose labels the Trainer wants a mean over all micro-batches and ranks


class RoutingLoss(ReleasedCallback):
    """Compute what :class:`hf_elastic.ElasticTrainer` minimises, for the stock ``Trainer``: distillation and routers.

    The stock Trainer gives a loss function outputs and labels alone. Hooks on the model keep the inputs for the teacher
    and what the routers add, before the teacher runs; as a callback this object learns how many micro-batches a step
    has. So it is passed twice, and the subnets are drawn by a :class:`~hf_elastic.training.SubnetSamplingCallback`:

        >>> loss = hf_elastic.RoutingLoss(supernet)
        >>> sampling = hf_elastic.SubnetSamplingCallback(supernet, hf_elastic.RandomSubnet(seed=0))
        >>> Trainer(
        ...     model=supernet.model, args=args, train_dataset=train, compute_loss_func=loss, callbacks=[sampling, loss]
        ... ).train()

    In an evaluation it gives the loss of the labels. A ``PeftModel`` saves its adapters alone; the routers stand beside
    them in each checkpoint, and a resumed run reads them from ``output_dir``. The Trainer tells callbacks nothing about
    an exception, so one that leaves ``train()`` leaves the hooks on the model until the next ``train()``; use it as a
    context manager to take them off.

    Args:
        supernet: whose ``model`` the Trainer trains.
        distill: as for ElasticTrainer; by default the parent teaches, without labels:
            ``Distillation(teacher="parent", label_weight=0)``.
        routing: factors of the losses of routers.

    Raises:
        TrainingError: The arguments do not go together.
    """

    def __init__(
        self, supernet: Supernet, distill: Distillation | None = None, *, routing: RoutingLosses | None = None
    ) -> None:
        if not isinstance(supernet, Supernet):
            raise TrainingError(f"RoutingLoss takes the handle, Supernet(model), got a {type(supernet).__name__}")
        self.supernet = supernet
        self.distillation = distill or Distillation(teacher="parent", label_weight=0)
        if self.distillation.target == "relational":
            raise TrainingError("target='relational' looks into the models, which ElasticTrainer does; use that")
        self._teacher = Teacher(self.distillation, supernet)
        self._routers = RouterTerm(supernet, routing)
        self._hooks = ExitStack()
        self._args: TrainingArguments | None = None
        self._inputs: dict[str, Any] | None = None
        self._updates: int | None = None  # optimizer steps of an epoch, where its length is known
        self._rest, self._update, self._steps = 0, 0, 1

    def release(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()
        self._routers.forget()
        self._inputs = self._args = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run, and listen to the model.

        Raises:
            TrainingError: The teacher would change with training.
        """
        self.release()
        self._teacher.check()
        self._teacher.prepare(args.device)
        if state.global_step:
            load_beside(self.supernet, _checkpoint(args, state))
        forget_thresholds(self.supernet)
        self._args, loader = args, kwargs.get("train_dataloader")
        self._updates = None
        if has_length(loader):
            whole, self._rest = divmod(len(loader), args.gradient_accumulation_steps)
            self._updates = max(1, whole + bool(self._rest))
        model = self.supernet.model
        self._hooks.callback(model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True).remove)
        self._hooks.callback(model.register_forward_hook(self._routers.hear).remove)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out where in its epoch a resumed run goes on.

        Raises:
            TrainingError: Nothing draws subnets.
        """
        require_sampling(state)
        skipped = self._updates is not None and not args.ignore_data_skip
        self._update = state.global_step % self._updates if skipped and self._updates else 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the micro-batches of the step: the last one of an epoch may have fewer."""
        self._update += 1
        last = self._rest and self._update == self._updates
        self._steps = self._rest if last else args.gradient_accumulation_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write routers beside the adapters of a ``PeftModel``, whose checkpoints hold those alone."""
        if args.should_save:
            save_beside(self.supernet, _checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave nothing behind."""
        self.release()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_beside(self.supernet, state.best_model_checkpoint)

    def __call__(self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of a micro-batch; the Trainer's ``compute_loss_func``.

        Args:
            outputs: of the model.
            labels: of the micro-batch.
            num_items_in_batch: labels of all micro-batches of the step.

        Raises:
            TrainingError: The object is no callback of the run, or there is nothing to learn from.
        """
        plan = self.distillation
        if not torch.is_grad_enabled():
            hard = self._label_loss(outputs, labels, count=num_items_in_batch)
            if hard is None:
                raise TrainingError("an evaluation without labels has no loss here; use ElasticTrainer, or add labels")
            return hard
        if self._args is None or self._inputs is None:
            raise TrainingError(
                "RoutingLoss must see the steps of the run too; pass it as compute_loss_func=loss and in "
                "callbacks=[sampling, loss]"
            )
        inputs, self._inputs = self._inputs, None
        averaged = num_items_in_batch is not None and self._args.average_tokens_across_devices
        # What the Trainer will multiply by the number of ranks is divided by it here.
        steps = self._steps * (self._args.world_size if averaged else 1)
        hard = None
        if plan.label_weight or self._teacher.in_place:
            hard = self._label_loss(outputs, labels, count=num_items_in_batch, steps=steps)
        if self._teacher.in_place and hard is None:
            raise TrainingError(
                "the batch has no labels, so nothing can be learned; give Distillation(teacher='parent')"
            )
        if self._teacher.in_place and self.supernet.active == self.supernet.space.largest():
            assert hard is not None
            return self._routers.added_to(hard, divisor=steps)
        signal = plan.signal(outputs, inputs)
        with torch.autocast(self._args.device.type, dtype=torch.bfloat16, enabled=self._args.bf16):
            taught = self._teacher.signal(inputs)
        context = LossContext(
            inputs=inputs if labels is None else {**inputs, "labels": labels},
            pairs=state_pairs(self.supernet, self.supernet.active) if plan.target == "hidden_states" else None,
            shifted=shifts_labels(self.supernet.model),
            count=num_items_in_batch,
            steps=steps,
        )
        loss = plan.weight * plan.loss(signal, taught, context=context)
        loss = loss if hard is None else loss + plan.label_weight * hard
        return self._routers.added_to(loss, divisor=steps)

    def _keep_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the inputs of a forward that is trained, and ask it for what is compared."""
        if not (torch.is_grad_enabled() and module.training):
            return None
        self._inputs = {name: value for name, value in kwargs.items() if name not in ("labels", _SUMMED)}
        return args, {**kwargs, **self.distillation.forward_arguments}

    def _label_loss(self, outputs: Any, labels: Tensor | None, *, count: Any, steps: int = 1) -> Tensor | None:
        """The loss that the model itself has for labels, which the Trainer has kept from it."""
        if labels is None:  # a head with labels of other names has seen them
            found: Tensor | None = outputs.get("loss")
            return None if found is None else found / steps
        loss = label_loss(self.supernet.base, outputs["logits"], labels, count=count)
        return loss / steps if count is None else loss


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def label_loss(model: PreTrainedModel, logits: Tensor, labels: Tensor, *, count: Any = None) -> Tensor:
    """Return the loss of transformers for a model's kind of head.

    Args:
        model: with the head.
        logits: that it gave.
        labels: as the model would take them.
        count: divide the sum by this instead of by the number of labels.
    """
    function: Any = model.loss_function
    known = {
        "logits": logits,
        "pooled_logits": logits,
        "labels": labels,
        "vocab_size": getattr(model.config, "vocab_size", None),
        "config": model.config,
        _SUMMED: count,
    }
    takes = inspect.signature(function).parameters
    loss: Tensor = function(**{name: value for name, value in known.items() if name in takes or name == _SUMMED})
    return loss
