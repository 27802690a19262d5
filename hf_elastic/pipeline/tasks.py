"""What a model is for: how text becomes batches, what is distilled, and how quality is measured."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_elastic import objectives
from hf_elastic.checkpoint.companions import TOKENIZER_FILES, parent_folder, pooling_modes
from hf_elastic.distillation import Pooling
from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.families import FAMILIES
from hf_elastic.layers import seeded
from hf_elastic.pipeline.options import CompressOptions, TaskName
from hf_elastic.pipeline.texts import Row, shuffled, split_sentences
from hf_elastic.search import Objective
from hf_elastic.stored_sizes import require_counts, require_filled
from hf_elastic.supernet import Supernet
from hf_elastic.training.targets import Target

Feature = dict[str, Any]
Batch = dict[str, Tensor]

VALIDATION = 512  # examples kept for choosing
CALIBRATION = 16_384  # tokens for measuring importance and for the closed-form repair
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


def resolve_task(options: CompressOptions, *, integers: bool = False) -> Task:
    """Finds what the model is for: as asked, or as its checkpoint says.

    Args:
        options: name the checkpoint.
        integers: whether one of compressed-tensors will do, which adapters can stand on and nothing can cut.

    Raises:
        CheckpointError: there is no checkpoint at that place.
        UnsupportedModelError: the checkpoint is of no known family, quantised, or for something else.
        DataError: ``sequence_length`` is longer than the model's positions.
    """
    config = read_config(options.model)
    causal = _check_config(config, options, integers=integers)
    name = options.task if options.task != "auto" else _task_of(config, options.model)
    if name in ("causal-lm", "masked-lm") and causal != (name == "causal-lm"):
        other = "causal-lm" if causal else "masked-lm"
        raise UnsupportedModelError(f"task={name!r} does not fit a {config.model_type} model; set task={other!r}")
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
        CheckpointError: there is none at that place, or it cannot be read.
    """
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise CheckpointError(f"{model} does not exist; pass the folder of a checkpoint, or its name on the Hub")
    try:
        if Path(model).is_dir():
            require_counts(Path(model))
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        here = "" if Path(model).is_dir() else ", which is no folder here"
        raise CheckpointError(
            f"cannot load {model!r}{here}: {one_line(error)}; pass the folder of a checkpoint, or its name on the Hub"
        ) from error


