"""Takes one path out of a supernet of candidate blocks: a static model, or the stock one where that holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_elastic.blocks import BlockPart, BlockShape, config_heads
from hf_elastic.checkpoint.static_form import stock_class, stock_config
from hf_elastic.space import Architecture
from hf_elastic.supernet import Loadability, Supernet


def block_model(
    supernet: Supernet, architecture: Architecture, *, form: Loadability
) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Tensor]]:
    """Class, config and weights of one path, compact; padded to one shape where the form is ``stock-padded``."""
    parent, shapes = supernet.base, supernet.block_shapes(architecture)
    state = path_state(supernet, architecture)
    config = path_config(parent.config, shapes)
    if "add_pooling_layer" in config.to_dict():  # a model may have been made with another one than its config says
        config.add_pooling_layer = "pooler" in dict(parent.base_model.named_children())
    if form == "remote-code":
        return type(parent), config, state
    width = max(shape.intermediate_size for shape in shapes)
    if form == "stock-padded":
        for part, shape in zip(supernet.block_parts, shapes, strict=True):
            _pad(state, part, shape, width=width, prefix=f"{_prefix(supernet)}{part.index}.")
    return stock_class(type(parent)), stock_config(parent.config, intermediate_size=width), state


def path_config(config: Any, shapes: tuple[BlockShape, ...]) -> Any:
    """Config of the static model with one block per layer; what all layers share is said once."""
    names, fields = config.per_layer_names, config.to_dict()  # what no layer says otherwise, also where layers differ
    entries: dict[int, dict[str, Any]] = {}
    for number, shape in enumerate(shapes):
        size = "bottleneck_head_dim" if shape.block.startswith("bottleneck") else "head_dim"
        entry = {"block": shape.block, names["intermediate_size"]: shape.intermediate_size}
        entry |= {names["num_attention_heads"]: shape.num_attention_heads, size: shape.head_dim}
        entries[number] = {name: value for name, value in entry.items() if value != fields[name]}
    shared = _shared(entries)
    fields |= shared
    per_layer = {n: {k: v for k, v in entry.items() if k not in shared} for n, entry in entries.items()}
    fields["per_layer_config"] = {n: entry for n, entry in per_layer.items() if entry} or None
    return type(config)(**{name: value for name, value in fields.items() if name not in _NOT_CARRIED})


_NOT_CARRIED = frozenset({
    "model_type", "architectures", "auto_map", "transformers_version", "candidate_blocks", "candidate_widths",
    "candidate_heads",
})  # fmt: skip


def _shared(entries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What every layer says alike."""
    first = entries[0]
    return {name: value for name, value in first.items() if all(e.get(name) == value for e in entries.values())}


def path_state(supernet: Supernet, architecture: Architecture) -> dict[str, Tensor]:
    """Weights of one path by their names in the static model, copied."""
    prefix = _prefix(supernet)
    state = {n: t.clone() for n, t in supernet.base.state_dict().items() if not n.startswith(prefix)}
    for part in supernet.block_parts:
        with torch.no_grad():
            for name, tensor in part.tensors(part.chosen(architecture)).items():
                state[f"{prefix}{part.index}.{name}"] = tensor.detach().clone()
    return state


def _prefix(supernet: Supernet) -> str:
    names = {id(module): name for name, module in supernet.base.named_modules()}
    return names[id(supernet.block_parts[0].layer)].rsplit(".", 1)[0] + "."


def _pad(state: dict[str, Tensor], part: BlockPart, shape: BlockShape, *, width: int, prefix: str) -> None:
    """Fills up the projections of a standard block with zeros, to a common width and the heads of the config."""
    roles, heads = part.roles, config_heads(part.model.config)
    more, missing = width - shape.intermediate_size, (heads - shape.num_attention_heads) * shape.head_dim
    transposed = part.model.config.model_type == "elastic_gpt2"
    fused = 3 if roles.query == roles.key else 1
    for path in dict.fromkeys((roles.query, roles.key, roles.value)):
        for kind in ("weight", "bias"):
            name, axis = f"{prefix}{path}.{kind}", -1 if transposed else 0
            pieces = [_extended(piece, missing, axis) for piece in state[name].chunk(fused, dim=axis)]
            state[name] = torch.cat(pieces, dim=axis)
    for path, size in ((roles.attention_out, missing), (roles.ffn_out, more)):
        state[f"{prefix}{path}.weight"] = _extended(state[f"{prefix}{path}.weight"], size, 0 if transposed else 1)
    for kind in ("weight", "bias"):
        name = f"{prefix}{roles.ffn_in}.{kind}"
        state[name] = _extended(state[name], more, -1 if transposed else 0)


def _extended(tensor: Tensor, size: int, axis: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
