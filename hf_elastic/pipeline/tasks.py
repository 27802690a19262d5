"""What a model is for: how text becomes batches, what is distilled, and how quality is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_elastic import objectives
from hf_elastic.checkpoint.companions import parent_folder
from hf_elastic.distillation import Pooling
from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.pipeline.options import CompressOptions, TaskName
from hf_elastic.pipeline.texts import Row, shuffled, split_sentences
from hf_elastic.search import Objective
from hf_elastic.supernet import Supernet
from hf_elastic.training.targets import Target

Feature = dict[str, Any]
Batch = dict[str, Tensor]

VALIDATION, CALIBRATION = 512, 256  # examples kept for choosing and for measuring importance
_BATCH = 64


@dataclass
class TaskData:
    """Text made into what training, calibration and validation need.

    Attributes:
        train: features of the training examples.
        validation: padded batches, never trained on.
        calibration: padded batches of training examples, to measure importance on.
        collate: features -> batch.
        held_out: the validation sentences as text, where examples are sentences.
    """

    train: list[Feature]
    validation: list[Batch]
    calibration: list[Batch]
    collate: Callable[[list[Feature]], Batch]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One use of a model.

    Attributes:
        name: as in ``--task``.
        auto_class: what loads the model.
        target: what distillation compares.
        quality: names of the measured objectives; the search follows the first.
        pooling: for embeddings.
    """

    name: str
    auto_class: Any
    target: Target
    quality: tuple[str, ...]
    pooling: Pooling = "mean"
    _prepare: Callable[..., TaskData] = field(repr=False, default=None)  # type: ignore[assignment]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
        """Makes batches out of rows.

        Raises:
            DataError: there is too little text, or labels are missing.
        """
        return self._prepare(tokenizer, rows, options)

    def measures(
        self, supernet: Supernet, validation: Sequence[Batch], *, teacher: Tensor | None = None
    ) -> list[Objective]:
        """The objectives named by :attr:`quality`, on validation batches."""
        made: list[Objective] = []
        for name in self.quality:
            if name == "structure":
                made.append(
                    objectives.similarity_structure(supernet, validation, teacher=teacher, pooling=self.pooling)
                )
            elif name == "cosine":
                made.append(objectives.embedding_cosine(supernet, validation, teacher=teacher, pooling=self.pooling))
            elif name == "perplexity":
                made.append(objectives.perplexity(supernet, validation))
            else:
                made.append(objectives.accuracy(supernet, validation))
        return made


def resolve_task(options: CompressOptions) -> Task:
    """Finds what the model is for: as asked, or as its checkpoint says.

    Raises:
        UnsupportedModelError: the checkpoint is for something else.
    """
    config = read_config(options.model)
    name = options.task if options.task != "auto" else _task_of(config, options.model)
    if name == "embedding":
        pooling = _pooling(options.model)
        return Task(name, AutoModel, "last_hidden_state", ("structure", "cosine"), pooling, _embedding_data)
    if name == "causal-lm":
        return Task(name, AutoModelForCausalLM, "logits", ("perplexity",), "last", _causal_data)
    if name == "masked-lm":
        return Task(name, AutoModelForMaskedLM, "logits", ("perplexity",), "mean", _masked_data)
    return Task(name, AutoModelForSequenceClassification, "logits", ("accuracy",), "cls", _label_data)


