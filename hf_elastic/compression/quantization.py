"""Integer weights: round-to-nearest, and GPTQ, which lets later columns make up for the rounding of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.compression.blocks import (
    LayerInputs,
    Progress,
    Projection,
    by_pattern,
    check_compressible,
    layer_by_layer,
    projection_names,
)
from hf_elastic.errors import CompressionError, UnsupportedModelError
from hf_elastic.families import Family
from hf_elastic.layers import ElasticLinear
from hf_elastic.least_squares import NormalEquations
from hf_elastic.packed_format import attach_grid
from hf_elastic.quantgrid import ZEROS, Grid
from hf_elastic.streams import MEMORY_LIMIT, Batch

QuantizationMethod = Literal["gptq", "rtn"]
_DAMPING = 0.01  # of the mean of the diagonal, as in the paper's code
_COLUMNS = 128  # that are rounded before the rest is updated at once


@dataclass(frozen=True)
class QuantizationReport:
    """What quantisation did.

    Attributes:
        bits: of the integers.
        group_sizes: inputs that share a scale, by name of the layer.
        errors: mean square of the change of a layer's outputs per token, as a share of the mean square of the outputs,
            by name of the layer; on the calibration tokens. Empty for ``rtn``, which sees none.
    """

    bits: int
    group_sizes: Mapping[str, int]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        shown = f"{len(self.group_sizes)} linear layers are of {self.bits} bits"
        if not self.errors:
            return shown
        worst = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        return f"{shown}; outputs change by {mean:.2%} of their energy on average, {self.errors[worst]:.2%} in {worst}"


def quantize_(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None = None,
    *,
    bits: int = 4,
    group_size: int | Mapping[str, int] | None = 128,
    symmetric: bool = True,
    method: QuantizationMethod = "gptq",
    skip: Sequence[str] = (),
    family: Family | None = None,
    memory: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> QuantizationReport:
    r"""Rounds every linear layer inside the blocks to integers, in place; zeros stay exactly zero.

    Afterwards weights hold the values :math:`s (q - z)` of the integers, in the dtype that they had, and beside them
    stand ``weight_scale`` and, for asymmetric grids, ``weight_zero_point``; the forward is the stock one. Nothing is
    saved in memory by this: what is small are the files (:func:`hf_elastic.save_quantized`, :func:`hf_elastic.export`).

    * ``gptq`` (Frantar et al. 2023, arXiv 2210.17323, eq. 2 and 3, columns from the left): each column is rounded and
      the ones behind it are moved by :math:`-\frac{w - \hat w}{[H^{-1}]_{jj}} H^{-1}_{j, j:}`,
      :math:`H = X^\top X + .01\, \overline{\mathrm{diag}}\, I`. A weight that is zero is rounded to zero, and the
      columns behind it make up for what it would have become (as SparseGPT does). A group's grid is fitted when its
      first column is reached. A column that calibration never excited is rounded to the nearest value and moves
      nothing; the official code sets it to zero.
    * ``rtn``: each weight to its nearest value, without data.

    Layers of one block see the block as it was before; blocks see what the blocks quantised before them give. (The
    official code offers to go through a block in turn, ``true_sequential``.)

    Args:
        model: an ``nn.Linear`` model (BERT, LLaMA family), dense or sparse. GPT-2's Conv1D has no packed format.
        batches: calibration inputs, ``input_ids`` of ``(B, T)`` and what else the model takes.
        bits: from 2 to 8.
        group_size: neighbouring inputs that share a scale; ``None`` or -1: all of an output. A dict gives one by the
            end of a layer's name or a regular expression: ``{"down_proj": 43, ".*": 32}``, the first that matches
            counts.
        symmetric: whether zero-points are 0. Asymmetric grids are finer, but their files are of 8 bits: stock
            transformers loads no packed zero-points.
        method: see above.
        skip: layers to leave as they are, by pattern.
        family: row of the model's layout, for a type without one.
        memory: bytes of hidden states kept in memory; the rest waits on disk.
        progress: called after each block with how many are done, and of how many.

    Raises:
        CompressionError: an option that cannot be, a group size that does not divide the inputs of a layer, or a weight
            that is not finite; said before anything is changed. Activations that are not finite, and rounded weights
            that are beyond float16, are noticed at their block, when those before it are changed already: load the
            model again.
        DataError: the batches are no calibration inputs.
        UnsupportedModelError: GPT-2, or a model that has adapters, is elastic, or is quantised.
    """
    model = check_compressible(model, what="quantize_")
    _check_options(bits, method)
    if method == "gptq" and batches is None:
        raise CompressionError("method='gptq' needs calibration batches; pass batches=[...] or method='rtn'")
    modules = projection_names(model, family)
    left = by_pattern(dict.fromkeys(skip), list(modules), what="skip")
    modules = {name: module for name, module in modules.items() if name not in left}
    sizes = _group_sizes(modules, group_size)
    errors: dict[str, float] = {}

    def change(layer: LayerInputs) -> None:
        grams = _grams(layer, set(modules)) if method == "gptq" else {}
        for projection in layer.projections:
            name = projection.name
            if name not in modules:
                continue
            weight = projection.weight
            fit = _Fit(bits, sizes[name], symmetric)
            if method == "gptq":
                try:
                    integers, grid = gptq(weight, grams[name], fit=fit)
                except torch.linalg.LinAlgError as error:
                    raise CompressionError(
                        f"what enters {name} on the calibration batches has no Cholesky factor: its values are beyond "
                        "float64; check the weights, or use method='rtn'"
                    ) from error
                values = grid.values(integers)
                errors[name] = _share_of_energy(weight, values, grams[name].gram)
            else:
                grid = fit(weight)
                values = grid.nearest(weight)
            if not bool(torch.isfinite(values).all()):
                kind = str(weight.dtype).removeprefix("torch.")
                raise CompressionError(
                    f"values of the grid of {name} are beyond {kind}; load the model again, in float32 or bfloat16"
                )
            _write(projection, values, grid)

    data = batches if method == "gptq" else None
    layer_by_layer(model, data, change, family=family, memory=memory, progress=progress)
    return QuantizationReport(bits, sizes, errors)


def _check_options(bits: int, method: str) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CompressionError(f"bits={bits!r} must be an integer from 2 to 8")
    if method not in get_args(QuantizationMethod):
        raise CompressionError(f"method={method!r} is not one of {', '.join(map(repr, get_args(QuantizationMethod)))}")


def _group_sizes(modules: Mapping[str, nn.Module], given: int | Mapping[str, int] | None) -> dict[str, int]:
    """The group size of each layer, checked."""
    if not modules:
        raise CompressionError("skip leaves nothing to quantise")
    by_name = by_pattern(given, list(modules), what="group_size") if isinstance(given, Mapping) else None
    found = {}
    for name, module in modules.items():
        if isinstance(module, Conv1D):
            raise UnsupportedModelError(
                f"{name} is a Conv1D, GPT-2's transposed linear layer, which compressed-tensors does not pack; "
                "integer weights are for BERT and LLaMA-like models"
            )
        if isinstance(module, ElasticLinear):
            raise UnsupportedModelError(
                f"{name} is elastic: a cut through a group of inputs has no scale; extract a subnet and quantise that"
            )
        assert isinstance(module, nn.Linear)
        if by_name is not None and name not in by_name:
            raise CompressionError(f"group_size names no size for {name}; add '.*': 128 at the end")
        size = by_name[name] if by_name is not None else given
        size = module.in_features if size in (None, -1) else size
        if type(size) is not int or size < 1 or module.in_features % size:
            raise CompressionError(
                f"group_size={size!r} does not divide the {module.in_features} inputs of {name}; choose a divisor, or "
                "one for that layer: group_size={pattern: size}"
            )
        found[name] = size
    return found


def _grams(layer: LayerInputs, wanted: set[str]) -> dict[str, NormalEquations]:
    """:math:`X^\\top X` of every input ``(I, I)``, by projection; layers with the same input share the sums."""
    found: dict[str, NormalEquations] = {}
    for batch in layer:
        for names, rows in batch:
            chosen = [name for name in names if name in wanted]
            if not chosen:
                continue
            sums = found.get(chosen[0]) or NormalEquations(rows.shape[1], device=rows.device)
            sums.add(rows)
            found.update(dict.fromkeys(chosen, sums))
    missing = [p.name for p in layer.projections if p.name in wanted and p.name not in found]
    if missing:
        raise CompressionError(f"{missing[0]} is not used on the calibration batches; skip it, or use method='rtn'")
    return found


@dataclass(frozen=True)
class _Fit:
    """Fits a grid to the weights that are left of a group."""

    bits: int
    group_size: int
    symmetric: bool

    def __call__(self, weight: Tensor) -> Grid:
        size = min(self.group_size, weight.shape[1])
        return Grid.fit(weight, bits=self.bits, group_size=size, symmetric=self.symmetric)


def gptq(weight: Tensor, sums: NormalEquations, *, fit: _Fit) -> tuple[Tensor, Grid]:
    """Rounds a weight column after column; see :func:`quantize_`.

    Args:
        weight: ``(O, I)``, unchanged.
        sums: ``xᵀx`` of its inputs.
        fit: makes the grid of a group.

    Returns:
        The integers ``(O, I)``, int8, and their grid.
    """
    inverse = _inverse_factor(sums.gram).to(weight.device)  # (I, I), upper triangular
    rest = weight.float().clone()  # (O, I), what is still to be rounded, moved by what was
    kept = weight != 0
    found, grids = torch.empty_like(weight, dtype=torch.int8), []
    inputs, group = weight.shape[1], fit.group_size
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        errors = torch.zeros_like(rest[:, start:end])  # (O, columns)
        for column in range(start, end):
            if column % group == 0:
                ahead = rest[:, column : column + group].clone()  # (O, group)
                # Columns behind the block have not been moved yet by what is rounded in it.
                ahead[:, max(end - column, 0) :] -= errors @ inverse[start:end, max(end, column) : column + group]
                grids.append(fit((ahead * kept[:, column : column + group]).to(weight.dtype)))
            grid = grids[-1]
            values = rest[:, column]  # (O,)
            integers = grid.integers(values[:, None]).squeeze(1)  # (O,)
            integers = torch.where(kept[:, column], integers, grid.zero[:, 0])
            found[:, column] = integers
            rounded = grid.values(integers[:, None]).squeeze(1).float()
            error = (values - rounded) / inverse[column, column]  # (O,)
            rest[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    scale, zero = torch.cat([g.scale for g in grids], dim=1), torch.cat([g.zero for g in grids], dim=1)  # (O, G)
    return found, Grid(scale, zero, fit.bits, fit.symmetric)


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, ``(I, I)``, float32: row ``j`` moves what is behind ``j``."""
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    silent = diagonal == 0
    strength = float(diagonal.mean()) or 1.0
    diagonal += _DAMPING * strength
    diagonal[silent] = strength
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _share_of_energy(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    """Mean square of ``x (W - Ŵ)ᵀ`` as a share of that of ``x Wᵀ``."""
    moved, whole = (weight - values).double(), weight.double()
    energy = float(((whole @ gram) * whole).sum())
    return float(((moved @ gram) * moved).sum()) / energy if energy else 0.0


def _write(projection: Projection, values: Tensor, grid: Grid) -> None:
    module = projection.module
    assert isinstance(module, nn.Linear)
    vars(module)[ZEROS] = float((module.weight == 0).float().mean())
    module.weight.data.copy_(values)
    module.weight.requires_grad_(False)
    attach_grid(module, grid)
