"""Stock models and their static forms compute the same, for every family and head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_elastic.checkpoint.static_form import static_class, static_config, static_state_dict
from hf_elastic.errors import ExportError

LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
ENCODER = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3,
}  # fmt: skip
DECODER = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "attention_dropout": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 40, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32,
    "dropout": 0.15, "attention_dropout": 0.25, "seq_classif_dropout": 0.35, "qa_dropout": 0.45,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3,
}  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
# Family -> prefix of its classes, settings, and settings that ask for what makes it different.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "bert": ("Bert", ENCODER, [{}, {"hidden_act": "relu", "classifier_dropout": 0.4, "chunk_size_feed_forward": 3}]),
    "roberta": ("Roberta", ENCODER, [{"type_vocab_size": 1, "hidden_act": "relu"}, {"classifier_dropout": 0.4}]),
    "distilbert": ("DistilBert", DISTILBERT, [{}, {"sinusoidal_pos_embds": True, "activation": "relu"}]),
    "llama": ("Llama", DECODER, [{"rope_parameters": ROPE}, {"attention_bias": True, "mlp_bias": True, "head_dim": 6}]),
    "qwen2": ("Qwen2", DECODER, [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}]),
    "qwen3": (
        "Qwen3",
        DECODER,
        [
            {"head_dim": 6, "attention_bias": True},
            {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        ],
    ),
    "mistral": ("Mistral", DECODER, [{"sliding_window": 4}, {"sliding_window": None, "head_dim": 6}]),
    "gpt2": (
        "GPT2",
        GPT2,
        [{}, {"n_inner": 20, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}],
    ),
}  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert")
ENCODER_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def heads(family: str) -> tuple[str, ...]:
    if family in ENCODERS:
        return ENCODER_HEADS
    return ("Model", "LMHeadModel" if family == "gpt2" else "ForCausalLM", "ForSequenceClassification")


CASES = [
    pytest.param(family, head, variant, id=f"{family}-{head}-{number}")
    for family, (_, _, variants) in FAMILIES.items()
    for head in heads(family)
    for number, variant in enumerate(variants)
]
ONE_EACH = [(family, head) for family in FAMILIES for head in heads(family)]


def stock_model(family: str, head: str, **changes: Any) -> PreTrainedModel:
    """A stock model whose every weight is random, also those that start as zeros or ones."""
    prefix, settings, _ = FAMILIES[family]
    labels = {} if head == "ForQuestionAnswering" else LABELS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = getattr(transformers, f"{prefix}{head}")
        model = model_class(model_class.config_class(**{**settings, **labels, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def static_form(stock: PreTrainedModel, per_layer: dict[int, dict[str, Any]] | None = None) -> PreTrainedModel:
    config = static_config(stock.config, per_layer or {}, parent=stock)
    model = static_class(stock)(config).eval()
    model.load_state_dict(static_state_dict(stock, stock.state_dict()), strict=True)
    return model


def inputs_for(stock: PreTrainedModel) -> dict[str, Tensor]:
    """Token ids with padding, on the right for encoders and on the left for decoders, and labels."""
    name, pad = type(stock).__name__, stock.config.pad_token_id
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    hole = slice(6, None) if "ert" in name else slice(None, 3)
    ids[0, hole], mask[0, hole] = pad, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.endswith("QuestionAnswering"):
        return {**inputs, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    if name.endswith("SequenceClassification"):
        return {**inputs, "labels": torch.tensor([0, 2])}
    if name.endswith("TokenClassification"):
        return {**inputs, "labels": ids % 3}
    return inputs if name.endswith("Model") and "LMHead" not in name else {**inputs, "labels": ids}


def assert_equal_outputs(ours: Any, theirs: Any) -> None:
    assert set(theirs.keys()) - {"past_key_values"} == set(ours.keys()) - {"past_key_values"}
    compared = [name for name in theirs if isinstance(theirs[name], Tensor)]
    assert compared
    for name in compared:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-6), name


@pytest.mark.parametrize(("family", "head", "variant"), CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_static_form_computes_what_the_stock_model_does(
    family: str, head: str, variant: dict[str, Any], implementation: str
) -> None:
    stock = stock_model(family, head, **variant)
    static = static_form(stock)
    stock.set_attn_implementation(implementation)
    static.set_attn_implementation(implementation)
    with torch.no_grad():
        assert_equal_outputs(static(**inputs_for(stock)), stock(**inputs_for(stock)))


@pytest.mark.parametrize(("family", "head"), ONE_EACH)
def test_dropout_in_training_is_where_the_stock_model_has_it(family: str, head: str) -> None:
    stock = stock_model(family, head)
    static = static_form(stock)
    results = []
    for model in (static, stock):
        model.set_attn_implementation("eager")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            results.append(model.train()(**inputs_for(stock)))
    assert_equal_outputs(*results)
    with torch.no_grad():
        assert not torch.equal(stock.eval()(**inputs_for(stock))[0], results[1][0])


@pytest.mark.parametrize(("family", "head"), ONE_EACH)
def test_gradients_are_those_of_the_stock_model(family: str, head: str) -> None:
    stock = stock_model(family, head)
    static = static_form(stock)
    for model in (stock, static):
        model.set_attn_implementation("eager")
        result = model(**inputs_for(stock))
        (result.loss if "loss" in result else result[0].square().mean()).backward()
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in static.named_parameters() if p.grad is not None}
    renamed = {n: g for n, g in static_state_dict(stock, theirs).items() if n in ours}
    assert renamed.keys() == ours.keys()
    assert all(torch.allclose(ours[n], renamed[n], atol=1e-6, rtol=1e-4) for n in ours)


@pytest.mark.parametrize(("family", "head"), ONE_EACH)
def test_untied_embeddings_stay_apart(family: str, head: str) -> None:
    stock = stock_model(family, head, tie_word_embeddings=False)
    static = static_form(stock)
    with torch.no_grad():
        assert_equal_outputs(static(**inputs_for(stock)), stock(**inputs_for(stock)))
    static.tie_weights()
    with torch.no_grad():
        assert_equal_outputs(static(**inputs_for(stock)), stock(**inputs_for(stock)))


@pytest.mark.parametrize("family", ENCODERS)
def test_embeddings_and_token_types_given_directly_count_the_same(family: str) -> None:
    stock = stock_model(family, "Model")
    static = static_form(stock)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equal_outputs(static(inputs_embeds=embeds), stock(inputs_embeds=embeds))
    if family == "bert":
        types = torch.tensor([[0, 0, 1, 1, 1]] * 2)
        ids = inputs_for(stock)["input_ids"][:, :5]
        with torch.no_grad():
            assert_equal_outputs(static(ids, token_type_ids=types), stock(ids, token_type_ids=types))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_base_model_without_a_pooler_has_none_in_its_static_form(family: str) -> None:
    prefix, settings, _ = FAMILIES[family]
    stock_class = getattr(transformers, f"{prefix}Model")
    stock = stock_class(stock_class.config_class(**settings), add_pooling_layer=False).eval()
    assert static_form(stock).pooler is None
    assert static_config(stock.config, {}).add_pooling_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_says_beside_shapes_is_kept(family: str, tmp_path: Path) -> None:
    stock = stock_model(family, "ForSequenceClassification", problem_type="multi_label_classification")
    config = copy.deepcopy(stock.config)
    config.dtype = torch.bfloat16
    config.architectures = [type(stock).__name__]
    config.task_specific_params = {"summary": {"max_length": 5}}
    before = config.to_dict()
    static = static_config(config, {1: {"intermediate_size": 12}})
    assert config.to_dict() == before
    static.save_pretrained(tmp_path)
    for kept in (static, transformers.AutoConfig.for_model(static.model_type).from_pretrained(tmp_path)):
        assert kept.model_type.startswith("elastic_")
        assert kept.to_dict()["model_type"] == kept.model_type
        assert kept.architectures is None
        assert kept.id2label == LABELS["id2label"]
        assert kept.problem_type == "multi_label_classification"
        assert kept.dtype == torch.bfloat16
        assert kept.task_specific_params == {"summary": {"max_length": 5}}
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range"):
            assert getattr(kept, name) == getattr(config, name), name
        assert kept.head_dim == (4 if family in ("llama", "mistral", "qwen2") else 8 if family != "qwen3" else 128)


def test_rotary_parameters_are_kept() -> None:
    config = stock_model("llama", "Model", rope_parameters=dict(ROPE)).config
    assert static_config(config, {}).rope_parameters == config.rope_parameters
    assert static_config(config, {}).rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_take_the_shapes_that_are_asked_for(family: str) -> None:
    stock = stock_model(family, "Model")
    heads = {"num_attention_heads": 2} | (
        {"num_key_value_heads": 1} if family in ("llama", "qwen2", "qwen3", "mistral") else {}
    )
    per_layer = {0: {"intermediate_size": 12, **heads}, 2: {"intermediate_size": 48, "skip": ["attention"]}}
    static = static_class(stock)(static_config(stock.config, per_layer, parent=stock))
    asked = {"intermediate_size": 12, **heads}
    shape = static.config.per_layer_config[0]
    names = static.config.per_layer_names
    assert {name: getattr(shape, names[name]) for name in asked} == asked
    assert static.config.per_layer_config[2].skip == ["attention"]
    full = static_class(stock)(static_config(stock.config, {}, parent=stock))
    assert sum(p.numel() for p in static.parameters()) < sum(p.numel() for p in full.parameters())


def test_names_of_the_parents_own_config_are_understood() -> None:
    config = stock_model("distilbert", "Model").config
    static = static_config(config, {0: {"hidden_dim": 12, "n_heads": 2}})
    assert (static.per_layer_config[0].intermediate_size, static.per_layer_config[0].num_attention_heads) == (12, 2)
    gpt2 = static_config(stock_model("gpt2", "Model").config, {0: {"n_inner": 12, "n_head": 2}})
    assert (gpt2.per_layer_config[0].n_inner, gpt2.per_layer_config[0].n_head) == (12, 2)


def test_sizes_that_every_layer_shares_become_global() -> None:
    config = stock_model("llama", "Model").config
    shared = {"intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    equal = static_config(config, dict.fromkeys(range(3), shared))
    assert not equal.is_heterogeneous
    assert (equal.intermediate_size, equal.num_attention_heads, equal.num_key_value_heads) == (16, 4, 2)
    assert equal.head_dim == 4
    some = static_config(config, {0: shared, 1: shared})
    assert [layer.intermediate_size for layer in some.per_layer_config] == [16, 16, 48]
    skips = static_config(config, {0: {**shared, "skip": ["mlp"]}, 1: {"intermediate_size": 8, **shared}, 2: shared})
    assert skips.intermediate_size == 16
    assert skips.to_dict()["per_layer_config"] == {"0": {"skip": ["mlp"]}}


def test_sizes_of_what_a_layer_skips_do_not_matter() -> None:
    config = stock_model("llama", "Model").config
    static = static_config(
        config,
        {
            0: {"skip": ["attention"], "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 9},
            1: {"num_attention_heads": 2, "num_key_value_heads": 1},
            2: {"num_attention_heads": 2, "num_key_value_heads": 1},
        },
    )
    assert (static.num_attention_heads, static.num_key_value_heads) == (2, 1)
    nothing = static_config(config, {i: {"skip": ["attention", "mlp"]} for i in range(3)})
    assert nothing.num_attention_heads == 8


def quantised(config: PreTrainedConfig) -> PreTrainedConfig:
    config.quantization_config = {"quant_method": "bitsandbytes"}
    return config


@pytest.mark.parametrize(
    ("config", "per_layer", "message"),
    [
        (transformers.T5Config(), {}, "model type 't5' has no static class.*supported: bert, roberta"),
        (
            transformers.BertConfig(is_decoder=True),
            {},
            "no elastic_bert model holds this bert: elastic_bert is an encoder",
        ),
        (transformers.GPT2Config(add_cross_attention=True), {}, "has no cross-attention"),
        (quantised(transformers.LlamaConfig()), {}, "quantised model"),
        (
            transformers.LlamaConfig(),
            {0: {"num_attention_heads": 3, "num_key_value_heads": 2}},
            "must be a multiple of",
        ),
        (transformers.BertConfig(), {0: {"skip": ["layer"]}}, "it can skip attention and mlp"),
        (transformers.BertConfig(), {0: {"hidden_size": 8}}, "sets hidden_size"),
        (transformers.BertConfig(), {40: {"skip": ["mlp"]}}, r"in the range \[0, 12\)"),
    ],
)
def test_what_no_static_model_holds_is_refused_in_one_line(
    config: PreTrainedConfig, per_layer: dict[int, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        static_config(config, per_layer)
    assert "\n" not in str(caught.value)


def test_a_head_without_a_static_class_is_refused_and_others_are_named() -> None:
    with pytest.raises(ExportError, match="BertForPreTraining has no static class.*BertForMaskedLM"):
        static_class(transformers.BertForPreTraining)
    with pytest.raises(ExportError, match="LlamaForTokenClassification has no static class.*LlamaForCausalLM"):
        static_class(transformers.LlamaForTokenClassification)

    class BertModel(transformers.BertModel):
        """A user's own class, which may compute anything."""

    with pytest.raises(ExportError, match="BertModel has no static class"):
        static_class(BertModel)
    with pytest.raises(ExportError, match="T5Model has no static class"):
        static_state_dict(transformers.T5Model, {})


@pytest.mark.parametrize(("family", "head"), ONE_EACH)
def test_classes_and_names_are_found_from_a_class_as_from_a_model(family: str, head: str) -> None:
    stock = stock_model(family, head)
    assert static_class(stock) is static_class(type(stock))
    state = stock.state_dict()
    renamed = static_state_dict(type(stock), state)
    assert renamed.keys() == static_state_dict(stock, state).keys()
    assert {id(tensor) for tensor in renamed.values()} == {id(tensor) for tensor in state.values()}
