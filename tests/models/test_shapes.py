"""What the static models compute: against stock models, zero-padded stock models, and loops written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_static import (
    EVERY_HEAD,
    LAYERS,
    SIZES,
    VOCABULARY,
    build,
    config_of,
    mixed_layers,
    narrow,
    output,
    seeded,
    tokens,
)
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

STOCK: dict[str, tuple[Any, Any, Any, str]] = {
    "elastic_bert": (BertConfig, BertModel, BertForMaskedLM, "ElasticBertForMaskedLM"),
    "elastic_llama": (LlamaConfig, LlamaModel, LlamaForCausalLM, "ElasticLlamaForCausalLM"),
    "elastic_gpt2": (GPT2Config, GPT2Model, GPT2LMHeadModel, "ElasticGPT2ForCausalLM"),
}
# BERT and GPT-2 derive the size of a head from the hidden size, so the stock model is built with these.
WIDTHS = {0: (20, 2), 1: (48, 4), 2: (7, 1), 3: (33, 3)}


def stock_model(model_type: str, *, head: bool, **changes: Any) -> PreTrainedModel:
    config, base, with_head, _ = STOCK[model_type]
    make = with_head if head else base
    return seeded(lambda: make(config(vocab_size=VOCABULARY, **{**SIZES[model_type], **changes})))


def hidden_states_of(model_type: str, per_layer: dict[int, dict[str, Any]], state: dict[str, Tensor]) -> Tensor:
    names = {"elastic_bert": "ElasticBertModel", "elastic_llama": "ElasticLlamaModel"}
    model = build(model_type, names.get(model_type, "ElasticGPT2Model"), config_of(model_type, per_layer))
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return output(model, input_ids=tokens())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", STOCK)
def test_equal_layers_with_stock_weights_give_the_stock_logits_to_the_bit(model_type: str, implementation: str) -> None:
    stock = stock_model(model_type, head=True)
    static = build(model_type, STOCK[model_type][3], config_of(model_type))
    static.load_state_dict(stock.state_dict(), strict=True)
    stock.set_attn_implementation(implementation)
    static.set_attn_implementation(implementation)
    mask = torch.ones_like(tokens())
    mask[0, 6:] = 0
    inputs = {"input_ids": tokens(), "attention_mask": mask, "labels": tokens(seed=5)}
    ours, theirs = static(**inputs), stock(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def padded(name: str, tensor: Tensor, shape: torch.Size, *, thirds: bool) -> Tensor:
    """Zero-pads a projection to the stock shape; a fused one within each of query, key and value."""
    parts = tensor.chunk(3, dim=-1) if thirds else (tensor,)
    target = torch.zeros(shape)
    for box, part in zip(target.chunk(len(parts), dim=-1), parts, strict=True):
        box[tuple(slice(size) for size in part.shape)] = part
    return target


@pytest.mark.parametrize("model_type", STOCK)
def test_narrow_layers_compute_what_a_stock_model_padded_with_zeros_does(model_type: str) -> None:
    per_layer = {i: narrow(model_type, width=width, groups=groups) for i, (width, groups) in WIDTHS.items()}
    static = build(model_type, STOCK[model_type][3], config_of(model_type, per_layer))
    stock = stock_model(model_type, head=True)
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    padded_state = {
        name: padded(name, tensor, shapes[name], thirds=".c_attn." in name)
        for name, tensor in static.state_dict().items()
    }
    assert any(padded_state[name].shape != tensor.shape for name, tensor in static.state_dict().items())
    stock.load_state_dict(padded_state, strict=True)
    ours, theirs = output(static, input_ids=tokens()), output(stock, input_ids=tokens())
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def bert_by_hand(stock: Any, skips: dict[int, list[str]]) -> Tensor:
    hidden = stock.embeddings(tokens())
    for i, layer in enumerate(stock.encoder.layer):
        if "attention" not in skips[i]:
            hidden = layer.attention(hidden)[0]
        if "mlp" not in skips[i]:
            hidden = layer.output(layer.intermediate(hidden), hidden)
    return hidden


def llama_by_hand(stock: Any, skips: dict[int, list[str]]) -> Tensor:
    hidden = stock.embed_tokens(tokens())
    positions = torch.arange(hidden.shape[1])[None]
    rotary, mask = stock.rotary_emb(hidden, positions), causal(hidden.shape[1])
    for i, layer in enumerate(stock.layers):
        if "attention" not in skips[i]:
            normed = layer.input_layernorm(hidden)
            hidden = hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        if "mlp" not in skips[i]:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return stock.norm(hidden)


def gpt2_by_hand(stock: Any, skips: dict[int, list[str]]) -> Tensor:
    hidden = stock.wte(tokens()) + stock.wpe(torch.arange(tokens().shape[1])[None])
    for i, block in enumerate(stock.h):
        if "attention" not in skips[i]:
            hidden = hidden + block.attn(block.ln_1(hidden), attention_mask=causal(hidden.shape[1]))[0]
        if "mlp" not in skips[i]:
            hidden = hidden + block.mlp(block.ln_2(hidden))
    return stock.ln_f(hidden)


def causal(length: int) -> Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


BY_HAND = {"elastic_bert": bert_by_hand, "elastic_llama": llama_by_hand, "elastic_gpt2": gpt2_by_hand}
SKIPS: dict[str, dict[int, list[str]]] = {
    "nothing": {i: [] for i in range(LAYERS)},
    "each kind": {0: ["attention"], 1: [], 2: ["mlp"], 3: ["attention", "mlp"]},
    "all attention": {i: ["attention"] for i in range(LAYERS)},
    "all mlp": {i: ["mlp"] for i in range(LAYERS)},
    "everything": {i: ["attention", "mlp"] for i in range(LAYERS)},
}


@pytest.mark.parametrize("skips", SKIPS.values(), ids=SKIPS)
@pytest.mark.parametrize("model_type", STOCK)
def test_a_skipped_sublayer_leaves_the_hidden_states_alone(model_type: str, skips: dict[int, list[str]]) -> None:
    stock = stock_model(model_type, head=False)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = BY_HAND[model_type](stock, skips)
    per_layer = {i: {"skip": names} for i, names in skips.items() if names}
    got = hidden_states_of(model_type, per_layer, stock.state_dict())
    assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_skipped_sublayer_has_no_parameters(model_type: str, name: str) -> None:
    full = {parameter for parameter, _ in build(model_type, name, config_of(model_type)).named_parameters()}
    cut = {parameter for parameter, _ in build(model_type, name).named_parameters()}
    assert cut < full
    paths = {"elastic_bert": "encoder.layer.", "elastic_llama": "layers.", "elastic_gpt2": "h."}
    belongs = {number: [p for p in cut if f".{paths[model_type]}{number}." in f".{p}"] for number in range(LAYERS)}
    attention = ("attention", "self_attn", "input_layernorm", "attn", "ln_1")
    assert belongs[3] == []
    assert not [p for p in belongs[0] if any(f".{part}." in p for part in attention)]
    assert all(any(f".{part}." in p for part in attention) for p in belongs[2])


def test_the_size_of_a_head_does_not_follow_from_the_number_of_heads() -> None:
    for model_type, name in (("elastic_bert", "ElasticBertModel"), ("elastic_gpt2", "ElasticGPT2Model")):
        config = config_of(model_type, {1: {"num_attention_heads": 3}}, head_dim=5)
        model = build(model_type, name, config)
        assert output(model, input_ids=tokens()).shape == (2, 9, 32)
        widths = {20, 15} if model_type == "elastic_bert" else {60, 45}
        projections = [p for n, p in model.named_parameters() if n.endswith(("query.weight", "c_attn.weight"))]
        assert {max(p.shape) if model_type == "elastic_gpt2" else p.shape[0] for p in projections} == widths


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_every_rotary_type_works_with_heads_that_differ(rope: str) -> None:
    extra: dict[str, dict[str, Any]] = {
        "yarn": {"original_max_position_embeddings": 32},
        "llama3": {"original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [2.0] * 3,
        },
    }
    parameters = {"rope_type": rope, "factor": 2.0, "rope_theta": 5000.0, **extra.get(rope, {})}
    stock = stock_model("elastic_llama", head=True, rope_parameters=dict(parameters))
    per_layer = {1: {"num_attention_heads": 2, "num_key_value_heads": 1}}
    config = config_of("elastic_llama", per_layer, rope_parameters=dict(parameters))
    static = build("elastic_llama", "ElasticLlamaForCausalLM", config)
    assert torch.equal(static.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert output(static, input_ids=tokens()).shape == (2, 9, VOCABULARY)


@pytest.mark.parametrize(
    ("model_type", "per_layer", "message"),
    [
        ("elastic_bert", {0: {"hidden_size": 4}}, "only block, .* num_attention_heads and skip may differ"),
        ("elastic_bert", {0: {"skip": ["norm"]}}, "it can skip attention and mlp"),
        ("elastic_bert", {0: {"intermediate_size": 0}}, "intermediate_size=0 must be at least 1"),
        ("elastic_llama", {0: {"num_attention_heads": 3}}, "must be a multiple of num_key_value_heads=4"),
        ("elastic_gpt2", {0: {"n_embd": 4}}, "only block, .* n_head, n_inner and skip may differ"),
        ("elastic_bert", {9: {"intermediate_size": 4}}, r"in the range \[0, 4\)"),
    ],
)
def test_an_impossible_layer_is_refused(model_type: str, per_layer: dict[int, dict[str, Any]], message: str) -> None:
    with pytest.raises(Exception, match=message):
        config_of(model_type, per_layer)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("elastic_bert", {"is_decoder": True}, "is an encoder"),
        ("elastic_bert", {"positions_skip_padding": True, "pad_token_id": None}, "needs a pad_token_id"),
        ("elastic_gpt2", {"add_cross_attention": True}, "has no cross-attention"),
        ("elastic_llama", {"layer_types": ["sliding_attention"] * 4}, "needs a sliding_window"),
        ("elastic_llama", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("elastic_llama", {"num_hidden_layers": 10**12}, "must be a number of layers, at most 1024"),
        ("elastic_gpt2", {"n_layer": 10**9}, "must be a number of layers, at most 1024"),
        ("elastic_bert", {"num_hidden_layers": -1}, "must be a number of layers, at most 1024"),
        ("elastic_bert", {"per_layer_config": [[]]}, "must be a dict from numbers of layers to dicts"),
        ("elastic_gpt2", {"per_layer_config": {"0": None}}, "must be a dict from numbers of layers to dicts"),
    ],
)
def test_a_config_that_no_static_model_holds_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        config_of(model_type, **changes)


def test_common_names_of_sizes_are_understood_by_every_family() -> None:
    config = config_of("elastic_gpt2", {1: {"intermediate_size": 12, "num_attention_heads": 2}})
    assert config.per_layer_config[1].n_inner == 12
    assert config.per_layer_config[1].num_attention_heads == 2
    assert config.per_layer_config[0].n_inner == 48
    assert mixed_layers("elastic_gpt2")[1]["intermediate_size"] == 12


@pytest.mark.parametrize("model_type", list(SIZES))
def test_a_config_of_layers_that_differ_is_read_without_its_type_as_a_trainer_reads_it(
    model_type: str, tmp_path: Path
) -> None:
    config = config_of(model_type, {1: {"intermediate_size": 16}})
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").num_hidden_layers == LAYERS
    again = type(config).from_pretrained(tmp_path)
    assert again.num_hidden_layers == LAYERS and again.to_dict() == config.to_dict()
