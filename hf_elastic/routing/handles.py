"""What functions on routers ask of the handle that they are given."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.models.elastic_routed import LAYOUTS, Layout
from hf_elastic.models.elastic_routers import LayerRouters
from hf_elastic.routers import ROUTERS
from hf_elastic.streams import Batch
from hf_elastic.supernet import Supernet


def require_routers(supernet: Supernet, function: str) -> None:
    """Refuses what is no handle of a model with routers.

    Raises:
        UnsupportedModelError: it is none.
    """
    if not isinstance(supernet, Supernet):
        raise UnsupportedModelError(
            f"{function} takes the handle that add_routing returned, or Supernet(model), got a "
            f"{type(supernet).__name__}; an exported routed model has its own model.set_capacity(...)"
        )
    if not supernet.router_parts:
        raise UnsupportedModelError(f"the model has no routers for {function}; call hf_elastic.add_routing first")
    require_bare_experts(supernet.base)


def base_of(model: nn.Module, function: str) -> PreTrainedModel:
    """The transformers model in what was given, which may be a ``PeftModel``.

    Raises:
        UnsupportedModelError: there is none.
    """
    if isinstance(model, Supernet):
        raise UnsupportedModelError(f"{function} takes the model itself, not its handle; give supernet.model")
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise UnsupportedModelError(f"{function} takes a transformers model, got a {type(model).__name__}")
    return found


def require_bare_experts(base: PreTrainedModel) -> None:
    """Refuses adapters on an FFN with experts, of which single ones could not be computed.

    Raises:
        UnsupportedModelError: there are some.
    """
    for name, layer in base.named_modules():
        routers = layer._modules.get(ROUTERS)
        if isinstance(routers, LayerRouters) and "experts" in routers:
            require_bare_ffn(layer, LAYOUTS[base.config.model_type], where=name)


def require_bare_ffn(layer: nn.Module, layout: Layout, *, where: str) -> None:
    """Refuses adapters on the FFN of a layer.

    Raises:
        UnsupportedModelError: there are some.
    """
    paths = [f"{layout.mlp_in}.{name}" for name in layout.neurons]
    for path in (*paths, f"{layout.mlp_out}.{layout.down}"):
        if not isinstance(layer.get_submodule(path), nn.Linear | Conv1D):
            raise UnsupportedModelError(
                f"{path} of {where} has an adapter, and an expert is a part of it; adapt the projections of attention "
                "alone, or leave experts out"
            )


def check_mask(batch: Batch) -> None:
    """Checks that the mask of a batch, if it has one, says which tokens are padding.

    Raises:
        DataError: it has another shape.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise DataError(f"the attention_mask is {tuple(mask.shape)}; give one of shape (batch, tokens)")
