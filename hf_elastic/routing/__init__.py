"""ElastiFormer (arXiv 2411.15281): routers on a frozen model, so that its compute is chosen at inference."""

from hf_elastic.routing.adding import add_routing, set_capacity
from hf_elastic.routing.calibration import CalibratedShare, CalibrationReport, calibrate_routing
from hf_elastic.routing.configuration import RoutingConfig
from hf_elastic.routing.files import load_routers
from hf_elastic.routing.fitting import FittedRouter, RouterFit, fit_routers
from hf_elastic.routing.statistics import RouterStatistics, RoutingStatistics, routing_statistics
from hf_elastic.routing.unfreezing import train_routers

__all__ = [
    "CalibratedShare",
    "CalibrationReport",
    "FittedRouter",
    "RouterFit",
    "RouterStatistics",
    "RoutingConfig",
    "RoutingStatistics",
    "add_routing",
    "calibrate_routing",
    "fit_routers",
    "load_routers",
    "routing_statistics",
    "set_capacity",
    "train_routers",
]
