"""Scores from sizes alone: the expectation of ZeroLM under an initialisation, and the baselines, of many candidates.

No model is built and no weight is drawn. Of a matrix of ``n x m`` with independent entries of ``N(0, sigma^2)``, ZeroLM
(arXiv 2503.18646, Eq. 3-4) is expected to be::

    E[ ||W||_F^2 / min(n, m) ] = sigma^2 n m / min(n, m) = sigma^2 max(n, m)

The same ``sigma`` for all candidates is what makes this a score: under an initialisation that divides by the root of
the fan-in it would be ``max(n, m) / fan_in``, which is about the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_elastic.errors import DataError
from hf_elastic.proxies.zerolm_table import DEFAULT_ALPHA

Floats = NDArray[np.float64]
Matrices = Sequence[tuple[int, int]]
"""Sizes of the matrices of one candidate, ``(n, m)`` each, in any order."""


@dataclass(frozen=True)
class ShapeBatch:
    """Sizes of ``N`` candidate architectures; of lists of unequal lengths :meth:`padded` makes one.

    Attributes:
        attention: ``(N, M, 2)``, rows and columns of the weight matrices of attention; zeros where there is none.
        ffn: ``(N, M', 2)``, those of the FFNs.
        depth: ``(N,)``, layers.
        width: ``(N,)``, width of the residual stream (``d_model``).
        parameters: ``(N,)``, all parameters.
        decoder_parameters: ``(N,)``, those without embeddings.
        attention_std, ffn_std: ``(N, M)`` and ``(N, M')``, standard deviation of each matrix's initialisation; neither
            means one and the same for all.

    Raises:
        DataError: shapes do not fit, or a value is not finite, negative, or a size of a matrix that is half there.
    """

    attention: Floats
    ffn: Floats
    depth: Floats
    width: Floats
    parameters: Floats
    decoder_parameters: Floats
    attention_std: Floats | None = None
    ffn_std: Floats | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, _numbers(value, name=field.name))
        count = len(self.depth) if self.depth.ndim == 1 else 0
        for name in ("depth", "width", "parameters", "decoder_parameters"):
            _require_shape(getattr(self, name), (count,), name=name)
        for name in ("attention", "ffn"):
            sizes = getattr(self, name)
            _require_shape(sizes, (count, sizes.shape[1] if sizes.ndim > 1 else 0, 2), name=name)
            if ((sizes > 0).any(axis=2) != (sizes > 0).all(axis=2)).any():
                raise DataError(f"{name} holds a matrix with rows and no columns, or the reverse; both are 0 of none")
        if (self.attention_std is None) != (self.ffn_std is None):
            raise DataError("attention_std and ffn_std are given together or not at all")
        for name, sizes in (("attention_std", self.attention), ("ffn_std", self.ffn)):
            if getattr(self, name) is not None:
                _require_shape(getattr(self, name), sizes.shape[:2], name=name)

    def __len__(self) -> int:
        return len(self.depth)

    @classmethod
    def padded(
        cls,
        *,
        attention: Sequence[Matrices],
        ffn: Sequence[Matrices],
        depth: ArrayLike,
        width: ArrayLike,
        parameters: ArrayLike,
        decoder_parameters: ArrayLike,
    ) -> ShapeBatch:
        """Makes a batch of one list of matrices a candidate.

        Raises:
            DataError: as :class:`ShapeBatch`.
        """
        counts = {"depth": depth, "width": width, "parameters": parameters, "decoder_parameters": decoder_parameters}
        return cls(_padded(attention), _padded(ffn), **{n: _numbers(v, name=n) for n, v in counts.items()})

    def zerolm_parts(self, *, sigma: float = 1.0) -> tuple[Floats, Floats]:
        """Expected ``S_attention`` and ``S_ffn``, ``(N,)`` each: ``sum over matrices of sigma^2 max(n, m)``.

        Args:
            sigma: standard deviation of all matrices, where the batch has none of its own. It scales all scores alike.
        """
        if not 0 < sigma < np.inf:
            raise DataError(f"sigma={sigma!r} must be a finite number above 0")
        parts = ((self.attention, self.attention_std), (self.ffn, self.ffn_std))
        attention, ffn = (_expected(sizes, sigma if std is None else std) for sizes, std in parts)
        return attention, ffn

    def zerolm(self, alpha: float = DEFAULT_ALPHA, *, sigma: float = 1.0) -> Floats:
        """``alpha S_attention + (1 - alpha) S_ffn``, ``(N,)``, of :meth:`zerolm_parts`."""
        if not np.isfinite(alpha):
            raise DataError(f"alpha={alpha!r} must be a finite number")
        attention, ffn = self.zerolm_parts(sigma=sigma)
        return alpha * attention + (1 - alpha) * ffn

    def capacity(self, *, causal: bool) -> Floats:
        """What limits the task, ``(N,)``: full-rank parameters of a causal model, the separation rank of an encoder.

        Nothing is fitted. Next-token likelihood is limited by what the weights hold: Kaplan et al. (2020,
        arXiv 2001.08361) find it to depend on the number of parameters and hardly on their shape. What a matrix of
        ``n x m`` adds to a residual stream has at most rank ``min(n, m)``, so it counts as ``min(n, m)^2``; columns
        beyond that are redundant directions of the same subspace::

            causal:  sum over matrices of min(n, m)^2

        An encoder that is fine-tuned on sentences is limited by how it relates tokens. Levine et al. (2020,
        arXiv 2006.12467, theorems 1 and 2) bound the logarithm of the separation rank of self-attention: it grows like
        ``3^L log_3 d`` while ``L < log_3 d``, where depth is worth more than width, and like ``d L`` beyond; both meet
        at ``L = log_3 d``::

            encoder: min(3^L, d) max(L, log_3 d)

        Args:
            causal: which of both.
        """
        if causal:
            smaller = (sizes.min(axis=2) for sizes in (self.attention, self.ffn))
            found: Floats = sum((side**2).sum(axis=1) for side in smaller)  # type: ignore[assignment]
            return found
        threshold = np.log(self.width) / np.log(3)
        return np.minimum(3.0 ** np.minimum(self.depth, threshold), self.width) * np.maximum(self.depth, threshold)

    @property
    def width_depth(self) -> Floats:
        """Sum over the layers of the width of the residual stream, ``(N,)``."""
        return self.depth * self.width


ShapeScore = Callable[[ShapeBatch], Floats]
SHAPE_BASELINES: Mapping[str, ShapeScore] = {
    "params": lambda shapes: shapes.parameters,
    "decoder_params": lambda shapes: shapes.decoder_parameters,
    "depth": lambda shapes: shapes.depth,
    "width_depth": lambda shapes: shapes.width_depth,
}
"""Sizes that every score is to be compared with, ``(N,)`` of a batch; names as in ``hf_elastic.proxies.BASELINES``."""


def _expected(sizes: Floats, sigma: float | Floats) -> Floats:
    longer = np.maximum(sizes[:, :, 0], sizes[:, :, 1])  # (N, M, 2) -> (N, M)
    found: Floats = (np.square(sigma) * longer).sum(axis=1)  # (N, M) -> (N,)
    return found


def _numbers(values: ArrayLike, *, name: str) -> Floats:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is no array of numbers: {error}") from error
    if not np.isfinite(found).all() or (found < 0).any():
        raise DataError(f"{name} holds a number that is negative or not finite; sizes are counts, 0 of what is absent")
    return found


def _require_shape(values: Floats, shape: tuple[int, ...], *, name: str) -> None:
    if values.shape != shape or not shape[0]:
        expected = "one number for each of at least one architecture" if len(shape) == 1 else f"shape {shape}"
        raise DataError(f"{name} is of shape {values.shape}, expected {expected}")


def _padded(candidates: Sequence[Matrices]) -> Floats:
    longest = max((len(matrices) for matrices in candidates), default=0)
    sizes = np.zeros((len(candidates), longest, 2))
    for row, matrices in zip(sizes, candidates, strict=True):
        if matrices:
            row[: len(matrices)] = matrices
    return sizes
