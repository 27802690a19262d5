"""Tiny random models of every family and head, and the spaces most tests make of them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_elastic import Architecture, ElasticConfig, Supernet, make_elastic

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
ENCODER = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", {**ENCODER, "pad_token_id": 1}),
    "distilbert": ("DistilBert", {
        "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 61, "max_position_embeddings": 64,
        "num_labels": 3, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
    }),
    "llama": ("Llama", DECODER),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 16}),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 5}),
    "gpt2": ("GPT2", {
        "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "vocab_size": 61, "n_positions": 64, "num_labels": 3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }),
}  # fmt: skip
GROUPED = ("llama", "qwen2", "qwen3", "mistral")
DECODERS = (*GROUPED, "gpt2")
_HEADS = {
    "base": "Model",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}


def class_of(family: str, head: str) -> type[PreTrainedModel]:
    """Returns the stock class: ``class_of("bert", "lm")`` is BertForMaskedLM."""
    prefix = CONFIGS[family][0]
    language = "LMHeadModel" if family == "gpt2" else "ForCausalLM" if family in DECODERS else "ForMaskedLM"
    return getattr(transformers, prefix + {**_HEADS, "lm": language}[head])


def tiny(family: str, head: str = "lm", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Builds a model in evaluation mode whose biases and norms are random too, so that no mistake hides in a zero."""
    prefix, settings = CONFIGS[family]
    labels = {"num_labels": 2} if head == "qa" else {}
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **labels, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = class_of(family, head)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                one = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(one + 0.15 * torch.randn_like(parameter))
    return model


def space(family: str, **changes: Any) -> ElasticConfig:
    """Every kind of choice: widths, heads or groups, skips, depth."""
    heads = "num_key_value_heads" if family in GROUPED else "num_attention_heads"
    settings: dict[str, Any] = {
        "intermediate_size": [16, 0.5, 1.0], heads: [1, 2], "skip": ["attention", "mlp"], "num_hidden_layers": [2, 3],
    }  # fmt: skip
    return ElasticConfig(**{**settings, **changes})


def supernet_of(family: str, head: str = "lm", *, seed: int = 0, **changes: Any) -> Supernet:
    """Makes a tiny model elastic with :func:`space`; ``changes`` are of the space."""
    return make_elastic(tiny(family, head, seed=seed), space(family, **changes))


def inputs(model: PreTrainedModel, *, batch_size: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids without special tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, model.config.vocab_size, (batch_size, tokens), generator=generator)}


def outputs(supernet: Supernet, architecture: Architecture, **feed: torch.Tensor) -> torch.Tensor:
    """First output of the supernet with an architecture active."""
    with supernet.activate(architecture), torch.no_grad():
        return supernet.model(**(feed or inputs(supernet.model)))[0]


def point(supernet: Supernet, **changes: Any) -> Architecture:
    """The largest architecture with values changed; ``skip1`` is short for ``layers.1.skip``."""
    short = {"skip": "skip", "ffn": "intermediate_size", "heads": supernet.family.heads_choice}
    values = dict(supernet.space.largest())
    for name, value in changes.items():
        kind, layer = name[:-1], name[-1]
        values[f"layers.{layer}.{short[kind]}" if kind in short else name] = value
    return supernet.space.canonical(values)


TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


def module(path: str, kind: str = "Pooling", index: int = 1) -> dict[str, Any]:
    """One entry of a sentence-transformers modules.json."""
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}


def tokenizer(*, words: str = "a b c") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, [PAD] 0 and [UNK] 1 before them, with a chat template."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """The operating system itself refuses to let any file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
