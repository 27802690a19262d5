"""Distillation losses: pure functions of a student's and a teacher's tensors.

Every function returns a scalar in float32, computed in float32 whatever the inputs are, differentiable with
respect to the student; the teacher is a constant. Unless it says otherwise a loss is a *mean over the
positions that the mask keeps*, so it depends neither on the size of the batch nor on padding. Where a mask
keeps nothing the loss is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_elastic.errors import TrainingError

Divergence = Literal["forward", "reverse", "mse"]
Pooling = Literal["mean", "cls", "last"]
StateDistance = Literal["mse", "cosine", "relative", "pearson"]

IGNORED_LABEL = -100  # what the losses of transformers leave out

_LOG_ZERO = -1e4  # log-probability of what cannot be: its exponential is 0, and half precision holds it
_SPREAD = 1e-6  # added to a deviation before something is divided by it


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    r"""Compute the divergence of a student's class distribution from a teacher's.

    With :math:`p_\tau = \mathrm{softmax}(z / \tau)` over the last dimension and ``t``/``s`` for
    teacher/student:

    * ``forward``: :math:`\tau^2 \, \mathrm{KL}(p^t_\tau \| p^s_\tau)` (Hinton et al. 2015, arXiv 1503.02531;
      the factor :math:`\tau^2` keeps the size of gradients comparable between temperatures);
    * ``reverse``: :math:`\tau^2 \, \mathrm{KL}(p^s_\tau \| p^t_\tau)`, mode-seeking (Gu et al. 2024, arXiv
      2306.08543);
    * ``mse``: :math:`\frac{1}{C} \sum_c (z^s_c - z^t_c)^2`, for regression heads; the temperature plays no
      part.

    Args:
        student: ``(..., C)``.
        teacher: ``(..., C)``, without gradient.
        temperature: :math:`\tau > 0`.
        divergence: which of the three.
        mask: ``(...)``, true (or non-zero) for the positions that count; all by default.
        count: divide the sum over the kept positions by this instead of by their number (the number over all
            micro-batches of an optimizer step, for instance).

    Raises:
        TrainingError: The shapes differ, the temperature is not positive, or a divergence of distributions is
            asked for over one class, where it is always 0.
    """
    _check_same_shape(student, teacher, what="logits")
    _check_temperature(temperature)
    if divergence == "mse":
        per_position = (student.float() - teacher.detach().float()).square().mean(-1)  # (...)
        return masked_mean(per_position, mask, count=count)
    if divergence not in ("forward", "reverse"):
        raise TrainingError(f"unknown divergence {divergence!r}; allowed: 'forward', 'reverse', 'mse'")
    _check_several(student)
    log_s = F.log_softmax(student.float() / temperature, dim=-1)  # (..., C)
    log_t = F.log_softmax(teacher.detach().float() / temperature, dim=-1)  # (..., C)
    target, source = (log_t, log_s) if divergence == "forward" else (log_s, log_t)
    per_position = F.kl_div(source, target, reduction="none", log_target=True).sum(-1)  # (...)
    return temperature**2 * masked_mean(per_position, mask, count=count)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compute how badly a student's class probabilities correlate with a teacher's, by sample and by class.

    With :math:`P = \mathrm{softmax}(z / \tau)`, :math:`(N, C)`, and Pearson's correlation :math:`\rho`:
    :math:`\beta \tau^2 \big(1 - \frac{1}{N} \sum_i \rho(P^s_{i:}, P^t_{i:})\big) +
    \gamma \tau^2 \big(1 - \frac{1}{C} \sum_c \rho(P^s_{:c}, P^t_{:c})\big)` (DIST: Huang et al. 2022, arXiv
    2205.10536; in ELM, arXiv 2510.27037, all factors are 1). We differ in small probabilities: each row and column is
    divided by its largest entry before 1e-6 is added to its norm, which would silence rare classes otherwise. What is
    constant has a correlation of 0. The second term depends on the batch; of one sample it is 0.

    Args:
        student_logits, teacher_logits: ``(..., C)``, the teacher's without gradient; every kept position is a sample.
        mask: ``(...)``, non-zero for the positions that count; all by default.
        beta, gamma: factors of the terms of samples and of classes.
        temperature: :math:`\tau > 0`.

    Raises:
        TrainingError: shapes do not fit, the temperature is not positive, or there is one class.
    """
    _check_same_shape(student_logits, teacher_logits, what="logits")
    _check_temperature(temperature)
    if student_logits.shape[-1] == 1:
        raise TrainingError("logits of one class have no correlation; use prediction='kl' and divergence='mse'")
    kept, both = _kept(mask, student_logits[..., 0]), (student_logits, teacher_logits.detach())
    student, teacher = ((logits[kept].float() / temperature).softmax(-1) for logits in both)  # (N, C)
    if not len(student):
        return student.sum()
    loss = beta * (1 - _correlation(student, teacher, dim=1).mean())
    if len(student) > 1:
        loss = loss + gamma * (1 - _correlation(student, teacher, dim=0).mean())
    return temperature**2 * loss


