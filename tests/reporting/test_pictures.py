"""Layers are read off choices as the supernet itself reads them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_checkpoints
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import ElasticConfig, make_elastic
from hf_elastic.models import elastic_layers
from hf_elastic.reporting.pictures import MOST_LAYERS, ModelSizes, in_words, layers_of_architecture, layers_of_export

SPACES = {
    "per layer": ElasticConfig(
        intermediate_size=[0.25, 0.5, 1.0], num_attention_heads=[1, 2, 4], skip=["attention", "mlp"]
    ),
    "layers": ElasticConfig(intermediate_size=[0.5, 1.0], skip=["layer"]),
    "uniform": ElasticConfig(intermediate_size=[16, 64], loadability="stock"),
    "depth": ElasticConfig(num_hidden_layers=[1, 2, 3], layer_order=[2, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_shapes_of_random_architectures_are_those_of_the_supernet(tmp_path: Path, name: str) -> None:
    model = AutoModel.from_pretrained(tiny_checkpoints.sentence_encoder(tmp_path / "model"))
    supernet = make_elastic(model, SPACES[name])
    sizes = ModelSizes.from_config(supernet.base.config.to_dict(), order=supernet.layer_order)
    rng = random.Random(0)
    for point in [supernet.space.largest(), *(supernet.space.sample(rng) for _ in range(20))]:
        for picture, shape in zip(layers_of_architecture(point, sizes), supernet.layer_shapes(point), strict=True):
            assert picture.width == (shape.intermediate_size if shape.mlp else 0)
            assert picture.heads == (shape.num_attention_heads if shape.attention else 0)
            assert picture.groups == (shape.num_key_value_heads if shape.attention else 0)
            assert picture.skipped == shape.skipped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sizes_are_read_from_configs_of_other_families(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoints.language_model(tmp_path / family, family)
    config = AutoModelForCausalLM.from_pretrained(folder).config.to_dict()
    groups = 2 if family == "llama" else 4
    assert ModelSizes.from_config(config) == ModelSizes(2, 64, 4, groups, (0, 1))
    if family == "gpt2":  # which then takes four times its hidden size
        assert ModelSizes.from_config({**config, "n_inner": None}) == ModelSizes(2, 128, 4, 4, (0, 1))
    assert ModelSizes.from_config({"model_type": family}) is None


def test_ranks_capacities_and_blocks_are_found_without_sizes() -> None:
    point = {"layers.0.r": 8, "layers.1.r": 4, "layers.1.self_attn.q_proj.r": 2, "mlp_tokens": 80, "layers.0.heads": 50}
    first, second = layers_of_architecture(point)
    assert (first.ranks, second.ranks) == ({"all": 8}, {"all": 4, "q_proj": 2})
    assert (first.capacities, second.capacities) == ({"mlp_tokens": 80, "heads": 50}, {"mlp_tokens": 80})
    assert in_words((first, second)) == "rank 8 4, rank q_proj - 2, heads 50 -, mlp_tokens 80×2"
    blocks = layers_of_architecture({"layers.0.block": "standard", "layers.1.block": "bottleneck-qv"})
    assert in_words(blocks) == "blocks standard bottleneck-qv"


def test_an_export_tells_its_layers() -> None:
    entry = {
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention": True,
        "mlp": False,
    }
    gone = {**entry, "attention": False}
    pictures = layers_of_export([entry, gone])
    assert [(p.width, p.heads, p.groups, p.skipped) for p in pictures] == [(0, 4, 2, False), (0, 0, 0, True)]
    assert in_words(pictures) == "1 of 2 layers, FFN -, heads 4, KV heads 2"


def test_more_layers_than_any_model_has_are_not_drawn() -> None:
    assert MOST_LAYERS == elastic_layers.MOST_LAYERS
    config = {"num_hidden_layers": 10**10, "intermediate_size": 8, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="10000000000 layers are more than any model has"):
        ModelSizes.from_config(config)
    with pytest.raises(ValueError, match="layers are more than any model has"):
        layers_of_architecture({"layers.999999999999.intermediate_size": 8})
