"""What the layers of an architecture look like, read from its choices and the sizes of its parent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

MOST_LAYERS = 1024
"""That of ``models/elastic_layers.py``, which is not imported here: it loads torch, which reports do not need."""

# A size goes by other names in the configs of some families.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "width": ("intermediate_size", "n_inner", "hidden_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "groups": ("num_key_value_heads",),
    "hidden": ("hidden_size", "n_embd", "dim"),
}
_SKIPPED: Mapping[str, tuple[bool, bool]] = {
    "none": (True, True), "attention": (False, True), "mlp": (True, False), "layer": (False, False),
}  # fmt: skip
ROUTED = ("attention_tokens", "heads", "mlp_tokens", "experts")
_OF_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a whole parent.

    Attributes:
        layers: how many.
        width: FFN neurons.
        heads: query heads.
        groups: key/value heads, equal to the query heads without grouping.
        order: layers from the most to the least important, which a depth keeps in this order.
    """

    layers: int
    width: int
    heads: int
    groups: int
    order: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, order: Sequence[int] | None = None) -> ModelSizes | None:
        """Reads the ``config.json`` of a checkpoint; ``None`` where it does not state sizes of this kind."""
        found = {name: next((config[n] for n in names if config.get(n)), None) for name, names in _NAMES.items()}
        if found["width"] is None and "n_inner" in config and found["hidden"]:
            found["width"] = 4 * found["hidden"]
        layers, width, heads = (found[name] for name in ("layers", "width", "heads"))
        if not (isinstance(layers, int) and isinstance(width, int) and isinstance(heads, int)):
            return None
        return cls(_few_enough(layers), width, heads, found["groups"] or heads, tuple(order or range(layers)))


def _few_enough(layers: int) -> int:
    """A number of layers that can be drawn.

    Raises:
        ValueError: no model has so many.
    """
    if layers > MOST_LAYERS:
        raise ValueError(f"{layers} layers are more than any model has, {MOST_LAYERS}")
    return layers


@dataclass(frozen=True)
class LayerPicture:
    """One layer of an architecture.

    Attributes:
        index: its number.
        width: FFN neurons, 0 where the FFN is left out; ``None`` where nothing is known of it.
        heads: query heads, 0 where attention is left out.
        groups: key/value heads.
        block: kind of the block, in spaces of blocks.
        ranks: of adapters, by module.
        capacities: of routers, by what they route.
    """

    index: int
    width: int | None = None
    heads: int | None = None
    groups: int | None = None
    block: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict)
    capacities: Mapping[str, int] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether nothing of the layer is there."""
        return self.width == 0 and self.heads == 0


def layers_of_architecture(
    architecture: Mapping[str, Any], sizes: ModelSizes | None = None
) -> tuple[LayerPicture, ...]:
    """Reads the layers off the choices of an architecture.

    Args:
        architecture: choices by name.
        sizes: of the parent, for what is no choice; without them only choices of single layers are seen.

    Returns:
        One picture a layer; none where neither sizes nor layers are known.
    """
    own: dict[int, dict[str, Any]] = {}
    for name, value in architecture.items():
        if match := _OF_LAYER.fullmatch(name):
            own.setdefault(int(match[1]), {})[match[2]] = value
    count = sizes.layers if sizes else _few_enough(max(own, default=-1) + 1)
    return tuple(_layer(index, own.get(index, {}), architecture, sizes=sizes) for index in range(count))


def _layer(
    index: int, own: Mapping[str, Any], architecture: Mapping[str, Any], *, sizes: ModelSizes | None
) -> LayerPicture:
    shared = {name: value for name, value in architecture.items() if not _OF_LAYER.fullmatch(name)}
    routed = {name: own.get(name, shared.get(name)) for name in ROUTED}
    details: dict[str, Any] = {
        "block": str(own.get("block", "")),
        "ranks": {_module(name): value for name, value in own.items() if name == "r" or name.endswith(".r")},
        "capacities": {name: value for name, value in routed.items() if value is not None},
    }
    if sizes is None or details["block"]:
        return LayerPicture(index, **details)
    depth = shared.get("num_hidden_layers")
    present = depth is None or sizes.order.index(index) < int(depth)
    attention, mlp = _SKIPPED.get(str(own.get("skip", "none")), (True, True)) if present else (False, False)
    choices = {**shared, **own}
    width = int(choices.get("intermediate_size", sizes.width))
    groups = int(choices.get("num_key_value_heads", choices.get("num_attention_heads", sizes.groups)))
    heads = groups * (sizes.heads // sizes.groups)
    return LayerPicture(index, width * mlp, heads * attention, groups * attention, **details)


def _module(name: str) -> str:
    """The module whose rank a choice is; all of the layer where it names none."""
    return "all" if name == "r" else name.removesuffix(".r").rpartition(".")[2]


def layers_of_export(entries: Iterable[Mapping[str, Any]]) -> tuple[LayerPicture, ...]:
    """Reads the layers of an ``architecture.json``."""
    pictures = []
    for index, entry in enumerate(entries):
        heads = int(entry["num_attention_heads"]) * int(entry.get("attention", True))
        groups = int(entry.get("num_key_value_heads", entry["num_attention_heads"])) * int(bool(heads))
        width = int(entry["intermediate_size"]) * int(entry.get("mlp", True))
        pictures.append(LayerPicture(index, width, heads, groups, block=str(entry.get("block", ""))))
    return tuple(pictures)


def in_words(pictures: Sequence[LayerPicture]) -> str:
    """Says in a line what the layers are: ``5 of 6 layers, FFN 832×5, heads 12×5``."""
    if not pictures:
        return ""
    parts = []
    if any(picture.width is not None for picture in pictures):
        kept = [picture for picture in pictures if not picture.skipped]
        parts.append(f"{len(kept)} of {len(pictures)} layers")
        parts += [f"FFN {_runs(p.width for p in kept)}", f"heads {_runs(p.heads for p in kept)}"] if kept else []
        if any(picture.groups != picture.heads for picture in kept):
            parts.append(f"KV heads {_runs(p.groups for p in kept)}")
    if any(picture.block for picture in pictures):
        parts.append(f"blocks {_runs(p.block for p in pictures)}")
    for module in dict.fromkeys(name for picture in pictures for name in picture.ranks):
        parts.append(f"rank{'' if module == 'all' else f' {module}'} {_runs(p.ranks.get(module) for p in pictures)}")
    for kind in dict.fromkeys(name for picture in pictures for name in picture.capacities):
        parts.append(f"{kind} {_runs(p.capacities.get(kind) for p in pictures)}")
    return ", ".join(parts)


def _runs(values: Iterable[Any]) -> str:
    """Equal neighbours counted rather than repeated."""
    groups = [(value, len(list(same))) for value, same in groupby(values)]
    shown = ["-" if value in (0, None) else str(value) for value, _ in groups]
    return " ".join(text if count == 1 else f"{text}×{count}" for text, (_, count) in zip(shown, groups, strict=True))


def leftover_choices(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Choices of an architecture that belong to no layer."""
    return {name: value for name, value in architecture.items() if not _OF_LAYER.fullmatch(name)}
