"""What a subnet is distilled from, and which part of a model's output is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_elastic.distillation import (
    Divergence,
    Pooling,
    StateDistance,
    dist_loss,
    embedding_loss,
    hidden_state_loss,
    label_mask,
    layer_map,
    layer_pairs,
    logits_loss,
    pooled,
    relational_loss,
)
from hf_elastic.errors import TrainingError
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training.fit_layers import FitLayers
from hf_elastic.training.sublayers import LayerStates, Sublayers
from hf_elastic.training.top_tokens import top_tokens_loss

Target = Literal["logits", "embeddings", "hidden_states", "last_hidden_state", "relational"]
Prediction = Literal["dist", "kl"]
Signal = Tensor | tuple[Tensor, ...] | LayerStates
"""What is compared: logits ``(B, ..., C)``, embeddings ``(B, D)``, or one state ``(B, T, D)`` per layer; span
models give one tensor of logits ``(B, T)`` for starts and one for ends. ``"relational"`` compares states of layers and
of their attention."""

_SPAN_LOGITS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Distillation:
    """Say what the subnets of a supernet learn from, besides labels.

    The teacher is, in this order: the dataset's column ``teacher_column`` (embeddings computed beforehand),
    the model given as ``teacher``, or the largest subnet of the same step (in-place distillation: Yu & Huang
    2019, arXiv 1903.05134). The last learns from labels alone, so it needs some; the other two work without
    labels, and so does ``teacher="parent"``: the supernet itself, largest, in evaluation mode and with all adapters
    switched off, for a model of which only routers and adapters are trained (ElastiFormer, arXiv 2411.15281). No second
    copy of it is in memory.

    The loss of a subnet is ``weight * distillation + label_weight * loss of the labels`` (if there are
    labels). BigNAS trains all subnets but the largest without labels (``label_weight=0``), Once-for-All with
    both.

    ``target="relational"`` is the distillation of ELM (arXiv 2510.27037): the embedding output, every output of
    attention and every output of a layer are compared with those of the teacher's layer at the same share of the depth
    (:func:`hf_elastic.distillation.layer_map`; what counts as output of attention:
    :class:`~hf_elastic.training.sublayers.Sublayers`), after learned linear maps to the teacher's width
    (``fit=True``). Layers and sublayers that the subnet skips are left out. The distillation loss is
    ``hidden + prediction_weight * prediction``. Published is the *sum* over the compared states, ``2 L + 1`` for ``L``
    layers; here ``hidden`` is their *mean*, which does not grow with depth, so that published totals
    (1 * hidden + 1 * prediction) are those of ``weight=2 * L + 1, prediction_weight=1 / (2 * L + 1)``. Pre-training as
    published uses ``label_weight=0`` and no prediction; fine-tuning ``prediction="dist"``. Where neither labels nor
    predictions count, a head is not trained, for which several ranks need ``ddp_find_unused_parameters=True``.

    Args:
        target: ``"logits"``; ``"embeddings"`` of sentences; ``"hidden_states"`` of all layers;
            ``"last_hidden_state"``: of each token after the last layer, which for sentence encoders teaches more
            per step than their pooled embedding; ``"relational"``: see above, by ElasticTrainer only.
        teacher: A model that takes the same inputs; ``"parent"``: see above; ``None`` for the largest subnet (or the
            column).
        weight: Factor of the distillation loss.
        label_weight: Factor of the loss of the labels for subnets that are distilled.
        temperature: Of the softmax, for logits and predictions.
        divergence: For logits and ``prediction="kl"``, see :func:`hf_elastic.distillation.logits_loss`.
        top_tokens: Compare the teacher's so many most likely tokens alone, for logits, see
            :func:`hf_elastic.training.top_tokens.top_tokens_loss`; ``None``: all.
        pooling: How token states become an embedding.
        relational_weight: Factor of :func:`hf_elastic.distillation.relational_loss`, added to the cosine
            distance of embeddings; 0 leaves it out.
        state_distance: For hidden states, see :func:`hf_elastic.distillation.hidden_state_loss`. Layers that
            the subnet skips are not compared, see :func:`hf_elastic.distillation.layer_pairs`. By default
            ``"pearson"`` for the relational target and ``"mse"`` for all others.
        teacher_column: Name of the column ``(B, D)`` with the teacher's embeddings.
        prediction: Compare the logits too, for the relational target: ``"dist"``
            (:func:`hf_elastic.distillation.dist_loss`) or ``"kl"`` (:func:`hf_elastic.distillation.logits_loss`);
            ``None``: states alone.
        prediction_weight: Factor of that.
        fit: Learn linear maps from the student's widths to the teacher's, for the relational target; needed where
            they differ. They are initialised from ``TrainingArguments.seed``, trained by the same optimizer, and saved
            in checkpoints but not in the model.

    Raises:
        TrainingError: A field has a value that is not allowed.
    """

    target: Target = "logits"
    teacher: nn.Module | Literal["parent"] | None = None
    weight: float = 1.0
    label_weight: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    pooling: Pooling = "mean"
    relational_weight: float = 0.0
    state_distance: StateDistance | None = None
    teacher_column: str = "teacher_embeddings"
    prediction: Prediction | None = None
    prediction_weight: float = 1.0
    fit: bool = False
    top_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.state_distance is None:
            object.__setattr__(self, "state_distance", "pearson" if self.target == "relational" else "mse")
        allowed: dict[str, tuple[str | None, ...]] = {
            "target": get_args(Target),
            "divergence": ("forward", "reverse", "mse"),
            "pooling": ("mean", "cls", "last"),
            "state_distance": get_args(StateDistance),
            "prediction": (*get_args(Prediction), None),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise TrainingError(
                    f"Distillation({name}={getattr(self, name)!r}) is unknown; allowed: {', '.join(map(str, values))}"
                )
        if not self.weight > 0 or self.label_weight < 0 or self.relational_weight < 0 or not self.temperature > 0:
            raise TrainingError(
                "Distillation needs weight > 0, temperature > 0, label_weight >= 0, relational_weight >= 0, "
                f"got {self.weight}, {self.temperature}, {self.label_weight}, {self.relational_weight}"
            )
        if not isinstance(self.teacher, nn.Module | None) and self.teacher != "parent":
            raise TrainingError(
                f"Distillation(teacher={self.teacher!r}) is no model; load it, such as by "
                "AutoModelForMaskedLM.from_pretrained(...), or give 'parent' for the model itself without adapters"
            )
        _check_top_tokens(self)
        if not self.prediction_weight > 0:
            raise TrainingError(
                f"Distillation needs prediction_weight > 0, got {self.prediction_weight}; prediction=None leaves it out"
            )
        if self.target != "relational" and (self.fit or self.prediction is not None):
            raise TrainingError(
                f"fit and prediction belong to target='relational', got {self.target!r}; leave them out"
            )

    @property
    def given(self) -> nn.Module | None:
        """The model that was given as the teacher."""
        return self.teacher if isinstance(self.teacher, nn.Module) else None

    @property
    def forward_arguments(self) -> dict[str, Any]:
        """What the models must be asked for to give the signal."""
        return {} if self.target in ("logits", "relational") else {"output_hidden_states": True}

    def signal(self, outputs: Any, inputs: Mapping[str, Any], *, states: LayerStates | None = None) -> Signal:
        """Return the part of a model's output that is compared, and for the relational target of what led to it.

        Args:
            outputs: of the model.
            inputs: of the model.
            states: of the same forward, for the relational target.

        Raises:
            TrainingError: The output does not have it.
        """
        found = dict(outputs) if isinstance(outputs, Mapping) else {}
        if self.target == "relational":
            if states is None:
                raise TrainingError(
                    "target='relational' compares states inside the models, which only ElasticTrainer looks at; choose "
                    "another Distillation(target=...) here"
                )
            if self.prediction is None:
                return states
            if (logits := _logits(found)) is not None:
                return states._replace(logits=logits if isinstance(logits, tuple) else (logits,))
        elif self.target == "logits":
            if (logits := _logits(found)) is not None:
                return logits
        elif found.get("hidden_states") is not None:
            layers = tuple(found["hidden_states"])
            if self.target == "hidden_states":
                return layers
            last = found.get("last_hidden_state")
            last = layers[-1] if last is None else last
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
        if isinstance(student, LayerStates):
            assert isinstance(teacher, LayerStates)
            return self._relational_loss(student, teacher, context)
        assert self.state_distance is not None
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

    def _relational_loss(self, student: LayerStates, teacher: LayerStates, context: LossContext) -> Tensor:
        """The mean distance of the states, and what the prediction adds to it."""
        assert self.state_distance is not None
        fitted = student if context.fit is None else context.fit(student)
        assert context.pairs is not None
        pairs = _compared(fitted, teacher, context.pairs)
        hidden = hidden_state_loss(
            [state for state, _ in pairs],
            [state for _, state in pairs],
            mask=context.inputs.get("attention_mask"),
            distance=self.state_distance,
        )
        if self.prediction is None:
            return hidden / context.steps
        mask, count = scored_positions(student.logits[0], context)
        logits = list(zip(student.logits, teacher.logits, strict=True))
        if self.prediction == "dist":
            losses = [dist_loss(s, t, mask=mask, temperature=self.temperature) for s, t in logits]
            count = None
        else:
            losses = [self._logits_loss(s, t, mask=mask, count=count) for s, t in logits]
        prediction = torch.stack(losses).mean()
        prediction = prediction / context.steps if count is None else prediction
        return hidden / context.steps + self.prediction_weight * prediction

    def _logits_loss(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None, count: Tensor | float | None
    ) -> Tensor:
        settings: dict[str, Any] = {"temperature": self.temperature, "divergence": self.divergence}
        if self.top_tokens is not None:
            return top_tokens_loss(student, teacher, top_tokens=self.top_tokens, mask=mask, count=count, **settings)
        return logits_loss(student, teacher, mask=mask, count=count, **settings)


def _check_top_tokens(plan: Distillation) -> None:
    count = plan.top_tokens
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise TrainingError(
            f"Distillation(top_tokens={count!r}) must be a number of at least 2, or None for all tokens"
        )
    if plan.target != "logits" or plan.divergence == "mse":
        raise TrainingError(
            f"top_tokens={count} is of target='logits' and divergence='forward' or 'reverse', got {plan.target!r} and "
            f"{plan.divergence!r}; leave it out"
        )


@dataclass(frozen=True)
class LossContext:
    """What a distillation loss must know about the micro-batch and the subnet.

    Args:
        inputs: of the model.
        pairs: entries of the hidden states to compare; ``None``: all. For the relational target, numbers of layers.
        shifted: whether logits are scored against the next token's label.
        count: labelled positions of all micro-batches of the step, if the labels' loss is divided by that.
        steps: micro-batches to divide a mean by, so that their sum is a mean.
        fit: maps of the student's states to the teacher's width.
    """

    inputs: Mapping[str, Any]
    pairs: tuple[tuple[int, int], ...] | None = None
    shifted: bool = False
    count: Tensor | float | None = None
    steps: int = 1
    fit: FitLayers | None = None


class Relation:
    """Student and teacher of a relational distillation: where their states come from, and which are compared.

    Args:
        plan: what is compared.
        supernet: of the student, and of the teacher where the plan names none.
        seed: of the fit layers.

    Attributes:
        student, teacher: places of their states.
        fit: the fit layers; ``None`` without ``plan.fit``.

    Raises:
        TrainingError: Their vocabularies differ, one is causal and the other not, the teacher's depth is not a multiple
            of the student's, the teacher attends in a bottleneck, or their widths differ and there are no fit layers.
        UnsupportedModelError: One is of a family that we do not know.
    """

    def __init__(self, plan: Distillation, supernet: Supernet, *, seed: int) -> None:
        self._supernet = supernet
        known = tuple(part.family for part in supernet.layer_parts[:1])
        self.student = Sublayers(supernet.base, known=known)
        self.teacher = self.student if plan.given is None else Sublayers(plan.given, known=known)
        _check_vocabulary(self.student, self.teacher)
        _check_direction(self.student, self.teacher)
        self._layers = layer_map(self.student.depth, self.teacher.depth)
        narrow = self.teacher.attention_widths - {self.teacher.width}
        if narrow and plan.given is not None:
            raise TrainingError(
                f"the teacher's outputs of attention are {' and '.join(map(str, sorted(narrow)))} wide and its layers' "
                f"{self.teacher.width}; give a teacher without bottlenecks"
            )
        widths = sorted({self.student.width, *self.student.attention_widths})
        if not plan.fit and widths != [self.teacher.width]:
            raise TrainingError(
                f"the student's states are {' and '.join(map(str, widths))} wide, the teacher's {self.teacher.width}; "
                "give Distillation(fit=True), which learns linear maps between them"
            )
        self.fit: FitLayers | None = None
        if plan.fit:
            self.fit = FitLayers(
                self.student.width, attention=self.student.attention_widths, teacher=self.teacher.width, seed=seed
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Layers of the student that the active subnet has, each with the teacher's that it is compared with."""
        skipped = {part.index for part in self._supernet.layer_parts if part.current.skipped}
        return tuple((n, taught) for n, taught in enumerate(self._layers) if n not in skipped)


