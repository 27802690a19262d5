"""Metrics of ``evaluate`` that need no network: each is one function of scikit-learn or SciPy behind its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

INTEGER, FLOAT, TEXT = datasets.Value("int32"), datasets.Value("float32"), datasets.Value("string")

Compute = Callable[..., dict[str, Any]]


def made(name: str, compute: Compute, **features: Any) -> evaluate.Metric:
    """A metric with the given features whose values ``compute(predictions, references)`` gives."""

    class Local(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> evaluate.MetricInfo:
            stated = datasets.Features(features)
            return evaluate.MetricInfo(description="", citation="", features=stated)

        def _compute(self, **given: Any) -> dict[str, Any]:
            return compute(**given)

    Local.__name__ = name
    return Local(keep_in_memory=True, seed=0)


def accuracy() -> evaluate.Metric:
    def compute(predictions: Any, references: Any) -> dict[str, Any]:
        return {"accuracy": float(accuracy_score(references, predictions))}

    return made("Accuracy", compute, predictions=INTEGER, references=INTEGER)


def f1() -> evaluate.Metric:
    def compute(predictions: Any, references: Any, average: str | None = "binary") -> dict[str, Any]:
        return {"f1": f1_score(references, predictions, average=average)}

    return made("F1", compute, predictions=INTEGER, references=INTEGER)


def several() -> evaluate.Metric:
    def compute(predictions: Any, references: Any) -> dict[str, Any]:
        return {
            "matthews": matthews_corrcoef(references, predictions),
            "right": int(accuracy_score(references, predictions, normalize=False)),
            "by_class": {"first": 1.0},
        }

    return made("Several", compute, predictions=INTEGER, references=INTEGER)


def pearson() -> evaluate.Metric:
    def compute(predictions: Any, references: Any) -> dict[str, Any]:
        return {"pearsonr": pearsonr(references, predictions).statistic}

    return made("Pearson", compute, predictions=FLOAT, references=FLOAT)


def micro_f1_of_labels() -> evaluate.Metric:
    def compute(predictions: Any, references: Any) -> dict[str, Any]:
        return {"f1": f1_score(references, predictions, average="micro")}

    several_numbers = datasets.Sequence(INTEGER)
    return made("F1", compute, predictions=several_numbers, references=several_numbers)


def names_right() -> evaluate.Metric:
    def compute(predictions: Any, references: Any) -> dict[str, Any]:
        right = [p == r for ps, rs in zip(predictions, references, strict=True) for p, r in zip(ps, rs, strict=True)]
        return {
            "overall_accuracy": sum(right) / len(right),
            "LOC": {"f1": 0.5},
            "seen": sorted({*sum(references, [])})[0],
        }

    names = datasets.Sequence(TEXT)
    return made("SeqEval", compute, predictions=names, references=names)


def roc_auc() -> evaluate.Metric:
    def compute(prediction_scores: Any, references: Any) -> dict[str, Any]:
        return {"roc_auc": roc_auc_score(references, prediction_scores)}

    return made("RocAuc", compute, prediction_scores=FLOAT, references=INTEGER)


def of_texts() -> evaluate.Metric:
    return made("Bleu", lambda predictions, references: {"bleu": 0.0}, predictions=TEXT, references=TEXT)


def of_other_inputs() -> evaluate.Metric:
    return made("Perplexity", lambda data: {"perplexity": 0.0}, data=TEXT)


SCRIPT = """
import datasets
import evaluate


class ShareRight(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def script_folder(folder: Path, *, name: str = "share_right", text: str = SCRIPT) -> Path:
    """Folder of a metric's script, as ``evaluate`` wants it."""
    (folder / name).mkdir()
    (folder / name / f"{name}.py").write_text(text)
    return folder / name
