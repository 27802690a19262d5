"""``add_routing``: a model gets routers, in place, and its capacities become choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_elastic.activation import adapter_parameters
from hf_elastic.conversion import make_layer_parts
from hf_elastic.errors import SpaceError, UnsupportedModelError
from hf_elastic.families import family_of, layers_of
from hf_elastic.layers import PartHolder, seeded
from hf_elastic.models.elastic_routed import LAYOUTS, attach_routers
from hf_elastic.models.elastic_routers import PERCENT, routers_of
from hf_elastic.models.elastic_routing import shown_capacities
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.routers import RouterPart
from hf_elastic.routers_folder import ROUTING_CONFIG
from hf_elastic.routing.configuration import RoutingConfig, resolve_capacity
from hf_elastic.routing.handles import base_of, require_bare_ffn, require_routers
from hf_elastic.supernet import Supernet


def add_routing(model: nn.Module, config: RoutingConfig, *, seed: int = 0, freeze: bool = True) -> Supernet:
    """Gives a model routers, in place, and returns the handle whose choices are their capacities.

    Nothing changes until a capacity below 1 is made active: the largest architecture, active afterwards, bypasses all
    routers. These start at zero, so that every token, head and expert has weight one; which are chosen is learned, see
    ``docs/routing.md``.

    Args:
        model: a BERT, RoBERTa, LLaMA, Qwen2, Qwen3, Mistral or GPT-2 model with any head, also one that
            :func:`hf_elastic.make_elastic` made elastic, and also a ``PeftModel`` around it. Adapters on the FFN go
            together with routed tokens, not with experts.
        config: what is routed.
        seed: of the hidden layers of ``router="mlp"``.
        freeze: whether what is trained is the routers alone, and adapters where the model has such, as in the paper;
            otherwise no ``requires_grad`` changes.

    Raises:
        UnsupportedModelError: the model is of a type that is not routed, is routed already, or has adapters on the
            FFN whose experts are to be routed.
        SpaceError: experts do not divide a width, or a capacity is larger than what there is.
    """
    base = base_of(model, "add_routing")
    if not isinstance(config, RoutingConfig):
        raise SpaceError(f"config is a {type(config).__name__}; give RoutingConfig(mlp_tokens=[...], ...)")
    _check(base, config)
    fresh = not any(isinstance(module, PartHolder) and _layer_of(module) for module in base.modules())
    if fresh:
        make_layer_parts(base, check=lambda shapes: _specs(config, shapes))
    holders = [module for module in base.modules() if isinstance(module, PartHolder) and _layer_of(module)]
    layers = [_layer_of(holder) for holder in holders]
    specs = _specs(config, [layer.full for layer in layers])
    for number, spec in specs.items():
        _check_layer(layers[number], spec)
    if freeze:
        adapters = {id(parameter) for parameter in adapter_parameters(base)}
        for parameter in base.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in adapters)
    with seeded(seed):
        attach_routers(
            base.base_model, holders, specs, model_type=base.config.model_type, hidden_size=layers[0].hidden_size
        )
    for number in specs:
        holder: Any = holders[number]
        holder.routers.to(next(holder.parameters()).device)
        holder.elastic_parts = [*holder.elastic_parts, RouterPart(layers[number], holder.routers, config.share)]
    base.__dict__[ROUTING_CONFIG] = config
    return Supernet(model)


def _layer_of(module: PartHolder) -> Any:
    """The elastic layer among the parts that a module holds."""
    return next((part for part in module.elastic_parts if isinstance(part, LayerPart)), None)


def _check(base: PreTrainedModel, config: RoutingConfig) -> None:
    model_type = base.config.model_type
    if model_type not in LAYOUTS or model_type.startswith("elastic_"):
        known = ", ".join(name for name in LAYOUTS if not name.startswith("elastic_"))
        raise UnsupportedModelError(f"model type {model_type!r} cannot be routed; known: {known}")
    if routers_of(base):
        raise UnsupportedModelError("the model has routers already; use hf_elastic.Supernet(model) for its handle")
    if getattr(base.config, "chunk_size_feed_forward", 0):
        raise UnsupportedModelError(
            "config.chunk_size_feed_forward cuts rows into pieces, of which no router sees all; set it to 0"
        )
    if config.heads is not None and getattr(base.config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError("config.reorder_and_upcast_attn=True goes with no routed heads; set it to False")
    if config.experts is not None:
        for number, layer in enumerate(layers_of(base, family_of(base))):
            require_bare_ffn(layer, LAYOUTS[model_type], where=f"layer {number}")


def _specs(config: RoutingConfig, shapes: Sequence[LayerShape]) -> dict[int, dict[str, Any]]:
    """What the routers of each routed layer decide about."""
    return {
        number: stated_routers(config, heads=shapes[number].num_key_value_heads, width=shapes[number].intermediate_size)
        for number in config.routed_layers(len(shapes))
    }


def stated_routers(config: RoutingConfig, *, heads: int, width: int) -> dict[str, Any]:
    """What the routers of a layer with so many (groups of) heads and neurons decide about.

    Raises:
        SpaceError: the layer has fewer, or experts do not divide its neurons.
    """
    spec: dict[str, Any] = {"hidden": config.router_hidden_size if config.router == "mlp" else None}
    for kind in config.kinds:
        whole = PERCENT
        if kind == "heads":
            whole = heads
        elif kind == "experts":
            whole = config.experts_of(width)
        spec[kind] = {"of": whole, "values": list(config.values_of(kind, whole)), "active": whole}
    return spec


def _check_layer(layer: LayerPart, spec: Mapping[str, Any]) -> None:
    """Experts are runs of neurons, so a narrower FFN must hold whole ones."""
    if "experts" not in spec:
        return
    name, each = layer.names.intermediate_size, layer.full.intermediate_size // spec["experts"]["of"]
    for choice in layer.choices:
        if choice.name == name and (bad := [width for width in choice.values if int(width) % each]):
            raise SpaceError(
                f"{name}={bad} cuts through experts of {each} neurons; make the model elastic with "
                f"ElasticConfig(multiple_of={each}), or choose fewer experts"
            )


def set_capacity(supernet: Supernet, **capacities: int | float) -> None:
    """Turns the dial: makes capacities active in all layers until something else is.

    Args:
        supernet: handle of a routed model.
        capacities: by kind (``mlp_tokens=0.7, heads=3``); each must be one of those that the routers were made for.
            What is not named stays.

    Raises:
        UnsupportedModelError: it is no handle, or of a model without routers.
        SpaceError: a kind is not routed, or a capacity is not one of its values.
    """
    require_routers(supernet, "set_capacity")
    active: dict[str, Any] = dict(supernet.active)
    for kind, value in capacities.items():
        parts = [part for part in supernet.router_parts if kind in part.routers]
        if not parts:
            routed = sorted({name for part in supernet.router_parts for name in part.routers})
            raise SpaceError(f"{kind} is not routed in this model; routed: {', '.join(routed)}")
        for part in parts:
            router = part.routers[kind]
            found = resolve_capacity(kind, value, whole=router.of)
            if found not in router.values:
                shown = shown_capacities(kind, router.values)
                raise SpaceError(f"{kind}={value} is no capacity of the routers; they have {shown}")
            active[part.choice_name(kind)] = found
    supernet.set_active(supernet.space.canonical(active))
