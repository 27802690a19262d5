"""Elastic adapters put back onto their base, and refused on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import elastic, logits, stock
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_elastic_lora import state_of
from tiny_models import tiny
from torch import nn

from hf_elastic import (
    CheckpointError,
    ElasticConfig,
    ElasticError,
    ElasticLoraConfig,
    SpaceError,
    Supernet,
    add_lora,
    extract_adapter,
    load_adapter,
    make_elastic,
)
from hf_elastic.report import describe_folder

WIDTHS = ElasticConfig(intermediate_size=[16])


def saved(folder: Path, *, elastic_base: bool = False) -> Supernet:
    model = tiny("llama")
    if elastic_base:
        make_elastic(model, WIDTHS)
    supernet = elastic(model, target_modules=["q_proj", "up_proj"])
    supernet.model.save_pretrained(folder)
    return supernet


def test_ranks_are_choices_again(tmp_path: Path) -> None:
    supernet = saved(tmp_path)
    again = load_adapter(tiny("llama"), tmp_path, is_trainable=True)
    assert again.space == supernet.space
    assert [p.requires_grad for n, p in again.model.named_parameters() if ".lora_" in n].count(False) == 0
    for point in (supernet.space.smallest(), supernet.space.largest()):
        with supernet.activate(point), again.activate(point):
            assert torch.equal(logits(again.model.eval()), logits(supernet.model))


def test_a_further_adapter_joins_a_model_that_has_one(tmp_path: Path) -> None:
    supernet = saved(tmp_path)
    both = load_adapter(elastic(tiny("llama"), target_modules=["q_proj"]).model, tmp_path, adapter_name="second")
    both.model.set_adapter("second")
    assert torch.equal(logits(both.model), logits(supernet.model))
    assert "second.layers.0.r" in both.space.names


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_adapter(tiny("llama").to(torch.bfloat16), tmp_path).space.size == 27


def test_another_base_or_space_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    saved(tmp_path / "elastic", elastic_base=True)
    for model, folder, says in (
        (tiny("llama", seed=1), "plain", "another base"),
        (tiny("llama", num_hidden_layers=2), "plain", "does not have"),
        (tiny("llama", hidden_size=64), "plain", "another base: model.layers.0"),
        (tiny("bert"), "plain", "does not have"),
        (tiny("llama"), "elastic", "another space"),
        (make_elastic(tiny("llama"), WIDTHS).model, "plain", "another space"),
        (make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[32])).model, "elastic", "another space"),
    ):
        before = state_of(model)
        with pytest.raises(CheckpointError, match=says):
            load_adapter(model, tmp_path / folder)
        assert state_of(model) == before
    load_adapter(make_elastic(tiny("llama"), WIDTHS).model, tmp_path / "elastic")


def test_peft_by_itself_is_checked_when_the_handle_is_made(tmp_path: Path) -> None:
    saved(tmp_path)
    config = ElasticLoraConfig.from_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(tiny("llama", seed=1), tmp_path, config=config)
    with pytest.raises(CheckpointError, match="another base"):
        Supernet(adapted)
    assert Supernet(PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config)).space.size == 27


def test_what_is_no_elastic_adapter_is_refused(tmp_path: Path) -> None:
    stock(tiny("llama")).save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match="PeftModel.from_pretrained"):
        load_adapter(tiny("llama"), tmp_path / "stock")
    with pytest.raises(CheckpointError, match="cannot read an adapter"):
        load_adapter(tiny("llama"), tmp_path / "nowhere")
    saved(tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        load_adapter(tiny("llama"), tmp_path / "cut")


def test_a_file_that_does_not_fit_leaves_everything_as_it_was(tmp_path: Path) -> None:
    head = elastic(tiny("bert", "sequence"), target_modules=["query"], modules_to_save=["classifier"])
    head.model.save_pretrained(tmp_path / "head")
    saved(tmp_path / "short")
    file = tmp_path / "short" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    first = elastic(tiny("llama"), target_modules=["q_proj"]).model.train()
    other_head = tiny("bert", "sequence")
    other_head.classifier = nn.Linear(32, 5)
    for model, folder, says in (
        (other_head, "head", "does not fit the model"),
        (tiny("llama"), "short", "missing or too many"),
        (first, "short", "missing or too many"),
    ):
        before = state_of(model)
        with pytest.raises(CheckpointError, match=says):
            load_adapter(model, tmp_path / folder, adapter_name="second")
        assert state_of(model) == before
    saved(tmp_path / "whole")
    load_adapter(first, tmp_path / "whole", adapter_name="second")
    assert first.training
    with pytest.raises(CheckpointError, match="'second' already"):
        load_adapter(first, tmp_path / "whole", adapter_name="second")


def test_what_a_user_might_try_is_answered(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="expected ElasticLoraConfig"):
        add_lora(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match=r"ranks=\[...\]"):
        add_lora(tiny("llama"), ElasticLoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(SpaceError, match="'k_porj'"):
        add_lora(tiny("llama"), ElasticLoraConfig(r=4, ranks={"q_proj|k_porj": [2]}, target_modules=["q_proj"]))
    model = tiny("llama")
    make_elastic(model, WIDTHS)
    elastic(model).save_pretrained(tmp_path / "both")
    with pytest.warns(UserWarning, match=r"load_adapter\(supernet.model, .*both/adapter'\)"):
        Supernet.from_pretrained(tmp_path / "both")
    assert "elastic adapter, ranks [2, 4] of 8" in describe_folder(tmp_path / "both" / "adapter")
    supernet = elastic(tiny("llama"))
    extract_adapter(supernet, supernet.space.smallest()).save_pretrained(tmp_path / "plain")
    assert "adapter of rank 2" in describe_folder(tmp_path / "plain")


def changed(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": ["x"], "r": None}, "cannot read an adapter"),
        ({"eva_config": 3}, "cannot read an adapter"),
        ({"trained_on": 5}, r"nothing usable about its base \(trained_on\)"),
        ({"trained_on": {"weights": {"a": "b"}, "space": None}}, "nothing usable about its base"),
        ({"trained_on": {"weights": {"a": [float("nan")]}, "space": None}}, "nothing usable about its base"),
        ({"trained_on": {"weights": {}, "space": None}, "sparse": True}, "nothing usable about its base"),
        ({"trained_on": {"weights": {"model.norm.x": [1.0]}, "space": None}}, "it had a module model.norm.x"),
        ({"trained_on": {"weights": {"model.layers": [1.0]}, "space": None}}, "it had a module model.layers"),
        ({"r": 10**9}, "states rank 1000000000 for .*, its weights are of rank 8"),
        ({"rank_pattern": {"q_proj": 10**9}}, "states rank 1000000000 for .*q_proj, its weights are of rank 8"),
        ({"rank_pattern": {"(": 4}}, "has a rank_pattern that is no pattern: missing"),
        ({"rank_pattern": {"k_proj": 10**9}}, "states rank 1000000000, its weights are of ranks up to 8"),
        ({"lora_alpha": "x"}, "cannot be adapted"),
        ({"lora_dropout": []}, "cannot be adapted"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "peft makes no adapter of the configuration"),
    ],
)
def test_a_configuration_of_other_fields_is_refused_and_the_model_stays(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter")
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(ElasticError, match=message):
        load_adapter(model, changed(tmp_path / "adapter", **fields))
    assert state_of(model) == before


def test_a_rank_that_no_module_follows_may_be_any(tmp_path: Path) -> None:
    targets = ["q_proj", "up_proj"]
    supernet = elastic(tiny("llama"), target_modules=targets, r=32, ranks=[4], rank_pattern=dict.fromkeys(targets, 8))
    supernet.model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(tiny("llama"), tmp_path).model), logits(supernet.model))


def test_tensors_of_other_adapters_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({**load_file(file), name: torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    changed(tmp_path / "adapter", trainable_token_indices=[1])
    with pytest.raises(CheckpointError):
        load_adapter(tiny("llama"), tmp_path / "adapter")


def test_pickled_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors; .* pickles are not read"):
        load_adapter(tiny("llama"), tmp_path / "adapter")
