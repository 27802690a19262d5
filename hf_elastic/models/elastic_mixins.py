"""Class swap: a module's class becomes a subclass with a mixin before it, its parameters and their names stay.

This file travels with a checkpoint as remote code: it imports nothing but torch and files beside it.
"""

from typing import Any

from torch import nn

_mixed: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Mixin(nn.Module):
    """What is put before a class; objects of the joined class can be pickled and copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle is told how to make it again.
        cls, mixins = type(self), []
        while (parts := vars(cls).get("_mixed_from")) is not None:
            cls, mixin = parts
            mixins.append(mixin)
        return rebuild, (cls, *reversed(mixins)), self.__getstate__()


def with_mixin(cls: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that has ``mixin`` before ``cls``, the same one at every call."""
    if (cls, mixin) not in _mixed:
        # The stock name is kept: FSDP and device maps look layer classes up by name.
        members = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_mixed_from": (cls, mixin)}
        _mixed[cls, mixin] = type(cls.__name__, (mixin, cls), members)
    return _mixed[cls, mixin]


def rebuild(cls: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    """Makes an empty object of a class with mixins before it, the last one foremost; for pickle."""
    for mixin in mixins:
        cls = with_mixin(cls, mixin)
    return cls.__new__(cls)
