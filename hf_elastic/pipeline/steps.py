"""Single steps on what a run left behind: search its supernet again, open it for an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_elastic import objectives
from hf_elastic.checkpoint.run_record import RESULT_FILE, read_record
from hf_elastic.costs import count
from hf_elastic.errors import ArchitectureError, CheckpointError
from hf_elastic.pipeline.comparison import cast_parameters_
from hf_elastic.pipeline.kept import (
    TRAINED,
    export_dtype,
    options_of,
    require_run,
    require_same_sources,
    teacher_vectors,
)
from hf_elastic.pipeline.limits import feasibility
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import device_of
from hf_elastic.report import aligned
from hf_elastic.search import Evaluation, Objective, SearchResult, search_subnets
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.supernet_folder import SPACE_FILE


def open_for_export(folder: Path) -> tuple[Supernet, str]:
    """As :func:`open_supernet`; that of a run in the dtype in which the run exports."""
    supernet, parent = open_supernet(folder)
    if not (folder / SPACE_FILE).is_file():
        cast_parameters_(supernet.model, export_dtype(parent))
    return supernet, parent


def open_supernet(folder: Path) -> tuple[Supernet, str]:
    """Opens a supernet folder, or the trained supernet of a run.

    Returns:
        The handle, and the parent it came from (a folder or Hub name).

    Raises:
        CheckpointError: the folder holds neither, or the run has not trained its supernet yet.
    """
    if (folder / SPACE_FILE).is_file():
        return Supernet.from_pretrained(folder), str(folder)
    record = _record(folder)
    if not record["stages"].get("train", {}).get("finished"):
        recipe = record["options"].get("recipe", "best")
        if recipe != "best":
            raise CheckpointError(f"{folder} is a run of recipe {recipe}, which trains no supernet; use recipe best")
        raise CheckpointError(f"{folder} is a run without a trained supernet yet; repeat its compress command first")
    return Supernet.from_pretrained(folder / TRAINED), str(record["options"].get("model", ""))


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RESULT_FILE).is_file():
        raise CheckpointError(f"{folder} is no supernet and no run: it holds neither {SPACE_FILE} nor {RESULT_FILE}")
    require_run(folder)
    return read_record(folder / RESULT_FILE)


def search_of_run(
    folder: Path, within: Mapping[str, float]
) -> tuple[Supernet, tuple[Objective, Objective], CompressOptions]:
    """What a search of a run's trained supernet takes: the supernet, quality and cost, and what the run was asked for.

    Raises:
        CheckpointError: the folder is no run, its supernet is not trained yet, or its data changed.
        InfeasibleError: nothing keeps the limits.
        SearchError: a limit names no cost.
    """
    record = _record(folder)
    options = options_of(record, output=str(folder.with_suffix("")))
    supernet = open_supernet(folder)[0].to(device_of(options))
    feasibility(supernet, within)
    task = resolve_task(options)
    rows = read_rows(options.data, text_column=options.text_column)
    require_same_sources(folder, options, rows, task=task)
    data = task.prepare(load_tokenizer(options), rows, options)
    measures = task.measures(supernet, data.validation, teacher=teacher_vectors(folder))
    cost = objectives.related_costs(supernet)[next(iter(within), "macs")]
    return supernet, (measures[0], cost), options


def search_run(folder: Path, *, within: Mapping[str, float], evaluations: int, seed: int) -> str:
    """Searches the trained supernet of a run under other limits.

    It is kept in the run as ``search-<limits>-<seed>.db`` and ``.json``, and goes on when it was interrupted.

    Returns:
        The front as a table, the best by quality first, and how to write a row of it.

    Raises:
        CheckpointError: the folder is no run, its supernet is not trained yet, or its data changed.
        InfeasibleError: nothing keeps the limits.
        SearchError: a limit names no cost.
    """
    supernet, goals, options = search_of_run(folder, within)
    label = "-".join([*(f"{name}-{value!r}" for name, value in sorted(within.items())), str(seed)])
    result = search_subnets(
        supernet.space, goals, evaluations=evaluations, within=within,
        storage=f"sqlite:///{folder / f'search-{label}.db'}", seed=seed,
    )  # fmt: skip
    kept = folder / f"search-{label}.json"
    result.save(kept)
    return "\n".join(
        [
            front_table(result),
            f"the supernet was trained on subnets near {options.asked}; far from that, compress again to choose fairly",
            f"write a row: hf-elastic export {folder} '{kept}#ROW' --output DIR",
        ]
    )


def front_table(result: SearchResult) -> str:
    """The front of a search as a table, best first by the first objective; rows are numbered from 1."""
    names = [goal.name for goal in result.objectives]
    lines = [["row", "architecture", *names]]
    for number, found in enumerate(ordered_front(result), 1):
        values = [found.values[name] for name in names]
        shown = [count(value) if value > 1e3 else f"{value:.4f}" for value in values]
        lines.append([str(number), repr(found.architecture), *shown])
    return aligned(lines)


def ordered_front(result: SearchResult) -> list[Evaluation]:
    """The front of a search, best first by the first objective, in the order of :func:`front_table`."""
    first = result.objectives[0]
    sign = 1 if first.direction == "minimize" else -1
    return sorted(result.front, key=lambda found: sign * found.values[first.name])


def front_row(text: str) -> Architecture:
    """The architecture that ``FILE#ROW`` names: a row of the table that :func:`search_run` printed.

    Raises:
        ArchitectureError: the text is not of that form, or the front has no such row.
    """
    path, _, number = text.rpartition("#")
    front = ordered_front(SearchResult.load(path))
    if not re.fullmatch(r"[0-9]{1,9}", number) or not 1 <= int(number) <= len(front):
        raise ArchitectureError(f"{text!r} names row {number!r}; {path} has rows 1 to {len(front)}")
    return front[int(number) - 1].architecture
