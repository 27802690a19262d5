"""All eight promises on a device: every family, candidate blocks, adapters with ranks, routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import block_models
import pytest
import torch
from peft import get_peft_model
from tiny_models import CONFIGS, space, tiny
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, RoutingConfig, quantize_, sparsify_
from hf_elastic.testing import PROMISES, Case, check_gradients_stay_inside

Check = Callable[[Case], None]
every_promise = pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
EVERY_KIND = RoutingConfig(
    mlp_tokens=[0.3, 0.7], attention_tokens=[0.5, 0.8], heads=[1, 0.75], experts=[1, 2], num_experts=3
)


def kept(check: Check, case: Case, device: str) -> None:
    """Checks a case on a device; the check that trains takes no random architectures besides the extremes.

    Two trainings are the same bits on a GPU only where kernels that add in any order are ruled out.
    """
    sampled = 0 if check is check_gradients_stay_inside else 2
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        check(replace(case, device=device, sampled=sampled))
    finally:
        torch.use_deterministic_algorithms(before)


@every_promise
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_keeps_the_promise(family: str, check: Check, device: str) -> None:
    kept(check, Case(lambda: tiny(family), space(family)), device)


@every_promise
@pytest.mark.parametrize("kind", block_models.TYPES)
def test_candidate_blocks_with_fused_heads_keep_the_promise(kind: str, check: Check, device: str) -> None:
    kept(check, Case(lambda: block_models.tiny(kind, **block_models.FUSED), None), device)


def adapted(**settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    def wrap(model: PreTrainedModel) -> nn.Module:
        given = {"r": 8, "ranks": [2, 4], "lora_alpha": 12, "target_modules": "all-linear"}
        return get_peft_model(model, ElasticLoraConfig(**{**given, **settings}))

    return wrap


@every_promise
def test_ranks_alone_keep_the_promise(check: Check, device: str) -> None:
    kept(check, Case(lambda: tiny("llama"), None, wrap=adapted()), device)


@every_promise
def test_ranks_with_an_elastic_base_keep_the_promise(check: Check, device: str) -> None:
    config = space("bert", skip={1: ["attention", "mlp"], 2: ["attention", "mlp"]})
    kept(check, Case(lambda: tiny("bert"), config, wrap=adapted()), device)


def sparse_integers() -> PreTrainedModel:
    model = tiny("llama")
    sparsify_(model, method="magnitude")
    quantize_(model, group_size=16, method="rtn")
    return model


@every_promise
def test_adapters_in_the_weight_of_sparse_integers_keep_the_promise(check: Check, device: str) -> None:
    kept(check, Case(sparse_integers, None, wrap=adapted(sparse=True, quantization_aware=True)), device)


@every_promise
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_routers_of_an_elastic_model_keep_the_promise(family: str, check: Check, device: str) -> None:
    config = space(family, skip={1: ["attention", "mlp"], 2: ["layer"]}, intermediate_size=[16, 32])
    kept(check, Case(lambda: tiny(family), config, routing=EVERY_KIND), device)
