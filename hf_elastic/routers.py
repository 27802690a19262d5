"""Routers as elastic parts: the capacities of a layer are choices beside its sizes (ElastiFormer, arXiv 2411.15281).

The routers themselves, and the sublayers that follow them, are in ``hf_elastic.models``; here the routers of one layer
are a part of the supernet. Capacities of tokens are whole per cent, those of heads and experts counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.layers import Region, SkippableModule
from hf_elastic.models.elastic_routed import LAYOUTS
from hf_elastic.models.elastic_routers import PERCENT, SUBLAYERS, TOKENS, LayerRouters, Observation, routers_of
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.space import Choice, Value

ROUTERS = "routers"
"""Name of the routers among the children of a layer."""
_HELD = {"attention": ("heads", "num_attention_heads"), "mlp": ("experts", "intermediate_size")}
"""Units of a sublayer, and the size of which they are parts."""
Share = Literal["layer", "model"]


def require_unrouted(model: nn.Module, what: str) -> None:
    """Refuses a model with routers for what knows nothing of them.

    Raises:
        UnsupportedModelError: it has some.
    """
    if routers_of(model):
        raise UnsupportedModelError(f"{what} is for models without routers; do it before add_routing")


def router_tensors(parts: Iterable[RouterPart]) -> dict[str, Tensor]:
    """Weights and thresholds of routers themselves, by number of the layer and name within its routers."""
    return {
        f"{part.layer.index}.{name}": tensor for part in parts for name, tensor in part.routers.state_dict().items()
    }


@dataclass(eq=False)
class RouterPart:
    """The routers of one layer, each of whose capacities is a choice.

    Attributes:
        layer: the layer that they are in.
        routers: the module.
        share: whether each layer has choices of its own, or all follow one.
    """

    layer: LayerPart
    routers: LayerRouters
    share: Share = "layer"

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden layer that each router has; ``None``: there is none."""
        hidden = self.routers[next(iter(self.routers))].hidden
        return None if hidden is None else hidden.out_features

    @property
    def uncalibrated(self) -> bool:
        """Whether a router decides token by token, but has no threshold for a capacity below full."""
        found = [self.routers[kind] for kind in self.routers if self.routers[kind].thresholds is not None]
        return any(bool(router.thresholds[:-1].isnan().any()) for router in found)

    def choice_name(self, kind: str) -> str:
        """Name of the choice that a kind follows."""
        return f"layers.{self.layer.index}.{kind}" if self.share == "layer" else kind

    @property
    def choices(self) -> tuple[Choice, ...]:
        """A choice of capacity for each kind, after those on which the presence of its sublayer depends."""
        found: dict[str, Choice] = {}
        for kind in self.routers:
            when = self.layer.presence([SUBLAYERS[kind]]) if self.share == "layer" else ()
            needed = {condition.choice for condition in when}
            if needed:  # what these depend on themselves stands before them
                found |= {c.name: c for c in self.layer.choices if c.name in needed or c.name == self.layer.names.depth}
            name = self.choice_name(kind)
            found[name] = Choice(name, self.routers[kind].values, when=when)
        return tuple(found.values())

    def capacity(self, kind: str, architecture: Mapping[str, Value]) -> int:
        """Capacity of a kind in an architecture, out of all; full where its sublayer is skipped."""
        shape = self.layer.shape(architecture)
        there = shape.attention if SUBLAYERS[kind] == "attention" else shape.mlp
        return int(architecture[self.choice_name(kind)]) if there else self.routers[kind].of

    def available(self, kind: str, shape: LayerShape) -> int:
        """Groups of heads, or experts, of a layer in a shape: as many as its neurons fill."""
        if kind == "heads":
            return shape.num_key_value_heads
        return shape.intermediate_size * self.routers[kind].of // self.layer.full.intermediate_size

    def set(self, architecture: Mapping[str, Value]) -> None:
        """Makes the layer route what the architecture says; layers are set before what they hold."""
        shape = self.layer.shape(architecture)
        for kind in self.routers:
            self.routers.active[kind] = self.capacity(kind, architecture)
        for kind in self.routers.available:
            self.routers.available[kind] = self.available(kind, shape)

    def served(self, kind: str, architecture: Mapping[str, Value]) -> int:
        """Units of a kind that serve each token in an architecture, per cent of the tokens that enter; 0: skipped."""
        shape, capacity = self.layer.shape(architecture), self.capacity(kind, architecture)
        if not (shape.attention if SUBLAYERS[kind] == "attention" else shape.mlp):
            return 0
        return self._units(kind, capacity, shape)

    def _units(self, kind: str, capacity: int, shape: LayerShape) -> int:
        """What a capacity of the whole layer is in a shape of it, see :meth:`LayerRouters.units`."""
        if kind in TOKENS:
            return capacity
        there, whole = self.available(kind, shape), self.routers[kind].of
        return max(1, (capacity * there + whole // 2) // whole)

    def routes(self, architecture: Mapping[str, Value]) -> bool:
        """Whether anything of the layer is routed in an architecture."""
        shape = self.layer.shape(architecture)
        full = {kind: self._units(kind, self.routers[kind].of, shape) for kind in self.routers}
        return any(0 < self.served(kind, architecture) < full[kind] for kind in full)

    def stated(self, architecture: Mapping[str, Value]) -> dict[str, Any]:
        """What the config of an export says of the layer's routers; nothing where none of them routes.

        Units, capacities and what is active are those of the layer as narrow as it is in the architecture. Left out are
        routers of a sublayer that is skipped, and those to which the layer leaves nothing to choose.
        """
        if not self.routes(architecture):
            return {}
        shape = self.layer.shape(architecture)
        found: dict[str, Any] = {"hidden": self.hidden_size}
        for kind in self.routers:
            values = sorted({self._units(kind, value, shape) for value in self.routers[kind].values})
            active = self.served(kind, architecture)
            if active and len(values) > 1:
                found[kind] = {"of": values[-1], "values": values, "active": active}
        return found

    def regions(self) -> dict[int, Region]:
        """All of a router that is in use, nothing of one that is bypassed, by ``id`` of the parameter."""
        found: dict[int, Region] = {}
        for kind in self.routers:
            for parameter in self.routers[kind].parameters():
                whole = (tuple(slice(0, size) for size in parameter.shape),)
                found[id(parameter)] = whole if self.routers.routes(kind) else ()
        if self.routers.routes("experts", "heads"):
            found |= self._rows_in_use()
        return found

    def _rows_in_use(self) -> dict[int, Region]:
        """Scores of units that there are not, in a layer that is narrower now, are not used."""
        found: dict[int, Region] = {}
        for kind, there in self.routers.available.items():
            for parameter in self.routers[kind].scores.parameters() if self.routers.routes(kind) else ():
                found[id(parameter)] = ((slice(0, there), *(slice(0, size) for size in parameter.shape[1:])),)
        return found

    def _measured_name(self, kind: str) -> str:
        return f"layers.{self.layer.index}.{kind}"

    def expected(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """Per cent of tokens that are to enter each sublayer, units that are to serve each token; 0 where skipped."""
        return {self._measured_name(kind): self.served(kind, architecture) for kind in self.routers}

    @contextmanager
    def watch(self) -> Iterator[dict[str, int]]:
        """Reads the sizes of :meth:`expected` off what is decided and off the rows of tensors that are computed.

        A capacity counts as seen when as many rows were computed as tokens were let in; otherwise the share of the
        rows is what was seen.
        """
        seen = {self._measured_name(kind): 0 for kind in self.routers}

        def enter(kind: str) -> Any:
            def hook(module: nn.Module, inputs: object) -> None:
                if not (isinstance(module, SkippableModule) and module.skipped):
                    full = self.routers.available.get(kind, PERCENT)
                    seen[self._measured_name(kind)] = full

            return hook

        def observe(what: Observation) -> None:
            seen[self._measured_name(what.kind)] = self._seen(what)
            units, size = _HELD[SUBLAYERS[what.kind]]
            held = what.held  # the layer's projections were not called, from which it reads its sizes
            if what.kind in TOKENS and not what.rows:  # nothing is computed that could differ from what is set
                held = getattr(self.layer.current, size)
                seen.update({self._measured_name(k): self.routers.units(k) for k in (units,) if k in self.routers})
            if held:
                seen[self._measured_name(size)] = held

        layout = LAYOUTS[self.layer.family.model_type]
        self.routers.observers.append(observe)
        with ExitStack() as stack:
            stack.callback(self.routers.observers.remove, observe)
            for kind in self.routers:
                path = layout.attention if SUBLAYERS[kind] == "attention" else layout.mlp_in
                module = self.layer.layer.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(enter(kind)).remove)
            yield seen

    def _seen(self, what: Observation) -> int:
        keep = what.decision.keep
        if what.kind not in TOKENS:
            return what.rows // max(1, keep[..., 0].numel())
        counts = keep.sum(-1)  # (B,)
        wanted = int(counts.sum()) if what.kind == "mlp_tokens" else len(counts) * int(counts.max())
        return self.routers.active[what.kind] if what.rows == wanted else round(PERCENT * what.rows / keep.numel())

    def parameters(self, architecture: Mapping[str, Value]) -> int:
        """Parameters of the routers that an export has."""
        total = 0
        for kind, stated in self.stated(architecture).items():
            if kind == "hidden":
                continue
            scores = self.routers[kind].scores
            total += sum(parameter.numel() for parameter in self.routers[kind].parameters())
            if kind not in TOKENS:
                total -= (scores.out_features - stated["of"]) * (scores.in_features + 1)
        return total

    def saved_macs(
        self, architecture: Mapping[str, Value], *, seq_len: int, measured: Mapping[str, float] | None = None
    ) -> int:
        """MACs of one sequence that the layer does without, nominally; the routers' own are taken off.

        Of attention over ``c`` of ``T`` tokens, projections cost ``c`` and products of queries and keys ``c²``; heads
        that do not serve a token save its queries, their products and their outputs, not its keys and values.

        Args:
            architecture: of the model.
            seq_len: tokens of the sequence.
            measured: shares by kind to be taken instead of the nominal ones: of all tokens those that enter, of all
                heads or experts those that serve a token that enters.
        """
        shape = self.layer.shape(architecture)
        share = {kind: self.capacity(kind, architecture) / self.routers[kind].of for kind in self.routers}
        for kind in self.routers.available:
            there = self.available(kind, shape)
            share[kind] = self.served(kind, architecture) / there if self.served(kind, architecture) else 1.0
        running = [kind for kind in self.routers if share[kind] < 1]
        share |= measured or {}
        tokens, entering = share.get("attention_tokens", 1.0), share.get("mlp_tokens", 1.0)
        heads, experts = share.get("heads", 1.0), share.get("experts", 1.0)
        queries, keys, products, neurons = self._macs(shape, seq_len)
        kept = tokens * (heads * queries + keys) + tokens * tokens * heads * products + entering * experts * neurons
        own = sum(self._router_macs(kind, share, seq_len=seq_len, shape=shape) for kind in running)
        return round(queries + keys + products + neurons - kept - own)

    def _macs(self, shape: LayerShape, seq_len: int) -> tuple[int, int, int, int]:
        """MACs of queries and outputs, of keys and values, of their products, and of the FFN."""
        layer, row = self.layer, self.layer.family
        sizes = {path: layer.projection_sizes(path, shape) for path in layer.projections()}
        of = {path: seq_len * rows * columns for path, (rows, columns) in sizes.items()}
        queries = keys = products = neurons = 0
        if shape.attention:
            into = of[row.query] // 3 if row.fused else of[row.query]
            queries = into + of[row.attention_out]
            keys = 2 * into if row.fused else of[row.key] + of[row.value]
            products = 2 * shape.num_attention_heads * layer.head_dim * seq_len * seq_len
        if shape.mlp:
            neurons = sum(of[path] for path in (*row.ffn_in, row.ffn_out))
        return queries, keys, products, neurons

    def _router_macs(self, kind: str, share: Mapping[str, float], *, seq_len: int, shape: LayerShape) -> float:
        """A router of units reads tokens that enter and scores the units that there are; one of tokens reads all."""
        router, before = self.routers[kind], {"heads": "attention_tokens", "experts": "mlp_tokens"}.get(kind, "")
        rows = self.available(kind, shape) if kind in self.routers.available else 1
        weights = rows * router.scores.in_features
        weights += 0 if router.hidden is None else router.hidden.weight.numel()
        return share.get(before, 1.0) * seq_len * weights

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the routers out of the children of their layer inside the block, which has the stock names then."""
        held = self.layer.layer._modules.pop(ROUTERS, None)
        try:
            yield
        finally:
            if held is not None:
                self.layer.layer._modules[ROUTERS] = held
