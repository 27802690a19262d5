"""Sums over layers, their routers and adapters as tables that exact search reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from hf_elastic.blocks import BlockPart
from hf_elastic.parts import AdapterPart, LayerPart, LayerShape, join_choices
from hf_elastic.routers import RouterPart
from hf_elastic.search import AdditiveTable
from hf_elastic.space import Choice, SearchSpace, Value
from hf_elastic.supernet import Supernet

OfLayer = Callable[[LayerPart, LayerShape], float]
OfBlock = Callable[[BlockPart, str], float]
OfAdapter = Callable[[AdapterPart, Mapping[str, Value]], float]
OfRouter = Callable[[RouterPart, Mapping[str, Value]], float]


def layer_table(
    supernet: Supernet,
    contribution: OfLayer | None = None,
    *,
    block: OfBlock | None = None,
    adapter: OfAdapter | None = None,
    router: OfRouter | None = None,
    constant: float = 0.0,
) -> AdditiveTable | None:
    """Makes the table of an objective that is a sum over layers, their routers and adapters.

    Args:
        supernet: its layers, each with the routers and adapters inside, are the groups; adapters outside of elastic
            layers are grouped by the choice that they follow. The keys of a group are the canonical points of its
            choices; what has no choice adds to the constant. Candidate blocks are groups of their own.
        contribution: what a layer in a shape adds; ``None``: nothing.
        block: what a candidate block of a layer adds; ``None``: nothing.
        adapter: what an adapter adds in an architecture; ``None``: nothing.
        router: what the routers of a layer add in an architecture; ``None``: nothing.
        constant: what every architecture has.

    Returns:
        The table; ``None`` where a part of the supernet is neither, so that choices would be missing.
    """
    known = (supernet.layer_parts, supernet.block_parts, supernet.adapter_parts, supernet.router_parts)
    if sum(map(len, known)) != len(supernet.parts):
        return None
    groups: list[tuple[str, ...]] = [(part.name,) for part in supernet.block_parts]
    tables: list[dict[tuple[Value, ...], float]] = [
        {(name,): block(part, name) if block else 0 for name in part.blocks} for part in supernet.block_parts
    ]
    for layer, adapters in _grouped(supernet):
        routers = [part for part in supernet.router_parts if part.layer is layer]
        choices = join_choices([*([layer.choices] if layer else []), *(p.choices for p in (*routers, *adapters))])
        points: Iterable[Mapping[str, Value]] = SearchSpace(choices).architectures() if choices else ({},)
        names = tuple(choice.name for choice in choices)
        values: dict[tuple[Value, ...], float] = {}
        for point in points:
            own = contribution(layer, layer.shape(point)) if layer and contribution else 0
            around = sum(adapter(part, point) for part in adapters) if adapter else 0
            around += sum(router(part, point) for part in routers) if router else 0
            values[tuple(point[name] for name in names)] = own + around
        if names:
            groups.append(names)
            tables.append(values)
        else:
            constant += values[()]
    return AdditiveTable(tuple(groups), tuple(tables), constant)


def _grouped(supernet: Supernet) -> list[tuple[LayerPart | None, list[AdapterPart]]]:
    """Each layer with its adapters, then the other adapters by the choices that they follow."""
    grouped: list[tuple[LayerPart | None, list[AdapterPart]]] = [
        (layer, [part for part in supernet.adapter_parts if part.layer is layer]) for layer in supernet.layer_parts
    ]
    free: dict[tuple[Choice, ...], list[AdapterPart]] = {}
    for part in supernet.adapter_parts:
        if part.layer is None:
            free.setdefault(part.choices, []).append(part)
    return [*grouped, *((None, parts) for parts in free.values())]
