"""PCA score of an FFN: how many directions its pre-activations vary in, as a share of those they could vary in.

ELM (Wang 2025, arXiv 2510.27037) widens the blocks of a supernet whose score is highest. The score needs nothing but
the count, the sum and the second moments of the pre-activations, which add up over micro-batches and over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_elastic.errors import DataError, TrainingError
from hf_elastic.least_squares import Scatter

Normalisation = Literal["min", "width"]

# Variance over mean square below which a column is constant: a spread of two units in the last place of float32.
_ROUNDING = 2.0**-44
_WITH_FLOAT64 = ("cpu", "cuda")


class PreActivations:
    r"""Sum the moments of the pre-activations of one block: what enters the FFN's activation function.

    Held are the number of tokens :math:`n`, :math:`\sum x` of ``(F,)`` and :math:`\sum x x^T` of ``(F, F)``, all in
    float64 and *not* shifted, so that adding the tensors of several objects gives the object of all their tokens: that
    is how ranks and micro-batches of one global batch are joined. The products are taken in float32, around the mean of
    the tokens they are taken over; what that shift took off is put back in float64. Sums in float64 that are not
    shifted lose :math:`10^{-16}` of the mean square, and float32 inputs have themselves lost more.

    Products stay in float32 under autocast too (TF32 where it is allowed). What is on a device that may lack float64
    (any but a CPU and CUDA) is summed on the CPU.

    Args:
        width: ``F``.
        device: where the pre-activations are.

    Attributes:
        device: where the sums are.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        kind = torch.device(device)
        self.width = width
        self.device = kind if kind.type in _WITH_FLOAT64 else torch.device("cpu")
        # The count is a tensor like the others, so that all three are reduced alike.
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=self.device)  # (F,)
        self._moments = torch.zeros(width, width, dtype=torch.float64, device=self.device)  # (F, F)

    @property
    def tokens(self) -> int:
        """How many tokens were summed."""
        return int(self._count)

    @torch.no_grad()
    def add(self, hidden: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Unlike the code beside the paper, which counts padding as tokens, we leave it out where there is a mask.

        Args:
            hidden: Pre-activations ``(B, T, F)``.
            mask: ``(B, T)``, not zero where a token counts; by default all count.

        Raises:
            DataError: The shapes do not fit.
        """
        rows = self._rows(hidden, mask)  # (n, F)
        if not len(rows):
            return
        with torch.autocast(self.device.type, enabled=False):
            around = Scatter(self.width, device=self.device)
            around.add(rows)
            total = rows.sum(0, dtype=torch.float64)  # (F,)
            self._moments += around.matrix(centred=True)
            self._moments.addr_(total, total, alpha=1 / len(rows))
        self._sum += total
        self._count += len(rows)

    def _rows(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens that count as ``(n, F)``, where the sums are."""
        if hidden.ndim < 2 or hidden.shape[-1] != self.width:
            raise DataError(f"pre-activations are (B, T, {self.width}) here, got {tuple(hidden.shape)}")
        if mask is not None and mask.shape != hidden.shape[:-1]:
            raise DataError(f"a mask of {tuple(mask.shape)} does not fit pre-activations of {tuple(hidden.shape)}")
        held = hidden.detach()
        kept = held.flatten(0, -2) if mask is None else held[mask.to(held.device) != 0]  # (n, F)
        return kept.to(self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums themselves, not copies: ``count`` of ``()``, ``sum`` of ``(F,)``, ``moments`` of ``(F, F)``.

        After ``torch.distributed.all_reduce(tensor)`` of each on every rank, every rank holds the global batch; a rank
        without tokens joins in with zeros.
        """
        return {"count": self._count, "sum": self._sum, "moments": self._moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the sums by others, such as what a reduction returned.

        Args:
            tensors: As :meth:`tensors` returns them.

        Raises:
            DataError: A tensor is missing, has another shape, or is not in float64.
        """
        for name, own in self.tensors().items():
            if name not in tensors:
                raise DataError(f"moments of pre-activations are {', '.join(self.tensors())}; {name} is missing")
            given = tensors[name]
            if given.shape != own.shape or given.dtype != own.dtype:
                got = f"{given.dtype} of {tuple(given.shape)}"
                raise DataError(f"{name} has to be {own.dtype} of {tuple(own.shape)}, got {got}")
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def covariance(self) -> Tensor:
        r"""Return :math:`C = H_c^T H_c / (n - 1)`, ``(F, F)`` in float64, with :math:`H_c` the centred tokens.

        A column whose spread is within float32's rounding of its mean is constant: its row and column are zero.

        Raises:
            DataError: There are fewer than two tokens.
        """
        count = self.tokens
        if count < 2:
            raise DataError(f"a covariance needs at least 2 tokens that count, got {count}; measure larger batches")
        mean = self._sum / count  # (F,)
        covariance = torch.addr(self._moments, mean, mean, alpha=-count)  # (F, F)
        squares = self._moments.diagonal()  # (F,)
        # What overflowed is not constant: it has to reach the caller.
        constant = (covariance.diagonal() <= _ROUNDING * squares) & squares.isfinite()  # (F,)
        return covariance.masked_fill_(constant[:, None] | constant, 0.0).div_(count - 1)


def pca_score(
    moments: PreActivations, *, inputs: int, eta: float = 0.99, normalise: Normalisation = "min"
) -> float:
    r"""Return the PCA score of a block on one global batch.

    With the eigenvalues :math:`\lambda_1 \ge \lambda_2 \ge \dots` of the covariance of the pre-activations
    :math:`H = X W_1 + b_1`, ``(n, F)``,

    .. math:: k(\eta) = \min \{k : \textstyle\sum_{i \le k} \lambda_i > \eta \sum_i \lambda_i\}, \qquad
        s = k(\eta) / \min(I, F) \text{ or } k(\eta) / F

    for an FFN of ``I`` inputs (ELM, arXiv 2510.27037; the exact form is that of its author's code: the paper's own
    notation was not at hand). ``normalise="min"`` is that code's default, ``"width"`` what its script for pre-training
    passes. The newest copy of that code disagrees with itself: its MobileBERT-like block takes ``eta=0.9`` and returns
    :math:`k` as it is, which no other block's score can be compared with. We take its older form, one ``eta`` and one
    normalisation for every block.

    Scores are those of one batch; a block's score in an epoch is the mean over the batches it was measured on.

    * :math:`n` tokens span at most :math:`n - 1` directions. With fewer tokens than ``F + 1`` the score tells the batch
      rather than the block, and scores of batches of different sizes cannot be compared.
    * :math:`X W_1 + b_1` varies in at most ``I`` directions, and so :math:`k \le \min(I, F, n - 1)` is kept where
      rounding (of half precision, or an ``eta`` within a millionth of 1) adds more.
    * Pre-activations that do not vary have :math:`k = 0`: there is nothing a wider FFN could add to.
    * Eigenvalues differ by rounding from one device to another; ranks that must agree take one rank's score.

    Args:
        moments: Of the tokens of the batch, over all ranks.
        inputs: ``I``, the width that enters the FFN.
        eta: Share of the variance, in (0, 1).
        normalise: What ``k`` is divided by.

    Returns:
        The score in [0, 1]; NaN where pre-activations, or their squares in float32, are not finite.

    Raises:
        DataError: There are fewer than two tokens.
        TrainingError: An argument is not what is allowed.
    """
    check_score_settings(eta=eta, normalise=normalise)
    if inputs < 1:
        raise TrainingError(f"inputs={inputs!r} is the width that enters the FFN, at least 1")
    covariance = moments.covariance()
    if not torch.isfinite(covariance).all():
        return math.nan
    most = min(inputs, moments.width)
    cumulated = torch.linalg.eigvalsh(covariance).clamp_(min=0.0).flip(0).cumsum(0)  # (F,)
    if not cumulated[-1] > 0:
        return 0.0
    directions = int((cumulated / cumulated[-1] <= eta).sum()) + 1
    return min(directions, most, moments.tokens - 1) / (most if normalise == "min" else moments.width)


def check_score_settings(*, eta: float, normalise: str) -> None:
    """Check the settings of :func:`pca_score`.

    Raises:
        TrainingError: One is not what is allowed.
    """
    if not 0 < eta < 1:
        raise TrainingError(f"eta={eta!r} is a share of the variance between 0 and 1, such as 0.99")
    if normalise not in get_args(Normalisation):
        raise TrainingError(f"normalise={normalise!r} is not one of {', '.join(map(repr, get_args(Normalisation)))}")
