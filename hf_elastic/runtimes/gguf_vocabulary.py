"""The tokenizer of a checkpoint as llama.cpp has it: tokens, their kinds, what joins them, special ids, chat template.

Read from the fast tokenizer, so that no SentencePiece file is needed. llama.cpp knows how to cut text into words only
by the names of known tokenizers; another one is refused rather than written as one that nearly cuts alike. So is one
whose normalizer makes something else of text before: llama.cpp (``src/llama-vocab.cpp``) changes none for BPE of bytes,
puts underscores for spaces for SentencePiece's BPE, and for WordPiece lower-cases, drops accents and parts Chinese.
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
        notes: where llama.cpp may give other ids.
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
    notes: tuple[str, ...] = ()


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
    cut, normalised = _cut(stated), [step.get("type") for step in _steps(stated, "normalizer", "normalizers")]
    if normalised not in ([], ["NFC"]):
        names = ", ".join(map(str, normalised))
        raise _refused(f"it changes text before it is cut ({names}), which llama.cpp does not for BPE of bytes")
    notes = (_NOT_COMPOSED,) if normalised else ()
    tokens, kinds = _listed(tokenizer, stated, size)
    joined = tuple(" ".join(pair) for pair in merges)
    return Vocabulary(
        "gpt2", tokens, kinds, merges=joined, cut=cut, special=_special(tokenizer), flags=_flags(tokenizer),
        chat_template=_template(tokenizer), notes=notes,
    )  # fmt: skip


_NOT_COMPOSED = "llama.cpp does not compose accents (NFC): pass text that is composed, as nearly all is, or ids differ"


def _steps(stated: Mapping[str, Any], name: str, several: str) -> list[Mapping[str, Any]]:
    """What a tokenizer does one after the other, those of sequences within sequences too."""
    step = stated.get(name) or {}
    if several in step:
        return [found for inner in step[several] for found in _steps({name: inner}, name, several)]
    return [step] if step else []


def _cut(stated: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is cut into words."""
    steps = _steps(stated, "pre_tokenizer", "pretokenizers")
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
    prefix = _prefixes_space(stated)
    notes = (_LEADING_SPACE,) if prefix and stated.get("pre_tokenizer") else ()
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokens, kinds = _listed(tokenizer, stated, size, bytes_too=True)
    scores = tuple(-float(ranks[t]) if t in ranks else -1e6 if len(t) > 1 else -1e5 for t in tokens)
    flags = {**_flags(tokenizer), "add_space_prefix": prefix}
    return Vocabulary(
        "llama", tokens, kinds, scores, special=_special(tokenizer), flags=flags, chat_template=_template(tokenizer),
        notes=notes,
    )  # fmt: skip


def _prefixes_space(stated: Mapping[str, Any]) -> bool:
    """Whether a text begins with an underscore; each space becomes one, and nothing else changes, as in llama.cpp.

    Raises:
        ExportError: it is not so.
    """
    before, cuts = _steps(stated, "normalizer", "normalizers"), _steps(stated, "pre_tokenizer", "pretokenizers")
    if before[-1:] == [_UNDERSCORES] and before[:-1] in ([], [_PREPENDED]) and not cuts:
        return len(before) == 2
    if not before and [step.get("type") for step in cuts] == ["Metaspace"]:
        (step,) = cuts
        if step.get("replacement") == _SPACE and not step.get("split", True):
            return bool(step.get("prepend_scheme") != "never")
    names = ", ".join(str(step.get("type")) for step in (*before, *cuts)) or "nothing"
    raise _refused(f"llama.cpp makes each space an underscore and changes nothing else, which {names} does not here")


_LEADING_SPACE = "llama.cpp puts a space before every text: leave that of a text that begins with one, or ids differ"
_SPACE = "\u2581"
_PREPENDED: Mapping[str, Any] = {"type": "Prepend", "prepend": _SPACE}
_UNDERSCORES: Mapping[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def _wordpiece(tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], size: int) -> Vocabulary:
    """llama.cpp marks beginnings of words where transformers marks continuations."""
    normaliser = stated.get("normalizer") or {}
    if not normaliser.get("lowercase"):
        raise _refused("llama.cpp lower-cases text for WordPiece, and this one does not")
    if normaliser.get("strip_accents") is False or not normaliser.get("handle_chinese_chars", True):
        raise _refused("llama.cpp drops accents and parts Chinese characters for WordPiece, and this one does not")
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
