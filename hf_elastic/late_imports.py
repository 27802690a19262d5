"""Names of a module that are imported when they are first used, so that importing the module loads none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def on_first_use(
    namespace: dict[str, Any], homes: Mapping[str, Iterable[str]], *, modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the ``__getattr__`` and ``__dir__`` of a module.

    Args:
        namespace: its ``globals()``; what was imported is kept there.
        homes: the names by where they are defined, as seen from the module's package: ``"search.samplers"``.
        modules: modules of that package that are names, too.
    """
    own, package = namespace["__name__"], namespace["__package__"]
    source = {name: home for home, names in homes.items() for name in names}
    known = frozenset(modules)

    def found(name: str) -> Any:
        if name in source:
            value = getattr(import_module(f".{source[name]}", package), name)
        elif name in known:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *namespace["__all__"]})

    return found, names
