"""Models whose layers may have routers, as ``routing`` of their config says; see ``elastic_routing.py``.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from .elastic_routed import attach_routers
from .elastic_routers import Router, RouterScores, routers_of
from .elastic_routing import resolve_capacity, routed_layers, shown_capacities

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base
else:
    # At run time a plain mixin: the stock classes among the bases must stay before PreTrainedModel.
    Base = object


class RoutedModel(Base):
    """Mixin for a model whose layers get routers as its config says."""

    # Scores decide between tokens that are close; the routers are small.
    _keep_in_fp32_modules_strict = ["routers"]

    def attach_stated_routers(self, layers: Iterable[nn.Module]) -> None:
        """Gives the layers of a base model the routers of its config, before ``post_init``."""
        if specs := routed_layers(self.config):
            attach_routers(self, layers, specs, model_type=self.config.model_type, hidden_size=self.config.hidden_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RouterScores):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Router) and module.thresholds is not None:
            init.constant_(module.thresholds, torch.nan)

    def set_capacity(self, **capacities: int | float) -> None:
        """Turns the dial: makes capacities active in all layers, and in the config, so that they are saved.

        Args:
            capacities: by kind (``mlp_tokens=0.7, heads=3``): a fraction, or of heads and experts a count; each must be
                one of those that the routers of every layer were made for. What is not named stays.

        Raises:
            ValueError: a kind is not routed, or a capacity is not one of its values; nothing has changed then.
        """
        routing, layers = copy.deepcopy(self.config.routing), routed_layers(self.config)
        found: list[tuple[int, str, int]] = []
        for kind, value in capacities.items():
            having = [number for number in layers if kind in layers[number] and kind != "hidden"]
            if not having:
                routed = sorted({name for stated in layers.values() for name in stated} - {"hidden"})
                raise ValueError(f"{kind} is not routed in this model; routed: {', '.join(routed) or 'nothing'}")
            for number in having:
                stated = layers[number][kind]
                units = resolve_capacity(kind, value, whole=stated["of"])
                if units not in stated["values"]:
                    known = shown_capacities(kind, stated["values"])
                    raise ValueError(
                        f"{kind}={value} is no capacity of the routers of layer {number}; these have {known}"
                    )
                found.append((number, kind, units))
        held = dict(zip(sorted(layers), routers_of(self), strict=True))
        for number, kind, units in found:
            held[number].active[kind] = routing["layers"][str(number)][kind]["active"] = units
        self.config.routing = routing
