"""Charts as SVG or PNG files, drawn by matplotlib, which needs no browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.reporting.charts import Cells, Chart, Picture, Role, Series, Symbol, symbols_of

_COLOURS: dict[Role, str] = {
    "parent": "#6e7781", "found": "#d9480f", "front": "#0b63ce", "midpoint": "#1a7f37", "even": "#8a6100",
    "evaluated": "#8c959f", "outside": "#8c959f", "alternative": "#8e24aa", "exact": "#00788a", "limit": "#c0271c",
    "other": "#57606a",
}  # fmt: skip
_MARKERS: dict[Symbol, str | tuple[int, int, int]] = {
    "square": "s", "star": "*", "hexagram": (6, 1, 0), "circle": "o", "diamond": "D", "triangle-up": "^",
    "circle-open": "o", "x": "X", "cross": "P", "triangle-down": "v", "hexagon": "h", "triangle-left": "<",
    "triangle-right": ">", "pentagon": "p",
}  # fmt: skip
_INCHES = (7.2, 4.6)
_MANY = 16  # labels of an axis that find room


def draw(picture: Picture, path: Path, *, format: str) -> Path:
    """Writes one picture; equal pictures give equal files.

    Raises:
        UnsupportedModelError: matplotlib is not installed, or the format is neither ``svg`` nor ``png``.
    """
    if format not in ("svg", "png"):
        raise UnsupportedModelError(f"format={format!r} is not one of svg, png")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedModelError(
            f'figures are drawn by matplotlib ({error}); pip install "hf-elastic[report]"'
        ) from None
    settings: Any = {"svg.hashsalt": picture.slug, "font.size": 10, "text.parse_math": False,
                     "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(picture.title, loc="left", fontsize=11)
        axes.set_xlabel(picture.x_title)
        axes.set_ylabel(picture.y_title)
        if isinstance(picture, Cells):
            _cells(figure, axes, picture)
        else:
            _chart(axes, picture)
        metadata = {"Title": picture.title, "Description": picture.description}
        figure.savefig(path, format=format, dpi=150, metadata=metadata | ({"Date": None} if format == "svg" else {}))
    return path


def _chart(axes: Any, chart: Chart) -> None:
    for series, symbol in zip(chart.series, symbols_of(chart), strict=True):
        _series(axes, series, symbol)
    axes.grid(True, color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.whole_x:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(chart.series) > 1:
        columns = 2 if len(chart.series) > 4 else len(chart.series)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns, frameon=False, fontsize=9)


def _series(axes: Any, series: Series, symbol: Symbol) -> None:
    colour = _COLOURS[series.role]
    x, y = list(series.x), [float("nan") if value is None else value for value in series.y]
    if series.style == "bars":
        axes.bar(x, y, color=colour, label=series.name, width=0.7)
    elif series.style == "outline":
        axes.bar(x, y, facecolor="none", edgecolor=colour, label=series.name, width=0.8)
    elif series.style in ("line", "dashes"):
        axes.plot(x, y, color=colour, linestyle="--" if series.style == "dashes" else "-", label=series.name)
    else:
        quiet = series.role in ("evaluated", "outside")
        axes.plot(
            x, y, color=colour, label=series.name, marker=_MARKERS[symbol],
            linestyle="-" if series.style == "joined" else "none", alpha=0.55 if quiet else 1.0,
            markersize=4 if quiet or series.style == "joined" else 11 if series.role == "found" else 7,
            fillstyle="none" if series.role == "outside" else "full",
        )  # fmt: skip


def _cells(figure: Any, axes: Any, cells: Cells) -> None:
    values = [[float("nan") if value is None else float(value) for value in row] for row in cells.values]
    low, high = cells.bounds or (None, None)
    shown = axes.imshow(values, aspect="auto", cmap="Blues", vmin=low, vmax=high)
    for labels, ticks in ((cells.columns, axes.set_xticks), (cells.rows, axes.set_yticks)):
        step = -(-len(labels) // _MANY)
        ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
    figure.colorbar(shown, ax=axes, label=cells.unit)
