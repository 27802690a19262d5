"""Cuts a subnet out of a supernet: a smaller model of the stock class, or of its family's static class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_elastic.checkpoint.block_extraction import block_model
from hf_elastic.checkpoint.merging import base_weights, check_merge
from hf_elastic.checkpoint.router_extraction import check_routed_form, stated_routing
from hf_elastic.checkpoint.static_form import static_class, static_config, static_state_dict
from hf_elastic.errors import ExportError
from hf_elastic.layers import Region, take_region
from hf_elastic.packed_format import attach_grid, quantised_layers
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.quantgrid import SCALE, ZERO, grid_of
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import shaped
from hf_elastic.supernet import Loadability, Supernet, shapes_loadability


def extract(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    *,
    loadability: Loadability | None = None,
    merge: bool | None = None,
    allow_dense: bool = False,
) -> PreTrainedModel:
    """Copies a subnet into a model of its own, compact: nothing of it is larger than the subnet.

    Layers skipped as a whole are dropped and the others renumbered; routers go with the layers in which something is
    routed. The model equals the supernet with the
    architecture active (fp32: within 1e-5 · max|logit|), is in evaluation mode, on the supernet's device and
    in its dtype, and shares no memory with it.

    Args:
        supernet: where from; unchanged.
        architecture: what.
        loadability: form of the result. By default the stock class if it holds the subnet, else the static
            class (``remote-code``), the only one that holds routers; ``stock-padded`` gives the stock class, padded
            with zeros.
        merge: what becomes of adapters, to be said where the model has such: ``True``: those in use are merged into
            the weights, ``W + s B A`` of the active rank; ``False``: they are left out
            (:func:`hf_elastic.extract_adapter` gives them). SparsePEFT's keep every zero of the base and
            QA-SparsePEFT's its grid of integers, which the result carries on.
        allow_dense: whether adapters that were trained without ``sparse=True`` may fill the zeros of a sparse base.

    Returns:
        A stock model, or an ``elastic_bert`` / ``elastic_llama`` / ``elastic_gpt2`` one.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        ExportError: the form asked for cannot hold it, the model has no static class, or ``merge`` is not said, cannot
            be done, or was done already.
    """
    point = supernet.point(architecture)
    natural = supernet.loadability(point)
    form = loadability or ("stock" if natural == "stock" else "remote-code")
    check_routed_form(supernet, point, form)
    _check_form(supernet, form, natural)
    check_merge(supernet, merge, form=form, allow_dense=allow_dense)
    with supernet.plain() as parent:
        if supernet.block_parts:
            kind, config, path = block_model(supernet, point, form=form)
            return build_model(kind, config, state=path, parent=parent)
        if not supernet.layer_parts:
            with supernet.activate(point):
                weights = {name: tensor.clone() for name, tensor in base_weights(supernet, merge=bool(merge)).items()}
            return _with_grids(type(parent), copy.deepcopy(parent.config), state=weights, parent=parent)
        cut = _Cut.of(supernet, point, merge=bool(merge))
        if form == "remote-code":
            routing, routers = stated_routing(supernet, point, [part for part, _ in cut.kept])
            state = cut.state_dict(None) | {cut.prefix + name: tensor for name, tensor in routers.items()}
            return _static_model(supernet, cut, state, routing=routing)
        target = cut.kept[0][1] if form == "stock" else _padded_shape(supernet, cut)
        state = cut.state_dict(target if form == "stock-padded" else None)
        return build_model(type(parent), _stock_config(supernet, cut, target), state=state, parent=parent)


def extract_shapes(
    supernet: Supernet, shapes: Sequence[LayerShape], *, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Makes a model of the class, config and memory layout that :func:`extract` gives, to be timed and not to be used.

    Its parameters are compact, and views of the parent's: any number of such models needs no memory. What they hold
    means nothing, which does not change how long a forward takes.

    Args:
        supernet: where from; unchanged.
        shapes: one per layer, also such as no architecture of the space has; skipped layers are dropped.
        weights: the parent's ``state_dict()``, where it is to be in another dtype or on another device.

    Returns:
        A stock model if the stock class holds the shapes without padding, else one of the static class.

    Raises:
        ExportError: that would be the static class, and the model has none.
    """
    with supernet.activate(supernet.space.largest()), supernet.plain(), ExitStack() as stack:
        for part, shape in zip(supernet.layer_parts, shapes, strict=True):
            stack.enter_context(shaped(part, shape))
        cut = _Cut.active(supernet, shapes, weights or supernet.base.state_dict())
        state = cut.views()
    first = supernet.layer_parts[0]
    natural = shapes_loadability(tuple(shapes), supernet.family, hidden_size=first.hidden_size, parent=first.full)
    if natural != "stock":
        return _static_model(supernet, cut, state)
    config = _stock_config(supernet, cut, cut.kept[0][1])
    return build_model(type(supernet.base), config, state=state, parent=supernet.base)


