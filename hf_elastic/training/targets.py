"""What a subnet is distilled from, and which part of a model's output is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_elastic.distillation import (
    Divergence,
    Pooling,
    StateDistance,
    embedding_loss,
    hidden_state_loss,
    label_mask,
    layer_pairs,
    logits_loss,
    pooled,
    relational_loss,
)
from hf_elastic.errors import TrainingError
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

Target = Literal["logits", "embeddings", "hidden_states", "last_hidden_state"]
Signal = Tensor | tuple[Tensor, ...]
"""What is compared: logits ``(B, ..., C)``, embeddings ``(B, D)``, or one state ``(B, T, D)`` per layer; span
models give one tensor of logits ``(B, T)`` for starts and one for ends."""

_SPAN_LOGITS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Distillation:
    """Say what the subnets of a supernet learn from, besides labels.

    The teacher is, in this order: the dataset's column ``teacher_column`` (embeddings computed beforehand),
    the model given as ``teacher``, or the largest subnet of the same step (in-place distillation: Yu & Huang
    2019, arXiv 1903.05134). The last learns from labels alone, so it needs some; the other two work without
    labels.

    The loss of a subnet is ``weight * distillation + label_weight * loss of the labels`` (if there are
    labels). BigNAS trains all subnets but the largest without labels (``label_weight=0``), Once-for-All with
    both.

    Args:
        target: ``"logits"``; ``"embeddings"`` of sentences; ``"hidden_states"`` of all layers;
            ``"last_hidden_state"``: of each token after the last layer, which for sentence encoders teaches more
            per step than their pooled embedding.
        teacher: A model that takes the same inputs; ``None`` for the largest subnet (or the column).
        weight: Factor of the distillation loss.
        label_weight: Factor of the loss of the labels for subnets that are distilled.
        temperature: Of the softmax, for logits.
        divergence: For logits, see :func:`hf_elastic.distillation.logits_loss`.
        pooling: How token states become an embedding.
        relational_weight: Factor of :func:`hf_elastic.distillation.relational_loss`, added to the cosine
            distance of embeddings; 0 leaves it out.
        state_distance: For hidden states, see :func:`hf_elastic.distillation.hidden_state_loss`. Layers that
            the subnet skips are not compared, see :func:`hf_elastic.distillation.layer_pairs`.
        teacher_column: Name of the column ``(B, D)`` with the teacher's embeddings.

    Raises:
        TrainingError: A field has a value that is not allowed.
    """

    target: Target = "logits"
    teacher: nn.Module | None = None
    weight: float = 1.0
    label_weight: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    pooling: Pooling = "mean"
    relational_weight: float = 0.0
    state_distance: StateDistance = "mse"
    teacher_column: str = "teacher_embeddings"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "target": get_args(Target),
            "divergence": ("forward", "reverse", "mse"),
            "pooling": ("mean", "cls", "last"),
            "state_distance": get_args(StateDistance),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise TrainingError(
                    f"Distillation({name}={getattr(self, name)!r}) is unknown; allowed: {', '.join(values)}"
                )
        if not self.weight > 0 or self.label_weight < 0 or self.relational_weight < 0 or not self.temperature > 0:
            raise TrainingError(
                "Distillation needs weight > 0, temperature > 0, label_weight >= 0, relational_weight >= 0, "
                f"got {self.weight}, {self.temperature}, {self.label_weight}, {self.relational_weight}"
            )

    @property
    def forward_arguments(self) -> dict[str, Any]:
        """What the models must be asked for to give the signal."""
        return {} if self.target == "logits" else {"output_hidden_states": True}

    def signal(self, outputs: Any, inputs: Mapping[str, Any]) -> Signal:
        """Return the part of a model's output that is compared.

        Raises:
            TrainingError: The output does not have it.
        """
        found = dict(outputs) if isinstance(outputs, Mapping) else {}
        if self.target == "logits":
            if "logits" in found:
                return found["logits"]
            if all(name in found for name in _SPAN_LOGITS):
                return tuple(found[name] for name in _SPAN_LOGITS)
        elif found.get("hidden_states") is not None:
            states = tuple(found["hidden_states"])
            if self.target == "hidden_states":
                return states
            last = found.get("last_hidden_state")
            last = states[-1] if last is None else last
            if self.target == "last_hidden_state":
                return (last,)
            return pooled(last, inputs.get("attention_mask"), pooling=self.pooling)
        raise TrainingError(
            f"cannot distil {self.target}: the model returned {sorted(found) or type(outputs).__name__}; "
            "choose another Distillation(target=...)"
        )

    def loss(self, student: Signal, teacher: Signal, *, context: LossContext) -> Tensor:
        """Return the distillation loss of a micro-batch, a scalar, without ``weight``.

        Raises:
            TrainingError: The signals do not fit each other.
        """
        inputs, count = context.inputs, None
        if self.target == "logits":
            pairs = list(zip(_as_tuple(student), _as_tuple(teacher), strict=True))
            mask, count = scored_positions(pairs[0][0], context)
            loss = torch.stack([self._logits_loss(s, t, mask=mask, count=count) for s, t in pairs]).mean()
        elif self.target in ("hidden_states", "last_hidden_state"):
            loss = hidden_state_loss(
                _as_tuple(student),
                _as_tuple(teacher),
                mask=inputs.get("attention_mask"),
                pairs=context.pairs,
                distance=self.state_distance,
            )
        else:
            assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
            loss = embedding_loss(student, teacher)
            if self.relational_weight:
                loss = loss + self.relational_weight * relational_loss(student, teacher)
        return loss / context.steps if count is None else loss

    def _logits_loss(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None, count: Tensor | float | None
    ) -> Tensor:
        return logits_loss(
            student, teacher, temperature=self.temperature, divergence=self.divergence, mask=mask, count=count
        )


@dataclass(frozen=True)
class LossContext:
    """What a distillation loss must know about the micro-batch and the subnet.

    Args:
        inputs: of the model.
        pairs: entries of the hidden states to compare; ``None``: all.
        shifted: whether logits are scored against the next token's label.
        count: labelled positions of all micro-batches of the step, if the labels' loss is divided by that.
        steps: micro-batches to divide a mean by, so that their sum is a mean.
    """

    inputs: Mapping[str, Any]
    pairs: tuple[tuple[int, int], ...] | None = None
    shifted: bool = False
    count: Tensor | float | None = None
    steps: int = 1


def scored_positions(logits: Tensor, context: LossContext) -> tuple[Tensor | None, Tensor | float | None]:
    """Return which positions of logits ``(..., C)`` count, and what to divide the sum of their losses by.

    Those with a label where there is one label per position, else those of real tokens.

    Returns:
        A mask ``(...)`` (``None``: all count), and the divisor (``None``: their number).
    """
    positions = logits.shape[:-1]
    labels, attention = context.inputs.get("labels"), context.inputs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == positions and not labels.is_floating_point():
        return label_mask(labels, shifted=context.shifted), context.count
    if isinstance(attention, Tensor) and attention.shape == positions:
        return attention, None
    return None, None


def state_pairs(supernet: Supernet, architecture: Architecture) -> tuple[tuple[int, int], ...] | None:
    """Return which hidden states of a subnet to compare with the whole model's: ``None`` for all of them."""
    shapes = supernet.layer_shapes(architecture)
    kept = [index for index, shape in enumerate(shapes) if not shape.skipped]
    return None if len(kept) == len(shapes) else layer_pairs(kept, layers=len(shapes))


def detached(signal: Signal) -> Signal:
    """Return the signal without its graph."""
    return signal.detach() if isinstance(signal, Tensor) else tuple(part.detach() for part in signal)


def _as_tuple(signal: Signal) -> tuple[Tensor, ...]:
    return (signal,) if isinstance(signal, Tensor) else signal
