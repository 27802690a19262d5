"""The answer without training: measured tables, exact search, closed-form repair of the best few, the best of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_elastic import costs, objectives
from hf_elastic.errors import DataError, InfeasibleError
from hf_elastic.layers import evaluating
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.pipeline.comparison import finite, recorded
from hf_elastic.pipeline.goal import Goal
from hf_elastic.pipeline.kept import EXACT_FILE
from hf_elastic.pipeline.tasks import Task, TaskData
from hf_elastic.repair.parent_streams import ParentStreams
from hf_elastic.repair.refitting import repaired_shapes
from hf_elastic.search import Objective, search_subnets
from hf_elastic.space import Architecture
from hf_elastic.streams import Batch, LayerRunner
from hf_elastic.supernet import Supernet
from hf_elastic.tables.additive import layer_table
from hf_elastic.tables.measures import layer_outputs
from hf_elastic.tables.quality import (
    LEAST_ORDERED,
    SIZES,
    WHOLE,
    Additivity,
    QualityTable,
    additivity,
    measure_quality_table,
    sublayer_options,
)

_HELD_SHARE = 0.25  # of the validation rows: enough to rank options
_RANKING_TOKENS = 5120  # of the calibration tokens: enough to rank repaired cuts, not to make the last repair
_TOKENS_PER_INPUT = 2  # at least, for a projection to be solved
_DEPTHS = 3  # candidates: the best with at most so many layers, for the largest few numbers of layers
_PER_REPAIR = 3  # passes that a closed-form repair costs
_TIMING_SECONDS = 20.0  # of loading and of timing models at the end
_KEPT, _LEFT_OUT, _OUTSIDE = "layers", "left_out", "outside"
_MEASURES = {"embedding": "similarity", "causal-lm": "kl", "masked-lm": "kl", "classification": "hidden"}


def ranking_streams(supernet: Supernet, data: TaskData) -> ParentStreams:
    """What the parent makes of a part of every calibration batch: what candidates are repaired on to be compared.

    Some 5,000 tokens, or of a wide model twice as many as its widest projection has inputs.
    """
    return ParentStreams(supernet, _part(data.calibration, _ranking_share(supernet, data)))


def require_calibration(supernet: Supernet, data: TaskData) -> None:
    """Checks that every projection can be solved from the calibration text.

    Raises:
        DataError: there is too little of it.
    """
    needed, there = _widest(supernet), _tokens(data)
    if there < needed:
        raise DataError(
            f"the data gives {there} tokens for the closed-form repair, which must determine {needed} inputs; pass "
            f"more text, at least {_TOKENS_PER_INPUT * needed} tokens"
        )


def _ranking_share(supernet: Supernet, data: TaskData) -> float:
    """The part of the calibration tokens that candidates are ranked on."""
    return min(1.0, max(_RANKING_TOKENS, _TOKENS_PER_INPUT * _widest(supernet)) / _tokens(data))


def _tokens(data: TaskData) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in data.calibration)


def _widest(supernet: Supernet) -> int:
    """Inputs of the widest projection that a repair solves."""
    parts = supernet.layer_parts
    return max(max(p.full.intermediate_size, p.full.num_attention_heads * p.head_dim) for p in parts)


def _part(batches: Sequence[Batch], share: float) -> list[Batch]:
    return [{name: v[: math.ceil(share * len(v))] for name, v in batch.items()} for batch in batches]


def untrained_seconds(supernet: Supernet, data: TaskData, *, trusted: int) -> float:
    """About how long everything without training takes here: a forward of the parent is timed, passes are counted.

    Args:
        supernet: unchanged.
        data: what it will be measured and repaired on.
        trusted: random architectures that the sums are tried out on.
    """
    batch = data.calibration[len(data.calibration) // 2]
    runner, times = LayerRunner(supernet), []
    with evaluating(supernet.model), torch.no_grad(), supernet.activate(supernet.space.largest()):
        for _ in range(3):
            began = time.perf_counter()
            for _ in layer_outputs(runner, [batch]):
                pass
            times.append(time.perf_counter() - began)
    options = [option for part in supernet.layer_parts for option in sublayer_options(part, sizes=SIZES)]
    whole = _tokens(data)
    some = whole * _ranking_share(supernet, data)
    judged = sum(int(held["attention_mask"].sum()) for held in data.validation)
    repairs = trusted + _DEPTHS + 1 + options.count(WHOLE)
    passes = _PER_REPAIR * (repairs * some + 2 * whole) + whole + len(options) * _HELD_SHARE * judged / 2 + 10 * judged
    return passes * min(times) / int(batch["attention_mask"].sum()) + _TIMING_SECONDS


def quality_table(
    supernet: Supernet,
    parent: ParentStreams,
    *,
    task: Task,
    data: TaskData,
    path: Path,
    progress: Callable[[int, int], object] | None = None,
) -> QualityTable:
    """Measures, or goes on measuring, the damage of every option of every layer."""
    held = _part(data.validation, _HELD_SHARE)
    return measure_quality_table(supernet, parent, held, measure=_measure(task), path=path, progress=progress)


def trust(
    supernet: Supernet,
    table: QualityTable,
    parent: ParentStreams,
    *,
    task: Task,
    data: TaskData,
    count: int,
    seed: int,
) -> Additivity | None:
    """How well the sums predict the damage of random architectures with a layer; ``None`` where there are too few."""
    rng, points = random.Random(seed), dict[Architecture, None]()
    for _ in range(100 * count):
        point = supernet.space.sample(rng)
        if len(points) < count and not all(shape.skipped for shape in supernet.layer_shapes(point)):
            points.setdefault(point)
    if len(points) < LEAST_ORDERED:
        return None
    held = _part(data.validation, _HELD_SHARE)
    return additivity(supernet, table, tuple(points), calibration=parent, validation=held, measure=_measure(task))


def additivity_numbers(found: Additivity) -> dict[str, Any]:
    """What a record keeps of how far sums are to be trusted."""
    return {
        "architectures": len(found.measured), "rank_correlation": finite(found.rank_correlation),
        "ratio": finite(found.mean_ratio), "predicted": list(found.predicted), "measured": list(found.measured),
    }  # fmt: skip


def keep_exact_front(supernet: Supernet, table: QualityTable, goal: Goal, *, folder: Path) -> None:
    """Saves the least predicted damage at every value of the limited cost, solved in milliseconds."""
    goals = [objectives.damage(supernet, table), goal.cost]
    search_subnets(supernet.space, goals, algorithm="exact", progress=False).save(folder / EXACT_FILE)


def _measure(task: Task) -> str:
    return _MEASURES[task.name] + (f"/{task.pooling}" if task.name == "embedding" else "")


def candidates(supernet: Supernet, table: QualityTable, goal: Goal) -> tuple[Architecture, ...]:
    """The architectures of least predicted damage within the limits, with all layers, with one less, and so on.

    Sums over layers are least to be trusted when they compare models of different depth, so each depth has its best
    one tried; with one layer less also the best that leaves out another layer, which is often as close.

    Raises:
        InfeasibleError: nothing with a layer keeps the limits.
    """
    layers = len(supernet.layer_parts)
    found: dict[Architecture, None] = {}
    for most in range(layers, max(0, layers - _DEPTHS), -1):
        try:
            best = _least_damage(supernet, table, goal=goal, most=most)
        except InfeasibleError:
            if not found:
                raise
            break
        found.setdefault(best)
        skipped = [n for n, shape in enumerate(supernet.layer_shapes(best)) if shape.skipped]
        if most == layers - 1 and len(skipped) == 1:
            found.setdefault(_least_damage(supernet, _forbidding(table, skipped[0]), goal=goal, most=most))
    return tuple(found)


def _least_damage(supernet: Supernet, table: QualityTable, *, goal: Goal, most: int) -> Architecture:
    """The architecture of least predicted damage of 1 to ``most`` layers."""
    damage = objectives.damage(supernet, table)
    return least(supernet, damage, known=goal.known, within=goal.within, most=most)


def least(
    supernet: Supernet,
    objective: Objective,
    *,
    known: Mapping[str, Objective],
    within: Mapping[str, float],
    most: int | None = None,
    inside: Sequence[LayerShape] | None = None,
) -> Architecture:
    """The architecture with the least of an additive objective among those that have a layer, by exact search.

    Args:
        supernet: the space.
        objective: a sum over layers.
        known: the costs by name.
        within: limits on them.
        most: how many layers it may have; by default all.
        inside: shapes, one per layer, that each of its layers can be cut from; by default the whole ones.

    Raises:
        InfeasibleError: nothing is left.
    """
    layers = supernet.layer_parts
    counts = {_LEFT_OUT: _count(supernet, _LEFT_OUT, lambda _, shape: shape.skipped)}
    limits = {**within, _LEFT_OUT: len(layers) - 1}
    if most is not None:
        counts[_KEPT] = _count(supernet, _KEPT, lambda _, shape: not shape.skipped)
        limits[_KEPT] = most
    if inside is not None:
        outer = tuple(inside)
        counts[_OUTSIDE] = _count(supernet, _OUTSIDE, lambda part, shape: not shape.nested_in(outer[part.index]))
        limits[_OUTSIDE] = 0
    related = {**known, **counts}
    goal = replace(objective, related=lambda: related)
    result = search_subnets(supernet.space, [goal], algorithm="exact", within=limits, progress=False)
    return result.best(objective.name).architecture


def _forbidding(table: QualityTable, layer: int) -> QualityTable:
    """The table with a layer that is worse to leave out than everything else together."""
    rows = [dict(row) for row in table.damages]
    rows[layer][WHOLE] = 1 + sum(abs(value) for row in rows for value in row.values())
    return replace(table, damages=tuple(rows))


def _count(supernet: Supernet, name: str, rule: Callable[[LayerPart, LayerShape], bool]) -> Objective:
    """Counts the layers that a rule holds for."""

    def one(part: LayerPart, shape: LayerShape) -> int:
        return int(rule(part, shape))

    def total(architecture: Architecture) -> int:
        return sum(map(one, supernet.layer_parts, supernet.layer_shapes(architecture)))

    return Objective(name, total, cost=True, additive=layer_table(supernet, one))


@dataclass(frozen=True)
class Trial:
    """One candidate, repaired on part of the calibration data and measured.

    Attributes:
        architecture: what.
        values: measured qualities by name.
        distance: how bad it is: the product of what each share (cosine, accuracy) is short of 1 and of the values of
            what is minimized; infinite where one is no finite number.
    """

    architecture: Architecture
    values: Mapping[str, float]
    distance: float


def trial_numbers(supernet: Supernet, trial: Trial) -> dict[str, Any]:
    """What a record keeps of a candidate: its architecture, costs and qualities."""
    point = trial.architecture
    return {
        "architecture": dict(point), "parameters": costs.parameters(supernet, point),
        "total_parameters": costs.total_parameters(supernet, point),
        "macs": costs.macs(supernet, point, seq_len=costs.LATENCY_TOKENS), **recorded(trial.values),
    }  # fmt: skip


def tried(
    supernet: Supernet,
    architecture: Architecture,
    *,
    measures: Sequence[Objective],
    calibration: Sequence[Batch] | ParentStreams,
) -> Trial:
    """Repairs a candidate inside the supernet, measures it, and gives the supernet its weights back."""
    with repaired_shapes(supernet, supernet.layer_shapes(architecture), calibration, judged=False):
        values = objectives.evaluated(measures, architecture)
    return Trial(architecture, values, distance_of(measures, values))


def distance_of(measures: Sequence[Objective], values: Mapping[str, float]) -> float:
    """How bad measured qualities are, in one number; see :attr:`Trial.distance`."""
    distance = 1.0
    for measure in measures:
        value = values[measure.name]
        distance *= max(0.0, 1.0 - value) if measure.direction == "maximize" else value
    return distance if all(map(math.isfinite, values.values())) else math.inf
