"""Distillation on the teacher's most likely tokens alone."""

from __future__ import annotations

from torch import Tensor

from hf_elastic.distillation import Divergence, logits_loss
from hf_elastic.errors import TrainingError


def top_tokens_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    top_tokens: int,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    r"""Compute the divergence of a student from a teacher over the teacher's ``k`` most likely tokens.

    With :math:`K` these tokens at a position, and both distributions normalised over them,
    :math:`\bar p_i = p_i / \sum_{j \in K} p_j` and :math:`\bar q_i` likewise of the student, ``forward`` is

    .. math:: \tau^2 \sum_{i \in K} \bar p_i \log \frac{\bar p_i}{\bar q_i}

    and ``reverse`` the same with :math:`\bar p` and :math:`\bar q` exchanged. What a student gives to all other tokens
    together is not looked at; :func:`hf_elastic.distillation.top_k_loss` looks at it.

    ElastiFormer (arXiv 2411.15281) distils by a KL divergence; whether over the teacher's top tokens alone, over how
    many, and how they are normalised, was not found. This is the plainest form of it.

    Args:
        student: logits ``(..., C)``.
        teacher: likewise, without gradient.
        top_tokens: ``k``, 2 to ``C``.
        temperature: :math:`\tau > 0`.
        divergence: ``forward`` or ``reverse``.
        mask: ``(...)``, as for :func:`hf_elastic.distillation.logits_loss`.
        count: likewise.

    Raises:
        TrainingError: There are fewer classes than ``top_tokens``, or :func:`hf_elastic.distillation.logits_loss` does.
    """
    if student.shape[-1] < top_tokens:
        raise TrainingError(f"top_tokens={top_tokens} of {student.shape[-1]} classes; give fewer, or None for all")
    kept = teacher.topk(top_tokens, dim=-1).indices  # (..., k)
    # The softmax of some logits is the whole one, normalised over these.
    chosen = student.gather(-1, kept), teacher.gather(-1, kept)  # (..., k) each
    return logits_loss(*chosen, temperature=temperature, divergence=divergence, mask=mask, count=count)
