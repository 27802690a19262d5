"""Routers that peft has frozen are trained again, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny

from hf_elastic import RoutingConfig, Supernet, add_routing, load_routers, set_capacity
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


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["up_proj"]), ("gpt2", ["mlp.c_proj"]), ("bert", ["output.dense"])]
)
def test_adapters_on_an_ffn_with_experts_are_refused_before_training(family: str, names: list[str]) -> None:
    model = tiny(family)
    add_routing(model, RoutingConfig(experts=[1], num_experts=3))
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=names))
    with pytest.raises(UnsupportedModelError, match=r" of .*\.\d+ has an adapter, and an expert is a part of it"):
        train_routers(adapted)
    with pytest.raises(UnsupportedModelError, match="adapt the projections of attention alone"):
        set_capacity(Supernet(adapted), experts=1)


@pytest.mark.parametrize("call", [
    train_routers,
    lambda handle: add_routing(handle, RoutingConfig(heads=[1])),
    lambda handle: load_routers(handle, "."),
])
def test_a_handle_in_the_place_of_its_model_is_refused(call: Any) -> None:
    handle = add_routing(tiny("llama"), RoutingConfig(heads=[1]))
    with pytest.raises(UnsupportedModelError, match="takes the model itself, not its handle; give supernet.model"):
        call(handle)


def test_a_supernet_is_described_before_it_is_calibrated() -> None:
    text = str(add_routing(tiny("llama"), RoutingConfig(mlp_tokens=[0.5])))
    assert "not measured before routers of tokens are calibrated; call hf_elastic.calibrate_routing" in text
    assert "at the smallest" in str(add_routing(tiny("llama"), RoutingConfig(heads=[1])))
