"""The final table of a run of ELM: the teacher, the path that was found, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_elastic import costs, objectives
from hf_elastic.checkpoint import extract
from hf_elastic.costs import count
from hf_elastic.pipeline.comparison import finite
from hf_elastic.pipeline.compressed_base import plain_quality
from hf_elastic.pipeline.elm_steps import ElmSetting, Timing, budgets_of, perplexity, timed_setting
from hf_elastic.report import aligned
from hf_elastic.space import Architecture
from hf_elastic.supernet import Loadability, Supernet
from hf_elastic.tables.block_latencies import check_latency
from hf_elastic.tables.timing import measure_models, typical
from hf_elastic.training.schedule import GrowthHistory, Reason

_SECONDS = 6.0
_SHORT = {"standard": "S", "bottleneck": "B"}

TEACHER, FOUND, FUSED, RETRAINED = "teacher", "found, inherited weights", "after head fusion", "after retraining"


@dataclass(frozen=True)
class ElmRow:
    """One row to be: a path of a supernet."""

    name: str
    supernet: Supernet
    architecture: Architecture


def written_as(supernet: Supernet, architecture: Architecture) -> Loadability:
    """How a path is written: stock where that holds it without padding, else compact with its code."""
    return "stock" if supernet.loadability(architecture) == "stock" else "remote-code"


def compared(setting: ElmSetting, rows: Sequence[ElmRow]) -> list[dict[str, Any]]:
    """Rows of the table: sizes, quality on held-out text that nothing was chosen by, and latencies measured in turns.

    Beside a teacher without an output head students are timed without theirs.
    """
    made, models = [_teacher_row(setting)], dict[str, Any]({TEACHER: setting.teacher})
    for row in rows:
        form = written_as(row.supernet, row.architecture)
        found = perplexity(setting, row.supernet, setting.texts.reported)(row.architecture)
        shapes = row.supernet.block_shapes(row.architecture)
        model = extract(row.supernet, row.architecture, loadability=form)
        models[row.name] = model.base_model if setting.texts.headless else model
        made.append(
            {
                "name": row.name, "blocks": [shape.block for shape in shapes],
                "widths": [shape.intermediate_size for shape in shapes],
                "heads": [shape.num_attention_heads for shape in shapes],
                "total_parameters": costs.total_parameters(row.supernet, row.architecture),
                "parameters": costs.parameters(row.supernet, row.architecture),
                "macs": costs.macs(row.supernet, row.architecture, seq_len=costs.LATENCY_TOKENS),
                **_quality(found), "loadability": form,
            }
        )  # fmt: skip
    timed = measure_models(models, timed_setting(setting, rows[0].supernet), seconds=_SECONDS)
    return [{**row, "latency": typical(timed[row["name"]].samples)} for row in made]


def _quality(perplexity: float | None) -> dict[str, float | None]:
    known = None if perplexity is None else finite(perplexity)
    return {"loss": None if known is None else math.log(known), "perplexity": known}


def _teacher_row(setting: ElmSetting) -> dict[str, Any]:
    teacher: PreTrainedModel = setting.teacher
    measured = None
    if not setting.texts.headless:
        batches = setting.batches(setting.texts.reported)
        measured = plain_quality(setting.texts.task, teacher, batches, parent=teacher)
    return {
        "name": TEACHER, "blocks": [teacher.config.model_type] * setting.plan.teacher_layers,
        "total_parameters": sum(parameter.numel() for parameter in teacher.parameters()), **_quality(measured),
        "loadability": "stock",
    }  # fmt: skip


def result_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text; blocks are S (standard) and B (bottleneck), with what one projection serves as behind them."""
    accuracy = any(row.get("accuracy") is not None for row in rows)
    lines = [["", "blocks", "total parameters", "loss", "perplexity", *["accuracy"] * accuracy, "latency", "loads as"]]
    for row in rows:
        share = row["total_parameters"] / rows[0]["total_parameters"]
        cells = [row["name"], short_blocks(row["blocks"]), f"{count(row['total_parameters'])} ({share:.0%})"]
        cells += ["-" if row[name] is None else f"{row[name]:.4f}" for name in ("loss", "perplexity")]
        cells += ["-" if row.get("accuracy") is None else f"{row['accuracy']:.4f}"] * accuracy
        lines.append([*cells, f"{1e3 * row['latency']:.2f} ms", row["loadability"]])
    return aligned(lines)


def short_blocks(blocks: Sequence[str]) -> str:
    """Blocks of all layers in a few letters."""
    if len(set(blocks)) == 1 and blocks[0].partition("-")[0] not in _SHORT:
        return f"{len(blocks)} x {blocks[0]}"
    kinds = [block.partition("-") for block in blocks]
    return " ".join(f"{_SHORT[kind]}{shared}" for kind, _, shared in kinds)


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Block, FFN width and heads of every layer of the last row, which is what is exported."""
    last = rows[-1]
    columns = zip(last["blocks"], last["widths"], last["heads"], strict=True)
    lines = [[str(number), block, str(width), str(heads)] for number, (block, width, heads) in enumerate(columns)]
    return aligned([["layer", "block", "FFN", "heads"], *lines])


def timing_lines(supernet: Supernet, found: Architecture, *, timing: Timing) -> list[str]:
    """What the table predicts of the path that was found, and of the largest, beside what is measured of both."""
    ends = {"largest path": supernet.space.largest(), "smallest path": supernet.space.smallest()}
    points = {"found": found, **{name: point for name, point in ends.items() if point != found}}
    return str(check_latency(supernet, timing.table, points, seconds=_SECONDS)).split("\n")


def verdict_lines(setting: ElmSetting, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether what is exported keeps the limits on time, by the latencies of the table."""
    budgets, teacher, last = budgets_of(setting.options), rows[0]["latency"], rows[-1]["latency"]
    lines = []
    if budgets.speedup is not None:
        word = "met" if teacher / last >= budgets.speedup else "MISSED"
        lines.append(f"{word}: a speed-up of {budgets.speedup:g} over the teacher, measured {teacher / last:.2f}")
    if budgets.latency is not None:
        word = "met" if last <= budgets.latency else "MISSED"
        lines.append(f"{word}: a latency of {1e3 * budgets.latency:g} ms, measured {1e3 * last:.3g} ms")
    return lines


def search_line(numbers: Mapping[str, Any]) -> str:
    """What the search found, beside what it did not choose."""
    return (
        f"searched {numbers['evaluations']} paths: perplexity {numbers['best']:.4f}, of the midpoint "
        f"{numbers['midpoint']:.4f}, of the median path {numbers['median']:.4f} (with the supernet's weights, on text "
        "to search by)"
    )


def growth_line(supernet: Supernet, history: GrowthHistory) -> str:
    """What growth came to."""
    size, space, entries = objectives.total_parameters(supernet), supernet.space, history.entries
    ends = [count(size(point)) for point in (space.smallest(), space.largest())]
    last = entries[-1]
    missed = last.parameters_after < history.budget
    return (
        f"grown {len(entries)} times: the mean path from {count(entries[0].parameters_before)} to "
        f"{count(last.parameters_after)} of {count(history.budget)} ({_REASONS[last.reason]}), paths of {ends[0]} to "
        f"{ends[1]}" + ("; MISSED what it was to grow to: train longer, or ask for less" if missed else "")
    )


_REASONS: Mapping[Reason, str] = {
    "budget": "which is reached",
    "count": "the last time as many blocks grew as may",
    "all at their largest": "all blocks are at their largest",
    "no measured block is left": "the last time no further block had a score",
}
