"""Objectives from the metrics of ``evaluate``: what a subnet answers, as the metric wants to see it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_elastic.distillation import IGNORED_LABEL
from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.evaluation.measuring import Batch, first_line, labelled, measured, running
from hf_elastic.families import shifts_labels
from hf_elastic.search import Objective
from hf_elastic.search.objective import Direction
from hf_elastic.space import Architecture
from hf_elastic.streams import on_device
from hf_elastic.supernet import Supernet

Kind = Literal["class", "value", "labels", "tokens"]
Form = Literal["number", "numbers", "names"]


@dataclass(frozen=True)
class Answers:
    """What a model says about the rows of some batches, and what is right.

    Attributes:
        kind: ``class``: one class a row (a classifier, a choice among answers); ``value``: one number a row
            (regression); ``labels``: any number of classes a row; ``tokens``: one class a token.
        logits: of each row ``(C,)``, of ``tokens`` ``(T, C)`` with the scored positions alone.
        references: of each row ``()``, of ``labels`` ``(C,)``, of ``tokens`` ``(T,)``.
    """

    kind: Kind
    logits: Sequence[Tensor]
    references: Sequence[Tensor]

    def predictions(self) -> list[Tensor]:
        """The answer to each row: the likeliest class, the number, or which labels have a logit above 0."""
        if self.kind == "value":
            return [row.squeeze(-1) for row in self.logits]
        if self.kind == "labels":
            return [(row > 0).long() for row in self.logits]
        return [row.argmax(-1) for row in self.logits]


def answered(model: Any, batches: Iterable[Batch]) -> Answers:
    """Runs a model over labelled batches and sorts out what its head answers, by the shapes of logits and labels.

    Labels of -100 are left out; of a causal language model position ``t`` answers label ``t + 1``.

    Raises:
        UnsupportedModelError: the model gives no logits, as one for question answering.
        DataError: labels do not fit the logits, or none is scored.
    """
    kinds: set[Kind] = set()
    logits: list[Tensor] = []
    references: list[Tensor] = []
    shifted = shifts_labels(model)
    for batch in batches:
        feed = on_device(batch, model)
        labels = feed.pop("labels")
        output = model(**feed)
        if "logits" not in output:
            raise UnsupportedModelError(
                f"{type(model).__name__} gives {', '.join(output)}, no logits: a metric can be of classes, numbers or "
                "tokens; evaluate answers that are spans or texts by objectives.lm_eval, or by an Objective of your own"
            )
        found = output.logits.float().cpu()
        kind, rows, right = _rows(found, labels.cpu(), shifted=shifted)
        kinds.add(kind)
        logits += rows
        references += right
    if len(kinds) != 1:
        raise DataError(f"the batches hold labels of several kinds: {', '.join(sorted(kinds))}")
    if not sum(reference.numel() for reference in references):
        raise DataError("no label of the validation batches is scored: all are -100")
    return Answers(kinds.pop(), logits, references)


def _rows(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Kind, list[Tensor], list[Tensor]]:
    """The rows of one batch; each row of ``tokens`` holds the scored positions."""
    if labels.shape == logits.shape[:-1] and labels.ndim == 1:
        if logits.shape[-1] == 1:  # regression
            return "value", list(logits), list(labels)
        kept = labels != IGNORED_LABEL
        return "class", list(logits[kept]), list(labels[kept])
    if labels.shape == logits.shape and labels.ndim == 2:
        return ("value", list(logits), list(labels[:, 0])) if labels.shape[1] == 1 else (
            "labels", list(logits), list(labels.long())
        )  # fmt: skip
    if labels.shape == logits.shape[:-1] and labels.ndim == 2:
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORED_LABEL
        pairs = [(row[keep], right[keep]) for row, right, keep in zip(logits, labels, kept, strict=True)]
        return "tokens", [row for row, _ in pairs], [right for _, right in pairs]
    raise DataError(
        f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; a metric takes one "
        "class or number a row (B,), several labels a row (B, C), or one class a token (B, T)"
    )


def metric(
    supernet: Supernet,
    module: Any,
    validation: Iterable[Batch],
    *,
    direction: Direction,
    key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Objective:
    """A metric of ``evaluate`` on labelled batches.

    The metric sees the likeliest class of a classifier (or of several answers to choose from), the number of a
    regression, the labels above 0 of a classifier with several, or the likeliest class of every scored token; one whose
    features are strings (seqeval) sees the tokens' names in ``config.id2label``. One that takes ``prediction_scores``
    (roc_auc) sees probabilities.

    Args:
        module: an ``evaluate.EvaluationModule``, the folder or file of one's script, or a name that ``evaluate`` has
            in its cache; nothing is downloaded.
        validation: inputs of the model, ``labels`` included.
        direction: which way is better; ``evaluate`` does not say.
        key: which of the metric's values, where it gives several.
        settings: what its ``compute`` takes besides, such as ``{"average": "macro"}``.
        name: of the objective; by default the metric's, with the key.

    Raises:
        DataError: there is no such metric here, it needs something else than predictions and references, or the
            batches do not fit.

    Example:
        >>> f1 = objectives.metric(supernet, evaluate.load("f1"), validation, direction="maximize")
    """
    loaded = load_module(module)
    reader = Reader(loaded, dict(settings or {}))
    batches = labelled(validation)
    names = _class_names(supernet.base)

    def measure(architecture: Architecture) -> float:
        with running(supernet, architecture) as model:
            found = answered(model, batches)
        return reader.value(found, key=key, names=names)

    shown = name or (loaded.name if key in (None, loaded.name) else f"{loaded.name}.{key}")
    rest = (loaded.name, loaded.config_name, loaded._hash, key, sorted(reader.settings.items()))
    return measured(supernet, shown, measure, direction=direction, batches=batches, rest=rest)


def load_module(module: Any) -> Any:
    """Returns an ``evaluate.EvaluationModule``: the one given, or that of a script on this machine.

    Raises:
        DataError: there is none, or its script fails.
    """
    import evaluate
    from datasets import DownloadConfig

    if isinstance(module, evaluate.EvaluationModule):
        return module
    if not isinstance(module, str | os.PathLike):
        raise DataError(
            f"a {type(module).__name__} is no evaluate.EvaluationModule; pass one (of evaluate.combine: each of its "
            "parts), the folder of its script, or its name"
        )
    path = Path(module)
    local = isinstance(module, os.PathLike) or path.exists() or len(path.parts) > 2 or path.suffix == ".py"
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    if local and not script.is_file():
        raise DataError(f"there is no metric script {script}; pass the folder NAME that holds NAME.py, or that file")
    try:
        return evaluate.load(
            str(path.resolve() if local else module), keep_in_memory=True, seed=0,
            download_config=DownloadConfig(local_files_only=True),
        )  # fmt: skip
    except Exception as error:  # a script raises whatever it likes
        if local:
            raise DataError(f"the metric script {script} fails: {first_line(error)}") from error
        raise DataError(
            f"evaluate has no metric {str(module)!r} on this machine, and nothing is downloaded ({first_line(error)}); "
            f"pass the folder of its script, or call evaluate.load({str(module)!r}) where there is a network"
        ) from error


@dataclass(frozen=True)
class Reader:
    """Shows answers to a metric as its features ask for.

    Attributes:
        module: the metric.
        settings: further arguments of its ``compute``.

    Raises:
        DataError: it takes other inputs than predictions and references.
    """

    module: Any
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        given = set(self._features[0])
        if given not in ({"predictions", "references"}, {"prediction_scores", "references"}):
            raise DataError(
                f"the metric {self.module.name!r} takes {', '.join(sorted(given))}; supported are metrics of "
                "predictions (or prediction_scores) and references"
            )

    @property
    def _features(self) -> list[Mapping[str, Any]]:
        """What it takes; some metrics take either of several forms."""
        stated = self.module.features
        return list(stated) if isinstance(stated, list) else [stated]

    @property
    def _column(self) -> str:
        return "predictions" if "predictions" in self._features[0] else "prediction_scores"

    def value(self, found: Answers, *, key: str | None, names: Mapping[int, str]) -> float:
        """Computes the metric.

        Raises:
            DataError: the metric compares something else than the answers, fails, or has not that one value.
        """
        forms = {_form(features[self._column]) for features in self._features}
        predictions, references = self._shown(found, forms, names=names)
        inputs = {self._column: predictions, "references": references}
        try:
            result = self.module.compute(**inputs, **self.settings)
        except Exception as error:  # sklearn's, arrow's, or the script's own
            raise DataError(
                f"the metric {self.module.name!r} cannot be computed of {len(references)} answers of kind "
                f"{found.kind!r}: {first_line(error)}; its settings= are those of its compute()"
            ) from error
        return _number(result, key=key, name=self.module.name)

    def _shown(
        self, found: Answers, forms: set[Form | None], *, names: Mapping[int, str]
    ) -> tuple[list[Any], list[Any]]:
        scores = self._column == "prediction_scores"
        if scores and found.kind in ("class", "labels"):
            return _probabilities(found, single="number" in forms), [row.tolist() for row in found.references]
        predictions = found.predictions()
        if not scores and found.kind == "tokens" and "names" in forms:
            return _named(predictions, names), _named(found.references, names)
        if not scores and found.kind == "tokens" and "number" in forms:
            return torch.cat(predictions).tolist(), torch.cat(list(found.references)).tolist()
        wanted: Form = "numbers" if found.kind == "labels" else "number"
        if not scores and found.kind != "tokens" and wanted in forms:
            return [row.tolist() for row in predictions], [row.tolist() for row in found.references]
        raise DataError(
            f"the metric {self.module.name!r} takes {self._features[0][self._column]}, the model answers by "
            f"{_KINDS[found.kind]}; give a metric of those (of texts: objectives.lm_eval)"
        )


_KINDS: Mapping[Kind, str] = {
    "class": "one class a row", "value": "one number a row", "labels": "several labels a row",
    "tokens": "one class a token",
}  # fmt: skip


def _form(feature: Any) -> Form | None:
    """Numbers one by one, lists of numbers, lists of names; ``None`` for what no model of classes can give."""
    inner = getattr(feature, "feature", None)
    dtype = str(getattr(feature if inner is None else inner, "dtype", ""))
    numeric = dtype.startswith(("int", "uint", "float", "bool"))
    if inner is None:
        return "number" if numeric else None
    return "numbers" if numeric else "names" if dtype == "string" else None


def _probabilities(found: Answers, *, single: bool) -> list[Any]:
    if found.kind == "labels":
        return [row.sigmoid().tolist() for row in found.logits]
    shares = [row.softmax(-1) for row in found.logits]
    if not single:
        return [row.tolist() for row in shares]
    if len(shares[0]) != 2:  # noqa: PLR2004
        raise DataError(
            f"the metric takes one score a row, that of the second of two classes; the model has {len(shares[0])} "
            "(roc_auc: evaluate.load('roc_auc', 'multiclass'))"
        )
    return [float(row[1]) for row in shares]


def _named(rows: Sequence[Tensor], names: Mapping[int, str]) -> list[list[str]]:
    try:
        return [[names[int(number)] for number in row] for row in rows]
    except KeyError as error:
        raise DataError(f"token label {error} is none of the {len(names)} in config.id2label") from None


def _class_names(model: nn.Module) -> dict[int, str]:
    stated = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {int(number): str(name) for number, name in stated.items()}


def _number(result: Mapping[str, Any] | None, *, key: str | None, name: str) -> float:
    """The one number that is meant among what a metric gives."""
    numbers: dict[str, float] = {}
    for entry, value in (result or {}).items():
        try:
            numbers[entry] = float(value)
        except (TypeError, ValueError):  # a list, or a part of the result that is itself a dict
            continue
    if key is None and len(numbers) == 1:
        return next(iter(numbers.values()))
    if key in numbers:
        return numbers[key]
    asked = "several numbers" if key is None and numbers else "no number" if key is None else f"no number {key!r}"
    known = ", ".join(numbers) or ", ".join(result or {}) or "nothing"
    raise DataError(f"the metric {name!r} gives {asked}; its values are {known}; set key=")
