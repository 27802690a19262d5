"""The Pareto front of a run as a picture beside its card."""

from __future__ import annotations

from pathlib import Path

from hf_elastic.checkpoint.run_record import RESULT_FILE, read_record
from hf_elastic.errors import ElasticError
from hf_elastic.hub.artefacts import Artefact, written_by_us
from hf_elastic.hub.runs import run_of
from hf_elastic.reporting.charts import Picture
from hf_elastic.reporting.content import Section
from hf_elastic.reporting.front_sections import trade_off
from hf_elastic.reporting.reading import Run, open_run
from hf_elastic.reporting.static_figures import draw

FIGURE = "pareto_front"
"""Stem of the picture's name beside a card."""


def drawn_front(artefact: Artefact, run: str | Path | None, *, into: Path) -> tuple[Path | None, str | None]:
    """Draws the Pareto front that the run of an artefact searched, where it was searched and can be drawn.

    Args:
        artefact: whose card shows it.
        run: as for :func:`hf_elastic.model_card`.
        into: a folder for the picture.

    Returns:
        The picture, and a note where there is a front that cannot be drawn.

    Raises:
        CheckpointError: the run that was given is none, or is of another model; its record is broken.
    """
    with written_by_us(artefact.folder):
        record, _ = run_of(artefact, run)
    if record is None:
        return None, None
    try:
        with written_by_us(artefact.folder):
            front = _front(record)
        return (None if front is None else draw(front, into / f"{FIGURE}.svg", format="svg")), None
    except ElasticError as error:  # a card does without
        return None, f"the card has no figure of the Pareto front: {error}"


def _front(record: Run) -> Picture | None:
    """The front of the run's own search, else of another one, else of the exact search."""
    part = trade_off(open_run(_folder_of(record)))
    drawn = {picture.slug: picture for picture in (part.pictures if isinstance(part, Section) else ())}
    fronts = [slug for slug in drawn if slug == "front" or slug.startswith("front-")]
    return next((drawn[slug] for slug in (*sorted(fronts), "exact-front") if slug in drawn), None)


def _folder_of(record: Run) -> Path:
    """The folder of a run: beside what was exported with a copy of its record, else where the record is."""
    here = record.folder.resolve()
    beside = here.with_name(f"{here.name}.run")
    same = (beside / RESULT_FILE).is_file() and read_record(beside / RESULT_FILE)["options"] == record.options
    return beside if same else here
