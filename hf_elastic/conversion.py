"""``make_elastic``: a stock model becomes a supernet by class swap, from a declaration of a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from .errors import SpaceError, UnsupportedModelError
from .families import Family, family_of, layers_of, submodule
from .layers import PartHolder, make_elastic_linear, make_part_holder
from .parts import SKIPS, ChoiceNames, LayerPart, LayerShape
from .space import Choice, Condition
from .supernet import Supernet

Loadability = Literal["any", "stock-padded", "stock"]
Sizes = Sequence[int | float]
PerLayer = Sequence[int | float] | Mapping[int, Sequence[int | float]]

DEPTH = "num_hidden_layers"


@dataclass(frozen=True)
class ElasticConfig:
    """Declares which dimensions of a model become choices.

    A size is a fraction of the model's own (``float`` in (0, 1]) or absolute (``int``); a sequence holds for all
    layers, a dict ``{layer: sizes}`` for the layers it names. The model's own size is always a value as well, so that
    the largest architecture is the model itself.

    Attributes:
        intermediate_size: FFN widths.
        num_attention_heads: head counts (BERT, GPT-2).
        num_key_value_heads: key/value group counts (LLaMA shape); query heads follow their group.
        skip: what a layer may leave out: any of ``"attention"``, ``"mlp"``, ``"layer"``; or a dict by layer.
        num_hidden_layers: depths; the layers kept are a nested set in the order of :attr:`layer_order`.
        layer_order: layers from the most to the least important. By default first, last, then ascending;
            ``sort_by_importance_`` replaces it by a measured one.
        multiple_of: FFN widths are rounded to multiples of it (hardware-friendly sizes).
        loadability: restricts the space to architectures that stock classes hold (``"stock"``: one width and one head
            count for all layers, whole layers dropped) or hold after padding (``"stock-padded"``).
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
        if self.loadability not in ("any", "stock-padded", "stock"):
            raise SpaceError(f"loadability={self.loadability!r} is not one of 'any', 'stock-padded', 'stock'")
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise SpaceError(f"multiple_of={self.multiple_of!r} must be an integer of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict of the fields that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElasticConfig:
        """Inverse of :meth:`to_dict` (JSON turns layer numbers into strings; they are turned back).

        Raises:
            SpaceError: a key is not a field.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SpaceError(f"unknown ElasticConfig fields {unknown}; known: {', '.join(sorted(known))}")
        return cls(**{
            name: {int(k): v for k, v in value.items()} if isinstance(value, Mapping) else value
            for name, value in data.items()
        })


def make_elastic(model: PreTrainedModel, config: ElasticConfig, *, family: Family | None = None) -> Supernet:
    """Makes dimensions of a stock model switchable, in place, and returns the handle.

    No weight changes and no parameter is renamed; the largest architecture, active afterwards, gives bit-identical
    logits.

    Args:
        model: a BERT, RoBERTa, DistilBERT, LLaMA, Qwen2, Qwen3, Mistral or GPT-2 model as ``from_pretrained``
            returned it, with any head.
        config: which dimensions become choices.
        family: a row for a model type we lack; prove it with ``hf_elastic.testing.check_family``.

    Raises:
        UnsupportedModelError: the model is of an unknown type, quantised, wrapped, already elastic, or a decoder with
            cross-attention.
        SpaceError: a size is larger than the model, heads do not divide, or nothing is left to choose.
    """
    _check_model(model)
    row = family_of(model, family)
    _check_family_limits(model, config, row)
    builder = _Builder(model, config, row)
    plans = [builder.plan(index) for index in range(len(builder.layers))]
    if not any(plan.choices for plan in plans):
        raise SpaceError("ElasticConfig leaves nothing to choose: every list holds only the model's own size; add smaller ones")
    for plan in plans:
        builder.convert(plan)
    model.__dict__["_hf_elastic_config"] = config
    return Supernet(model)


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"make_elastic takes a transformers PreTrainedModel, got {type(model).__name__}; "
            "convert the model before get_peft_model, torch.compile or DistributedDataParallel"
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        method = getattr(quantization, "quant_method", "unknown method")
        raise UnsupportedModelError(
            f"the model is quantised ({method}); load it in a float dtype, without quantization_config"
        )
    if any(isinstance(module, PartHolder) for module in model.modules()):
        raise UnsupportedModelError("the model is elastic already; use hf_elastic.Supernet(model) for its handle")
    for flag in ("is_encoder_decoder", "add_cross_attention", "is_decoder"):
        if getattr(model.config, flag, False) is True:
            raise UnsupportedModelError(f"config.{flag}=True is not supported; only encoders and causal decoders are")


def _check_family_limits(model: PreTrainedModel, config: ElasticConfig, row: Family) -> None:
    wrong = "num_attention_heads" if row.grouped else "num_key_value_heads"
    if getattr(config, wrong) is not None:
        raise SpaceError(f"{row.model_type} models choose {row.heads_choice}, not {wrong}; set {row.heads_choice}=...")
    skips = config.skip is not None or config.num_hidden_layers is not None
    if skips and getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModelError(
            "config.scale_attn_by_inverse_layer_idx=True ties the function of a layer to its number, "
            "so layers cannot be skipped; drop skip= and num_hidden_layers="
        )
    kinds = _skip_kinds(config.skip)
    if kinds - {"layer"} and config.loadability == "stock":
        raise SpaceError(f"skip={sorted(kinds)} needs per-layer shapes; with loadability='stock' only skip=['layer'] is possible")
    if kinds - {"layer"} and config.loadability == "stock-padded" and not row.pre_norm:
        raise SpaceError(f"a {row.model_type} layer without its attention or FFN cannot be padded (post-norm); use loadability='any'")
    if row.static_type is None and (config.loadability == "any" and (kinds - {"layer"}) and not row.pre_norm):
        raise SpaceError(f"family {row.model_type!r} names no static class to export skips to; use skip=['layer']")
    if config.loadability == "stock" and row.stock_heads == "parent" and getattr(config, row.heads_choice) is not None:
        raise SpaceError(
            f"a stock {row.model_type} config derives the size of a head from their number, so it cannot hold fewer; "
            f"drop {row.heads_choice}= or use loadability='stock-padded' or 'any'"
        )


def _skip_kinds(skip: Sequence[str] | Mapping[int, Sequence[str]] | None) -> set[str]:
    if skip is None:
        return set()
    if isinstance(skip, str):
        raise SpaceError(f"skip={skip!r} must be a list such as [{skip!r}]")
    lists = list(skip.values()) if isinstance(skip, Mapping) else [skip]
    kinds = {kind for entry in lists for kind in entry}
    if unknown := sorted(kinds - {"attention", "mlp", "layer"}):
        raise SpaceError(f"skip={unknown} is unknown; a layer may leave out 'attention', 'mlp' or 'layer'")
    return kinds


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
        self.hidden_size = int(model.config.hidden_size)
        self.order = self._layer_order()
        self.depth = self._depth_choice()
        for name in ("intermediate_size", row.heads_choice, "skip"):
            self._check_layer_numbers(name)

    def _check_layer_numbers(self, name: str) -> None:
        value = getattr(self.config, name)
        if not isinstance(value, Mapping):
            return
        if self.uniform and name != "skip":
            raise SpaceError(f"{name} by layer cannot be held by a stock config; give one list for all layers")
        if bad := [k for k in value if not isinstance(k, int) or not 0 <= k < len(self.layers)]:
            raise SpaceError(f"{name} names layers {bad}, the model has layers 0 to {len(self.layers) - 1}")

    def _layer_order(self) -> tuple[int, ...]:
        count = len(self.layers)
        if self.config.layer_order is None:
            return tuple(dict.fromkeys((0, count - 1, *range(count))))
        order = tuple(self.config.layer_order)
        if sorted(order) != list(range(count)):
            raise SpaceError(f"layer_order={list(order)} must name each of the layers 0 to {count - 1} once")
        return order

    def _depth_choice(self) -> Choice | None:
        if self.config.num_hidden_layers is None:
            return None
        sizes = resolve_sizes(self.config.num_hidden_layers, len(self.layers), name=DEPTH, multiple_of=1)
        return Choice(DEPTH, sizes) if len(sizes) > 1 else None

    def measure(self, index: int) -> tuple[LayerShape, int]:
        """Reads a layer's own shape off its weights."""
        row, layer = self.row, self.layers[index]
        head_dim = getattr(submodule(layer, row.attention, family=row), row.head_size)
        width = _in_features(submodule(layer, row.ffn_out, family=row))
        heads = _in_features(submodule(layer, row.attention_out, family=row)) // head_dim
        groups = heads if not row.grouped else _out_features(submodule(layer, row.key, family=row)) // head_dim
        return LayerShape(width, heads, groups), int(head_dim)

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
        width = self._size_choice(index, "intermediate_size", full.intermediate_size, skip, present)
        heads = self._size_choice(index, self.row.heads_choice, full.num_key_value_heads, skip, present)
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
        skip = self.config.skip
        kinds = skip.get(index, ()) if isinstance(skip, Mapping) else (skip or ())
        if not kinds:
            return None
        wanted = set(kinds) | ({"layer"} if {"attention", "mlp"} <= set(kinds) else set())
        values = ("none", *(kind for kind in ("attention", "mlp", "layer") if kind in wanted))
        attention, mlp = self._sublayer_parameters(index)
        counts = tuple(attention * SKIPS[v][0] + mlp * SKIPS[v][1] for v in values)
        return Choice(f"layers.{index}.skip", values, kind="categorical", parameters=counts, when=present)

    def _sublayer_parameters(self, index: int) -> tuple[int, int]:
        layer, row = self.layers[index], self.row
        total = sum(p.numel() for p in layer.parameters())
        mlp_modules = {rule.module for rule in row.skip_mlp}
        mlp = sum(p.numel() for m in mlp_modules for p in layer.get_submodule(m).parameters())
        return total - mlp, mlp

    def _size_choice(
        self, index: int, name: str, full: int, skip: Choice | None, present: tuple[Condition, ...]
    ) -> Choice | None:
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
        sublayer = 1 if name == "intermediate_size" else 0
        when = present
        if skip is not None:
            when = (Condition(skip.name, tuple(v for v in skip.values if SKIPS[str(v)][sublayer])),)
        return Choice(f"layers.{index}.{name}", values, when=when)

    def _check_stock_heads(self, heads: Choice | None, full: LayerShape) -> None:
        if not self.uniform or heads is None or self.row.stock_heads != "divides_hidden":
            return
        ratio = full.num_attention_heads // full.num_key_value_heads
        if bad := [v for v in heads.values if self.hidden_size % (int(v) * ratio)]:
            raise SpaceError(
                f"{heads.name}={bad} gives {[int(v) * ratio for v in bad]} heads, which do not divide "
                f"hidden_size={self.hidden_size} as a stock {self.row.model_type} config demands; "
                "choose divisors or loadability='any'"
            )

    def convert(self, plan: _Plan) -> None:
        """Swaps the classes of one layer's modules and hangs its part on it."""
        layer, row = self.layers[plan.index], self.row
        for path in dict.fromkeys((*row.ffn_in, row.ffn_out, row.query, row.key, row.value, row.attention_out)):
            name = f"{row.layers}.{plan.index}.{path}"
            fused = 3 if row.fused and path == row.query else 1
            make_elastic_linear(submodule(layer, path, family=row), name=name, fused=fused)
        part = LayerPart(
            layer, plan.index, row, plan.full, plan.head_dim, self.hidden_size, plan.names, plan.choices, plan.rank
        )
        if plan.names.skip or plan.names.depth:
            part.make_skippable()
        make_part_holder(layer, [part])


def replan(supernet: Supernet, order: Sequence[int]) -> None:
    """Rebuilds the choices of a supernet's layers for another order of layers; no weight changes.

    Args:
        order: every layer once, from the most to the least important.
    """
    config = replace(supernet.model.__dict__["_hf_elastic_config"], layer_order=tuple(order))
    builder = _Builder(supernet.model, config, supernet.family)
    supernet.set_active(supernet.space.largest())
    for part in supernet.layer_parts:
        plan = builder.plan(part.index)
        part.names, part.choices, part.rank = plan.names, plan.choices, plan.rank
        if plan.names.depth:
            part.make_skippable()
    supernet.model.__dict__["_hf_elastic_config"] = config
    supernet.refresh_space()
    supernet.set_active(supernet.space.largest())


def resolve_sizes(sizes: Sizes, full: int, *, name: str, multiple_of: int) -> tuple[int, ...]:
    """Turns fractions and absolute sizes into ascending integers that end with the model's own size.

    Raises:
        SpaceError: a size is not a number, not positive, or larger than the model.
    """
    if isinstance(sizes, (str, int, float)) or not list(sizes):
        raise SpaceError(f"{name}={sizes!r} must be a non-empty list of fractions or sizes")
    return tuple(sorted({_resolve(size, full, name, multiple_of) for size in sizes} | {full}))


def _resolve(size: int | float, full: int, name: str, multiple_of: int) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise SpaceError(f"{name}={size!r} is neither a fraction nor a size")
    if isinstance(size, float) and not 0 < size <= 1:
        raise SpaceError(f"{name}={size} is no fraction in (0, 1]; write {int(size) if size == size else 1} for an absolute size")
    if isinstance(size, int) and not 1 <= size <= full:
        raise SpaceError(f"{name}={size} is not between 1 and the model's own {full}")
    wanted = size * full if isinstance(size, float) else size
    return min(full, max(multiple_of, round(wanted / multiple_of) * multiple_of))


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): list(v) for k, v in value.items()}
    return list(value) if isinstance(value, (list, tuple)) else value


