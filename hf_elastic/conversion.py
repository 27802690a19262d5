"""``make_elastic``: a stock model becomes a supernet by class swap, from a declaration of a few lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from hf_elastic.blocks import ROLES, make_block_parts
from hf_elastic.declaration import ElasticConfig, resolve_sizes, skip_kinds
from hf_elastic.errors import SpaceError, UnsupportedModelError
from hf_elastic.families import Family, family_of, layers_of, projection_of, submodule
from hf_elastic.layers import PartHolder, check_forward, check_linear, make_elastic_linear, make_part_holder
from hf_elastic.models import static_class_name
from hf_elastic.models.elastic_routers import routers_of
from hf_elastic.parts import SKIPS, AdapterPart, ChoiceNames, LayerPart, LayerShape, join_choices
from hf_elastic.space import Choice, Condition, SearchSpace
from hf_elastic.supernet import Supernet

DEPTH = "num_hidden_layers"


def make_elastic(
    model: PreTrainedModel, config: ElasticConfig | None = None, *, family: Family | None = None
) -> Supernet:
    """Makes dimensions of a stock model switchable, in place, and returns the handle.

    No weight changes and no parameter is renamed; the largest architecture, active afterwards, gives
    bit-identical logits. An ``elastic_bert`` or ``elastic_gpt2`` model needs no config: the choice is the block of each
    layer, out of ``candidate_blocks`` of the model's own config, or the only one.

    Args:
        model: a BERT, RoBERTa, DistilBERT, LLaMA, Qwen2, Qwen3, Mistral or GPT-2 model as ``from_pretrained``
            returned it, with any head; or an ``elastic_bert`` or ``elastic_gpt2`` one.
        config: which dimensions of a stock model become choices.
        family: a row for a model type we lack; prove it with ``hf_elastic.testing.check_family``.

    Raises:
        UnsupportedModelError: the model is of an unknown type, quantised, wrapped, already elastic, or a
            decoder with cross-attention.
        SpaceError: a size is larger than the model, heads do not divide, or nothing is left to choose.
    """
    _check_model(model)
    if config is None and model.config.model_type in ROLES:
        for part in make_block_parts(model):
            make_part_holder(part.layer, [part])
        return Supernet(model)
    if not isinstance(config, ElasticConfig):
        got = "missing" if config is None else f"a {type(config).__name__}"
        raise SpaceError(
            f"config is {got}; a {model.config.model_type} model needs ElasticConfig(intermediate_size=[...], ...)"
        )
    row = _with_static_class(family_of(model, family), model)
    _check_family_limits(model, config, row)
    builder = _Builder(model, config, row)
    plans = [builder.plan(index) for index in range(len(builder.layers))]
    builder.check(plans)
    for plan in plans:
        builder.convert(plan)
    model.__dict__["_hf_elastic_config"] = config
    return Supernet(model)


def make_layer_parts(
    model: PreTrainedModel,
    *,
    family: Family | None = None,
    check: Callable[[Sequence[LayerShape]], object] | None = None,
) -> None:
    """Makes the layers of a stock model elastic parts that leave nothing to choose, for what is built upon them.

    Adapters may be on the projections already, as nothing will shrink below them.

    Args:
        model, family: as for :func:`make_elastic`.
        check: is told the shapes of the layers before any is changed, and may refuse them.

    Raises:
        UnsupportedModelError: as :func:`make_elastic`.
    """
    _check_model(model, adapted=True)
    builder = _Builder(model, ElasticConfig(), _with_static_class(family_of(model, family), model))
    plans = [builder.plan(index) for index in range(len(builder.layers))]
    for plan in plans:
        builder.check_layer(plan)
    if check is not None:
        check([plan.full for plan in plans])
    for plan in plans:
        builder.convert(plan)


def _with_static_class(row: Family, model: PreTrainedModel) -> Family:
    """The row as it is true of this model: not every head of a family has a static class."""
    return row if static_class_name(type(model)) is not None else replace(row, static_type=None)


def _check_model(model: PreTrainedModel, *, adapted: bool = False) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"make_elastic takes a transformers PreTrainedModel, got {type(model).__name__}; "
            "convert the model before get_peft_model, torch.compile or DistributedDataParallel"
        )
    if routers_of(model):
        raise UnsupportedModelError(
            "the model has routers; make_elastic comes before add_routing, so take the model without them"
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        stated = quantization if isinstance(quantization, Mapping) else vars(quantization or object)
        method = getattr(stated.get("quant_method"), "value", stated.get("quant_method"))
        raise UnsupportedModelError(
            f"the model is quantised ({method or 'unknown method'}); load it in a float dtype, without "
            "quantization_config"
        )
    parts = [part for module in model.modules() if isinstance(module, PartHolder) for part in module.elastic_parts]
    if any(not (adapted and isinstance(part, AdapterPart)) for part in parts):
        raise UnsupportedModelError("the model is elastic already; use hf_elastic.Supernet(model) for its handle")
    if compiled := next((name for name, _ in model.named_modules() if "_orig_mod" in name), None):
        raise UnsupportedModelError(f"{compiled} is compiled; call torch.compile after make_elastic, not before")
    for flag in ("is_encoder_decoder", "add_cross_attention", "is_decoder"):
        if getattr(model.config, flag, False) is True:
            raise UnsupportedModelError(f"config.{flag}=True is not supported; only encoders and causal decoders are")


def _check_family_limits(model: PreTrainedModel, config: ElasticConfig, row: Family) -> None:
    wrong = "num_attention_heads" if row.grouped else "num_key_value_heads"
    if getattr(config, wrong) is not None:
        raise SpaceError(f"{row.model_type} models choose {row.heads_choice}, not {wrong}; set {row.heads_choice}=...")
    kinds = skip_kinds(config.skip)
    skips = bool(kinds) or config.num_hidden_layers is not None
    if skips and getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModelError(
            "config.scale_attn_by_inverse_layer_idx=True ties the function of a layer to its number, "
            "so layers cannot be skipped; drop skip= and num_hidden_layers="
        )
    partial = sorted(kinds - {"layer"})
    if partial and config.loadability == "stock":
        raise SpaceError(
            f"skip={partial} needs per-layer shapes; with loadability='stock' only skip=['layer'] is possible"
        )
    if partial and config.loadability == "stock-padded" and not row.pre_norm:
        raise SpaceError(
            f"skip={partial}: a {row.model_type} layer without its attention or FFN cannot be padded "
            "(post-norm); use skip=['layer'] or loadability='any'"
        )
    if partial and row.static_type is None and not row.pre_norm:
        raise SpaceError(
            f"skip={partial}: {type(model).__name__} has no static class to export it to; use skip=['layer']"
        )
    if config.loadability == "stock" and row.stock_heads == "parent" and getattr(config, row.heads_choice):
        raise SpaceError(
            f"a stock {row.model_type} config derives the size of a head from their number, so it cannot "
            f"hold fewer; drop {row.heads_choice}= or use loadability='stock-padded' or 'any'"
        )


@dataclass
class _Plan:
    """What conversion will do to one layer; made for all layers before any is touched."""

    index: int
    full: LayerShape
    head_dim: int
    names: ChoiceNames
    rank: int
    choices: tuple[Choice, ...] = field(default=())


class _Builder:
    """Works out the choices of every layer of one model."""

    def __init__(self, model: PreTrainedModel, config: ElasticConfig, row: Family) -> None:
        self.model, self.config, self.row = model, config, row
        self.layers = layers_of(model, row)
        self.uniform = config.loadability == "stock"
        self.order = self._layer_order()
        self.depth = self._depth_choice()
        for name in ("intermediate_size", row.heads_choice, "skip"):
            self._check_layer_numbers(name)
        self.anchor = self._anchor()

    def _check_layer_numbers(self, name: str) -> None:
        value = getattr(self.config, name)
        if not isinstance(value, Mapping):
            return
        if self.uniform and name != "skip":
            raise SpaceError(f"{name} by layer cannot be held by a stock config; give one list for all layers")
        numbers = range(len(self.layers))
        if bad := [key for key in value if type(key) is not int or key not in numbers]:
            raise SpaceError(f"{name} names layers {bad}, the model has layers 0 to {len(self.layers) - 1}")

    def _layer_order(self) -> tuple[int, ...]:
        count = len(self.layers)
        if self.config.layer_order is None:
            return tuple(dict.fromkeys((0, count - 1, *range(count))))
        order = self.config.layer_order
        if not isinstance(order, tuple) or sorted(map(repr, order)) != sorted(map(repr, range(count))):
            shown = list(order) if isinstance(order, tuple) else order
            raise SpaceError(f"layer_order={shown!r} must name each of the layers 0 to {count - 1} once")
        return order

    def _depth_choice(self) -> Choice | None:
        if self.config.num_hidden_layers is None:
            return None
        sizes = resolve_sizes(self.config.num_hidden_layers, len(self.layers), name=DEPTH, multiple_of=1)
        return Choice(DEPTH, sizes) if len(sizes) > 1 else None

    def _anchor(self) -> int | None:
        """Layer that stays where an architecture without any layer could not be exported, else ``None``."""
        if self.config.loadability == "any" and self.row.static_type is not None:
            return None
        stays = [i for i in self.order if not self._presence(self.order.index(i)) and "layer" not in self._kinds(i)]
        return None if stays else self.order[0]

    def _kinds(self, index: int) -> set[str]:
        """What one layer may leave out."""
        skip = self.config.skip
        kinds = set((skip.get(index) if isinstance(skip, Mapping) else skip) or ())
        return kinds | {"layer"} if {"attention", "mlp"} <= kinds else kinds

    def check(self, plans: Sequence[_Plan]) -> None:
        """Refuses what cannot be converted; nothing has been changed yet."""
        choices = join_choices(plan.choices for plan in plans)
        if not choices:
            raise SpaceError(
                "ElasticConfig leaves nothing to choose: declare intermediate_size, a number of heads, skip "
                "or num_hidden_layers, with sizes below the model's own"
            )
        SearchSpace(choices)
        if len({id(layer) for layer in self.layers}) < len(self.layers):
            raise UnsupportedModelError(f"{self.row.model_type} layers that share one module cannot differ in shape")
        for plan in plans:
            self.check_layer(plan)

    def check_layer(self, plan: _Plan) -> None:
        """Refuses a layer whose modules cannot be swapped."""
        layer, row = self.layers[plan.index], self.row
        prefix = f"{row.layers}.{plan.index}."
        for path, fused in self._linears().items():
            check_linear(self._projection(layer, path), name=prefix + path, fused=fused)
        for rule in (*row.skip_attention, *row.skip_mlp):
            check_forward(submodule(layer, rule.module, family=row), name=prefix + rule.module)
        attention = submodule(layer, row.attention, family=row)
        heads = plan.full.num_attention_heads
        for attribute, meaning in row.attributes.items():
            wanted = heads if meaning == "heads" else heads * plan.head_dim
            if (value := getattr(attention, attribute, None)) != wanted:
                raise UnsupportedModelError(
                    f"{prefix}{row.attention}.{attribute} is {value!r}, but the family row of "
                    f"{row.model_type!r} says that it follows the {meaning} of the active heads, {wanted} here"
                )

    def _projection(self, layer: nn.Module, path: str) -> nn.Module:
        """A projection; what an adapter wraps where nothing shrinks below it."""
        found = submodule if self.config != ElasticConfig() else projection_of
        return found(layer, path, family=self.row)

    def _linears(self) -> dict[str, int]:
        """Paths of the projections of a layer, with how many outputs each fuses."""
        row = self.row
        paths = (*row.ffn_in, row.ffn_out, row.query, row.key, row.value, row.attention_out)
        return {path: 3 if row.fused and path == row.query else 1 for path in paths}

    def measure(self, index: int) -> tuple[LayerShape, int]:
        """Reads a layer's own shape and the size of its heads off its weights."""
        row, layer = self.row, self.layers[index]
        head_dim = getattr(submodule(layer, row.attention, family=row), row.head_size, None)
        if not isinstance(head_dim, int) or head_dim < 1:
            raise UnsupportedModelError(
                f"{row.attention}.{row.head_size} is {head_dim!r}, but the family row of {row.model_type!r} "
                "says that it holds the size of a head"
            )
        width = _in_features(self._projection(layer, row.ffn_out))
        queries = _in_features(self._projection(layer, row.attention_out))
        keys = _out_features(self._projection(layer, row.key)) if row.grouped else queries
        if queries % head_dim or keys % head_dim or queries % keys:
            raise SpaceError(
                f"layer {index} has projections of {queries} (queries) and {keys} (keys), which do not divide "
                f"into heads of {head_dim} in groups of equal size"
            )
        return LayerShape(width, queries // head_dim, keys // head_dim), head_dim

    def plan(self, index: int) -> _Plan:
        full, head_dim = self.measure(index)
        rank = self.order.index(index)
        choices: list[Choice] = []
        present = self._presence(rank)
        if self.depth is not None:
            choices.append(self.depth)
        skip = self._skip_choice(index, present)
        if skip is not None:
            choices.append(skip)
        width = self._size_choice(index, "intermediate_size", full.intermediate_size, when=_where(1, skip, present))
        heads = self._size_choice(index, self.row.heads_choice, full.num_key_value_heads, when=_where(0, skip, present))
        self._check_stock_heads(heads, full)
        choices += [c for c in (heads, width) if c is not None]
        names = ChoiceNames(
            intermediate_size=width.name if width else None,
            heads=heads.name if heads else None,
            skip=skip.name if skip else None,
            depth=DEPTH if present else None,
        )
        return _Plan(index, full, head_dim, names, rank, tuple(choices))

    def _ever_absent(self, rank: int) -> bool:
        return self.depth is not None and rank >= int(self.depth.smallest)

    def _presence(self, rank: int) -> tuple[Condition, ...]:
        if self.depth is None or not self._ever_absent(rank):
            return ()
        return (Condition(DEPTH, tuple(v for v in self.depth.values if int(v) > rank)),)

    def _skip_choice(self, index: int, present: tuple[Condition, ...]) -> Choice | None:
        wanted = self._kinds(index)
        if index == self.anchor or present:  # what depth may leave out is left out by it alone: one function, one point
            wanted -= {"layer"}
        if not wanted:
            return None
        values = ("none", *(kind for kind in ("attention", "mlp", "layer") if kind in wanted))
        attention, mlp = self._sublayer_parameters(index)
        counts = tuple(attention * SKIPS[v][0] + mlp * SKIPS[v][1] for v in values)
        return Choice(f"layers.{index}.skip", values, kind="categorical", parameters=counts, when=present)

    def _sublayer_parameters(self, index: int) -> tuple[int, int]:
        layer, row = self.layers[index], self.row
        total = sum(p.numel() for p in layer.parameters())
        mlp_modules = {rule.module for rule in row.skip_mlp}
        mlp = sum(p.numel() for m in mlp_modules for p in submodule(layer, m, family=row).parameters())
        return total - mlp, mlp

    def _size_choice(self, index: int, name: str, full: int, *, when: tuple[Condition, ...]) -> Choice | None:
        declared = getattr(self.config, name)
        sizes = declared.get(index) if isinstance(declared, Mapping) else declared
        if sizes is None:
            return None
        multiple = self.config.multiple_of if name == "intermediate_size" else 1
        values = resolve_sizes(sizes, full, name=name, multiple_of=multiple)
        if len(values) < 2:
            return None
        if self.uniform:
            return Choice(name, values)
        return Choice(f"layers.{index}.{name}", values, when=when)

    def _check_stock_heads(self, heads: Choice | None, full: LayerShape) -> None:
        if not self.uniform or heads is None or self.row.stock_heads != "divides_hidden":
            return
        ratio = full.num_attention_heads // full.num_key_value_heads
        hidden = self.hidden_size
        if bad := [v for v in heads.values if hidden % (int(v) * ratio)]:
            raise SpaceError(
                f"{heads.name}={bad} gives {[int(v) * ratio for v in bad]} heads, which do not divide "
                f"hidden_size={hidden} as a stock {self.row.model_type} config demands; choose divisors or "
                "loadability='any'"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return _out_features(self._projection(self.layers[0], self.row.ffn_out))

    def convert(self, plan: _Plan) -> None:
        """Swaps the classes of one layer's modules and hangs its part on it, after :meth:`check`."""
        layer, row = self.layers[plan.index], self.row
        for path, fused in self._linears().items():
            name = f"{row.layers}.{plan.index}.{path}"
            make_elastic_linear(self._projection(layer, path), name=name, fused=fused)
        part = LayerPart(
            layer=layer,
            index=plan.index,
            family=row,
            full=plan.full,
            head_dim=plan.head_dim,
            hidden_size=self.hidden_size,
            names=plan.names,
            choices=plan.choices,
            rank=plan.rank,
        )
        if plan.names.skip or plan.names.depth:
            part.make_skippable()
        make_part_holder(layer, [part])


def _where(sublayer: int, skip: Choice | None, present: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """When a size matters: attention's (0) or the FFN's (1), in a layer that may be skipped or left out."""
    if skip is None:
        return present
    return (Condition(skip.name, tuple(v for v in skip.values if SKIPS[str(v)][sublayer])),)


def replan(supernet: Supernet, order: Sequence[int]) -> None:
    """Rebuilds the choices of a supernet's layers for another order of layers; no weight changes.

    What was active stays active, in the form it has in the new space.

    Args:
        order: every layer once, from the most to the least important.
    """
    config = replace(supernet.model.__dict__["_hf_elastic_config"], layer_order=tuple(order))
    builder = _Builder(supernet.model, config, supernet.family)
    plans = [builder.plan(part.index) for part in supernet.layer_parts]
    with supernet.activate(supernet.space.largest()):
        for part, plan in zip(supernet.layer_parts, plans, strict=True):
            part.names, part.choices, part.rank = plan.names, plan.choices, plan.rank
            if plan.names.skip or plan.names.depth:
                part.make_skippable()
        supernet.model.__dict__["_hf_elastic_config"] = config
        supernet.refresh_space()


def _in_features(module: nn.Module) -> int:
    size = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if size is None:
        raise UnsupportedModelError(f"{type(module).__name__} is neither nn.Linear nor Conv1D")
    return int(size)


def _out_features(module: nn.Module) -> int:
    size = getattr(module, "out_features", None) or getattr(module, "nf", None)
    if size is None:
        raise UnsupportedModelError(f"{type(module).__name__} is neither nn.Linear nor Conv1D")
    return int(size)
