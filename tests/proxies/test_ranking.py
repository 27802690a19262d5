"""Correlations against SciPy, intervals against their meaning, ZeroLM's two rules for alpha against their listings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

import hf_elastic as he
from hf_elastic.proxies import correlation, fitted_alpha, label_free_alpha


def drawn(count: int, *, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    return truth + noise * rng.normal(size=count), truth


def test_coefficients_are_scipys() -> None:
    scores, truth = drawn(60)
    found = correlation(scores, truth)
    assert found.spearman == pytest.approx(spearmanr(scores, truth)[0])
    assert found.kendall == pytest.approx(kendalltau(scores, truth)[0])
    assert found.count == 60


def test_intervals_hold_the_coefficient_of_the_population_about_as_often_as_they_say() -> None:
    whole = correlation(*drawn(20_000, seed=99), resamples=2)
    inside = 0
    for seed in range(60):
        low, high = correlation(*drawn(60, seed=seed), resamples=200, seed=seed).kendall_interval
        inside += low <= whole.kendall <= high
    assert 50 <= inside <= 60  # 95 % of 60 are 57


@pytest.mark.parametrize("ties", [False, True])
def test_intervals_are_those_of_scipys_coefficients_on_resamples(ties: bool) -> None:
    scores, truth = drawn(40)
    if ties:
        scores, truth = scores.round(), truth.round()
    rows = np.random.default_rng(3).integers(40, size=(50, 40))
    wanted = [(spearmanr(scores[r], truth[r])[0], kendalltau(scores[r], truth[r])[0]) for r in rows]
    low, high = np.percentile(np.array(wanted), (2.5, 97.5), axis=0)
    found = correlation(scores, truth, resamples=50, seed=3)
    assert found.spearman_interval == pytest.approx((low[0], high[0]), abs=1e-12)
    assert found.kendall_interval == pytest.approx((low[1], high[1]), abs=1e-12)


def test_a_perfect_score_has_no_spread() -> None:
    found = correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0])
    assert found.kendall == found.spearman == 1.0
    assert found.kendall_interval == (1.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "scores are ties only"),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], "the truth are ties only"),
        ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0], "1 of 3 values of scores are not finite"),
        ([1.0, 2.0], [1.0, 2.0], "at least 3"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], "3 scores do not fit 4"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores: list[float], truth: list[float], message: str) -> None:
    with pytest.raises(he.DataError, match=message):
        correlation(scores, truth)


def test_without_resamples_there_are_no_intervals() -> None:
    found = correlation(*drawn(30), resamples=0)
    assert found.kendall_interval is None and str(found).count("[") == 0


def test_algorithm_1_is_its_listing() -> None:
    rng = np.random.default_rng(0)
    a, f = rng.normal(size=(2, 40))
    truth = 0.8 * a + 0.2 * f + 0.3 * rng.normal(size=40)
    scored = []
    for step in range(31):
        alpha = -1.5 + 0.1 * step
        scored.append((kendalltau(truth, alpha * a + (1 - alpha) * f)[0], alpha))
    best, second = sorted(scored, key=lambda pair: -pair[0])[:2]
    found = fitted_alpha(a, f, truth)
    if best[0] > sorted(scored)[-3][0]:  # no ties for the second place
        assert found == pytest.approx((best[1] + second[1]) / 2)
    assert 0.5 < found < 1.5


def test_algorithm_1_finds_the_weight_that_made_the_truth() -> None:
    rng = np.random.default_rng(1)
    a, f = rng.normal(size=(2, 400))
    for alpha in (-1.0, 0.3, 0.7, 1.2):
        assert fitted_alpha(a, f, alpha * a + (1 - alpha) * f) == pytest.approx(alpha, abs=0.06)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_algorithm_2_is_its_equations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.normal(size=12)
    a, f = p + rng.normal(size=12), p + rng.normal(size=12)
    ap, fp, af = kendalltau(a, p)[0], kendalltau(f, p)[0], kendalltau(a, f)[0]
    if min(ap, fp) == 0:
        return
    strength = abs(max(ap, fp) * (1 - af / min(ap, fp)))
    phi = (1 - fp) * (1 - ap) + af
    assert label_free_alpha(a, f, p) == pytest.approx(strength + (1 if phi > ap else -1) * phi)


def test_algorithm_1_refuses_what_ranks_nothing() -> None:
    with pytest.raises(he.DataError, match="the truth are ties only"):
        fitted_alpha([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 1.0])
    with pytest.raises(he.DataError, match="both parts are the same"):
        fitted_alpha([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0])


def test_algorithm_2_gives_a_number_where_a_part_never_changes() -> None:
    assert label_free_alpha([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.5
    with pytest.raises(he.DataError, match="not finite"):
        label_free_alpha([1.0, float("inf"), 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    with pytest.raises(he.DataError, match="of one length"):
        label_free_alpha([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
