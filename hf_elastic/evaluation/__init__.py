"""Quality by the tools that users know: metrics of ``evaluate``, retrieval, tasks of lm-eval, folders side by side.

Names are imported when they are used: the console command in this package must start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_elastic.evaluation.folder import FolderOptions as FolderOptions
    from hf_elastic.evaluation.folder import FolderScore as FolderScore
    from hf_elastic.evaluation.folder import compare_folders as compare_folders
    from hf_elastic.evaluation.folder import evaluate_folder as evaluate_folder
    from hf_elastic.evaluation.harness import Harness as Harness
    from hf_elastic.evaluation.harness import lm_eval as lm_eval
    from hf_elastic.evaluation.harness import lm_eval_results as lm_eval_results
    from hf_elastic.evaluation.metrics import metric as metric
    from hf_elastic.evaluation.similarity import ndcg as ndcg
    from hf_elastic.evaluation.similarity import spearman as spearman

_HOMES = {
    "folder": ("FolderOptions", "FolderScore", "compare_folders", "evaluate_folder"),
    "harness": ("Harness", "lm_eval", "lm_eval_results"),
    "metrics": ("metric",),
    "similarity": ("ndcg", "spearman"),
}
_SOURCE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FolderOptions",
    "FolderScore",
    "Harness",
    "compare_folders",
    "evaluate_folder",
    "lm_eval",
    "lm_eval_results",
    "metric",
    "ndcg",
    "spearman",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_SOURCE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
