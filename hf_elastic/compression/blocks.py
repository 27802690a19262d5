"""Changes a model block by block: each block is shown what the blocks changed before it make of calibration text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import CompressionError, DataError, UnsupportedModelError
from hf_elastic.families import Family, family_of, layers_of
from hf_elastic.layers import PartHolder, evaluating
from hf_elastic.models.elastic_routers import LayerRouters
from hf_elastic.packed_format import is_quantised
from hf_elastic.routers import require_unrouted
from hf_elastic.streams import MEMORY_LIMIT, Batch, HiddenStates, LayerRunner, checked_batches
from hf_elastic.supernet import Supernet

Progress = Callable[[int, int], object]
"""Called with how many blocks are done, and of how many."""


@dataclass(frozen=True)
class Projection:
    """One linear layer of a block.

    Attributes:
        name: in the model, such as ``model.layers.3.mlp.up_proj``.
        module: an ``nn.Linear`` or a ``Conv1D``.
    """

    name: str
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """As ``(O, I)``; a view, so that what is written into it is written into the model."""
        weight = self.module.weight.data
        return weight.t() if isinstance(self.module, Conv1D) else weight


@dataclass(frozen=True)
class LayerInputs:
    """What enters the projections of one block, batch after batch; each loop over it runs the block anew.

    Attributes:
        projections: of the block.
        run: runs the block on the calibration batches, one after another.
        rows: takes the real tokens of what entered while a batch ran: ``(B, T, I) -> (tokens, I)``.
    """

    projections: tuple[Projection, ...]
    run: Callable[[], Iterator[Callable[[Tensor], Tensor]]]

    def __iter__(self) -> Iterator[list[tuple[tuple[str, ...], Tensor]]]:
        """Yields for each batch the names of projections that got the same input, and that input, ``(tokens, I)``."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for projection in self.projections:
                hook = _recorder(seen, projection.name)
                stack.callback(projection.module.register_forward_pre_hook(hook).remove)
            for rows in self.run():
                together: dict[int, list[str]] = {}
                for name, tensor in seen.items():
                    together.setdefault(id(tensor), []).append(name)
                yield [(tuple(names), _finite(rows(seen[names[0]]), names[0])) for names in together.values()]
                seen.clear()


def _finite(rows: Tensor, name: str) -> Tensor:
    """Refuses activations that no score and no grid can be made of."""
    if not bool(torch.isfinite(rows).all()):
        raise CompressionError(
            f"what enters {name} on the calibration batches is NaN or infinite; load the model again, in float32"
        )
    return rows


def _recorder(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]

    return record


