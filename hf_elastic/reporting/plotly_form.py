"""Charts in the form that plotly.js draws: plain data, colours as names of roles that the page knows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from hf_elastic.reporting.charts import Cells, Chart, Picture, Series, Symbol, symbols_of

_SIZES = {"found": 15, "evaluated": 6, "outside": 6}
_MARKER, _JOINED = 11, 8


def figure_of(picture: Picture) -> dict[str, Any]:
    """Data and layout of a picture; all texts escaped, since plotly reads tags in them."""
    made = _of_cells(picture) if isinstance(picture, Cells) else _of_chart(picture)
    made["layout"] |= {"title": {"text": ""}, "hovermode": "closest"}
    return made


def _of_chart(chart: Chart) -> dict[str, Any]:
    x_axis: dict[str, Any] = {"title": {"text": _safe(chart.x_title)}}
    if chart.whole_x and max((len(series.x) for series in chart.series), default=0) <= 40:
        x_axis |= {"dtick": 1}
    y_axis = {"title": {"text": _safe(chart.y_title)}, "type": "log" if chart.log_y else "linear"}
    layout = {"xaxis": x_axis, "yaxis": y_axis, "barmode": "overlay", "showlegend": len(chart.series) > 1}
    pairs = zip(chart.series, symbols_of(chart), strict=True)
    return {"data": [_trace(series, symbol) for series, symbol in pairs], "layout": layout}


def _trace(series: Series, symbol: Symbol) -> dict[str, Any]:
    colour = f"role:{series.role}"
    trace: dict[str, Any] = {"name": _safe(series.name), "x": [*map(_safe, series.x)], "y": list(series.y)}
    if series.notes:
        trace |= {"text": [_wrapped(note) for note in series.notes], "hovertemplate": "%{text}<extra></extra>"}
        trace["textposition"] = "none" if series.style == "bars" else "top center"
    if series.style in ("bars", "outline"):
        fill = colour if series.style == "bars" else "rgba(0,0,0,0)"
        width = 1 if series.style == "outline" else 0
        return {**trace, "type": "bar", "marker": {"color": fill, "line": {"color": colour, "width": width}}}
    modes = {"points": "markers", "line": "lines", "dashes": "lines", "joined": "lines+markers"}
    size = _JOINED if series.style == "joined" else _SIZES.get(series.role, _MARKER)
    marker: dict[str, Any] = {"color": colour, "size": size, "symbol": symbol}
    if series.role in ("evaluated", "outside"):
        marker["opacity"] = 0.6
    line = {"color": colour, "width": 2, "dash": "dash" if series.style == "dashes" else "solid"}
    return {**trace, "type": "scatter", "mode": modes[series.style], "marker": marker, "line": line}


def _of_cells(cells: Cells) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "heatmap", "x": [str(_safe(label)) for label in cells.columns],
        "y": [str(_safe(label)) for label in cells.rows], "z": [list(row) for row in cells.values],
        "colorscale": "role:scale", "xgap": 1, "ygap": 1,
        "colorbar": {"title": {"text": _safe(cells.unit), "side": "right"}, "thickness": 12},
        "hovertemplate": f"{_safe(cells.x_title)} %{{x}}, {_safe(cells.y_title)} %{{y}}: %{{z}}<extra></extra>",
    }  # fmt: skip
    if cells.bounds is not None:
        trace |= {"zmin": cells.bounds[0], "zmax": cells.bounds[1]}
    axes: Mapping[str, Any] = {
        "xaxis": {"title": {"text": _safe(cells.x_title)}, "type": "category"},
        "yaxis": {"title": {"text": _safe(cells.y_title)}, "type": "category", "autorange": "reversed"},
    }
    return {"data": [trace], "layout": dict(axes)}


def _safe(text: Any) -> Any:
    return html.escape(text) if isinstance(text, str) else text


_LINE = 64  # letters of a line of hover text: what a phone shows


def _wrapped(note: str) -> str:
    """A note in lines short enough for a small screen."""
    lines: list[str] = [""]
    for word in note.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) > _LINE:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "<br>".join(map(html.escape, lines))


def numbers_of(picture: Picture) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
    """The numbers of a picture as a header and rows, for those who do not see it."""
    if isinstance(picture, Cells):
        rows = [[label, *row] for label, row in zip(picture.rows, picture.values, strict=True)]
        return [f"{picture.y_title} / {picture.x_title}", *map(str, picture.columns)], rows
    rows = [
        [series.name, x, y, *([series.notes[place]] if series.notes else [""])]
        for series in picture.series
        for place, (x, y) in enumerate(zip(series.x, series.y, strict=True))
    ]
    return ["series", picture.x_title, picture.y_title, "what"], rows
