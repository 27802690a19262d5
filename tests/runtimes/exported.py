"""Exported folders of tiny models: uniform and of shapes per layer, with a tokenizer and with modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import TRANSFORMER, module, point, space, supernet_of, tiny, tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_elastic import export, make_elastic

MIXED = {"ffn0": 16, "heads0": 1, "skip1": "attention", "ffn2": 24}
"""Layers of three shapes, one of them without attention."""


def mixed_folder(root: Path, family: str, head: str = "lm", **changes: Any) -> Path:
    """Exports a tiny model whose layers differ as a compact remote-code checkpoint, with a tokenizer."""
    supernet = supernet_of(family, head)
    folder = root / f"{family}-{head}"
    shapes = {**MIXED, **changes}
    export(supernet, point(supernet, **shapes), folder, loadability="remote-code", tokenizer=tokenizer())
    return folder


def stock_folder(root: Path, family: str, head: str = "lm", **changes: Any) -> Path:
    """Saves a tiny stock model with a tokenizer, as anybody would."""
    folder = root / f"stock-{family}-{head}"
    tiny(family, head, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence_folder(root: Path) -> Path:
    """Exports a BERT of unequal layers out of a sentence-transformers folder."""
    parent = stock_folder(root, "bert", "base")
    (parent / "modules.json").write_text(json.dumps([TRANSFORMER, module("1_Pooling")]), encoding="utf-8")
    (parent / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (parent / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (parent / "sentence_bert_config.json").write_text('{"max_seq_length": 32}', encoding="utf-8")
    supernet = make_elastic(tiny("bert", "base"), space("bert"))
    folder = root / "sentences"
    export(supernet, point(supernet, **MIXED), folder, loadability="remote-code", source=parent)
    return folder


def batch(model: PreTrainedModel, *, left: bool = False, seed: int = 7) -> dict[str, torch.Tensor]:
    """Three sequences of 11 tokens, padded by 0, 3 and 6 on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        place = slice(0, padding) if left else slice(11 - padding, None)
        mask[row, place] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id or 0), "attention_mask": mask}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE as transformers has LLaMA 2's: an underscore for a space, bytes behind."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "c", "ab", "\u2581a", "abc", "\u2581ab"]
    vocabulary = {token: number for number, token in enumerate(words)}
    merges = [("a", "b"), ("\u2581", "a"), ("ab", "c"), ("\u2581", "ab")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def byte_tokenizer(pattern: str | None = None) -> PreTrainedTokenizerFast:
    """BPE of bytes with two merges, cut as GPT-2 does it or by a pattern."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "\u0120a"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("\u0120", "a")]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