def _correlation(x: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation of non-negative values along a dimension; 0 where they are constant."""
    x, y = (v / v.detach().amax(dim, keepdim=True).clamp(min=1e-30) for v in (x, y))
    x, y = (v - v.mean(dim, keepdim=True) for v in (x, y))
    return (x * y).sum(dim) / ((x.norm(dim=dim) + _SPREAD) * (y.norm(dim=dim) + _SPREAD))


class TopK(NamedTuple):
    """A distribution over classes, of which the ``k`` most likely are told apart and the others are one class.

    Attributes:
        log_probabilities: ``(..., k)``.
        indices: which classes they are, ``(..., k)``.
        log_tail: log-probability of all other classes together, ``(...)``.
    """

    log_probabilities: Tensor
    indices: Tensor
    log_tail: Tensor


def top_k_distribution(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    r"""Keep the most likely classes of :math:`p = \mathrm{softmax}(z / \tau)`, and the mass of the rest.

    Args:
        logits: ``(..., C)``.
        k: how many classes to keep, at most ``C``.
        temperature: :math:`\tau > 0`.

    Raises:
        TrainingError: ``k`` or the temperature is out of range.
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise TrainingError(f"top_k={k} is not within 1..{classes}, the classes of the logits")
    _check_temperature(temperature)
    scaled = logits.float() / temperature  # (..., C)
    values, indices = scaled.topk(k, dim=-1)  # (..., k)
    total = scaled.logsumexp(-1)  # (...)
    rest = scaled.scatter(-1, indices, -torch.inf).logsumexp(-1)  # (...), -inf where k = C
    log_probabilities = (values - total.unsqueeze(-1)).clamp(min=_LOG_ZERO)
    return TopK(log_probabilities, indices, (rest - total).clamp(min=_LOG_ZERO))


def top_k_loss(
    student: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    r"""Compute the divergence of a student from the most likely classes of a teacher, all others as one class.

    With :math:`K` the teacher's :math:`k` classes and :math:`p_R = 1 - \sum_{i \in K} p_i` (:math:`q_R` likewise of
    the student, over the same :math:`K`), ``forward`` is

    .. math:: \tau^2 \Big( \sum_{i \in K} p_i \log \frac{p_i}{q_i} + p_R \log \frac{p_R}{q_R} \Big)

    and ``reverse`` the same with :math:`p` and :math:`q` exchanged. By the log-sum inequality it is at most
    :func:`logits_loss`, and equal to it with all classes kept, or where student and teacher agree on the proportions
    within the tail. Without the tail's term the student would be drawn to the renormalised top (Anshumann et al.
    2025, arXiv 2503.16870); they sample instead of merging the tail.

    Args:
        student: logits ``(..., C)``.
        teacher: of :func:`top_k_distribution`, maybe rounded: it is normalised again. Made with the same temperature.
        temperature: :math:`\tau > 0`.
        divergence: ``forward`` or ``reverse``; a squared error of logits needs all of them.
        mask: ``(...)``, as for :func:`logits_loss`.
        count: likewise.

    Raises:
        TrainingError: shapes do not fit, an argument is out of range, or there is one class, where it is always 0.
    """
    _check_temperature(temperature)
    if divergence not in ("forward", "reverse"):
        raise TrainingError(f"divergence={divergence!r} needs all logits; of the top k: 'forward', 'reverse'")
    _check_several(student)
    kept, positions = teacher.indices.shape[-1], student.shape[:-1]
    if teacher.indices.shape[:-1] != positions or kept > student.shape[-1]:
        raise TrainingError(f"student logits {_shape(student)} do not fit a teacher's top {_shape(teacher.indices)}")
    scaled, indices = student.float() / temperature, teacher.indices.long()
    log_s = scaled.gather(-1, indices)  # (..., k)
    log_t = teacher.log_probabilities.detach().float()  # (..., k)
    if kept < student.shape[-1]:
        rest = scaled.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)  # (..., 1)
        log_s = torch.cat([log_s, rest], dim=-1)  # (..., k + 1)
        log_t = torch.cat([log_t, teacher.log_tail.detach().float().unsqueeze(-1)], dim=-1)  # (..., k + 1)
    log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
    target, source = (log_t, log_s) if divergence == "forward" else (log_s, log_t)
    per_position = F.kl_div(source, target, reduction="none", log_target=True).sum(-1)  # (...)
    return temperature**2 * masked_mean(per_position, mask, count=count)


def label_mask(labels: Tensor, *, shifted: bool = False) -> Tensor:
    """Return the positions whose logits a labelled loss uses.

    Args:
        labels: ``(B, T)`` token labels, or ``(B,)`` for one label per sequence; -100 leaves a position out.
        shifted: whether the logits of position ``t`` are scored against label ``t + 1``, as in causal
            language models; the last position then has no label.

    Returns:
        Booleans of the shape of ``labels``.
    """
    kept = labels.ne(IGNORED_LABEL)
    if not shifted:
        return kept
    return F.pad(kept[..., 1:], (0, 1), value=False)  # (B, T)


def pooled(hidden: Tensor, mask: Tensor | None = None, *, pooling: Pooling = "mean") -> Tensor:
    """Pool token states into one embedding per sequence.

    ``mean`` averages the kept tokens (Reimers & Gurevych 2019, arXiv 1908.10084), ``cls`` takes the first
    position, ``last`` the last kept token of each sequence (decoders), whichever side the padding is on.

    Args:
        hidden: ``(B, T, D)``.
        mask: ``(B, T)``, non-zero for tokens, zero for padding; all tokens by default.
        pooling: which of the three.

    Returns:
        ``(B, D)`` in the type of ``hidden``, summed in float32; zeros under ``mean`` for a sequence without a token.

    Raises:
        TrainingError: The pooling is unknown.
    """
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    if pooling == "mean":
        kept, wide = mask.bool().unsqueeze(-1), torch.promote_types(hidden.dtype, torch.float32)  # (B, T, 1)
        total = torch.where(kept, hidden.to(wide), 0.0).sum(1)  # (B, D)
        return (total / kept.sum(1).clamp(min=1)).to(hidden.dtype)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        positions = torch.arange(hidden.shape[1], device=hidden.device)  # (T,)
        last = torch.where(mask.bool(), positions, 0).amax(1)  # (B,)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    raise TrainingError(f"unknown pooling {pooling!r}; allowed: 'mean', 'cls', 'last'")


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean cosine distance of embeddings, :math:`1 - \cos(e^s_b, e^t_b)` over the batch.

    Args:
        student: ``(B, D)``.
        teacher: ``(B, D)``, without gradient.

    Raises:
        TrainingError: The shapes differ.
    """
    _check_same_shape(student, teacher, what="embeddings")
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()


def relational_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute how far the similarity structure of a batch is from the teacher's.

    With :math:`S_{ij} = \cos(e_i, e_j)`: :math:`\frac{1}{B (B-1)} \sum_{i \ne j} (S^s_{ij} - S^t_{ij})^2`.

    This is similarity-preserving distillation (Tung & Mori 2019, arXiv 1907.09682, Eq. 4) with cosines
    instead of row-normalised dot products, and without the diagonal, which is always 1. Student and teacher
    may have different widths. A batch of one has no pairs: 0.

    Args:
        student: ``(B, D)``.
        teacher: ``(B, E)``, without gradient.

    Raises:
        TrainingError: The batch sizes differ.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise TrainingError(
            f"a relational loss needs embeddings (B, D) and (B, E), got {_shape(student)}, {_shape(teacher)}"
        )
    of_student = F.normalize(student.float(), dim=-1)
    of_teacher = F.normalize(teacher.detach().float(), dim=-1)
    difference = of_student @ of_student.T - of_teacher @ of_teacher.T  # (B, B)
    size = len(student)
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=student.device)  # (B, B)
    return masked_mean(difference.square(), off_diagonal)


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    distance: StateDistance = "mse",
) -> Tensor:
    r"""Compute the mean distance of hidden states over pairs of layers and kept tokens.

    ``mse``: :math:`\frac{1}{D} \| h^s - h^t \|^2`; ``cosine``: :math:`1 - \cos(h^s, h^t)` (Jiao et al. 2020,
    arXiv 1909.10351, Eq. 9, without a learned projection: the residual stream of a subnet is as wide as its
    teacher's). ``relative``: :math:`\sum \| h^s - h^t \|^2 / \sum \| h^t \|^2` over the tokens of the batch, the
    share of the teacher's energy that is missed; it needs no factor that depends on the model. ``pearson``:
    :func:`pearson_hidden_loss`.

    Args:
        student: states ``(B, T, D)``; entry 0 is the embedding, entry ``i + 1`` the output of layer ``i``, as
            transformers returns them.
        teacher: likewise, without gradient; it may have another number of layers.
        mask: ``(B, T)``, non-zero for the tokens that count; all by default.
        pairs: entries to compare, (of the student, of the teacher); by default each with its equal. See
            :func:`layer_pairs` for skipped layers.
        distance: which of the four.

    Raises:
        TrainingError: Shapes differ, an entry does not exist, or no pair is given.
    """
    if pairs is None:
        if len(student) != len(teacher):
            raise TrainingError(
                f"the student has {len(student)} hidden states and the teacher {len(teacher)}; "
                "say which to compare: pairs="
            )
        pairs = [(i, i) for i in range(len(student))]
    if not pairs:
        raise TrainingError("a hidden-state loss needs at least one pair of layers")
    terms: list[Tensor] = []
    for i, j in pairs:
        if not (0 <= i < len(student) and 0 <= j < len(teacher)):
            raise TrainingError(
                f"pair ({i}, {j}) is outside the {len(student)} and {len(teacher)} hidden states of student and teacher"
            )
        terms.append(_state_distance(student[i], teacher[j].detach(), mask=mask, distance=distance))
    return torch.stack(terms).mean()


def pearson_hidden_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Compute the squared distance of hidden states after each channel is standardised over the kept tokens.

    With :math:`\hat h = (h - \mu) / (\sigma + 10^{-6})` by channel, :math:`\mu` and the unbiased :math:`\sigma` taken
    over the :math:`N` kept tokens of the batch, :math:`\frac{1}{N D} \sum \| \hat h^s - \hat h^t \|^2`: about
    :math:`2 (1 - \rho)` for a channel's Pearson correlation :math:`\rho`, blind to its scale and its shift.

    The hidden loss of ELM (arXiv 2510.27037), after PKD, Pearson correlation distillation for detectors (Cao et al.
    2022, arXiv 2207.02039). There channels are standardised along tokens; whether those of a sequence or of the batch,
    and with padding or without, is not known for certain. Here all kept tokens of the batch are taken together, so
    the loss depends on which sequences are in it. A constant channel is 0 once standardised.

    Args:
        student, teacher: ``(B, T, D)``, the teacher's without gradient.
        mask: ``(B, T)``, non-zero for the tokens that count; all by default.

    Returns:
        A scalar; 0 (with a gradient of 0) for fewer than two kept tokens.

    Raises:
        TrainingError: The shapes differ.
    """
    _check_same_shape(student, teacher, what="hidden states")
    kept = _kept(mask, student[..., 0]).unsqueeze(-1)  # (B, T, 1)
    difference = _standardised(student.float(), kept) - _standardised(teacher.detach().float(), kept)
    return masked_mean(difference.square().mean(-1), mask)


def _standardised(values: Tensor, kept: Tensor) -> Tensor:
    """Channels of ``(B, T, D)`` with mean 0 and deviation 1 over the kept tokens, 0 elsewhere."""
    tokens, count = tuple(range(values.dim() - 1)), kept.sum()
    values = torch.where(kept, values, 0.0)
    for _ in range(2):  # once more takes away what rounding leaves of a large mean
        values = torch.where(kept, values - values.sum(tokens) / count.clamp(min=1), 0.0)
    variance = values.square().sum(tokens) / (count - 1).clamp(min=1)  # (D,)
    safe = torch.where(variance > 0, variance, 1.0)  # the slope of a root is infinite at 0
    return values / (safe.sqrt() * (variance > 0) + _SPREAD)


def layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher's layer for each of a student's: for ``l``, ``(l + 1) * teacher_layers / student_layers - 1``.

    Both count from 0, so the last learns from the last (ELM, arXiv 2510.27037).

    Raises:
        TrainingError: The teacher's depth is not a multiple of the student's.
    """
    if student_layers < 1 or teacher_layers < 1 or teacher_layers % student_layers:
        depths = [str(n) for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        raise TrainingError(
            f"a teacher's {teacher_layers} layers are no multiple of a student's {student_layers}; "
            f"with this teacher the student may have {', '.join(depths)} layers"
        )
    return tuple(range(teacher_layers // student_layers - 1, teacher_layers, teacher_layers // student_layers))


def layer_pairs(kept: Sequence[int], *, layers: int) -> tuple[tuple[int, int], ...]:
    """Pair the hidden states of a subnet that skips layers with those of the whole model.

    The embedding with itself, the output of each kept layer with the teacher's output of the *last layer that
    it stands for* (itself and the skipped layers that follow it), so that the next kept layer sees what it
    saw in the whole model, and the final state with the final state.

    Args:
        kept: layers that the subnet runs, ascending.
        layers: number of layers of the whole model; both models report that many states, plus the embedding.

    Returns:
        Pairs (entry of the student, entry of the teacher) for :func:`hidden_state_loss`.

    Raises:
        TrainingError: ``kept`` is not ascending or names a layer that does not exist.
    """
    bounds = [*kept, layers]
    if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)) or any(k < 0 for k in kept):
        raise TrainingError(f"kept layers must be ascending and within 0..{layers - 1}, got {list(kept)}")
    # Entry k + 1 is the output of layer k, so the layer before bounds[n + 1] has entry bounds[n + 1]. The
    # very last entry follows the final norm, in the student as in the teacher, whichever layer came before
    # it.
    inner = [(k + 1, following) for k, following in zip(kept[:-1], bounds[1:], strict=False)]
    return ((0, 0), *inner, (layers, layers))


def masked_mean(values: Tensor, mask: Tensor | None = None, *, count: Tensor | float | None = None) -> Tensor:
    """Average ``values`` where ``mask`` is set.

    Args:
        values: any shape.
        mask: booleans or numbers of the same shape, non-zero where a value counts; all by default.
        count: divide the sum by this instead of by the number of values that count.

    Returns:
        A scalar; 0 (with a gradient of 0) where the mask keeps nothing.

    Raises:
        TrainingError: The shapes differ.
    """
    kept = _kept(mask, values)
    # where(), not a product: a position that does not count may hold inf or nan.
    total = torch.where(kept, values, torch.zeros_like(values)).sum()
    return total / (kept.sum().clamp(min=1) if count is None else count)


def _kept(mask: Tensor | None, values: Tensor) -> Tensor:
    """Which values a mask of their shape keeps, as booleans; all without one."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise TrainingError(f"a mask of shape {_shape(mask)} does not fit values of shape {_shape(values)}")
    return mask.bool()


def _state_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None, distance: StateDistance) -> Tensor:
    """Distance of one pair of states, without the teacher's graph."""
    if distance == "pearson":
        return pearson_hidden_loss(student, teacher, mask=mask)
    _check_same_shape(student, teacher, what="hidden states")
    student, teacher = student.float(), teacher.float()
    if distance == "cosine":
        return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)
    if distance not in ("mse", "relative"):
        raise TrainingError(f"unknown distance {distance!r}; allowed: 'mse', 'cosine', 'relative', 'pearson'")
    missed = masked_mean((student - teacher).square().mean(-1), mask)
    return missed if distance == "mse" else missed / masked_mean(teacher.square().mean(-1), mask).clamp(min=1e-37)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise TrainingError(f"the distillation temperature must be positive, got {temperature!r}")


def _check_several(logits: Tensor) -> None:
    if logits.shape[-1] == 1:
        raise TrainingError(
            "a KL divergence over logits of one class is always 0; use divergence='mse' for a regression head"
        )


def _check_same_shape(student: Tensor, teacher: Tensor, *, what: str) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"student and teacher {what} must have one shape, got {_shape(student)} and {_shape(teacher)}"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