def _check_form(supernet: Supernet, form: str, natural: Loadability) -> None:
    ladder = ("stock", "stock-padded", "remote-code")
    if form not in ladder:
        raise ExportError(f"loadability={form!r} is not one of {', '.join(ladder)}")
    if ladder.index(form) < ladder.index(natural):
        raise ExportError(
            f"a {form!r} checkpoint cannot hold this architecture, it needs {natural!r}; "
            f"export with loadability={natural!r}, or "
            f"search a space made with ElasticConfig(loadability={form!r})"
        )
    if supernet.block_parts:
        return
    if form == "remote-code" and (not supernet.layer_parts or supernet.family.static_type is None):
        raise ExportError(
            f"{type(supernet.base).__name__} has no static class to hold per-layer shapes; "
            "make the space with ElasticConfig(loadability='stock') or export with loadability='stock-padded'"
        )


@dataclass(frozen=True)
class _Cut:
    """Layers that stay, their shapes, and the weights to cut them from."""

    kept: tuple[tuple[LayerPart, LayerShape], ...]
    regions: dict[str, Region]
    weights: dict[str, Tensor]
    prefix: str

    @classmethod
    def of(cls, supernet: Supernet, architecture: Architecture, *, merge: bool = False) -> _Cut:
        with supernet.activate(architecture):
            return cls.active(supernet, supernet.layer_shapes(architecture), base_weights(supernet, merge=merge))

    @classmethod
    def active(cls, supernet: Supernet, shapes: Sequence[LayerShape], weights: Mapping[str, Tensor]) -> _Cut:
        """The cut along what is active now, which has these shapes."""
        pairs = list(zip(supernet.layer_parts, shapes, strict=True))
        kept = tuple((part, shape) for part, shape in pairs if not shape.skipped) or (pairs[0],)
        names = {id(module): name for name, module in supernet.base.named_modules()}
        prefix = names[id(pairs[0][0].layer)].rsplit(".", 1)[0] + "."
        return cls(kept, supernet.active_regions(supernet.base), dict(weights), prefix)

    def state_dict(self, target: LayerShape | None) -> dict[str, Tensor]:
        """Weights of the kept layers, renumbered; cut, or padded with zeros to ``target``."""
        state = {name: t.clone() for name, t in self.weights.items() if not name.startswith(self.prefix)}
        for number, (part, _) in enumerate(self.kept):
            old, new = f"{self.prefix}{part.index}.", f"{self.prefix}{number}."
            boxes = _boxes_of(part, target) if target is not None else {}
            for name in part.layer.state_dict():
                tensor, region = self.weights[old + name], self.regions.get(old + name)
                if target is not None:
                    state[new + name] = _padded(tensor, region, boxes.get(name))
                elif region is None:
                    state[new + name] = tensor.clone()
                elif region:
                    state[new + name] = take_region(tensor, region)
        return state

    def views(self) -> dict[str, Tensor]:
        """As :meth:`state_dict` in names and shapes, but of the memory of the parent, with whatever it holds there."""
        state = {name: t for name, t in self.weights.items() if not name.startswith(self.prefix)}
        for number, (part, shape) in enumerate(self.kept):
            old, new = f"{self.prefix}{part.index}.", f"{self.prefix}{number}."
            row = part.family  # a space without skips has no region that says so
            absent = (() if shape.attention else row.skip_attention) + (() if shape.mlp else row.skip_mlp)
            for name in part.layer.state_dict():
                tensor, region = self.weights[old + name], self.regions.get(old + name)
                if not name.startswith(tuple(f"{rule.module}." for rule in absent)):
                    state[new + name] = tensor if region is None else _resized(tensor, region)
        return state


def _boxes_of(part: LayerPart, shape: LayerShape) -> dict[str, Region]:
    """Boxes of a layer's projections if it had ``shape``, by name within the layer."""
    before = part.current
    part.apply(shape)
    try:
        return {
            f"{path}.{name}": region
            for path, projection in part.projections().items()
            for name, region in projection.active_region().items()
        }
    finally:
        part.apply(before)


def _resized(tensor: Tensor, region: Region) -> Tensor:
    """The first entries of a tensor in the shape that its region has when it is cut out."""
    shape = take_region(tensor.to("meta"), region).shape
    return tensor.flatten()[: shape.numel()].view(shape)


def _padded(tensor: Tensor, region: Region | None, target: Region | None) -> Tensor:
    """Zeroes what is not in ``region``, then cuts to the boxes of ``target`` (a norm has none and stays)."""
    if target is None:
        return tensor.clone()
    kept = torch.zeros_like(tensor)
    for box in region if region is not None else (tuple(slice(None) for _ in tensor.shape),):
        kept[box] = tensor[box]
    return take_region(kept, target)


