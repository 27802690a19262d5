"""Wanda and magnitude pruning: single weights become zero, shapes stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.compression.blocks import (
    LayerInputs,
    Progress,
    by_pattern,
    check_compressible,
    layer_by_layer,
    projection_names,
)
from hf_elastic.errors import CompressionError
from hf_elastic.families import Family
from hf_elastic.streams import MEMORY_LIMIT, Batch

Pattern = Literal["unstructured", "2:4"]
SparsityMethod = Literal["wanda", "magnitude"]


@dataclass(frozen=True)
class SparsityReport:
    """What became zero.

    Attributes:
        layers: share of zeros by name of the layer, over the linear layers inside the blocks.
        share: of zeros over all of them.
    """

    layers: Mapping[str, float]
    share: float

    def __str__(self) -> str:
        return f"{self.share:.1%} of the weights of {len(self.layers)} linear layers are zero"


def sparsify_(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None = None,
    *,
    sparsity: float = 0.5,
    pattern: Pattern = "unstructured",
    method: SparsityMethod = "wanda",
    overrides: Mapping[str, float] | None = None,
    family: Family | None = None,
    memory: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> SparsityReport:
    r"""Sets the least important weights of every linear layer inside the blocks to zero, in place.

    * ``wanda`` (Sun et al. 2024, arXiv 2306.11695, eq. 1): the score of :math:`W_{ij}` is
      :math:`|W_{ij}| \cdot \|X_j\|_2` with :math:`X_j` input ``j`` over all calibration tokens; padding does not count.
      Block after block, on what the blocks pruned before give.
    * ``magnitude``: :math:`|W_{ij}|`, without data. Compared within a row here, as Wanda does; the paper's baseline
      compares within a layer.

    Scores are compared within each output: ``unstructured`` removes the ``⌊sparsity · I⌋`` least, ``2:4`` two of every
    four neighbouring inputs. Embeddings and heads stay. The mask is implicit: whatever is zero. No kernel here is
    faster for zeros: nothing is promised but that they are there, and stay in merges.

    Args:
        model: BERT, LLaMA family, GPT-2; plain, or elastic (its largest subnet is pruned).
        batches: calibration inputs, ``input_ids`` of ``(B, T)`` and what else the model takes.
        sparsity: share of zeros, at least 0 and below 1; .5 with ``2:4``.
        pattern: see above.
        method: see above.
        overrides: other shares for layers, by the end of their name or a regular expression:
            ``{"down_proj": 0.4, r"layers\.0\..*": 0.0}``; the first that matches counts.
        family: row of the model's layout, for a type without one.
        memory: bytes of hidden states kept in memory; the rest waits on disk.
        progress: called after each block with how many are done, and of how many.

    Raises:
        CompressionError: a share, a pattern or a method that cannot be, or a weight that is not finite; said before
            anything is changed. Activations that are not finite are noticed at their block, when those before it are
            changed already: load the model again.
        DataError: the batches are no calibration inputs.
        UnsupportedModelError: the model has adapters or is quantised.
    """
    model = check_compressible(model, what="sparsify_")
    if method not in get_args(SparsityMethod) or pattern not in get_args(Pattern):
        known = ", ".join(map(repr, (*get_args(SparsityMethod), *get_args(Pattern))))
        raise CompressionError(f"method={method!r} or pattern={pattern!r} is not one of {known}")
    if method == "wanda" and batches is None:
        raise CompressionError("method='wanda' needs calibration batches; pass batches=[...] or method='magnitude'")
    modules = projection_names(model, family)
    shares = dict.fromkeys(modules, sparsity) | by_pattern(overrides or {}, list(modules), what="overrides")
    _check_shares(shares, pattern)
    for name, module in modules.items():
        if pattern == "2:4" and shares[name] and _inputs(module) % 4:
            raise CompressionError(f"{name} has {_inputs(module)} inputs, not a multiple of 4; override it with 0")

    def change(layer: LayerInputs) -> None:
        norms = _input_norms(layer) if method == "wanda" else {}
        for projection in layer.projections:
            weight = projection.weight  # (O, I)
            score = weight.abs().float()
            if method == "wanda":
                score *= norms[projection.name]
            weight.masked_fill_(pruned(score, shares[projection.name], pattern=pattern), 0)

    data = batches if method == "wanda" else None
    layer_by_layer(model, data, change, family=family, memory=memory, progress=progress)
    return _report(modules)


def _check_shares(shares: Mapping[str, float], pattern: str) -> None:
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise CompressionError(f"sparsity {share!r} of {name} must be a number from 0 to below 1")
        if pattern == "2:4" and share not in (0, 0.5):
            raise CompressionError(f"sparsity {share!r} of {name}: pattern='2:4' removes half, or with 0 nothing")


def _inputs(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]


def _input_norms(layer: LayerInputs) -> dict[str, Tensor]:
    """:math:`\\|X_j\\|_2` of every input ``(I,)``, by projection."""
    squares: dict[str, Tensor] = {}
    for batch in layer:
        for names, rows in batch:
            summed = rows.double().square().sum(0)  # (I,)
            for name in names:
                squares[name] = squares[name] + summed if name in squares else summed
    missing = [projection.name for projection in layer.projections if projection.name not in squares]
    if missing:
        raise CompressionError(f"{missing[0]} is not used by the model on the calibration batches, so has no score")
    return {name: summed.sqrt().float() for name, summed in squares.items()}


def pruned(score: Tensor, share: float, *, pattern: str) -> Tensor:
    """Which weights go: those of the least score in each row, of equal ones the first, ``(O, I)``.

    Args:
        score: ``(O, I)``.
        share: of zeros.
        pattern: ``unstructured`` or ``2:4``.
    """
    gone = torch.zeros_like(score, dtype=torch.bool)
    if not share:
        return gone
    if pattern == "2:4":
        groups = score.unflatten(1, (-1, 4))  # (O, I/4, 4)
        order = groups.argsort(dim=-1, stable=True)[..., :2]
        return gone.unflatten(1, (-1, 4)).scatter(-1, order, True).flatten(1)
    order = score.argsort(dim=1, stable=True)[:, : int(share * score.shape[1])]
    return gone.scatter(1, order, True)


def sparsity_of(model: PreTrainedModel, *, family: Family | None = None) -> SparsityReport:
    """Counts the zeros in the linear layers inside the blocks."""
    return _report(projection_names(model, family))


def _report(modules: Mapping[str, nn.Module]) -> SparsityReport:
    zeros = {name: int((module.get_parameter("weight") == 0).sum()) for name, module in modules.items()}
    sizes = {name: module.get_parameter("weight").numel() for name, module in modules.items()}
    return SparsityReport(
        {name: zeros[name] / sizes[name] for name in modules}, sum(zeros.values()) / sum(sizes.values())
    )
