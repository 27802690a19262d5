r"""The product of SparsePEFT and QA-SparsePEFT: adapters that are part of the weight while they are trained.

.. math:: \hat W = Q\bigl(W + \textstyle\sum_k s_k (B_k A_k) \odot M_k\bigr), \qquad y = x \hat W^\top + b

with :math:`M = 1[W \ne 0]` (SparsePEFT, arXiv 2410.03750; arXiv 2501.16372, section 3) or all ones, and ``Q`` the
rounding to the base's grid (QA-SparsePEFT) or nothing. Merging writes this very weight.

The plain way keeps mask, product, masked product and sum of every layer until its backward. Here nothing of the
weight's size outlives the forward of its layer: all of it is computed again in the backward. And the base's product is
not computed beside the adapter's, since both are one: three products of the base's size a step, which an exact gradient
of a masked product needs, where stock LoRA needs two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_elastic.quantgrid import Grid


@dataclass(frozen=True)
class MergedWeight:
    """How the weight of a projection follows from the factors of its adapters.

    Attributes:
        base: ``(O, I)``, frozen; its zeros are the mask.
        start: ``(O, I)``, what the products are added to: ``base``, a float weight that it was rounded from, or
            ``None`` for zero.
        scalings: of the adapters.
        masked: whether the product of each keeps the zeros of the base.
        grid: what the sum is rounded to.
    """

    base: Tensor
    start: Tensor | None
    scalings: tuple[float, ...]
    masked: tuple[bool, ...]
    grid: Grid | None = None

    @property
    def zeros(self) -> Tensor | None:
        """Where masked products are zero, ``(O, I)``; ``None`` where none is masked."""
        return self.base == 0 if any(self.masked) else None

    def __call__(self, factors: Sequence[Tensor], zeros: Tensor | None) -> Tensor:
        """The weight ``(O, I)`` in the dtype of the base.

        Args:
            factors: ``A`` (R, I) and ``B`` (O, R) of each adapter in turn.
            zeros: as :attr:`zeros` gives them.
        """
        pairs = list(zip(factors[::2], factors[1::2], self.scalings, self.masked, strict=True))
        total: Tensor | None = None
        if self.start is not None:
            total = self.start.to(wide_dtype(factors[1]))
        for down, up, scaling, _ in (pair for pair in pairs if pair[3]):
            total = _added(total, down, up, scaling=scaling)
        if zeros is not None:  # what is zero in the base is so in the start
            assert total is not None
            total.masked_fill_(zeros, 0)
        for down, up, scaling, _ in (pair for pair in pairs if not pair[3]):
            total = _added(total, down, up, scaling=scaling)
        assert total is not None
        return (self.grid.nearest(total) if self.grid is not None else total).to(self.base.dtype)

    def gradients(self, outer: Tensor, factors: Sequence[Tensor], zeros: Tensor | None) -> list[Tensor]:
        """Gradients of the factors.

        Args:
            outer: ``gᵀx`` of (O, I), the gradient of the weight; masked in place. Rounding passes it on as it is, also
                where it clamps.
            factors, zeros: as above.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        outer = outer.to(wide_dtype(factors[1]))
        for masked in (False, True):
            if masked and zeros is not None:
                outer = outer.masked_fill_(zeros, 0)
            for number in (n for n, own in enumerate(self.masked) if own is masked):
                down, up, scaling = factors[2 * number], factors[2 * number + 1], self.scalings[number]
                into_down = (scaling * up.to(outer.dtype)).t() @ outer  # (R, I)
                into_up = outer @ (scaling * down.to(outer.dtype)).t()  # (O, R)
                found[number] = into_down.to(down.dtype), into_up.to(up.dtype)
        return [gradient for number in sorted(found) for gradient in found[number]]


def _added(total: Tensor | None, down: Tensor, up: Tensor, *, scaling: float) -> Tensor:
    """``total + s B A``, in a new tensor."""
    wide = wide_dtype(up)
    scaled, down = up.to(wide) * scaling, down.to(wide)
    return scaled @ down if total is None else torch.addmm(total, scaled, down)


def wide_dtype(factor: Tensor) -> torch.dtype:
    """Single precision at least, on every device: what rounds to a grid must round alike where it is merged."""
    narrow = factor.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow else factor.dtype


def merged_linear(x: Tensor, weight: MergedWeight, factors: Sequence[Tensor], *, bias: Tensor | None) -> Tensor:
    """``x Ŵᵀ + b``.

    Args:
        x: ``(..., I)``.
        weight: says what ``Ŵ`` is.
        factors: ``A`` and ``B`` of each adapter in turn.
        bias: ``(O,)``.

    Returns:
        ``(..., O)``, of the dtype that the base computes in.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.base.dtype
    shift = None if bias is None else bias.to(dtype)
    result: Tensor = _MergedLinear.apply(x.to(dtype), weight, shift, *factors)
    return result


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: MergedWeight, *given: Any) -> Tensor:
        bias, *factors = given
        ctx.weight, ctx.has_bias = weight, bias is not None
        ctx.save_for_backward(x, *factors)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, weight(factors, weight.zeros).to(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        weight: MergedWeight = ctx.weight
        into_x, into_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])  # (tokens, O), (tokens, I)
        zeros = weight.zeros
        with torch.autocast(x.device.type, enabled=False):
            of_factors: list[Tensor | None] = [None] * len(factors)
            if any(ctx.needs_input_grad[3:]):
                of_factors = [*weight.gradients(rows.t() @ inputs, factors, zeros)]
            of_x = (rows @ weight(factors, zeros).to(x.dtype)).view(x.shape) if into_x else None
            of_bias = rows.sum(0) if into_bias and ctx.has_bias else None
        return of_x, None, of_bias, *of_factors