def read_config(model: str) -> PreTrainedConfig:
    """Reads a checkpoint's config.

    Raises:
        CheckpointError: there is none at that place.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {model!r}: {str(error).splitlines()[0]}") from error


def _task_of(config: PreTrainedConfig, model: str) -> str:
    folder = parent_folder(model)
    if folder is not None and (folder / "modules.json").is_file():
        return "embedding"
    name = (config.architectures or [""])[0]
    for ending, task in (
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
        ("ForMaskedLM", "masked-lm"),
        ("ForSequenceClassification", "classification"),
    ):
        if name.endswith(ending):
            return task
    if name.endswith("Model"):
        return "embedding"
    raise UnsupportedModelError(
        f"cannot tell what {model!r} is for from its class {name!r}; set task to {', '.join(get_args(TaskName)[1:])}"
    )


def _pooling(model: str) -> Pooling:
    folder = parent_folder(model)
    path = folder / "1_Pooling" / "config.json" if folder is not None else Path()
    if not path.is_file():
        return "mean"
    modes = json.loads(path.read_text(encoding="utf-8"))
    return "cls" if modes.get("pooling_mode_cls_token") or modes.get("pooling_mode") == "cls" else "mean"


def _split(examples: list[Any], options: CompressOptions, *, what: str) -> tuple[list[Any], list[Any]]:
    """Shuffles and splits off validation examples: 512, or a fifth of a small set."""
    held = min(VALIDATION, len(examples) // 5)
    if held < 8:
        raise DataError(f"the data holds {len(examples)} {what}, at least 40 are needed; pass more text")
    order = shuffled(examples, seed=options.seed)
    return order[held:], order[:held]


def _batches(features: list[Feature], collate: Callable[[list[Feature]], Batch]) -> list[Batch]:
    ordered = sorted(features, key=lambda f: len(f["input_ids"]))
    return [dict(collate(ordered[i : i + _BATCH])) for i in range(0, len(ordered), _BATCH)]


def _padder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Feature]], Batch]:
    """Pads token ids; stacks labels."""

    def collate(features: list[Feature]) -> Batch:
        ids = [{"input_ids": f["input_ids"]} for f in features]
        batch: Batch = dict(tokenizer.pad(ids, return_tensors="pt"))
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch

    return collate


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], options: CompressOptions) -> list[Feature]:
    encoded = tokenizer(texts, truncation=True, max_length=options.sequence_length)["input_ids"]
    return [{"input_ids": ids} for ids in encoded]


def _embedding_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    sentences = split_sentences(row[options.text_column] for row in rows)
    train, held = _split(sentences, options, what="sentences")
    collate = _padder(tokenizer)
    features = _encode(tokenizer, train, options)
    validation = _batches(_encode(tokenizer, held, options), collate)
    return TaskData(features, validation, _batches(features[:CALIBRATION], collate), collate, tuple(held))


def _causal_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    blocks = _token_blocks(tokenizer, rows, options)
    features = [{"input_ids": block, "labels": block} for block in blocks]
    train, held = _split(features, options, what=f"blocks of {options.sequence_length} tokens")

    def collate(chosen: list[Feature]) -> Batch:
        ids = torch.tensor([f["input_ids"] for f in chosen])  # (B, T)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return TaskData(train, _batches(held, collate), _batches(train[:CALIBRATION], collate), collate)


def _masked_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    features = [{"input_ids": block} for block in _token_blocks(tokenizer, rows, options)]
    train, held = _split(features, options, what=f"blocks of {options.sequence_length} tokens")
    masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    fixed = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=options.seed)

    def collate(chosen: list[Feature]) -> Batch:
        return dict(masker(chosen))

    validation = _batches(held, lambda chosen: dict(fixed(chosen)))
    return TaskData(train, validation, _batches(train[:CALIBRATION], lambda chosen: dict(fixed(chosen))), collate)


def _token_blocks(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> list[list[int]]:
    """All text as one stream of tokens, cut into blocks of ``sequence_length``; the rest is dropped."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream: list[int] = []
    for row in rows:
        stream += tokenizer(row[options.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        stream += [end] if end is not None else []
    size = options.sequence_length
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def _label_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    column = options.label_column
    if missing := next((row for row in rows if column not in row), None):
        raise DataError(f"classification needs a column {column!r}, a row has only {sorted(missing)}; set label_column")
    known = {str(name): int(number) for name, number in (read_config(options.model).label2id or {}).items()}
    labels = [_label(row[column], known) for row in rows]
    features = _encode(tokenizer, [row[options.text_column] for row in rows], options)
    for feature, label in zip(features, labels, strict=True):
        feature["labels"] = label
    train, held = _split(features, options, what="labelled rows")
    collate = _padder(tokenizer)
    return TaskData(train, _batches(held, collate), _batches(train[:CALIBRATION], collate), collate)


def _label(value: Any, known: Mapping[str, int]) -> int:
    """A label's number: by its name, or by the number itself."""
    number = known.get(str(value), int(value) if str(value).isdigit() else -1)
    if number not in known.values():
        raise DataError(f"label {value!r} is none of the model's {len(known)} labels: {', '.join(list(known)[:12])}")
    return number


def load_model(task: Task, options: CompressOptions, *, folder: Path | None = None) -> PreTrainedModel:
    """Loads the checkpoint in fp32 for the task."""
    model: PreTrainedModel = task.auto_class.from_pretrained(folder or options.model, dtype=torch.float32)
    return model.eval()
