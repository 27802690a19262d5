"""What callbacks that act behind epochs, or every so many steps, share: when that is, and what a resume needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from hf_elastic.errors import TrainingError
from hf_elastic.supernet import Supernet
from hf_elastic.training.schedule import GrowthHistory

_PRESENT, _SAMPLES = "_hf_elastic_present", "samples subnets"  # attribute of the state of a run, and one of its words

Every = Literal["epoch"] | int


class ReleasedCallback(TrainerCallback):
    """A callback that leaves something on the model inside a run, and takes it off as a context manager.

    The Trainer tells callbacks nothing about an exception that leaves ``train()``.
    """

    def release(self) -> None:
        """Leave nothing behind."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def restores_itself(name: str) -> TrainingError:
    """The error of a callback that the Trainer would make anew to restore it."""
    return TrainingError(
        f"{name} restores itself; leave restore_callback_states_from_checkpoint=False and pass the callback to the "
        "Trainer as in the first run"
    )


def period_length(every: Every, args: TrainingArguments, loader: Any) -> int:
    """Return the optimizer steps of a period.

    Args:
        every: ``"epoch"``, or a number of steps.
        args: of the Trainer.
        loader: its training batches.

    Raises:
        TrainingError: An epoch is asked for of data that have no length.
    """
    if every != "epoch":
        return int(every)
    if not has_length(loader):
        raise TrainingError(
            "the data have no length, so a resumed run could not tell where an epoch ends; give a number of steps as "
            "every="
        )
    return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))


def whole_epochs(every: Every, state: TrainerState) -> int:
    """Return the epochs that ended before a checkpoint; 0 where periods are of steps.

    A checkpoint of the last step of an epoch was written before what follows the epoch.
    """
    return math.floor((state.epoch or 0) + 1e-9) if every == "epoch" else 0


def ends_with_step(every: Every, state: TrainerState) -> bool:
    """Return whether a period of steps is over with the step that just ended, unless that is one too many."""
    return every != "epoch" and state.global_step % int(every) == 0 and state.global_step <= state.max_steps


def ends_with_epoch(every: Every, state: TrainerState, control: TrainerControl) -> bool:
    """Return whether a period is over with an epoch: not where the run stops before the epoch does."""
    whole = state.epoch is not None and math.isclose(state.epoch, round(state.epoch), rel_tol=0, abs_tol=1e-9)
    return every == "epoch" and (whole or not control.should_training_stop)


def stored_attributes(callback: TrainerCallback, state: TrainerState, *, lacks: str) -> dict[str, Any]:
    """Return what a checkpoint keeps of a callback.

    Args:
        callback: whose class names it.
        state: of the checkpoint.
        lacks: what is not known without it, for the error.

    Raises:
        TrainingError: It keeps nothing.
    """
    stored: Any = state.stateful_callbacks or {}
    found = stored.get(type(callback).__name__)
    if not isinstance(found, dict) or not found.get("attributes"):
        raise TrainingError(
            f"the checkpoint of step {state.global_step} {lacks}; resume from one that was written with this callback, "
            "or start again"
        )
    attributes: dict[str, Any] = found["attributes"]
    return attributes


def announce(callback: TrainerCallback, state: TrainerState, *, samples: bool = False) -> None:
    """Let the others know that a callback is in the run, and restores what is its own.

    Args:
        callback: that begins.
        state: of the run, which ends with it.
        samples: whether it draws the subnets of steps.
    """
    vars(state).setdefault(_PRESENT, set()).update({type(callback).__name__, *([_SAMPLES] if samples else [])})


def require_sampling(state: TrainerState) -> None:
    """Check that a callback of the run draws the subnets of steps.

    Raises:
        TrainingError: None does.
    """
    if _SAMPLES not in vars(state).get(_PRESENT, ()):
        raise TrainingError(
            "nothing samples subnets here, so the largest alone would be trained; add a SubnetSamplingCallback beside "
            "this one, or use ElasticTrainer"
        )


def check_restored(supernet: Supernet, state: TrainerState) -> None:
    """Check that blocks have the sizes of the checkpoint that a run goes on from, once all callbacks have begun.

    The Trainer loads weights alone: without the callback that made them, widths and heads would silently be those that
    the model was made with.

    Args:
        supernet: that is trained.
        state: of the run.

    Raises:
        TrainingError: The checkpoint was grown or fused, the model is not, and nothing in the run restores that.
    """
    present, stored = vars(state).get(_PRESENT, set()), cast(dict[str, Any], state.stateful_callbacks or {})
    for name, kept in stored.items():
        attributes = kept.get("attributes") if isinstance(kept, dict) and name not in present else None
        if not isinstance(attributes, dict) or not supernet.block_parts:
            continue
        differ = None
        if "history" in attributes:
            widths = {(part.index, block): part.width(block) for part in supernet.block_parts for block in part.blocks}
            differ = "grown" if GrowthHistory.from_dict(attributes["history"]).widths() != widths else None
        elif attributes.get("done") and "heads" in attributes:
            differ = None if _has_heads(supernet, attributes["heads"]) else "fused"
        if differ:
            raise TrainingError(
                f"the checkpoint of step {state.global_step} was {differ} by {name}, which this run has not, so that "
                f"would be undone; add {name} with the settings of the first run"
            )


def _has_heads(supernet: Supernet, stated: Iterable[tuple[int, str, Any]]) -> bool:
    found = {(layer, block): heads for layer, block, heads in stated}
    for part in supernet.block_parts:
        for block in part.blocks:
            heads, split = found.get((part.index, block)), part.shape_of(block).num_attention_heads
            if heads not in (part.heads[block], split if isinstance(heads, int) else None):
                return False
    return True


def check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, fixed: Iterable[str], done: str) -> None:
    """Check that a run goes on with the settings that it was begun with.

    Args:
        ours, theirs: of this run and of the checkpoint.
        fixed: names of those that must be equal.
        done: what the checkpoint was, for the error.

    Raises:
        TrainingError: One differs.
    """
    changed = [name for name in fixed if ours[name] != theirs.get(name)]
    if "blocks" in changed:
        theirs_first, ours_first = (", ".join((given.get("blocks") or [[]])[0]) for given in (theirs, ours))
        raise TrainingError(
            f"the checkpoint holds {len(theirs.get('blocks') or ())} layers of {theirs_first}, this supernet "
            f"{len(ours['blocks'])} of {ours_first}; resume with the supernet of the first run"
        )
    if changed:
        name = changed[0]
        raise TrainingError(
            f"the checkpoint was {done} with {name}={theirs.get(name)!r}, this run says {ours[name]!r}; resume with "
            "the settings of the first run"
        )


def best_state(args: TrainingArguments, state: TrainerState) -> TrainerState | None:
    """Return the state of the checkpoint whose weights the Trainer has loaded at the end, if it has."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    if together():
        torch.distributed.barrier()  # the first rank may be writing it
    return TrainerState.load_from_json(str(Path(state.best_model_checkpoint) / TRAINER_STATE_NAME))


def together() -> bool:
    """Return whether several processes train one model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
