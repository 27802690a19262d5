"""Text of a run of ELM: blocks of the teacher's tokens, all at once or as a stream, and labelled rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.families import FAMILIES
from hf_elastic.files import read_json
from hf_elastic.models import MODEL_TYPES
from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.tasks import (
    VALIDATION,
    Batch,
    Feature,
    Task,
    TaskData,
    load_tokenizer,
    one_line,
    read_config,
    resolve_task,
)
from hf_elastic.pipeline.texts import Row, digest, read_rows
from hf_elastic.training.order import InOrder, training_order

_SEARCHED = 128  # held-out blocks that paths are compared on
_BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_FEWEST_ROWS = 20
_SHARE_HELD = 10


@dataclass(frozen=True)
class ElmTexts:
    """Text as both trainings, the search and the table use it.

    Attributes:
        task: of the student: ``masked-lm`` or ``causal-lm``.
        teacher_task: of the teacher: the same, or ``embedding`` for one without an output head.
        config: of the teacher.
        tokenizer: of the teacher.
        data: training examples (of a stream those that were read before it), calibration batches and how to collate.
        searched: held-out batches that paths are compared on.
        reported: other held-out batches, which the table is about.
        stream: further training examples, without end; ``None`` where there are no others.
        digest: of what was read, to notice when a continued run finds other data.
    """

    task: Task
    teacher_task: Task
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    searched: tuple[Batch, ...]
    reported: tuple[Batch, ...]
    stream: IterableDataset[Feature] | None
    digest: str

    @property
    def headless(self) -> bool:
        """Whether the teacher gives states and no predictions."""
        return self.teacher_task.name == "embedding"

    @property
    def causal(self) -> bool:
        """Whether the student is a decoder."""
        return self.task.name == "causal-lm"

    def training(self, options: ElmOptions, *, steps: int) -> Dataset[Any]:
        """Examples of all steps of a training, in the order in which they are seen."""
        if self.stream is not None:
            return self.stream
        lengths = [0] * len(self.data.train)  # all are alike
        order = training_order(lengths, batch_size=options.batch_size, steps=steps, seed=options.seed)
        return InOrder(self.data.train, order)


def read_texts(options: ElmOptions) -> ElmTexts:
    """Reads tokenizer and text, and splits off what is held out.

    Raises:
        CheckpointError: the teacher cannot be read, or its tokenizer is of another model.
        UnsupportedModelError: it is of no known family, or a classifier.
        DataError: there is too little text, or it cannot be read.
    """
    require_stock(options.teacher, command="elm")
    shared = options.compress
    taught, config = resolve_task(shared), read_config(options.teacher)
    if taught.name == "classification":
        raise UnsupportedModelError(
            f"{options.teacher!r} is a classifier, which no text can be learned from; give the language model or the "
            "encoder it was made from, or set task='embedding'"
        )
    student = taught
    if taught.name == "embedding":
        causal = any(row.causal for row in FAMILIES if row.model_type == config.model_type)
        student = resolve_task(replace(shared, task="causal-lm" if causal else "masked-lm"))
    tokenizer = load_tokenizer(shared)
    rows = _Stream(options, tokenizer, int(config.vocab_size)) if options.stream else None
    known = rows.head() if rows else read_rows(options.data, text_column=options.text_column)
    data = student.prepare(tokenizer, known, replace(shared, task=student.name))  # type: ignore[arg-type]
    searched, reported = _halves(data.validation)
    return ElmTexts(
        student, taught, config, tokenizer, data, searched, reported,
        None if rows is None else _Endless(data.train, lambda: rows.blocks(len(known))),
        digest(known, (options.text_column,)),
    )  # fmt: skip


def require_stock(model: str, *, command: str) -> None:
    """Refuses a folder with a static model, such as ``elm`` writes, where a stock checkpoint is asked for.

    Raises:
        UnsupportedModelError: it holds one.
    """
    file = Path(model).expanduser() / "config.json"
    kind = read_json(file).get("model_type") if file.is_file() else None
    if kind in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{model} is of type {kind}, which hf_elastic exports where layers differ; hf-elastic {command} starts "
            "from stock checkpoints, so give the one that this was made from"
        )


def _halves(batches: Sequence[Batch]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Every other example, so that what a path is chosen by is not what it is reported on."""
    whole = [batch for batch in batches if len(batch["labels"]) > 1]
    first, second = (
        [{name: tensor[start::2].contiguous() for name, tensor in batch.items()} for batch in whole] for start in (0, 1)
    )
    return tuple(first[: max(1, _SEARCHED // len(first[0]["labels"]))]), tuple(second)


class _Endless(IterableDataset[Feature]):
    """Examples that were read already, those that follow, and again from the start, for a Trainer that counts steps."""

    def __init__(self, head: Sequence[Feature], rest: Callable[[], Iterator[Feature]]) -> None:
        self._head, self._rest = head, rest

    def __iter__(self) -> Iterator[Feature]:
        while True:
            yield from self._head
            yield from self._rest()


class _Stream:
    """Rows of all sources, read when they are asked for, and cut into blocks of tokens."""

    def __init__(self, options: ElmOptions, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._options, self._tokenizer, self._vocabulary = options, tokenizer, vocabulary
        self._end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        for source in options.data[1:]:  # the first is read before any work
            next(_streamed(source, options.text_column), None)

    def head(self) -> list[Row]:
        """The first rows, a fifth of whose blocks is held out: as many as the text of a whole run would give."""
        options = self._options
        trained = (options.steps or 1) * options.batch_size
        tokens = 5 * min(VALIDATION, max(8, trained // 20)) * options.sequence_length
        found: list[Row] = []
        for row in self._rows():
            found.append(row)
            tokens -= len(self._tokens(row))
            if tokens <= 0:
                break
        if not found:
            raise DataError(f"{', '.join(options.data)} holds no text")
        return found

    def blocks(self, skip: int) -> Iterator[Feature]:
        """Training examples out of all rows but the first few.

        Raises:
            CheckpointError: the tokenizer makes tokens that the teacher does not know.
        """
        waiting: list[int] = []
        size = self._options.sequence_length
        for row in itertools.islice(self._rows(), skip, None):
            waiting += self._tokens(row)
            while len(waiting) >= size:
                block, waiting = waiting[:size], waiting[size:]
                if max(block) >= self._vocabulary:
                    raise CheckpointError(
                        f"the tokenizer of {self._options.teacher!r} makes token {max(block)}, its model knows "
                        f"{self._vocabulary}; they are of two models"
                    )
                yield {"input_ids": block}

    def _tokens(self, row: Row) -> list[int]:
        text = row[self._options.text_column]
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
        return ids + ([self._end] if self._end is not None else [])

    def _rows(self) -> Iterator[Row]:
        for source in self._options.data:
            yield from _streamed(source, self._options.text_column)


def _streamed(source: str, text_column: str) -> Iterator[Row]:
    """Rows of a file or of a data set on the Hub, one after another; paragraphs of plain text."""
    import datasets  # takes a second, and only this needs it

    path = Path(source).expanduser()
    kind = _BUILDERS.get(path.suffix)
    if kind is not None and not path.is_file():
        raise DataError(f"there is no file {source}; check the path")
    name, _, split = source.partition(":")
    settings: dict[str, Any] = {"split": split or "train"}
    if path.is_file():
        name, settings = kind or "text", {"split": "train", "data_files": str(path)}
        settings |= {"sample_by": "paragraph"} if name == "text" else {}
    column = "text" if path.is_file() and name == "text" else text_column
    try:
        for row in datasets.load_dataset(name, streaming=True, **settings):
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"a row of {source} has no text in column {column!r}, its columns are: {', '.join(row)}; set "
                    "text_column"
                )
            yield {text_column: row[column]}
    except DataError:
        raise
    except Exception as error:  # datasets raises whatever its parts raise
        raise DataError(f"cannot stream {source!r}: {one_line(error)}; check the path, or write name:split") from error


@dataclass(frozen=True)
class LabelledRows:
    """Rows to fine-tune on.

    Attributes:
        labels: names of the classes.
        train: nine tenths of the rows, with the numbers of their labels.
        held: the others.
        digest: of all of them.
    """

    labels: tuple[str, ...]
    train: tuple[Feature, ...]
    held: tuple[Feature, ...]
    digest: str

    @property
    def majority(self) -> float:
        """Accuracy of always saying the most common label."""
        found = [feature["labels"] for feature in self.held]
        return max(map(found.count, set(found))) / len(found)


def read_labelled(options: ElmOptions, tokenizer: PreTrainedTokenizerBase) -> LabelledRows:
    """Reads the rows of ``finetune``, and splits a tenth of them off.

    Raises:
        DataError: a file cannot be read, a row has no label, or there are too few rows or labels.
    """
    rows = read_rows(options.finetune, text_column=options.text_column)
    column = options.label_column
    if missing := next((row for row in rows if row.get(column) is None), None):
        raise DataError(
            f"finetune needs a column {column!r}, a row has only {sorted(missing)}; set label_column (--label-column)"
        )
    labels = sorted({str(row[column]) for row in rows})
    if len(rows) < _FEWEST_ROWS or len(labels) < 2:
        raise DataError(
            f"finetune holds {len(rows)} rows of {len(labels)} labels, at least {_FEWEST_ROWS} of two are needed"
        )
    ids: list[list[int]] = tokenizer(
        [row[options.text_column] for row in rows], truncation=True, max_length=options.sequence_length
    )["input_ids"]  # type: ignore[assignment]
    if not all(ids):
        raise DataError(f"row {[bool(one) for one in ids].index(False) + 1} of finetune gives no token; leave it out")
    features = [
        {"input_ids": one, "labels": labels.index(str(row[column]))} for one, row in zip(ids, rows, strict=True)
    ]
    random.Random(options.seed).shuffle(features)
    held = len(features) // _SHARE_HELD
    found = digest(rows, (options.text_column, column))
    return LabelledRows(tuple(labels), tuple(features[held:]), tuple(features[:held]), found)
