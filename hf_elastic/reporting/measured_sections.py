"""What was predicted against what was measured: speed-ups, damages, and the tables that predictions come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_elastic.reporting.charts import Cells, Chart, Picture, Role, Series
from hf_elastic.reporting.content import LeftOut, Section
from hf_elastic.reporting.reading import Run

TITLE, TABLES = "Predicted against measured", "Tables of damages and latencies"
_ROLES: tuple[Role, ...] = ("front", "alternative", "midpoint", "exact", "even", "other")


def predictions(run: Run) -> Section | LeftOut:
    """Holds sums over layers against what was measured of whole models."""
    pictures: list[Picture] = []
    words: list[str] = []
    speedups = _speedups(run)
    if speedups:
        pictures.append(_diagonal("Speed-ups", "speed-up", speedups))
        words += [
            f"{name}: predicted {predicted:.2f}x, measured {measured:.2f}x ({predicted / measured - 1:+.1%})."
            for name, predicted, measured in speedups
        ]
    tables = run.stage("tables")
    if (correlation := tables.get("rank_correlation")) is not None:
        words.append(
            f"Damages: the sum over layers ranks {tables['architectures']} random architectures with a correlation of "
            f"{correlation:.2f} to their true damage" + _times(tables.get("ratio")) + "."
        )
    if tables.get("predicted") and tables.get("measured"):
        pairs = zip(tables["predicted"], tables["measured"], strict=True)
        points = [(f"architecture {number}", p, m) for number, (p, m) in enumerate(pairs)]
        pictures.append(_diagonal("Damage of random architectures", "damage", points))
    if run.kind == "elm":
        words += [line for line in run.stage("compare").get("lines", ()) if not line.startswith(("met", "MISSED"))]
    if not words and not pictures:
        return LeftOut(TITLE, f"needs {_missing(run)}")
    return Section("predicted", TITLE, words=words, pictures=pictures)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f", which is {ratio:.2f} times the sum"


def _missing(run: Run) -> str:
    if run.kind == "compress":
        return "a latency table (a speed-up or a latency as budget) or a finished quality table"
    if run.kind == "elm":
        return "a limit on time; this run has none, or is not that far"
    return "additive tables, which only compress and elm measure"


def _speedups(run: Run) -> list[tuple[str, float, float]]:
    found = {"exported": run.stage("check")}
    found |= {name: outcome for stage in run.families.values() for name, outcome in stage["outcomes"].items()}
    return [
        (name, outcome["predicted_speedup"], outcome["measured_speedup"])
        for name, outcome in found.items()
        if outcome.get("predicted_speedup") and outcome.get("measured_speedup")
    ]


def _diagonal(title: str, unit: str, points: Sequence[tuple[str, float, float]]) -> Chart:
    values = [value for _, *pair in points for value in pair]
    ends = [min(values), max(values)]
    margin = 0.05 * (ends[1] - ends[0] or ends[1])
    ends = [ends[0] - margin, ends[1] + margin]
    series = [
        Series("as predicted", ends, ends, role="limit", style="dashes"),
        Series(
            "models",
            [x for _, x, _ in points],
            [y for _, _, y in points],
            role="found",
            notes=[n for n, _, _ in points],
        ),
    ]
    description = f"On the dashed line a {unit} was measured as it was predicted."
    return Chart(f"{unit}s", title, f"{unit}, predicted", f"{unit}, measured", series, description)


def measured_tables(run: Run) -> Section | LeftOut:
    """Draws the quality table and the latency table of a run."""
    pictures: list[Picture] = []
    words: list[str] = []
    if run.damages is not None and any(run.damages["damages"]):
        pictures.append(_damage_cells(run.damages))
        words.append(
            "Damage of each option of each layer, cut alone and repaired, the rest of the parent whole. The "
            "predicted damage of an architecture is the sum over its layers."
        )
    if run.latencies is not None:
        pictures += _latency_charts(run.latencies)
        words.append(f"Latency table: {run.latencies['text']}.")
    if run.kind == "elm" and (text := run.stage("latency").get("table")):
        words.append(f"Latency table: {text}.")
    if not pictures and not words:
        return LeftOut(TABLES, "are not in this run's folder")
    return Section("tables", TABLES, words=words, pictures=pictures)


def _damage_cells(found: Mapping[str, Any]) -> Cells:
    damages: Sequence[Mapping[str, float]] = found["damages"]
    options = sorted({name for row in damages for name in row}, key=_order)
    values = [[row.get(option) for row in damages] for option in options]
    return Cells(
        "quality-table", f"What every cut costs: {found['measure']}", "layer", "option",
        list(range(len(damages))), [_option_words(option) for option in options], values, "damage",
        "Damage by layer and option; 0 where the layer is whole.",
    )  # fmt: skip


def _order(option: str) -> tuple[int, int]:
    kind, _, size = option.partition("/")
    return {"attention": 0, "mlp": 1}.get(kind, 2), -int(size or 0)


def _option_words(option: str) -> str:
    kind, _, size = option.partition("/")
    if not size:
        return "no layer"
    name = "FFN" if kind == "mlp" else "heads"
    return f"{name} {size}" if int(size) else ("no FFN" if kind == "mlp" else "no attention")


def _latency_charts(found: Mapping[str, Any]) -> list[Picture]:
    pictures: list[Picture] = []
    for kind, title, unit in (("attention", "attention", "heads (key/value)"), ("mlp", "FFN", "FFN neurons")):
        series = []
        for number, (seconds, layers) in enumerate(zip(found[kind], found["layers"], strict=True)):
            sizes = sorted(int(size) for size in seconds)
            name = f"{layers} layers" if len(found["layers"]) == 1 else f"kind {number}, {layers} layers"
            values = [1e6 * seconds[size] for size in sizes]
            series.append(Series(name, sizes, values, role=_ROLES[number % len(_ROLES)], style="joined"))
        description = f"Microseconds that one {title} sublayer takes by its size, as fitted to measured models."
        pictures.append(
            Chart(f"latency-{kind}", f"Latency of the {title} of one layer", unit, "µs", series, description)
        )
    return pictures
