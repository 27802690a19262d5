"""Which modules of a model a proxy looks at: projections of attention and FFN, activations, the table of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.families import FAMILIES, Family, family_of, layers_of, submodule
from hf_elastic.layers import ElasticProjection, SkippableModule
from hf_elastic.models.elastic_blocks import CandidateBlocks, SlicedConv1D, SlicedLinear
from hf_elastic.packed_format import is_packed, is_quantised

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Roles:
    """Names of modules, as ``named_modules`` has them. A model of one's own passes its own.

    Attributes:
        attention: projections of attention, query first.
        heads: those of them whose outputs enter attention: query, key, value.
        ffn: projections of FFNs.
        ffn_out: those of them whose inputs are FFN neurons.
        layers: how many layers there are.
        hidden_size: width of the residual stream.
        fused: heads that one projection of ``heads`` holds side by side (3 for GPT-2's ``c_attn``).
        positions: the table of learned positions, if there is one.
        causal: whether the model decodes left to right.
        queries: those of ``heads`` that hold queries; of fused ones, whose outputs begin with them.
    """

    attention: tuple[str, ...]
    heads: tuple[str, ...]
    ffn: tuple[str, ...]
    ffn_out: tuple[str, ...]
    layers: int
    hidden_size: int
    fused: int = 1
    positions: str | None = None
    causal: bool = False
    queries: tuple[str, ...] = ()

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections of attention and FFNs."""
        return (*self.attention, *self.ffn)


def row_of(model_type: str, family: Family | None = None) -> Family:
    """The family row of a stock or a static model type: the one given, except for a static type that families share.

    Raises:
        UnsupportedModelError: there is none.
    """
    if family is not None and model_type != family.static_type:
        return family
    # Modules of a static type have the names of the first family that it stands for.
    for row in FAMILIES:
        if model_type in (row.model_type, row.static_type):
            return row
    raise UnsupportedModelError(
        f"model type {model_type!r} has no family row; known: {', '.join(row.model_type for row in FAMILIES)}; "
        "pass family=hf_elastic.Family(...) for another one"
    )


def roles_of(model: PreTrainedModel, family: Family | None = None) -> Roles:
    """Roles in a stock model or in one that hf_elastic has exported; what a layer of such a one skips has none.

    Raises:
        UnsupportedModelError: the model's type has no family row, its row names what it has not, its weights are
            packed, or a subnet of a supernet is active in it.
    """
    row = family_of(model, row_of(model.config.model_type, family))
    require_whole(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(layers_of(model, row))
    may_lack = model.config.model_type == row.static_type

    def named(*paths: str) -> tuple[str, ...]:
        wanted = [(layer, path) for layer in layers for path in dict.fromkeys(paths)]
        found = [
            submodule(layer, path, family=row)
            for layer, path in wanted
            if not may_lack or path in dict(layer.named_modules())
        ]
        return tuple(names[id(module)] for module in found)

    return Roles(
        attention=named(row.query, row.key, row.value, row.attention_out),
        heads=named(row.query, row.key, row.value),
        ffn=named(*row.ffn_in, row.ffn_out),
        ffn_out=named(row.ffn_out),
        layers=len(layers),
        hidden_size=int(model.config.hidden_size),
        fused=3 if row.fused else 1,
        positions=_positions(model),
        causal=row.causal,
        queries=named(row.query),
    )


def _positions(model: PreTrainedModel) -> str | None:
    """The embedding with as many rows as the model has positions, besides that of the tokens."""
    rows = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == rows:
            return name
    return None


def require_whole(model: nn.Module) -> None:
    """Refuses a model of which only a part is active, or whose weights cannot be replaced for one call.

    Raises:
        UnsupportedModelError: a subnet of a supernet is active in it, it holds candidate blocks or a fused projection
            of two parts, or its weights are packed.
    """
    require_single_blocks(model)
    for name, module in model.named_modules():
        if _is_reduced(module):
            raise UnsupportedModelError(
                f"a subnet is active in {name}; score subnets with hf_elastic.objectives.proxy(supernet, ...), or the "
                "whole model outside of activate"
            )
        # compressed-tensors lets a layer that it has loaded quantise whatever weight it is given.
        if is_quantised(module) and (is_packed(module) or "forward" in vars(module)):
            raise UnsupportedModelError(f"the weight of {name} is packed; call hf_elastic.unpack_(model) first")


def require_single_blocks(model: nn.Module) -> None:
    """Refuses layers of several blocks, and fused projections that do not hold query, key and value.

    Raises:
        UnsupportedModelError: the model has such.
    """
    for name, module in model.named_modules():
        if isinstance(module, CandidateBlocks):
            raise UnsupportedModelError(
                f"{name} holds several blocks of which one is computed; score the model that hf_elastic.extract gives"
            )
        if isinstance(module, SlicedConv1D) and module.shared:
            raise UnsupportedModelError(
                f"{name} holds a projection that attention uses twice, which proxies cannot tell apart; score blocks "
                "with three projections"
            )


def _is_reduced(module: nn.Module) -> bool:
    if isinstance(module, ElasticProjection):
        return (module.active_in_features, module.active_out_features) != module.whole_features
    if isinstance(module, SlicedLinear | SlicedConv1D):
        return module.rows is not None or module.columns is not None
    return isinstance(module, SkippableModule) and module.skipped


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module that a role names.

    Raises:
        UnsupportedModelError: the model has none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {name!r}, which its roles name; see named_modules()"
        ) from None


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Weight of a projection, ``(O, I)``, or ``(I, O)`` of a Conv1D; on the meta device it holds no values.

    Raises:
        UnsupportedModelError: it is no matrix of floats, as where a quantised layer is packed.
    """
    module = module_of(model, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in FLOATS:  # noqa: PLR2004
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) holds no matrix of floats to score; unpack a quantised model first"
        )
    return weight


def loaded_weight(model: nn.Module, name: str) -> Tensor:
    """As :func:`weight_of`, of a weight whose values are there.

    Raises:
        UnsupportedModelError: it is no matrix of floats, or on the meta device.
    """
    weight = weight_of(model, name)
    if weight.is_meta:
        raise UnsupportedModelError(f"the weight of {name} is on the meta device and has no values; load the model")
    return weight
