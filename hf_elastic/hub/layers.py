"""Tables of what each layer of an artefact is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hf_elastic.hub.artefacts import Artefact
from hf_elastic.hub.markdown import code, table
from hf_elastic.models.elastic_layers import MOST_LAYERS

_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ROUTED: Mapping[str, str] = {
    "attention_tokens": "tokens in attention", "heads": "heads", "mlp_tokens": "tokens in the FFN",
    "experts": "experts",
}  # fmt: skip


def layer_table(artefact: Artefact) -> str | None:
    """What each layer is, layers that are alike in one row; ``None`` where nothing is recorded."""
    if artefact.kind == "routers":
        return _routers(artefact.routers["layers"])
    if artefact.kind == "adapter":
        return _ranks(artefact.adapter)
    layers = artefact.architecture.get("layers") or []
    if not layers:
        return _of_config(artefact.config)
    return _runs([_shape(layer) for layer in layers], _header(layers[0]))


def _header(layer: Mapping[str, Any]) -> list[str]:
    return ["block", "FFN", "heads"] if "block" in layer else ["attention", "FFN"]


def _shape(layer: Mapping[str, Any]) -> list[str]:
    if "block" in layer:
        return [code(layer["block"]), str(layer["intermediate_size"]), str(layer["num_attention_heads"])]
    heads, groups = layer["num_attention_heads"], layer["num_key_value_heads"]
    attention = f"{heads} heads" if heads == groups else f"{heads} heads, {groups} key/value heads"
    return [
        attention if layer.get("attention", True) else "left out",
        f"{layer['intermediate_size']} neurons" if layer.get("mlp", True) else "left out",
    ]


def _runs(shapes: Sequence[list[str]], header: list[str]) -> str:
    """Rows of equal neighbours."""
    numbered = groupby(enumerate(shapes), key=lambda entry: entry[1])
    rows = [[_span([str(number) for number, _ in group]), *shape] for shape, group in numbered]
    return table(["layer", *header], rows)


def _of_config(config: Mapping[str, Any]) -> str | None:
    """Layers of a stock config, which are all alike."""
    width = config.get("intermediate_size") or config.get("n_inner")
    heads = config.get("num_attention_heads") or config.get("n_head")
    count = config.get("num_hidden_layers") or config.get("n_layer")
    if not (isinstance(width, int) and isinstance(heads, int) and isinstance(count, int)):
        return None
    if count > MOST_LAYERS:
        raise ValueError(f"its config has {count} layers, more than any model has, {MOST_LAYERS}")
    groups = config.get("num_key_value_heads") or heads
    shape = {"intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": groups}
    return _runs([_shape(shape)] * count, ["attention", "FFN"])


def _ranks(config: Mapping[str, Any]) -> str | None:
    """Ranks of adapted modules; layers that are alike in one row."""
    targets = config.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else sorted(targets)
    pattern = {str(key).replace("\\", ""): rank for key, rank in (config.get("rank_pattern") or {}).items()}
    layers: dict[int, dict[Any, list[str]]] = {}
    rest: list[list[str]] = []
    for name in names:
        rank, found = pattern.get(name, config.get("r")), _IN_LAYER.search(name)
        if found is None:
            rest.append([code(name), str(rank)])
        else:
            layers.setdefault(int(found[1]), {}).setdefault(rank, []).append(name[found.end() :])
    told = [
        [str(number), "; ".join(f"{rank}: {', '.join(map(code, modules))}" for rank, modules in layers[number].items())]
        for number in sorted(layers)
    ]
    rows = [[_span(group), ranks] for ranks, group in _neighbours(told)]
    return table(["layer or module", "rank"], [*rows, *rest]) if rows or rest else None


def _neighbours(told: Sequence[list[str]]) -> list[tuple[str, list[str]]]:
    """Numbers of neighbours of which the same is told."""
    return [(ranks, [line[0] for line in group]) for ranks, group in groupby(told, key=lambda line: line[1])]


def _span(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _routers(layers: Mapping[str, Any]) -> str | None:
    """Capacities that each layer was saved with."""
    numbers = sorted(layers, key=int)
    kinds = [kind for kind in _ROUTED if any(kind in layers[n] for n in numbers)]

    def cell(layer: Mapping[str, Any], kind: str) -> str:
        if kind not in layer:
            return "-"
        active, of = layer[kind]["active"], layer[kind]["of"]
        return f"{active} %" if kind.endswith("tokens") else f"{active} of {of}"

    rows = [[number, *(cell(layers[number], kind) for kind in kinds)] for number in numbers]
    return table(["layer", *(_ROUTED[kind] for kind in kinds)], rows) if rows and kinds else None
