r"""How alike the heads of an attention layer are: centred kernel alignment (CKA) of what they write.

The context of a head is its softmax-weighted sum of values, ``(B, T, d)``; those of all heads side by side,
``(B, T, H·d)``, are what enters the output projection. Heads whose contexts are equal up to rotation and scale have a
linear CKA of 1 (Kornblith et al. 2019, arXiv 1905.00414, Eq. 5 and Section 3), so one of them can write for both:
head fusion of ELM (arXiv 2510.27037, Algorithm 1). The paper gives no formulas; those here are of the code published
with its sibling W-PCA by the same authors, from which we differ as each docstring says.
:mod:`hf_elastic.head_merging` makes one head of several.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hf_elastic.errors import DataError

Samples = Literal["tokens", "sequences"]
_LEAST_VARIANCE = 1e-12  # of the mean square: what rounding in float32 leaves of a constant is below


class HeadFeatures:
    r"""Statistics of the contexts of all heads of one attention layer, summed over batches in float64 on the CPU.

    Two ways of comparing heads, by what counts as a sample:

    * ``"tokens"``: each token that is no padding. From the covariances :math:`C` over all batches together,
      :math:`\mathrm{CKA}_{ab} = \|C_{ab}\|_F^2 / (\|C_{aa}\|_F \|C_{bb}\|_F)`: one batch or many give the same.
      With few more tokens than ``d`` it is high for any two heads; pass at least ``10·d``.
    * ``"sequences"``, as in the code of W-PCA: each sequence; the feature of a head is its context flattened to
      ``(B, T·d)``, with padding zeroed. Gram matrices :math:`K_a = F_a F_a^T`, doubly centred to
      :math:`\tilde K_a`, give :math:`\mathrm{HSIC}_{ab} = \sum \tilde K_a \odot \tilde K_b / (B - 1)^2`, the mean over
      batches is taken (that code looks at one), and
      :math:`\mathrm{CKA}_{ab} = \mathrm{HSIC}_{ab} / \sqrt{\mathrm{HSIC}_{aa} \mathrm{HSIC}_{bb}}`. This HSIC is the
      biased one: with few sequences of many features it is near 1 for whatever two heads (two sequences: 1 exactly),
      which is why tokens are our default. The paper does not say what its samples are.

    Args:
        heads: ``H``.
        head_dim: ``d``.
        samples: see above.

    Attributes:
        count: tokens that were added, or batches of sequences.

    Raises:
        DataError: a size is below 1, or ``samples`` is neither of the two.
    """

    def __init__(self, heads: int, head_dim: int, *, samples: Samples = "tokens") -> None:
        if heads < 1 or head_dim < 1:
            raise DataError(f"heads={heads!r} and head_dim={head_dim!r} must be at least 1")
        if samples not in get_args(Samples):
            raise DataError(f"samples={samples!r} is neither 'tokens' nor 'sequences'")
        self.heads, self.head_dim, self.samples, self.count = heads, head_dim, samples, 0
        width = heads * head_dim if samples == "tokens" else 0
        self._start = torch.zeros(width, dtype=torch.float64)  # the first token, around which sums lose no digits
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)
        self._hsic = torch.zeros(heads, heads, dtype=torch.float64)
        self._gram_squares = torch.zeros(heads, dtype=torch.float64)

    def add(self, context: Tensor, mask: Tensor | None = None) -> None:
        """Adds a batch; products are taken where it lies, and only sums move to the CPU.

        Args:
            context: ``(B, T, H·d)``, what enters the output projection.
            mask: ``(B, T)``, non-zero at tokens, zero at padding, which is left out whatever it holds. A sequence
                of padding alone is no sample.

        Raises:
            DataError: shapes do not fit, a feature of a token is NaN or infinite, or there are fewer than two
                sequences where sequences are the samples. What was added before stays as it is.
        """
        width = self.heads * self.head_dim
        if context.ndim != 3 or context.shape[2] != width:
            raise DataError(
                f"contexts of {self.heads} heads of {self.head_dim} have the shape (B, T, {width}), "
                f"got {tuple(context.shape)}"
            )
        if mask is not None and mask.shape != context.shape[:2]:
            raise DataError(f"a mask of contexts {tuple(context.shape)} has their (B, T), got {tuple(mask.shape)}")
        context = context.detach()
        if mask is None:
            real = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        else:
            real = mask.to(context.device) != 0  # (B, T)
        if self.samples == "tokens":
            self._add_tokens(context[real])
        else:
            self._add_sequences(context.masked_fill(~real[..., None], 0)[real.any(1)])

    def _add_tokens(self, rows: Tensor) -> None:
        """Adds ``(N, H·d)``."""
        if not len(rows):
            return
        start = self._start if self.count else rows[0].double().cpu()  # (D,)
        moved = rows.double() - start.to(rows.device)  # (N, D)
        products, total = (moved.t() @ moved).cpu(), moved.sum(0).cpu()  # (D, D), (D,)
        _check_finite(products.diagonal())
        self._start = start
        self._products += products
        self._sum += total
        self.count += len(rows)

    def _add_sequences(self, features: Tensor) -> None:
        """Adds ``(B, T, H·d)`` without padding."""
        sequences = len(features)
        if sequences < 2:
            raise DataError(
                f"a batch of {sequences} sequences compares nothing; pass batches of at least two, or samples='tokens'"
            )
        split = features.double().unflatten(2, (self.heads, self.head_dim))  # (B, T, H, d)
        flat = split.permute(2, 0, 1, 3).flatten(2)  # (H, B, T·d)
        gram = flat @ flat.mT  # (H, B, B)
        centred = gram - gram.mean(1, keepdim=True)
        centred = (centred - centred.mean(2, keepdim=True)).flatten(1)  # (H, B²)
        hsic, squares = (centred @ centred.t()).cpu(), gram.square().sum((1, 2)).cpu()  # (H, H), (H,)
        _check_finite(squares)
        self._hsic += hsic / (sequences - 1) ** 2
        self._gram_squares += squares / (sequences - 1) ** 2
        self.count += 1

    def cka(self) -> Tensor:
        """Linear CKA of each two heads, ``(H, H)``, float64, from 0 to 1, with ones on the diagonal.

        A head without variance (a constant, see :meth:`constant_heads`) has 0 to all others: it is alike to none.

        Raises:
            DataError: nothing was added, or a single token.
        """
        self._check_count()
        hsic = self._hsic if self.samples == "sequences" else self._covariance_squares()  # (H, H)
        hsic = (hsic + hsic.t()) / 2  # symmetric but for rounding
        norm = hsic.diagonal().sqrt()  # (H,)
        norm[list(self.constant_heads())] = torch.inf
        return (hsic / torch.outer(norm, norm)).clamp(0, 1).fill_diagonal_(1)

    def constant_heads(self) -> tuple[int, ...]:
        """Heads whose context is the same in all samples, up to rounding in float32.

        Raises:
            DataError: nothing was added, or a single token.
        """
        self._check_count()
        if self.samples == "sequences":
            spread, size = self._hsic.diagonal().sqrt(), self._gram_squares.sqrt()  # (H,), (H,)
        else:
            around = self._sum / self.count  # (D,)
            variance = self._products.diagonal() / self.count - around.square()  # (D,)
            square = variance + (self._start + around).square()  # (D,)
            spread, size = (x.unflatten(0, (self.heads, -1)).sum(1) for x in (variance, square))  # (H,), (H,)
        return tuple((spread <= _LEAST_VARIANCE * size).nonzero().flatten().tolist())

    def covariance(self, a: int, b: int) -> Tensor:
        r"""Covariance :math:`\mathrm{E}[(c_a - \bar c_a)(c_b - \bar c_b)^T]` over tokens, ``(d, d)``, float64.

        Divided by the number of tokens, not by one less.

        Args:
            a: the head of the rows.
            b: the head of the columns.

        Raises:
            DataError: the samples are sequences, nothing was added, a single token, or there is no such head.
        """
        rows, columns = self._place(a), self._place(b)
        around = self._sum / self.count  # (D,)
        return torch.addr(self._products[rows, columns] / self.count, around[rows], around[columns], alpha=-1)

    def mean(self, a: int) -> Tensor:
        """Mean context of a head over tokens, ``(d,)``, float64.

        Raises:
            DataError: as :meth:`covariance`.
        """
        place = self._place(a)
        return self._start[place] + self._sum[place] / self.count

    def _covariance_squares(self) -> Tensor:
        """Squared Frobenius norm of the covariance of each two heads, ``(H, H)``."""
        around = self._sum / self.count  # (D,)
        found = []
        for head in range(self.heads):
            place = self._place(head)
            strip = torch.addr(self._products[place] / self.count, around[place], around, alpha=-1)  # (d, D)
            found.append(strip.square().unflatten(1, (self.heads, -1)).sum((0, 2)))  # (H,)
        return torch.stack(found)

    def _place(self, head: int) -> slice:
        """Where the features of a head are."""
        if self.samples != "tokens":
            raise DataError("covariances and means are of tokens; make HeadFeatures with samples='tokens'")
        self._check_count()
        if not 0 <= head < self.heads:
            raise DataError(f"head {head!r} is not among 0 to {self.heads - 1}")
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def _check_count(self) -> None:
        if not self.count:
            raise DataError("no contexts were added; pass batches with tokens that are no padding to add()")
        if self.samples == "tokens" and self.count < 2:
            raise DataError("a single token has no covariance; add more")


def _check_finite(squares: Tensor) -> None:
    if not bool(torch.isfinite(squares).all()):
        raise DataError("the contexts hold NaN or infinity; check the weights and the batches")


def greedy_groups(cka: Tensor, threshold: float = 0.9) -> tuple[tuple[int, ...], ...]:
    """Groups heads: the first one that is left takes all later ones that are left and alike.

    Algorithm 1 of ELM (arXiv 2510.27037), with 0.9 as in the code of its sibling W-PCA. There, a head that is alike to
    two earlier heads is counted twice, and too many heads go; here each head is in one group.

    Args:
        cka: ``(H, H)``, of which the part above the diagonal is read.
        threshold: similarities above it are alike; above 0, at most 1 (which groups nothing).

    Returns:
        Groups in the order of their first heads, each ascending; a head alike to no other is a group of one.

    Raises:
        DataError: the matrix is not square or not finite, or the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise DataError(f"threshold={threshold!r} must be above 0 and at most 1")
    if cka.ndim != 2 or cka.shape[0] != cka.shape[1] or not len(cka):
        raise DataError(f"similarities of heads are a square matrix (H, H), got {tuple(cka.shape)}")
    if not bool(torch.isfinite(cka).all()):
        raise DataError("the similarities of heads hold NaN or infinity")
    alike: list[list[bool]] = (cka.double() > threshold).tolist()
    left = list(range(len(cka)))
    groups = []
    while left:
        first, *others = left
        group = (first, *(head for head in others if alike[first][head]))
        groups.append(group)
        left = [head for head in left if head not in group]
    return tuple(groups)


