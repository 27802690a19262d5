"""Routers that peft has frozen are trained again, and nothing else."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny

from hf_elastic import RoutingConfig, add_routing
from hf_elastic.errors import UnsupportedModelError
from hf_elastic.routing import train_routers


def test_routers_are_trained_beside_adapters_and_the_base_stays_frozen() -> None:
    model = tiny("llama")
    add_routing(model, RoutingConfig(mlp_tokens=[0.5], experts=[1], num_experts=3, router="mlp"))
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert train_routers(adapted) is adapted
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or ".routers." in name), name


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="add_routing"):
        train_routers(tiny("llama"))
