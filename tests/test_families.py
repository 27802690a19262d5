"""Each row against the modules of a real model of its type, and rows as users write and save them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, GROUPED, tiny
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hf_elastic import FAMILIES, Family, UnsupportedModelError
from hf_elastic.families import family_of, layers_of, submodule

ROWS = {row.model_type: row for row in FAMILIES}


def test_every_family_has_one_row() -> None:
    assert sorted(ROWS) == sorted(CONFIGS) and len(FAMILIES) == len(ROWS)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_finds_the_layers_and_projections_of_its_models(family: str) -> None:
    model, row = tiny(family, "base"), ROWS[family]
    assert family_of(model) is row
    layers = layers_of(model, row)
    assert len(layers) == 3
    for path in (*row.ffn_in, row.ffn_out, row.query, row.key, row.value, row.attention_out):
        assert isinstance(submodule(layers[0], path, family=row).weight, nn.Parameter)
    attention = submodule(layers[0], row.attention, family=row)
    head_dim = getattr(attention, row.head_size)
    assert head_dim * 4 == (64 if family == "qwen3" else 32)
    for attribute, meaning in row.attributes.items():
        assert getattr(attention, attribute) == (4 if meaning == "heads" else 4 * head_dim)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_skips_of_a_row_cover_each_parameter_of_a_layer_exactly_once(family: str) -> None:
    row = ROWS[family]
    layer = layers_of(tiny(family, "base"), row)[0]
    seen = [p for rule in (*row.skip_attention, *row.skip_mlp) for p in layer.get_submodule(rule.module).parameters()]
    assert sorted(map(id, seen)) == sorted(map(id, layer.parameters()))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_knows_the_names_of_sizes_in_its_config(family: str) -> None:
    config, row = tiny(family, "base").config, ROWS[family]
    names = {"intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    assert {name: config.to_dict()[row.config_name(name)] for name in names} == names


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_are_chosen_as_groups_where_keys_are_shared(family: str) -> None:
    row = ROWS[family]
    assert row.grouped == (family in GROUPED) == (row.heads_choice == "num_key_value_heads")
    assert row.fused == (family == "gpt2")


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.model_type)
def test_a_row_survives_json(row: Family) -> None:
    again = Family.from_dict(json.loads(json.dumps(row.to_dict())))
    assert again == row and again.to_dict() == row.to_dict()


def test_a_malformed_row_is_refused() -> None:
    data = ROWS["bert"].to_dict()
    broken_rows = [
        {**data, "colour": "red"},
        {**data, "skip_mlp": [{"modul": "x"}]},
        *({name: value for name, value in data.items() if name != gone} for gone in ("skip_mlp", "layers")),
    ]
    for broken in broken_rows:
        with pytest.raises(UnsupportedModelError, match="not a family row"):
            Family.from_dict(broken)


def test_an_unknown_model_type_is_named_with_what_is_known_and_the_way_out() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(UnsupportedModelError, match=r"'t5' has no family row; known: bert.*roberta; pass family="):
        family_of(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("path", ["encoder.layers", "encoder", "embeddings.word_embeddings"])
def test_a_row_whose_layers_are_elsewhere_is_refused_by_name(path: str) -> None:
    with pytest.raises(UnsupportedModelError, match=path):
        family_of(tiny("bert"), replace(ROWS["bert"], layers=path))


def test_an_empty_list_of_layers_is_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.layer = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="not a non-empty list"):
        family_of(model)


def test_a_module_that_is_not_there_is_named_with_the_row() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no 'mlp.up', which the family row of 'llama' names"):
        submodule(nn.Linear(1, 1), "mlp.up", family=ROWS["llama"])


@pytest.mark.parametrize("family", CONFIGS)
def test_zero_weights_pass_the_residual_stream_unchanged_just_where_a_row_says_pre_norm(family: str) -> None:
    row = ROWS[family]
    model = tiny(family, "base")
    layer = layers_of(model, row)[1]
    for path in (row.attention_out, row.ffn_out):
        for parameter in submodule(layer, path, family=row).parameters():
            nn.init.zeros_(parameter)
    seen: dict[str, torch.Tensor] = {}

    def record(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["in"], seen["out"] = args[0], output[0] if isinstance(output, tuple) else output

    layer.register_forward_hook(record)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert torch.equal(seen["in"], seen["out"]) == row.pre_norm