def _check_config(config: PreTrainedConfig, options: CompressOptions, *, integers: bool) -> bool:
    """Refuses what cannot be made elastic before its weights are loaded; says whether it is a decoder."""
    rows = {row.model_type: row for row in FAMILIES}
    if config.model_type not in rows:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} of {options.model!r} has no family row; known: {', '.join(sorted(rows))}"
        )
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method", "unknown method") if isinstance(stated, Mapping) else type(stated).__name__
    if stated is not None and not (integers and method == "compressed-tensors"):
        raise UnsupportedModelError(
            f"{options.model!r} is quantised ({method}); compress the checkpoint it was made from, in a float dtype "
            "(adapters beside it: hf_elastic.add_lora)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type == "roberta":  # its positions begin behind that of padding
        positions -= int(config.pad_token_id or 0) + 1
    if positions is not None and options.sequence_length > positions:
        raise DataError(
            f"sequence_length={options.sequence_length} is more than the {positions} positions of {options.model!r}; "
            f"pass at most {positions}"
        )
    return rows[config.model_type].causal


def one_line(error: BaseException) -> str:
    """The first lines of an error's message that say something, as one, or the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def load_tokenizer(options: CompressOptions) -> PreTrainedTokenizerBase:
    """Loads the checkpoint's tokenizer; where it names no token for padding, as GPT-2's, the end token pads.

    Padding is masked and stands to the right, so that it changes no result, whichever token it is.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = parent_folder(options.model)
    vocabularies = [name for name in TOKENIZER_FILES if "token" not in name or name.startswith("tokenizer.")]
    if folder is not None and not any((folder / name).is_file() for name in vocabularies):
        # transformers would go on with an empty vocabulary
        raise CheckpointError(f"{folder} holds no tokenizer ({', '.join(vocabularies[:3])}, ...); copy it there")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"cannot load the tokenizer of {options.model!r}: {one_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    return tokenizer


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
    """How the checkpoint pools tokens, as its sentence-transformers modules say; ``mean`` where there are none."""
    folder = parent_folder(model)
    known: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
    modes = ("mean",) if folder is None else pooling_modes(folder)
    if len(modes) != 1 or modes[0] not in known:
        raise UnsupportedModelError(
            f"{folder} pools tokens by {', '.join(modes)}; supported is one of {', '.join(known)}"
        )
    return known[modes[0]]


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


def _calibration(features: list[Feature], options: CompressOptions) -> list[Feature]:
    """The first examples that make enough tokens: twice as many as the FFN has neurons, where it is wide."""
    config, tokens = read_config(options.model), 0
    neurons = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    enough = max(CALIBRATION, 2 * int(neurons))
    for number, feature in enumerate(features):
        if tokens >= enough:
            return features[:number]
        tokens += len(feature["input_ids"])
    return features


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
    if not all(encoded):
        number = [bool(ids) for ids in encoded].index(False)
        raise DataError(f"text {number + 1} gives no token: {texts[number][:40]!r}; leave such rows out")
    _check_vocabulary(encoded, options)
    return [{"input_ids": ids} for ids in encoded]


def _check_vocabulary(encoded: Sequence[Sequence[int]], options: CompressOptions) -> None:
    size = int(read_config(options.model).vocab_size)
    if (largest := max((max(ids) for ids in encoded if ids), default=0)) >= size:
        raise CheckpointError(
            f"the tokenizer of {options.model!r} makes token {largest}, its model knows {size}; they are of two models"
        )


def _embedding_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    sentences = split_sentences(row[options.text_column] for row in rows)
    train, held = _split(sentences, options, what="sentences")
    collate = _padder(tokenizer)
    features = _encode(tokenizer, train, options)
    validation = _batches(_encode(tokenizer, held, options), collate)
    return TaskData(features, validation, _batches(_calibration(features, options), collate), collate, tuple(held))


def _causal_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    blocks = _token_blocks(tokenizer, rows, options)
    features = [{"input_ids": block, "labels": block} for block in blocks]
    train, held = _split(features, options, what=f"blocks of {options.sequence_length} tokens")

    def collate(chosen: list[Feature]) -> Batch:
        ids = torch.tensor([f["input_ids"] for f in chosen])  # (B, T)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return TaskData(train, _batches(held, collate), _batches(_calibration(train, options), collate), collate)


def _masked_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    if tokenizer.mask_token is None:
        raise DataError(f"the tokenizer of {options.model!r} has no mask token, which task='masked-lm' needs")
    features = [{"input_ids": block} for block in _token_blocks(tokenizer, rows, options)]
    train, held = _split(features, options, what=f"blocks of {options.sequence_length} tokens")
    masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def collate(chosen: list[Feature]) -> Batch:
        # The masks are a function of the batch, so that a continued run draws those of an uninterrupted one; an
        # example meets other neighbours in every epoch, and other masks with them.
        batch_digest = zlib.crc32(torch.tensor([f["input_ids"] for f in chosen]).numpy().tobytes())
        masker.generator = torch.Generator().manual_seed(batch_digest + options.seed)
        return dict(masker(chosen))

    return TaskData(train, _batches(held, collate), _batches(_calibration(train, options), collate), collate)


def _token_blocks(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> list[list[int]]:
    """All text as one stream of tokens, cut into blocks of ``sequence_length``; the rest is dropped."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream: list[int] = []
    for row in rows:
        stream += tokenizer(row[options.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        stream += [end] if end is not None else []
    size = options.sequence_length
    _check_vocabulary([stream], options)
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def _label_data(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: CompressOptions) -> TaskData:
    column = options.label_column
    if missing := next((row for row in rows if column not in row), None):
        raise DataError(
            f"classification needs a column {column!r}, a row has only {sorted(missing)}; "
            "set label_column (--label-column)"
        )
    known = {str(name): int(number) for name, number in (read_config(options.model).label2id or {}).items()}
    labels = [_label(row[column], known) for row in rows]
    features = _encode(tokenizer, [row[options.text_column] for row in rows], options)
    for feature, label in zip(features, labels, strict=True):
        feature["labels"] = label
    train, held = _split(features, options, what="labelled rows")
    collate = _padder(tokenizer)
    return TaskData(train, _batches(held, collate), _batches(_calibration(train, options), collate), collate)


def _label(value: Any, known: Mapping[str, int]) -> int:
    """A label's number: by its name, or by the number itself."""
    number = known.get(str(value), int(str(value)) if str(value).isdecimal() else -1)
    if number not in known.values():
        raise DataError(f"label {value!r} is none of the model's {len(known)} labels: {', '.join(list(known)[:12])}")
    return number


def load_model(
    task: Task,
    options: CompressOptions,
    *,
    folder: Path | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> PreTrainedModel:
    """Loads the checkpoint for the task, by default in fp32.

    Raises:
        CheckpointError: the weights are missing, truncated, or of another model.
        UnsupportedModelError: the checkpoint has no weights for what the task needs (a classifier, an output head).
    """
    source = str(folder or options.model)
    try:
        if Path(source).is_dir():
            require_filled(Path(source), task.auto_class)
        loaded: Any = task.auto_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True,  # said here in one line
        )  # fmt: skip
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"cannot load {source!r} for task={task.name!r}: {one_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    if mismatched := sorted(loaded[1]["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"cannot load {source!r} for task={task.name!r}: {name} is of shape {list(stored)}, its config says "
            f"{list(expected)}; copy the folder again"
        )
    # Embeddings do not pass the pooler, which a checkpoint of a masked language model lacks.
    missing = sorted(n for n in loaded[1]["missing_keys"] if task.name != "embedding" or "pooler" not in n)
    if missing:
        raise UnsupportedModelError(
            f"{source!r} lacks {len(missing)} weights that task={task.name!r} needs, such as {missing[0]}; "
            "train them first, or set another task"
        )
    if task.name == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(options).pad_token_id  # else it takes one row at a time
    return model.eval()


def load_with_classifier(model: str, labels: Sequence[str], *, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """Loads a checkpoint with a new classifier, and names what is to be trained as a whole.

    That is what is new, and the pooler: a sentence encoder's was never trained for what stands behind it here.

    Args:
        model: folder or Hub name.
        labels: names of the classes.
        seed: of the classifier's first weights.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    numbers = {name: number for number, name in enumerate(labels)}
    with seeded(seed):
        try:
            if Path(model).is_dir():
                require_filled(Path(model), AutoModelForSequenceClassification)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, use_safetensors=True,
                num_labels=len(labels), label2id=numbers,
                id2label={number: name for name, number in numbers.items()},
            )  # fmt: skip
        except Exception as error:  # transformers raises whatever its parts raise
            raise CheckpointError(f"cannot load {model!r}: {one_line(error)}") from error
    made, report = loaded
    poolers = {name for name, _ in made.named_modules() if name.endswith("pooler")}
    new = {key.rpartition(".")[0] for key in report["missing_keys"]}
    return made, sorted({name for name in new if not name.startswith(tuple(poolers))} | poolers)
