"""Single steps on what a run left behind: search its supernet again, open it for an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_elastic import objectives
from hf_elastic.checkpoint.run_record import RESULT_FILE, read_record
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import CheckpointError
from hf_elastic.pipeline.limits import feasibility
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.run import teacher_vectors, text_digest
from hf_elastic.pipeline.tasks import load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import device_of
from hf_elastic.report import aligned, count
from hf_elastic.search import SearchResult, search_subnets
from hf_elastic.supernet import SPACE_FILE, Supernet


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
        raise CheckpointError(f"{folder} is a run without a trained supernet yet; repeat its compress command first")
    return Supernet.from_pretrained(folder / "supernet"), str(record["options"].get("model", ""))


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RESULT_FILE).is_file():
        raise CheckpointError(f"{folder} is no supernet and no run: it holds neither {SPACE_FILE} nor {RESULT_FILE}")
    return read_record(folder / RESULT_FILE)


def search_run(folder: Path, *, within: Mapping[str, float], evaluations: int, seed: int) -> str:
    """Searches the trained supernet of a run under other limits.

    It is kept in the run as ``search-<limits>-<seed>.db`` and ``.json``, and goes on when it was interrupted.

    Returns:
        The front as a table, the best by quality first.

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
    if text_digest(rows, task, options) != record["options"].get("text"):
        raise CheckpointError(f"the text in {', '.join(options.data)} is not what {folder} was made from; restore it")
    data = task.prepare(load_tokenizer(options), rows, options)
    measures = task.measures(supernet, data.validation, teacher=teacher_vectors(folder))
    cost = objectives.related_costs(supernet)[next(iter(within), "macs")]
    label = "-".join([*(f"{name}-{value!r}" for name, value in sorted(within.items())), str(seed)])
    result = search_subnets(
        supernet.space, [measures[0], cost], evaluations=evaluations, within=within,
        storage=f"sqlite:///{folder / f'search-{label}.db'}", seed=seed,
    )  # fmt: skip
    result.save(folder / f"search-{label}.json")
    return front_table(result)


def front_table(result: SearchResult) -> str:
    """The front of a search as a table, best first by the first objective."""
    names = [goal.name for goal in result.objectives]
    sign = 1 if result.objectives[0].direction == "minimize" else -1
    ordered = sorted(result.front, key=lambda e: sign * e.values[names[0]])
    lines = [["architecture", *names]]
    lines += [
        [
            repr(e.architecture),
            *(count(e.values[n]) if e.values[n] > 1e3 else f"{e.values[n]:.4f}" for n in names),
        ]
        for e in ordered
    ]
    return aligned(lines)


def options_of(record: Mapping[str, Any], *, output: str) -> CompressOptions:
    """Restores the options a run was started with.

    Raises:
        CheckpointError: the record holds other options than this version has.
    """
    options = {name: value for name, value in record["options"].items() if name != "text"}
    try:
        space, data = options.pop("space"), tuple(options.pop("data"))
        given = ElasticConfig.from_dict(space) if space else None
        return CompressOptions(**options, data=data, output=output, space=given)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the record of the run holds no usable options: {error}") from error
