"""What users of transformers rely on: attention backends, outputs, checkpointing, compile, copies, round trips."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_static import (
    EVERY_HEAD,
    HEADS,
    LANGUAGE_MODELS,
    LAYERS,
    VOCABULARY,
    build,
    config_of,
    mixed_layers,
    narrow,
    output,
    tokens,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hf_elastic.models import MODEL_TYPES, config_class, model_class, register_auto_classes, source_files

ATTENTION = "Attention"


def attention_modules(model: PreTrainedModel) -> list[Any]:
    names = {"ElasticBertSelfAttention", "ElasticLlamaAttention", "ElasticGPT2Attention"}
    return [module for module in model.modules() if type(module).__name__ in names]


def labels_for(name: str) -> dict[str, Tensor]:
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    if name.endswith("SequenceClassification"):
        return {"labels": torch.tensor([0, 2])}
    if name.endswith("TokenClassification"):
        return {"labels": tokens() % 3}
    return {"labels": tokens(seed=3)}


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_sdpa_and_eager_attention_agree_under_padding(model_type: str, name: str) -> None:
    model = build(model_type, name)
    mask = torch.ones_like(tokens())
    mask[1, 5:] = 0
    model.set_attn_implementation("sdpa")
    fast = output(model, input_ids=tokens(), attention_mask=mask)
    model.set_attn_implementation("eager")
    slow = output(model, input_ids=tokens(), attention_mask=mask)
    assert torch.allclose(fast, slow, atol=1e-5)


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_every_attention_goes_through_the_interface_and_gets_the_callers_arguments(model_type: str, name: str) -> None:
    seen: list[tuple[Any, Any]] = []

    def spy(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append((module, kwargs.get("custom")))
        return query.transpose(1, 2), None

    model = build(model_type, name)
    ALL_ATTENTION_FUNCTIONS["tests_spy"] = spy
    try:
        model.config._attn_implementation = "tests_spy"
        assert {module.config._attn_implementation for module in attention_modules(model)} == {"tests_spy"}
        with torch.no_grad():
            model(input_ids=tokens(), custom="passed down", **({"use_cache": False} if "Bert" not in name else {}))
    finally:
        del ALL_ATTENTION_FUNCTIONS["tests_spy"]
    assert [module for module, _ in seen] == attention_modules(model)
    assert {custom for _, custom in seen} == {"passed down"}


@pytest.mark.parametrize("model_type", HEADS)
def test_hidden_states_come_from_every_layer_and_attentions_from_those_that_attend(model_type: str) -> None:
    model = build(model_type, HEADS[model_type][1])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        result = model(input_ids=tokens(), output_hidden_states=True, output_attentions=True)
    assert len(result.hidden_states) == LAYERS + 1
    groups = [attention.shape[1] for attention in result.attentions]
    heads = [2, 6] if model_type == "elastic_llama" else [1, 3]
    assert groups == heads
    assert all(torch.allclose(attention.sum(-1), torch.ones(())) for attention in result.attentions)
    embedded = result.hidden_states[0]
    per_layer = {i: {"skip": ["attention", "mlp"]} for i in range(LAYERS)}
    empty = build(model_type, HEADS[model_type][0], config_of(model_type, per_layer))
    empty.load_state_dict(getattr(model, model.base_model_prefix).state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(empty(input_ids=tokens(), output_hidden_states=True).hidden_states[2], embedded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_gradient_checkpointing_gives_the_same_gradients(model_type: str, name: str, reentrant: bool) -> None:
    model = build(model_type, name).train()
    inputs = {"input_ids": tokens(), **({} if name.endswith("Model") else labels_for(name))}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        result = model(**inputs)
        (result.last_hidden_state.square().mean() if name.endswith("Model") else result.loss).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)
    assert {n for n, _ in model.named_parameters()} - set(plain) <= {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(("model_type", "name"), [(kind, name) for kind in HEADS for name in HEADS[kind][1:3]])
def test_the_whole_model_compiles_as_one_graph(model_type: str, name: str) -> None:
    torch._dynamo.reset()
    model = build(model_type, name)
    no_cache = {} if model_type == "elastic_bert" else {"use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=tokens(), **no_cache)[0]
    assert torch.allclose(got, output(model, input_ids=tokens(), **no_cache), atol=1e-6)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_a_step_with_a_static_cache_compiles_as_one_graph(model_type: str) -> None:
    torch._dynamo.reset()
    model = build(model_type, LANGUAGE_MODELS[model_type])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids, pieces = tokens(), []
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        pieces.append(model(input_ids=ids[:, :6], past_key_values=cache).logits)
        for i in range(6, 9):
            positions = torch.full((2, 1), i)
            step = compiled(input_ids=ids[:, i : i + 1], position_ids=positions, past_key_values=cache)
            pieces.append(step.logits)
    assert (torch.cat(pieces, dim=1) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_deep_copy_shares_no_weights_and_keeps_one_config(model_type: str, name: str) -> None:
    model = build(model_type, name)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, input_ids=tokens()), output(model, input_ids=tokens()))
    twin.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in attention_modules(twin)} == {"eager"}
    assert {module.config._attn_implementation for module in attention_modules(model)} == {"sdpa"}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert output(model, input_ids=tokens()).abs().max() > 0


def auto_class_of(name: str) -> Any:
    tail = name.rsplit("For", maxsplit=1)[-1] if "For" in name else ""
    return getattr(transformers, f"AutoModelFor{tail}" if tail else "AutoModel")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_saved_model_comes_back_through_its_auto_class(
    model_type: str, name: str, tied: bool, tmp_path: Path
) -> None:
    model = build(model_type, name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    back, report = auto_class_of(name).from_pretrained(tmp_path, output_loading_info=True)
    assert type(back) is type(model)
    assert not any(report.values()), report
    assert torch.equal(output(back, input_ids=tokens()), output(model, input_ids=tokens()))
    assert back.config.to_dict()["per_layer_config"] == model.config.to_dict()["per_layer_config"]
    assert back.config.model_type == model_type
    if "ForMaskedLM" in name or "ForCausalLM" in name:
        shared = back.get_input_embeddings().weight is back.get_output_embeddings().weight
        assert shared == tied


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_the_base_model_of_a_checkpoint_has_nothing_newly_initialised(
    model_type: str, name: str, tmp_path: Path
) -> None:
    model = build(model_type, name)
    model.save_pretrained(tmp_path)
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]


def test_a_base_model_without_a_pooler_comes_back_without_one(tmp_path: Path) -> None:
    model = model_class("elastic_bert", "ElasticBertModel")(config_of("elastic_bert"), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    back, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert back.pooler is None
    assert not any(report.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_checkpoint_loads_in_the_dtype_it_was_saved_in_or_the_one_asked_for(
    model_type: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build(model_type, name).to(dtype).save_pretrained(tmp_path)
    back = auto_class_of(name).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in back.parameters()} == {dtype}
    assert output(back, input_ids=tokens()).dtype == dtype
    asked = auto_class_of(name).from_pretrained(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float64}


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_fresh_model_starts_with_finite_weights_and_the_stock_spread(model_type: str, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_type, name)(config_of(model_type, mixed_layers(model_type)))
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all()
        if parameter.dim() == 2:
            # GPT-2 starts the projections into the residual stream smaller.
            expected = 0.02 / (2 * LAYERS) ** 0.5 if parameter_name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.25)
        elif parameter_name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_the_vocabulary_can_be_resized(model_type: str, name: str) -> None:
    model = build(model_type, name)
    before = output(model, input_ids=tokens())
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    after = output(model, input_ids=tokens())
    assert model.config.vocab_size == VOCABULARY + 5
    assert torch.allclose(after[..., : before.shape[-1]], before, atol=1e-6)
    if "ForMaskedLM" in name or "ForCausalLM" in name:
        assert after.shape[-1] == VOCABULARY + 5
        assert torch.isfinite(model(input_ids=tokens(), labels=tokens()).loss)


def test_biases_can_be_left_out_and_put_in_one_by_one() -> None:
    flags: dict[str, Callable[[str], bool]] = {
        "attention_bias": lambda n: n.split(".")[-2] in ("q_proj", "k_proj", "v_proj"),
        "attention_output_bias": lambda n: n.split(".")[-2] == "o_proj",
        "mlp_bias": lambda n: n.split(".")[-2] in ("gate_proj", "up_proj", "down_proj"),
    }
    for flag, belongs in flags.items():
        settings = {**dict.fromkeys(flags, False), flag: True}
        model = build("elastic_llama", "ElasticLlamaModel", **settings)
        biases = [n for n, _ in model.named_parameters() if n.endswith(".bias")]
        assert biases and all(belongs(n) for n in biases)


@pytest.mark.parametrize("model_type", HEADS)
def test_rules_by_which_vllm_serves_foreign_models_hold(model_type: str, tmp_path: Path) -> None:
    for name in HEADS[model_type]:
        model = build(model_type, name)
        assert model._supports_attention_backend
        assert {module.is_causal for module in attention_modules(model)} == {model_type != "elastic_bert"}
        kinds = {type(module) for module in model.modules() if "weight" in dict(module.named_parameters(recurse=False))}
        assert not {kind for kind in kinds if issubclass(kind, torch.nn.Linear) and kind is not torch.nn.Linear}
        assert (Conv1D in kinds) == (model_type == "elastic_gpt2")
        model.save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert set(saved["auto_map"]) == {"AutoConfig", *(auto_class_of(n).__name__ for n in HEADS[model_type])}
        for target in saved["auto_map"].values():
            file, kind = target.split(".")
            folder = source_files(model_type)[0].parent
            assert f"class {kind}(" in (folder / f"{file}.py").read_text()


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_saving_says_nothing_alarming(
    model_type: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            build(model_type, name).save_pretrained(tmp_path)
            auto_class_of(name).from_pretrained(tmp_path)
    finally:
        transformers.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []


def test_registration_can_be_repeated_and_leaves_stock_types_alone() -> None:
    register_auto_classes()
    for model_type in MODEL_TYPES:
        assert isinstance(AutoConfig.for_model(model_type), config_class(model_type))
    assert type(AutoModelForCausalLM.from_config(config_of("elastic_gpt2"))).__name__ == "ElasticGPT2ForCausalLM"
    bert = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    assert type(AutoModelForMaskedLM.from_config(bert)) is transformers.BertForMaskedLM
    assert type(AutoModelForSequenceClassification.from_config(bert)) is transformers.BertForSequenceClassification
    with pytest.raises(ValueError, match="known: elastic_bert, elastic_llama, elastic_gpt2"):
        source_files("bert")


def test_equal_layers_need_no_per_layer_entry_in_the_config() -> None:
    config = config_of("elastic_llama")
    assert not config.is_heterogeneous
    assert config.intermediate_size == 48
    mixed = config_of("elastic_llama", {0: narrow("elastic_llama", width=48, groups=2)})
    assert mixed.intermediate_size == 48
    assert [layer.num_key_value_heads for layer in mixed.per_layer_config] == [2, 4, 4, 4]
