"""How well a score ranks architectures: Spearman and Kendall with bootstrap intervals; ZeroLM's weight of attention.

Truths and scores are arrays over the same architectures, larger is better in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, spearmanr

from hf_elastic.errors import DataError

Floats = NDArray[np.float64]

_FEWEST = 3
_EITHER = 0.5
_WHOLE = 2000  # architectures whose comparisons fit into memory all at once
_LEVEL = 0.95
ALPHAS: Floats = np.arange(-15, 16) / 10
"""The grid of Algorithm 1: -1.5, -1.4, ..., 1.5."""


@dataclass(frozen=True)
class Correlation:
    """Rank correlations of a score with the truth.

    Attributes:
        spearman, kendall: coefficients (Kendall's is tau-b, which counts ties).
        spearman_interval, kendall_interval: 95 % intervals over bootstrap samples of the architectures, if any.
        count: architectures.
    """

    spearman: float
    kendall: float
    spearman_interval: tuple[float, float] | None
    kendall_interval: tuple[float, float] | None
    count: int

    def __str__(self) -> str:
        pairs = ((self.spearman, self.spearman_interval), (self.kendall, self.kendall_interval))
        return " / ".join(f"{c:.3f} [{i[0]:.3f}, {i[1]:.3f}]" if i else f"{c:.3f}" for c, i in pairs)


def correlation(scores: ArrayLike, truth: ArrayLike, *, resamples: int = 400, seed: int = 0) -> Correlation:
    """Spearman and Kendall of a score with the truth.

    Args:
        scores, truth: ``(N,)``, larger is better.
        resamples: bootstrap samples of the intervals, 0 for none; samples in which either is constant are left out.
        seed: of the samples.

    Raises:
        DataError: they differ in length, are fewer than three, hold a value that is not finite, or are ties only.
    """
    found, wanted = checked_scores(scores, name="scores"), checked_scores(truth, name="the truth")
    if len(found) != len(wanted):
        raise DataError(f"{len(found)} scores do not fit {len(wanted)} architectures")
    if resamples < 1:
        return Correlation(*_both(found, wanted), None, None, len(found))
    rows = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    kept = [r for r in rows if np.ptp(found[r]) > 0 and np.ptp(wanted[r]) > 0] or [np.arange(len(found))]
    pairs = _resampled(found, wanted, kept) if len(found) <= _WHOLE else [_both(found[r], wanted[r]) for r in kept]
    edges = 100 * (1 - _LEVEL) / 2, 100 * (1 + _LEVEL) / 2
    low, high = np.percentile(np.array(pairs), edges, axis=0)
    return Correlation(
        *_both(found, wanted), (float(low[0]), float(high[0])), (float(low[1]), float(high[1])), len(found)
    )


def _resampled(scores: Floats, truth: Floats, rows: list[NDArray[np.int64]]) -> Floats:
    """Both coefficients of many resamples, ``(R, 2)``: each weighs architectures by how often it has drawn them."""
    weights = np.array([np.bincount(r, minlength=len(scores)) for r in rows], dtype=np.float64)  # (R, N)
    signs = [np.sign(values[:, None] - values[None, :]) for values in (scores, truth)]  # (N, N)

    def summed(matrix: Floats) -> Floats:
        result: Floats = np.einsum("rn,rn->r", weights @ matrix, weights)
        return result

    kendall = summed(signs[0] * signs[1]) / np.sqrt(summed(np.abs(signs[0])) * summed(np.abs(signs[1])))
    # The rank of an architecture is how many lie below it, and half of its equals.
    ranks = [weights @ (0.5 + 0.5 * sign).T for sign in signs]  # (R, N)
    means = [np.average(rank, axis=1, weights=weights)[:, None] for rank in ranks]
    first, second = (rank - mean for rank, mean in zip(ranks, means, strict=True))
    covariance = (weights * first * second).sum(1)
    spearman = covariance / np.sqrt((weights * first**2).sum(1) * (weights * second**2).sum(1))
    return np.stack([spearman, kendall], axis=1)


def _both(scores: Floats, truth: Floats) -> tuple[float, float]:
    return float(spearmanr(scores, truth).statistic), float(kendalltau(scores, truth).statistic)


def checked_scores(values: ArrayLike, *, name: str) -> Floats:
    """Values as ``(N,)`` that can be ranked.

    Raises:
        DataError: they are fewer than three, not all finite, or all the same.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < _FEWEST:
        raise DataError(f"{name} must be a list of at least {_FEWEST} numbers, got an array of shape {found.shape}")
    if bad := int((~np.isfinite(found)).sum()):
        raise DataError(f"{bad} of {len(found)} values of {name} are not finite; score in a wider dtype")
    if np.ptp(found) == 0:
        raise DataError(f"{name} are ties only (all {found[0]:g}), which rank nothing")
    return found


def fitted_alpha(attention: ArrayLike, ffn: ArrayLike, truth: ArrayLike) -> float:
    """ZeroLM's weight of attention, fitted to a few labelled architectures (arXiv 2503.18646, Algorithm 1).

    Of the grid from -1.5 to 1.5 in steps of 0.1 the mean of the two values whose score
    ``alpha S_attention + (1 - alpha) S_ffn`` has the highest Kendall correlation with the truth. Of equally good values
    those nearest to 0.5 are taken, which the paper leaves open.

    Args:
        attention, ffn: ``(N,)``, the two parts of the score.
        truth: ``(N,)``, larger is better; negate a perplexity.

    Raises:
        DataError: as :func:`correlation`.
    """
    parts = _checked_parts(attention, ffn, truth)
    checked_scores(parts[2], name="the truth")
    if np.ptp(parts[0]) == 0 and np.ptp(parts[1]) == 0:
        raise DataError("both parts are the same for all architectures, so no weight of them ranks anything")
    taus = np.array([_tau(alpha * parts[0] + (1 - alpha) * parts[1], parts[2]) for alpha in ALPHAS])
    order = np.lexsort((np.abs(ALPHAS - 0.5), -np.round(taus, 12)))
    return float(ALPHAS[order[:2]].mean())


def label_free_alpha(attention: ArrayLike, ffn: ArrayLike, parameters: ArrayLike) -> float:
    """ZeroLM's weight of attention without labels (arXiv 2503.18646, Algorithm 2, Eq. 10-11).

    With Kendall correlations ``ap``, ``fp`` and ``af`` between the two parts of the score and the parameter count::

        lambda = | max(ap, fp) (1 - af / min(ap, fp)) |
        phi = (1 - fp) (1 - ap) + af
        alpha = lambda + phi if phi > ap else lambda - phi

    The result is not bounded to Algorithm 1's grid, as in the paper. Where the paper's rule is undefined: if a part is
    the same for all, 0.5, since every positive weight of the other ranks alike; if ``min(ap, fp)`` is 0, the quotient
    counts as 0.

    Args:
        attention, ffn, parameters: ``(N,)`` of architectures drawn from the space.

    Raises:
        DataError: they differ in length, are fewer than three, or are not finite.
    """
    a, f, p = _checked_parts(attention, ffn, parameters)
    if np.ptp(a) == 0 or np.ptp(f) == 0:
        return _EITHER
    ap, fp, af = _tau(a, p), _tau(f, p), _tau(a, f)
    lowest = min(ap, fp)
    strength = abs(max(ap, fp) * (1 - (af / lowest if lowest else 0.0)))
    phi = (1 - fp) * (1 - ap) + af
    return strength + (phi if phi > ap else -phi)


def _tau(a: Floats, b: Floats) -> float:
    found = float(kendalltau(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0
    return found if np.isfinite(found) else 0.0


def _checked_parts(*columns: ArrayLike) -> list[Floats]:
    found = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({column.shape for column in found}) != 1 or found[0].ndim != 1 or len(found[0]) < _FEWEST:
        shapes = ", ".join(str(column.shape) for column in found)
        raise DataError(f"the parts of a score are lists of one length, of at least {_FEWEST} numbers, got {shapes}")
    if not all(np.isfinite(column).all() for column in found):
        raise DataError("a part of a score is not finite; score in a wider dtype, or leave such architectures out")
    return found