def resplit_count(heads_left: int, width: int) -> int:
    """The largest number of heads, at most ``heads_left``, that divides the width of an attention.

    What ELM's sibling code does after head removal: projections keep their width and the heads that are left become
    wider, so their number is lowered until it divides the width.

    Raises:
        DataError: a number is below 1.
    """
    if heads_left < 1 or width < 1:
        raise DataError(f"heads_left={heads_left!r} and width={width!r} must be at least 1")
    return next(count for count in range(heads_left, 0, -1) if width % count == 0)


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Linear CKA of two feature matrices with the same samples (Kornblith et al. 2019, arXiv 1905.00414).

    With columns centred, :math:`\|X^T Y\|_F^2 / (\|X^T X\|_F \|Y^T Y\|_F)`, from 0 to 1; the same from the products of
    rows where there are fewer rows than columns. Not changed by rotations and scales of either; high for whatever two
    where there are few more samples than columns.

    Args:
        x: ``(N, D1)``.
        y: ``(N, D2)``.

    Returns:
        0.0 where one of them is constant.

    Raises:
        DataError: these are no two matrices of as many rows, at least two, or a feature is not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise DataError(
            f"features are (N, D1) and (N, D2) with N of at least 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.detach().double(), y.detach().double()
    _check_finite(x.square().sum() + y.square().sum().to(x.device))
    first, second = x - x.mean(0), y - y.mean(0)  # (N, D1), (N, D2)
    if any(bool(c.square().sum() <= _LEAST_VARIANCE * f.square().sum()) for c, f in ((first, x), (second, y))):
        return 0.0
    first, second = first / first.norm(), (second / second.norm()).to(first.device)
    if len(x) < max(x.shape[1], y.shape[1]):
        grams = first @ first.t(), second @ second.t()  # (N, N), (N, N)
        shared, norms = (grams[0] * grams[1]).sum(), grams[0].norm() * grams[1].norm()
    else:
        shared = (first.t() @ second).square().sum()
        norms = (first.t() @ first).norm() * (second.t() @ second).norm()
    return min(1.0, max(0.0, float(shared / norms)))