def _padded_shape(supernet: Supernet, cut: _Cut) -> LayerShape:
    """Smallest uniform shape that holds every kept layer and that the stock config can say."""
    full, row = supernet.layer_parts[0].full, supernet.family
    ratio = full.num_attention_heads // full.num_key_value_heads
    hidden = supernet.layer_parts[0].hidden_size
    widths = [shape.intermediate_size for _, shape in cut.kept if shape.mlp]
    wanted = max((shape.num_key_value_heads for _, shape in cut.kept if shape.attention), default=1)
    groups = full.num_key_value_heads
    if row.stock_heads == "any":
        groups = wanted
    elif row.stock_heads == "divides_hidden":
        groups = next(k for k in range(wanted, groups + 1) if hidden % (k * ratio) == 0 or k == groups)
    return LayerShape(max(widths, default=full.intermediate_size), groups * ratio, groups)


def _stock_config(supernet: Supernet, cut: _Cut, shape: LayerShape) -> PreTrainedConfig:
    """Copies the parent's config with the uniform shape and the number of layers of the subnet."""
    row, config = supernet.family, copy.deepcopy(supernet.base.config)
    full = supernet.layer_parts[0].full
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[part.index] for part, _ in cut.kept]
    setattr(config, row.config_name("num_hidden_layers"), len(cut.kept))
    if shape.intermediate_size != full.intermediate_size:
        setattr(config, row.config_name("intermediate_size"), shape.intermediate_size)
    if shape.num_attention_heads != full.num_attention_heads:
        config.head_dim = supernet.layer_parts[0].head_dim
        config.num_key_value_heads = shape.num_key_value_heads
        setattr(config, row.config_name("num_attention_heads"), shape.num_attention_heads)
    return config


def _static_model(
    supernet: Supernet, cut: _Cut, weights: Mapping[str, Tensor], *, routing: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    row, parent = supernet.family, supernet.base
    source = copy.deepcopy(parent.config)
    types = getattr(source, "layer_types", None)
    if types is not None:
        source.layer_types = [types[part.index] for part, _ in cut.kept]
    setattr(source, row.config_name("num_hidden_layers"), len(cut.kept))
    per_layer: dict[int, dict[str, Any]] = {}
    for number, (_, shape) in enumerate(cut.kept):
        entry: dict[str, Any] = {
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.num_attention_heads,
        }
        if row.grouped:
            entry["num_key_value_heads"] = shape.num_key_value_heads
        skipped = [kind for kind, there in (("attention", shape.attention), ("mlp", shape.mlp)) if not there]
        per_layer[number] = {**entry, **({"skip": skipped} if skipped else {})}
    config = static_config(source, per_layer, parent=parent, routing=routing)
    state = static_state_dict(parent, weights)
    return build_model(static_class(parent), config, state=state, parent=parent)


def build_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    state: dict[str, Tensor],
    parent: PreTrainedModel,
) -> PreTrainedModel:
    """Makes a model of a config around tensors as they are, with what the config does not say taken from a parent."""
    config._attn_implementation = parent.config._attn_implementation
    if not _shares_what_config_ties(parent):
        config.tie_word_embeddings = False
        state = _unshared(state)
    with no_init_weights():
        model = model_class(config)
    for name, child in dict(model.named_children()).items():
        if getattr(parent, name, child) is None:  # BertModel(config, add_pooling_layer=False)
            setattr(model, name, None)
    # The tensors themselves are taken over: each keeps its dtype, and buffers that no checkpoint holds (the
    # frequencies of rotary embeddings) stay in float32 as from_pretrained leaves them.
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if parent.can_generate() and model.can_generate():
        model.generation_config = copy.deepcopy(parent.generation_config)
    return _moved(model, next(iter(state.values())).device).eval()


def _with_grids(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    state: dict[str, Tensor],
    parent: PreTrainedModel,
) -> PreTrainedModel:
    """As :func:`build_model`, of a parent whose layers may carry grids of integers; those of the model are the same."""
    layers = quantised_layers(parent)
    for name in layers:
        for key in (SCALE, ZERO):
            state.pop(f"{name}.{key}", None)
    model = build_model(model_class, config, state=state, parent=parent)
    for name, layer in layers.items():
        grid, module = grid_of(layer, name=name), model.get_submodule(name)
        assert grid is not None and isinstance(module, nn.Linear)
        attach_grid(module, grid)
        module.requires_grad_(False)
    return model


def _shares_what_config_ties(model: PreTrainedModel) -> bool:
    """Whether the parameters that the config ties are one; those that were stored apart are loaded apart."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    return all(_same_memory(model.get_parameter(a), model.get_parameter(b)) for a, b in pairs.items())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that stand under a second name, as the static class may name one tensor twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        apart[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    return apart


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    module: nn.Module = model  # transformers types `to` so that mypy cannot read it
    module.to(device)
    return model
