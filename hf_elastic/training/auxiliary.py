"""What the routers of a model add to the loss while they are trained (ElastiFormer, arXiv 2411.15281)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_elastic.errors import TrainingError
from hf_elastic.models.elastic_routers import TOKENS, UNITS
from hf_elastic.supernet import Supernet


@dataclass(frozen=True)
class RoutingLosses:
    r"""Factors of the losses that routers add while they are trained.

    The loss of a subnet is that of the labels or the distillation, and
    :math:`\lambda_t \, \mathrm{mean}_r \, T_r + \lambda_b \, \mathrm{mean}_r \, B_r` over its routers that are not
    bypassed: the binary cross entropy :math:`T` of routers of tokens in causal models, and the balance :math:`B` of
    routers of heads and experts, see :class:`~hf_elastic.models.elastic_routers.LayerRouters`. The *mean* over routers
    depends neither on the depth nor on what is routed.

    That ElastiFormer adds such a cross entropy is known; its factor, and whether there is a balance, is not. Switch
    Transformers (arXiv 2101.03961) use a factor of 0.01 for the balance. Since thresholds are calibrated after training
    (:func:`hf_elastic.calibrate_routing`), the cross entropy is of little use, and it draws the weights of tokens away
    from 1: on stories260K half of the FFN's tokens, after 150 steps, give a perplexity of 26, 27 and 38 for factors of
    0.01, 0.1 and 1.

    Args:
        tokens: :math:`\lambda_t`, at least 0.
        balance: :math:`\lambda_b`, at least 0.

    Raises:
        TrainingError: A factor is negative or no number.
    """

    tokens: float = 0.01
    balance: float = 0.01

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise TrainingError(f"RoutingLosses({entry.name}={value!r}) must be a number of at least 0")


def forget_thresholds(supernet: Supernet) -> None:
    """Make routers uncalibrated where training begins: thresholds are of the scores there were."""
    for router in (part.routers[kind] for part in supernet.router_parts for kind in part.routers):
        if router.thresholds is not None:
            router.thresholds.fill_(math.nan)


class RouterTerm:
    """What the routers add to the loss of the subnet that ran last in training, and a graph where it has none.

    A subnet that bypasses all routers may use nothing that is trained. Its outputs get a graph of zeros then, so that
    backward passes, and ranks that wait for one another, need know nothing of it.

    Args:
        supernet: whose routers.
        weights: factors; by default :class:`RoutingLosses`.

    Raises:
        TrainingError: Factors are given, but there are no routers.
    """

    def __init__(self, supernet: Supernet, weights: RoutingLosses | None) -> None:
        if weights is not None and not isinstance(weights, RoutingLosses):
            raise TrainingError(f"routing={weights!r} is no RoutingLosses; give RoutingLosses(tokens=..., balance=...)")
        if weights is not None and not supernet.router_parts:
            raise TrainingError("the model has no routers to weight losses of; leave routing= out, or call add_routing")
        self._supernet = supernet
        self._weights = weights or RoutingLosses()
        self._found: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the losses of forwards inside the block that have a graph, before another forward forgets them."""
        if not self._supernet.router_parts:
            yield
            return
        handle = self._supernet.model.register_forward_hook(self.hear)
        try:
            yield
        finally:
            handle.remove()
            self.forget()

    def forget(self) -> None:
        """Drop what was heard."""
        self._found = None

    def hear(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Keep the losses of the forward that ends; a forward hook of the supernet's model."""
        if not (torch.is_grad_enabled() and module.training):
            return None
        self._found = self._weighted()
        unused = self._unused()
        return None if unused is None else anchored(output, unused)

    def added_to(self, loss: Tensor, *, divisor: float = 1) -> Tensor:
        """Return a loss with what was heard last, divided by ``divisor``, added to it."""
        return loss if self._found is None else loss + self._found.to(loss.device) / divisor

    def _weighted(self) -> Tensor | None:
        parts, factors = self._supernet.router_parts, self._weights
        routers = [part.routers for part in parts]
        awaited = {
            "tokens": factors.tokens if any(each.causal and each.routes(*TOKENS) for each in routers) else 0.0,
            "balance": factors.balance if any(each.routes(*UNITS) for each in routers) else 0.0,
        }
        total: Tensor | None = None
        for kind, factor in awaited.items():
            if not factor:
                continue
            found = routers[0].context.losses.get(kind)
            if not found:
                raise TrainingError(
                    "activations are checkpointed by reentrant autograd, which hides the losses of routers; set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            term = factor * torch.stack([each.to(found[0].device) for each in found]).mean()
            total = term if total is None else total + term
        return total

    def _unused(self) -> nn.Parameter | None:
        """The smallest parameter that is trained, where the active subnet uses none of them."""
        regions = self._supernet.active_regions()
        trained = [(name, p) for name, p in self._supernet.model.named_parameters() if p.requires_grad]
        if not trained or any(regions.get(name) != () for name, _ in trained):
            return None
        return min((parameter for _, parameter in trained), key=torch.numel)


def anchored(value: Any, parameter: nn.Parameter) -> Any:
    """Return an output of which every number depends on a parameter, by a factor of zero."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value + (0 * parameter.flatten()[:1].sum()).to(value.device, value.dtype)
    if type(value) in (tuple, list):
        return type(value)(anchored(each, parameter) for each in value)
    if isinstance(value, Mapping):
        found: Any = value
        for name in list(value):
            found[name] = anchored(value[name], parameter)
    return value
