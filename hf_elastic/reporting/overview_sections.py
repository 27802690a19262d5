"""What a run is, what came out, and how: facts, tables, times, versions, options, and how its model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_elastic.reporting.charts import Chart, Series
from hf_elastic.reporting.content import (
    Fact,
    LeftOut,
    Section,
    Table,
    Verdict,
    number_text,
    seconds_text,
    share_text,
)
from hf_elastic.reporting.front_sections import row_note
from hf_elastic.reporting.reading import Row, Run, shown_name

RESULT, COMPARISON, FAMILY, TIMES = "Result", "Comparison", "Family of sizes", "Times of the stages"
LOADING, SETTINGS = "How it loads", "Versions, seed and options"
_WORDS = {
    "compress": "Compression of", "adapters": "Elastic adapters on", "elm": "ELM: a small model out of",
    "recovery": "Recovery of a cut model", "study": "Study of adapters on",
}  # fmt: skip
_HEADERS: Mapping[str, str] = {
    "subnet": "subnet", "adapter_parameters": "adapter parameters", "parameters": "parameters",
    "total_parameters": "with embeddings", "macs": "MACs at 128", "macs_share": "MACs", "latency": "latency",
}  # fmt: skip
_LAST = ("loadability",)
_HIDDEN = {"architecture", "blocks", "widths", "heads", "method", "name", "seed", "over_limit", "space"}


def report_title(run: Run) -> str:
    """What the run is, in a line."""
    model = shown_name(run.parent)
    return " ".join(filter(None, [_WORDS[run.kind], model]))


def result(run: Run) -> Section:
    """Says first what a reader wants to know: what was asked for, whether it is met, and the numbers."""
    words = [_asked(run)]
    if not run.finished:
        done = [name for name, stage in run.stages.items() if stage.get("finished")]
        words.append(f"This run is not finished; done so far: {', '.join(done) or 'nothing'}.")
    return Section("result", RESULT, words=words, verdicts=_verdicts(run), facts=_facts(run))


def _asked(run: Run) -> str:
    options = run.options
    if run.kind == "recovery":
        settings, stage = options.get("settings", {}), run.stage("recover")
        return f"{settings.get('target', 'outputs')} distilled for {stage.get('steps', '?')} steps."
    if run.kind == "study":
        return f"{options.get('steps')} steps each on {shown_name(str(options.get('train')))}."
    budgets = {name: options.get(name) for name in ("speedup", "latency", "memory")} | (options.get("within") or {})
    asked = ", ".join(f"{name} {value}" for name, value in budgets.items() if value is not None)
    if run.kind == "elm":
        return f"Size {options.get('size')}" + (f" within {asked}." if asked else ".")
    way = f"adapters of ranks {options['lora']}" if run.kind == "adapters" else f"recipe {options.get('recipe')}"
    return f"Asked for: {asked}; {way}."


def _verdicts(run: Run) -> list[Verdict]:
    found = [Verdict(bool(one["met"]), one["sentence"]) for one in run.stage("check").get("budgets", ())]
    for line in run.stage("compare").get("lines", ()) if run.kind == "elm" else ():
        word, _, sentence = line.partition(": ")
        if word in ("met", "MISSED"):
            found.append(Verdict(word == "met", sentence))
    return found


def _facts(run: Run) -> list[Fact]:
    rows, found = run.rows, run.final_row
    if found is None:
        return [Fact("stages done", str(sum(bool(s.get("finished")) for s in run.stages.values())))]
    whole = rows[0]
    facts = []
    for name, title in (
        ("parameters", "parameters"), ("total_parameters", "with embeddings"), ("macs", "MACs"),
        ("adapter_parameters", "adapter parameters"),
    ):  # fmt: skip
        if found.get(name) is not None:
            known = whole.get(name)
            facts.append(Fact(title, number_text(found[name]), f"{found[name] / known:.0%} of its" if known else ""))
    if found.get("latency") and whole.get("latency"):
        note = f"speed-up {whole['latency'] / found['latency']:.2f}x"
        facts.append(Fact("latency", seconds_text(found["latency"]), note))
    for name in run.quality:
        if found.get(name) is not None:
            facts.append(Fact(name, number_text(found[name]), f"parent {number_text(whole.get(name))}"))
    return [_with_parent(fact) for fact in facts]


def _with_parent(fact: Fact) -> Fact:
    return Fact(fact.name, fact.value, fact.note.replace("% of its", "% of the parent's"))


def compared_models(run: Run) -> Section | LeftOut:
    """Shows the comparison table of a run, or the rows of a study."""
    if run.kind == "study":
        rows = [row for stage in run.stages.values() for row in stage.get("rows", ())]
        named = [{**row, "name": row["method"]} for row in rows]
        tables = [rows_table("Methods and subnets", named)] if rows else []
    else:
        tables = (
            [rows_table("Models of this run", run.rows, reference=_reference(run), marked=run.final_row)]
            if run.rows
            else []
        )
    if not tables:
        why = "compares nothing" if run.kind == "recovery" else "comes at the end, which this run has not reached"
        return LeftOut(COMPARISON, why)
    return Section("comparison", COMPARISON, words=_legend(run), tables=tables)


def _reference(run: Run) -> Row:
    """The row whose costs the others are shares of."""
    if run.kind == "adapters":
        return next((row for row in run.rows if row.get("name") == "largest"), run.rows[0])
    return run.rows[0]


def _legend(run: Run) -> list[str]:
    from hf_elastic.report import legend

    setting = run.stage("compare").get("setting")
    if setting is None:
        return []
    return [f"{line}." for line in legend(run.quality, setting).split("\n")]


def rows_table(caption: str, rows: Sequence[Row], *, reference: Row | None = None, marked: Row | None = None) -> Table:
    """Rows with costs as numbers and shares, qualities, and how each loads."""
    there = dict.fromkeys(name for row in rows for name in row if name not in _HIDDEN)
    costs = [name for name in _HEADERS if name in there]
    others = [name for name in there if name not in costs and name not in _LAST]
    loads = [name for name in _LAST if name in there]
    fast = reference is not None and reference.get("latency") is not None
    header = ["", *(_HEADERS[name] for name in costs), *["speed-up"] * fast, *others, *["loads as"] * len(loads)]
    cells = []
    for row in rows:
        line = [f"{row['name']} (over the limit)" if row.get("over_limit") else str(row["name"])]
        line += [_cost(row, name, reference) for name in costs]
        line += [_speedup(row, reference)] * fast
        line += [_quality(row.get(name), name) for name in others]
        cells.append([*line, *(str(row.get(name, "-")) for name in loads)])
    matters = frozenset(number for number, row in enumerate(rows) if row is marked)
    return Table(caption, [name.replace("_", " ") for name in header], cells, marked=matters)


def _quality(value: Any, name: str) -> str:
    if name.endswith("seconds"):
        return seconds_text(value)
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 1e4 else number_text(value)


def _cost(row: Row, name: str, reference: Row | None) -> str:
    value = row.get(name)
    if name == "latency":
        return seconds_text(value)
    if name == "macs_share":
        return "-" if value is None else f"{value:.0%}"
    return share_text(value, reference.get(name)) if reference is not None else number_text(value)


def _speedup(row: Row, reference: Row | None) -> str:
    if reference is None or row.get("latency") is None:
        return "-"
    return f"{reference['latency'] / row['latency']:.2f}x"


def family(run: Run) -> Section | LeftOut:
    """Shows the nested sizes that were exported from the run."""
    if not run.families:
        why = "is made by hf-elastic family" if run.kind == "compress" else "is of runs of compress only"
        return LeftOut(FAMILY, why)
    tables, charts, verdicts = [], [], []
    for number, (name, stage) in enumerate(run.families.items(), 1):
        rows = stage["rows"]
        tables.append(rows_table(f"{name}; latency: {stage['setting']}", rows, reference=rows[0]))
        quality = next((q for q in rows[0] if q in run.quality), None)
        if quality is not None:
            charts.append(_family_chart(run, rows, (quality, number, name)))
        for size, outcome in stage["outcomes"].items():
            verdicts += [Verdict(bool(one["met"]), f"{size}: {one['sentence']}") for one in outcome["budgets"]]
    return Section("family", FAMILY, verdicts=verdicts, pictures=charts, tables=tables)


def _family_chart(run: Run, rows: Sequence[Row], naming: tuple[str, int, str]) -> Chart:
    quality, number, name = naming
    known = [row for row in rows if row.get(quality) is not None]
    points = [1e3 * row["latency"] for row in known]
    notes = [row_note(run, row) for row in known]
    series = [Series("sizes", points, [row[quality] for row in known], role="front", style="joined", notes=notes)]
    description = f"The parent and the sizes of {name}."
    return Chart(f"family-{number}", f"{quality} of the sizes", "measured latency in ms", quality, series, description)


def times(run: Run) -> Section | LeftOut:
    """Shows how long each stage took."""
    known = {name: stage["seconds"] for name, stage in run.stages.items() if "seconds" in stage}
    if not known:
        return LeftOut(TIMES, "are known when a stage ends")
    total = sum(known.values())
    rows = [
        [name, seconds_text(seconds), "yes" if run.stage(name).get("finished") else "no"]
        for name, seconds in known.items()
    ]
    table = Table(
        f"Together {seconds_text(total)}", ["stage", "time", "finished"], rows,
        shares=[seconds / total if total else 0.0 for seconds in known.values()],
    )  # fmt: skip
    return Section("times", TIMES, tables=[table])


def how_it_loads(run: Run) -> Section | LeftOut:
    """Shows how the exported model loads, and what was written."""
    export = run.stage("export")
    if "snippet" not in export:
        return LeftOut(LOADING, "is known after the export" if run.kind in ("compress", "adapters", "elm") else _none())
    words = [f"{export['loadability']}: {export.get('note') or 'an ordinary checkpoint'}."]
    if export.get("files"):
        words.append(f"Copied from the parent: {', '.join(export['files'])}.")
    if (difference := export.get("max_difference")) is not None:
        words.append(f"Its outputs differ from those of the subnet in the supernet by at most {difference:.2g}.")
    if export.get("bits"):
        words.append(f"Linear layers are stored as {export['bits']}-bit integers.")
    if export.get("sparsity", 0) >= 0.005:
        words.append(f"{export['sparsity']:.1%} of the weights of the linear layers are zero.")
    return Section("loading", LOADING, words=words, code=export["snippet"])


def _none() -> str:
    return "does not apply: nothing is exported"


def settings(run: Run) -> Section:
    """Shows versions, machine, seed and all options."""
    options = dict(run.options)
    if isinstance(options.get("settings"), Mapping):
        options |= options.pop("settings")
    rows = [[name, _option(value)] for name, value in options.items()]
    versions = [[name, str(value)] for name, value in run.record.get("versions", {}).items()]
    machine = [[name, str(value)] for name, value in run.record.get("machine", {}).items()]
    tables = [
        Table("Versions and machine", ["what", "value"], [*versions, *machine]),
        Table("Options", ["option", "value"], rows),
    ]
    return Section("settings", SETTINGS, words=[f"Seed: {options.get('seed', '-')}."], tables=tables)


def _option(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 400 else f"{text[:397]}..."
