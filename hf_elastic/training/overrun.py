"""The step too many of a run that was over when it was resumed, and that nothing comes of it."""

from __future__ import annotations

import torch
from transformers import TrainerControl, TrainerState


class Overrun:
    """Makes nothing of a step behind the last one.

    The Trainer holds what it did against ``max_steps`` behind each step only: a run of 5 steps that was killed behind
    checkpoint-5 and is resumed from there, in the middle of an epoch, would do a sixth. (:class:`ElasticTrainer` begins
    no step then.)
    """

    def __init__(self) -> None:
        self._over = False
        self._epoch = 0.0

    def before_step(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer's step is one too many; take the gradients away if so, that nothing moves."""
        if state.global_step >= state.max_steps:
            self._over, self._epoch = True, state.epoch
            optimizer.zero_grad()
        return self._over

    def after_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Leave the state of the run as it was resumed, and let nothing be saved, evaluated or logged of it."""
        if self._over:
            state.global_step, state.epoch = state.max_steps, self._epoch
            control.should_training_stop = True
            control.should_save = control.should_evaluate = control.should_log = False
