"""``add_routing`` and ``set_capacity``: what they change, what they leave, and what they refuse."""

from __future__ import annotations

import random
from typing import Any

import block_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from routed_models import routed
from tiny_models import CONFIGS, inputs, supernet_of, tiny
from torch import nn

from hf_elastic import (
    ArchitectureError,
    ElasticConfig,
    ElasticError,
    ElasticLoraConfig,
    RoutingConfig,
    SpaceError,
    Supernet,
    UnsupportedModelError,
    add_routing,
    make_elastic,
    quantize_,
    set_capacity,
)
from hf_elastic.models.elastic_routers import LayerRouters

TOKENS = RoutingConfig(mlp_tokens=[0.5, 0.8])
HEADS = ("sequence", "token", "qa")
ROUTED = ("bert", "roberta", "llama", "qwen2", "qwen3", "mistral", "gpt2")


def refusal(kind: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ElasticError) and "\n" not in str(caught.value)
    return str(caught.value)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("head", ["base", "lm", *(pytest.param(h, marks=pytest.mark.slow) for h in HEADS)])
@pytest.mark.parametrize("family", ROUTED)
def test_every_family_with_every_head_is_routed_and_nothing_changes(family: str, head: str) -> None:
    model = tiny(family, head)
    feed = inputs(model)
    with torch.no_grad():
        before = model(**feed)[0]
        supernet = add_routing(
            model, RoutingConfig(mlp_tokens=[0.5], attention_tokens=[0.5], heads=[1], experts=[2, 4])
        )
        assert torch.equal(model(**feed)[0], before)
    assert len(supernet.router_parts) == 3
    assert supernet.active == supernet.space.largest()
    assert supernet.space.size == (2 * 2 * 2 * 2) ** 3


def test_the_largest_capacity_is_a_choice_even_if_it_is_not_named() -> None:
    supernet = add_routing(tiny("llama"), RoutingConfig(mlp_tokens=[0.5], layers=[2]))
    assert [(choice.name, choice.values) for choice in supernet.space.choices] == [("layers.2.mlp_tokens", (50, 100))]


def test_layers_may_follow_one_choice() -> None:
    supernet = add_routing(tiny("llama"), RoutingConfig(mlp_tokens=[0.5], heads=[1], share="model"))
    assert {choice.name: choice.values for choice in supernet.space.choices} == {
        "mlp_tokens": (50, 100),
        "heads": (1, 2),
    }
    supernet.set_active({"mlp_tokens": 50, "heads": 2})
    assert [part.routers.active for part in supernet.router_parts] == [{"heads": 2, "mlp_tokens": 50}] * 3


def test_a_capacity_is_no_choice_where_its_sublayer_is_skipped() -> None:
    supernet = routed("llama", config=ElasticConfig(skip={1: ["mlp"]}), low=False, mlp_tokens=[0.5], heads=[1])
    left_out = supernet.space.canonical({**supernet.space.largest(), "layers.1.skip": "mlp"})
    assert supernet.expected(left_out)["layers.1.mlp_tokens"] == 0
    [choice] = [choice for choice in supernet.space.choices if choice.name == "layers.1.mlp_tokens"]
    assert [condition.choice for condition in choice.when] == ["layers.1.skip"]
    assert supernet.space.size == (2 * 2) * (2 * 2) * (2 * (2 + 1))


def test_only_routers_are_trained_unless_more_is_asked_for() -> None:
    model = tiny("llama")
    add_routing(model, TOKENS)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".routers." in name} != set()
    model = tiny("llama")
    model.lm_head.requires_grad_(False)
    before = trainable(model)
    add_routing(model, TOKENS, freeze=False)
    assert trainable(model) == before | {name for name, _ in model.named_parameters() if ".routers." in name}


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    ElasticLoraConfig(target_modules=["q_proj", "v_proj"], r=4, ranks=[2]),
], ids=["stock", "elastic"])  # fmt: skip
def test_adapters_that_are_there_go_on_being_trained(config: Any) -> None:
    model = get_peft_model(tiny("llama"), config)
    adapters = trainable(model)
    supernet = add_routing(model, TOKENS)
    assert adapters and all("lora_" in name for name in adapters)
    assert trainable(model) == adapters | {name for name, _ in model.named_parameters() if ".routers." in name}
    assert supernet.base is not model


