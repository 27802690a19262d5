"""Tiny static models: every model type, every head, every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic.models import config_class, model_class

VOCABULARY, LAYERS, PADDING = 40, 4, 0
Model = TypeVar("Model", bound=PreTrainedModel)

SIZES: dict[str, dict[str, Any]] = {
    "elastic_bert": {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "elastic_llama": {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": PADDING,
    },
    "elastic_gpt2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": PADDING,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
HEADS = {
    "elastic_bert": (
        "ElasticBertModel",
        "ElasticBertForMaskedLM",
        "ElasticBertForSequenceClassification",
        "ElasticBertForTokenClassification",
        "ElasticBertForQuestionAnswering",
    ),
    "elastic_llama": ("ElasticLlamaModel", "ElasticLlamaForCausalLM", "ElasticLlamaForSequenceClassification"),
    "elastic_gpt2": ("ElasticGPT2Model", "ElasticGPT2ForCausalLM", "ElasticGPT2ForSequenceClassification"),
}
LANGUAGE_MODELS = {"elastic_llama": "ElasticLlamaForCausalLM", "elastic_gpt2": "ElasticGPT2ForCausalLM"}
EVERY_HEAD = [(model_type, name) for model_type, names in HEADS.items() for name in names]


def narrow(model_type: str, *, width: int, groups: int) -> dict[str, int]:
    """One layer's sizes; LLaMA keeps two query heads per group."""
    if model_type == "elastic_llama":
        return {"intermediate_size": width, "num_attention_heads": 2 * groups, "num_key_value_heads": groups}
    return {"intermediate_size": width, "num_attention_heads": groups}


def mixed_layers(model_type: str) -> dict[int, dict[str, Any]]:
    """Attention skipped first, then narrow, then the MLP skipped, then both."""
    return {
        0: {**narrow(model_type, width=20, groups=4), "skip": ["attention"]},
        1: narrow(model_type, width=12, groups=1),
        2: {**narrow(model_type, width=48, groups=3), "skip": ["mlp"]},
        3: {"skip": ["attention", "mlp"]},
    }


def config_of(model_type: str, per_layer: dict[int, dict[str, Any]] | None = None, **changes: Any) -> Any:
    settings = {"vocab_size": VOCABULARY, **SIZES[model_type], "num_labels": 3, **changes}
    if per_layer is not None:
        settings["per_layer_config"] = per_layer
    return config_class(model_type)(**settings)


def build(model_type: str, name: str, config: Any = None, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode with random weights, by default with :func:`mixed_layers`."""
    config = config or config_of(model_type, mixed_layers(model_type), **changes)
    if name.endswith("QuestionAnswering"):
        config.num_labels = 2
    return seeded(lambda: model_class(model_type, name)(config))


def seeded(make: Callable[[], Model], *, seed: int = 0) -> Model:
    """A model whose every weight is random, also those that start as zeros or ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def tokens(batch: int = 2, length: int = 9, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def output(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The first tensor a model returns, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
