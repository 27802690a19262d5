"""The trade-off of a run: what was evaluated, the front, and the models that are to be compared with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_elastic.reporting.charts import Chart, Picture, Role, Series, spans_magnitudes
from hf_elastic.reporting.content import LeftOut, Section, number_text
from hf_elastic.reporting.pictures import in_words, layers_of_architecture
from hf_elastic.reporting.reading import Row, Run
from hf_elastic.search import Evaluation, SearchResult

TITLE = "Trade-off"
_COSTS = ("macs", "parameters", "total_parameters", "adapter_parameters", "latency", "macs_share")
_COST_TITLES = {
    "macs": "MACs at 128 tokens", "parameters": "parameters without embeddings", "total_parameters": "parameters",
    "adapter_parameters": "parameters of the adapters", "latency": "measured latency in ms",
    "macs_share": "share of the MACs",
}  # fmt: skip
_SCALES = {"ns": (1e6, "ms"), "s": (1e-3, "ms")}  # of a unit: what to divide by, and what it is then


@dataclass(frozen=True)
class _Axes:
    """What a search is drawn against.

    Attributes:
        cost, quality: names of the values on the horizontal and on the vertical axis.
        signs: of each of the two 1 where smaller is better, -1 where larger is.
        divisor: of the cost.
        cost_title: with its unit.
    """

    cost: str
    quality: str
    signs: tuple[int, int]
    divisor: float
    cost_title: str

    @classmethod
    def of(cls, result: SearchResult) -> _Axes | None:
        """The first objective against the second, or against the first limit; ``None`` where there is no second."""
        first = result.objectives[0]
        goals: list[Any] = [*result.objectives[1:], *result.limits]
        goal = next((goal for goal in goals if goal.name != first.name), None)
        if goal is None:
            return None
        divisor, unit = _SCALES.get(goal.unit, (1.0, goal.unit))
        title = _COST_TITLES.get(goal.name, goal.name.replace("_", " "))
        shown = f"{title} in {unit}" if unit and goal.name != "latency" else title
        signs = (1 if goal.direction == "minimize" else -1), first.sign
        return cls(goal.name, first.name, signs, divisor, shown)

    def point(self, found: Evaluation) -> tuple[float, float]:
        """Cost and quality of an evaluation."""
        return found.values[self.cost] / self.divisor, found.values[self.quality]

    def oriented(self, found: Evaluation) -> tuple[float, float]:
        """The same so that smaller is better."""
        cost, quality = self.point(found)
        return self.signs[0] * cost, self.signs[1] * quality

    def better(self) -> str:
        """Which way is better, as a sentence."""
        cost, quality = ("lower" if sign == 1 else "higher" for sign in self.signs)
        return f"Better is {quality} {self.quality}, and {cost} {self.cost_title}."


def trade_off(run: Run) -> Section | LeftOut:
    """Draws all searches of a run, the models of its table, and the exact front."""
    drawn = [_search_chart(run, name, result) for name, result in run.searches.items()]
    pictures: list[Picture] = [chart for chart in drawn if chart is not None]
    words = [_search_words(name, result) for name, result in run.searches.items()]
    covered = {axes.cost for result in run.searches.values() if (axes := _Axes.of(result))}
    pictures += _row_charts(run, covered=covered)
    exact = _exact_chart(run, run.exact) if run.exact is not None else None
    if exact is not None:
        pictures.append(exact)
        words.append(
            "The exact front holds every architecture that no other of the space beats in the predicted damage "
            "(a sum over layers) and the cost at once; it is solved, not sampled."
        )
    if not pictures:
        return LeftOut(TITLE, f"needs {_needs(run)}, which this run has not recorded")
    return Section("trade-off", TITLE, words=words, pictures=pictures)


def _needs(run: Run) -> str:
    if run.kind == "recovery":
        return "several models; a recovery trains one"
    return "a search or a comparison"


def _search_words(name: str, result: SearchResult) -> str:
    limits = " and ".join(str(limit) for limit in result.limits) or "without limits"
    failures = f", {len(result.failures)} of them failed" if result.failures else ""
    total = len(result.evaluations) + len(result.failures)
    return f"{name}: {total} architectures evaluated by {result.algorithm}{failures}; {limits}; seed {result.seed}."


def _search_chart(run: Run, name: str, result: SearchResult) -> Chart | None:
    axes = _Axes.of(result)
    if axes is None or not result.evaluations:
        return None
    sample = _Sample(run, result, axes)
    rows = _comparable_rows(run, axes) if name == "search.json" else []
    series = [*sample.series(), *rows]
    series += _limit_lines(result, axes, series)
    values = [value for one in series for value in one.y]
    slug = "front" if name == "search.json" else f"front-{name.removesuffix('.json')}"
    return Chart(
        slug, f"{axes.quality} against {axes.cost_title}", axes.cost_title, axes.quality, series,
        f"Each point is an architecture; the line is the Pareto front ({len(sample.front)} architectures). "
        f"{axes.better()}", log_y=spans_magnitudes(values),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """The evaluations of a search as series."""

    run: Run
    result: SearchResult
    axes: _Axes

    @property
    def front(self) -> list[Evaluation]:
        """The front by the two values that are drawn, the best in the horizontal one first."""
        best: list[Evaluation] = []
        for found in sorted(self.result.feasible, key=self.axes.oriented):
            if not best or self.axes.oriented(found)[1] < self.axes.oriented(best[-1])[1]:
                best.append(found)
        return best

    def series(self) -> list[Series]:
        """All points, the front, and the points that have a name."""
        front, inside, outside = self.front, self.result.feasible, []
        outside = [e for e in self.result.evaluations if not e.feasible]
        exact: Role = "exact" if self.result.algorithm == "exact" else "front"
        title = "exact front" if exact == "exact" else "front"
        named: list[tuple[str, Role, Evaluation | None]] = [
            ("midpoint", "midpoint", self.result.midpoint),
            ("even cut", "even", self.result.even),
            ("largest", "parent", self.result.largest),
            ("smallest", "other", self.result.smallest),
            ("chosen by the search", "found", self._chosen()),
        ]
        return [
            *self.points("evaluated", "evaluated", inside),
            *self.points("over a limit", "outside", outside),
            *self.points(title, exact, front, style="joined"),
            *(s for name, role, e in named if e is not None for s in self.points(name, role, [e])),
        ]

    def _chosen(self) -> Evaluation | None:
        chosen = self.run.stage("search").get("architecture")
        return next((e for e in self.result.evaluations if chosen and dict(e.architecture) == dict(chosen)), None)

    def points(self, name: str, role: Role, found: Sequence[Evaluation], *, style: Any = "points") -> Iterable[Series]:
        points = [self.axes.point(one) for one in found]
        notes = [self._note(one) for one in found]
        if points:
            yield Series(name, [x for x, _ in points], [y for _, y in points], role=role, style=style, notes=notes)

    def _note(self, found: Evaluation) -> str:
        words = in_words(layers_of_architecture(found.architecture, self.run.sizes)) or repr(found.architecture)
        values = ", ".join(f"{name} {number_text(value)}" for name, value in found.values.items())
        return f"evaluation {found.number}: {values}; {words}"


def _limit_lines(result: SearchResult, axes: _Axes, series: Sequence[Series]) -> list[Series]:
    """A line where the cost may not go beyond."""
    known = [value for one in series for value in one.y if value is not None]
    bounds = [limit.bound / axes.divisor for limit in result.limits if limit.name == axes.cost]
    return [Series("limit", [bound, bound], [min(known), max(known)], role="limit", style="dashes") for bound in bounds]


def role_of_row(run: Run, row: Row) -> Role:
    """What a row of the comparison stands for."""
    name = str(row["name"])
    if row is run.final_row:
        return "found"
    if row is run.rows[0] or name in ("parent", "largest", "base without adapters"):
        return "parent"
    if name.startswith(("uniform width", "dropped layers", "one layer more")):
        return "alternative"
    return "midpoint" if name == "midpoint" else "other"


def _comparable_rows(run: Run, axes: _Axes) -> list[Series]:
    """Models of the table that were measured on what the search was measured on."""
    if run.kind not in ("compress", "adapters"):
        return []
    rows = [row for row in run.rows if row.get(axes.quality) is not None and axes.cost in row]
    rows = [row for row in rows if row["name"] not in ("midpoint", "smallest")]  # the search has evaluated these
    return [
        Series(
            f"{row['name']} (table)", [row[axes.cost] / axes.divisor], [row[axes.quality]],
            role=role_of_row(run, row), notes=[row_note(run, row)],
        )
        for row in rows
    ]  # fmt: skip


def row_note(run: Run, row: Row) -> str:
    """What there is to know of a row: its numbers and its layers."""
    costs = [f"{name} {number_text(row[name])}" for name in _COSTS if row.get(name) is not None and name != "latency"]
    if row.get("latency") is not None:
        costs.append(f"latency {1e3 * row['latency']:.3g} ms")
    layers = in_words(layers_of_architecture(row.get("architecture", {}), run.sizes))
    values = [f"{name} {number_text(row[name])}" for name in run.quality if row.get(name) is not None]
    return f"{row.get('name', row.get('subnet'))}: {', '.join([*values, *costs])}" + (f"; {layers}" if layers else "")


def _row_charts(run: Run, *, covered: set[str]) -> list[Picture]:
    """The models of the table against their costs, where no search was drawn against the same."""
    if run.kind == "study":
        return [study for cost in ("adapter_parameters", "macs_share") if (study := _study_chart(run, cost))]
    ordered = sorted(run.quality, key="loss".__eq__)  # a perplexity says the same in words that more people know
    quality = next((name for name in ordered if sum(row.get(name) is not None for row in run.rows) > 1), None)
    if quality is None:
        return []
    limited = next(iter(run.options.get("within") or {}), None)
    wanted = [name for name in (limited, "total_parameters" if run.kind == "elm" else "macs") if name in _COSTS][:1]
    wanted = [name for name in wanted if name not in covered or run.kind == "elm"] + ["latency"]
    charts = [_models_chart(run, quality, cost) for cost in wanted]
    return [chart for chart in charts if chart is not None]


def _models_chart(run: Run, quality: str, cost: str) -> Chart | None:
    scale = 1e3 if cost == "latency" else 1.0
    rows = [row for row in run.rows if row.get(quality) is not None and row.get(cost) is not None]
    if len(rows) < 2:
        return None
    series = [
        Series(
            str(row["name"]), [scale * row[cost]], [row[quality]], role=role_of_row(run, row),
            notes=[row_note(run, row)],
        )
        for row in rows
    ]  # fmt: skip
    series += _tried_series(run, quality, cost)
    limit = (run.options.get("within") or {}).get(cost)
    if limit is not None:
        values = [value for one in series for value in one.y if value is not None]
        bound = limit * rows[0][cost] if limit <= 1 else limit
        series.append(Series("limit", [bound] * 2, [min(values), max(values)], role="limit", style="dashes"))
    title = _COST_TITLES[cost]
    return Chart(
        f"models-{cost.replace('_', '-')}", f"{quality} against {title}", title, quality, series,
        f"The {len(rows)} models of the comparison table.", log_y=spans_magnitudes([v for s in series for v in s.y]),
    )  # fmt: skip


def _tried_series(run: Run, quality: str, cost: str) -> list[Series]:
    """Answers of exact search that were repaired on a part of the text and measured, where their costs are recorded.

    Not the one that was chosen: repaired on all of the text, it has a row of its own.
    """
    repair = run.stage("repair")
    tried = [one for one in repair.get("tried", ()) if one.get("architecture") != repair.get("architecture")]
    known = [one for one in tried if one.get(quality) is not None and one.get(cost) is not None]
    if not known:
        return []
    words = [in_words(layers_of_architecture(one["architecture"], run.sizes)) for one in known]
    notes = [f"exact answer, repaired on a part of the text: {word}" for word in words]
    return [
        Series(
            "exact answers, repaired on a part of the text",
            [o[cost] for o in known],
            [o[quality] for o in known],
            "exact",
            notes=notes,
        )
    ]


def _study_chart(run: Run, cost: str) -> Chart | None:
    rows = [row for stage in run.stages.values() for row in stage.get("rows", ())]
    if len({row.get(cost) for row in rows}) < 2:
        return None
    methods = dict.fromkeys(row["method"] for row in rows)
    roles: tuple[Role, ...] = ("front", "exact", "alternative", "even", "other", "midpoint", "parent", "found")
    series = []
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        notes = [f"{method}, {row['subnet']}: accuracy {row['accuracy']:.4f}" for row in mine]
        series.append(
            Series(
                method, [row[cost] for row in mine], [row["accuracy"] for row in mine],
                role=roles[number % len(roles)], notes=notes,
            )
        )  # fmt: skip
    title = _COST_TITLES[cost]
    return Chart(
        f"models-{cost.replace('_', '-')}", f"accuracy against {title}", title, "accuracy", series,
        f"Subnets of {len(methods)} methods.",
    )  # fmt: skip


def _exact_chart(run: Run, exact: SearchResult) -> Chart | None:
    axes = _Axes.of(exact)
    if axes is None or not exact.feasible:
        return None
    sample = _Sample(run, exact, axes)
    series = [*sample.points("exact front", "exact", sample.front, style="joined")]
    by_point = {_key(found.architecture): found for found in exact.evaluations}
    answer = _key(run.stage("repair").get("architecture", {}))
    tried = {_key(one["architecture"]) for one in run.stage("repair").get("tried", ())} - {answer}
    marked: list[tuple[str, Role, set[Any]]] = [
        ("repaired and measured", "front", tried),
        ("chosen without training", "found", {answer}),
    ]
    for name, role, keys in marked:
        series += sample.points(name, role, [by_point[key] for key in keys if key in by_point])
    series += _limit_lines(exact, axes, series)
    return Chart(
        "exact-front", f"Exact front: {axes.quality} against {axes.cost_title}", axes.cost_title,
        f"{axes.quality}, predicted", series,
        f"The {len(sample.front)} architectures that none beats in both at once. {axes.better()}",
    )  # fmt: skip


def _key(architecture: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(architecture.items()))
