"""The declaration of a space: which dimensions of a model become choices, and how sizes are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_elastic.errors import SpaceError

Loadability = Literal["any", "stock-padded", "stock"]
Sizes = Sequence[int | float]
PerLayer = Sequence[int | float] | Mapping[int, Sequence[int | float]]


@dataclass(frozen=True)
class ElasticConfig:
    """Declares which dimensions of a model become choices.

    A size is a fraction of the model's own (``float`` in (0, 1]) or absolute (``int``); a sequence holds for
    all layers, a dict ``{layer: sizes}`` for the layers it names. The model's own size is always a value as
    well, so that the largest architecture is the model itself.

    Attributes:
        intermediate_size: FFN widths.
        num_attention_heads: head counts (BERT, GPT-2).
        num_key_value_heads: key/value group counts (LLaMA shape); query heads follow their group.
        skip: what a layer may leave out: any of ``"attention"``, ``"mlp"``, ``"layer"``; or a dict by layer.
        num_hidden_layers: depths; the layers kept are a nested set in the order of :attr:`layer_order`. A layer
            that a depth leaves out has no ``"layer"`` among its skips: each function is one point of the space.
        layer_order: layers from the most to the least important. By default first, last, then ascending;
            ``sort_by_importance_`` replaces it by a measured one.
        multiple_of: FFN widths are rounded to multiples of it (hardware-friendly sizes).
        loadability: restricts the space to architectures that stock classes hold (``"stock"``: one width and
            one head count for all layers, whole layers dropped) or hold after padding (``"stock-padded"``).
    """

    intermediate_size: PerLayer | None = None
    num_attention_heads: PerLayer | None = None
    num_key_value_heads: PerLayer | None = None
    skip: Sequence[str] | Mapping[int, Sequence[str]] | None = None
    num_hidden_layers: Sizes | None = None
    layer_order: Sequence[int] | None = None
    multiple_of: int = 1
    loadability: Loadability = "any"

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _frozen(getattr(self, entry.name)))
        if self.loadability not in ("any", "stock-padded", "stock"):
            raise SpaceError(f"loadability={self.loadability!r} is not one of 'any', 'stock-padded', 'stock'")
        multiple = self.multiple_of
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise SpaceError(f"multiple_of={multiple!r} must be an integer of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict of the fields that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElasticConfig:
        """Inverse of :meth:`to_dict` (JSON turns layer numbers into strings; they are turned back).

        Raises:
            SpaceError: it is no mapping, a key is not a field, or a layer number is none.
        """
        if not isinstance(data, Mapping):
            raise SpaceError(f"an ElasticConfig is made from a dict of its fields, got {type(data).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SpaceError(f"unknown ElasticConfig fields {unknown}; known: {', '.join(sorted(known))}")
        values: dict[str, Any] = {name: _with_layer_numbers(name, value) for name, value in data.items()}
        return cls(**values)


def _frozen(value: Any) -> Any:
    """Copies lists into tuples, so that a config cannot change under a supernet made from it."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _with_layer_numbers(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    try:
        return {int(key): entry for key, entry in value.items()}
    except ValueError:
        raise SpaceError(f"{name} names the layers {list(value)}, expected numbers") from None


def resolve_sizes(sizes: Sizes, full: int, *, name: str, multiple_of: int) -> tuple[int, ...]:
    """Turns fractions and absolute sizes into ascending integers that end with the model's own size.

    Raises:
        SpaceError: a size is not a number, not positive, or larger than the model.
    """
    if isinstance(sizes, (str, Mapping)) or not isinstance(sizes, Iterable) or not (listed := list(sizes)):
        raise SpaceError(f"{name}={sizes!r} must be a non-empty list of fractions or sizes")
    wanted = {_resolve(size, full, name=name, multiple_of=multiple_of) for size in listed}
    return tuple(sorted(wanted | {full}))


def _resolve(size: int | float, full: int, *, name: str, multiple_of: int) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise SpaceError(f"{name}={size!r} is neither a fraction nor a size")
    if isinstance(size, float) and not 0 < size <= 1:
        raise SpaceError(f"{name}={size} is no fraction in (0, 1]; an absolute size is an integer from 1 to {full}")
    if isinstance(size, int) and not 1 <= size <= full:
        raise SpaceError(f"{name}={size} is not between 1 and the model's own {full}")
    wanted = size * full if isinstance(size, float) else size
    return min(full, max(multiple_of, round(wanted / multiple_of) * multiple_of))


def skip_kinds(skip: Any) -> set[str]:
    """Returns all kinds of skips that a declaration names, for any layer.

    Raises:
        SpaceError: it is no list of known kinds.
    """
    kinds: set[str] = set()
    for entry in skip.values() if isinstance(skip, Mapping) else (skip,):
        if entry is not None and not isinstance(entry, tuple):
            raise SpaceError(f"skip={entry!r} must be a list such as ['attention', 'mlp'] or ['layer']")
        kinds.update(map(str, entry or ()))
    if unknown := sorted(kinds - {"attention", "mlp", "layer"}):
        raise SpaceError(f"skip={unknown} is unknown; a layer may leave out 'attention', 'mlp' or 'layer'")
    return kinds
