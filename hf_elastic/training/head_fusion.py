"""Head fusion for the stock Trainer: heads of a supernet's blocks that write alike become one during training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_elastic.blocks import Heads
from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.fusion import (
    FusionMode,
    FusionReport,
    check_fusion,
    fuse_heads_,
    has_heads_to_fuse,
    silence_heads_out_of_use,
    state_heads,
)
from hf_elastic.head_similarity import Samples
from hf_elastic.streams import Batch
from hf_elastic.supernet import Supernet
from hf_elastic.training.callbacks import check_run
from hf_elastic.training.periods import (
    Every,
    announce,
    best_state,
    check_restored,
    check_settings,
    ends_with_epoch,
    ends_with_step,
    period_length,
    restores_itself,
    stored_attributes,
    together,
    whole_epochs,
)


class HeadFusionCallback(TrainerCallback, ExportableState):
    """Fuse heads that write alike at the end of an epoch, by the CKA head fusion of ELM (arXiv 2510.27037).

    Only slices are switched (and, unless ``mode="resplit"``, the heads that stay are written anew): parameters keep
    their shapes, so optimizer, DDP and checkpoints notice nothing; a subnet that is extracted has the smaller shapes.
    The optimizer's moments of heads that stay are kept. Heads that went are held silent: what their output projection
    holds of them is zero after every step, whatever momentum an optimizer keeps, so that all the weights together, as
    ``save_pretrained`` and the Trainer write them, compute what the model computes. Into how many heads weights were
    split anew stands in the config.

    A supernet with candidates needs a callback that samples beside this one; a model with one block per layer needs
    none.

        >>> supernet = hf_elastic.make_elastic(searched)  # one block per layer: what is trained further
        >>> fusion = hf_elastic.HeadFusionCallback(supernet, batches, mode="merge")
        >>> Trainer(model=supernet.model, callbacks=[fusion], args=args, train_dataset=train).train()
        >>> print(fusion.reports[-1])
        >>> small = hf_elastic.extract(supernet, supernet.space.largest())

    A resumed run goes on with the heads of its checkpoint, and ends as if it had not been interrupted; settings may be
    changed as long as nothing was fused. With ``load_best_model_at_end`` heads end as those of the best checkpoint,
    whose weights they belong to. A run that would go on from such a checkpoint without this callback is refused where a
    callback of hf_elastic is in it.

    Where fewer than ``min_heads`` would be left, so many stay, and a warning says where.

    Args:
        supernet: A supernet of blocks, with candidates or with one block per layer.
        batches: What CKA is measured on, see :func:`hf_elastic.fusion.fuse_heads_`; held on every rank.
        mode, threshold, samples, min_heads: As there.
        every: ``"epoch"`` (a whole one), or a number of optimizer steps, which data of unknown length need.
        times: How often heads are fused; afterwards, or when every block has one head, the callback does nothing.

    Attributes:
        reports: What each fusion of this process did.

    Raises:
        UnsupportedModelError: The supernet is not of blocks, or no block has two heads.
        TrainingError: ``every`` or ``times`` is not what is allowed.
        CompressionError, DataError: Another argument is not, as for :func:`hf_elastic.fusion.fuse_heads_`.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[Batch],
        *,
        mode: FusionMode = "merge",
        threshold: float = 0.9,
        samples: Samples = "tokens",
        min_heads: int = 2,
        every: Every = "epoch",
        times: int = 1,
    ) -> None:
        if supernet is None:  # so the Trainer makes it anew where it is to restore callbacks; see state()
            raise restores_itself("HeadFusionCallback")
        if isinstance(supernet, Supernet) and not supernet.block_parts:
            raise UnsupportedModelError(
                "heads are fused in supernets of blocks (elastic_bert, elastic_gpt2); of an elastic stock model "
                "extract a subnet and call hf_elastic.fuse_heads"
            )
        counts = [times] if every == "epoch" else [every, times]
        if any(type(number) is not int or number < 1 for number in counts):
            raise TrainingError(
                f"every={every!r} must be 'epoch' or a number of steps, and times={times!r} a number, at least 1"
            )
        self.supernet = supernet
        self.batches = check_fusion(
            supernet, batches, mode=mode, threshold=threshold, samples=samples, min_heads=min_heads
        )
        self.mode, self.threshold, self.samples, self.min_heads = mode, threshold, samples, min_heads
        self.every, self.times = every, times
        self.reports: list[FusionReport] = []
        self._done = 0
        self._due = False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: settings, and which heads are in use."""
        heads = [[part.index, block, part.heads[block]] for part in self.supernet.block_parts for block in part.blocks]
        return {
            "args": {"supernet": None, "batches": None},
            "attributes": {"settings": self._settings(), "heads": heads, "done": self._done},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds.

        Raises:
            TrainingError: The checkpoint was made without this callback or with other settings, an epoch cannot be told
                or does not end before the run does, or the Trainer cannot train a supernet.
        """
        announce(self, state)
        check_run(self.supernet, args, model=kwargs["model"])
        self._check_length(args, state, kwargs["train_dataloader"])
        self._done, self._due = 0, False
        if not state.global_step:
            return
        self._restore(state)
        # It waits until all callbacks are restored.
        self._due = self._done < min(self.times, whole_epochs(self.every, state))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fuse where an interrupted run could not any more.

        Raises:
            TrainingError: Growth of the checkpoint would be undone.
        """
        check_restored(self.supernet, state)
        self._make_up()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold silent what writes nothing any more."""
        silence_heads_out_of_use(self.supernet)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fuse, where a period of steps is over."""
        if ends_with_step(self.every, state):
            self._fuse()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fuse, unless the run ends before the epoch does: what goes on from there is to fuse behind the whole."""
        if ends_with_epoch(self.every, state, control):
            self._fuse()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the heads that belong to the weights."""
        if (best := best_state(args, state)) is None:
            self._make_up()
            return
        self._due = False
        self._restore(best)

    def _settings(self) -> dict[str, Any]:
        names = ("mode", "threshold", "samples", "min_heads", "every", "times")
        named = {name: vars(self)[name] for name in names}
        return {**named, "blocks": [list(part.blocks) for part in self.supernet.block_parts]}

    def _check_length(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        length = period_length(self.every, args, loader)
        if state.max_steps < length:
            raise TrainingError(
                f"the run ends after {state.max_steps} steps, heads would be fused after {length}; train longer, or "
                "give fewer steps as every="
            )

    def _restore(self, state: TrainerState) -> None:
        kept, ours = stored_attributes(self, state, lacks="does not say which heads are in use"), self._settings()
        fixed = ours if kept["done"] else ("blocks",)  # what nothing was fused with yet may be another one
        check_settings(ours, kept["settings"], fixed=fixed, done="fused")
        self._set_heads({(layer, block): heads for layer, block, heads in kept["heads"]})
        self._done = int(kept["done"])

    def _set_heads(self, stated: Mapping[tuple[int, str], Heads]) -> None:
        for part in self.supernet.block_parts:
            for block in part.blocks:
                if part.heads[block] != stated[part.index, block]:
                    part.set_heads(block, stated[part.index, block])
        self.supernet.resized()
        state_heads(self.supernet)

    def _make_up(self) -> None:
        if self._due:
            self._due = False
            self._fuse()

    def _fuse(self) -> None:
        if self._done >= self.times or not has_heads_to_fuse(self.supernet):
            return
        options = {"mode": self.mode, "threshold": self.threshold, "samples": self.samples, "min_heads": self.min_heads}
        report = fuse_heads_(self.supernet, self.batches, too_few="stop", **options)  # type: ignore[arg-type]
        if report.stopped:
            warnings.warn(f"head fusion {report.stopped}; raise threshold=, or lower min_heads=", stacklevel=2)
        self.reports.append(report)
        self._done += 1
        if together():
            self._agree()

    def _agree(self) -> None:
        """Lets every rank have the heads and the weights of the first: rounding may differ between devices."""
        parts = self.supernet.block_parts
        stated: list[Any] = [{(part.index, block): part.heads[block] for part in parts for block in part.blocks}]
        torch.distributed.broadcast_object_list(stated, src=0)
        for parameter in (parameter for part in parts for parameter in part.layer.parameters()):
            torch.distributed.broadcast(parameter.detach(), src=0)
        self._set_heads(stated[0])
