"""ZeroLM's closed form against singular values, its tables against subnets that were extracted, and bad checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import point, supernet_of, tiny
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_elastic as he
from hf_elastic.proxies import ZeroLMTable, checkpoint_table, matrix_score, roles_of, score, zerolm_parts
from hf_elastic.proxies.subject import Subject

FAMILIES = ["bert", "distilbert", "llama", "qwen3", "gpt2"]


def by_singular_values(weight: Tensor) -> float:
    """Eq. 3 of the paper."""
    return float(torch.linalg.svdvals(weight.double()).square().sum()) / min(weight.shape)


def parts_by_singular_values(model: PreTrainedModel) -> tuple[float, float]:
    """Both parts from names alone: what an attention or an FFN module holds, fused outputs apart."""
    attention = ffn = 0.0
    for name, module in model.base_model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or "pooler" in name:
            continue
        weight = module.weight.detach()
        if "attn" in name or "attention" in name:
            pieces = weight.chunk(3, dim=1) if name.endswith("c_attn") else (weight,)
            attention += sum(by_singular_values(piece) for piece in pieces)
        else:
            ffn += by_singular_values(weight)
    return attention, ffn


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_a_matrix_scores_the_mean_of_its_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    assert matrix_score(weight) == pytest.approx(by_singular_values(weight), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_scores_its_matrices_by_role(family: str) -> None:
    model = tiny(family)
    wanted = parts_by_singular_values(model)
    assert zerolm_parts(Subject(model, roles_of(model))) == pytest.approx(wanted, rel=1e-5)
    assert ZeroLMTable.of_model(model).parts() == pytest.approx(wanted, rel=1e-5)
    assert score(model, "zerolm") == pytest.approx(sum(wanted) / 2, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_scores_every_subnet_as_it_would_be_extracted(family: str) -> None:
    supernet = supernet_of(family)
    table = ZeroLMTable.of_model(supernet.base)
    rng = random.Random(0)
    compared = 0
    for _ in range(12):
        architecture = supernet.space.sample(rng)
        one = he.extract(supernet, architecture, loadability="remote-code")
        compared += 1
        found = table.parts(supernet.layer_shapes(architecture))
        assert found == pytest.approx(parts_by_singular_values(one), rel=1e-5)
    assert compared == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expectation_is_the_mean_over_initialisations(family: str) -> None:
    config = tiny(family).config
    config.initializer_range = 0.05
    drawn = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(20):
            model = AutoModel.from_config(config)
            drawn.append(ZeroLMTable.of_model(model).parts())
    with torch.device("meta"):
        shapes_only = AutoModel.from_config(config)
    mean = torch.tensor(drawn).mean(0).tolist()
    assert ZeroLMTable.expected(shapes_only).parts() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_checkpoint_is_scored_without_being_loaded(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard != "1GB"
    found, wanted = checkpoint_table(tmp_path), ZeroLMTable.of_model(model)
    for one, other in zip(found.layers, wanted.layers, strict=True):
        for ours, theirs in zip(one.queries + one.keys + one.ffn, other.queries + other.keys + other.ffn, strict=True):
            assert ours.energy == pytest.approx(theirs.energy, rel=1e-6)


def test_a_searched_model_with_layers_of_their_own_sizes_is_scored_from_its_folder(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    architecture = point(supernet, ffn0=16, heads1=1, skip2="attention")
    he.export(supernet, architecture, tmp_path / "out", loadability="remote-code")
    table = ZeroLMTable.of_model(supernet.base)
    wanted = table.parts(supernet.layer_shapes(architecture))
    assert checkpoint_table(tmp_path / "out").parts() == pytest.approx(wanted, rel=1e-6)


def test_a_checkpoint_in_the_hub_cache_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    tiny("bert").save_pretrained(snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("hf_elastic.proxies.stored._HUB", {"cache_dir": str(tmp_path)})
    assert checkpoint_table("org/name").parts() == pytest.approx(checkpoint_table(snapshot).parts())


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(he.CheckpointError, match="no checkpoint can be read"):
        checkpoint_table(tmp_path)
    whole = tmp_path / "whole"
    model = tiny("llama")
    model.save_pretrained(whole, max_shard_size="20KB")
    shard = sorted(whole.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(he.CheckpointError, match=f"lacks the shard {shard.name}"):
        checkpoint_table(whole)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(he.CheckpointError, match="is truncated or no safetensors file"):
        checkpoint_table(whole)
    shard.write_bytes(content)
    index = whole / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    del stated["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(stated))
    with pytest.raises(he.CheckpointError, match="has no weight"):
        checkpoint_table(whole)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(he.CheckpointError, match="no index of shards"):
        checkpoint_table(whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w.half().fill_(float("inf")), he.DataError, "not finite"),
        (lambda w: w[:3].clone(), he.CheckpointError, "its config says"),
        (lambda w: w.to(torch.int8), he.UnsupportedModelError, "holds int8"),
        (lambda w: w.to(torch.float8_e4m3fn), he.UnsupportedModelError, "holds float8_e4m3fn"),
    ],
)
def test_weights_that_cannot_be_scored_are_named(change, error, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"] = change(state["model.layers.1.mlp.up_proj.weight"])
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        checkpoint_table(tmp_path)


def test_the_body_is_found_beside_another_one(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    drafts = {f"draft.{name}": torch.zeros_like(tensor) for name, tensor in state.items() if ".layers." in name}
    save_file({**drafts, **state}, file, metadata={"format": "pt"})
    assert checkpoint_table(tmp_path).parts() == pytest.approx(ZeroLMTable.of_model(model).parts())


@pytest.mark.parametrize("change", [{"hidden_size": "abc"}, {"hidden_size": -4}, {"num_attention_heads": 0}])
def test_a_damaged_config_is_named(change: dict[str, object], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, **change}))
    with pytest.raises(he.CheckpointError, match="no checkpoint can be read"):
        checkpoint_table(tmp_path)


def test_large_values_of_half_precision_do_not_overflow() -> None:
    weight = torch.full((4, 8), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    assert matrix_score(weight) == pytest.approx(300.0**2 * 32 / 4)
