"""Static models with routers: what the config may say, what they compute, and that both are saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from routed_checkpoints import randomise, routers_in
from test_remote_code import export, run_without_hf_elastic
from tiny_static import LAYERS, PADDING, VOCABULARY, build, config_of, model_class, narrow, output, tokens
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

NAMES = {
    "elastic_bert": "ElasticBertForMaskedLM",
    "elastic_llama": "ElasticLlamaForCausalLM",
    "elastic_gpt2": "ElasticGPT2ForCausalLM",
}
TOKENS: dict[str, Any] = {"of": 100, "values": [40, 70, 100], "active": 40}
FOUR: dict[str, Any] = {"of": 4, "values": [1, 2, 4], "active": 2}
EVERYTHING = {"mlp_tokens": TOKENS, "attention_tokens": TOKENS, "heads": FOUR, "experts": FOUR}


def routing(*layers: int, hidden: int | None = None, **kinds: Any) -> dict[str, Any]:
    """The field of a config: the same for some layers, everything by default."""
    return {"layers": {str(number): {"hidden": hidden, **(kinds or EVERYTHING)} for number in layers}}


def routed(model_type: str, stated: Any = None, **changes: Any) -> Any:
    """A model whose weights are random, those of its routers too."""
    model = build(model_type, NAMES[model_type], config_of(model_type, routing=stated or routing(0, 2), **changes))
    randomise(routers_in(model))
    return model


def mask(model_type: str) -> Tensor:
    found = torch.ones_like(tokens())
    found[0, slice(6, None) if model_type == "elastic_bert" else slice(3)] = PADDING
    return found


def logits(model: Any, model_type: str) -> Tensor:
    return output(model, input_ids=tokens(), attention_mask=mask(model_type))[mask(model_type).bool()]


def same_model(one: Any, other: Any, model_type: str) -> bool:
    """Whether two models compute the same, in float64: a changed bit of a weight shows, the order of sums does not."""
    found, wanted = (logits(copy.deepcopy(model).double(), model_type) for model in (one, other))
    return bool((found - wanted).abs().max() <= 1e-12 * wanted.abs().max())


# -- what they compute ------------------------------------------------------------------------------------------------


def bert_by_hand(model: Any) -> Tensor:
    """The token router of the FFN in layer 1, row by row and token by token."""
    base, real = model.bert, mask("elastic_bert").bool()
    hidden = base.embeddings(tokens())
    for number, layer in enumerate(base.encoder.layer):
        hidden = layer.attention(hidden, real[:, None, None, :])
        change = layer.output.dense(layer.intermediate(hidden))
        if number == 1:
            scores = layer.routers["mlp_tokens"](hidden).squeeze(-1)
            for row in range(len(real)):
                places = [t for t in range(real.shape[1]) if real[row, t]]
                best = sorted(places, key=lambda t: -float(scores[row, t]))[: int(0.4 * len(places) + 0.5)]  # noqa: B023
                for t in range(real.shape[1]):
                    change[row, t] *= 0.4 + 0.6 * 2 * scores[row, t].sigmoid() if t in best else 0.0
        hidden = layer.output.LayerNorm(hidden + change)
    return model.cls(hidden)


def decoder_by_hand(model: Any, model_type: str) -> Tensor:
    """The token router of the FFN in layer 1: a token enters where its score exceeds the threshold."""
    base, real = model.base_model, mask(model_type).bool()
    positions = torch.arange(tokens().shape[1])[None]
    seen = real[:, None, None, :] & torch.ones(1, 1, 9, 9, dtype=torch.bool).tril() | torch.eye(9, dtype=torch.bool)
    llama = model_type == "elastic_llama"
    hidden = base.embed_tokens(tokens()) if llama else base.wte(tokens()) + base.wpe(positions)
    rotary = {"position_embeddings": base.rotary_emb(hidden, positions)} if llama else {}
    for number, layer in enumerate(base.layers if llama else base.h):
        attention, first, second = (
            (layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm)
            if llama
            else (layer.attn, layer.ln_1, layer.ln_2)
        )
        hidden = hidden + attention(first(hidden), attention_mask=seen, **rotary)[0]
        normed = second(hidden)
        change = (LlamaMLP if llama else GPT2MLP).forward(layer.mlp, normed)  # without its routers
        if number == 1:
            scores = layer.routers["mlp_tokens"](normed)
            change = change * torch.where(scores > 0.3, 0.4 + 0.6 * 2 * scores.sigmoid(), 0.0)
        hidden = hidden + change
    return model.lm_head((base.norm if llama else base.ln_f)(hidden))


@pytest.mark.parametrize("model_type", NAMES)
def test_routed_tokens_are_those_of_a_loop_written_by_hand(model_type: str) -> None:
    model = routed(model_type, routing(1, mlp_tokens=TOKENS))
    got = logits(model, model_type)
    plain = copy.deepcopy(model)
    plain.set_capacity(mlp_tokens=1.0)
    with torch.no_grad():
        wanted = bert_by_hand(plain) if model_type == "elastic_bert" else decoder_by_hand(plain, model_type)
    wanted = wanted[mask(model_type).bool()]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(plain, model_type) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", NAMES)
def test_at_full_capacity_a_routed_model_is_the_plain_one_to_the_bit(model_type: str) -> None:
    model, plain = routed(model_type), build(model_type, NAMES[model_type], config_of(model_type))
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".routers." not in name}
    plain.load_state_dict(weights, strict=True)
    assert not torch.equal(logits(model, model_type), logits(plain, model_type))
    model.set_capacity(mlp_tokens=1.0, attention_tokens=1.0, heads=4, experts=1.0)
    assert torch.equal(logits(model, model_type), logits(plain, model_type))


@pytest.mark.parametrize("model_type", ["elastic_llama", "elastic_gpt2"])
def test_text_is_the_same_with_a_cache_and_without(model_type: str) -> None:
    model = routed(model_type)
    feed = {"input_ids": tokens(), "attention_mask": mask(model_type), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**feed), model.generate(**feed, use_cache=False))


# -- how they begin ---------------------------------------------------------------------------------------------------


def check_fresh(model: Any) -> None:
    for router in routers_in(model):
        assert not router.scores.weight.any() and not router.scores.bias.any()
        assert router.hidden is not None and router.hidden.weight.std() > 0.01 and not router.hidden.bias.any()
        assert router.thresholds is None or router.thresholds.isnan().all()


@pytest.mark.parametrize("model_type", NAMES)
def test_a_new_model_scores_zero_and_knows_no_thresholds(model_type: str) -> None:
    config = config_of(model_type, routing=routing(0, 3, hidden=8))
    for dtype in (None, torch.bfloat16):
        model = model_class(model_type, NAMES[model_type])._from_config(config, dtype=dtype)
        check_fresh(model)
        assert {p.dtype for router in routers_in(model) for p in router.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("model_type", NAMES)
def test_a_checkpoint_without_routers_gets_such_as_score_zero(model_type: str, tmp_path: Path) -> None:
    build(model_type, NAMES[model_type], config_of(model_type)).save_pretrained(tmp_path)
    config = config_of(model_type, routing=routing(0, 3, hidden=8))
    check_fresh(model_class(model_type, NAMES[model_type]).from_pretrained(tmp_path, config=config))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize("model_type", NAMES)
def test_routers_stay_in_float32_in_a_model_of_half_precision(model_type: str, dtype: Any, tmp_path: Path) -> None:
    model = routed(model_type)
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".routers." in name}
    model.config.dtype = torch.bfloat16
    for parameter in model.parameters():
        if not any(parameter is tensor for router in routers_in(model) for tensor in router.parameters()):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    found = again.state_dict()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == torch.float32 for name, tensor in kept.items())
    assert {tensor.dtype for name, tensor in found.items() if ".routers." not in name} == {again.dtype}


@pytest.mark.parametrize("model_type", NAMES)
def test_a_routed_model_is_the_same_after_it_was_saved(model_type: str, tmp_path: Path) -> None:
    layers = {1: narrow(model_type, width=12, groups=2), 2: {"skip": ["attention"]}}
    stated = routing(0, hidden=5)
    stated["layers"]["1"] = {"hidden": None, "heads": {"of": 2, "values": [1, 2], "active": 1}}
    stated["layers"]["2"] = {"hidden": None, "experts": {**FOUR, "active": 1}}
    model = routed(model_type, stated, per_layer=layers)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.routing == model.config.routing
    assert same_model(again, model, model_type)


def test_a_routed_model_gives_the_same_in_a_process_without_hf_elastic(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"ids": tokens()}, tmp_path / "ids.safetensors")
    models = {model_type: routed(model_type) for model_type in NAMES}
    for model_type, model in models.items():
        export(model, tmp_path / model_type)
    jobs = [(name, f"AutoModelFor{NAMES[name].split('For')[-1]}") for name in models]
    result = run_without_hf_elastic(tmp_path, *jobs)
    assert result.returncode == 0, result.stderr[-3000:]
    found = load_file(tmp_path / "results.safetensors")
    for model_type, model in models.items():
        wanted = output(model, input_ids=tokens())
        assert (found[model_type] - wanted).abs().max() <= 2e-6 * wanted.abs().max()  # sums of another process
        again = json.loads((tmp_path / "again" / model_type / "config.json").read_text())
        assert again["routing"] == model.config.routing
    for model_type in ("elastic_llama", "elastic_gpt2"):
        feed = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(found[f"{model_type}.text"], models[model_type].generate(tokens(), **feed))


# -- the dial ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", NAMES)
def test_the_dial_is_that_of_a_model_made_at_the_capacity_and_is_saved(model_type: str, tmp_path: Path) -> None:
    model = routed(model_type)
    model.set_capacity(mlp_tokens=0.7, heads=1, experts=0.25)
    turned = routing(0, 2, mlp_tokens={**TOKENS, "active": 70}, attention_tokens=TOKENS,
                     heads={**FOUR, "active": 1}, experts={**FOUR, "active": 1})  # fmt: skip
    assert model.config.routing == turned
    other = routed(model_type, turned)
    other.load_state_dict(model.state_dict())
    assert same_model(model, other, model_type)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert same_model(again, model, model_type)


def test_a_base_model_has_the_dial_too() -> None:
    config = config_of("elastic_llama", routing=routing(1))
    model: Any = model_class("elastic_llama", "ElasticLlamaModel")(config)
    model.set_capacity(attention_tokens=0.7)
    assert model.config.routing["layers"]["1"]["attention_tokens"]["active"] == 70
    assert model.layers[1].routers.active["attention_tokens"] == 70


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ({"mlp_tokens": 0.5}, "mlp_tokens=0.5 is no capacity of the routers of layer 0; these have 0.4, 0.7, 1.0"),
        ({"heads": 3}, "heads=3 is no capacity .* these have 1, 2, 4"),
        ({"heads": 5}, "heads=5 is more than the 4 there are"),
        ({"mlp_tokens": 40}, "mlp_tokens has a capacity of 40; it must lie in"),
        ({"mlp_tokens": 0.555}, "no whole number of per cent"),
        ({"experts": 0}, "experts has a capacity of 0; it must lie in .* or be a count of at least 1"),
        ({"experts": True}, "experts has a capacity of True"),
        ({"hidden": 1}, "hidden is not routed in this model; routed: attention_tokens, experts, heads, mlp_tokens"),
        ({"layers": 1}, "layers is not routed"),
    ],
    ids=str,
)
def test_what_is_no_capacity_is_refused_and_nothing_turns(capacities: dict[str, Any], message: str) -> None:
    model = routed("elastic_bert")
    before = copy.deepcopy(model.config.routing)
    with pytest.raises(ValueError, match=message) as caught:
        model.set_capacity(attention_tokens=0.7, **capacities)
    assert "\n" not in str(caught.value) and model.config.routing == before
    assert model.bert.encoder.layer[0].routers.active["attention_tokens"] == 40


def test_a_model_without_routers_has_no_dial() -> None:
    model: Any = build("elastic_bert", "ElasticBertModel")
    with pytest.raises(ValueError, match="mlp_tokens is not routed in this model; routed: nothing"):
        model.set_capacity(mlp_tokens=0.5)


# -- what a config may say --------------------------------------------------------------------------------------------


def test_numbers_of_layers_may_be_numbers() -> None:
    config = config_of("elastic_bert", routing={"layers": {1: {"mlp_tokens": TOKENS}}})
    assert config.routing == {"layers": {"1": {"mlp_tokens": TOKENS}}}
    assert config_of("elastic_bert").routing is None


NARROW = {"per_layer": {1: {"intermediate_size": 30, "num_attention_heads": 2}}}
REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("elastic_bert", {"layer": {}}, {}, "routing must be .* or None for none"),
    ("elastic_bert", {"layers": {}}, {}, "routing must be .* or None for none"),
    ("elastic_bert", {"layers": [1]}, {}, "routing must be .* or None for none"),
    ("elastic_bert", routing(LAYERS), {}, "routing names layer 4; the model has layers 0 to 3"),
    ("elastic_bert", {"layers": {"-1": EVERYTHING}}, {}, "routing names layer -1"),
    ("elastic_bert", {"layers": {"0": {"hidden": 3}}}, {}, "routing of layer 0 has hidden; give at least one of"),
    ("elastic_bert", {"layers": {"0": None}}, {}, "routing of layer 0 has nothing; give at least one of"),
    ("elastic_gpt2", routing(0, neurons=FOUR), {}, "routing of layer 0 has hidden, neurons; give at least one of"),
    ("elastic_gpt2", routing(0, hidden=0), {}, "hidden=0; it is the width of a hidden layer, or None"),
    ("elastic_bert", routing(1, experts=FOUR), NARROW, "layer 1: 4 experts do not divide its 30 neurons"),
    ("elastic_bert", routing(1, heads=FOUR), NARROW, r"heads are of=4, but the layer has 2 \(groups of\) heads"),
    ("elastic_llama", routing(0, heads={"of": 8, "values": [8], "active": 8}), {}, "of=8, but the layer has 4"),
    ("elastic_llama", routing(0, mlp_tokens={**TOKENS, "of": 90, "values": [90], "active": 90}), {}, "of 100; got of="),
    ("elastic_llama", routing(0, heads={**FOUR, "values": [2, 1, 4]}), {}, "must ascend and end at of=4"),
    ("elastic_llama", routing(0, heads={**FOUR, "values": [1, 1, 4]}), {}, "must ascend and end at of=4"),
    ("elastic_llama", routing(0, heads={**FOUR, "values": [1, 2]}), {}, "must ascend and end at of=4"),
    ("elastic_llama", routing(0, heads={**FOUR, "values": []}), {}, "must ascend and end at of=4"),
    ("elastic_llama", routing(0, heads={**FOUR, "active": 3}), {}, "active=3, which is none of its values"),
    ("elastic_llama", routing(0, heads={**FOUR, "active": True}), {}, "integers of at least 1"),
    ("elastic_llama", routing(0, heads={**FOUR, "values": [0.5, 4]}), {}, "integers of at least 1"),
    ("elastic_llama", routing(0, heads={"of": 4}), {}, "must say of, values, active and nothing else"),
    ("elastic_llama", routing(0, heads=4), {}, "must say of, values, active and nothing else"),
    ("elastic_bert", routing(0), {"candidate_blocks": ["standard", "bottleneck"]}, "leave candidate_blocks out"),
    ("elastic_gpt2", routing(0), {"block": "bottleneck"}, "its block is 'bottleneck', only standard blocks are routed"),
    ("elastic_bert", routing(1), {"per_layer": {1: {"block": "standard-qv"}}}, "its block is 'standard-qv'"),
    ("elastic_bert", routing(0), {"chunk_size_feed_forward": 2}, "of which no router sees all; set it to 0"),
    ("elastic_gpt2", routing(0), {"reorder_and_upcast_attn": True}, "goes with no routed heads; set it to False"),
    ("elastic_bert", routing(1), {"per_layer": {1: {"skip": ["mlp"]}}}, "mlp_tokens, but the layer skips its mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "stated", "changes", "message"), REFUSED)
def test_routing_that_cannot_be_is_refused(model_type: str, stated: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message) as caught:
        config_of(model_type, routing=stated, **changes)
    assert isinstance(caught.value.__cause__, ValueError) and "\n" not in str(caught.value.__cause__)


def test_a_layer_without_routers_may_be_of_any_block() -> None:
    config = config_of("elastic_bert", {1: {"block": "bottleneck"}}, routing=routing(0, 2))
    model = build("elastic_bert", NAMES["elastic_bert"], config)
    assert output(model, input_ids=tokens()).shape == (2, 9, VOCABULARY)
