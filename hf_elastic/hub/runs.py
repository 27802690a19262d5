"""What a run's ``result.json`` says about the model that it exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_elastic.checkpoint.run_record import RESULT_FILE, read_record
from hf_elastic.errors import CheckpointError
from hf_elastic.hub.artefacts import Artefact
from hf_elastic.hub.names import dataset_name
from hf_elastic.reporting.reading import Row, Run

_FOUND = ("found", "after retraining", "after head fusion", "found, inherited weights")


def found_row(run: Run) -> Row | None:
    """The row of what was exported."""
    named = {row["name"]: row for row in run.rows}
    known = next((named[name] for name in _FOUND if name in named), None)
    return known or (run.rows[1] if len(run.rows) == 2 else None)  # a size of a family has a name of its own


def data_sources(run: Run) -> tuple[str, ...]:
    """Data, as it was named."""
    return tuple(map(str, run.options.get("data") or ()))


def hub_datasets(run: Run) -> tuple[str, ...]:
    """Data sets on the Hub among the data."""
    return tuple(dict.fromkeys(name for source in data_sources(run) if (name := dataset_name(source))))


def shown_data(run: Run) -> tuple[str, ...]:
    """Data for a reader: data sets by their names, files without the folders of this machine."""
    return tuple(source if dataset_name(source) else re.split(r"[/\\]", source)[-1] for source in data_sources(run))


def _architecture(run: Run) -> Mapping[str, Any] | None:
    """What was found, where the record says it."""
    row = found_row(run)
    if row is not None and isinstance(row.get("architecture"), dict):
        return dict(row["architecture"])
    return run.stage("search").get("architecture")


def run_of(artefact: Artefact, run: str | Path | None) -> tuple[Run | None, str | None]:
    """The run that made an artefact: the one that is given, else the record inside or beside it.

    Returns:
        The run, and a note where a record beside it is not of this model.

    Raises:
        CheckpointError: the run that was given is none, or is of another model; a record is broken.
    """
    place = _record_file(artefact.folder, run)
    if place is None:
        return None, None
    found = Run(place.parent, read_record(place))
    theirs, ours = _architecture(found), artefact.architecture.get("architecture")
    if artefact.kind == "supernet" or theirs is None or (ours is not None and dict(theirs) == dict(ours)):
        return found, None
    if run is not None and ours is not None:
        raise CheckpointError(
            f"the run in {place} found another subnet than the one in {artefact.folder}, so its numbers are of another "
            "model; leave run out, or give the run that made it"
        )
    if ours is None and (run is not None or place.parent == artefact.folder):
        return found, None
    if ours is None:
        return None, f"{artefact.folder} does not say which subnet it is, so numbers of {place} are shown only by run="
    return None, f"the run in {place} found another subnet, so its numbers are not in the card"


def _record_file(folder: Path, run: str | Path | None) -> Path | None:
    if run is not None:
        given = Path(run).expanduser()
        file = given / RESULT_FILE if given.is_dir() else given
        if not file.is_file():
            raise CheckpointError(f"{given} is no run, it holds no {RESULT_FILE}; give OUTPUT.run, or leave run out")
        return file
    beside = folder.resolve()
    places = (folder / RESULT_FILE, beside.with_name(f"{beside.name}.run") / RESULT_FILE)
    return next((place for place in places if place.is_file()), None)