def test_the_seed_decides_about_hidden_layers_alone() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        model, state = tiny("llama"), torch.get_rng_state()
        add_routing(model, RoutingConfig(mlp_tokens=[0.5], router="mlp"), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the random state that all share has moved"
        return {name: p.detach() for name, p in model.named_parameters() if ".routers." in name}

    first, again, other = made(0), made(0), made(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        name for name in first if ".hidden." in name
    }


def test_routers_are_where_their_layer_is_and_follow_its_mode() -> None:
    model = tiny("llama").to("meta").train()
    supernet = add_routing(model, TOKENS)
    assert {p.device.type for part in supernet.router_parts for p in part.routers.parameters()} == {"meta"}
    assert all(part.routers.training for part in supernet.router_parts)
    assert not any(module.training for module in model.eval().modules() if isinstance(module, LayerRouters))


def test_a_model_that_is_not_routed_is_refused() -> None:
    assert "takes a transformers model, got a Linear" in refusal(
        UnsupportedModelError, add_routing, nn.Linear(2, 2), TOKENS
    )
    message = refusal(UnsupportedModelError, add_routing, tiny("distilbert"), TOKENS)
    assert (
        message == "model type 'distilbert' cannot be routed; known: bert, roberta, llama, qwen2, qwen3, mistral, gpt2"
    )


def test_candidate_blocks_are_refused() -> None:
    model = block_models.tiny("elastic_bert")
    assert "'elastic_bert' cannot be routed" in refusal(UnsupportedModelError, add_routing, model, TOKENS)


def test_quantised_models_are_refused() -> None:
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    assert "is quantised" in refusal(UnsupportedModelError, add_routing, model, TOKENS)
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "the model is quantised (bitsandbytes)" in refusal(UnsupportedModelError, add_routing, model, TOKENS)


def test_a_model_is_routed_once() -> None:
    model = tiny("llama")
    add_routing(model, TOKENS)
    message = refusal(UnsupportedModelError, add_routing, model, RoutingConfig(heads=[1]))
    assert message == "the model has routers already; use hf_elastic.Supernet(model) for its handle"
    message = refusal(UnsupportedModelError, make_elastic, model, ElasticConfig(skip=["layer"]))
    assert "make_elastic comes before add_routing" in message


@pytest.mark.parametrize(("family", "changes", "config", "words"), [
    ("bert", {"chunk_size_feed_forward": 4}, TOKENS, "chunk_size_feed_forward cuts rows into pieces"),
    ("gpt2", {"reorder_and_upcast_attn": True}, RoutingConfig(heads=[1]), "reorder_and_upcast_attn=True goes with no"),
    ("bert", {"is_decoder": True}, TOKENS, "config.is_decoder=True is not supported"),
])  # fmt: skip
def test_settings_of_a_model_that_do_not_go_with_routers_are_refused(
    family: str, changes: dict[str, Any], config: RoutingConfig, words: str
) -> None:
    assert words in refusal(UnsupportedModelError, add_routing, tiny(family, **changes), config)


BAD = [
    (RoutingConfig(experts=[1], num_experts=7), "7 experts do not divide the 48 neurons of an FFN; the nearest"),
    (RoutingConfig(experts=[0.5]), "are shares of how many? give num_experts="),
    (RoutingConfig(experts=[3], num_experts=2), "experts=3 is more than the 2 there are"),
    (RoutingConfig(heads=[3]), "heads=3 is more than the 2 there are, groups with keys and values of their own"),
    (RoutingConfig(heads=[2, 1.0]), "heads=[2, 1.0] leaves nothing to choose; give one below 2"),
    (RoutingConfig(mlp_tokens=[1]), "mlp_tokens=[1] leaves nothing to choose"),
    (RoutingConfig(mlp_tokens=[0.555]), "mlp_tokens=0.555 is no whole number of per cent; round it to 0.5"),
    (RoutingConfig(heads=[1], layers=[5]), "layers=[5] must name layers of 0 to 2"),
    ({"mlp_tokens": [0.5]}, "config is a dict; give RoutingConfig(mlp_tokens=[...], ...)"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words"), BAD, ids=[words[:25] for _, words in BAD])
def test_what_a_model_has_not_is_refused_before_anything_changes(config: Any, words: str) -> None:
    model = tiny("llama")
    classes = [type(module) for module in model.modules()]
    assert words in refusal(SpaceError, add_routing, model, config)
    assert [type(module) for module in model.modules()] == classes
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    make_elastic(model, ElasticConfig(skip=["layer"]))


def test_experts_that_a_width_cuts_through_are_refused_before_anything_changes() -> None:
    supernet = supernet_of("llama", intermediate_size=[16, 24])
    before = trainable(supernet.model)
    message = refusal(SpaceError, add_routing, supernet.model, RoutingConfig(experts=[1], num_experts=3))
    assert "layers.0.intermediate_size=[24] cuts through experts of 16 neurons" in message
    assert "ElasticConfig(multiple_of=16)" in message
    assert trainable(supernet.model) == before
    assert not any(isinstance(module, LayerRouters) for module in supernet.model.modules())


def test_experts_do_not_go_with_adapters_on_the_ffn_and_it_is_said_at_once() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["up_proj"], r=2))
    message = refusal(UnsupportedModelError, add_routing, model, RoutingConfig(experts=[1], num_experts=3))
    assert message == (
        "mlp.up_proj of layer 0 has an adapter, and an expert is a part of it; adapt the projections of attention "
        "alone, or leave experts out"
    )
    add_routing(model, TOKENS)


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules="all-linear", r=2), ElasticLoraConfig(target_modules="all-linear", r=4, ranks=[2]),
], ids=["stock", "elastic"])  # fmt: skip
def test_adapters_on_routers_are_refused_with_what_leaves_these_out(config: Any) -> None:
    model = tiny("llama")
    add_routing(model, TOKENS)
    wrapped = get_peft_model(model, config)
    message = refusal(UnsupportedModelError, Supernet, wrapped)
    assert "is a router, which an adapter does not change" in message
    [pattern] = [part for part in message.split("'") if "routers" in part and "*" in part]
    model = tiny("llama")
    add_routing(model, TOKENS)
    config = type(config)(**{"target_modules": "all-linear", "r": 4, "exclude_modules": pattern})
    assert Supernet(get_peft_model(model, config)).router_parts