def _check_vocabulary(student: Sublayers, teacher: Sublayers) -> None:
    if student.vocabulary != teacher.vocabulary:
        raise TrainingError(
            f"the teacher has a vocabulary of {teacher.vocabulary} tokens, the student of {student.vocabulary}, so one "
            "number means two tokens; give a teacher with the student's tokenizer"
        )


def _check_direction(student: Sublayers, teacher: Sublayers) -> None:
    if student.causal != teacher.causal:
        kinds = {True: "causal", False: "bidirectional"}
        raise TrainingError(
            f"the teacher is {kinds[teacher.causal]}, the student {kinds[student.causal]}, so a state of one is of "
            f"tokens that the other does not see; give a {kinds[student.causal]} teacher"
        )


def _compared(
    student: LayerStates, teacher: LayerStates, pairs: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """States of both that were there, side by side: embeddings, outputs of attention, outputs of layers."""
    found = [(student.embedding, teacher.embedding)]
    for ours, theirs in ((student.attention, teacher.attention), (student.blocks, teacher.blocks)):
        found += [(ours[n], theirs[m]) for n, m in pairs if n in ours and m in theirs]
    return found


def _logits(found: Mapping[str, Any]) -> Tensor | tuple[Tensor, ...] | None:
    """Logits of an output; two tensors of a span model."""
    if "logits" in found:
        logits: Tensor = found["logits"]
        return logits
    return tuple(found[name] for name in _SPAN_LOGITS) if all(name in found for name in _SPAN_LOGITS) else None


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
    if isinstance(signal, LayerStates):
        return signal.detached()
    return signal.detach() if isinstance(signal, Tensor) else tuple(part.detach() for part in signal)


def _as_tuple(signal: Signal) -> tuple[Tensor, ...]:
    assert not isinstance(signal, LayerStates)
    return (signal,) if isinstance(signal, Tensor) else signal
