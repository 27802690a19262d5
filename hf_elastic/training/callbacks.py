"""Subnet sampling for the stock Trainer, and the checks that every elastic training run starts with."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_elastic.errors import ActivationError, TrainingError
from hf_elastic.supernet import Supernet
from hf_elastic.training.decay import ActiveSliceStep
from hf_elastic.training.overrun import Overrun
from hf_elastic.training.periods import ReleasedCallback, announce, check_restored
from hf_elastic.training.preparation import KeptCache
from hf_elastic.training.sampling import SamplingRule

Period = Literal["step", "micro_batch"]


class SubnetSamplingCallback(ReleasedCallback):
    """Train one subnet of a supernet per optimizer step (or per micro-batch) with the stock ``Trainer``.

    Inside a step the drawn subnet is active; outside (evaluation, saving, logging) the largest is. Weight
    decay acts on the slices that were active since the last step only, see
    :class:`~hf_elastic.training.decay.ActiveSliceStep`.

    The stock Trainer tells callbacks nothing about an exception, so one that leaves ``train()`` inside a step
    leaves the drawn subnet active. Use the callback as a context manager, or call :meth:`release`:

        >>> sampling = hf_elastic.SubnetSamplingCallback(supernet, hf_elastic.RandomSubnet(seed=0))
        >>> with sampling:
        ...     Trainer(model=supernet.model, callbacks=[sampling], args=args, train_dataset=train).train()

    A later ``train()`` with the same callback releases first. :class:`hf_elastic.ElasticTrainer` needs none
    of this.

    Args:
        supernet: whose ``model`` the Trainer trains.
        rule: which subnet a step runs.
        per: ``"step"``: one subnet for all micro-batches of an optimizer step; ``"micro_batch"``: one for
            each.
        freeze_inactive: whether entries that no subnet of the step used keep their value; otherwise the
            optimizer's momentum may still move those that were used earlier.

    Raises:
        TrainingError: The rule draws several subnets per step, or ``per`` is neither of the two.
    """

    def __init__(
        self, supernet: Supernet, rule: SamplingRule, *, per: Period = "step", freeze_inactive: bool = False
    ) -> None:
        if rule.subnets != 1:
            raise TrainingError(
                f"{type(rule).__name__} runs {rule.subnets} subnets per step, the stock Trainer one; "
                "use ElasticTrainer(supernet=..., sampling=...)"
            )
        self.supernet = supernet
        self.rule = rule
        self.per = checked_period(per)
        self._slices = ActiveSliceStep(supernet, freeze_inactive=freeze_inactive)
        self._overrun = Overrun()
        self._cache = KeptCache(supernet.base.config)
        self._active = ExitStack()
        self._micro_step = 0

    def release(self) -> None:
        """Make active what was active before the step, and undo what a step that did not end left behind."""
        self._active.close()
        self._slices.release()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run.

        Raises:
            TrainingError: The run would break a promise.
        """
        self.release()
        self._overrun = Overrun()
        announce(self, state, samples=True)
        check_run(self.supernet, args, model=kwargs["model"])
        self._slices.start(kwargs["optimizer"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what a resumed run goes on from, after all callbacks have restored what is theirs.

        Raises:
            TrainingError: Growth or fusion of the checkpoint would be undone.
        """
        check_restored(self.supernet, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Activate the subnet of this step."""
        self._slices.forget()
        self._micro_step = 0
        self._switch(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Activate the subnet of the next micro-batch."""
        self._micro_step += 1
        if self.per == "micro_batch":
            self._switch(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply weight decay to the active slices."""
        if not self._overrun.before_step(state, kwargs["optimizer"]):
            self._slices.before_step(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the optimizer's settings and the frozen slices."""
        self._slices.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the largest subnet active again, before anything is evaluated or saved."""
        self._active.close()
        self._overrun.after_step(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let nothing be saved or evaluated of a step behind the last one."""
        self._overrun.after_step(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave nothing behind."""
        self.release()
        self._cache.restore()
        check_restored(self.supernet, state)  # a run that was over when it was resumed has no epoch

    def _switch(self, state: TrainerState) -> None:
        self._active.close()
        (architecture,) = self.rule.draw(self.supernet.space, state.global_step, self._micro_step)
        self._active.enter_context(self.supernet.activate(architecture))
        self._slices.record()


def checked_period(per: str) -> Period:
    """Return ``per`` if it is a period.

    Raises:
        TrainingError: It is not.
    """
    if per in ("step", "micro_batch"):
        return per  # type: ignore[return-value]
    raise TrainingError(f"per={per!r} is unknown; allowed: 'step', 'micro_batch'")


def check_run(supernet: Supernet, args: TrainingArguments, *, model: nn.Module | None) -> None:
    """Check that a Trainer can keep the promises of elastic training.

    Raises:
        TrainingError: It cannot; the message says why and what to do.
    """
    if model is None or not any(module is supernet.model for module in model.modules()):
        raise TrainingError(
            f"the Trainer trains a {type(model).__name__} that does not hold the supernet; pass model=supernet.model "
            "(where it holds an adapted transformer, as a SentenceTransformer does: supernet=Supernet(model))"
        )
    _check_adapters(supernet)
    if supernet.active != supernet.space.largest():
        raise TrainingError(
            f"training starts while {supernet.active} is active; leave activate(...), or undo set_capacity and "
            "set_active by set_active(supernet.space.largest()), so that the largest is active outside of steps"
        )
    _check_routers(supernet)
    _check_trainable(supernet)
    if args.n_gpu > 1:
        raise TrainingError(
            f"nn.DataParallel over {args.n_gpu} GPUs runs the model in threads, which no handle can switch; "
            "launch one process per GPU with torchrun"
        )
    if args.deepspeed or args.fsdp:
        kind = "DeepSpeed" if args.deepspeed else "FSDP"
        raise TrainingError(f"{kind} shards parameters, so that decay cannot follow active slices; use DDP")
    if _asked_for_fsdp() and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise TrainingError(
            "accelerate was told to use FSDP (ACCELERATE_USE_FSDP), but the parameters are whole: on a CPU it trains "
            "DDP without a word; launch without FSDP, or shard by torch's fully_shard in a loop of your own"
        )
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        _check_distributed(supernet, args, model=model)


def _asked_for_fsdp() -> bool:
    """Whether ``accelerate launch`` was, by its options or its file of settings."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on")


def _check_adapters(supernet: Supernet) -> None:
    """Check that the Trainer itself added no adapter, which the handle does not know."""
    try:
        with supernet.activate(supernet.active):
            pass
    except ActivationError as error:
        raise TrainingError(
            f"{error} (adapters come before the supernet: add_lora(model, ...) instead of peft_config=; DPOTrainer "
            "adds one named 'ref' unless it is given a ref_model=)"
        ) from error


def _check_routers(supernet: Supernet) -> None:
    """Check that no router is frozen where it started, as ``get_peft_model`` leaves it: all but adapters are frozen."""
    for part in supernet.router_parts:
        for kind in part.routers:
            if not any(p.requires_grad or bool(p.any()) for p in part.routers[kind].scores.parameters()):
                raise TrainingError(
                    f"the router of {kind} in layer {part.layer.index} is frozen and was never trained (get_peft_model "
                    "freezes all but its adapters); call hf_elastic.train_routers(model)"
                )


def _check_trainable(supernet: Supernet) -> None:
    """Check that every subnet has something to train, since a backward pass without it raises."""
    with supernet.activate(supernet.space.smallest()):
        regions = supernet.active_regions()
    trained = [name for name, parameter in supernet.model.named_parameters() if parameter.requires_grad]
    check_precision(supernet)
    if not trained:
        raise TrainingError(
            "the model is frozen, no parameter requires a gradient; load adapters with is_trainable=True, or call "
            "requires_grad_()"
        )
    if all(regions.get(name) == () for name in trained):
        raise TrainingError(
            "the smallest subnet skips all that is trained, so nothing of its step could be learned; let skip= and "
            "num_hidden_layers= leave a layer with an adapter, or train another module too (modules_to_save)"
        )


def check_precision(supernet: Supernet) -> None:
    """Check that no weight in float16 is trained: steps are lost in its rounding, and its second moments are zeros.

    Raises:
        TrainingError: One is.
    """
    for name, parameter in supernet.model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} is in float16, in which weights cannot be trained: call model.float() first (bf16=True in the "
                "TrainingArguments still computes in half precision), or train adapters alone"
            )


def _check_distributed(supernet: Supernet, args: TrainingArguments, *, model: nn.Module) -> None:
    """Check that DDP does not wait for the gradients of skipped layers, which never come."""
    find_unused = args.ddp_find_unused_parameters
    if find_unused is None:  # then the Trainer looks for them unless activations are checkpointed
        find_unused = not any(vars(module).get("gradient_checkpointing") for module in model.modules())
    if find_unused:
        return
    for architecture in (supernet.space.smallest(), supernet.space.largest()):  # which bypasses all routers
        with supernet.activate(architecture):
            skipped = [name for name, boxes in supernet.active_regions().items() if not boxes]
        if skipped:
            raise TrainingError(
                f"the space skips layers or routers, so DDP would wait for gradients of {skipped[0]!r}; "
                "set TrainingArguments(ddp_find_unused_parameters=True)"
            )
