"""Proxies as objectives: a subnet scores what its extracted model does, and exact search takes the sums."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from tiny_models import inputs, space, supernet_of, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hf_elastic import (
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    UnsupportedModelError,
    add_lora,
    extract,
    make_elastic,
    objectives,
    spaces,
)
from hf_elastic import search_subnets as search
from hf_elastic.layers import seeded
from hf_elastic.proxies import PROXIES, ZeroLMTable, checkpoint_table, score

SUMS = ("params", "decoder_params", "zerolm")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("name", [*SUMS, "synflow", "snip", "activation_distance"])
def test_a_subnet_scores_what_its_extracted_model_does(family: str, name: str) -> None:
    supernet = supernet_of(family)
    batch = inputs(supernet.base)
    goal = objectives.proxy(supernet, name, batches=batch)
    assert goal.direction == "maximize" and (goal.additive is not None) == (name in SUMS)
    rng = random.Random(0)
    compared = 0
    while compared < 5:
        architecture = supernet.space.sample(rng)
        plain = supernet.loadability(architecture) == "stock"
        one = extract(supernet, architecture, loadability=None if plain else "remote-code")
        compared += 1
        assert goal(architecture) == pytest.approx(score(one, name, [batch]), rel=1e-5)
        if goal.additive is not None:
            assert goal.additive.value(architecture) == pytest.approx(goal(architecture), rel=1e-9)


def test_depth_counts_layers_of_which_something_is_left() -> None:
    supernet = supernet_of("llama")
    depth, width = (objectives.proxy(supernet, name) for name in ("depth", "width_depth"))
    for architecture in itertools.islice(supernet.space.architectures(), 200):
        layers = sum(not shape.skipped for shape in supernet.layer_shapes(architecture))
        assert depth(architecture) == layers and width(architecture) == 32 * layers


def test_the_exact_front_of_a_proxy_is_that_of_all_architectures() -> None:
    supernet = make_elastic(tiny("llama"), space("llama", skip=None, num_hidden_layers=None))
    goals = [objectives.proxy(supernet, "zerolm", alpha=0.7), objectives.parameters(supernet)]
    found = search(supernet.space, goals, algorithm="exact", progress=False).front
    points = [(goals[0](a), goals[1](a)) for a in supernet.space.architectures()]
    front = {p for p in points if not any(o[0] >= p[0] and o[1] <= p[1] and o != p for o in points)}
    listed = {(evaluation.values["zerolm"], evaluation.values["parameters"]) for evaluation in found}
    assert len(listed) == len(front)
    for one, other in zip(sorted(listed), sorted(front), strict=True):
        assert one == pytest.approx(other)


def test_ranks_of_adapters_score_nothing() -> None:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(intermediate_size=[0.5, 1.0]))
    supernet = add_lora(model, ElasticLoraConfig(r=8, ranks=[2, 4], target_modules=["q_proj"]), seed=0)
    goal = objectives.proxy(supernet, "zerolm")
    low, high = supernet.space.largest(), supernet.space.largest()
    ranks: dict[str, Any] = {name: 2 for name in supernet.space.names if name.endswith(".r")}
    low = supernet.space.canonical({**high, **ranks})
    assert ranks and low != high and goal(low) == goal(high)


def test_a_model_of_seven_billions_is_searched_without_its_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    elastic = spaces.lonas_llama(model.config).elastic
    assert elastic is not None
    supernet = make_elastic(model, elastic)
    goal = objectives.proxy(supernet, "zerolm", table=ZeroLMTable.expected(model))
    result = search(supernet.space, [goal, objectives.parameters(supernet)], algorithm="exact", progress=False)
    assert len(result.front) == 32 * 4 + 1  # each layer gives up one of four steps at a time
    sizes = [evaluation.values["parameters"] for evaluation in result.front]
    assert len(set(sizes)) == len(sizes)


def test_what_cannot_be_scored_is_said(tmp_path: Any) -> None:
    supernet = supernet_of("llama")
    with pytest.raises(DataError, match="there is no proxy 'zerolmm'; known: zerolm"):
        objectives.proxy(supernet, "zerolmm")
    with pytest.raises(DataError, match="needs batches"):
        objectives.proxy(supernet, "snip")(supernet.space.largest())
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"another model: of 2 layers, .* the supernet has 3"):
        objectives.proxy(supernet, "zerolm", table=checkpoint_table(tmp_path))
    narrow = ZeroLMTable.of_model(tiny("llama", intermediate_size=32))
    with pytest.raises(DataError, match="the table is of another model"):
        objectives.proxy(supernet, "zerolm", table=narrow)
    with pytest.raises(DataError, match="alpha and table are of zerolm, not of snip"):
        objectives.proxy(supernet, "snip", alpha=0.5)
    with pytest.raises(DataError, match="must be a number, or 'label-free'"):
        objectives.proxy(supernet, "zerolm", alpha="half")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = make_elastic(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2)), ElasticConfig(intermediate_size=[0.5]))
    with pytest.raises(UnsupportedModelError, match=r"meta device; pass table=checkpoint_table"):
        objectives.proxy(empty, "zerolm")


@pytest.mark.parametrize("guess", [-0.3, 1.7])
def test_more_of_a_model_scores_more_and_a_guess_that_would_say_otherwise_is_refused(
    guess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=64,
    )  # fmt: skip
    space_of = ElasticConfig(num_key_value_heads=[0.5, 0.75, 1.0], intermediate_size=[0.25, 0.5, 1.0])
    with seeded(0):
        supernet = make_elastic(LlamaForCausalLM(config), space_of)
    goal = objectives.proxy(supernet, "zerolm")
    rng = random.Random(0)
    assert all(goal(supernet.space.sample(rng)) <= goal(supernet.space.largest()) for _ in range(50))
    monkeypatch.setattr(objectives, "label_free_alpha", lambda *parts: guess)
    with pytest.raises(DataError, match=f"alpha={guess} here, which would count a part of a model against it"):
        objectives.proxy(supernet, "zerolm", alpha="label-free")
    assert set(SUMS) <= set(PROXIES)
