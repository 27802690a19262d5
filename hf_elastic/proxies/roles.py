"""Which modules of a model a proxy looks at: projections of attention and FFN, activations, the table of positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.families import FAMILIES, Family, family_of, layers_of
from hf_elastic.layers import ElasticProjection


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

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections of attention and FFNs."""
        return (*self.attention, *self.ffn)


def row_of(model_type: str, family: Family | None = None) -> Family:
    """The family row of a stock or a static model type.

    Raises:
        UnsupportedModelError: there is none.
    """
    for row in (*([family] if family else []), *FAMILIES):
        if model_type in (row.model_type, row.static_type):
            return row
    raise UnsupportedModelError(
        f"model type {model_type!r} has no family row; known: {', '.join(row.model_type for row in FAMILIES)}; "
        "pass family=hf_elastic.Family(...) for another one"
    )


def roles_of(model: PreTrainedModel, family: Family | None = None) -> Roles:
    """Roles in a stock model or in one that hf_elastic has exported; what a layer skips has none.

    Raises:
        UnsupportedModelError: the model's type has no family row, or a subnet of a supernet is active in it.
    """
    row = family_of(model, row_of(model.config.model_type, family))
    _require_whole(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(layers_of(model, row))

    def named(*paths: str) -> tuple[str, ...]:
        found = [_optional(layer, path) for layer in layers for path in dict.fromkeys(paths)]
        return tuple(names[id(module)] for module in found if module is not None)

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
    )


def _optional(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _positions(model: PreTrainedModel) -> str | None:
    """The embedding with as many rows as the model has positions, besides that of the tokens."""
    rows = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == rows:
            return name
    return None


def _require_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, ElasticProjection):
            continue
        if (module.active_in_features, module.active_out_features) != module.whole_features:
            raise UnsupportedModelError(
                f"a subnet is active in {name}; score subnets with hf_elastic.objectives.proxy(supernet, ...), or the "
                "whole model outside of activate"
            )


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Weight of a projection, ``(O, I)``, or ``(I, O)`` of a Conv1D.

    Raises:
        UnsupportedModelError: it is no matrix of floats, as where a quantised layer is packed.
    """
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():  # noqa: PLR2004
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) holds no matrix of floats to score; unpack a quantised model first"
        )
    return weight
