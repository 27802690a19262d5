"""Distillation losses against formulas written out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.distillation import (
    dist_loss,
    embedding_loss,
    hidden_state_loss,
    label_mask,
    layer_map,
    layer_pairs,
    logits_loss,
    masked_mean,
    pearson_hidden_loss,
    pooled,
    relational_loss,
    top_k_distribution,
    top_k_loss,
)
from hf_elastic.errors import TrainingError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax_by_hand(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


STUDENT, TEACHER = [0.2, -1.0, 0.7], [1.5, 0.0, -0.5]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_divergence_is_kl_of_teacher_from_student_times_squared_temperature(
    temperature: float,
) -> None:
    s, t = softmax_by_hand(STUDENT, temperature), softmax_by_hand(TEACHER, temperature)
    loss = logits_loss(torch.tensor([STUDENT]), torch.tensor([TEACHER]), temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * kl_by_hand(t, s), rel=1e-5)


def test_reverse_divergence_swaps_the_two() -> None:
    s, t = softmax_by_hand(STUDENT, 1.0), softmax_by_hand(TEACHER, 1.0)
    loss = logits_loss(torch.tensor([STUDENT]), torch.tensor([TEACHER]), divergence="reverse")
    assert loss.item() == pytest.approx(kl_by_hand(s, t), rel=1e-5)


def test_squared_error_of_regression_logits() -> None:
    loss = logits_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]]), divergence="mse")
    assert loss.item() == pytest.approx((1 + 4) / 2)


def test_divergence_over_one_class_is_refused_since_it_is_always_zero() -> None:
    with pytest.raises(TrainingError, match="mse"):
        logits_loss(drawn(4, 1), drawn(4, 1))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_divergence_of_equal_logits_is_zero_with_zero_gradient(divergence: str) -> None:
    student = drawn(3, 5, 7).requires_grad_()
    loss = logits_loss(student, student.detach().clone(), divergence=divergence)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None and student.grad.abs().max() < 1e-6


def test_gradient_of_the_forward_divergence_is_student_minus_teacher_probabilities() -> None:
    student, teacher = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1)
    logits_loss(student, teacher).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1).requires_grad_()
    for loss in (logits_loss(student, teacher), embedding_loss(student[0], teacher[0])):
        loss.backward()
    relational_loss(student[:, 0], teacher[:, 0]).backward()
    hidden_state_loss([student], [teacher]).backward()
    assert teacher.grad is None


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), padding=st.integers(0, 4), seed=st.integers(0, 99))
def test_padding_and_repetition_of_the_batch_leave_masked_losses_unchanged(rows: int, padding: int, seed: int) -> None:
    student, teacher = drawn(rows, 3, 5, seed=seed), drawn(rows, 3, 5, seed=seed + 1)
    mask = torch.ones(rows, 3)
    plain = logits_loss(student, teacher, mask=mask)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full((rows, padding, 5), math.nan)], 1)

    wide = torch.cat([mask, torch.zeros(rows, padding)], 1)
    torch.testing.assert_close(logits_loss(padded(student), padded(teacher), mask=wide), plain)
    twice = logits_loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), mask=mask.repeat(2, 1))
    torch.testing.assert_close(twice, plain)


def test_losses_of_micro_batches_with_a_common_count_add_up_to_the_loss_of_the_batch() -> None:
    student, teacher = drawn(4, 3, 5), drawn(4, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1]])
    whole = logits_loss(student, teacher, mask=mask)
    parts = [
        logits_loss(student[part], teacher[part], mask=mask[part], count=mask.sum())
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_mask_that_keeps_nothing_gives_zero_and_can_be_differentiated() -> None:
    student = drawn(2, 3, 4).requires_grad_()
    loss = logits_loss(student, drawn(2, 3, 4, seed=1), mask=torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()


def test_half_precision_is_computed_in_single_precision() -> None:
    student, teacher = drawn(2, 8).bfloat16(), drawn(2, 8, seed=1).bfloat16()
    assert logits_loss(student, teacher).dtype == torch.float32
    torch.testing.assert_close(logits_loss(student, teacher), logits_loss(student.float(), teacher.float()))


def test_labels_of_causal_models_are_scored_one_position_earlier() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, 3, -100]])
    assert label_mask(labels).tolist() == [[True, False, True, True], [False, False, True, False]]
    shifted = label_mask(labels, shifted=True)
    assert shifted.tolist() == [[False, True, True, False], [False, True, False, False]]


@pytest.mark.parametrize("left", [False, True])
def test_pooling_ignores_padding_on_either_side(left: bool) -> None:
    tokens = drawn(1, 3, 4)
    padding = torch.full((1, 2, 4), 9.0)
    hidden = torch.cat([padding, tokens] if left else [tokens, padding], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1]] if left else [[1, 1, 1, 0, 0]])
    torch.testing.assert_close(pooled(hidden, mask), tokens.mean(1))
    torch.testing.assert_close(pooled(hidden, mask, pooling="last"), tokens[:, -1])
    torch.testing.assert_close(pooled(hidden, mask, pooling="cls"), hidden[:, 0])


def test_mean_pooling_of_a_sequence_without_tokens_is_zero() -> None:
    assert not pooled(drawn(1, 3, 4), torch.zeros(1, 3)).any()


def test_embedding_loss_is_one_minus_the_mean_cosine_and_ignores_length() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert embedding_loss(student, teacher).item() == pytest.approx(((1 - 1) + (1 - math.sqrt(0.5))) / 2, abs=1e-6)
    torch.testing.assert_close(embedding_loss(5 * student, teacher), embedding_loss(student, teacher))


def test_relational_loss_is_the_mean_squared_difference_of_off_diagonal_cosines() -> None:
    student, teacher = drawn(3, 4), drawn(3, 6, seed=1)
    total = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                s = torch.cosine_similarity(student[i], student[j], dim=0)
                t = torch.cosine_similarity(teacher[i], teacher[j], dim=0)
                total += float((s - t) ** 2)
    assert relational_loss(student, teacher).item() == pytest.approx(total / 6, rel=1e-5)


def test_relational_loss_sees_no_rotation_and_a_single_sentence_has_none() -> None:
    student = drawn(5, 4)
    rotation = torch.linalg.qr(drawn(4, 4, seed=1))[0]
    assert relational_loss(student @ rotation, student).item() == pytest.approx(0, abs=1e-10)
    assert relational_loss(drawn(1, 4), drawn(1, 4, seed=1)).item() == 0


def test_hidden_state_loss_averages_over_kept_tokens_and_pairs_of_layers() -> None:
    student = [drawn(2, 3, 4, seed=n) for n in range(3)]
    teacher = [drawn(2, 3, 4, seed=n + 9) for n in range(4)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    by_hand = [((student[i] - teacher[j]) ** 2).mean(-1)[mask.bool()].mean() for i, j in ((0, 1), (2, 3))]
    loss = hidden_state_loss(student, teacher, mask=mask, pairs=[(0, 1), (2, 3)])
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    cosine = hidden_state_loss(student[:1], teacher[:1], mask=mask, distance="cosine")
    expected = 1 - torch.cosine_similarity(student[0], teacher[0], dim=-1)[mask.bool()].mean()
    torch.testing.assert_close(cosine, expected)


def test_a_kept_layer_stands_for_the_skipped_ones_after_it() -> None:
    assert layer_pairs([0, 1, 2], layers=3) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_pairs([0, 1, 4, 5], layers=6) == ((0, 0), (1, 1), (2, 4), (5, 5), (6, 6))
    assert layer_pairs([1, 2], layers=5) == ((0, 0), (2, 2), (5, 5))
    assert layer_pairs([], layers=2) == ((0, 0), (2, 2))


@pytest.mark.parametrize("kept", [[1, 0], [0, 3], [-1], [0, 0]])
def test_layers_that_do_not_exist_or_are_not_in_order_are_refused(kept: list[int]) -> None:
    with pytest.raises(TrainingError, match="ascending"):
        layer_pairs(kept, layers=3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: logits_loss(drawn(2, 3), drawn(2, 4)),
        lambda: logits_loss(drawn(2, 3), drawn(2, 3), temperature=0),
        lambda: logits_loss(drawn(2, 3), drawn(2, 3), divergence="sideways"),  # type: ignore[arg-type]
        lambda: embedding_loss(drawn(2, 3), drawn(2, 4)),
        lambda: relational_loss(drawn(2, 3), drawn(3, 3)),
        lambda: hidden_state_loss([drawn(1, 2, 3)] * 2, [drawn(1, 2, 3)]),
        lambda: hidden_state_loss([drawn(1, 2, 3)], [drawn(1, 2, 3)], pairs=[(0, 1)]),
        lambda: hidden_state_loss([drawn(1, 2, 3)], [drawn(1, 2, 3)], pairs=[]),
        lambda: hidden_state_loss([drawn(1, 2, 3)], [drawn(1, 2, 3)], distance="far"),  # type: ignore[arg-type]
        lambda: pooled(drawn(1, 2, 3), pooling="max"),  # type: ignore[arg-type]
        lambda: masked_mean(drawn(2, 3), torch.ones(3)),
        lambda: pearson_hidden_loss(drawn(1, 2, 3), drawn(1, 2, 4)),
        lambda: pearson_hidden_loss(drawn(1, 2, 3), drawn(1, 2, 3), mask=torch.ones(2)),
        lambda: dist_loss(drawn(2, 3), drawn(2, 4)),
        lambda: dist_loss(drawn(2, 3), drawn(2, 3), temperature=0),
        lambda: dist_loss(drawn(2, 1), drawn(2, 1)),
        lambda: dist_loss(drawn(2, 3), drawn(2, 3), mask=torch.ones(3)),
        lambda: layer_map(5, 12),
    ],
)
def test_what_does_not_fit_raises_one_line(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrainingError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_relative_distance_is_the_share_of_the_teachers_energy_that_is_missed() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    missed, energy = 0.0, 0.0
    for row, token in [(0, 0), (0, 1), (1, 0)]:
        missed += float((student[row, token] - teacher[row, token]).square().sum())
        energy += float(teacher[row, token].square().sum())
    found = hidden_state_loss([student], [teacher], mask=mask, distance="relative")
    assert float(found) == pytest.approx(missed / energy, rel=1e-5)
    scaled = hidden_state_loss([7 * student], [7 * teacher], mask=mask, distance="relative")
    assert float(scaled) == pytest.approx(float(found), rel=1e-5)


def bucketed(logits: torch.Tensor, classes: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Dense float64 probabilities of some classes and, last, of all others together."""
    p = (logits.double() / temperature).softmax(-1)
    rest = torch.ones_like(p).scatter(-1, classes, 0.0)
    return torch.cat([p.gather(-1, classes), (p * rest).sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 1.0), (4, 2.5), (10, 0.5)])
