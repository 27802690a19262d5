"""Distillation on the teacher's top tokens, against sums written out over them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_elastic.distillation import logits_loss
from hf_elastic.errors import TrainingError
from hf_elastic.training import Distillation
from hf_elastic.training.targets import LossContext
from hf_elastic.training.top_tokens import top_tokens_loss


def logits(*, seed: int) -> torch.Tensor:
    return 2 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed))


def by_hand(student: list[float], teacher: list[float], *, kept: int, temperature: float, reverse: bool) -> float:
    chosen = sorted(range(len(teacher)), key=lambda token: -teacher[token])[:kept]
    p, q = ([math.exp(scores[token] / temperature) for token in chosen] for scores in (teacher, student))
    p, q = ([value / sum(values) for value in values] for values in (p, q))
    if reverse:
        p, q = q, p
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_divergence_is_over_the_teachers_top_tokens_each_distribution_normalised_over_them(divergence: Any) -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    settings: dict[str, Any] = {"temperature": 1.7, "reverse": divergence == "reverse"}
    rows = [(b, t) for b in range(2) for t in range(3) if mask[b, t]]
    each = [by_hand(student[b, t].tolist(), teacher[b, t].tolist(), kept=4, **settings) for b, t in rows]
    found = top_tokens_loss(student, teacher, top_tokens=4, temperature=1.7, divergence=divergence, mask=mask)
    assert found.item() == pytest.approx(sum(each) / 4, rel=1e-5)
    plan = Distillation(top_tokens=4, temperature=1.7, divergence=divergence)
    context = LossContext(inputs={"attention_mask": mask})
    assert plan.loss(student, teacher, context=context).item() == pytest.approx(sum(each) / 4, rel=1e-5)


def test_all_tokens_give_the_whole_divergence_and_a_count_divides_the_sum() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    found = top_tokens_loss(student, teacher, top_tokens=7, count=11)
    torch.testing.assert_close(found, logits_loss(student, teacher, count=11))


def test_only_the_students_scores_of_the_top_tokens_get_a_gradient() -> None:
    student, teacher = logits(seed=0).requires_grad_(), logits(seed=1)
    top_tokens_loss(student, teacher, top_tokens=2).backward()
    assert student.grad is not None
    assert torch.equal(student.grad.ne(0).sum(-1), torch.full((2, 3), 2))
    assert student.grad.ne(0).gather(-1, teacher.topk(2).indices).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_tokens": 1}, "at least 2"),
        ({"top_tokens": 2.0}, "at least 2"),
        ({"top_tokens": 8, "divergence": "mse"}, "leave it out"),
        ({"top_tokens": 8, "target": "embeddings"}, "target='logits'"),
    ],
)
def test_top_tokens_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        Distillation(**settings)


def test_more_top_tokens_than_classes_are_refused() -> None:
    with pytest.raises(TrainingError, match="top_tokens=8 of 7 classes"):
        top_tokens_loss(logits(seed=0), logits(seed=1), top_tokens=8)
