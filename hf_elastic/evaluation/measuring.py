"""What the objectives of this package share: running a subnet, what they depend on, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from hf_elastic.cost_objectives import related_costs
from hf_elastic.errors import DataError
from hf_elastic.fingerprints import fingerprint, state_of
from hf_elastic.layers import evaluating, without_autocast
from hf_elastic.search import Objective
from hf_elastic.search.objective import Direction
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

Batch = Mapping[str, Tensor]


@contextmanager
def running(supernet: Supernet, architecture: Architecture, *also: nn.Module) -> Iterator[Any]:
    """Yields the model with a subnet active, in evaluation mode, in the dtype of its weights, without gradients.

    Args:
        also: modules around the model whose mode changes with it.
    """
    whole = nn.ModuleList([supernet.model, *also])
    with evaluating(whole), without_autocast(whole), torch.no_grad(), supernet.activate(architecture):
        yield supernet.model


def labelled(validation: Iterable[Batch]) -> list[Batch]:
    """Lists batches, each with ``labels``.

    Raises:
        DataError: there is no batch, or one has no ``labels``.
    """
    batches = list(validation)
    if not batches:
        raise DataError("validation holds no batch; pass a list of at least one")
    for index, batch in enumerate(batches):
        if "labels" not in batch:
            raise DataError(f"validation batch {index} has no 'labels', only {sorted(batch)}")
    return batches


def measured(
    supernet: Supernet,
    name: str,
    function: Callable[[Architecture], float],
    *,
    direction: Direction,
    batches: Sequence[Batch] = (),
    rest: Iterable[object] = (),
) -> Objective:
    """Makes an objective whose fingerprint tells weights, :func:`state_of` and data apart.

    Args:
        rest: whatever else its values depend on.
    """
    return Objective(
        name, function, direction, related=lambda: related_costs(supernet),
        fingerprint=fingerprint(supernet.model, batches, rest=[state_of(supernet), *rest]),
    )  # fmt: skip


def required(package: str, *, extra: str, what: str) -> Any:
    """Imports an optional package.

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there, what it needs is not
        raise DataError(f'{what} needs {package}, which is not installed: pip install "hf-elastic[{extra}]"') from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
