"""The found architecture, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_elastic.reporting.charts import Cells, Chart, Picture, Series
from hf_elastic.reporting.content import LeftOut, Section, Table
from hf_elastic.reporting.pictures import (
    LayerPicture,
    ModelSizes,
    in_words,
    layers_of_architecture,
    layers_of_export,
    leftover_choices,
)
from hf_elastic.reporting.reading import Run

TITLE = "Found architecture"


def found_architecture(run: Run) -> Section | LeftOut:
    """Draws what every layer of the found architecture holds, beside its parent's."""
    if run.kind in ("recovery", "study"):
        return LeftOut(TITLE, f"belongs to a search; a {run.kind} keeps none")
    pictures = _pictures(run)
    if not pictures:
        return LeftOut(TITLE, "is not known yet" if not run.finished else "has no choices of single layers")
    charts = _charts(pictures, None if run.kind == "elm" else run.sizes)
    shared = leftover_choices(run.found or {})
    words = [f"{in_words(pictures)}."]
    if shared:
        words.append(
            "Choices of no single layer: " + ", ".join(f"{name} = {value}" for name, value in shared.items()) + "."
        )
    caption = "What each layer holds; - where there is nothing"
    return Section("architecture", TITLE, words=words, pictures=charts, tables=[_layer_table(pictures, caption)])


def _pictures(run: Run) -> tuple[LayerPicture, ...]:
    if run.kind == "elm":
        return _elm_pictures(run)
    if run.found is None:
        return ()
    found = layers_of_architecture(run.found, run.sizes)
    export = run.export or {}
    if not any(picture.width is not None for picture in found) and export.get("architecture") == run.found:
        exported = layers_of_export(export.get("layers", ()))
        return exported if exported else found
    return found


def _elm_pictures(run: Run) -> tuple[LayerPicture, ...]:
    """The layers of the last row of the table, which is what is exported; before it is made, the blocks alone."""
    if run.rows and "widths" in run.rows[-1]:
        last = run.rows[-1]
        columns = zip(last["blocks"], last["widths"], last["heads"], strict=True)
        return tuple(
            LayerPicture(index, width, heads, heads, block=block) for index, (block, width, heads) in enumerate(columns)
        )
    return layers_of_architecture(run.found) if run.found is not None else ()


def _charts(pictures: Sequence[LayerPicture], sizes: ModelSizes | None) -> list[Picture]:
    charts: list[Picture] = []
    if any(picture.width is not None for picture in pictures):
        charts.append(
            _bars(
                "layer-widths", ("FFN width by layer", "FFN neurons"), [p.width for p in pictures],
                whole=sizes.width if sizes else None, notes=[_note(p) for p in pictures],
            )
        )  # fmt: skip
        grouped = any(picture.groups != picture.heads for picture in pictures)
        charts.append(
            _bars(
                "layer-heads", ("Query heads by layer", "heads"), [p.heads for p in pictures],
                whole=sizes.heads if sizes else None, notes=[_note(p) for p in pictures],
                more=[p.groups or None for p in pictures] if grouped else None,
            )
        )  # fmt: skip
    ranks = {picture.index: picture.ranks for picture in pictures if picture.ranks}
    if ranks:
        charts.append(_matrix("layer-ranks", ("Ranks of adapters", "module", "rank"), ranks))
    capacities = {picture.index: picture.capacities for picture in pictures if picture.capacities}
    if capacities:
        charts.append(_matrix("layer-capacities", ("Capacities of routers", "routed", "capacity"), capacities))
    return charts


def _note(picture: LayerPicture) -> str:
    left_out = [name for name, size in (("FFN", picture.width), ("attention", picture.heads)) if size == 0]
    parts = [f"layer {picture.index}", *([f"block {picture.block}"] if picture.block else [])]
    return ", ".join([*parts, *(f"no {name}" for name in left_out)])


def _bars(
    slug: str,
    titles: tuple[str, str],
    values: Sequence[int | None],
    *,
    whole: int | None,
    notes: Sequence[str],
    more: Sequence[int | None] | None = None,
) -> Chart:
    title, unit = titles
    places = list(range(len(values)))
    series = [] if whole is None else [Series("parent", places, [whole] * len(values), role="parent", style="outline")]
    series.append(Series("found", places, values, role="found", style="bars", notes=notes))
    if more is not None:
        series.append(Series("key/value heads", places, more, role="front", notes=notes))
    gone = [str(place) for place, value in zip(places, values, strict=True) if value == 0]
    where = f" Left out in layers {', '.join(gone)}." if gone else ""
    return Chart(slug, title, "layer", unit, series, f"One bar a layer.{where}", whole_x=True)


def _matrix(slug: str, titles: tuple[str, str, str], values: Mapping[int, Mapping[str, int]]) -> Cells:
    """Values by layer and by the name of what they belong to."""
    title, side, unit = titles
    columns = sorted(values)
    rows = list(dict.fromkeys(name for held in values.values() for name in held))
    cells = [[values[index].get(name) for index in columns] for name in rows]
    known = [value for row in cells for value in row if value is not None]
    bounds = (0.0, float(max(known)))
    return Cells(slug, title, "layer", side, columns, rows, cells, unit, f"One cell a layer and {side}.", bounds)


def _layer_table(pictures: Sequence[LayerPicture], caption: str) -> Table:
    columns: list[tuple[str, list[Any]]] = [("layer", [picture.index for picture in pictures])]
    if any(picture.block for picture in pictures):
        columns.append(("block", [picture.block for picture in pictures]))
    if any(picture.width is not None for picture in pictures):
        columns += [("FFN", [p.width for p in pictures]), ("heads", [p.heads for p in pictures])]
        grouped = any(picture.groups != picture.heads for picture in pictures)
        columns += [("KV heads", [p.groups for p in pictures])] * grouped
    for module in dict.fromkeys(name for picture in pictures for name in picture.ranks):
        columns.append(
            ("rank" if module == "all" else f"rank {module}", [picture.ranks.get(module) for picture in pictures])
        )
    for kind in dict.fromkeys(name for picture in pictures for name in picture.capacities):
        columns.append((kind, [picture.capacities.get(kind) for picture in pictures]))
    rows = [
        [str(column[1][place]) if place_is(column[1][place]) else "-" for column in columns]
        for place in range(len(pictures))
    ]
    for place, row in enumerate(rows):
        row[0] = str(place)
    return Table(caption, [name for name, _ in columns], rows)


def place_is(value: Any) -> bool:
    """Whether there is something to show: a size of 0 is none."""
    return value not in (None, 0, "")
