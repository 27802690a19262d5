"""``hf-elastic reproduce``: a published result run again, at the size that the machine has time for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_elastic import spaces
from hf_elastic.errors import DataError, SearchError
from hf_elastic.pipeline.elm_reproduction import reproduce_elm
from hf_elastic.pipeline.study import Plan, Study
from hf_elastic.report import aligned
from hf_elastic.supernet import Supernet

Say = Callable[[str], None]
ELM = "elm"


@dataclass(frozen=True)
class Published:
    """A published result and the settings that led to it.

    Attributes:
        space: name in :data:`hf_elastic.spaces.PUBLISHED`.
        task: what it was measured on.
        source: where it stands.
        rows: (method, accuracy in per cent, share of the MACs).
        settings: what was done, by name.
        targets: modules with adapters.
        rank: of the fixed adapters beside it.
        files: training and test rows below ``HF_ELASTIC_DATA``, and the column of the text.
    """

    space: str
    task: str
    source: str
    rows: tuple[tuple[str, float, float], ...]
    settings: dict[str, str]
    targets: tuple[str, ...]
    rank: int
    files: tuple[str, str, str]

    @property
    def macs(self) -> float:
        """The share of the MACs that the search may keep."""
        return min(share for _, _, share in self.rows)


PUBLISHED: dict[str, Published] = {
    "lonas-bert": Published(
        space="lonas-bert",
        task="SST-2",
        source="README of LoNAS (github.com/IntelLabs/Hardware-Aware-Automated-Machine-Learning), GLUE table",
        rows=(("LoRA", 92.06, 1.0), ("LoNAS", 93.23, 8.0 / 11.2)),
        settings={
            "model": "bert-base-uncased", "training rows": "67349", "epochs": "60", "learning rate": "0.0003",
            "weight decay": "0.1", "evaluations": "1000", "search": "NSGA-II of pymoo",
        },
        targets=("query", "value"),
        rank=8,
        files=("glue/sst2_train.jsonl", "glue/sst2_dev.jsonl", "sentence"),
    )
}  # fmt: skip

_SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "model": "sentence-transformers/all-MiniLM-L6-v2", "steps": 600, "most_rows": 20_000, "evaluations": 60,
        "learning_rate": 2e-3,
    },
    "full": {
        "model": "google-bert/bert-base-uncased", "steps": 126_000, "most_rows": 70_000, "evaluations": 1000,
        "learning_rate": 3e-4,
    },
}  # fmt: skip


def reproduce(
    name: str,
    *,
    output: str | Path,
    scale: str = "small",
    data: str | Path | None = None,
    say: Say = print,
    **changes: Any,
) -> str:
    """Runs a published experiment and says what the paper has, what we have, and what differs.

    Interrupted, the same call goes on where it was.

    Args:
        name: of the result, see :data:`PUBLISHED`; or ``elm``, see
            :func:`hf_elastic.pipeline.elm_reproduction.reproduce_elm`.
        output: folder that keeps what was measured.
        scale: ``small``: minutes on a CPU; ``full``: the paper's model, rows and steps.
        data: folder of the data; by default ``HF_ELASTIC_DATA``.
        say: where progress lines go.
        changes: of the plan (:class:`~hf_elastic.pipeline.study.Plan`), such as ``model`` or ``steps``.

    Returns:
        The table and the differences.

    Raises:
        SearchError: there is no such result or scale.
        DataError: there is no data.
    """
    if name == ELM:
        return reproduce_elm(output=output, scale=scale, data=data, say=say, **changes)
    if name not in PUBLISHED:
        known = ", ".join([*PUBLISHED, ELM])
        raise SearchError(f"{name!r} is no published result that is known here; known: {known}")
    if scale not in _SCALES:
        raise SearchError(f"scale={scale!r} is not one of {', '.join(_SCALES)}")
    paper = PUBLISHED[name]
    folder = Path(data) if data else Path(os.environ.get("HF_ELASTIC_DATA", ""))
    train, test, text = paper.files
    if not (data or "HF_ELASTIC_DATA" in os.environ) or not (folder / train).is_file():
        raise DataError(
            f"{name} needs {train} and {test}, rows with columns {text!r} and 'label', in a folder: pass --data FOLDER "
            "or set HF_ELASTIC_DATA"
        )
    plan = Plan(train=str(folder / train), test=str(folder / test), text=text, **_SCALES[scale])
    plan = replace(plan, **{key: value for key, value in changes.items() if value is not None})
    study = Study(plan, Path(output), say=say)
    rows = study.fixed("LoRA", rank=paper.rank, targets=paper.targets)
    rows = [*rows, *study.elastic("LoNAS", _maker(paper, seed=plan.seed), within={"macs": paper.macs})]
    return "\n".join([_table(paper, rows), "", *_differences(paper, study)])


def _maker(paper: Published, *, seed: int) -> Callable[[PreTrainedModel, list[str]], Supernet]:
    def make(model: PreTrainedModel, head: list[str]) -> Supernet:
        space = spaces.PUBLISHED[paper.space](model.config)
        space.lora.modules_to_save = head
        return space.make(model, seed=seed)

    return make


def _table(paper: Published, rows: list[dict[str, Any]]) -> str:
    base = next(row for row in rows if row["method"] == "LoRA")["accuracy"]
    theirs = {method: (accuracy, share) for method, accuracy, share in paper.rows}
    lines = [[f"{paper.task}", "paper", "of LoRA's", "MACs", "ours", "of LoRA's", "MACs", "evaluations"]]
    for label, subnet in (("LoRA", f"rank {paper.rank}"), ("LoNAS", "found"), ("LoNAS", "midpoint")):
        row = next(row for row in rows if (row["method"], row["subnet"]) == (label, subnet))
        accuracy, share = theirs[label] if subnet != "midpoint" else (None, None)
        whole = theirs["LoRA"][0]
        shown = [f"{accuracy:.2f}", f"{accuracy / whole:.1%}", f"{share:.0%}"] if accuracy else ["-", "-", "-"]
        lines.append(
            [
                f"{label}, {subnet}", *shown, f"{100 * row['accuracy']:.2f}", f"{row['accuracy'] / base:.1%}",
                f"{row['macs_share']:.0%}", str(row.get("evaluations", "")),
            ]
        )  # fmt: skip
    return aligned(lines)


def _differences(paper: Published, study: Study) -> list[str]:
    """Where the run was not what the paper did."""
    plan, rows = study.plan, len(study.train)
    ours = {
        "model": Path(plan.model).name if Path(plan.model).exists() else plan.model,
        "training rows": str(rows),
        "epochs": f"{plan.steps * plan.batch_size / rows:.2g}",
        "learning rate": f"{plan.learning_rate:g}",
        "weight decay": "0",
        "evaluations": str(plan.evaluations),
        "search": "NSGA-II of Optuna",
    }
    lines = [f"  {key}: paper {value}, ours {ours[key]}" for key, value in paper.settings.items() if value != ours[key]]
    return [f"paper: {paper.source}", "what differs:", *lines]
