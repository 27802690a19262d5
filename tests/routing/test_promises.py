"""The contract tests for routers: on plain and on elastic models, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import space, tiny
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, ExportError, RoutingConfig, add_routing
from hf_elastic.testing import PROMISES, Case, check_extracted_equals_active, check_state_dict_is_stock

ALL = {
    "mlp_tokens": [0.3, 0.7], "attention_tokens": [0.5, 0.8], "heads": [1, 0.75], "experts": [1, 2], "num_experts": 3,
}  # fmt: skip
LESS = {"mlp_tokens": [0.5], "attention_tokens": [0.6], "heads": [1]}  # experts do not go with adapters on the FFN
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "roberta", "gpt2", "mistral")]
every_promise = pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
Check = Callable[[Case], None]


def routing(**changes: Any) -> RoutingConfig:
    return RoutingConfig(**{**ALL, **changes})


def attention_of(family: str) -> list[str]:
    """Names of projections of attention that adapters stand on."""
    return {"gpt2": ["c_attn"], "bert": ["query", "value"], "roberta": ["query", "value"]}.get(
        family, ["q_proj", "v_proj"]
    )


def lora(family: str) -> LoraConfig:
    """A stock adapter that changes something."""
    return LoraConfig(target_modules=attention_of(family), r=4, init_lora_weights=False)


def ranked(family: str, **settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    settings = {"target_modules": attention_of(family), "r": 8, "ranks": [2, 4], **settings}
    return lambda model: get_peft_model(model, ElasticLoraConfig(**settings))


@every_promise
@pytest.mark.parametrize("family", ["llama", pytest.param("bert", marks=pytest.mark.slow), *OTHERS])
def test_routers_alone_keep_the_promise(family: str, check: Check) -> None:
    check(Case(lambda: tiny(family), None, routing=routing(), sampled=2))


@every_promise
@pytest.mark.parametrize("family", ["llama", "bert", *OTHERS])
def test_routers_of_an_elastic_model_keep_the_promise(family: str, check: Check) -> None:
    config = space(family, skip={1: ["attention", "mlp"], 2: ["layer"]}, intermediate_size=[16, 32])
    check(Case(lambda: tiny(family), config, routing=routing(), sampled=3))


@pytest.mark.slow
@every_promise
@pytest.mark.parametrize("changes", [
    {"share": "model"}, {"router": "mlp", "router_hidden_size": 5}, {"layers": [1]}, {"every": 2, "heads": None},
    {"mlp_tokens": None, "attention_tokens": None}, {"heads": None, "experts": None, "num_experts": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_way_to_route_keeps_the_promise(family: str, changes: dict[str, Any], check: Check) -> None:
    config = space(family, intermediate_size=[16, 32])
    check(Case(lambda: tiny(family), config, routing=routing(**changes), sampled=4))


@pytest.mark.slow
@every_promise
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
def test_routers_over_stock_adapters_keep_the_promise(family: str, check: Check) -> None:
    def make_model() -> PreTrainedModel:
        made: PreTrainedModel = inject_adapter_in_model(lora(family), tiny(family))
        return made

    with refused_without_a_merge(check):
        check(Case(make_model, None, routing=routing(), sampled=3))


@pytest.mark.slow
@every_promise
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
def test_stock_adapters_over_routers_keep_the_promise(family: str, check: Check) -> None:
    def wrap(model: PreTrainedModel) -> nn.Module:
        add_routing(model, routing())
        return get_peft_model(model, LoraConfig(target_modules=attention_of(family), r=4))

    if check is check_state_dict_is_stock:
        pytest.skip("stock adapters stay in the model, as they would without routers")
    with refused_without_a_merge(check):
        check(Case(lambda: tiny(family), None, wrap=wrap, sampled=3))


def refused_without_a_merge(check: Check) -> Any:
    """No extraction carries stock adapters, and it says so."""
    if check is check_extracted_equals_active:
        return pytest.raises(ExportError, match="merge_and_unload")
    return nullcontext()


@pytest.mark.slow
@every_promise
@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
def test_routers_over_adapters_with_ranks_keep_the_promise(family: str, elastic: bool, check: Check) -> None:
    changes = {"skip": {1: ["attention", "mlp"], 2: ["layer"]}, "intermediate_size": [16, 32]}
    config = space(family, **changes) if elastic else None
    check(Case(lambda: tiny(family), config, wrap=ranked(family), routing=routing(), sampled=3))


@pytest.mark.slow
@every_promise
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_routed_tokens_and_heads_go_with_adapters_everywhere(family: str, check: Check) -> None:
    wrap = ranked(family, target_modules="all-linear")
    check(Case(lambda: tiny(family), None, wrap=wrap, routing=RoutingConfig(**LESS), sampled=4))
