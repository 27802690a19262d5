"""What a chart shows, whoever draws it: points, lines, bars and coloured cells, with the text behind each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "parent", "found", "front", "midpoint", "even", "evaluated", "outside", "alternative", "exact", "limit", "other"
]
"""What a series stands for; a role has one colour and one symbol in all charts."""
Number = float | int
Label = Number | str

Symbol = Literal[
    "square", "star", "hexagram", "circle", "diamond", "triangle-up", "circle-open", "x", "cross", "triangle-down",
    "hexagon", "triangle-left", "triangle-right", "pentagon",
]  # fmt: skip
_SYMBOLS: dict[Role, tuple[Symbol, ...]] = {
    "parent": ("square",), "found": ("star", "hexagram"), "front": ("circle",), "midpoint": ("diamond",),
    "even": ("triangle-up",), "evaluated": ("circle",), "outside": ("circle-open",),
    "alternative": ("x", "triangle-left", "triangle-right"), "exact": ("cross",), "limit": ("circle",),
    "other": ("triangle-down", "hexagon", "pentagon", "diamond"),
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Numbers that belong together.

    Attributes:
        name: for the legend.
        x, y: of equal length; ``None`` in ``y`` leaves a gap.
        role: decides colour and symbol.
        style: how it is drawn; ``outline`` are bars behind others.
        notes: one text for each point, or none.
    """

    name: str
    x: Sequence[Label]
    y: Sequence[Number | None]
    role: Role = "other"
    style: Literal["points", "line", "joined", "bars", "outline", "dashes"] = "points"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Series on two axes.

    Attributes:
        slug: name of its file and of its place in a page.
        title: what it shows.
        x_title, y_title: of the axes, with units.
        series: drawn in this order.
        description: what there is to see, for those who do not see it.
        log_y: whether the vertical axis is logarithmic.
        whole_x: whether ``x`` counts, so that there is nothing between two numbers.
    """

    slug: str
    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    description: str
    log_y: bool = False
    whole_x: bool = False


@dataclass(frozen=True)
class Cells:
    """A matrix as coloured cells.

    Attributes:
        slug, title, x_title, y_title, description: as of a :class:`Chart`.
        columns, rows: labels of both sides.
        values: row by row; ``None`` where there is nothing.
        unit: what a value is.
        bounds: lowest and highest value of the colours; those of the values else.
    """

    slug: str
    title: str
    x_title: str
    y_title: str
    columns: Sequence[Label]
    rows: Sequence[Label]
    values: Sequence[Sequence[Number | None]]
    unit: str
    description: str
    bounds: tuple[float, float] | None = None


Picture = Chart | Cells


def symbols_of(chart: Chart) -> list[Symbol]:
    """A symbol for each series, so that two of one role differ in more than their place; on lines it is a dot."""
    met: dict[Role, int] = {}
    found: list[Symbol] = []
    for series in chart.series:
        kinds = _SYMBOLS[series.role]
        found.append("circle" if series.style == "joined" else kinds[met.get(series.role, 0) % len(kinds)])
        met[series.role] = met.get(series.role, 0) + (series.style == "points")
    return found


def spans_magnitudes(values: Sequence[Number | None]) -> bool:
    """Whether numbers are so far apart that only a logarithmic axis shows them all."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) > 50 * min(known)
