"""Run by test_resume.py in a process of its own: trains, and kills itself while it writes checkpoint-4."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tiny_training import bert_supernet, sentences, settings
from transformers import TrainingArguments

from hf_elastic.training import ElasticTrainer, SandwichRule


def elastic_trainer(output_dir: str, *, kind: type[ElasticTrainer] = ElasticTrainer) -> ElasticTrainer:
    """A run of 6 steps with dropout, accumulation, shuffling and decay, and a checkpoint every 2 steps."""
    args = TrainingArguments(
        **settings(
            output_dir, max_steps=6, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
        )
    )  # fmt: skip
    return kind(
        supernet=bert_supernet(skip=("mlp",), hidden_dropout_prob=0.2),
        sampling=SandwichRule(seed=3, random=1),
        distill=True,
        per="micro_batch",
        args=args,
        train_dataset=sentences(),
    )


class KilledWhileSaving(ElasticTrainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> Any:
        if self.state.global_step == 4:  # the weights of checkpoint-4 are written, nothing else is
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._save_optimizer_and_scheduler(output_dir)


if __name__ == "__main__":
    elastic_trainer(sys.argv[1], kind=KilledWhileSaving).train()
