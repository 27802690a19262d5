"""The contract tests for adapters: ranks alone (Mode A), and ranks with an elastic base (Mode B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model
from tiny_models import space, tiny
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, quantize_, sparsify_
from hf_elastic.testing import PROMISES, Case

OTHERS = ["bert", "gpt2", "qwen3", "distilbert"]
FAMILIES = ["llama", "bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen3", "distilbert"))]


def adapted(**settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    def wrap(model: PreTrainedModel) -> nn.Module:
        return get_peft_model(model, ElasticLoraConfig(**{"r": 8, "ranks": [2, 4], "lora_alpha": 12, **settings}))

    return wrap


ALL = adapted(target_modules="all-linear")


@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_ranks_alone_keep_the_promise(family: str, check: Callable[[Case], None]) -> None:
    check(Case(lambda: tiny(family), None, wrap=ALL, sampled=4))


@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_with_an_elastic_base_keep_the_promise(family: str, check: Callable[[Case], None]) -> None:
    loadability = "stock" if family == "distilbert" else "any"
    kinds = ["layer"] if family == "distilbert" else ["attention", "mlp"]
    changes = {"num_attention_heads": None} if family == "distilbert" else {}
    config = space(family, loadability=loadability, skip={1: kinds, 2: kinds}, **changes)  # layer 0 can be trained
    check(Case(lambda: tiny(family), config, wrap=ALL, sampled=6))


@pytest.mark.slow
@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
def test_ranks_per_module_with_a_fixed_one_keep_the_promise(check: Callable[[Case], None]) -> None:
    wrap = adapted(
        target_modules=["q_proj", "up_proj", "down_proj"], ranks={"q_proj": [3], "up_proj": [2, 5]}, share="module",
        use_rslora=True,
    )  # fmt: skip
    skip = {1: ["attention", "mlp"], 2: ["layer"]}
    check(Case(lambda: tiny("llama"), space("llama", skip=skip), wrap=wrap, sampled=6))


def compressed(*, integers: bool) -> PreTrainedModel:
    model = tiny("llama")
    sparsify_(model, method="magnitude")
    if integers:
        quantize_(model, group_size=16, method="rtn")
    return model


@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", [pytest.param("sparse", marks=pytest.mark.slow), "integers", "sparse, cut"])
def test_adapters_that_are_part_of_the_weight_keep_the_promise(kind: str, check: Callable[[Case], None]) -> None:
    wrap = adapted(target_modules="all-linear", sparse=True, quantization_aware=kind == "integers")
    config = space("llama", skip={1: ["attention", "mlp"]}) if kind == "sparse, cut" else None
    check(Case(lambda: compressed(integers=kind == "integers"), config, wrap=wrap, sampled=4))
