"""What callbacks that act behind epochs, or every so many steps, share: when that is, and what a resume needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from hf_elastic.errors import TrainingError

Every = Literal["epoch"] | int


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
    """Return whether a period of steps is over with the step that just ended."""
    return every != "epoch" and state.global_step % int(every) == 0


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


def check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, fixed: Iterable[str], done: str) -> None:
    """Check that a run goes on with the settings that it was begun with.

    Args:
        ours, theirs: of this run and of the checkpoint.
        fixed: names of those that must be equal.
        done: what the checkpoint was, for the error.

    Raises:
        TrainingError: One differs.
    """
    if changed := [name for name in fixed if ours[name] != theirs.get(name)]:
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
