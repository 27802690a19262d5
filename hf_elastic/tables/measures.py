"""What "damage" means: errors of a cut model's outputs against its parent's, on held-out batches; 0 is the parent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_elastic.distillation import Pooling, pooled
from hf_elastic.errors import DataError
from hf_elastic.streams import MEMORY_LIMIT, Batch, HiddenStates, LayerRunner
from hf_elastic.supernet import Supernet

Last = Iterable[tuple[Batch, Tensor]]
"""Batches with what leaves the last layer, ``(B, T, D)``."""


class Measure(Protocol):
    """A measure of damage: sees the parent first, then cut models."""

    def start(self, runner: LayerRunner, held: Sequence[Batch]) -> None:
        """Notes what the parent gives on the held-out batches."""

    def damage(self, runner: LayerRunner, last: Last) -> float:
        """Damage of the model as it is set now, which gives ``last`` on the same batches in the same order."""

    def close(self) -> None:
        """Frees what was noted."""


def layer_outputs(runner: LayerRunner, held: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Runs the layers as they are set now: each batch with what leaves the last one."""
    for batch in held:
        calls = runner.calls(batch)
        hidden = calls.hidden
        for number in range(len(runner.layers)):
            hidden = runner.run(number, hidden, calls)
        yield batch, hidden


class _AgainstParent:
    """Keeps what leaves the parent's last layer."""

    def __init__(self, *, memory: int = MEMORY_LIMIT) -> None:
        self._parent = HiddenStates(memory=memory)

    def start(self, runner: LayerRunner, held: Sequence[Batch]) -> None:
        tokens = 0
        for index, (batch, hidden) in enumerate(layer_outputs(runner, held)):
            self._parent[index] = hidden
            tokens += int(_kept(batch, hidden).sum())
        if not tokens:
            raise DataError("the held-out batches have no real token: their attention_mask is 0 everywhere")

    def close(self) -> None:
        self._parent.close()


class HiddenError(_AgainstParent):
    """``Σ‖h - h'‖² / Σ‖h'‖²`` over the real tokens behind the last layer."""

    def damage(self, runner: LayerRunner, last: Last) -> float:
        error, size = 0.0, 0.0
        for index, (batch, hidden) in enumerate(last):
            kept = _kept(batch, hidden)
            wanted = self._parent[index][kept].double()  # (tokens, D)
            error += float((hidden[kept].double() - wanted).square().sum())
            size += float(wanted.square().sum())
        if not size:
            raise DataError(
                "the parent's last hidden states are zero on the held-out batches, so there is no share of them to "
                "miss; check the weights and the batches"
            )
        return error / size


class Divergence(_AgainstParent):
    """Mean ``KL(p' ‖ p)`` in nats per real token, of the parent's next-token (or masked-token) distribution."""

    def damage(self, runner: LayerRunner, last: Last) -> float:
        total, tokens = 0.0, 0
        for index, (batch, hidden) in enumerate(last):
            kept = _kept(batch, hidden)
            ours, theirs = (
                runner.finish(batch, states).logits[kept].float().log_softmax(-1)  # (tokens, V)
                for states in (hidden, self._parent[index])
            )
            total += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
            tokens += len(ours)
        return total / tokens


class SimilarityError:
    """Mean squared error of the cosine similarities of all pairs of sentences.

    What users of sentence encoders measure is the structure of similarities; the cosine to the parent's embeddings
    is a poor guide to it.
    """

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self._parent = torch.empty(0)

    def start(self, runner: LayerRunner, held: Sequence[Batch]) -> None:
        self._parent = self._similarities(runner, layer_outputs(runner, held))

    def damage(self, runner: LayerRunner, last: Last) -> float:
        return float((self._similarities(runner, last) - self._parent).square().mean())

    def _similarities(self, runner: LayerRunner, last: Last) -> Tensor:
        """Upper triangle of the similarities of all sentences."""
        rows = []
        for batch, hidden in last:
            states = runner.finish_base(batch, hidden)
            mask = batch.get("attention_mask")
            vectors = pooled(states, None if mask is None else mask.to(states.device), pooling=self.pooling)
            rows.append(nn.functional.normalize(vectors.double(), dim=-1))  # (B, D)
        found = torch.cat(rows)
        first, second = torch.triu_indices(len(found), len(found), offset=1)
        if not len(first):
            raise DataError("the similarity of sentences needs at least two held-out sentences")
        return (found @ found.t())[first, second]

    def close(self) -> None:
        self._parent = torch.empty(0)


class ModelError:
    """A user's function of the model, less its value at the parent."""

    def __init__(self, function: Callable[[nn.Module], float]) -> None:
        self._function, self._parent = function, 0.0

    def start(self, runner: LayerRunner, held: Sequence[Batch]) -> None:
        self._parent = float(self._function(runner.model))

    def damage(self, runner: LayerRunner, last: Last) -> float:
        return float(self._function(runner.model)) - self._parent

    def close(self) -> None:
        self._parent = 0.0


def measure_named(
    measure: str | Callable[[nn.Module], float], supernet: Supernet, *, memory: int = MEMORY_LIMIT
) -> Measure:
    """Makes a measure.

    Args:
        measure: ``"hidden"``, ``"kl"``, ``"similarity"`` (with ``"/cls"`` or ``"/last"`` behind it: other pooling), or
            a function of the model that grows with the damage.
        supernet: to check that the measure fits.
        memory: bytes of the parent's hidden states kept in memory.

    Raises:
        DataError: the name is unknown, or the model has no logits for ``"kl"``.
    """
    if not isinstance(measure, str):
        return ModelError(measure)
    if measure == "hidden":
        return HiddenError(memory=memory)
    if measure == "kl":
        if supernet.model.get_output_embeddings() is None:
            raise DataError(f"measure='kl' needs a language model, a {type(supernet.model).__name__} has no vocabulary")
        return Divergence(memory=memory)
    kind, _, pooling = measure.partition("/")
    if kind == "similarity" and pooling in ("", "mean", "cls", "last"):
        chosen: Any = pooling or "mean"
        return SimilarityError(chosen)
    raise DataError(f"measure={measure!r} is not one of 'hidden', 'kl', 'similarity' and no function of the model")


def _kept(batch: Batch, hidden: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.bool().to(hidden.device)

