"""Costs of routed models against counted FLOPs and really extracted models; exact search over capacities."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from routed_models import routed
from tiny_models import GROUPED, space, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_elastic import Architecture, ElasticConfig, RoutingConfig, Supernet, costs, extract, objectives, search_subnets
from hf_elastic.testing import Case

TOKENS = 20
KINDS: dict[str, Any] = {
    "attention_tokens": [0.5, 0.8], "heads": [1], "mlp_tokens": [0.3, 0.6], "experts": [1, 2], "num_experts": 3,
}  # fmt: skip


def elastic(family: str) -> ElasticConfig:
    heads = [1] if family in GROUPED else [3]
    name = "num_key_value_heads" if family in GROUPED else "num_attention_heads"
    skip = {1: ["attention", "mlp"], 2: ["layer"]}
    return space(family, skip=skip, num_hidden_layers=None, intermediate_size=[16, 32], **{name: heads})


def points(supernet: Supernet, *, count: int) -> list[Architecture]:
    rng, found = random.Random(0), supernet.space
    return list(dict.fromkeys([found.largest(), found.smallest(), *(found.sample(rng) for _ in range(count))]))


def let_exactly_the_capacity_in(supernet: Supernet) -> None:
    """Sets each threshold of a causal model, in the forward itself, so that as many tokens enter as are to."""

    def between(router: Any, states: Any, scores: torch.Tensor) -> None:
        part, kind = names[id(router)]
        place = router.values.index(part.routers.active[kind])
        count = TOKENS * router.values[place] // 100
        ordered = scores.flatten().sort(descending=True).values
        router.thresholds[place] = (ordered[count - 1] + ordered[count]) / 2

    names = {}
    for part in supernet.router_parts if supernet.causal else ():
        for kind in ("attention_tokens", "mlp_tokens"):
            router: nn.Module = part.routers[kind]
            names[id(router)] = (part, kind)
            router.register_forward_hook(between)


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "roberta"])
def test_macs_equal_half_the_counted_flops_where_exactly_the_capacity_enters(family: str, router: Any) -> None:
    supernet = routed(family, config=elastic(family), low=False, **KINDS, router=router, router_hidden_size=7)
    supernet.model.set_attn_implementation("eager")
    let_exactly_the_capacity_in(supernet)
    feed = {"input_ids": torch.randperm(50, generator=torch.Generator().manual_seed(1))[None, :TOKENS] + 3}  # no ties
    for point in points(supernet, count=4):
        with supernet.activate(point), FlopCounterMode(display=False) as counter, torch.no_grad():
            supernet.model(**feed)
        assert costs.macs(supernet, point, seq_len=TOKENS) == counter.get_total_flops() / 2, point


def test_less_capacity_costs_less() -> None:
    supernet = routed("llama", low=False, **KINDS)
    high, low = (costs.macs(supernet, p, seq_len=128) for p in (supernet.space.largest(), supernet.space.smallest()))
    assert low < 0.6 * high


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_parameters_are_those_of_the_extracted_model(family: str) -> None:
    supernet = routed(family, config=elastic(family), low=False, **KINDS, router="mlp", router_hidden_size=5)
    for point in points(supernet, count=3):
        extracted = extract(supernet, point)
        held = {id(parameter): parameter.numel() for parameter in extracted.parameters()}
        assert costs.total_parameters(supernet, point) == sum(held.values()), point


def small(family: str = "bert", *, share: Any = "layer", **kinds: Any) -> Supernet:
    """A space that can be gone through: widths and presence of one layer, and capacities."""
    kinds = kinds or {"mlp_tokens": [0.3, 0.6], "experts": [1], "num_experts": 3, "layers": [0, 1]}
    config = ElasticConfig(intermediate_size={1: [16, 32]}, skip={1: ["layer"]})
    return Case(lambda: tiny(family), config, routing=RoutingConfig(**kinds, share=share)).supernet()


@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("name", ["parameters", "total_parameters", "macs", "memory"])
def test_the_table_of_a_cost_is_that_cost(name: str, share: str) -> None:
    supernet = small(share=share)
    objective = getattr(objectives, name)(supernet)
    assert objective.additive is not None
    for point in supernet.space.architectures():
        assert objective.additive.value(point) == objective(point), point


@pytest.mark.parametrize("share", ["layer", "model"])
def test_exact_search_over_capacities_finds_what_going_through_all_finds(share: str) -> None:
    supernet = small(share=share)
    cost, quality = objectives.macs(supernet), replace(objectives.parameters(supernet), direction="maximize")
    found = search_subnets(supernet.space, [cost, quality], algorithm="exact", progress=False)
    every = {(cost(p), quality(p)) for p in supernet.space.architectures()}
    front = {p for p in every if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in every)}
    assert {(e.values["macs"], e.values["parameters"]) for e in found.front} == front
    assert len(front) > 2


def test_most_parameters_within_a_limit_on_macs_are_found_exactly() -> None:
    supernet = small()
    cost, size = objectives.macs(supernet), replace(objectives.parameters(supernet), direction="maximize")
    limit = int(0.7 * cost(supernet.space.largest()))
    [found] = search_subnets(supernet.space, [size], algorithm="exact", within={"macs": limit}, progress=False).front
    assert cost(found.architecture) <= limit
    assert size(found.architecture) == max(size(p) for p in supernet.space.architectures() if cost(p) <= limit)
