"""ElastiFormer (arXiv 2411.15281): routers on a frozen model, so that its compute is chosen at inference."""

from hf_elastic.routing.adding import add_routing, set_capacity
from hf_elastic.routing.configuration import RoutingConfig

__all__ = ["RoutingConfig", "add_routing", "set_capacity"]
