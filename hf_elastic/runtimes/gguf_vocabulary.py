"""The tokenizer of a checkpoint as llama.cpp has it: tokens, their kinds, what joins them, special ids, chat template.

Read from the fast tokenizer, so that no SentencePiece file is needed. llama.cpp knows how to cut text into words only
by the names of known tokenizers; another one is refused rather than written as one that nearly cuts alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_elastic.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: Mapping[str, str] = {
    f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}\\p{{N}}{_REST}": "qwen2",
}
"""Patterns that cut text into words -> llama.cpp's name."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's kind: ``llama`` (SentencePiece's BPE), ``gpt2`` (BPE of bytes), ``bert`` (WordPiece), or
            ``none``: token ids alone.
        tokens: in the order of their ids.
        kinds: of each token.
        scores: of each token, larger ones are joined first; only of ``llama``.
        merges: pairs that are joined, in order; only of ``gpt2``.
        cut: name of how text is cut into words.
        special: ids by llama.cpp's names: ``bos``, ``eos``, ``unknown``, ``padding``, ``seperator`` and so on.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_space_prefix``.
        chat_template: Jinja text.
    """

    model: str
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    cut: str = "default"
    special: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str | None = None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, *, size: int) -> Vocabulary:
    """Reads a tokenizer.

    Args:
        tokenizer: a fast one.
        size: rows of the model's embeddings; ids without a token get an unused one.

    Raises:
        ExportError: llama.cpp has no tokenizer of this kind, or it has more tokens than the model embeddings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"a {type(tokenizer).__name__} is no fast tokenizer")
    stated = json.loads(backend.to_str())
    kind = stated["model"].get("type")
    readers: Mapping[str, Callable[..., Vocabulary]] = {"BPE": _bpe, "WordPiece": _wordpiece}
    if kind not in readers:
        raise _refused(f"llama.cpp has no tokenizer of kind {kind}")
    known = tokenizer.get_vocab()
    if not known or max(known.values()) >= size:
        raise ExportError(f"the tokenizer has ids up to {max(known.values(), default=0)}, the model {size} embeddings")
    return readers[kind](tokenizer, stated, size)


def _refused(reason: str) -> ExportError:
    return ExportError(f"no GGUF with this tokenizer: {reason}; vocabulary=False writes the model for token ids alone")


def _bpe(tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], size: int) -> Vocabulary:
    merges = [m if isinstance(m, list) else m.split(" ") for m in stated["model"]["merges"]]
    if stated["model"].get("byte_fallback"):
        return _sentencepiece(tokenizer, stated, size, merges=merges)
    if not merges:
        raise _refused("it joins nothing, and llama.cpp loads no list of no merges")
    if any(" " in side for pair in merges for side in pair):
        raise _refused("a merge has a space in it")
    tokens, kinds = _listed(tokenizer, stated, size)
    joined = tuple(" ".join(pair) for pair in merges)
    return Vocabulary(
        "gpt2", tokens, kinds, merges=joined, cut=_cut(stated), special=_special(tokenizer), flags=_flags(tokenizer),
        chat_template=_template(tokenizer),
    )  # fmt: skip


def _cut(stated: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is cut into words."""
    before = stated.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern in CUTS:
            return CUTS[pattern]
    raise _refused(f"its way of cutting text into words ({', '.join(map(str, kinds))}) has no name in llama.cpp")


def _sentencepiece(
    tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], size: int, *, merges: Sequence[Sequence[str]]
) -> Vocabulary:
    """SentencePiece's BPE joins what has the highest score first, transformers' what stands first among the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokens, kinds = _listed(tokenizer, stated, size, bytes_too=True)
    scores = tuple(-float(ranks[t]) if t in ranks else -1e6 if len(t) > 1 else -1e5 for t in tokens)
    flags = {**_flags(tokenizer), "add_space_prefix": _prefixes_space(stated)}
    return Vocabulary(
        "llama", tokens, kinds, scores, special=_special(tokenizer), flags=flags, chat_template=_template(tokenizer)
    )


def _prefixes_space(stated: Mapping[str, Any]) -> bool:
    normaliser, before = stated.get("normalizer") or {}, stated.get("pre_tokenizer") or {}
    steps = [*normaliser.get("normalizers", [normaliser]), *before.get("pretokenizers", [before])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _wordpiece(tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], size: int) -> Vocabulary:
    """llama.cpp marks beginnings of words where transformers marks continuations."""
    if not (stated.get("normalizer") or {}).get("lowercase"):
        raise _refused("llama.cpp lower-cases text for WordPiece, and this one does not")
    prefix = stated["model"].get("continuing_subword_prefix", "##")
    tokens, kinds = _listed(tokenizer, stated, size)

    def turned(token: str, kind: int) -> str:
        if kind in (CONTROL, UNKNOWN, UNUSED) or (token.startswith("[") and token.endswith("]")):
            return token
        return token[len(prefix) :] if token.startswith(prefix) else f"\u2581{token}"

    shown = tuple(turned(token, kind) for token, kind in zip(tokens, kinds, strict=True))
    return Vocabulary("bert", shown, kinds, special=_special(tokenizer))


def _listed(
    tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], size: int, *, bytes_too: bool = False
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their kinds in the order of ids, up to the model's embeddings."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in stated.get("added_tokens", ())}
    unknown = stated["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(size):
        token = names.get(number)
        if token is None:
            kind = UNUSED
        elif token == unknown:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number].get("special") else USER_DEFINED
        else:
            kind = BYTE if bytes_too and _is_byte(token) else NORMAL
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(kind)
    return tuple(tokens), tuple(kinds)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {
        "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "cls": "cls",
        "mask": "mask",
    }  # fmt: skip
    found = {theirs: getattr(tokenizer, f"{ours}_token_id", None) for ours, theirs in names.items()}
    return {name: int(number) for name, number in found.items() if number is not None}


def _flags(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Which special tokens the tokenizer puts around a text."""
    with_, without = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    more = len(with_) - len(without)
    starts = more > 0 and with_[:1] == [tokenizer.bos_token_id]
    ends = more > int(starts) and with_[-1:] == [tokenizer.eos_token_id]
    return {"add_bos_token": starts, "add_eos_token": ends}


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
