"""The published spaces: their sizes, their values, and what they become at another size."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_models import tiny
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_elastic import SpaceError, Supernet, objectives, search_subnets, spaces


@pytest.fixture(scope="module")
def lonas_llama() -> Supernet:
    config = LlamaConfig()  # of 7B: 32 layers, 4096 wide, 11008 neurons
    with torch.device("meta"):
        return spaces.lonas_llama(config).make(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def lonas_bert() -> Supernet:
    config = BertConfig()
    with torch.device("meta"):
        return spaces.lonas_bert(config).make(BertForSequenceClassification(config))


def test_lonas_bert_has_the_published_size_and_widths(lonas_bert: Supernet) -> None:
    space = lonas_bert.space
    assert space.size == 3**25 * 2**11
    assert space["layers.0.num_attention_heads"].values == (6, 12)
    assert space["layers.10.num_attention_heads"].values == (3, 11, 12)
    assert space["layers.10.intermediate_size"].values == (163, 2198, 3072)
    assert [space[f"layers.{i}.num_attention_heads"].values[0] * 64 for i in range(12)] == [
        384, 320, 256, 512, 512, 704, 576, 576, 640, 192, 192, 320,
    ]  # fmt: skip
    assert space["layers.5.r"].values == (2, 4, 8)
    assert space.midpoint()["layers.0.intermediate_size"] == 2634
    assert space.midpoint()["layers.0.num_attention_heads"] == 12  # of two values the larger, as the official code


def test_lonas_llama_has_the_published_size_and_its_midpoint_the_published_parameters(lonas_llama: Supernet) -> None:
    space = lonas_llama.space
    assert space.size == 2**64 * 5**32
    assert space["layers.31.intermediate_size"].values == (5504, 6880, 8256, 9632, 11008)
    assert space["layers.0.q_proj|k_proj|v_proj.r"].values == (28, 32)
    midpoint = space.midpoint()
    assert midpoint["layers.3.intermediate_size"] == 8256 and midpoint["layers.3.up_proj|gate_proj.r"] == 32
    billions = objectives.total_parameters(lonas_llama)(midpoint) / 1e9
    assert billions == pytest.approx(5.66, abs=0.01)  # the paper says 5.6 B
    downs = [part for part in lonas_llama.adapter_parts if part.module_name.endswith("down_proj")]  # type: ignore[attr-defined]
    assert len(downs) == 32 and all(part.rank(midpoint) == 32 for part in downs)  # type: ignore[attr-defined]


def test_the_exact_front_of_the_space_of_llama_needs_no_weights(lonas_llama: Supernet) -> None:
    result = search_subnets(
        lonas_llama.space,
        [objectives.adapter_parameters(lonas_llama), objectives.parameters(lonas_llama)],
        algorithm="exact",
    )
    smallest = lonas_llama.space.smallest()
    assert [dict(e.architecture) for e in result.front] == [dict(smallest)]


def test_shears_and_sqft_have_the_published_groups() -> None:
    config = tiny("llama", hidden_size=64).config
    shears = spaces.shears_llama(config).make(tiny("llama", hidden_size=64))
    assert shears.space.size == 3 ** (3 * 3)
    assert {choice.midpoint for choice in shears.space} == {24}
    sqft = spaces.sqft_llama(config).make(tiny("llama", hidden_size=64))
    assert sqft.space.size == 5**3 and {choice.midpoint for choice in sqft.space} == {24}


def test_another_size_gets_the_same_fractions() -> None:
    config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    space = spaces.lonas_bert(config)
    assert space.elastic is not None and space.elastic.intermediate_size is not None
    assert space.elastic.intermediate_size[0] == (108, 1317) and space.elastic.intermediate_size[5] == (75, 970)  # type: ignore[index]
    assert spaces.lonas_bert(tiny("distilbert").config).make(tiny("distilbert")).space.size > 1
    with pytest.raises(SpaceError, match="lonas_bert is a space of bert"):
        spaces.lonas_bert(tiny("llama").config)


def test_a_space_may_be_made_twice_and_its_adapters_from_a_seed() -> None:
    models = [tiny("llama", hidden_size=64, intermediate_size=96) for _ in range(2)]
    space = spaces.lonas_llama(models[0].config)
    first, second = (copy.deepcopy(space).make(model, seed=4) for model in models)
    assert first.space == second.space
    weights = dict(second.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in first.model.named_parameters())


def test_flexibert_has_the_published_size() -> None:
    space = spaces.flexibert()
    assert space.size == 2 * (48**2 + 48**4) == 10_621_440
    shallow = space.canonical({**space.largest(), "num_hidden_layers": 2})
    assert shallow == space.canonical({**shallow, "layers.3.intermediate_size": 512})  # a layer that is not there


def test_litetransformersearch_has_the_published_size_where_the_width_counts_for_each_layer() -> None:
    ffns = {width: sum(1 for inner in range(256, 4097, 64) if inner >= 2 * width) for width in range(128, 1025, 64)}
    one, each = spaces.lts_gpt2(), spaces.lts_gpt2(width_per_layer=True)
    assert one.size == 9 * sum((3 * count) ** depth for count in ffns.values() for depth in range(2, 17))
    assert each.size == 9 * sum((3 * sum(ffns.values())) ** depth for depth in range(2, 17))
    assert each.size > 10**54 > one.size
    rng = random.Random(0)
    for _ in range(50):
        point = one.sample(rng)
        width = point["hidden_size"]
        assert all(point[f"layers.{i}.intermediate_size.{width}"] >= 2 * int(width) for i in range(16))


def test_benchmarked_spaces_have_names() -> None:
    assert {name: make().size for name, make in spaces.BENCHMARKED.items()}.keys() == {"flexibert", "lts-gpt2"}
