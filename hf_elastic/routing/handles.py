"""What functions on routers ask of the handle that they are given."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.models.elastic_routed import LAYOUTS, Layout
from hf_elastic.models.elastic_routers import LayerRouters
from hf_elastic.routers import ROUTERS
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
            for path, module in _ffn_projections(layer, LAYOUTS[base.config.model_type]):
                _require_plain(f"{name}.{path}", module)


def _ffn_projections(layer: nn.Module, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    for name in layout.neurons:
        yield f"{layout.mlp_in}.{name}", layer.get_submodule(f"{layout.mlp_in}.{name}")
    yield f"{layout.mlp_out}.{layout.down}", layer.get_submodule(f"{layout.mlp_out}.{layout.down}")


def _require_plain(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear | Conv1D):
        raise UnsupportedModelError(
            f"{name} has an adapter, and an expert is a part of it; adapt the projections of attention alone, or leave "
            "experts out"
        )
