"""Least squares in closed form: normal equations summed over batches, ridge solutions, which inputs to give up.

Pure linear algebra on ``y = x W + b`` with ``x`` of ``(N, I)``, ``W`` of ``(I, O)``; sums are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_elastic.errors import DataError

_ROWS = 1024  # summed in float32 at once, for inputs in half precision
_PIECE = 128  # rows of a product in float32
_STRIP = 512  # rows or columns that are worked on at once, so that no second matrix of the size is needed
_LARGEST_SPREAD = 1e12  # of a factor's diagonal, squared: beyond, float64 says nothing


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        weight: ``(I, O)``, float64.
        bias: ``(O,)``, float64; ``None`` where the layer has none.
        error_before, error_after: mean squared error per row of the start and of the solution, on the rows summed.
        rows: how many rows were summed.
        rank: how many inputs the rows determine; ``None`` where there are twice as many rows as inputs.
        ridge: the multiple of the identity that was added to the normal equations.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error_after: float
    rows: int
    rank: int | None
    ridge: float


class NormalEquations:
    """Sums of ``xᵀx``, ``xᵀy`` and the means over batches of rows.

    Products are taken in float64; for inputs in half precision in float32 over at most 1,024 rows, a few at a time,
    whose sums are added in float64.

    Args:
        inputs: ``I``.
        outputs: ``O``; 0 to sum ``xᵀx`` alone.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int = 0, *, device: torch.device | str = "cpu") -> None:
        wide = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(inputs, inputs, **wide)  # type: ignore[call-overload]
        self.cross = torch.zeros(inputs, outputs, **wide)  # type: ignore[call-overload]
        self.sum_x = torch.zeros(inputs, **wide)  # type: ignore[call-overload]
        self.sum_y = torch.zeros(outputs, **wide)  # type: ignore[call-overload]
        self.square_y = 0.0
        self.rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows.

        Args:
            x: ``(N, I)``.
            y: ``(N, O)``.
        """
        exact = x.dtype in (torch.float32, torch.float64)
        step = len(x) if exact else _ROWS
        wide = torch.float64 if exact else torch.float32
        for start in range(0, len(x), max(1, step)):
            part = x[start : start + step].to(wide)  # (n, I)
            _add_square(self.gram, part)
            self.sum_x += part.sum(0, dtype=torch.float64)
            if y is not None:
                target = y[start : start + step].to(wide)  # (n, O)
                _add_product(self.cross, part, target)
                self.sum_y += target.sum(0, dtype=torch.float64)
                self.square_y += float(target.double().square().sum())
        self.rows += len(x)

    def toward(self, weight: Tensor, bias: Tensor | None) -> NormalEquations:
        """Returns the same sums with the outputs of a linear layer of all inputs as targets, without any data.

        Args:
            weight: ``(I, O)``.
            bias: ``(O,)``.
        """
        made = NormalEquations(0, 0, device=self.gram.device)
        made.gram, made.sum_x, made.rows = self.gram, self.sum_x, self.rows
        weight = weight.double()
        shift = torch.zeros_like(weight[0]) if bias is None else bias.double()  # (O,)
        product = self.gram @ weight  # (I, O)
        products = (weight * product).sum() + 2 * (self.sum_x @ weight) @ shift
        made.cross = product.addr_(self.sum_x, shift)
        made.sum_y = self.sum_x @ weight + self.rows * shift
        made.square_y = float(products + self.rows * shift.square().sum())
        return made

    def prefix(self, size: int) -> NormalEquations:
        """Returns the sums of the first ``size`` inputs."""
        made = NormalEquations(0, 0, device=self.gram.device)
        made.gram, made.cross, made.sum_x = self.gram[:size, :size], self.cross[:size], self.sum_x[:size]
        made.sum_y, made.square_y, made.rows = self.sum_y, self.square_y, self.rows
        return made

    def scatter(self, *, centred: bool) -> Tensor:
        """``xᵀx``, ``(I, I)``; around the mean where a bias takes the mean up."""
        if not centred:
            return self.gram
        mean = self.sum_x / self.rows
        return torch.addr(self.gram, mean, mean, alpha=-self.rows)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error per row, summed over outputs, of a layer on the rows."""
        weight = weight.double()
        shift = torch.zeros_like(self.sum_y) if bias is None else bias.double()
        fitted = ((self.gram @ weight).mul_(weight)).sum() - 2 * (weight * self.cross).sum()
        moved = 2 * shift @ (weight.t() @ self.sum_x - self.sum_y) + self.rows * shift.square().sum()
        return max(0.0, float(fitted + moved) + self.square_y) / max(1, self.rows)

    def solve(self, weight: Tensor, bias: Tensor | None, *, ridge: float) -> Solution:
        r"""Minimises :math:`\sum\|xW + b - y\|^2 + \lambda \|W - W_0\|^2` over ``W`` and, where there is one, ``b``.

        :math:`\lambda` is ``ridge`` times the mean diagonal of :math:`X^TX` (centred where there is a bias, which is
        not penalised), so the solution is never worse on the rows than the start.

        Args:
            weight: the start :math:`W_0`, ``(I, O)``.
            bias: its bias, ``(O,)``.
            ridge: relative strength, above 0.

        Raises:
            DataError: the sums are not finite, or too few rows determine the solution.
        """
        if not (torch.isfinite(self.gram.sum()) and torch.isfinite(self.cross.sum())):  # a sum keeps both
            raise DataError("the calibration activations hold NaN or infinity; check the weights and the batches")
        rank, before = self._rank(), self.error(weight, bias)
        cross, moved = self.cross.clone(), None
        if bias is not None:
            mean_x, mean_y = self.sum_x / self.rows, self.sum_y / self.rows
            cross.addr_(mean_x, mean_y, alpha=-self.rows)
            moved = mean_x * self.rows**0.5  # its outer product is what centring takes off the Gram matrix
        variances = self.gram.diagonal() if moved is None else self.gram.diagonal() - moved.square()
        strength = ridge * float(variances.mean())
        if strength <= 0:  # every input is constant: there is nothing to learn a weight from
            solved = weight.double()
        else:
            cross.add_(weight, alpha=strength)
            solved = _solved_(cross, _factor(self.gram, strength=strength, moved=moved))
        shift = None if bias is None else mean_y - solved.t() @ mean_x
        after = self.error(solved, shift)
        if after > before:  # by rounding, where the start was the solution
            solved, shift, after = weight.double(), None if bias is None else bias.double(), before
        return Solution(solved, shift, before, after, self.rows, rank, strength)

    def _rank(self) -> int | None:
        """How many inputs the rows determine, where that is in doubt.

        Raises:
            DataError: there are fewer rows than inputs.
        """
        inputs = len(self.gram)
        if self.rows >= 2 * inputs:
            return None
        if self.rows < inputs:
            raise DataError(
                f"{self.rows} calibration tokens cannot determine {inputs} inputs (rank at most {self.rows}); "
                f"pass at least {inputs} tokens, better {10 * inputs}"
            )
        return int(torch.linalg.matrix_rank(self.gram, hermitian=True))


