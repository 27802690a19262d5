"""Sums over layers as tables that exact search reads."""

from __future__ import annotations

from collections.abc import Callable

from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.search import AdditiveTable
from hf_elastic.space import SearchSpace
from hf_elastic.supernet import Supernet


def layer_table(
    supernet: Supernet, contribution: Callable[[LayerPart, LayerShape], float], *, constant: float = 0.0
) -> AdditiveTable | None:
    """Makes the table of an objective that is a sum over layers.

    Args:
        supernet: its layers are the groups; the keys of a group are the canonical points of its choices. A layer
            without choices adds to the constant.
        contribution: what a layer in a shape adds.
        constant: what every architecture has.

    Returns:
        The table; ``None`` where a part of the supernet is no layer, so that choices would be missing.
    """
    if len(supernet.layer_parts) != len(supernet.parts):
        return None
    groups, tables = [], []
    for part in supernet.layer_parts:
        if not part.choices:
            constant += contribution(part, part.full)
            continue
        names = tuple(choice.name for choice in part.choices)
        groups.append(names)
        points = SearchSpace(part.choices).architectures()
        tables.append({tuple(point[n] for n in names): contribution(part, part.shape(point)) for point in points})
    return AdditiveTable(tuple(groups), tuple(tables), constant)