def test_divergence_of_the_top_k_has_the_rest_as_one_class(k: int, temperature: float, divergence: str) -> None:
    student, teacher = 3 * drawn(2, 5, 11, seed=1), 3 * drawn(2, 5, 11, seed=2)
    classes = teacher.argsort(-1, descending=True)[..., :k]
    p, q = (bucketed(logits, classes, temperature=temperature) for logits in (teacher, student))
    p, q = (p, q) if divergence == "forward" else (q, p)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)  # (2, 5)
    kept = top_k_distribution(teacher, k, temperature=temperature)
    settings = {"temperature": temperature, "divergence": divergence}
    assert top_k_loss(student, kept, **settings).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    masked = top_k_loss(student, kept, mask=mask, count=3, **settings)
    assert masked.item() == pytest.approx(expected[mask.bool()].sum().item() / 3, rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_divergence_of_the_top_k_grows_with_k_up_to_that_of_all_classes(divergence: str) -> None:
    student, teacher = 2 * drawn(6, 9, seed=1), 2 * drawn(6, 9, seed=2)
    losses = [top_k_loss(student, top_k_distribution(teacher, k), divergence=divergence).item() for k in range(1, 10)]
    whole = logits_loss(student, teacher, divergence=divergence).item()
    assert losses[-1] == pytest.approx(whole, rel=1e-5) and losses[0] < 0.9 * whole
    assert all(a <= b + 1e-6 for a, b in zip(losses, losses[1:], strict=False))  # data processing inequality


def test_the_top_k_may_be_rounded_to_half_precision() -> None:
    student, teacher = 2 * drawn(40, 50, seed=1), 2 * drawn(40, 50, seed=2)
    exact = top_k_distribution(teacher, 8)
    rounded = exact._replace(log_probabilities=exact.log_probabilities.half(), indices=exact.indices.int())
    assert top_k_loss(student, rounded).item() == pytest.approx(top_k_loss(student, exact).item(), rel=1e-3)
    teacher[:, 3] = -torch.inf  # a class that cannot be
    kept = top_k_distribution(teacher, 50)
    assert torch.isfinite(kept.log_probabilities.half()).all() and torch.isfinite(top_k_loss(student, kept))


def test_gradient_of_the_top_k_divergence_matches_finite_differences() -> None:
    student, kept = drawn(2, 7, seed=1).requires_grad_(), top_k_distribution(drawn(2, 7, seed=2), 3)
    top_k_loss(student, kept).backward()
    assert student.grad is not None
    for place in range(7):
        moved = student.detach().double()
        step = torch.zeros_like(moved)
        step[1, place] = 1e-2
        slope = (top_k_loss(moved + step, kept) - top_k_loss(moved - step, kept)) / 2e-2
        assert student.grad[1, place].item() == pytest.approx(slope.item(), abs=2e-4)


def test_a_top_k_that_cannot_be_is_refused() -> None:
    kept = top_k_distribution(drawn(4, 9), 3)
    for k in (0, 10):
        with pytest.raises(TrainingError, match=rf"top_k={k} is not within 1\.\.9"):
            top_k_distribution(drawn(4, 9), k)
    with pytest.raises(TrainingError, match="do not fit a teacher's top"):
        top_k_loss(drawn(5, 9), kept)
    with pytest.raises(TrainingError, match="do not fit a teacher's top"):
        top_k_loss(drawn(4, 2), kept)
    with pytest.raises(TrainingError, match="needs all logits"):
        top_k_loss(drawn(4, 9), kept, divergence="mse")
    with pytest.raises(TrainingError, match="temperature"):
        top_k_distribution(drawn(4, 9), 3, temperature=0)
    with pytest.raises(TrainingError, match="one class"):
        top_k_loss(drawn(4, 1), top_k_distribution(drawn(4, 1), 1))


# --- relational distillation


def channels_by_hand(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Standardised kept tokens ``(N, D)`` in float64, channel by channel."""
    rows = [hidden[b, t].double() for b in range(len(hidden)) for t in range(hidden.shape[1]) if mask[b, t]]
    columns = []
    for channel in range(hidden.shape[-1]):
        values = torch.stack([row[channel] for row in rows])
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        columns.append((values - mean) / (variance**0.5 + 1e-6))
    return torch.stack(columns, dim=-1)


def test_pearson_distance_standardises_channels_over_the_kept_tokens_of_the_batch() -> None:
    student, teacher = 3 * drawn(3, 5, 4) + 1, drawn(3, 5, 4, seed=1) - 20
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    student.requires_grad_()
    expected = (channels_by_hand(student, mask) - channels_by_hand(teacher, mask)).square().mean()
    (by_hand,) = torch.autograd.grad(expected, student)
    loss = pearson_hidden_loss(student, teacher, mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad, by_hand, rtol=1e-4, atol=1e-7)
    kept = mask.bool().numpy()
    rho = [
        np.corrcoef(student.detach().numpy()[kept, c].astype(np.float64), teacher.numpy()[kept, c])[0, 1]
        for c in range(4)
    ]
    count = kept.sum()
    assert loss.item() == pytest.approx((count - 1) / count * 2 * (1 - np.mean(rho)), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), tokens=st.integers(2, 5), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_pearson_distance_sees_neither_padding_nor_scale_and_shift_of_channels(
    rows: int, tokens: int, padding: int, seed: int
) -> None:
    student, teacher = drawn(rows, tokens, 3, seed=seed), drawn(rows, tokens, 3, seed=seed + 1)
    plain = pearson_hidden_loss(student, teacher)
    scale, shift = drawn(3, seed=seed + 2).exp(), 5 * drawn(3, seed=seed + 3)
    moved = pearson_hidden_loss(scale * student + shift, teacher * scale.flip(0) - shift)
    torch.testing.assert_close(moved, plain, rtol=2e-3, atol=1e-4)
    mask = torch.cat([torch.ones(rows, tokens), torch.zeros(rows, padding)], 1)
    filled = [
        torch.cat([x, torch.full((rows, padding, 3), value)], 1).requires_grad_()
        for x, value in ((student, math.inf), (teacher, math.nan))
    ]
    loss = pearson_hidden_loss(*filled, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert filled[0].grad is not None and torch.isfinite(filled[0].grad).all() and filled[1].grad is None
    assert not filled[0].grad[:, tokens:].any()


@pytest.mark.parametrize("constant", [0.0, 3.3, 1234.567])
def test_constant_channels_have_a_finite_pearson_distance_and_gradient(constant: float) -> None:
    student, teacher = drawn(2, 7, 3), drawn(2, 7, 3, seed=1)
    student[..., 1] = constant
    teacher[..., 2] = constant
    student.requires_grad_()
    loss = pearson_hidden_loss(student, teacher)
    loss.backward()
    rho = np.corrcoef(student.detach().numpy()[..., 0].ravel(), teacher.numpy()[..., 0].ravel())[0, 1]
    # A constant channel is all zeros, whose distance from a standardised one is (N - 1) / N.
    assert loss.item() == pytest.approx(13 / 14 * (2 * (1 - rho) + 1 + 1) / 3, rel=1e-3)
    assert student.grad is not None and torch.isfinite(student.grad).all()
    both = pearson_hidden_loss(torch.full((2, 7, 1), constant), torch.full((2, 7, 1), constant - 1))
    assert both.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_than_two_tokens_have_no_pearson_distance(kept: int) -> None:
    student, mask = drawn(2, 3, 4).requires_grad_(), torch.zeros(2, 3)
    mask[1, :kept] = 1
    loss = pearson_hidden_loss(student, drawn(2, 3, 4, seed=1), mask=mask)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()


def test_pearson_is_a_distance_of_hidden_states_and_computes_in_single_precision() -> None:
    student, teacher = [drawn(2, 3, 4, seed=n) for n in (0, 1)], [drawn(2, 3, 4, seed=n) for n in (2, 3)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = sum(pearson_hidden_loss(s, t, mask=mask) for s, t in zip(student, teacher, strict=True)) / 2
    found = hidden_state_loss(student, teacher, mask=mask, distance="pearson")
    torch.testing.assert_close(found, torch.as_tensor(expected))
    half = pearson_hidden_loss(student[0].bfloat16(), teacher[0].bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pearson_hidden_loss(student[0].bfloat16().float(), teacher[0].bfloat16().float()))


def rho_by_hand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x - sum(x) / len(x), y - sum(y) / len(y)
    return sum(x * y) / (sum(x * x) ** 0.5 * sum(y * y) ** 0.5)


def dist_by_hand(student: torch.Tensor, teacher: torch.Tensor, *, factors: tuple[float, float], tau: float) -> Any:
    """DIST in float64, correlation by correlation."""
    p, q = (torch.stack([row.double() / tau for row in z]).softmax(-1) for z in (student, teacher))
    rows = [rho_by_hand(p[i], q[i]) for i in range(len(p))]
    columns = [rho_by_hand(p[:, c], q[:, c]) for c in range(p.shape[1])]
    inter, intra = (tau**2 * (1 - sum(part) / len(part)) for part in (rows, columns))
    return factors[0] * inter + factors[1] * intra


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 1.0), (1.0, 1.0, 3.0), (0.0, 1.0, 0.7)])
def test_dist_correlates_the_probabilities_of_each_sample_and_of_each_class(
    beta: float, gamma: float, tau: float
) -> None:
    student, teacher = 2 * drawn(6, 5), 2 * drawn(6, 5, seed=1)
    student.requires_grad_()
    expected = dist_by_hand(student, teacher, factors=(beta, gamma), tau=tau)
    (by_hand,) = torch.autograd.grad(expected, student)
    loss = dist_loss(student, teacher, beta=beta, gamma=gamma, temperature=tau)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(student.grad, by_hand.float(), rtol=1e-3, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 5), classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_dist_sees_neither_shifts_of_logits_nor_the_order_of_samples_and_classes(
    rows: int, classes: int, seed: int
) -> None:
    student, teacher = drawn(rows, classes, seed=seed), drawn(rows, classes, seed=seed + 1)
    loss = dist_loss(student, teacher)
    assert -1e-5 <= loss.item() <= 4 + 1e-5
    shifted = dist_loss(student + drawn(rows, 1, seed=seed + 2), teacher - drawn(rows, 1, seed=seed + 3))
    torch.testing.assert_close(shifted, loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dist_loss(student.flip(0, 1), teacher.flip(0, 1)), loss, rtol=1e-4, atol=1e-4)


def test_dist_of_equal_logits_is_zero_also_where_most_classes_are_rare() -> None:
    logits = 8 * drawn(6, 5000)
    assert dist_loss(logits, logits.clone()).item() == pytest.approx(0, abs=2e-3)
    teacher = 8 * drawn(6, 5000, seed=1)
    expected = dist_by_hand(logits, teacher, factors=(1.0, 1.0), tau=1.0)
    assert dist_loss(logits, teacher).item() == pytest.approx(expected.item(), rel=1e-3)


def test_dist_takes_the_kept_positions_as_samples() -> None:
    student, teacher = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    expected = dist_loss(student[mask.bool()], teacher[mask.bool()])
    student[~mask.bool()], teacher[~mask.bool()] = math.nan, math.inf
    student.requires_grad_()
    loss = dist_loss(student, teacher, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_one_sample_has_no_correlation_of_classes_and_none_has_nothing() -> None:
    student, teacher = drawn(1, 5).requires_grad_(), drawn(1, 5, seed=1)
    rho = rho_by_hand(student.detach()[0].double().softmax(-1), teacher[0].double().softmax(-1))
    assert dist_loss(student, teacher).item() == pytest.approx(1 - rho.item(), rel=1e-4)
    nothing = dist_loss(student, teacher, mask=torch.zeros(1))
    nothing.backward()
    assert nothing.item() == 0 and student.grad is not None and not student.grad.any()


def test_dist_of_constant_probabilities_has_a_finite_gradient() -> None:
    student = torch.zeros(4, 5, requires_grad=True)
    loss = dist_loss(student, drawn(4, 5))
    loss.backward()
    assert loss.item() == pytest.approx(2) and student.grad is not None and torch.isfinite(student.grad).all()
    certain = torch.full((4, 5), -1e4).index_fill(1, torch.tensor([2]), 1e4).requires_grad_()
    loss = dist_loss(certain, drawn(4, 5))
    loss.backward()
    assert torch.isfinite(loss) and certain.grad is not None and torch.isfinite(certain.grad).all()


def test_layers_of_a_student_learn_from_the_same_share_of_a_teachers_depth() -> None:
    assert layer_map(12, 12) == tuple(range(12))
    assert layer_map(6, 12) == (1, 3, 5, 7, 9, 11)
    assert layer_map(1, 3) == (2,)
    for student, teacher in ((5, 12), (24, 12), (0, 12)):
        with pytest.raises(TrainingError, match=rf"{teacher} layers .* {student};.* 1, 2, 3, 4, 6, 12 layers"):
            layer_map(student, teacher)
