"""What a run is to reach: its budgets as limits on the costs of its space, and whether an export keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_elastic import objectives
from hf_elastic.costs import Latency
from hf_elastic.pipeline.limits import feasibility
from hf_elastic.pipeline.progress import progress_bar
from hf_elastic.search import Objective
from hf_elastic.search.limits import Feasibility
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.budgets import Budgets, Verdict
from hf_elastic.tables.latencies import LatencyTable, measure_latency_table
from hf_elastic.tables.timing import NOISY, Setting, measure_models, speedup, typical

_TABLE_BATCH = 8  # sequences at once for the latencies of a comparison, where no budget says how many


@dataclass(frozen=True)
class Goal:
    """Budgets resolved for a supernet.

    Attributes:
        budgets: what was asked for.
        table: measured latencies, where a budget needs them.
        dtype: of the export.
        known: the costs of the space by name, those that budgets are about among them.
        within: limits on them.
        feasible: the same limits, checkable.
        setting: in which models are timed.
    """

    budgets: Budgets
    table: LatencyTable | None
    dtype: torch.dtype
    known: Mapping[str, Objective]
    within: Mapping[str, float]
    feasible: Feasibility
    setting: Setting

    @property
    def cost(self) -> Objective:
        """The cost of the first limit: the second objective of a search."""
        return self.known[next(iter(self.within))]

    def limiting(self, objective: Objective) -> Objective:
        """The objective, searched within limits on any of the known costs."""
        return replace(objective, related=lambda: dict(self.known))


def goal_of(
    supernet: Supernet,
    budgets: Budgets,
    *,
    dtype: torch.dtype,
    table: LatencyTable | None = None,
    path: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Goal:
    """Resolves budgets for a supernet; measures latencies first where one is a speed-up or a latency.

    Args:
        supernet: unchanged.
        budgets: what the found model may cost.
        dtype: of its export.
        table: latencies that are known.
        path: of a latency table: one that is there is read, or gone on with; else it is written.
        say: where a line goes before latencies are measured.

    Raises:
        SearchError: a limit names no cost.
        InfeasibleError: nothing in the space keeps the budgets; the message says how far the space reaches.
        CheckpointError: the table was measured on another device, or in another setting.
    """
    if budgets.needs_table and table is None:
        table = latencies_for(supernet, budgets, dtype=dtype, path=path, say=say)
    known = objectives.budget_costs(supernet, budgets, table, dtype=dtype)
    within = budgets.limits(supernet, table, dtype=dtype)
    setting = table.setting if table else Setting.of(supernet, batch_size=_TABLE_BATCH, dtype=dtype)
    return Goal(budgets, table, dtype, known, within, feasibility(supernet, within, known=known), setting)


def latencies_for(
    supernet: Supernet, budgets: Budgets, *, dtype: torch.dtype, path: Path | None, say: Callable[[str], None]
) -> LatencyTable:
    """Measures, goes on measuring or reads the latency table that budgets need; raises as :func:`goal_of`."""
    timed = budgets.timed
    open_ended = path is None or not path.is_file() or not LatencyTable.load(path).finished
    if open_ended:
        where = timed.fitted(supernet, new=int(budgets.phase == "decode"))
        say(f"measuring latencies: {budgets.phase} of {where} in {str(dtype).removeprefix('torch.')}")
    with progress_bar("latency table", shown=open_ended) as tell:
        table = measure_latency_table(
            supernet, batch_size=timed.batch_size, length=timed.length, phase=budgets.phase, dtype=dtype, path=path,
            progress=tell,
        )  # fmt: skip
    if table.noise > NOISY:
        anew = "start anew" if path is None else f"delete {path} and repeat this"
        say(
            f"the machine had other work while latencies were measured (the same model differs by {table.noise:.0%}): "
            f"predictions may miss; for better ones {anew} on a quiet machine"
        )
    return table


@dataclass(frozen=True)
class Outcome:
    """What an export turned out to cost.

    Attributes:
        verdicts: whether each budget is met.
        predicted: times it should be faster than its parent, by the latency table; ``None`` without one.
        measured: times it is; ``None`` without a table.
    """

    verdicts: tuple[Verdict, ...]
    predicted: float | None = None
    measured: float | None = None

    def lines(self) -> list[str]:
        """The same in words."""
        found = [f"{'met' if verdict.met else 'MISSED'}: {verdict}" for verdict in self.verdicts]
        if self.predicted is not None and self.measured is not None:
            error = self.predicted / self.measured - 1
            found.append(f"speed-up predicted {self.predicted:.2f}x, measured {self.measured:.2f}x ({error:+.1%})")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        said = [{"budget": v.budget, "met": v.met, "sentence": v.sentence} for v in self.verdicts]
        return {"budgets": said, "predicted_speedup": self.predicted, "measured_speedup": self.measured}


def outcome_of(
    goal: Goal, supernet: Supernet, architecture: Architecture, *, parent: PreTrainedModel, exported: PreTrainedModel
) -> Outcome:
    """Measures an export beside its parent and compares it with the budgets.

    Args:
        goal: with the table that a latency needs.
        supernet: where it was exported from.
        architecture: what was exported.
        parent, exported: both loaded from their checkpoints in the dtype of the goal, on one device.

    Raises:
        CheckpointError: the table's setting is not that of this process.
    """
    models = {"parent": parent, "exported": exported}
    timed = {} if goal.table is None else measure_models(models, goal.setting)
    return judged(goal, supernet, architecture, exported=exported, times=timed.get("exported"), of=timed.get("parent"))


def judged(
    goal: Goal,
    supernet: Supernet,
    architecture: Architecture,
    *,
    exported: PreTrainedModel,
    times: Latency | None,
    of: Latency | None,
) -> Outcome:
    """Compares an export, timed beside its parent already, with the budgets.

    Args:
        goal, supernet, architecture, exported: as :func:`outcome_of`.
        times: of the export; needed with a table.
        of: its parent's, measured with them.

    Raises:
        DataError: a budget needs times that are not given.
    """
    predicted = goal.table.speedup(supernet, architecture) if goal.table else None
    verdicts = goal.budgets.check(
        supernet,
        architecture,
        known=goal.known,
        seconds=typical(times.samples) if times else None,
        parent_seconds=typical(of.samples) if of else None,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in exported.parameters()),
        predicted=(predicted, goal.table.predict(supernet, architecture)) if goal.table and predicted else None,
        dtype=goal.dtype,
    )
    return Outcome(verdicts, predicted, speedup(of, times) if of and times else None)
