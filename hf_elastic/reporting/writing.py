"""``write_report`` and ``write_figures``: a run as one page, or as pictures in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hf_elastic.errors import CheckpointError, ElasticError
from hf_elastic.reporting import front_sections, layer_sections, measured_sections, overview_sections, training_sections
from hf_elastic.reporting.charts import Picture
from hf_elastic.reporting.content import LeftOut, Section
from hf_elastic.reporting.reading import RESULT_FILE, Run, open_run

REPORT_FILE = "report.html"
FigureFormat = Literal["svg", "png"]

_SECTIONS: tuple[Callable[[Run], Section | LeftOut], ...] = (
    overview_sections.result,
    front_sections.trade_off,
    overview_sections.compared_models,
    overview_sections.family,
    layer_sections.found_architecture,
    measured_sections.predictions,
    measured_sections.measured_tables,
    training_sections.losses,
    training_sections.block_growth,
    training_sections.alike_heads,
    training_sections.router_use,
    overview_sections.times,
    overview_sections.how_it_loads,
    overview_sections.settings,
)


def sections_of(run: Run) -> tuple[list[Section], list[LeftOut]]:
    """All that can be said of a run, and what cannot, with the reason.

    Raises:
        CheckpointError: the record or a file beside it is not what hf_elastic writes.
    """
    made: list[Section] = []
    left_out: list[LeftOut] = []
    with _blaming(run):
        for build in _SECTIONS:
            part = build(run)
            if isinstance(part, Section):
                made.append(part)
            else:
                left_out.append(part)
    return made, left_out


@contextmanager
def _blaming(run: Run) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        if isinstance(error, ElasticError):
            raise
        raise CheckpointError(
            f"{run.folder} holds a record that hf_elastic did not write ({RESULT_FILE}, or a file beside it): {error!r}"
        ) from error


def write_report(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes one HTML file about a run, which needs neither network nor other files.

    Args:
        run_folder: ``OUTPUT.run`` of any command, also of a run that is not finished; or a folder that a run exported
            or :func:`hf_elastic.recover` worked in.
        output: the file; ``report.html`` in the folder else. One that is there is replaced.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: the folder holds no record of a run, a file in it is broken, or the page cannot be written.
    """
    run = open_run(run_folder)
    path = run.folder / REPORT_FILE if output is None else Path(output).expanduser()
    made, left_out = sections_of(run)
    from hf_elastic.reporting.html_page import page_of

    with _blaming(run):
        page = page_of(overview_sections.report_title(run), made, left_out).encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    return path


def write_figures(run_folder: str | Path, folder: str | Path, format: FigureFormat = "svg") -> tuple[Path, ...]:
    """Writes every chart of a report as a file of its own.

    Args:
        run_folder: as for :func:`write_report`.
        folder: where they go; it is made.
        format: ``svg`` or ``png``.

    Returns:
        The paths, in the order of the report.

    Raises:
        CheckpointError: the folder holds no record of a run, or the files cannot be written.
        UnsupportedModelError: matplotlib is not installed.
    """
    run = open_run(run_folder)
    made, _ = sections_of(run)
    from hf_elastic.reporting.static_figures import draw

    pictures: list[Picture] = [picture for section in made for picture in section.pictures]
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _blaming(run):
            return tuple(draw(picture, target / f"{picture.slug}.{format}", format=format) for picture in pictures)
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror or error}; choose another folder") from error
