"""The grid of an integer weight: scales, zero-points, rounding, clamping; and the grid that a module carries.

Weights are ``(O, I)``; ``group_size`` neighbouring inputs of an output share a scale and a zero-point, ``(O, G)``. The
integers are signed, as in compressed-tensors: of ``b`` bits from :math:`-2^{b-1}` to :math:`2^{b-1} - 1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_elastic.errors import CheckpointError, DataError

SCALE, ZERO, SCHEME = "weight_scale", "weight_zero_point", "quantization_scheme"
"""Attributes of a quantised ``nn.Linear``, as compressed-tensors calls them."""
ZEROS = "zeros_before_rounding"
"""Attribute of one that :func:`hf_elastic.quantize_` made: the share of its weights that were zero beforehand."""
_TELLING_BITS, _MANY, _PEAK = 4, 0.3, 3  # where zeros of a file are not due to rounding


@dataclass(frozen=True)
class Grid:
    r"""A uniform grid :math:`s (q - z)` for each group of inputs of each output.

    Attributes:
        scale: ``(O, G)``, positive.
        zero: ``(O, G)``, the integer that stands for 0; zeros where the grid is symmetric. Zero is always on the grid.
        bits: of the integers.
        symmetric: whether all zero-points are 0.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool

    @classmethod
    def fit(cls, weight: Tensor, *, bits: int, group_size: int, symmetric: bool) -> Grid:
        r"""The grid between the least and the largest weight of each group.

        Symmetric: :math:`s = \max|w| / (2^{b-1} - 1/2)`, :math:`z = 0`. Asymmetric, with zero in the range:
        :math:`s = (\max - \min) / (2^b - 1)`, :math:`z = -2^{b-1} - \min / s`, rounded. A group of zeros has the scale
        1, so that it stays zero exactly.

        Args:
            weight: ``(O, I)``.
            bits: from 2 to 8.
            group_size: divides ``I``.
            symmetric: see above.

        Raises:
            DataError: a weight is not finite.
        """
        if not bool(torch.isfinite(weight).all()):
            raise DataError("a weight to be quantised is NaN or infinite; load a checkpoint whose weights are finite")
        groups = weight.float().unflatten(1, (-1, group_size))  # (O, G, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # (O, G)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        # By a tensor: GPUs multiply by the reciprocal of a number, and the largest weight, which lies halfway between
        # two integers, would be rounded otherwise there.
        steps = torch.full_like(high, most + 0.5 if symmetric else most - least)
        if symmetric:
            scale = torch.maximum(-low, high) / steps
        else:
            scale = high / steps - low / steps  # their difference may be beyond the dtype
        # A scale too small for its dtype would be zero.
        scale = scale.to(weight.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.zeros_like(scale) if symmetric else (least - low / scale.float()).round().clamp(least, most)
        return cls(scale, zero.to(torch.int8), bits, symmetric)

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def integers(self, weight: Tensor) -> Tensor:
        r""":math:`q = \mathrm{clamp}(\mathrm{round}(w / s + z))`, ``(O, I)``, int8; ties go to the even integer.

        Args:
            weight: ``(O, I)``.
        """
        return self._rounded(weight).to(torch.int8).flatten(1)

    def _rounded(self, weight: Tensor) -> Tensor:
        """The integers as floats, ``(O, G, group)``."""
        least, most = self.levels
        scaled = self._grouped(weight).div_(self.scale.float()[..., None])
        return scaled.add_(self.zero[..., None]).round_().clamp_(least, most)

    def values(self, integers: Tensor) -> Tensor:
        """:math:`s (q - z)`, ``(O, I)``, in the dtype of the scales; rounded once.

        Args:
            integers: ``(O, I)``.
        """
        return self._valued(self._grouped(integers))

    def _valued(self, integers: Tensor) -> Tensor:
        """Values of integers in floats, ``(O, G, group) -> (O, I)``; in place."""
        shifted = integers.sub_(self.zero[..., None]).mul_(self.scale.float()[..., None])
        return shifted.flatten(1).to(self.scale.dtype)

    def nearest(self, weight: Tensor) -> Tensor:
        """The values on the grid that a weight rounds to: ``values(integers(weight))`` without the integers in between.

        Args:
            weight: ``(O, I)``.
        """
        return self._valued(self._rounded(weight))

    def _grouped(self, weight: Tensor) -> Tensor:
        """A float copy as ``(O, G, group)``."""
        groups = self.scale.shape[1]
        return weight.to(torch.float32, copy=True).unflatten(1, (groups, -1))


def grid_of(module: nn.Module, *, name: str, checked: bool = True) -> Grid | None:
    """The grid that a module carries; ``None``: it is not quantised on one.

    Args:
        module: as :func:`hf_elastic.quantize_` leaves it, or loaded from a compressed-tensors checkpoint.
        name: of the module, for the error.
        checked: whether to look at the scales themselves; once is enough where it is asked for in every forward.

    Raises:
        CheckpointError: the scales are not positive, or do not fit the weight.
    """
    scheme: Any = vars(module).get(SCHEME)
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if scheme is None or getattr(scheme, "weights", None) is None or SCALE not in held:
        return None
    stated = scheme.weights
    if str(getattr(stated.type, "value", stated.type)) != "int" or not 2 <= stated.num_bits <= 8:
        return None
    scale = held[SCALE].detach()
    inputs = int(module.in_features)  # type: ignore[arg-type]
    if scale.ndim != 2 or inputs % scale.shape[1] or "weight_g_idx" in held:
        raise CheckpointError(
            f"{name} is quantised with scales of {tuple(scale.shape)} for {inputs} inputs or in another order of "
            "columns; only groups of neighbouring columns of equal size are supported"
        )
    if checked and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(f"{name} has quantisation scales that are not positive; the checkpoint is broken")
    given = held.get(ZERO)
    zero = torch.zeros_like(scale, dtype=torch.int8) if given is None else given.detach().to(torch.int8)
    return Grid(scale, zero, int(stated.num_bits), bool(stated.symmetric))


def pruned_share(module: nn.Module, *, name: str) -> float:
    """Share of a quantised layer's weights that were zero before they were rounded.

    A file does not say so. There, zeros count as pruned where they are 30 % or more and three times as many as the
    weights one step away on either side, with 4 bits or more; rounding alone gives about as many of each, and with
    fewer bits nothing can be told.
    """
    noted = vars(module).get(ZEROS)
    grid = grid_of(module, name=name, checked=False)
    if noted is not None or grid is None:
        return float(noted or 0.0)
    integers = grid.integers(module.get_parameter("weight").detach())  # (O, I)
    groups = integers.short().unflatten(1, (grid.zero.shape[1], -1)) - grid.zero.short()[..., None]
    zeros, up, down = (float((groups == level).float().mean()) for level in (0, 1, -1))
    return zeros if grid.bits >= _TELLING_BITS and zeros >= _MANY and zeros > _PEAK * max(up, down) else 0.0
