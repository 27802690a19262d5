"""Sections of docs/benchmarks.md about routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[[Any], str]


def routing(result: Mapping[str, Any], table: Table) -> list[str]:
    """Time and MACs of routed forwards."""
    options, rows = result["options"], result["rows"]
    prefill = [_line(row) for row in rows if "MACs left" in row]
    decode = [_line(row) for row in rows if "MACs left" not in row]
    return [
        "## Routing: what is left out, and the time that it saves",
        f"`benchmarks/routing.py`: {options['layers']} layers x {options['hidden']}, one row of {options['length']} "
        f"tokens, {options['threads']} threads; each kind of router at half of its capacity in all layers. `time` is "
        "that of the routed model over the parent's, `saved` the share of time saved over the share of MACs left out "
        "(bar for FFN tokens), with intervals.",
        table(prefill),
        "One decoding step on a cache of 128 tokens:",
        table(decode),
        "What routers add:",
        table(result["routers"]),
    ]


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are shown."""
    shown = ("family", "what", "half", "MACs left", "time", "saved", "bar", "met")
    if "MACs left" not in row:
        return {name: row[name] for name in shown[:3]} | {"time": row["time"]}
    return {name: row.get(name, "") for name in shown}


def routing_quality(result: Mapping[str, Any], table: Table) -> list[str]:
    """What is left of a model at each capacity, by kind of router and method."""
    settings, parent = result["settings"], result["parent"]
    first = next(iter(parent))
    measures = {
        "loss": ("the loss of held-out stories over the parent's", lambda value: value / parent["loss"] - 1, "{:+.1%}"),
        "agreement": ("how often the likeliest token is the parent's", lambda value: value, "{:.1%}"),
        "cosine": ("mean cosine to the parent's embeddings", lambda value: value, "{:.4f}"),
        "spearman": ("STS-B as a share of the parent's", lambda value: value / parent["spearman"], "{:.1%}"),
    }
    named = ", ".join(f"{name} {value:.4f}" for name, value in parent.items() if name not in ("agreement", "cosine"))
    lines = [
        f"## Routing on a real model: {result['model']}",
        "`benchmarks/routing_quality.py`, which runs `examples/routing.py`: one router for all capacities in every "
        f"layer, {settings['steps']} steps of {settings['batch_size']} rows where there is training, "
        f"{settings['experts']} experts, parent {named}. *fitted*: in closed form, without training (`fit_routers`); "
        "*learned*: from zero, as in the paper; *LoRA*: rank 1 on queries and values beside the routers, trained; "
        "*sublayers dropped*: the best model without as large a share of whole sublayers, or the nearest there is. "
        f"Mean +- standard deviation over {len(settings['seeds'])} seeds (of *norm* and *fitted* there is but one). "
        f"In each cell: {' / '.join(measures[name][0] for name in parent)}.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in result["table"]):
        rows = [row for row in result["table"] if row["kind"] == kind]
        lines += [f"{kind}, by capacity:", table(_pivoted(rows, {name: measures[name][1:] for name in parent}))]
    better = "loss" if first == "loss" else "STS-B"
    told = [
        row | {"capacity": f"{row['capacity']:.0%}", "lost": f"{row['lost']:.2%}", "met": "yes" if row["met"] else "NO"}
        for row in result["bars"]
    ]
    lines += [f"The paper's points; lost of the {better}:", table(told)]
    added = [
        row | {"of the model": f"{row['of the model']:.3%}", "seconds to fit": round(row["seconds to fit"])}
        for row in result["routers"]
    ]
    return [*lines, "What routers add (the paper: 0.00006 % to 0.3 % of the parameters):", table(added)]


def _pivoted(rows: list[Mapping[str, Any]], shown: Mapping[str, tuple[Callable[[float], float], str]]) -> list[Any]:
    """A row for each method, a column for each capacity."""
    capacities = sorted({row["capacity"] for row in rows if row["method"] == "fitted"})
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own, line = [row for row in rows if row["method"] == method], {"method": method}
        for capacity in capacities:
            near = min(own, key=lambda row: abs(row["capacity"] - capacity))
            cells = " / ".join(_cell(near, name, how, form) for name, (how, form) in shown.items())
            away = abs(near["capacity"] - capacity)
            at = f" at {near['capacity']:.0%}" if away > 0.01 else ""
            line[f"{capacity:.0%}"] = "" if away > 0.11 else cells + at
        found.append(line)
    return found


def _cell(row: Mapping[str, Any], name: str, how: Callable[[float], float], form: str) -> str:
    """A value, with its deviation where there are several."""
    mean, deviation = row[name], row[f"{name} +-"]
    spread = abs(how(mean + deviation) - how(mean))
    return form.format(how(mean)) + (f" +- {form.replace('+', '').format(spread)}" if row["seeds"] > 1 else "")
