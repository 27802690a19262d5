"""Tiny checkpoints on disk with real tokenizers, and text to go with them: what a whole run needs."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_elastic import CompressOptions
from hf_elastic.pipeline import goal, nested

WORDS = re.findall(
    r"\w+",
    "the a small large red green old young dog cat horse river house tree sleeps runs sings falls near behind under "
    "over slowly quickly today never again alone and but while because it she he they we see hear find follow",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = {0: "calm", 1: "lively"}


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Distinct sentences of 4 to 14 known words, each of at least 20 characters."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        words = [rng.choice(WORDS) for _ in range(rng.randint(5, 14))]
        text = " ".join(words).capitalize() + "."
        if len(text) >= 24:
            found[text] = None
    return list(found)


def write_text(path: Path, *, count: int = 120, seed: int = 0) -> Path:
    path.write_text(" ".join(sentences(count, seed=seed)), encoding="utf-8")
    return path


def write_rows(path: Path, *, count: int = 120, seed: int = 0) -> Path:
    """Labelled rows: the label is whether the sentence runs or sings."""
    rows = [
        {"text": text, "label": LABELS[int(any(word in text for word in ("runs", "sings")))]}
        for text in sentences(count, seed=seed)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def bert_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **{f"{name}_token": token for name, token in names.items()}
    )


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with an end token and, as GPT-2's and LLaMA's, no token for padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BERT: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 1 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def seeded(build: Callable[[], PreTrainedModel], *, seed: int = 0) -> PreTrainedModel:
    """Builds a model whose every parameter is random, so that its layers do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                one = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(one + 0.15 * torch.randn_like(parameter))
    return model


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence_encoder(folder: Path, *, pooling: str = "mean", **changes: Any) -> Path:
    """A BERT encoder as sentence-transformers saves it: modules.json, 1_Pooling, 2_Normalize."""
    saved(folder, seeded(lambda: BertModel(BertConfig(**{**BERT, **changes}))), bert_tokenizer())
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls",
             "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": pooling == "max"}  # fmt: skip
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return folder


def masked_model(folder: Path, **changes: Any) -> Path:
    config = BertConfig(**{**BERT, **changes})
    return saved(folder, seeded(lambda: AutoModelForMaskedLM.from_config(config)), bert_tokenizer())


def classifier(folder: Path, **changes: Any) -> Path:
    labels = {"id2label": LABELS, "label2id": {name: n for n, name in LABELS.items()}}
    config = BertConfig(**{**BERT, **labels, **changes})
    return saved(folder, seeded(lambda: AutoModelForSequenceClassification.from_config(config)), bert_tokenizer())


def decoder_config(family: str, **changes: Any) -> PreTrainedConfig:
    shared = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 64}
        return GPT2Config(**{**shared, **sizes, **changes})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
    return LlamaConfig(**{**shared, **sizes, **changes})


def language_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    config = decoder_config(family, **changes)
    return saved(folder, seeded(lambda: AutoModelForCausalLM.from_config(config)), decoder_tokenizer())


def decoder_classifier(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A sequence classifier on a decoder, whose tokenizer and config name no token for padding."""
    labels = {"id2label": LABELS, "label2id": {name: n for n, name in LABELS.items()}}
    config = decoder_config(family, **labels, **changes)
    return saved(folder, seeded(lambda: AutoModelForSequenceClassification.from_config(config)), decoder_tokenizer())


KINDS: dict[str, Callable[[Path], Path]] = {
    "embedding": sentence_encoder,
    "masked-lm": masked_model,
    "classification": classifier,
    "causal-lm": language_model,
    "gpt2": lambda folder: language_model(folder, "gpt2"),
    "decoder-classification": decoder_classifier,
    "gpt2-classification": lambda folder: decoder_classifier(folder, "gpt2"),
}


def options(model: Path, data: Path, output: Path, **changes: Any) -> CompressOptions:
    """Options of a run of seconds with every stage; without training unless ``minutes`` says otherwise."""
    settings: dict[str, Any] = {
        "recipe": "best", "within": {"parameters": 0.7}, "minutes": 0.0, "evaluations": 6, "sequence_length": 24,
        "batch_size": 8, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return CompressOptions(str(model), (str(data),), str(output), **{**settings, **changes})


def parameter_seconds(call: Any) -> float:
    """A timer: a nanosecond per parameter that is no embedding, so that latencies add up and are the same anywhere."""
    names = ("embed", "wte", "wpe", "lm_head")
    return 1e-9 * sum(p.numel() for n, p in call.model.named_parameters() if not any(word in n for word in names))


def time_by_parameters(patch: pytest.MonkeyPatch) -> None:
    """Families are timed by :func:`parameter_seconds`."""
    for module, name in ((goal, "measure_latency_table"), (nested, "measure_models")):
        patch.setattr(module, name, functools.partial(getattr(module, name), timer=parameter_seconds, rounds=3))
