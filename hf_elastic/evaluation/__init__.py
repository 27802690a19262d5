"""Quality by the tools that users know: metrics of ``evaluate``, retrieval, tasks of lm-eval, folders side by side.

Names are imported when they are used: the console command in this package must start without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_elastic.late_imports import on_first_use

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

__getattr__, __dir__ = on_first_use(globals(), _HOMES)
