"""What the whole parent makes of calibration batches, layer by layer: one pass serves many repairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from hf_elastic.errors import DataError
from hf_elastic.fingerprints import fingerprint
from hf_elastic.parts import LayerPart
from hf_elastic.streams import MEMORY_LIMIT, Batch, HiddenStates, LayerCalls, LayerRunner, Sublayers, checked_batches
from hf_elastic.supernet import Supernet


@dataclass(frozen=True)
class LayerStreams:
    """The residual stream of one batch in one layer of the parent, each of ``(B, T, D)``.

    Attributes:
        attention: right behind the attention's output is added.
        mlp: right behind the FFN's.
        after: what leaves the layer.
    """

    attention: Tensor
    mlp: Tensor
    after: Tensor

    @classmethod
    def seen(cls, watched: Sublayers, hidden: Tensor, after: Tensor) -> LayerStreams:
        """Of a layer that was watched while ``hidden`` went through it and came out as ``after``."""
        return cls(watched.stream("attention", hidden), watched.stream("mlp", hidden), after)


class ParentStreams:
    """Calibration batches, and what the parent makes of them.

    Where all of it fits into memory it is worked out once and remembered, so that a repair costs what the subnet
    costs; otherwise each repair runs the parent again, and one layer of it is held at a time. It belongs to the weights
    that the supernet has now: once they are trained or sorted it is refused.

    Args:
        supernet: its largest subnet is the parent.
        batches: ``input_ids`` of ``(B, T)`` and what else the model takes.
        memory: bytes that may be remembered; 0 for a single repair.

    Attributes:
        batches: the batches.
        runner: runs the layers.

    Raises:
        DataError: there is no batch, or one is no dict of tensors.
    """

    def __init__(self, supernet: Supernet, batches: Iterable[Batch], *, memory: int = MEMORY_LIMIT) -> None:
        self.batches = checked_batches(batches)
        self.runner = LayerRunner(supernet)
        self._supernet, self._weights = supernet, fingerprint(supernet.model)
        tokens = sum(batch["input_ids"].numel() for batch in self.batches if "input_ids" in batch)
        per_token = sum(3 * part.hidden_size for part in supernet.layer_parts) * supernet.model.dtype.itemsize
        self._remembers = tokens * per_token <= memory
        self._layers: dict[tuple[int, int], LayerStreams] = {}
        self._calls: dict[int, LayerCalls] = {}

    def require(self, supernet: Supernet) -> None:
        """Checks whose they are.

        Raises:
            DataError: they are of another supernet, or of other weights than it has now.
        """
        if supernet is not self._supernet:
            raise DataError("the streams are of another supernet; make a ParentStreams of this one")
        if fingerprint(supernet.model) != self._weights:
            raise DataError("the weights of the supernet have changed since its streams were made; make them again")

    def calls(self, index: int) -> LayerCalls:
        """How the model calls its layers on a batch."""
        found = self._calls.get(index)
        if found is None:
            found = self.runner.calls(self.batches[index])
            if self._remembers:
                self._calls[index] = found
        return found

    def remember(self, part: LayerPart, index: int, streams: LayerStreams) -> None:
        """Keeps what another pass of the whole parent found, where there is room."""
        if self._remembers:
            self._layers[part.index, index] = streams

    def recalled(self, part: LayerPart, index: int) -> LayerStreams | None:
        """What is remembered of a layer and a batch."""
        return self._layers.get((part.index, index))

    @contextmanager
    def walk(self, *, memory: int = MEMORY_LIMIT // 4) -> Iterator[ParentWalk]:
        """One pass through the parent, layer after layer.

        Args:
            memory: bytes of hidden states that the pass holds, if nothing is remembered; the rest waits on disk.
        """
        states = HiddenStates(memory=memory)
        try:
            yield ParentWalk(self, states)
        finally:
            states.close()


def streams_of(supernet: Supernet, batches: Iterable[Batch] | ParentStreams) -> ParentStreams:
    """The streams of a single use, or those that are shared.

    Raises:
        DataError: as :class:`ParentStreams`, or they are shared by other weights.
    """
    if not isinstance(batches, ParentStreams):
        return ParentStreams(supernet, batches, memory=0)
    batches.require(supernet)
    return batches


class ParentWalk:
    """A pass through the parent; see :meth:`ParentStreams.walk`.

    Layers are asked for in order, each for all batches, while the weights of the layer asked for are the parent's.
    """

    def __init__(self, parent: ParentStreams, states: HiddenStates) -> None:
        self.parent, self._states = parent, states

    def through(self, part: LayerPart, index: int) -> LayerStreams:
        """Takes a batch through the next layer."""
        found = self.parent.recalled(part, index)
        if found is None:
            found = self._run(part, index)
            self.parent.remember(part, index, found)
        self._states[index] = found.after
        return found

    def _run(self, part: LayerPart, index: int) -> LayerStreams:
        calls = self.parent.calls(index)
        hidden = calls.hidden if part.index == 0 else self._states[index]
        with Sublayers(part) as seen:
            after = self.parent.runner.run(part.index, hidden, calls)
        return LayerStreams.seen(seen, hidden, after)

    def last(self, index: int) -> Tensor:
        """What left the last layer that the batch was taken through, ``(B, T, D)``."""
        return self._states[index]
