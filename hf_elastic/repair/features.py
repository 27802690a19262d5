"""Examples as token ids: read from what users pass, checked against a model, and padded into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.distillation import IGNORED_LABEL, label_mask
from hf_elastic.errors import DataError
from hf_elastic.families import shifts_labels
from hf_elastic.fingerprints import fingerprint
from hf_elastic.repair.chat import chat_features

Feature = Mapping[str, Tensor]
"""One example: ``input_ids`` and ``attention_mask`` of ``(T,)``, maybe ``token_type_ids`` of ``(T,)`` and ``labels`` of
``(T,)`` or ``()``."""
Batch = dict[str, Tensor]
Rows = Iterable[Mapping[str, Any]]

_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def read_features(
    data: Rows, *, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int = 1024
) -> list[Feature]:
    """Reads examples, or conversations.

    Args:
        data: rows with ``input_ids`` and maybe ``attention_mask``, ``token_type_ids`` and ``labels`` (other columns are
            left alone), or rows with ``messages``.
        tokenizer: whose chat template renders ``messages``.
        max_length: longest conversation in tokens, see :func:`hf_elastic.repair.chat.chat_features`.

    Raises:
        DataError: there is no row, or one that cannot be read; the message names it.
    """
    rows = list(data)
    if not rows:
        raise DataError("there is no data: pass at least one row with 'input_ids' or 'messages'")
    if bad := next((row for row in rows if not isinstance(row, Mapping)), None):
        raise DataError(f"a row of the data must be a dict with 'input_ids' or 'messages', got {type(bad).__name__}")
    if "messages" in rows[0] and "input_ids" not in rows[0]:
        if tokenizer is None:
            raise DataError("rows with 'messages' need tokenizer=, whose chat template turns them into tokens")
        rows = list(chat_features(rows, tokenizer, max_length=max_length))
    features = [_feature(row, number) for number, row in enumerate(rows, start=1)]
    kinds = {(*sorted(feature), feature["labels"].dim() if "labels" in feature else None) for feature in features}
    if len(kinds) > 1:
        raise DataError("rows differ in their columns, or in whether labels are per token; make all rows alike")
    return features


def _feature(row: Mapping[str, Any], number: int) -> Feature:
    if row.get("input_ids") is None:
        raise DataError(f"row {number} of the data has no 'input_ids', only {sorted(row)}")
    try:
        found = {name: torch.as_tensor(row[name]) for name in _COLUMNS if row.get(name) is not None}
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"row {number} of the data holds no plain numbers: {error}") from error
    ids = found["input_ids"]
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise DataError(f"input_ids of row {number} must be a list of token ids, got shape {tuple(ids.shape)}")
    found.setdefault("attention_mask", torch.ones_like(ids))
    for name, values in found.items():
        if values.shape != ids.shape and not (name == "labels" and values.dim() == 0):
            raise DataError(f"{name} of row {number} has shape {tuple(values.shape)}, its input_ids {tuple(ids.shape)}")
    if not found["attention_mask"].any():
        raise DataError(f"row {number} of the data is all padding")
    return {name: values if values.is_floating_point() else values.long() for name, values in found.items()}


def check_features(features: Sequence[Feature], model: PreTrainedModel) -> None:
    """Checks that a model can read the examples.

    Raises:
        DataError: a token is outside the vocabulary, a row is longer than the model's positions, or all labels are
            -100.
    """
    size, positions = vocabulary_size(model), positions_of(model)
    for number, feature in enumerate(features, start=1):
        ids = feature["input_ids"]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise DataError(f"row {number} has token {low if low < 0 else high}, the model knows 0..{size - 1}")
        if positions is not None and len(ids) > positions:
            raise DataError(f"row {number} has {len(ids)} tokens, the model {positions} positions; cut the rows")
    labels = [feature["labels"] for feature in features if "labels" in feature]
    per_token, shifted = bool(labels) and labels[0].dim() == 1, shifts_labels(model)
    if per_token and not any(label_mask(row, shifted=shifted).any() for row in labels):
        raise DataError("no position is scored: all labels are -100; leave out 'labels' to score every token")


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model reads."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest sequence a model can read, ``None`` where its config states none."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and model.config.model_type == "roberta":  # its positions begin behind that of padding
        positions -= int(model.config.pad_token_id or 0) + 1
    return positions


def data_digest(features: Sequence[Feature]) -> str:
    """Fingerprint of the examples alone."""
    return fingerprint(nn.Module(), features)


class Padder:
    """Pads examples on the right into batches.

    Args:
        model: whose padding token fills ``input_ids``; token 0 where it names none, since it is masked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        pad = getattr(model.config, "pad_token_id", None)
        self.fill = {"input_ids": 0 if pad is None else int(pad), "labels": IGNORED_LABEL}

    def __call__(self, features: Sequence[Feature]) -> Batch:
        """Makes a batch of ``(B, T)``, and ``(B,)`` for one label per example."""
        longest = max(len(feature["input_ids"]) for feature in features)
        return {name: torch.stack([self._padded(f[name], name, longest) for f in features]) for name in features[0]}

    def _padded(self, values: Tensor, name: str, length: int) -> Tensor:
        if values.dim() == 0:
            return values
        return F.pad(values, (0, length - len(values)), value=self.fill.get(name, 0))  # (T,)
