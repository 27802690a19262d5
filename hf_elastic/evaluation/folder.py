"""Checkpoint folders measured on a file of data, parent and children in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_elastic.checkpoint.companions import MODULES
from hf_elastic.costs import count
from hf_elastic.distillation import label_mask
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.evaluation.harness import Harness
from hf_elastic.evaluation.measuring import first_line, required
from hf_elastic.evaluation.metrics import Reader, answered, load_module
from hf_elastic.evaluation.similarity import (
    Role,
    checked_gold,
    checked_relevance,
    encoded,
    mean_ndcg,
    pair_correlation,
)
from hf_elastic.families import FAMILIES
from hf_elastic.layers import evaluating
from hf_elastic.pipeline.texts import Row, read_rows
from hf_elastic.report import aligned
from hf_elastic.stored_sizes import require_counts, require_filled

METRICS = ("accuracy", "perplexity", "spearman", "ndcg", "evaluate:METRIC", "lm-eval:TASK")

_ENCODERS = {"elastic_bert", *(row.model_type for row in FAMILIES if not row.causal)}
_HARNESS, _MODULE = "lm-eval:", "evaluate:"
_RANKS = 10
_PICKLES = "pytorch_model*.bin"
_LEAST: Mapping[str, int] = {"batch_size": 1, "sequence_length": 4, "limit": 1, "num_fewshot": 0, "k": 1}
_COLUMNS = ("text_column", "pair_column", "label_column")


@dataclass(frozen=True)
class FolderOptions:
    """How folders are measured. What is no option of the metric is refused, not ignored.

    Attributes:
        metric: one of :data:`METRICS`; by default what a checkpoint is for: ``accuracy`` of a classifier,
            ``perplexity`` of a causal language model, ``spearman`` of a sentence encoder. ``METRIC`` is the folder of a
            script of ``evaluate``, or a name in its cache; ``TASK`` one of lm-eval.
        text_column, pair_column, label_column: of rows. By default ``text`` and ``label``, where there is a
            ``sentence1`` it and ``sentence2``, and of pairs to correlate ``score``. Perplexity has a text alone;
            ``ndcg`` and tasks have names of their own.
        key: which value of a metric of ``evaluate`` or of a task.
        sequence_length: longest sequence in tokens. By default what the model has positions for, at most 512; of a
            sentence encoder what its modules say; of a task what lm-eval does.
        batch_size: rows of a forward.
        limit: rows, or documents of a task, that are read; all by default.
        num_fewshot: examples before each question of a task.
        k: ranks that count for ``ndcg``; 10 by default.

    Raises:
        DataError: there is no such metric, or a number or a name cannot be one.
    """

    metric: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    key: str | None = None
    sequence_length: int | None = None
    batch_size: int = 16
    limit: int | None = None
    num_fewshot: int | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (value is None and name != "batch_size") and (type(value) is not int or value < least):
                raise DataError(f"{name}={value!r} must be an integer of at least {least}")
        for name in ("metric", *_COLUMNS, "key"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, str) and value):
                raise DataError(f"{name}={value!r} must be a name, or left out")
        if self.metric is not None and (_kind(self.metric) not in _MEASURES or self.metric in (_HARNESS, _MODULE)):
            raise DataError(f"there is no metric {self.metric!r}; known: {', '.join(METRICS)}")


@dataclass(frozen=True)
class FolderScore:
    """What one folder scored.

    Attributes:
        folder: the checkpoint.
        values: by name.
        counted: how much they are of, such as ``"436 rows"``.
        parameters: without embeddings; ``None`` of a quantised checkpoint.
        size: of the weights on disk, in bytes.
    """

    folder: Path
    values: Mapping[str, float]
    counted: str
    parameters: int | None
    size: int


def evaluate_folder(
    folder: str | Path, data: str | Path | None = None, *, options: FolderOptions | None = None
) -> FolderScore:
    """Measures a checkpoint: a parent, or what :func:`hf_elastic.export` wrote of whichever loadability.

    Args:
        folder: of the checkpoint, with its tokenizer.
        data: ``.jsonl`` or ``.csv`` of rows, ``.txt`` for perplexity; for ``ndcg`` rows of ``query``, ``document``,
            and ``relevance`` (1 if it is missing), whose documents are the corpus; for ``lm-eval:TASK`` none, or a
            folder of task files.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not for this metric.
        DataError: the data cannot be read or do not fit, an option is not of this metric, or a package is missing.
    """
    asked, place = options or FolderOptions(), Path(folder)
    metric = _checked_metric(place, data, asked)
    measure, _ = _MEASURES[_kind(metric)]
    return measure(place, None if data is None else str(data), options=asked, metric=metric)


def _kind(metric: str) -> str:
    """``evaluate`` of ``evaluate:f1``."""
    return metric.partition(":")[0] if metric.startswith((_HARNESS, _MODULE)) else metric


def _checked_metric(folder: Path, data: object, options: FolderOptions) -> str:
    """The metric that a folder is measured by, once options and data fit it; no weights are read.

    Raises:
        CheckpointError: there is no checkpoint.
        DataError: something does not fit.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no checkpoint; give the folder of one")
    metric = options.metric or _usual_metric(folder)
    for name in (*_COLUMNS, "key", "sequence_length", "num_fewshot", "k"):
        if getattr(options, name) is not None and name not in _MEASURES[_kind(metric)][1]:
            others = ", ".join(kind for kind, (_, takes) in _MEASURES.items() if name in takes)
            raise DataError(
                f"{name}={getattr(options, name)!r} is nothing to {metric!r}, leave it out; it is of {others}"
            )
    if data is None and not metric.startswith(_HARNESS):
        raise DataError(f"metric {metric!r} needs data; give a .jsonl, .csv or .txt file")
    room = _positions(_config(folder))
    if options.sequence_length is not None and room is not None and options.sequence_length > room:
        raise DataError(f"sequence_length={options.sequence_length} is more than the {room} positions of the model")
    return metric


