"""Tiny models of candidate blocks: every head of both types, all widths in use, grown ones, fused heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic import Architecture, Supernet, make_elastic
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import BLOCKS

LAYERS, WIDTH, VOCABULARY = 3, 48, 61
TYPES = ("elastic_bert", "elastic_gpt2")
HEADS = {
    "elastic_bert": {
        "base": "ElasticBertModel",
        "lm": "ElasticBertForMaskedLM",
        "sequence": "ElasticBertForSequenceClassification",
        "token": "ElasticBertForTokenClassification",
        "qa": "ElasticBertForQuestionAnswering",
    },
    "elastic_gpt2": {
        "base": "ElasticGPT2Model",
        "lm": "ElasticGPT2ForCausalLM",
        "sequence": "ElasticGPT2ForSequenceClassification",
    },
}
EVERY_HEAD = [(kind, head) for kind in TYPES for head in HEADS[kind]]
SIZES: dict[str, dict[str, Any]] = {
    "elastic_bert": {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": WIDTH,
        "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "elastic_gpt2": {
        "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": WIDTH, "n_positions": 32, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
GROWN = {"candidate_widths": [[16, 24, 48, 8, 12, 40], [48, 8, 16, 40, 24, 8], [16, 16, 16, 16, 16, 16]]}
FUSED = {
    **GROWN,
    "candidate_heads": [
        [None, [0, 2], 2, [1], [1, 2, 3], 2],
        [[0, 1, 3], 1, None, 4, [0], None],
        [2, [3], [0, 1], None, 1, [0, 3]],
    ],
}
SHAPES: dict[str, dict[str, Any]] = {"whole": {}, "grown": GROWN, "fused": FUSED}
"""What of the candidates is in use."""


def config_of(kind: str, **changes: Any) -> Any:
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": 3, "bottleneck_size": 16}
    return config_class(kind)(**{**shared, "candidate_blocks": list(BLOCKS), **SIZES[kind], **changes})


def tiny(kind: str, head: str = "lm", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Builds a model in evaluation mode whose biases and norms are random too, so that no mistake hides in a zero."""
    labels = {"num_labels": 2} if head == "qa" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(kind, HEADS[kind][head])(config_of(kind, **{**labels, **changes})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                one = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(one + 0.15 * torch.randn_like(parameter))
    return model


def supernet_of(kind: str, head: str = "lm", *, seed: int = 0, **changes: Any) -> Supernet:
    return make_elastic(tiny(kind, head, seed=seed, **changes))


def path(supernet: Supernet, *blocks: str) -> Architecture:
    """The architecture of these blocks, one per layer; the last stands for all that follow."""
    named = [*blocks, *[blocks[-1]] * len(supernet.block_parts)]
    return supernet.space.canonical({part.name: named[part.index] for part in supernet.block_parts})


def tokens(*, batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def output(model: Any, **feed: Any) -> Tensor:
    """The first tensor a model returns, without gradients."""
    with torch.no_grad():
        return model(**(feed or {"input_ids": tokens()}), return_dict=False)[0]


def output_of(supernet: Supernet, architecture: Architecture, **feed: Any) -> Tensor:
    """The same of a supernet with an architecture active."""
    with supernet.activate(architecture):
        return output(supernet.model, **feed)


def close(got: Tensor, wanted: Tensor, *, tolerance: float = 1e-5) -> bool:
    """Whether two outputs are equal within a share of the largest."""
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())
