"""What a recovery can be asked for, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from hf_elastic.errors import TrainingError
from hf_elastic.training.targets import Distillation

if TYPE_CHECKING:
    from hf_elastic.adapters import Lora

_SAVES = 5
_LOGS = 20
_OURS = {
    "output_dir": "output=", "max_steps": "steps=", "num_train_epochs": "steps=", "learning_rate": "learning_rate=",
    "per_device_train_batch_size": "batch_size=", "seed": "seed=", "data_seed": "seed=",
    "train_sampling_strategy": None, "remove_unused_columns": None, "save_strategy": None, "label_names": None,
    "eval_strategy": None, "label_smoothing_factor": None, "auto_find_batch_size": None, "save_only_model": None,
    "use_cache": None,
}  # fmt: skip
_UNTIMED = ("gradient_checkpointing", "activation_checkpointing", "torch_compile")
_COSMETIC = ("disable_tqdm", "report_to", "logging_steps", "run_name", "save_steps", "save_total_limit")
_PLAN = (
    "target", "weight", "label_weight", "temperature", "divergence", "pooling", "relational_weight", "state_distance",
)  # fmt: skip
_PLAIN = ("minutes", "steps", "cache", "top_k", "freeze_embeddings", "batch_size", "learning_rate", "seed")


@dataclass(frozen=True)
class RecoverSettings:
    """Everything a recovery can be asked for; see :func:`hf_elastic.repair.recovery.recover`.

    Raises:
        TrainingError: a setting is out of range, or two do not go together.
    """

    plan: Distillation
    output: Path
    minutes: float | None
    steps: int | None
    lora: Lora | None
    cache: bool
    top_k: int | None
    kept_layers: tuple[int, ...] | None
    freeze_embeddings: bool
    batch_size: int
    learning_rate: float
    seed: int
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise TrainingError(f"give either minutes= or steps=, got minutes={self.minutes!r}, steps={self.steps!r}")
        for name in ("minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise TrainingError(f"{name}={value!r} must be a number above 0")
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise TrainingError(f"{name}={value!r} must be an integer of at least {least}")
        if ours := next((name for name in self.arguments if name in _OURS), None):
            cure = f"pass {_OURS[ours]}" if _OURS[ours] else "leave it out"
            raise TrainingError(f"arguments={{{ours!r}: ...}} is not for recover(), or is set by it; {cure}")
        slower = next((name for name in _UNTIMED if self.arguments.get(name)), None)
        if self.minutes is not None and slower:
            raise TrainingError(f"steps are timed without {slower}; give steps= instead of minutes=")
        self._check_target()

    def _check_target(self) -> None:
        if self.cache and self.plan.target == "logits" and self.plan.divergence == "mse":
            raise TrainingError("divergence='mse' compares all logits, which are not kept; pass cache=False")
        if self.top_k is not None and not (self.cache and self.plan.target == "logits"):
            raise TrainingError(f"top_k={self.top_k!r} is for cached logits; leave it out")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise TrainingError(f"top_k={self.top_k!r} must be an integer of at least 1")
        if self.kept_layers is not None and self.plan.target != "hidden_states":
            raise TrainingError(f"kept_layers= is for target='hidden_states', not {self.plan.target!r}; leave it out")

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return int(self.arguments.get("gradient_accumulation_steps", 1))

    @property
    def examples_per_step(self) -> int:
        """Examples of all micro-batches of a step."""
        return self.batch_size * self.accumulation

    @property
    def dtype(self) -> torch.dtype | None:
        """What the models compute in under autocast, ``None`` for their own."""
        made = self.training_arguments(steps=1)
        return torch.bfloat16 if made.bf16 else torch.float16 if made.fp16 else None

    def training_arguments(self, *, steps: int) -> TrainingArguments:
        """What the Trainer is told.

        Raises:
            TrainingError: an argument is unknown or refused, or several devices would share the work.
        """
        own: dict[str, Any] = {
            "lr_scheduler_type": "linear", "warmup_steps": steps // 20, "weight_decay": 0.0,
            "adam_beta2": 0.98, "save_steps": max(1, steps // _SAVES), "save_total_limit": 2,
            "logging_steps": max(1, steps // _LOGS), "report_to": "none", "dataloader_pin_memory": False,
        }  # fmt: skip
        fixed: dict[str, Any] = {
            "output_dir": str(self.output), "max_steps": steps, "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate, "seed": self.seed, "train_sampling_strategy": "sequential",
            "remove_unused_columns": False, "save_strategy": "steps", "label_names": ["labels"],
        }  # fmt: skip
        try:
            made = TrainingArguments(**{**own, **self.arguments, **fixed})
        except (TypeError, ValueError) as error:
            raise TrainingError(f"TrainingArguments refuses arguments=: {' '.join(str(error).split())}") from error
        if made.world_size > 1 or made.n_gpu > 1:
            raise TrainingError(
                f"recover() trains on one device, here are {max(made.world_size, made.n_gpu)}; start one process with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """What identifies the run besides models and data, JSON-ready."""
        found = {name: getattr(self, name) for name in _PLAIN}
        found |= {name: getattr(self.plan, name) for name in _PLAN}
        found["kept_layers"] = None if self.kept_layers is None else list(self.kept_layers)
        effective = sorted((name, value) for name, value in self.arguments.items() if name not in _COSMETIC)
        found["arguments"] = {name: repr(value) for name, value in effective}
        found["lora"] = None
        if self.lora is not None:
            from hf_elastic.adapters import described

            found["lora"] = described(self.lora)
        return found
