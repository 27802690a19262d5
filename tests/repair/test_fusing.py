"""``fuse_heads`` on finished models: heads that the test plants in stock layers, and what comes back from disk."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import block_models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import inputs, supernet_of, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from hf_elastic import export, extract, fuse_heads, make_elastic
from hf_elastic.errors import CompressionError, DataError, ExportError, UnsupportedModelError

ALIKE = 0.9999
TOLERANCE = {"merge": 1e-5, "remove": 1e-5}
HEADS = [
    ("bert", "lm"), ("bert", "sequence"), ("roberta", "lm"), ("roberta", "token"), ("distilbert", "lm"),
    ("distilbert", "qa"), ("gpt2", "lm"), ("gpt2", "sequence"), ("gpt2", "base"),
]  # fmt: skip
DROPOUTS = {
    "distilbert": {"dropout": 0.2, "attention_dropout": 0.2},
    "gpt2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "embd_pdrop": 0.2},
}
ENCODER_DROPOUTS = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def layers_of(model: Any) -> Any:
    base = model.base_model
    kind = model.config.model_type
    return base.h if "gpt2" in kind else (base.transformer if kind == "distilbert" else base.encoder).layer


def rows_of(layer: Any, head: int) -> list[tuple[Tensor, Tensor]]:
    """Weights (d, D) and biases of query, key and value of one head of 8 dimensions in a stock layer."""
    here = slice(8 * head, 8 * head + 8)
    if "attn" in dict(layer.named_children()):
        fused = layer.attn.c_attn
        return [
            (weight[:, here].t(), bias[here])
            for weight, bias in zip(fused.weight.chunk(3, 1), fused.bias.chunk(3), strict=True)
        ]
    attention = layer.attention
    if "q_lin" in dict(attention.named_children()):
        projections = [attention.q_lin, attention.k_lin, attention.v_lin]
    else:
        projections = [attention.self.query, attention.self.key, attention.self.value]
    return [(projection.weight[here], projection.bias[here]) for projection in projections]


@torch.no_grad()
def planted(family: str, head: str = "lm", **changes: Any) -> PreTrainedModel:
    """A stock model whose last head says in every layer what its second one says, in other coordinates."""
    model = tiny(family, head, **{**DROPOUTS.get(family, ENCODER_DROPOUTS), **changes})
    for number, layer in enumerate(layers_of(model)):
        turns = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(number)))[0]
        matrices = (turns[0], turns[0], 0.6 * turns[1])
        for matrix, (weight, bias), (twin, twin_bias) in zip(
            matrices, rows_of(layer, 1), rows_of(layer, 3), strict=True
        ):
            twin.copy_(matrix @ weight)
            twin_bias.copy_(matrix @ bias)
    return model


def texts(model: PreTrainedModel, *, labels: bool = False) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(3):
        feed = inputs(model, batch_size=8, tokens=12, seed=10 + seed)
        feed["attention_mask"] = (torch.arange(12) < 12 - torch.arange(8)[:, None] % 4).long()
        made.append({**feed, "labels": feed["input_ids"]} if labels else feed)
    return made


def output(model: PreTrainedModel) -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        found = model(**inputs(model), attention_mask=mask, return_dict=False)[0]
    return found[mask.bool()] if found.shape[:2] == mask.shape else found


def same_weights(model: PreTrainedModel, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", ["merge", "remove"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_head_that_says_the_same_goes_and_the_model_stays_what_it_was(
    family: str, head: str, *, mode: Any, tmp_path: Path
) -> None:
    model = planted(family, head)
    weights, config, wanted = copy.deepcopy(model.state_dict()), model.config.to_dict(), output(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    model.train()
    data = texts(model, labels=head == "lm")
    fused, report = fuse_heads(model, data, mode=mode, threshold=ALIKE)
    assert all(module.training for module in model.modules())
    assert same_weights(model, weights) and model.config.to_dict() == config
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {entry.groups for entry in report.layers} == {((0,), (1, 3), (2,))}
    assert type(fused).__name__.startswith("ElasticGPT2" if family == "gpt2" else "ElasticBert")
    assert fused.config.num_attention_heads == 3 and not fused.training
    assert (output(fused) - wanted).abs().max() <= TOLERANCE[mode] * wanted.abs().max()
    numbers = [sum(p.numel() for p in layers_of(m).parameters()) for m in (model, fused)]
    assert [report.parameters_before, report.parameters_after] == numbers
    assert numbers[0] - numbers[1] == 3 * (4 * 8 * 32 + 3 * 8)
    assert (report.loss_before is None) == (head != "lm")
    fused.save_pretrained(tmp_path)
    again = type(fused).from_pretrained(tmp_path).eval()
    assert same_weights(again, fused.state_dict()) and torch.equal(output(again), output(fused))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_losses_are_those_of_the_models_and_tied_embeddings_stay_tied(family: str) -> None:
    model = planted(family)
    data = texts(model, labels=True)
    fused, report = fuse_heads(model, data, threshold=0.2, min_heads=1)
    assert any(entry.after < 3 for entry in report.layers)
    for one, said in ((model, report.loss_before), (fused, report.loss_after)):
        with torch.no_grad():
            losses = [float(one(**batch).loss) for batch in data]
        assert said == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert fused.get_output_embeddings().weight is fused.get_input_embeddings().weight
    assert fused.get_input_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_embeddings_that_were_untied_stay_apart_whatever_the_config_says(family: str, tmp_path: Path) -> None:
    model = planted(family)
    decoder = model.get_output_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().flip(0))
    wanted = output(model)
    fused, _ = fuse_heads(model, texts(model), threshold=ALIKE)
    assert (output(fused) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    fused.save_pretrained(tmp_path)
    assert torch.equal(output(type(fused).from_pretrained(tmp_path).eval()), output(fused))


@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_half_precision_stays_half_and_close(family: str, mode: Any) -> None:
    model = planted(family).to(torch.bfloat16)
    fused, report = fuse_heads(model, texts(model), mode=mode, threshold=0.99)
    assert {entry.after for entry in report.layers} == {2 if mode == "resplit" else 3}
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {torch.bfloat16}
    if mode != "resplit":
        torch.testing.assert_close(output(fused), output(model), rtol=0, atol=0.05 * float(output(model).abs().max()))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_where_no_heads_are_alike_a_copy_of_the_model_comes_back(family: str) -> None:
    model = tiny(family).train()
    fused, report = fuse_heads(model, texts(model), threshold=1)
    assert type(fused) is type(model) and fused is not model and not fused.training
    assert same_weights(fused, model.state_dict()) and report.parameters_after == report.parameters_before
    shared = {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_a_generation_config_and_what_it_generates_are_kept() -> None:
    model = planted("gpt2")
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 5, 1.3
    fused, _ = fuse_heads(model, texts(model), threshold=ALIKE)
    assert fused.generation_config.to_dict() == model.generation_config.to_dict()
    feed = inputs(model)
    feed["attention_mask"] = torch.ones_like(feed["input_ids"])
    assert torch.equal(fused.generate(**feed, do_sample=False), model.generate(**feed, do_sample=False))


@pytest.mark.parametrize("kind", block_models.TYPES)
def test_static_models_whose_layers_differ_are_fused_once_more(kind: str, tmp_path: Path) -> None:
    layers = {0: {"block": "bottleneck-kv"}, 1: {"num_attention_heads": 2, "intermediate_size": 20}}
    model = block_models.tiny(kind, candidate_blocks=None, per_layer_config=layers)
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    modules = {name: type(module) for name, module in model.named_modules()}
    data = [{"input_ids": block_models.tokens(batch=12, length=12)}]
    before = [4, 2, 4]
    for mode in ("merge", "remove", "resplit"):
        made, report = fuse_heads(model, data, mode=mode, threshold=0.2, min_heads=1)  # type: ignore[arg-type]
        assert [entry.before for entry in report.layers] == before
        assert any(entry.after < entry.before for entry in report.layers)
        heads = [layer.num_attention_heads for layer in made.config.per_layer_config]
        assert heads == [entry.after for entry in report.layers]
        made.save_pretrained(tmp_path / mode)
        again = type(made).from_pretrained(tmp_path / mode).eval()
        assert torch.equal(block_models.output(again), block_models.output(made))
    assert same_weights(model, weights) and model.config.to_dict() == config
    assert {name: type(module) for name, module in model.named_modules()} == modules
    merged, _ = fuse_heads(model, data, threshold=0.35, min_heads=1)
    _, second = fuse_heads(merged, data, mode="resplit", threshold=0.01, min_heads=1)
    assert {entry.after for entry in second.layers} == {1}


def test_what_is_no_finished_model_with_heads_to_fuse_is_refused_with_the_reason() -> None:
    data = texts(tiny("bert"))
    with pytest.raises(UnsupportedModelError, match=r"'llama' has no heads .* rotated by position"):
        fuse_heads(tiny("llama"), data)
    with pytest.raises(UnsupportedModelError, match="finished model"):
        fuse_heads(supernet_of("bert").model, data)
    with pytest.raises(UnsupportedModelError, match="finished model"):
        fuse_heads(block_models.supernet_of("elastic_bert").model, data)
    with pytest.raises(UnsupportedModelError, match="finished model"):
        fuse_heads(block_models.tiny("elastic_gpt2"), data)  # candidates that make_elastic has not seen
    for supernet in (supernet_of("bert"), block_models.supernet_of("elastic_bert")):
        with pytest.raises(UnsupportedModelError, match=r"got a Supernet; extract a subnet first: fuse_heads\(hf_elas"):
            fuse_heads(supernet, data)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel|transformers model"):
        fuse_heads(torch.nn.Linear(2, 2), data)  # type: ignore[arg-type]
    skipping = block_models.tiny("elastic_bert", candidate_blocks=None, per_layer_config={1: {"skip": ["attention"]}})
    with pytest.raises(UnsupportedModelError, match="layer 1 skips"):
        fuse_heads(skipping, data)
    with pytest.raises(ExportError, match="BertForMultipleChoice has no static class"):
        fuse_heads(tiny("bert", "choice"), data)


def test_adapters_are_refused_until_they_are_merged() -> None:
    lora = LoraConfig(r=2, target_modules=["query", "value"])
    wrapped = get_peft_model(planted("bert"), lora)
    data = texts(planted("bert"))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            fuse_heads(model, data)
    inside = tiny("bert")
    inside.add_adapter(lora)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        fuse_heads(inside, data)
    fused, report = fuse_heads(wrapped.merge_and_unload(), data, threshold=ALIKE)
    assert {entry.after for entry in report.layers} == {3} and fused.config.num_attention_heads == 3


def test_arguments_are_those_of_fuse_heads_in_place() -> None:
    model = planted("distilbert")
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError, match="min_heads=1"):
        fuse_heads(model, texts(model), threshold=0.01)
    with pytest.raises(DataError, match="at least one"):
        fuse_heads(model, [])
    with pytest.raises(CompressionError, match="samples='tokens'"):
        fuse_heads(model, texts(model), samples="sequences")
    _, report = fuse_heads(model, texts(model), mode="resplit", samples="sequences", threshold=0.01, min_heads=1)
    assert {entry.after for entry in report.layers} == {1}
    assert same_weights(model, weights)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padded_with_zeros_the_stock_class_holds_it(family: str) -> None:
    model = planted(family)
    fused, report = fuse_heads(model, texts(model), threshold=0.2, min_heads=1)
    assert len({entry.after for entry in report.layers}) > 1
    wanted, supernet = output(fused), make_elastic(fused)
    padded = extract(supernet, supernet.space.largest(), loadability="stock-padded")
    assert type(padded) is type(model) and padded.config.num_attention_heads == 4
    assert (output(padded) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


READER = """
import sys
import torch, transformers
sys.modules["hf_elastic"] = None  # importing it now raises
root = sys.argv[1]
for name, auto in (("roberta", "AutoModelForMaskedLM"), ("gpt2", "AutoModelForCausalLM")):
    model = getattr(transformers, auto).from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    feed = torch.load(f"{root}/{name}.pt")
    with torch.no_grad():
        torch.save(model(**feed, return_dict=False)[0], f"{root}/{name}-found.pt")
"""


@pytest.mark.slow
def test_an_exported_one_loads_in_a_process_without_hf_elastic(tmp_path: Path) -> None:
    wanted = {}
    for family, auto in (("roberta", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)):
        model = planted(family)
        fused, _ = fuse_heads(model, texts(model), threshold=0.2, min_heads=1)
        supernet = make_elastic(copy.deepcopy(fused))
        export(supernet, supernet.space.largest(), tmp_path / family, loadability="remote-code")
        feed = inputs(model)
        torch.save(feed, tmp_path / f"{family}.pt")
        with torch.no_grad():
            wanted[family] = fused(**feed)[0]
            assert torch.equal(auto.from_pretrained(tmp_path / family).eval()(**feed)[0], wanted[family])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", READER, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for family, tensor in wanted.items():
        assert torch.equal(torch.load(tmp_path / f"{family}-found.pt"), tensor)
