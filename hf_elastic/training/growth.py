"""PCA growth for the stock Trainer: FFNs of a supernet's blocks get wider where their pre-activations need the room."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_elastic import costs
from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.models.elastic_blocks import sizes_in_use
from hf_elastic.supernet import Supernet
from hf_elastic.training.callbacks import check_precision
from hf_elastic.training.decay import check_restricted
from hf_elastic.training.pca import Normalisation, PreActivations, check_score_settings, pca_score
from hf_elastic.training.periods import (
    Every,
    ReleasedCallback,
    announce,
    best_state,
    check_restored,
    check_settings,
    ends_with_epoch,
    ends_with_step,
    period_length,
    require_sampling,
    restores_itself,
    stored_attributes,
    together,
    whole_epochs,
)
from hf_elastic.training.schedule import (
    Block,
    Check,
    GrowthHistory,
    GrowthPlan,
    check_budget,
    grown,
    growths_per_epoch,
)


class PCAGrowthCallback(ReleasedCallback, ExportableState):
    r"""Widen the FFNs of a supernet's candidate blocks during training, by the PCA growth of ELM (arXiv 2510.27037).

    Every ``calc_freq`` steps the pre-activations of the blocks that run are scored (:func:`pca_score`); after each
    whole epoch the blocks whose mean score is highest grow by ``step`` neurons each (:func:`grown`), until a uniformly
    drawn path has ``total_parameters`` parameters on average. Weights are allocated once, ``intermediate_size`` wide,
    and only the slice in use grows: optimizer, DDP and checkpoints never see a parameter change its shape, and what was
    not in use has not moved. The new neurons come as they were initialised.

    Use it beside a callback that samples (or in :class:`hf_elastic.ElasticTrainer`):

        >>> sampling = hf_elastic.SubnetSamplingCallback(supernet, hf_elastic.RandomSubnet(seed=0))
        >>> growth = hf_elastic.PCAGrowthCallback(supernet, total_parameters=15.7e6, step=132)
        >>> Trainer(model=supernet.model, callbacks=[sampling, growth], args=args, train_dataset=train).train()
        >>> growth.history.figure()

    A resumed run goes on with the widths, the scores, ``count`` and the history of its checkpoint, and grows as if it
    had not been interrupted. With ``load_best_model_at_end`` widths and history end as those of the best checkpoint,
    whose weights they belong to. A score is that of the step's global batch, whatever the number of ranks and of
    micro-batches.

    Where we differ from the code of the author's sibling paper: padding is left out unless ``include_padding``; the
    mean over paths is exact, not that of 1,000 draws; with ``check="block"`` the budget is looked at before each
    growth.

    Args:
        supernet: A supernet of candidate blocks.
        total_parameters: Budget of the mean path, counted as :func:`hf_elastic.costs.total_parameters` does for the
            model that is trained (the paper counts embeddings and layers, so a base model without its head).
        step: Neurons that a growth adds.
        count: Blocks that grow at a time, ``K``; by default :func:`growths_per_epoch` of the run's length, 21 at the
            paper's size.
        average_growths: How often a block grows on average, for the default ``count``.
        calc_freq: Optimizer steps from one measurement to the next.
        eta: Share of the variance that the counted directions explain.
        normalise: What their number is divided by: ``"min"`` of inputs and width, or the ``"width"``.
        include_padding: Whether padding counts as tokens.
        every: ``"epoch"``, or a number of optimizer steps, which data of unknown length need.
        check: When the budget is looked at, see :func:`grown`.

    Attributes:
        history: What grew when (:class:`~hf_elastic.training.schedule.GrowthHistory`).

    Raises:
        UnsupportedModelError: The supernet has no candidate blocks.
        TrainingError: An argument is not what is allowed.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        total_parameters: float,
        step: int,
        count: int | None = None,
        average_growths: float = 3,
        calc_freq: int = 30,
        eta: float = 0.99,
        normalise: Normalisation = "min",
        include_padding: bool = False,
        every: Every = "epoch",
        check: Check = "block",
    ) -> None:
        if supernet is None:  # so the Trainer makes it anew where it is to restore callbacks; see state()
            raise restores_itself("PCAGrowthCallback")
        if not isinstance(supernet, Supernet):
            raise TrainingError(
                f"blocks grow in a Supernet, got a {type(supernet).__name__}; make one of it by "
                "hf_elastic.make_elastic(model)"
            )
        if not supernet.block_parts or supernet.base.config.candidate_blocks is None:
            raise UnsupportedModelError(
                "only candidate blocks grow; make the supernet of a model whose config has candidate_blocks"
            )
        for name, value in {"step": step, "count": count, "calc_freq": calc_freq, "every": every}.items():
            open_to = {"count": None, "every": "epoch"}.get(name, ())
            if value != open_to and (type(value) is not int or value < 1):
                other = ", or 'epoch'" if name == "every" else ""
                raise TrainingError(f"{name}={value!r} must be an integer of at least 1{other}")
        number = isinstance(total_parameters, Real) and not isinstance(total_parameters, bool)
        if not number or not 1 < total_parameters < math.inf:
            raise TrainingError(
                f"total_parameters={total_parameters!r} must be a number of parameters above 1, no fraction; "
                "hf_elastic.spaces.elm_budget gives the published one"
            )
        self.supernet = supernet
        self.total_parameters, self.step, self.count = float(total_parameters), step, count
        self.average_growths, self.calc_freq, self.eta, self.normalise = average_growths, calc_freq, eta, normalise
        self.include_padding, self.every, self.check = include_padding, every, check
        self.history = GrowthHistory(self._widths(), self.total_parameters)
        self._parts = {part.index: part for part in supernet.block_parts}
        self._sums: dict[Block, list[float]] = {}
        self._batch: dict[Block, PreActivations] = {}
        self._count = 1 if count is None else count  # until the length of the run is known
        self._mask: Tensor | None = None
        self._read: dict[Block, int] = {}
        self._measuring = self._inside = self._due = self._restricted = False
        self._hooks = ExitStack()
        check_budget(self._plan({}, epoch=1))
        check_score_settings(eta=eta, normalise=normalise)

    @property
    def finished(self) -> bool:
        """Whether no block will grow any more: the budget is reached, or all are at their largest."""
        entries = self.history.entries
        return bool(entries) and entries[-1].reason in ("budget", "all at their largest")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: settings, history, and the scores since the last growth."""
        return {
            "args": {"supernet": None, "total_parameters": self.total_parameters, "step": self.step},
            "attributes": {
                "settings": self._settings(),
                "count": self._count,
                "history": self.history.to_dict(),
                "sums": [[layer, block, *values] for (layer, block), values in self._sums.items()],
            },
        }

    def release(self) -> None:
        """Take the hooks out of the model, as the end of ``train()`` does; for a run that raised."""
        self._hooks.close()
        self._measuring = self._inside = self._due = self._restricted = False
        self._mask = None
        self._batch.clear()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds, or begin a new history.

        Raises:
            TrainingError: The checkpoint was made without this callback or with other settings, an epoch cannot be told
                or is never measured in.
        """
        self.release()
        announce(self, state)
        check_precision(self.supernet)
        length = period_length(self.every, args, kwargs["train_dataloader"])
        periods = state.max_steps // length
        if state.global_step:
            self._restore(state)
            # It waits until all callbacks are restored.
            self._due = len(self.history.entries) < whole_epochs(self.every, state)
        else:
            self._sums = {}
            self._count = self._default_count(args, periods) if self.count is None else self.count
            self.history = GrowthHistory(self._widths(), self.total_parameters)
        self._check_measured(length, periods)
        self._listen()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Grow where an interrupted run could not any more.

        Raises:
            TrainingError: Fusion of the checkpoint would be undone.
        """
        check_restored(self.supernet, state)
        self._make_up(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure in this step, or not.

        Raises:
            TrainingError: Nothing samples paths, or the optimizer would decay neurons that are not in use.
        """
        if any(len(part.blocks) > 1 for part in self._parts.values()):
            require_sampling(state)
        optimizer = kwargs.get("optimizer")
        if optimizer is not None and not self._restricted:
            self._restricted = True
            check_restricted(optimizer)
        self._batch.clear()
        self._measuring = not self.finished and state.global_step % self.calc_freq == 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score what was measured, and grow where a period of steps is over."""
        if self._measuring:
            self._measuring = False
            self._score()
        if ends_with_step(self.every, state):
            self._grow(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Grow, unless the run ends before the epoch does: what goes on from there is to grow behind the whole."""
        if ends_with_epoch(self.every, state, control):
            self._grow(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the widths that belong to the weights, and leave nothing else behind in the model."""
        if (best := best_state(args, state)) is not None:
            self._restore(best)
        else:
            self._make_up(state)
        self.release()
        entries = self.history.entries
        if entries and not self.finished:
            warnings.warn(
                f"growth ended at {entries[-1].parameters_after:,.0f} parameters of the mean path, below the "
                f"{self.total_parameters:,.0f} asked for: {len(entries)} times {self._count} blocks are too few, so "
                "raise count= or average_growths=, or train longer",
                stacklevel=2,
            )

    def _settings(self) -> dict[str, Any]:
        names = ("total_parameters", "step", "count", "average_growths", "calc_freq", "eta", "normalise")
        named = {name: vars(self)[name] for name in (*names, "include_padding", "every", "check")}
        return {**named, "blocks": [list(part.blocks) for part in self.supernet.block_parts]}

    def _default_count(self, args: TrainingArguments, periods: int) -> int:
        if self.every == "epoch" and args.max_steps > 0:
            raise TrainingError(
                "max_steps leaves the number of epochs open, on which the default count depends; give count=, or a "
                "number of steps as every="
            )
        parts = self.supernet.block_parts
        return growths_per_epoch(
            len(parts), len(parts[0].blocks), max(1, periods), average_growths=self.average_growths
        )

    def _check_measured(self, length: int, periods: int) -> None:
        """Refuse a run without a whole period, or of which some period, still to come, has no step that is measured."""
        if not periods:
            raise TrainingError(
                f"the run ends before its first {length} steps, behind which blocks are to grow; give a smaller number "
                "of steps as every=, or train longer"
            )
        for number in range(len(self.history.entries), 0 if self.finished else periods):
            start, end = number * length, (number + 1) * length
            if -(-start // self.calc_freq) * self.calc_freq >= end:
                raise TrainingError(
                    f"calc_freq={self.calc_freq} measures in none of the steps {start} to {end - 1}, behind which "
                    f"blocks are to grow; {length} and less measure each time"
                )

    def _restore(self, state: TrainerState) -> None:
        lacks = "holds no growth history, so the widths that it was trained with are not known"
        stored, ours = stored_attributes(self, state, lacks=lacks), self._settings()
        check_settings(ours, stored["settings"], fixed=ours, done="grown")
        self.history, self._count = GrowthHistory.from_dict(stored["history"]), int(stored["count"])
        self._sums = {(layer, block): [total, count] for layer, block, total, count in stored["sums"]}
        self._set_widths(self.history.widths())

    def _widths(self) -> dict[Block, int]:
        return {(part.index, block): part.width(block) for part in self.supernet.block_parts for block in part.blocks}

    def _set_widths(self, widths: Mapping[Block, int]) -> None:
        for (layer, block), width in widths.items():
            if self._parts[layer].width(block) != width:
                self._parts[layer].set_width(block, width)
        self.supernet.resized()

    def _plan(self, scores: Mapping[Block, float], *, epoch: int) -> GrowthPlan:
        return GrowthPlan(
            widths=self._widths(),
            scores=scores,
            epoch=epoch,
            step=self.step,
            largest={(index, b): part.allocated(b) for index, part in self._parts.items() for b in part.blocks},
            count=self._count,
            budget=self.total_parameters,
            parameters=lambda layer, block, width: self._parts[layer].parameters_at(block, width),
            constant=costs.parameters_outside_blocks(self.supernet),
            check=self.check,
        )

    def _make_up(self, state: TrainerState) -> None:
        if self._due:
            self._due = False
            self._grow(state)

    def _grow(self, state: TrainerState) -> None:
        if self.finished:
            return
        scores = {block: total / count for block, (total, count) in sorted(self._sums.items())}
        plan = self._plan(scores, epoch=len(self.history.entries) + 1)
        made = grown(plan)
        if made.reason == "no measured block is left":
            warnings.warn(
                f"{len(scores)} of {len(plan.widths)} blocks were measured since the last growth, and the others could "
                "not grow; measure more often (calc_freq=)",
                stacklevel=2,
            )
        self.history.record(plan, made, step=state.global_step)
        self._sums = {}
        self._set_widths(made.widths)

    def _listen(self) -> None:
        """Put hooks on the model: some that see each forward begin, with its mask, and end, and one on each FFN."""

        def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            mask = named.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 and not self.include_padding else None
            self._inside, self._read = True, {}

        def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._inside = False

        base = self.supernet.base
        self._hooks.callback(base.register_forward_pre_hook(begin, with_kwargs=True).remove)
        self._hooks.callback(base.register_forward_hook(end, always_call=True).remove)
        for part in self._parts.values():
            for block in part.blocks:
                projection = part.projection(block, part.roles.ffn_in)
                self._hooks.callback(projection.register_forward_hook(self._hook((part.index, block))).remove)

    def _hook(self, key: Block) -> Any:
        def measure(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # What is computed outside of a forward is so a second time: checkpointed activations, for a backward pass.
            if not (self._measuring and self._inside and module.training):
                return
            start = self._read.get(key, 0)  # an FFN may take its tokens in chunks
            self._read[key] = stop = start + output.shape[1]
            if key not in self._batch:
                self._batch[key] = PreActivations(output.shape[-1], device=output.device)
            self._batch[key].add(output, None if self._mask is None else self._mask[:, start:stop])

        return measure

    def _score(self) -> None:
        """Add the scores of the step's global batch."""
        measured = sorted(self._batch.items())
        several = together()
        for (layer, block), moments in measured:
            if several:
                for tensor in moments.tensors().values():
                    torch.distributed.all_reduce(tensor)
            if moments.tokens < 2:
                continue
            part = self._parts[layer]
            _, inputs = sizes_in_use(part.projection(block, part.roles.ffn_in))
            found = pca_score(moments, inputs=inputs, eta=self.eta, normalise=self.normalise)
            score = torch.tensor(found, dtype=torch.float64, device=moments.device)
            if several:  # rounding may differ between devices
                torch.distributed.broadcast(score, src=0)
            total = self._sums.setdefault((layer, block), [0.0, 0])
            total[0] += float(score)
            total[1] += 1
        self._batch.clear()
