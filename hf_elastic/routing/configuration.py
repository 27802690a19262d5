"""What of a model is routed, and at which capacities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hf_elastic.errors import SpaceError
from hf_elastic.models import elastic_routing
from hf_elastic.models.elastic_routers import KINDS
from hf_elastic.routers import Share

Capacities = Sequence[int | float]
RouterKind = Literal["linear", "mlp"]


@dataclass(frozen=True)
class RoutingConfig:
    """Declare what of a model is routed (ElastiFormer, arXiv 2411.15281), and at which capacities.

    A capacity is a fraction in (0, 1], of tokens a whole number of per cent; of heads and experts also a count
    (``int``). Full capacity is always a value as well: there the router is bypassed, so that the largest architecture
    is the model itself.

    The paper says neither which layers it routes nor how the capacities are chosen; here all layers are by default, and
    every capacity is a choice of the supernet, so that one router serves all.

    Attributes:
        mlp_tokens: shares of the tokens that enter the FFN.
        attention_tokens: shares of the tokens that enter attention; the others have no queries, no keys and no values.
        heads: heads that serve each token, of LLaMA-shaped models groups of heads with common keys and values.
        experts: experts that serve each token: the FFN cut into ``num_experts`` runs of neurons of equal length.
        num_experts: by default the largest count in ``experts``.
        layers: numbers of the layers that are routed; by default every ``every``-th, from the first on.
        every: see ``layers``, without which alone it may be given.
        router: ``"linear"``, or ``"mlp"`` with a hidden layer of ``router_hidden_size``.
        router_hidden_size: width of that layer.
        share: whether each layer has choices of its own (``"layer"``), or all follow one (``"model"``).

    Raises:
        SpaceError: a field has a value that is not allowed, or nothing is routed.
    """

    mlp_tokens: Capacities | None = None
    attention_tokens: Capacities | None = None
    heads: Capacities | None = None
    experts: Capacities | None = None
    num_experts: int | None = None
    layers: Sequence[int] | None = None
    every: int = 1
    router: RouterKind = "linear"
    router_hidden_size: int = 32
    share: Share = "layer"

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, entry.name, tuple(value))
        if self.router not in get_args(RouterKind):
            raise SpaceError(f"router={self.router!r} is unknown; allowed: {', '.join(get_args(RouterKind))}")
        if self.share not in get_args(Share):
            raise SpaceError(f"share={self.share!r} is unknown; allowed: {', '.join(get_args(Share))}")
        for name in ("every", "router_hidden_size"):
            _check_count(name, getattr(self, name))
        if self.layers is not None and not isinstance(self.layers, tuple):
            raise SpaceError(f"layers={self.layers!r} must be a list of numbers of layers")
        if self.layers is not None and self.every != 1:
            raise SpaceError(f"layers={list(self.layers)} and every={self.every} both say which layers are routed")
        if not self.kinds:
            raise SpaceError(f"RoutingConfig routes nothing; give at least one of {', '.join(KINDS)}")
        for kind in self.kinds:
            _check_capacities(kind, getattr(self, kind))
        if self.num_experts is not None:
            _check_count("num_experts", self.num_experts)
            if self.experts is None:
                raise SpaceError(f"num_experts={self.num_experts} without experts; say how many serve a token")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is routed, in the order in which a layer runs it."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    def routed_layers(self, count: int) -> tuple[int, ...]:
        """Numbers of the layers that are routed, of so many.

        Raises:
            SpaceError: ``layers`` names one that is not there.
        """
        if self.layers is None:
            return tuple(range(0, count, self.every))
        if not self.layers or any(type(number) is not int or not 0 <= number < count for number in self.layers):
            raise SpaceError(f"layers={list(self.layers)} must name layers of 0 to {count - 1}")
        return tuple(sorted(set(self.layers)))

    def experts_of(self, width: int) -> int:
        """Experts of an FFN of so many neurons.

        Raises:
            SpaceError: they do not divide it, or are not said.
        """
        counts = [value for value in self.experts or () if isinstance(value, int)]
        number = self.num_experts or max(counts, default=0)
        if not number:
            raise SpaceError(f"experts={list(self.experts or ())} are shares of how many? give num_experts=")
        if width % number:
            near = [count for count in range(2, width + 1) if width % count == 0]
            raise SpaceError(
                f"{number} experts do not divide the {width} neurons of an FFN; the nearest that do: "
                f"{', '.join(map(str, sorted(sorted(near, key=lambda count: abs(count - number))[:4])))}"
            )
        return number

    def values_of(self, kind: str, whole: int) -> tuple[int, ...]:
        """Capacities of a kind, ascending: per cent of tokens, counts of the ``whole`` number of heads or experts.

        Raises:
            SpaceError: one is larger than what there is, or none is smaller.
        """
        wanted = {resolve_capacity(kind, value, whole=whole) for value in getattr(self, kind)} | {whole}
        if len(wanted) < 2:
            raise SpaceError(f"{kind}={list(getattr(self, kind))} leaves nothing to choose; give one below {whole}")
        return tuple(sorted(wanted))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict of the fields; :meth:`from_dict` reads it."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoutingConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpaceError: it is no mapping, or a key is not a field.
        """
        if not isinstance(data, Mapping):
            raise SpaceError(f"a RoutingConfig is made from a dict of its fields, got {type(data).__name__}")
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SpaceError(f"unknown RoutingConfig fields {unknown}; known: {', '.join(sorted(known))}")
        return cls(**data)


def resolve_capacity(kind: str, value: int | float, *, whole: int) -> int:
    """Turns a capacity into what architectures say: per cent of tokens, a count of heads or experts.

    Args:
        kind: what is routed.
        value: a fraction, or a count.
        whole: 100 for tokens, else how many there are.

    Raises:
        SpaceError: it is larger than what there is, or no whole number of per cent.
    """
    try:
        return elastic_routing.resolve_capacity(kind, value, whole=whole)
    except ValueError as error:  # what travels with checkpoints knows no errors of ours
        raise SpaceError(str(error)) from None


def _check_capacities(kind: str, values: Any) -> None:
    if not isinstance(values, tuple) or not values:
        raise SpaceError(f"{kind}={values!r} must be a list of capacities, such as [0.6, 0.8, 1.0]")
    for value in values:
        try:
            elastic_routing.check_capacity(kind, value)
        except ValueError as error:
            raise SpaceError(str(error)) from None


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpaceError(f"{name}={value!r} must be an integer of at least 1")
