"""Who teaches the subnets of a supernet: a given model, the largest subnet, or the model without what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from hf_elastic.activation import adapter_names, adapter_parameters
from hf_elastic.errors import TrainingError
from hf_elastic.layers import evaluating
from hf_elastic.supernet import Supernet
from hf_elastic.training.sublayers import Sublayers, captured
from hf_elastic.training.targets import Distillation, Signal, detached


@runtime_checkable
class AdaptedModel(Protocol):
    """A model whose adapters can be switched off, such as peft's ``PeftModel``."""

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Switch them off inside the block."""


class Teacher:
    """Gives what the subnets of a step are compared with.

    Args:
        plan: says who teaches.
        supernet: that is taught; unless a model is given, the teacher too.

    Raises:
        TrainingError: The teacher is the supernet itself.
    """

    def __init__(self, plan: Distillation, supernet: Supernet) -> None:
        self._plan = plan
        self._supernet = supernet
        if plan.teacher is supernet.model:
            raise TrainingError(
                "the teacher is the supernet itself; leave teacher=None to distil from its largest subnet"
            )

    @property
    def in_place(self) -> bool:
        """Whether it is the largest subnet, which learns itself, from labels."""
        return self._plan.teacher is None

    def prepare(self, device: torch.device | str) -> None:
        """Put a given model where the supernet is, in evaluation mode."""
        given = self._plan.given
        if given is not None:
            module: nn.Module = given  # transformers types `to` so that mypy cannot read it
            module.to(device)
            module.eval()

    def check(self) -> None:
        """Check that ``teacher="parent"`` is what the model was before training.

        Raises:
            TrainingError: A parameter is trained that cannot be bypassed, or adapters cannot be switched off.
        """
        if self._plan.teacher != "parent":
            return
        model = self._supernet.model
        if adapter_names(self._supernet.base) and not isinstance(model, AdaptedModel):
            raise TrainingError(
                f"the adapters in this {type(model).__name__} cannot be switched off, which teacher='parent' needs; "
                "give Supernet(peft_model) with the PeftModel that holds them"
            )
        extra = {id(parameter) for parameter in _added_parameters(self._supernet)}
        trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in extra]
        if trained:
            raise TrainingError(
                f"{trained[0]} is trained, a parameter of the parent itself ({len(trained)} are), which "
                "teacher='parent' is to keep; freeze them by requires_grad_(False), or give another teacher"
            )

    def signal(
        self, inputs: Mapping[str, Any], *, labels: Iterable[str] = ("labels",), place: Sublayers | None = None
    ) -> Signal:
        """Run the teacher without gradient; afterwards the model is as it was.

        Args:
            inputs: of the student.
            labels: names of those that are labels.
            place: where the teacher's states are, for the relational target.
        """
        plan, left_out = self._plan, set(labels)
        plain = {name: value for name, value in inputs.items() if name not in left_out}
        with torch.no_grad(), ExitStack() as stack:
            model = plan.given
            if model is None:
                model = stack.enter_context(self._largest())
            seen = stack.enter_context(captured(place))
            outputs = model(**plain, **plan.forward_arguments)
            return detached(plan.signal(outputs, plain, states=seen.states()))

    @contextmanager
    def _largest(self) -> Iterator[Any]:
        """The largest subnet in evaluation mode, of the parent without adapters."""
        model = self._supernet.model
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(self._supernet.activate(self._supernet.space.largest()))
            if self._plan.teacher == "parent":
                stack.enter_context(adapters_off(model))
            yield model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off inside the block; parameters that are frozen now are so behind it, which peft forgets."""
    with ExitStack() as stack:
        if isinstance(model, AdaptedModel):
            stack.callback(_restore, [(parameter, parameter.requires_grad) for parameter in model.parameters()])
            stack.enter_context(model.disable_adapter())
        yield


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trained in flags:
        if parameter.requires_grad != trained:
            parameter.requires_grad_(trained)


def _added_parameters(supernet: Supernet) -> Iterator[nn.Parameter]:
    """Parameters of routers, and of adapters."""
    for part in supernet.router_parts:
        yield from part.routers.parameters()
    yield from adapter_parameters(supernet.model)
