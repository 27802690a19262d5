"""What functions on routers ask of the handle that they are given."""

from __future__ import annotations

from hf_elastic.errors import UnsupportedModelError
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
