"""``train_routers``: routers that something else has frozen are trained again."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.models.elastic_routers import routers_of
from hf_elastic.routing.handles import base_of, require_bare_experts

Model = TypeVar("Model", bound=nn.Module)


def train_routers(model: Model) -> Model:
    """Lets all routers of a model be trained, in place, and returns the model.

    ``get_peft_model`` freezes whatever is no adapter, routers too; call this behind it.

    Raises:
        UnsupportedModelError: the model has no routers, or adapters on an FFN whose experts are routed.
    """
    base = base_of(model, "train_routers")
    found = routers_of(base)
    require_bare_experts(base)
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no routers; call hf_elastic.add_routing first")
    for routers in found:
        routers.requires_grad_()
    return model
