"""Elastic parts: what a module that declares choices must do, and the part that is one transformer layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from hf_elastic.errors import SpaceError, UnsupportedModelError
from hf_elastic.families import Family, projection_of, submodule
from hf_elastic.layers import ElasticProjection, PartHolder, Region, Skip, SkippableModule, make_skippable
from hf_elastic.models.elastic_routers import LayerRouters
from hf_elastic.space import Choice, Condition, Value

Loadability = Literal["stock", "stock-padded", "remote-code"]

SKIPS: Mapping[str, tuple[bool, bool]] = {
    "none": (True, True),
    "attention": (False, True),
    "mlp": (True, False),
    "layer": (False, False),
}
"""Values of a ``layers.i.skip`` choice -> (attention is there, FFN is there)."""


@runtime_checkable
class ElasticPart(Protocol):
    """A module, or a group of modules, that declares choices and can be set.

    :class:`~hf_elastic.supernet.Supernet` finds parts on every :class:`~hf_elastic.layers.PartHolder` of a
    model and joins their choices into one space. Parts that share a choice by name must declare it equally.
    """

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Choices of this part, each after those its conditions name."""

    def set(self, architecture: Mapping[str, Value]) -> None:
        """Makes the part compute what ``architecture`` says. Must be cheap and must not fail half-way."""

    def regions(self) -> dict[int, Region]:
        """Active boxes of each elastic parameter as the part is set now, by ``id`` of the parameter."""

    def expected(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """Sizes that forwards must show while ``architecture`` is active, 0 for what is skipped."""

    def watch(self) -> AbstractContextManager[dict[str, int]]:
        """Fills the returned dict with the sizes *measured* on real tensors during forwards inside."""


@runtime_checkable
class AdapterPart(ElasticPart, Protocol):
    """A part that wraps a projection and adds to its outputs; what it wraps is a module of the plain model.

    Attributes:
        adapter: name of the adapter that it belongs to.
        wrapper: the module that stands in the model.
        base: the projection inside.
        layer: the elastic layer that it stands in, if there is one.
        sparse: whether merging keeps the zeros of the base.
        quantization_aware: whether merging keeps the base on its grid of integers.
    """

    adapter: str
    wrapper: nn.Module
    base: nn.Module
    layer: LayerPart | None
    sparse: bool
    quantization_aware: bool

    def link(self, parts: Sequence[ElasticPart], model: nn.Module) -> None:
        """Is told all parts of the model whenever a handle is made, before its choices are asked for."""

    @property
    def attached(self) -> bool:
        """Whether the adapter is still in its wrapper."""

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the base's weights now, where no rank can be chosen."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the base's parameters that merging changes."""

    def merged_into(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the base with the part merged as it is set now; of their full shapes, by name."""

    def parameters(self, architecture: Mapping[str, Value]) -> int:
        """Parameters of the adapter here in an architecture."""

    def macs(self, architecture: Mapping[str, Value], *, seq_len: int) -> int:
        """MACs of the adapter here for one sequence, as it runs beside its base."""

    @property
    def in_use(self) -> bool:
        """Whether forwards run the adapter."""


@dataclass(frozen=True)
class LayerShape:
    """Static shape of one transformer layer.

    Attributes:
        intermediate_size: FFN neurons, also when the FFN is skipped.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (equal to the query heads without grouping).
        attention: whether the attention sublayer is there.
        mlp: whether the FFN sublayer is there.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    attention: bool = True
    mlp: bool = True

    @property
    def skipped(self) -> bool:
        """Whether nothing of the layer is there."""
        return not (self.attention or self.mlp)

    def nested_in(self, larger: LayerShape) -> bool:
        """Whether the layer can be cut from a larger one: no wider, no more heads, nothing that was left out there."""
        heads = larger.attention and self.num_attention_heads <= larger.num_attention_heads
        width = larger.mlp and self.intermediate_size <= larger.intermediate_size
        return (heads or not self.attention) and (width or not self.mlp)


@dataclass(frozen=True)
class ChoiceNames:
    """Names of the choices that decide about one layer; ``None`` where the layer does not follow any."""

    intermediate_size: str | None = None
    heads: str | None = None
    skip: str | None = None
    depth: str | None = None


@dataclass
class LayerPart:
    """One transformer layer of a stock model whose FFN width, heads and presence are choices.

    Attributes:
        layer: the stock layer, its projections class-swapped.
        index: its place in the model.
        family: the row that names its modules.
        full: its shape in the model as it was given.
        head_dim: size of one head.
        hidden_size: width of the residual stream.
        names: the choices it follows.
        choices: those choices, with the ones their conditions name.
        rank: its place in the order in which ``num_hidden_layers`` keeps layers.
        skip_parameters: parameters that go with a skipped ``"attention"`` or ``"mlp"``, without any adapter's.
    """

    layer: nn.Module
    index: int
    family: Family
    full: LayerShape
    head_dim: int
    hidden_size: int
    names: ChoiceNames
    choices: tuple[Choice, ...]
    rank: int
    current: LayerShape = field(init=False)
    skip_parameters: Mapping[str, int] = field(init=False, repr=False)
    _modules: dict[str, Any] = field(init=False, repr=False)
    _skips: tuple[tuple[SkippableModule, str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        row = self.family
        paths = {*row.ffn_in, row.ffn_out, row.query, row.key, row.value, row.attention_out, row.attention}
        self._modules = {path: projection_of(self.layer, path, family=row) for path in sorted(paths)}
        self._skips = ()
        self.current = self.full
        self.skip_parameters = {
            kind: sum(parameter.numel() for parameter in self._distinct_parameters(rules))
            for kind, rules in (("attention", row.skip_attention), ("mlp", row.skip_mlp))
        }

    def _distinct_parameters(self, rules: Sequence[Skip]) -> Iterable[nn.Parameter]:
        modules = [submodule(self.layer, rule.module, family=self.family) for rule in rules]
        return {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()

    def sublayer_of(self, module: nn.Module) -> str | None:
        """The sublayer, ``"attention"`` or ``"mlp"``, that a module inside the layer belongs to."""
        row = self.family
        for kind, rules in (("attention", row.skip_attention), ("mlp", row.skip_mlp)):
            for rule in rules:
                if any(inner is module for inner in submodule(self.layer, rule.module, family=row).modules()):
                    return kind
        return None

    def presence(self, sublayers: Iterable[str | None]) -> tuple[Condition, ...]:
        """Conditions under which at least one of these sublayers is there (``None``: the layer at all)."""
        declared = {choice.name: choice for choice in self.choices}
        if self.names.skip is not None:
            kinds = set(sublayers)
            there = {
                value: "attention" in kinds and SKIPS[str(value)][0] or "mlp" in kinds and SKIPS[str(value)][1]
                or None in kinds and value != "layer"
                for value in declared[self.names.skip].values
            }  # fmt: skip
            return (Condition(self.names.skip, tuple(value for value, holds in there.items() if holds)),)
        if self.names.depth is not None:
            kept = tuple(value for value in declared[self.names.depth].values if int(value) > self.rank)
            return (Condition(self.names.depth, kept),)
        return ()

    def make_skippable(self) -> None:
        """Swaps the classes of the modules that a skip concerns; does nothing where that was done before."""
        row = self.family
        rules = [(rule, "attention") for rule in row.skip_attention] + [(rule, "mlp") for rule in row.skip_mlp]
        modules = [(submodule(self.layer, rule.module, family=row), rule, kind) for rule, kind in rules]
        self._skips = tuple((make_skippable(module, rule), kind) for module, rule, kind in modules)

    def shape(self, architecture: Mapping[str, Value]) -> LayerShape:
        """Returns the layer's shape in an architecture, without changing anything."""
        names, full = self.names, self.full
        depth = architecture[names.depth] if names.depth else None
        present = depth is None or self.rank < int(depth)
        attention, mlp = SKIPS[str(architecture[names.skip])] if names.skip else (True, True)
        if not present:
            return replace(full, attention=False, mlp=False)
        width = (
            int(architecture[names.intermediate_size]) if names.intermediate_size and mlp else full.intermediate_size
        )
        heads, groups = full.num_attention_heads, full.num_key_value_heads
        if names.heads and attention:
            groups = int(architecture[names.heads])
            heads = groups * (full.num_attention_heads // full.num_key_value_heads)
        return LayerShape(width, heads, groups, attention, mlp)

    def set(self, architecture: Mapping[str, Value]) -> None:
        """Makes the layer compute its shape in an architecture."""
        shape = self.shape(architecture)
        if shape != self.current:
            self.apply(shape)

    def apply(self, shape: LayerShape) -> None:
        """Makes the layer compute ``shape``; nothing is checked, see :meth:`shape`."""
        row, modules = self.family, self._modules
        for module, kind in self._skips:
            module.__dict__["skipped"] = not (shape.attention if kind == "attention" else shape.mlp)
        for path in row.ffn_in:
            _set_out(modules[path], shape.intermediate_size)
        _set_in(modules[row.ffn_out], shape.intermediate_size)
        queries, keys = shape.num_attention_heads * self.head_dim, shape.num_key_value_heads * self.head_dim
        if row.fused:
            _set_out(modules[row.query], 3 * queries)
        else:
            _set_out(modules[row.query], queries)
            _set_out(modules[row.key], keys)
            _set_out(modules[row.value], keys)
        _set_in(modules[row.attention_out], queries)
        for attribute, meaning in row.attributes.items():
            value = shape.num_attention_heads if meaning == "heads" else queries
            modules[row.attention].__dict__[attribute] = value
        self.current = shape

    @property
    def may_shrink(self) -> bool:
        """Whether a width or a number of heads is a choice."""
        return self.names.intermediate_size is not None or self.names.heads is not None

    def projections(self) -> dict[str, ElasticProjection]:
        """Class-swapped projections of the layer, by path."""
        return {p: m for p, m in self._modules.items() if isinstance(m, ElasticProjection)}

    def projection_sizes(self, path: str, shape: LayerShape) -> tuple[int, int]:
        """Active (in, out) features of a projection in a shape, fused outputs counted together."""
        row, projection = self.family, self.projections()[path]
        inputs, outputs = projection.whole_features
        queries, keys = shape.num_attention_heads * self.head_dim, shape.num_key_value_heads * self.head_dim
        if path in row.ffn_in:
            outputs = shape.intermediate_size
        elif path == row.ffn_out:
            inputs = shape.intermediate_size
        elif path == row.attention_out:
            inputs = queries
        elif row.fused:
            outputs = 3 * queries
        else:
            outputs = queries if path == row.query else keys
        return inputs, outputs

    def attention_paths(self) -> tuple[str, ...]:
        """Paths of the attention projections."""
        row = self.family
        return tuple(dict.fromkeys((row.query, row.key, row.value, row.attention_out)))

    def regions(self) -> dict[int, Region]:
        """Active boxes by ``id`` of the parameter; ``()`` for every parameter of a skipped sublayer."""
        found: dict[int, Region] = {}
        for projection in self.projections().values():
            parameters = dict(projection.named_parameters(recurse=False))
            found |= {id(parameters[name]): box for name, box in projection.active_region().items()}
        for module, _ in self._skips:
            if module.skipped:
                found |= {id(parameter): () for parameter in module.parameters()}
        return found

    def expected(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """FFN neurons and query heads of the layer in an architecture, 0 when the sublayer is skipped."""
        shape = self.shape(architecture)
        return {
            f"layers.{self.index}.intermediate_size": shape.intermediate_size if shape.mlp else 0,
            f"layers.{self.index}.num_attention_heads": shape.num_attention_heads if shape.attention else 0,
        }

    @contextmanager
    def watch(self) -> Iterator[dict[str, int]]:
        """Reads the sizes of :meth:`expected` off the tensors that enter the output projections."""
        mlp, heads = f"layers.{self.index}.intermediate_size", f"layers.{self.index}.num_attention_heads"
        seen = {mlp: 0, heads: 0}

        def record(name: str, unit: int) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if not (isinstance(module, SkippableModule) and module.skipped):
                    seen[name] = inputs[0].shape[-1] // unit

            return hook

        with ExitStack() as stack:
            for name, path, unit in (
                (mlp, self.family.ffn_out, 1),
                (heads, self.family.attention_out, self.head_dim),
            ):
                stack.callback(self._modules[path].register_forward_pre_hook(record(name, unit)).remove)
            yield seen


def _set_out(module: ElasticProjection, size: int) -> None:
    module.__dict__["active_out_features"] = size


def _set_in(module: ElasticProjection, size: int) -> None:
    module.__dict__["active_in_features"] = size


def join_choices(declared: Iterable[Sequence[Choice]]) -> tuple[Choice, ...]:
    """Joins the choices that each part declares into one list, in the order of the parts.

    Raises:
        SpaceError: two parts declare a choice of one name differently.
    """
    joined: dict[str, Choice] = {}
    for choices in declared:
        for choice in choices:
            if joined.setdefault(choice.name, choice) != choice:
                raise SpaceError(
                    f"two elastic parts declare {choice.name!r} differently: {joined[choice.name]} and {choice}; "
                    "rename one"
                )
    return tuple(joined.values())


def check_wrappers(model: nn.Module, parts: Iterable[ElasticPart]) -> None:
    """Refuses stock adapters on projections that may shrink and copies of elastic ones, which would not follow, and
    adapters on routers.

    Raises:
        UnsupportedModelError: the model has such.
    """
    layers = [part for part in parts if isinstance(part, LayerPart) and not part.may_shrink]
    fixed = {id(projection) for part in layers for projection in part.projections().values()}
    routers = {id(m) for held in model.modules() if isinstance(held, LayerRouters) for m in held.modules()}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if id(module) in routers and "base_layer" in children:
            raise UnsupportedModelError(
                f"{name} is a router, which an adapter does not change; call add_routing after get_peft_model, or make "
                "the adapter with exclude_modules=r'.*\\.routers\\..*'"
            )
        wrapped, copied = children.get("base_layer"), children.get("original_module")
        if copied is not None and any(isinstance(inner, ElasticProjection) for inner in copied.modules()):
            raise UnsupportedModelError(
                f"modules_to_save copies {name}, which is elastic and would not shrink; name heads and poolers only"
            )
        if isinstance(wrapped, ElasticProjection) and id(wrapped) not in fixed and not isinstance(module, PartHolder):
            raise UnsupportedModelError(
                f"{name} is a stock {type(module).__name__} on an elastic projection, whose sizes it cannot follow; "
                "make the adapter with hf_elastic.ElasticLoraConfig (without ranks= it is one of fixed rank)"
            )


def shapes_loadability(
    shapes: tuple[LayerShape, ...], family: Family, *, hidden_size: int, parent: LayerShape
) -> Loadability:
    """Loadability of layer shapes (:meth:`Supernet.loadability`); layers skipped as a whole are dropped."""
    kept = [shape for shape in shapes if not shape.skipped]
    if not kept:
        return "remote-code"  # a stock model without layers cannot keep the length of its cache
    partial = any(not (shape.attention and shape.mlp) for shape in kept)
    widths = {shape.intermediate_size for shape in kept}
    heads = {shape.num_attention_heads for shape in kept}
    holds = {
        "any": True,
        "parent": heads == {parent.num_attention_heads},
        "divides_hidden": all(hidden_size % count == 0 for count in heads),
    }[family.stock_heads]
    if not partial and len(widths) == 1 and len(heads) == 1 and holds:
        return "stock"
    return "stock-padded" if family.pre_norm or not partial else "remote-code"
