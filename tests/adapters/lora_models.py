"""Small adapted models and their oracles: stock LoRA with the same weights, and weights sliced by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import inputs, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, Supernet

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"}


def elastic(model: PreTrainedModel, **settings: Any) -> Supernet:
    """Adapts a model elastically; no factor is zero."""
    adapted = get_peft_model(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], **settings})).eval()
    randomise(adapted)
    return Supernet(adapted)


def stock(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """Adapts a model with peft's own LoRA; no factor is zero."""
    adapted = get_peft_model(model, LoraConfig(**{**SETTINGS, **settings})).eval()
    randomise(adapted)
    return adapted


def randomise(adapted: nn.Module, *, seed: int = 3) -> None:
    """Fills the adapters with noise, by name, so that equal models get equal noise."""
    for name, parameter in sorted(adapted.named_parameters()):
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model: nn.Module, like: nn.Module | None = None, **arguments: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs(base_of(like or model)), **arguments)[0]
    return output


def base_of(model: nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def sliced_stock(family: str, ranks: Mapping[str, int], *, head: str = "lm", **settings: Any) -> PeftModel:
    """Stock LoRA made by hand: each module at its rank, with the first rows and columns and the scaling of rank 8.

    Args:
        ranks: rank by the end of a module's name, ``""`` for all.
    """
    whole = stock(tiny(family, head), **settings).state_dict()
    model = stock(tiny(family, head), **settings)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith((".lora_A.default", ".lora_B.default")):
                owner = name.rpartition(".lora_")[0]
                rank = next(rank for end, rank in ranks.items() if owner.endswith(end))
                weight = whole[f"{name}.weight"].clone()
                if ".lora_A." in name:
                    weight[rank:] = 0
                else:
                    weight[:, rank:] = 0
                module.weight.copy_(weight)
    return model