capacities = st.fixed_dictionaries({}, optional={
    "mlp_tokens": st.sampled_from([0.5, 0.8, 1, 1.0]), "attention_tokens": st.sampled_from([0.3, 1.0]),
    "heads": st.sampled_from([1, 2, 0.5, 1.0]), "experts": st.sampled_from([1, 3, 1.0]),
})  # fmt: skip


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(capacities, min_size=1, max_size=3), st.sampled_from(["layer", "model"]))
def test_the_dial_turns_what_is_named_and_leaves_the_rest(turns: list[dict[str, Any]], share: Any) -> None:
    supernet = _dialled[share]
    supernet.set_active(supernet.space.largest())
    wanted = {"mlp_tokens": 100, "attention_tokens": 100, "heads": 2, "experts": 3}
    for turn in turns:
        set_capacity(supernet, **turn)
        for kind, value in turn.items():
            whole = {"heads": 2, "experts": 3}.get(kind, 100)
            count = kind in ("heads", "experts") and isinstance(value, int)
            wanted[kind] = value if count else round(value * whole)
        assert all(part.routers.active == wanted for part in supernet.router_parts)
        assert all(
            supernet.active[part.choice_name(kind)] == n for part in supernet.router_parts for kind, n in wanted.items()
        )


_dialled = {
    share: add_routing(tiny("llama"), RoutingConfig(
        mlp_tokens=[0.5, 0.8], attention_tokens=[0.3], heads=[1], experts=[1], num_experts=3, share=share,  # type: ignore[arg-type]
    ))
    for share in ("layer", "model")
}  # fmt: skip


@pytest.mark.parametrize(("turn", "words"), [
    ({"experts": 1}, "experts is not routed in this model; routed: heads, mlp_tokens"),
    ({"mlp": 0.5}, "mlp is not routed in this model"),
    ({"mlp_tokens": 0.7}, "mlp_tokens=0.7 is no capacity of the routers; they have 0.5, 0.8, 1.0"),
    ({"heads": 3}, "heads=3 is no capacity of the routers; they have 1, 2, 4"),
    ({"heads": 5}, "heads=5 is more than the 4 there are"),
    ({"mlp_tokens": 0}, "mlp_tokens has a capacity of 0; it must lie in (0, 1]"),
    ({"mlp_tokens": True}, "capacity of True"),
    ({"mlp_tokens": "0.5"}, "capacity of '0.5'"),
    ({"mlp_tokens": float("nan")}, "capacity of nan"),
    ({"heads": 1, "mlp_tokens": 2}, "capacity of 2"),
])  # fmt: skip
def test_a_capacity_that_is_not_there_leaves_the_dial_where_it_was(turn: dict[str, Any], words: str) -> None:
    supernet = add_routing(tiny("bert"), RoutingConfig(mlp_tokens=[0.5, 0.8], heads=[1, 2]))
    set_capacity(supernet, mlp_tokens=0.8)
    active = supernet.active
    assert words in refusal(SpaceError, set_capacity, supernet, **turn)
    assert supernet.active == active


def test_the_dial_of_a_model_without_routers_says_so() -> None:
    message = refusal(UnsupportedModelError, set_capacity, supernet_of("llama"), heads=1)
    assert message == "the model has no routers for set_capacity; call hf_elastic.add_routing first"


def test_a_capacity_that_is_no_value_is_no_architecture() -> None:
    supernet = add_routing(tiny("llama"), TOKENS)
    values = {**supernet.space.largest(), "layers.0.mlp_tokens": 70}
    refusal(ArchitectureError, supernet.set_active, values)


def test_every_architecture_that_is_drawn_can_be_described_and_shown() -> None:
    supernet = routed("llama", low=False)
    shown = str(supernet)
    assert "LlamaForCausalLM supernet (llama)" in shown and "parameters" in shown and "MACs" in shown
    rng = random.Random(0)
    for _ in range(5):
        with supernet.activate(supernet.space.sample(rng)):
            assert "attention_tokens" in repr(supernet.active)


def test_every_family_of_the_package_is_routed_or_refused() -> None:
    assert {*CONFIGS} - {*ROUTED} == {"distilbert"}


def test_adapters_of_any_kind_stay_trained_beside_the_routers() -> None:
    model = get_peft_model(tiny("llama"), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    supernet = add_routing(model, TOKENS)
    now = {name for name, parameter in supernet.model.named_parameters() if parameter.requires_grad}
    assert trained and now - trained and now > trained and all("routers" in name for name in now - trained)
    kept = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    add_routing(kept, TOKENS)
    trained = {name for name, parameter in kept.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save" in name for name in trained) and not any("original_module" in name for name in trained)
