"""Head fusion for the stock Trainer: heads of a supernet's blocks that write alike become one during training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from hf_elastic.blocks import Heads
from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.fusion import FusionMode, FusionReport, check_fusion, fuse_heads_, has_heads_to_fuse
from hf_elastic.head_similarity import Samples
from hf_elastic.streams import Batch
from hf_elastic.supernet import Supernet
from hf_elastic.training.callbacks import check_run

_RESTORES_ITSELF = (
    "HeadFusionCallback restores itself; leave restore_callback_states_from_checkpoint=False and pass the callback to "
    "the Trainer as in the first run"
)


class HeadFusionCallback(TrainerCallback, ExportableState):
    """Fuse heads that write alike at the end of an epoch, by the CKA head fusion of ELM (arXiv 2510.27037).

    Only slices are switched (and, unless ``mode="resplit"``, the heads that stay are written anew): parameters keep
    their shapes, so optimizer, DDP and checkpoints notice nothing; a subnet that is extracted has the smaller shapes.
    The optimizer's moments of heads that stay are kept. Those of heads that went may still move these, and a stock
    optimizer decays them: with ``SubnetSamplingCallback(..., freeze_inactive=True)`` they stay where they are.

        >>> supernet = hf_elastic.make_elastic(searched)  # one block per layer: what is trained further
        >>> fusion = hf_elastic.HeadFusionCallback(supernet, batches, mode="merge")
        >>> Trainer(model=supernet.model, callbacks=[fusion], args=args, train_dataset=train).train()
        >>> print(fusion.reports[-1])
        >>> small = hf_elastic.extract(supernet, supernet.space.largest())

    A resumed run goes on with the heads of its checkpoint, and ends as if it had not been interrupted; settings may be
    changed as long as nothing was fused. With ``load_best_model_at_end`` heads end as those of the best checkpoint,
    whose weights they belong to. Of a model with one block per layer the Trainer writes all weights and no heads: load
    such a checkpoint by resuming, and pass on what :func:`hf_elastic.extract` gives.

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
        every: Literal["epoch"] | int = "epoch",
        times: int = 1,
    ) -> None:
        if supernet is None:  # so the Trainer makes it anew where it is to restore callbacks; see state()
            raise TrainingError(_RESTORES_ITSELF)
        if not supernet.block_parts:
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
        check_run(self.supernet, args, model=kwargs["model"])
        self._check_length(args, state, kwargs["train_dataloader"])
        self._done, self._due = 0, False
        if not state.global_step:
            return
        self._restore(state)
        # A checkpoint of the last step of an epoch was written before the fusion that follows it. That waits until all
        # callbacks are restored.
        whole = math.floor((state.epoch or 0) + 1e-9) if self.every == "epoch" else 0
        self._due = self._done < min(self.times, whole)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fuse where an interrupted run could not any more."""
        self._make_up()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fuse, where a period of steps is over."""
        if self.every != "epoch" and state.global_step % int(self.every) == 0:
            self._fuse()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fuse, unless the run ends before the epoch does: what goes on from there is to fuse behind the whole."""
        ends = state.epoch is not None and math.isclose(state.epoch, round(state.epoch), rel_tol=0, abs_tol=1e-9)
        if self.every == "epoch" and (ends or not control.should_training_stop):
            self._fuse()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the heads that belong to the weights."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            self._make_up()
            return
        self._due = False
        if _together():
            torch.distributed.barrier()  # the first rank may be writing it
        self._restore(TrainerState.load_from_json(str(Path(state.best_model_checkpoint) / TRAINER_STATE_NAME)))

    def _settings(self) -> dict[str, Any]:
        names = ("mode", "threshold", "samples", "min_heads", "every", "times")
        named = {name: vars(self)[name] for name in names}
        return {**named, "blocks": [list(part.blocks) for part in self.supernet.block_parts]}

    def _check_length(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        if self.every != "epoch":
            length = int(self.every)
        elif has_length(loader):
            length = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
        else:
            raise TrainingError(
                "the data have no length, so a resumed run could not tell where an epoch ends; give a number of steps "
                "as every="
            )
        if state.max_steps < length:
            raise TrainingError(
                f"the run ends after {state.max_steps} steps, heads would be fused after {length}; train longer, or "
                "give fewer steps as every="
            )

    def _restore(self, state: TrainerState) -> None:
        stored: Any = state.stateful_callbacks or {}
        found = stored.get(type(self).__name__)
        if not isinstance(found, dict) or not found.get("attributes"):
            raise TrainingError(
                f"the checkpoint of step {state.global_step} does not say which heads are in use; resume from one that "
                "was written with this callback, or start again"
            )
        kept, ours = found["attributes"], self._settings()
        fixed = ours if kept["done"] else ("blocks",)  # what nothing was fused with yet may be another one
        if changed := [name for name in fixed if ours[name] != kept["settings"].get(name)]:
            name = changed[0]
            raise TrainingError(
                f"the checkpoint was fused with {name}={kept['settings'].get(name)!r}, this run says {ours[name]!r}; "
                "resume with the settings of the first run"
            )
        self._set_heads({(layer, block): heads for layer, block, heads in kept["heads"]})
        self._done = int(kept["done"])

    def _set_heads(self, stated: Mapping[tuple[int, str], Heads]) -> None:
        for part in self.supernet.block_parts:
            for block in part.blocks:
                if part.heads[block] != stated[part.index, block]:
                    part.set_heads(block, stated[part.index, block])
        self.supernet.resized()

    def _make_up(self) -> None:
        if self._due:
            self._due = False
            self._fuse()

    def _fuse(self) -> None:
        if self._done >= self.times or not has_heads_to_fuse(self.supernet):
            return
        options = {"mode": self.mode, "threshold": self.threshold, "samples": self.samples, "min_heads": self.min_heads}
        self.reports.append(fuse_heads_(self.supernet, self.batches, **options))  # type: ignore[arg-type]
        self._done += 1
        if _together():
            self._agree()

    def _agree(self) -> None:
        """Lets every rank have the heads and the weights of the first: rounding may differ between devices."""
        parts = self.supernet.block_parts
        stated: list[Any] = [{(part.index, block): part.heads[block] for part in parts for block in part.blocks}]
        torch.distributed.broadcast_object_list(stated, src=0)
        for parameter in (parameter for part in parts for parameter in part.layer.parameters()):
            torch.distributed.broadcast(parameter.detach(), src=0)
        self._set_heads(stated[0])


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
