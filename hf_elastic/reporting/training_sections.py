"""What happened in training: losses, growth of blocks, likeness of heads, decisions of routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_elastic.reporting.charts import Cells, Chart, Picture, Role, Series
from hf_elastic.reporting.content import LeftOut, Section, Table, number_text
from hf_elastic.reporting.pictures import ROUTED
from hf_elastic.reporting.reading import ROUTING_FILE, Run

LOSSES, GROWTH, HEADS, ROUTING = "Training", "Growth of blocks", "Likeness of heads (CKA)", "Routing"
_ROLES: tuple[Role, ...] = ("front", "found", "midpoint", "alternative", "exact")


def losses(run: Run) -> Section | LeftOut:
    """Draws the losses of every training that noted them."""
    noted = {name: stage["losses"] for name, stage in run.stages.items() if stage.get("losses")}
    steps = {name: stage["steps"] for name, stage in run.stages.items() if isinstance(stage.get("steps"), int)}
    steps |= {name: count for name, count in run.stage("plan").items() if name.endswith("_steps")}
    words = [f"{name.replace('_steps', '')}: {count} steps" for name, count in steps.items() if count]
    if not noted and not words:
        return LeftOut(LOSSES, "has not begun" if not run.finished else "was not part of this run")
    if not noted:
        return Section("training", LOSSES, words=[f"{'; '.join(words)}. The losses were not recorded."])
    charts: list[Picture] = []
    for number, (name, points) in enumerate(noted.items()):
        series = Series(
            name, [point["step"] for point in points], [point["loss"] for point in points],
            role=_ROLES[number % len(_ROLES)], style="joined",
        )  # fmt: skip
        description = f"From {points[0]['loss']:.4g} to {points[-1]['loss']:.4g}."
        charts.append(Chart(f"loss-{name}", f"Loss: {name}", "step", "loss", [series], description))
    return Section("training", LOSSES, words=[f"{'; '.join(words)}."] if words else [], pictures=charts)


def block_growth(run: Run) -> Section | LeftOut:
    """Draws how the blocks of a supernet grew."""
    kept = next((stage["growth"] for stage in run.stages.values() if "growth" in stage), None)
    if kept is None:
        return LeftOut(GROWTH, _no_growth(run))
    from hf_elastic.training.schedule import GrowthHistory

    history = GrowthHistory.from_dict(kept)
    epochs = [0, *(entry.epoch for entry in history.entries)]
    over_time = [history.widths(number) for number in range(len(epochs))]
    layers = sorted({layer for layer, _ in history.start})
    widest = float(max(over_time[-1].values(), default=1))
    pictures: list[Picture] = []
    for name in dict.fromkeys(block for _, block in history.start):
        values = [[held.get((layer, name)) for held in over_time] for layer in layers]
        pictures.append(
            Cells(
                f"growth-{name}", f"FFN width of {name}", "periods finished", "layer", epochs, layers, values,
                "FFN neurons", "Width by layer; period 0 is the start.", (0.0, widest),
            )
        )  # fmt: skip
    if history.entries:
        pictures.append(_mean_path(history))
    ends = [entry.parameters_after for entry in history.entries[-1:]]
    came = f" and came to {number_text(ends[0])}." if ends else "."
    aim = f"the mean path was to grow to {number_text(float(history.budget))} parameters"
    words = [f"{len(history.entries)} decisions; {aim}{came}"]
    return Section("growth", GROWTH, words=words, pictures=pictures)


def _no_growth(run: Run) -> str:
    if run.kind != "elm":
        return "belongs to ELM"
    return "was turned off" if run.stage("supernet").get("finished") else "is recorded when the supernet is trained"


def _mean_path(history: Any) -> Chart:
    epochs = [0, *(entry.epoch for entry in history.entries)]
    means = [history.entries[0].parameters_before, *(entry.parameters_after for entry in history.entries)]
    series = [
        Series("mean path", epochs, means, role="found", style="joined"),
        Series("budget", [epochs[0], epochs[-1]], [history.budget] * 2, role="limit", style="dashes"),
    ]
    description = f"From {number_text(means[0])} to {number_text(means[-1])} parameters."
    return Chart("growth-mean", "Parameters of the mean path", "periods finished", "parameters", series, description)


def alike_heads(run: Run) -> Section | LeftOut:
    """Says which heads were alike and what was done, with the similarity of heads where it is recorded."""
    stage = run.stage("fusion")
    if "layers" not in stage:
        why = "belongs to ELM" if run.kind != "elm" else "was not looked at" if stage.get("finished") else "comes later"
        return LeftOut(HEADS, why)
    pictures: list[Picture] = []
    for entry in stage["layers"]:
        if "cka" in entry:
            heads = list(range(len(entry["cka"])))
            pictures.append(
                Cells(
                    f"cka-{entry['layer']}-{entry['block']}", f"Layer {entry['layer']}, {entry['block']}", "head",
                    "head", heads, heads, entry["cka"], "CKA", "Similarity of each two heads; 1 is alike.", (0.0, 1.0),
                )
            )  # fmt: skip
    rows = [
        [str(e["layer"]), e["block"], str(e["before"]), str(e["after"]), "; ".join(_group(g) for g in e["groups"])]
        for e in stage["layers"]
    ]
    table = Table("Heads before and after", ["layer", "block", "before", "after", "alike"], rows)
    words = [stage["report"].replace("\n", " "), *([] if pictures else ["The matrices are in cka.html of the run."])]
    return Section("heads", HEADS, words=words, pictures=pictures, tables=[table])


def _group(group: Any) -> str:
    return " ".join(map(str, group))


def router_use(run: Run) -> Section | LeftOut:
    """Draws what routers chose on real inputs."""
    found = run.routing
    if found is None:
        return LeftOut(ROUTING, f"needs statistics of routers; write RoutingStatistics.to_dict() as {ROUTING_FILE}")
    routers = found["routers"]
    pictures: list[Picture] = []
    for kind in (kind for kind in ROUTED if any(one["kind"] == kind for one in routers)):
        mine = [one for one in routers if one["kind"] == kind]
        layers = [one["layer"] for one in mine]
        series = [
            Series("measured", layers, [one["share"] for one in mine], role="found", style="bars"),
            Series("capacity", layers, [one["capacity"] for one in mine], role="parent"),
            Series("depends on the input", layers, [one["dependence"] for one in mine], role="front"),
        ]
        title = kind.replace("_", " ")
        pictures.append(
            Chart(
                f"routing-{kind.replace('_', '-')}", f"Routing of {title}", "layer", "share", series,
                "Share that was let in, beside the capacity, and how much the decisions depend on the input.",
                whole_x=True,
            )
        )  # fmt: skip
        if len(mine[0]["units"]) > 1:
            pictures.append(_units(kind, mine))
    words = [
        f"{found['tokens']} tokens; MACs at {found['seq_len']} tokens {found['nominal_macs']:.1%} of the whole "
        f"nominally, {found['measured_macs']:.1%} by the measured shares."
    ]
    return Section("routing", ROUTING, words=words, pictures=pictures)


def _units(kind: str, routers: list[Mapping[str, Any]]) -> Cells:
    most = max(len(one["units"]) for one in routers)
    values = [[one["units"][unit] if unit < len(one["units"]) else None for one in routers] for unit in range(most)]
    return Cells(
        f"units-{kind}", f"Which {kind} serve tokens", "layer", kind, [one["layer"] for one in routers],
        list(range(most)), values, "share of tokens", f"Use of each of the {kind} by layer.", (0.0, 1.0),
    )  # fmt: skip