class Scatter:
    """Sums of ``xᵀx`` to order inputs by: products in float32 around the mean of the first rows, in half the time.

    Args:
        inputs: ``I``.
        device: where the sums live.
    """

    def __init__(self, inputs: int, *, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._sum = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._around = torch.zeros(inputs, device=device)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Adds rows ``(N, I)``."""
        if not self._rows and len(x):
            self._around = x.float().mean(0)  # (I,)
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS].float() - self._around  # (n, I)
            _add_square(self._gram, part)
            self._sum += part.sum(0, dtype=torch.float64)
        self._rows += len(x)

    def matrix(self, *, centred: bool) -> Tensor:
        """``xᵀx``, ``(I, I)``, as :meth:`NormalEquations.scatter`."""
        if centred:
            return torch.addr(self._gram, self._sum, self._sum, alpha=-1 / max(1, self._rows))
        around = self._around.double()
        crossed = torch.addr(self._gram, around, self._sum).addr_(self._sum, around)
        return crossed.addr_(around, around, alpha=self._rows)


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Adds ``xᵀx`` of ``(n, I)`` to ``(I, I)``, of which only what is below the diagonal is computed."""
    for start in range(0, len(total), _STRIP):
        end = start + _STRIP
        strip = _product(rows[:, start:end], rows[:, :end])  # (S, ≤ end)
        total[start:end, :end] += strip
        total[:start, start:end] += strip[:, :start].t()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``leftᵀ right`` of ``(n, I)`` and ``(n, O)`` to ``(I, O)``."""
    for start in range(0, len(total), _STRIP):
        total[start : start + _STRIP] += _product(left[:, start : start + _STRIP], right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right`` of ``(n, I)`` and ``(n, O)``, ``(I, O)``.

    In float32 over a few rows at a time: how a product over more of them rounds depends on the processor.
    """
    step = _PIECE if left.dtype == torch.float32 else max(1, len(left))
    pieces = zip(left.split(step), right.split(step), strict=True)
    first, second = next(pieces)
    found = first.t() @ second
    for first, second in pieces:
        found.addmm_(first.t(), second)
    return found


def _factor(gram: Tensor, *, strength: float, moved: Tensor | None) -> list[Tensor]:
    """Cholesky factor of ``gram + strength·I - moved movedᵀ``, in half the memory of the Gram matrix, which stays.

    Args:
        gram: ``(I, I)``.
        strength: of the ridge.
        moved: ``(I,)``.

    Returns:
        Strips of columns from the diagonal down, ``(I - start, S)``.

    Raises:
        DataError: the matrix is singular in float64.
    """
    strips: list[Tensor] = []
    for start in range(0, len(gram), _STRIP):
        strip = gram[start:, start : start + _STRIP].clone()  # (I - start, S)
        size = strip.shape[1]
        if moved is not None:
            strip.addr_(moved[start:], moved[start : start + size], alpha=-1)
        strip.diagonal().add_(strength)
        for number, left in enumerate(strips):
            beside = left[start - number * _STRIP :]
            strip.addmm_(beside, beside[:size].t(), alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(strip[:size])
        diagonal = torch.cat([*(left.diagonal() for left in strips), corner.diagonal()])
        if int(failed) or float((diagonal.max() / diagonal.min()) ** 2) > _LARGEST_SPREAD:
            raise DataError(
                "the calibration activations do not determine a solution (inputs that are constant or copies of "
                "others); pass more text, or a larger ridge="
            )
        strip[:size] = corner
        strip[size:] = torch.linalg.solve_triangular(corner.mT, strip[size:], upper=True, left=False)
        strips.append(strip)
    return strips


def _solved_(cross: Tensor, strips: list[Tensor]) -> Tensor:
    """Solves with a factor of :func:`_factor`, in place of the right-hand side ``(I, O)``."""
    places = [len(cross) - len(strip) for strip in strips]
    for start, strip in zip(places, strips, strict=True):
        end = start + strip.shape[1]
        cross[start:end] = torch.linalg.solve_triangular(strip[: end - start], cross[start:end], upper=False)
        cross[end:].addmm_(strip[end - start :], cross[start:end], alpha=-1)
    for start, strip in zip(reversed(places), reversed(strips), strict=True):
        end = start + strip.shape[1]
        cross[start:end].addmm_(strip[end - start :].t(), cross[end:], alpha=-1)
        cross[start:end] = torch.linalg.solve_triangular(strip[: end - start].mT, cross[start:end], upper=True)
    return cross


def elimination_order(gram: Tensor, weight: Tensor, *, unit: int = 1, ridge: float = 1e-3, at_once: int = 64) -> Tensor:
    r"""Orders inputs so that each prefix reconstructs the outputs well by least squares: the last can go first.

    Backward elimination with the saliency of the optimal brain surgeon: with :math:`H = X^TX + \lambda I`, giving up
    unit ``u`` and refitting the others costs :math:`\mathrm{tr}(W_u^T [(H^{-1})_{uu}]^{-1} W_u)`; the cheapest goes,
    ``W`` and :math:`H^{-1}` are updated (Hassibi & Stork 1993; structured: Kurtic et al. 2023, ZipLM, arXiv 2302.04089,
    Algorithm 1). We give up a 64th of what is left at once, where ZipLM gives up one by one.

    Args:
        gram: ``XᵀX``, ``(I, I)``.
        weight: ``(I, O)``.
        unit: consecutive inputs that go together (the size of a head).
        ridge: relative to the mean diagonal.
        at_once: the share of the remaining units that goes in a step is one in so many, at least one unit.

    Returns:
        Units ``(I / unit,)``, the most important first.

    Raises:
        DataError: the sums are not finite, or not positive definite with the ridge.
    """
    units = len(gram) // unit
    inverse = gram.double().clone()
    inverse.diagonal().add_(ridge * float(gram.diagonal().mean()) or 1.0)
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    # The matrix is symmetric, and its transpose LAPACK's layout.
    torch.linalg.cholesky_ex(inverse.mT, out=(inverse.mT, failed))
    if not torch.isfinite(gram.sum()):
        raise DataError("the calibration activations hold NaN or infinity; check the weights and the batches")
    if int(failed):
        raise DataError("the calibration activations do not determine an order of the inputs; pass more text")
    torch.cholesky_inverse(inverse.mT, out=inverse.mT)
    weights = weight.double().clone()
    left = torch.arange(units, device=gram.device)
    gone: list[Tensor] = []
    while len(left) > 1:
        scores = _saliency(inverse, weights, unit)
        count = max(1, len(left) // at_once)
        cheapest = scores.argsort(stable=True)[:count]
        gone.append(left[cheapest].flip(0))
        keep = torch.ones(len(left), dtype=torch.bool, device=left.device)
        keep[cheapest] = False
        inverse, weights = _without(inverse, weights, keep.repeat_interleave(unit))
        left = left[keep]
    return torch.cat([left, *reversed(gone)])


def _saliency(inverse: Tensor, weights: Tensor, unit: int) -> Tensor:
    """Cost of giving up each unit, (U,)."""
    if unit == 1:
        return weights.square().sum(1) / inverse.diagonal()
    units = len(inverse) // unit
    index = torch.arange(units, device=inverse.device)
    blocks = inverse.unflatten(0, (units, unit)).unflatten(2, (units, unit))[index, :, index]  # (U, d, d)
    rows = weights.unflatten(0, (units, unit))  # (U, d, O)
    return (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))


def _without(inverse: Tensor, weights: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and weights of the inputs that stay, refitted without those that go."""
    rows, gone = keep.nonzero().flatten(), (~keep).nonzero().flatten()  # (K,), (G,)
    left = inverse.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _STRIP):
        left[start : start + _STRIP] = inverse[rows[start : start + _STRIP]][:, rows]
    leaving = inverse[gone]  # (G, I)
    bridge = torch.linalg.solve(leaving[:, gone], leaving[:, rows])  # (G, K)
    left.addmm_(leaving[:, rows].t(), bridge, alpha=-1)
    return left, weights[rows].addmm_(bridge.t(), weights[gone], alpha=-1)
