"""What is active in a model, and the thread that may change it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

from torch import nn

from hf_elastic.errors import ActivationError
from hf_elastic.parts import AdapterPart, ElasticPart
from hf_elastic.space import Architecture, SearchSpace


class Activation:
    """What is active in a model, of which parts and space, and which thread may change it; all handles share it.

    A thread owns the model while it has an activation open, and after :meth:`hf_elastic.Supernet.set_active`, as long
    as it lives.
    """

    def __init__(self, active: Architecture, space: SearchSpace) -> None:
        self.active, self.space = active, space
        self.parts: tuple[ElasticPart, ...] = ()
        self.adapter_parts: tuple[AdapterPart, ...] = ()  # kept, since asking a part for its protocol takes long
        self.adapters: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0
        self._pinned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Activation:
        return Activation(self.active, self.space)  # a copy of the model may live in another thread

    def __reduce__(self) -> tuple[type[Activation], tuple[Architecture, SearchSpace]]:
        return Activation, (self.active, self.space)

    def enter(self) -> None:
        """Makes this thread the owner, until :meth:`leave` was called as often."""
        with self._lock:
            self._claim()
            self._depth += 1

    def leave(self) -> None:
        """Ends one :meth:`enter`; does nothing in a thread that meanwhile counted as dead."""
        with self._lock:
            if self._owner is threading.current_thread():
                self._depth -= 1

    def pin(self) -> None:
        """Makes this thread the owner as long as it lives."""
        with self._lock:
            self._claim()
            self._pinned = self._pinned or not self._depth  # inside a block, its end restores what was

    def _claim(self) -> None:
        thread = threading.current_thread()
        if self._owner is thread:
            return
        held = self._depth > 0 or self._pinned
        if self._owner is not None and self._owner.is_alive() and held:
            raise ActivationError(
                "this supernet is used from a second thread, which would change the subnet under the first; "
                "give each thread a copy: Supernet(copy.deepcopy(supernet.model))"
            )
        self._owner, self._depth, self._pinned = thread, 0, False


def adapter_names(base: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that peft has put onto a model."""
    return tuple(sorted(vars(base).get("peft_config") or ()))


@runtime_checkable
class AdaptedLayer(Protocol):
    """A module that peft put around another one."""

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of what it holds besides that one."""


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all that is off where adapters are, ``modules_to_save`` too."""
    for module in model.modules():
        for name in module.adapter_layer_names if isinstance(module, AdaptedLayer) else ():
            held = attrgetter(name)(module)
            if isinstance(held, nn.Module):
                yield from held.parameters()
