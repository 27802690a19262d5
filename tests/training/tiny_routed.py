"""Tiny routed models of the training tests, with adapters of rank 1 on queries and values."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from tiny_training import seeded
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, Supernet
from hf_elastic.routing import RoutingConfig, add_routing, train_routers

EVERY_KIND = RoutingConfig(mlp_tokens=[0.5], attention_tokens=[0.6], heads=[1], experts=[1, 2], num_experts=4)
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "gpt2": ["c_attn"]}


def plain(family: str = "llama", head: str = "lm") -> PreTrainedModel:
    return tiny(family, head, seed=1)


def routed(
    family: str = "llama",
    head: str = "lm",
    *,
    config: RoutingConfig = EVERY_KIND,
    adapters: str | None = "stock",
    first: str = "routers",
) -> Supernet:
    """A model with routers, and adapters (``"stock"``, ``"elastic"`` or none); none of them starts at zero."""
    model: Any = plain(family, head)
    if first == "routers":
        add_routing(model, config)
    if adapters is not None:
        settings: dict[str, Any] = {"r": 2 if adapters == "elastic" else 1, "target_modules": TARGETS[family]}
        lora = ElasticLoraConfig(ranks=[1, 2], **settings) if adapters == "elastic" else LoraConfig(**settings)
        model = seeded(lambda: get_peft_model(model, lora))
    if first != "routers":
        add_routing(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in train_routers(model).named_parameters():
        if parameter.requires_grad:
            size = 0.1 if "lora_" in name else 0.5
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return Supernet(model)
