"""Optimizer steps that leave alone what no subnet of the step used.

Gradients outside the active slices are exactly zero, but weight decay knows nothing of slices: a stock
optimizer would shrink weights that have not been used since the last step. :class:`ActiveSliceStep` applies
the decay to the active slices itself and hides it from the optimizer for the duration of its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_elastic.errors import TrainingError
from hf_elastic.supernet import Supernet
from hf_elastic.training.regions import ActiveUnion, Boxes

# Of these we know how they decay: coupled ones add wd·p to the gradient, decoupled ones (AdamW, and groups
# that set "decoupled_weight_decay") multiply p by 1 - lr·wd first.
_KNOWN = (
    torch.optim.Adam,  # AdamW is a subclass
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
)


_RESTRICTED = "_hf_elastic_restricted"  # attribute of an optimizer


class _Saved(NamedTuple):
    """A parameter before the step and the part of it that may move."""

    parameter: Tensor
    before: Tensor
    boxes: Boxes


class ActiveSliceStep:
    r"""Restrict an optimizer step to the union of the slices that were active since the last one (promise 5).

    For a parameter :math:`p` with a gradient and active entries :math:`A`, with learning rate :math:`\gamma`
    and decay :math:`\lambda` of its group:

    * decoupled (AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2):
      :math:`p_A \leftarrow (1 - \gamma \lambda) p_A` before the step;
    * coupled (SGD, Adam, ...): :math:`g_A \leftarrow g_A + \lambda p_A`.

    A group of which everything is active is left to the optimizer, so that a step of the largest subnet *is*
    the stock step, whichever kernel runs. The group's ``weight_decay`` is 0 only while the optimizer steps;
    what is saved and resumed is a stock optimizer state.

    Args:
        supernet: whose slices.
        freeze_inactive: whether entries outside the union keep their value even if momentum would move them.
            A slice that was never active does not move in either case, since its moments are zero.
    """

    def __init__(self, supernet: Supernet, *, freeze_inactive: bool = False) -> None:
        self._supernet = supernet
        self._freeze = freeze_inactive
        self._union = ActiveUnion()
        self._parameters: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._hidden: list[tuple[dict[str, Any], Any]] = []
        self._saved: list[_Saved] = []

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer's decay can be restricted, and forget what an earlier run left.

        Raises:
            TrainingError: The optimizer does not hold the supernet's parameters, decays in a way we do not
                know, or may skip steps (fp16 loss scaling).
        """
        self.release()
        self._parameters = dict(self._supernet.model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        elastic = self._elastic_names()
        inner = _unwrapped(optimizer)
        vars(inner)[_RESTRICTED] = True
        held = {
            self._names[id(p)]
            for group in inner.param_groups
            for p in group["params"]
            if id(p) in self._names
        }
        if not held:
            raise TrainingError(
                f"the {type(inner).__name__} holds no parameter of the supernet; "
                "build it over supernet.model.parameters()"
            )
        decayed = [
            group
            for group in inner.param_groups
            if _decay(group) and any(self._names.get(id(p)) in elastic for p in group["params"])
        ]
        if (decayed or self._freeze) and any(isinstance(self._parameters[name], DTensor) for name in elastic):
            raise TrainingError(
                "the supernet's parameters are sharded (DTensor), so that neither decay nor freeze_inactive can follow "
                "active slices; set weight_decay=0 and freeze_inactive=False, or train with DDP"
            )
        if not decayed:
            return
        if not isinstance(inner, _KNOWN):
            known = ", ".join(["AdamW", *(cls.__name__ for cls in _KNOWN)])
            raise TrainingError(
                f"{type(inner).__name__} would decay inactive slices (weight_decay={_decay(decayed[0])}); "
                f"set weight_decay=0 or use one of {known}"
            )
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None:
            raise TrainingError(
                "fp16 loss scaling may skip a step whose weight decay was applied already; "
                "use bf16=True or weight_decay=0"
            )

    def _elastic_names(self) -> set[str]:
        """Return the parameters of which a subnet may leave something out."""
        names = set(self._supernet.active_regions())
        with self._supernet.activate(self._supernet.space.smallest()):
            return names | set(self._supernet.active_regions())

    def record(self) -> None:
        """Add what the active subnet uses to the union."""
        self._union.add(self._supernet.active_regions(), self._parameters)

    def forget(self) -> None:
        """Start a new union."""
        self._union.clear()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the decay to the union, after clipping and right before the optimizer steps."""
        self.after_step()  # nothing, unless the last step raised
        if not self._union:
            return
        inner = _unwrapped(optimizer)
        for group in inner.param_groups:
            active = [(p, self._boxes(p)) for p in group["params"] if p.grad is not None]
            if self._freeze:
                self._saved += [
                    _Saved(p, p.detach().clone(), boxes) for p, boxes in active if boxes is not None
                ]
            if _decay(group) and any(boxes is not None for _, boxes in active):
                self._apply(group, active)

    @torch.no_grad()
    def _apply(self, group: dict[str, Any], active: list[tuple[Tensor, Boxes | None]]) -> None:
        decay, rate = group["weight_decay"], group["lr"]
        sign = -1 if group.get("maximize") else 1  # a maximizer negates the gradient before it adds the decay
        decoupled = bool(group.get("decoupled_weight_decay"))
        for parameter, boxes in active:
            for box in _indices(boxes):
                if decoupled:
                    parameter[box].mul_(1 - rate * decay)
                else:
                    assert parameter.grad is not None
                    parameter.grad[box].add_(parameter[box], alpha=sign * decay)
        group["weight_decay"] = type(decay)(0) if isinstance(decay, int | float) else torch.zeros_like(decay)
        self._hidden.append((group, decay))

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the groups their decay back, and frozen slices their values."""
        for group, decay in self._hidden:
            group["weight_decay"] = decay
        self._hidden.clear()
        for parameter, before, boxes in self._saved:
            moved = [parameter[box].clone() for box in boxes]
            parameter.copy_(before)
            for box, values in zip(boxes, moved, strict=True):
                parameter[box] = values
        self._saved.clear()

    def release(self) -> None:
        """Undo what a step that did not end has left behind."""
        self._saved.clear()  # the weights are as good as the optimizer left them; only its settings are ours
        self.after_step()
        self.forget()

    def _boxes(self, parameter: Tensor) -> Boxes | None:
        name = self._names.get(id(parameter))
        return None if name is None else self._union.boxes(name, parameter)


def check_restricted(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer which decays weights leaves those alone that are not in use.

    Raises:
        TrainingError: It decays, and no :class:`ActiveSliceStep` restricts it.
    """
    inner = _unwrapped(optimizer)
    if any(_decay(group) for group in inner.param_groups) and _RESTRICTED not in vars(inner):
        raise TrainingError(
            "weight decay would move neurons that are not in use; add a SubnetSamplingCallback beside this one, use "
            "ElasticTrainer, or set weight_decay=0"
        )


def _indices(boxes: Boxes | None) -> Iterator[Any]:
    """Yield what to index a parameter with to reach its active entries."""
    return iter((...,)) if boxes is None else iter(boxes)


def _decay(group: dict[str, Any]) -> float:
    return float(group.get("weight_decay", 0.0))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