def compare_folders(
    folders: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    options: FolderOptions | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Measures folders one after another and sets them in one table; the first is what the others are compared with.

    Args:
        say: told of each folder before it is measured.

    Raises:
        CheckpointError, DataError: as :func:`evaluate_folder`.
    """
    for folder in folders:  # before the first is measured, which may take long
        _checked_metric(Path(folder), data, options or FolderOptions())
    scores = []
    for folder in folders:
        say(f"measuring {folder}")
        scores.append(evaluate_folder(folder, data, options=options))
    return score_table(scores)


def score_table(scores: Sequence[FolderScore]) -> str:
    """The table of some scores; parameters and sizes are shares of the first row's."""
    first = scores[0]
    names = list(first.values)
    lines = [["", "parameters", "on disk", *names]]
    for score in scores:
        size = f"{score.size / 1e6:.1f} MB ({score.size / max(first.size, 1):.0%})"
        cells = [f"{score.values[name]:.4f}" if name in score.values else "-" for name in names]
        lines.append([str(score.folder), _parameters(score, first), size, *cells])
    counted = dict.fromkeys(score.counted for score in scores)
    notes = [f"{', '.join(names)} on {' or '.join(counted)}; parameters without embeddings"]
    if "perplexity" in names and len(counted) > 1:
        notes.append("perplexities are per token, and these models have different tokens: they cannot be compared")
    return "\n".join([aligned(lines), *notes])


def _parameters(score: FolderScore, first: FolderScore) -> str:
    if score.parameters is None:
        return "-"
    share = f" ({score.parameters / first.parameters:.0%})" if first.parameters else ""
    return f"{count(score.parameters)}{share}"


def _usual_metric(folder: Path) -> str:
    if (folder / MODULES).is_file():
        return "spearman"
    listed = _config(folder).architectures
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    for ending, metric in (
        ("ForSequenceClassification", "accuracy"), ("ForCausalLM", "perplexity"), ("LMHeadModel", "perplexity"),
    ):  # fmt: skip
        if name.endswith(ending):
            return metric
    raise DataError(f"cannot tell what {folder} is measured by from its class {name!r}; metrics: {', '.join(METRICS)}")


def _config(folder: Path) -> Any:
    require_counts(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"cannot read the config of {folder}: {first_line(error)}") from error


def _loaded(folder: Path, kind: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint in fp32, whole, and its tokenizer."""
    config = _config(folder)
    if kind is AutoModelForCausalLM and config.model_type in _ENCODERS and not getattr(config, "is_decoder", False):
        raise CheckpointError(
            f"{folder} is an encoder ({config.model_type}), which sees the words it would have to predict; this metric "
            "needs a decoder"
        )
    loading: dict[str, Any] = {
        "dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False, "use_safetensors": True,
    }  # fmt: skip
    try:
        require_filled(folder, kind)
        model, report = kind.from_pretrained(folder, **loading)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"cannot load {folder} by {kind.__name__}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} has no weights for {missing[0]}, which this metric needs; take another")
    _check_length(tokenizer, folder=folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:  # a decoder's classifier reads the last token before padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _check_length(tokenizer: PreTrainedTokenizerBase, *, folder: Path) -> None:
    """Checks that what a tokenizer calls the longest sequence is a number, which it does not do itself."""
    longest: object = tokenizer.model_max_length
    if type(longest) not in (int, float):
        raise CheckpointError(f"the tokenizer of {folder} has model_max_length={longest!r}; make it a number of tokens")


def _score(folder: Path, model: nn.Module, values: Mapping[str, float], *, counted: str) -> FolderScore:
    quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    whole = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}"))
    return FolderScore(folder, values, counted, None if quantised else whole - sum(tables.values()), size)


def _columns(data: str, options: FolderOptions, *, label: str) -> tuple[list[Row], str, str | None, str]:
    """Rows, and which columns hold the text, the second text if there is one, and the label."""
    rows, text = _texts(data, options)
    pair = options.pair_column or ("sentence2" if text == "sentence1" else None)
    named = options.label_column or label
    for number, row in enumerate(rows, 1):
        if missing := [name for name in (pair, named) if name is not None and row.get(name) in (None, "")]:
            raise DataError(f"row {number} of {data} has no {missing[0]!r}, its columns are: {', '.join(row)}")
    return rows, text, pair, named


def _texts(data: str, options: FolderOptions) -> tuple[list[Row], str]:
    """Rows, and which column holds text: the one that was named, or the first that rows of its kind have."""
    first: DataError | None = None
    for name in [options.text_column] if options.text_column else ["text", "sentence", "sentence1"]:
        try:
            rows = read_rows([data], text_column=name)
        except DataError as error:
            first = first or error
        else:
            return rows if options.limit is None else rows[: options.limit], name
    assert first is not None
    raise first


def _positions(config: Any) -> int | None:
    """Tokens that a model has positions for; ``None`` where it does not say."""
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and config.model_type == "roberta":  # its positions begin behind that of padding
        known -= int(config.pad_token_id or 0) + 1
    return known


def _longest(model: Any, tokenizer: PreTrainedTokenizerBase, options: FolderOptions) -> int:
    """Tokens of the longest sequence."""
    usual = min(512, int(_positions(model.config) or 512), int(tokenizer.model_max_length))
    return options.sequence_length or usual


def _of_labels(folder: Path, data: str, *, options: FolderOptions, metric: str) -> FolderScore:
    rows, text, pair, label = _columns(data, options, label="label")
    reader = None if metric == "accuracy" else Reader(load_module(metric.removeprefix(_MODULE)), {})
    model, tokenizer = _loaded(folder, AutoModelForSequenceClassification)
    if tokenizer.pad_token is None:
        raise CheckpointError(f"the tokenizer of {folder} has no token for padding, nor for an end; set its pad_token")
    longest = _longest(model, tokenizer, options)
    labels = _labels([row[label] for row in rows], model)
    batches = []
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        texts = [[row[name] for row in part] for name in (text, pair) if name is not None]
        feed = tokenizer(*texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        batches.append({**feed, "labels": labels[start : start + options.batch_size]})
    with torch.inference_mode():
        found = answered(model, batches)
    if reader is None:
        if found.kind != "class":
            raise DataError(f"accuracy is of classes, {folder} gives a number; use evaluate:METRIC")
        right = [int(p == r) for p, r in zip(found.predictions(), found.references, strict=True)]
        values = {"accuracy": sum(right) / len(right)}
    else:
        values = {options.key or reader.module.name: reader.value(found, key=options.key, names={})}
    return _score(folder, model, values, counted=f"{len(rows)} rows")


def _labels(stated: list[Any], model: Any) -> Tensor:
    """Labels as numbers: by their names in the model's config, or as they are."""
    if model.config.num_labels == 1:
        try:
            return torch.tensor([float(value) for value in stated])
        except (TypeError, ValueError) as error:
            raise DataError(f"a regression needs numbers as labels: {error}") from None
    known = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    numbers = [known.get(str(value), int(str(value)) if str(value).isdecimal() else -1) for value in stated]
    if wrong := [n for n, number in enumerate(numbers) if not 0 <= number < model.config.num_labels]:
        raise DataError(
            f"label {stated[wrong[0]]!r} (row {wrong[0] + 1}) is none of the {len(known)}: {', '.join(list(known)[:9])}"
        )
    return torch.tensor(numbers)


def _of_text(folder: Path, data: str, *, options: FolderOptions, metric: str) -> FolderScore:
    rows, text = _texts(data, options)
    model, tokenizer = _loaded(folder, AutoModelForCausalLM)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for row in rows:
        stream += tokenizer(row[text], add_special_tokens=False, verbose=False)["input_ids"] + end
    length = _longest(model, tokenizer, options)
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    total, scored = 0.0, 0
    with torch.inference_mode():
        for ids in _batches([block for block in blocks if len(block) > 1], options.batch_size):
            counted = int(label_mask(ids, shifted=True).sum())
            total += float(model(input_ids=ids, labels=ids).loss) * counted
            scored += counted
    if not scored:
        raise DataError(f"{data} holds fewer than two tokens")
    values = {"perplexity": math.exp(min(total / scored, 700.0))}
    return _score(folder, model, values, counted=f"{scored} tokens in blocks of {length}")


def _batches(blocks: list[list[int]], size: int) -> list[Tensor]:
    """Blocks of equal length together: nothing is padded."""
    whole = [block for block in blocks if len(block) == len(blocks[0])]
    rest = [block for block in blocks if len(block) != len(blocks[0])]
    return [torch.tensor(whole[n : n + size]) for n in range(0, len(whole), size)] + [torch.tensor([b]) for b in rest]


def _encoder(folder: Path, options: FolderOptions) -> Any:
    package = required("sentence_transformers", extra="sentence-transformers", what="measuring sentence embeddings")
    for pickled in sorted(folder.rglob(_PICKLES)):
        if not any(pickled.parent.glob("*.safetensors")):
            raise CheckpointError(f"{pickled} is a pickle, which is not read; save its module as safetensors")
    try:
        if (folder / "config.json").is_file():
            require_filled(folder, AutoModel)
        encoder = package.SentenceTransformer(str(folder), device="cpu", trust_remote_code=False).eval()
    except Exception as error:  # it raises whatever its parts raise
        raise CheckpointError(f"cannot load {folder} as a sentence encoder: {first_line(error)}") from error
    if options.sequence_length is not None:
        encoder.max_seq_length = options.sequence_length
    return encoder


def _embeddings(folder: Path, encoder: Any, texts: Sequence[str], *, role: Role, options: FolderOptions) -> Tensor:
    """Embeddings of texts, ``(N, D)``.

    Raises:
        CheckpointError: the modules of the encoder make none of texts.
    """
    try:
        return encoded(encoder, texts, role=role, batch_size=options.batch_size)
    except Exception as error:  # modules raise whatever their parts raise
        raise CheckpointError(f"{folder} makes no embeddings of texts: {first_line(error)}") from error


def _of_pairs(folder: Path, data: str, *, options: FolderOptions, metric: str) -> FolderScore:
    rows, one, other, label = _columns(data, options, label="score")
    if other is None:
        raise DataError(f"spearman is of pairs: {data} needs columns sentence1 and sentence2, or set pair_column")
    try:
        gold = [float(row[label]) for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"column {label!r} of {data} is no number: {error}") from None
    scores = checked_gold([(row[one], row[other]) for row in rows], gold)
    encoder = _encoder(folder, options)
    with evaluating(encoder), torch.inference_mode():
        sides = [
            _embeddings(folder, encoder, [str(row[name]) for row in rows], role="sentence", options=options)
            for name in (one, other)
        ]
    values = {"spearman": pair_correlation(sides[0].clone(), sides[1].clone(), scores)}
    return _score(folder, encoder, values, counted=f"{len(rows)} pairs")


def _of_retrieval(folder: Path, data: str, *, options: FolderOptions, metric: str) -> FolderScore:
    rows, _ = _texts(data, replace(options, text_column="query"))
    k = options.k or _RANKS
    relevance: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("document"), str):
            raise DataError(f"row {number} of {data} has no text in 'document'; ndcg needs query, document, relevance")
        try:
            relevance.setdefault(row["query"], {})[row["document"]] = float(row.get("relevance", 1))
        except (TypeError, ValueError) as error:
            raise DataError(f"row {number} of {data} has no number in 'relevance': {error}") from None
    corpus = {row["document"]: row["document"] for row in rows}
    asked = checked_relevance({query: query for query in relevance}, corpus, relevance=relevance, k=k)
    encoder = _encoder(folder, options)
    with evaluating(encoder), torch.inference_mode():
        queries = _embeddings(folder, encoder, list(asked), role="query", options=options)
        documents = _embeddings(folder, encoder, list(corpus), role="document", options=options)
        value = mean_ndcg(queries, documents, list(corpus), grades=list(asked.values()), k=k)
    counted = f"{len(asked)} queries, {len(corpus)} documents"
    return _score(folder, encoder, {f"ndcg@{k}": value}, counted=counted)


def _of_tasks(folder: Path, data: str | None, *, options: FolderOptions, metric: str) -> FolderScore:
    tasks = metric.removeprefix(_HARNESS).split(",")
    harness = Harness(tasks, include=data, num_fewshot=options.num_fewshot, limit=options.limit)
    key = None if options.key is None else harness.chosen(options.key)[0]
    model, tokenizer = _loaded(folder, AutoModelForCausalLM)
    values = harness.run(model, tokenizer, batch_size=options.batch_size, max_length=options.sequence_length)
    if key is not None:
        values = {key: harness.value(values, key)}
    documents = "all documents" if options.limit is None else f"{options.limit} documents"
    return _score(folder, model, values, counted=documents)


# By kind of metric what measures it, and which options it has besides those of all: rows of a forward, and a limit.
_MEASURES: Mapping[str, tuple[Callable[..., FolderScore], frozenset[str]]] = {
    "accuracy": (_of_labels, frozenset({*_COLUMNS, "sequence_length"})),
    "perplexity": (_of_text, frozenset({"text_column", "sequence_length"})),
    "spearman": (_of_pairs, frozenset({*_COLUMNS, "sequence_length"})),
    "ndcg": (_of_retrieval, frozenset({"sequence_length", "k"})),
    "evaluate": (_of_labels, frozenset({*_COLUMNS, "key", "sequence_length"})),
    "lm-eval": (_of_tasks, frozenset({"key", "sequence_length", "num_fewshot"})),
}