def layer_by_layer(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    change: Callable[[LayerInputs], None],
    *,
    family: Family | None = None,
    memory: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> None:
    """Lets ``change`` alter block after block; the next one is run on what the altered ones give.

    Beside the model, the hidden states of the batches are kept (on disk beyond ``memory`` bytes), and what ``change``
    keeps of one block.

    Args:
        model: plain, or elastic with its largest subnet active; weights change in place.
        batches: calibration inputs; ``None``: ``change`` needs no data, and iterating over its inputs is an error.
        change: alters the weights of one block.
        family: row of the model's layout; by default that of its type.
        memory: bytes of hidden states in memory.
        progress: called after each block.

    Raises:
        DataError: a batch is no dict of tensors, or has tokens that the model does not know.
    """
    row = family_of(model, family)
    layers = layers_of(model, row)
    names = {id(module): name for name, module in model.named_modules()}
    walk = None if batches is None else _Walk(model, checked_batches(batches), family=row, memory=memory)
    with evaluating(model), torch.no_grad(), _largest(model), walk or nullcontext():
        for index, layer in enumerate(layers):
            found = tuple(Projection(names[id(m)], m) for m in layer.modules() if isinstance(m, nn.Linear | Conv1D))
            change(LayerInputs(found, _nothing if walk is None else walk.runs(index)))
            if walk is not None and index + 1 < len(layers):
                walk.advance(index)
            if progress is not None:
                progress(index + 1, len(layers))


def _nothing() -> Iterator[Any]:
    raise CompressionError("this method needs calibration batches; pass batches=[...]")


def _largest(model: PreTrainedModel) -> Any:
    """Makes the largest subnet active where the model is elastic."""
    if not any(isinstance(module, PartHolder) for module in model.modules()):
        return nullcontext()
    supernet = Supernet(model)
    return supernet.activate(supernet.space.largest())


class _Walk:
    """Hidden states of the batches in front of the block that is at work."""

    def __init__(self, model: PreTrainedModel, data: list[Batch], *, family: Family, memory: int) -> None:
        self.runner, self.data = LayerRunner(model, family=family), data
        self.states = HiddenStates(memory=memory)

    def __enter__(self) -> _Walk:
        tokens = 0
        for number, batch in enumerate(self.data):
            calls = self.runner.calls(batch)
            self.states[number] = calls.hidden
            tokens += int(calls.kept.sum())
        if not tokens:
            raise DataError("the calibration batches hold padding only (attention_mask is 0); pass batches with text")
        return self

    def __exit__(self, *_: object) -> None:
        self.states.close()

    def runs(self, index: int) -> Callable[[], Iterator[Callable[[Tensor], Tensor]]]:
        """Runs one block on every batch; what it makes is not kept."""

        def run() -> Iterator[Callable[[Tensor], Tensor]]:
            for number, batch in enumerate(self.data):
                calls = self.runner.calls(batch)
                self.runner.run(index, self.states[number], calls)
                yield calls.rows

        return run

    def advance(self, index: int) -> None:
        """Takes the batches through one block."""
        for number, batch in enumerate(self.data):
            self.states[number] = self.runner.run(index, self.states[number], self.runner.calls(batch))


def check_compressible(model: nn.Module, *, what: str) -> PreTrainedModel:
    """Refuses what cannot be compressed in place.

    Raises:
        UnsupportedModelError: no transformers model, one with adapters or routers, or a quantised one.
        CompressionError: a parameter is NaN or infinite.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{what} takes a transformers model without adapters, got a {type(model).__name__}")
    require_unrouted(model, what)
    for name, module in model.named_modules():
        if "base_layer" in dict(module.named_children()):
            raise UnsupportedModelError(f"{name} has an adapter, whose base {what} would change; do it before adapters")
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if is_quantised(module) or weight is not None and not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name} is quantised already; {what} needs the float model (prune first, then quantise)"
            )
        for inner, parameter in own.items():
            if not bool(torch.isfinite(parameter).all()):
                raise CompressionError(f"the {inner} of {name} is NaN or infinite; load a checkpoint that is finite")
    return model


def by_pattern(given: Mapping[str, Any], names: Sequence[str], *, what: str) -> dict[str, Any]:
    """What each module is given, by the first pattern that names it: the end of its name, or a regular expression.

    Args:
        given: values by pattern.
        names: of modules.
        what: the argument, for the error.

    Raises:
        CompressionError: a pattern names no module.
    """
    found: dict[str, Any] = {}
    for pattern, value in given.items():
        try:
            matched = [name for name in names if re.fullmatch(rf"(.*\.)?(?:{pattern})", name)]
        except re.error as error:
            raise CompressionError(f"{what}: {pattern!r} is no regular expression ({error})") from error
        if not matched:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise CompressionError(f"{what} names {pattern!r}, but the layers to be compressed end in {leaves}")
        for name in matched:
            found.setdefault(name, value)
    return found


def projection_names(model: PreTrainedModel, family: Family | None) -> dict[str, nn.Module]:
    """The linear layers inside the blocks, by name; those of routers are none."""
    layers = layers_of(model, family_of(model, family))
    routers = {id(m) for held in layers.modules() if isinstance(held, LayerRouters) for m in held.modules()}
    names = {id(module): name for name, module in model.named_modules() if id(module) not in routers}
    return {names[id(m)]: m for m in layers.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) in names}
