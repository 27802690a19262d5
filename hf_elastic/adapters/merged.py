"""Adapters that live as long as a training: added to a plain model, trained, and merged into its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import TrainingError
from hf_elastic.layers import seeded

Lora = LoraConfig | int
"""A rank, for adapters on every linear layer but the output head, or peft's own configuration."""


def described(lora: Lora | None) -> str:
    """Writes down what identifies adapters, the same in every process."""
    settings = lora.to_dict() if isinstance(lora, LoraConfig) else lora
    if isinstance(settings, dict):
        settings.pop("peft_version", None)
    return json.dumps(settings, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


@contextmanager
def adapted(model: PreTrainedModel, lora: Lora, *, seed: int = 0) -> Iterator[PeftModel]:
    """Yields a model with fresh LoRA adapters, and merges them into its weights when the block ends without an error.

    The merged weight is ``W + (alpha / r) B A`` (Hu et al. 2022, arXiv 2106.09685, section 4.1). Afterwards ``model``
    is the plain model that it was, with its names, and the parameters that were trainable are so again; after an
    error its weights are those from before, too.

    Args:
        model: a plain model; only the adapters can be trained inside the block.
        lora: rank (``alpha = 2 r``, as wide as QLoRA places them, Dettmers et al. 2023, arXiv 2305.14314) or peft's
            configuration.
        seed: of the adapters' first weights.

    Raises:
        TrainingError: the rank is not positive, the model has adapters already, or peft refuses the configuration.
    """
    config = _config(lora, model)
    if getattr(model, "peft_config", None) is not None:
        raise TrainingError("the model has adapters already; merge or unload them first")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapped = _wrapped(model, config, seed=seed)
        try:
            yield wrapped
        except BaseException:
            wrapped.unload()
            raise
        wrapped.merge_and_unload()
    finally:
        vars(model).pop("peft_config", None)  # what a refused configuration leaves behind
        for parameter in trainable:
            parameter.requires_grad_(True)


def _config(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    if isinstance(lora, LoraConfig):
        return copy.deepcopy(lora)  # peft writes into it which modules it found
    if type(lora) is not int or lora < 1:
        raise TrainingError(f"lora={lora!r} is neither a rank of at least 1 nor a peft.LoraConfig")
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's linears
    return LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", fan_in_fan_out=transposed)


def _wrapped(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    with seeded(seed):
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise TrainingError(f"peft cannot adapt {type(model).__name__}: {reason}") from error
    if not isinstance(wrapped, PeftModel):
        raise TrainingError(f"{type(config).__name__} makes a mixed adapter model, which cannot be merged")
    return wrapped
