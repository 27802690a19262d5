"""ZeroLM (arXiv 2503.18646): squared norms of weight matrices, divided by their smaller side.

Of a matrix ``W`` of ``n x m``, with singular values ``sigma_j``, Eq. 3-4 are::

    S(W) = sum_j sigma_j^2 / min(n, m) = ||W||_F^2 / min(n, m)

A model scores ``sum over layers of alpha S_attention + (1 - alpha) S_ffn``, where ``S_attention`` adds the matrices of
query, key, value and output, and ``S_ffn`` those of the FFN. No singular value is needed: squared norms of all prefixes
of heads and neurons are cumulative sums, made in one pass over a checkpoint.

Differences from the paper: a fused projection (GPT-2's ``c_attn``) counts as the three matrices it holds; embeddings
and output heads, the same in every candidate, are left out. Ranks of adapters score nothing: ``B = 0`` before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.families import Family, layers_of
from hf_elastic.parts import LayerShape
from hf_elastic.proxies.roles import require_single_blocks, row_of, weight_of

Floats = NDArray[np.float64]
DEFAULT_ALPHA = 0.5
"""Both parts alike: what is used where neither labels nor a space tell a better weight."""


def matrix_score(weight: Tensor) -> float:
    """``||W||_F^2 / min(n, m)`` of ``(n, m)``.

    Raises:
        DataError: it is not finite.
    """
    return float(slice_energies(weight.detach(), dim=0).sum()) / min(weight.shape)


def slice_energies(weight: Tensor, *, dim: int) -> Floats:
    """Squared norms of the slices of a matrix along ``dim``: in fp32 within a slice, sums of them in double precision.

    Raises:
        DataError: one is not finite.
    """
    found: Floats = weight.float().square().sum(dim=1 - dim).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise DataError("a weight or its square is not finite, so its score would not be; check the checkpoint")
    return found


@dataclass(frozen=True)
class Prefix:
    """Squared norms of all prefixes of one matrix.

    Attributes:
        energy: ``(units + 1,)``; entry ``u`` is ``||W_u||^2`` of the first ``u`` units.
        size: features of a unit: of a head, or 1 for a neuron.
        other: the dimension that stays.
    """

    energy: Floats
    size: int
    other: int

    @classmethod
    def of(cls, slices: Floats, *, size: int, other: int) -> Prefix:
        """From squared norms of single features."""
        units = slices.reshape(-1, size).sum(axis=1)
        return cls(np.concatenate([[0.0], np.cumsum(units)]), size, other)

    @property
    def units(self) -> int:
        """Heads or neurons of the whole matrix."""
        return len(self.energy) - 1

    def score(self, units: int) -> float:
        """``S`` of the first ``units``; 0 of none."""
        return float(self.energy[units]) / min(units * self.size, self.other) if units else 0.0


@dataclass(frozen=True)
class LayerScores:
    """The matrices of one layer, by role; what the layer skips has none.

    Attributes:
        queries: projections that follow the query heads (query and output).
        keys: projections that follow the key/value heads.
        ffn: projections that follow the FFN neurons.
    """

    queries: tuple[Prefix, ...]
    keys: tuple[Prefix, ...]
    ffn: tuple[Prefix, ...]

    def parts(self, shape: LayerShape | None = None) -> tuple[float, float]:
        """``S_attention`` and ``S_ffn`` of the layer in a shape, by default whole."""
        heads = [(p, shape.num_attention_heads if shape else p.units) for p in self.queries]
        heads += [(p, shape.num_key_value_heads if shape else p.units) for p in self.keys]
        attention = sum(p.score(units) for p, units in heads) if shape is None or shape.attention else 0.0
        neurons = [(p, shape.intermediate_size if shape else p.units) for p in self.ffn]
        ffn = sum(p.score(units) for p, units in neurons) if shape is None or shape.mlp else 0.0
        return attention, ffn


@dataclass(frozen=True)
class ZeroLMTable:
    """ZeroLM's score of every width and head count of a model, layer by layer.

    Made by :meth:`of_model`, :meth:`expected`, or from a checkpoint that is not loaded by
    :func:`~hf_elastic.proxies.checkpoint_table`. Prefixes are in the order of the weights: of a sorted supernet, those
    that it would cut.
    """

    layers: tuple[LayerScores, ...]

    @classmethod
    def of_model(cls, model: PreTrainedModel, *, family: Family | None = None) -> ZeroLMTable:
        """From the weights of a model, an elastic one included.

        Raises:
            UnsupportedModelError: there is no row of its family, or a projection is quantised.
            DataError: a weight is not finite.
        """
        weights = projections_of(model, family)
        if any(found.weight.is_meta for found in weights.values()):
            raise UnsupportedModelError(
                "the weights are on the meta device; pass table=checkpoint_table(...), or ZeroLMTable.expected(model)"
            )
        energies = {name: slice_energies(found.weight.detach(), dim=found.dim) for name, found in weights.items()}
        return table_of(model, weights, energies, family=family)

    @classmethod
    def expected(cls, model: PreTrainedModel, *, family: Family | None = None) -> ZeroLMTable:
        """From shapes alone: the expectation under the initialisation, ``sigma^2 max(n, m)`` of each matrix.

        ``sigma`` is the config's ``initializer_range``; GPT-2 divides that of projections into the residual stream by
        the root of twice its layers. Weights are not read: a model on the meta device will do.

        Raises:
            UnsupportedModelError: there is no row of its family.
        """
        row = row_of(model.config.model_type, family)
        sigma = float(getattr(model.config, "initializer_range", 0.02))
        scaled = sigma / np.sqrt(2 * model.config.num_hidden_layers) if row.fused else sigma
        projections, energies = projections_of(model, family), {}
        for name, found in projections.items():
            deviation = scaled if found.inward else sigma
            shape = found.weight.shape
            energies[name] = np.full(shape[found.dim], deviation**2 * shape[1 - found.dim])
        return table_of(model, projections, energies, family=family)

    @property
    def sizes(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Units, the size of one, and the other side of every matrix, layer by layer: what a model has to fit."""
        prefixes = ((*layer.queries, *layer.keys, *layer.ffn) for layer in self.layers)
        return tuple(tuple((p.units, p.size, p.other) for p in layer) for layer in prefixes)

    def parts(self, shapes: tuple[LayerShape, ...] | None = None) -> tuple[float, float]:
        """``S_attention`` and ``S_ffn`` of a subnet, or of the whole model."""
        chosen = shapes or (None,) * len(self.layers)
        pairs = [layer.parts(shape) for layer, shape in zip(self.layers, chosen, strict=True)]
        return sum(a for a, _ in pairs), sum(f for _, f in pairs)

    def score(self, shapes: tuple[LayerShape, ...] | None = None, *, alpha: float = DEFAULT_ALPHA) -> float:
        """``alpha S_attention + (1 - alpha) S_ffn`` of a subnet, or of the whole model."""
        attention, ffn = self.parts(shapes)
        return alpha * attention + (1 - alpha) * ffn


@dataclass(frozen=True)
class Projection:
    """A scored matrix of a model.

    Attributes:
        weight: ``(O, I)``, or ``(I, O)`` of a Conv1D.
        inward: whether heads or neurons are its inputs, as in projections into the residual stream.
        dim: dimension along which they lie.
    """

    weight: Tensor
    inward: bool
    dim: int


def projections_of(model: PreTrainedModel, family: Family | None = None) -> dict[str, Projection]:
    """The scored matrices by the names of their modules.

    Raises:
        UnsupportedModelError: there is no row of the model's family, a projection is quantised, or a layer holds
            several blocks or a fused projection of two parts.
    """
    require_single_blocks(model)
    row = row_of(model.config.model_type, family)
    layers = layers_of(model, row)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found = {}
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for path in _paths(row):
            if path in modules:
                inward = path in (row.attention_out, row.ffn_out)
                dim = int(inward) if not isinstance(modules[path], Conv1D) else 1 - int(inward)
                found[f"{prefix}.{index}.{path}"] = Projection(weight_of(layer, path), inward, dim)
    return found


def _paths(row: Family) -> tuple[str, ...]:
    return tuple(dict.fromkeys((row.query, row.key, row.value, row.attention_out, *row.ffn_in, row.ffn_out)))


def table_of(
    model: PreTrainedModel,
    projections: Mapping[str, Projection],
    energies: Mapping[str, Floats],
    *,
    family: Family | None = None,
) -> ZeroLMTable:
    """Assembles a table from :func:`projections_of`, and the squared norms of their slices along ``dim``, by name."""
    row = row_of(model.config.model_type, family)
    layers = layers_of(model, row)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    others = {name: found.weight.shape[1 - found.dim] for name, found in projections.items()}
    scores = []
    for index, layer in enumerate(layers):
        names = {path: f"{prefix}.{index}.{path}" for path in _paths(row)}
        held = {path: (energies[name], others[name]) for path, name in names.items() if name in others}
        scores.append(_layer_scores(held, row, head=_head_size(layer, row)))
    return ZeroLMTable(tuple(scores))


def _layer_scores(held: Mapping[str, tuple[Floats, int]], row: Family, *, head: int) -> LayerScores:
    """The prefixes of one layer, from each matrix's squared norms and its other dimension."""

    def prefixes(*paths: str, size: int = 1, parts: int = 1) -> tuple[Prefix, ...]:
        found = [held[path] for path in dict.fromkeys(paths) if path in held]
        return tuple(
            Prefix.of(piece, size=size, other=other) for whole, other in found for piece in np.split(whole, parts)
        )

    queries = prefixes(row.query, size=head, parts=3 if row.fused else 1) + prefixes(row.attention_out, size=head)
    keys = () if row.fused else prefixes(row.key, row.value, size=head)
    return LayerScores(queries, keys, prefixes(*row.ffn_in, row.ffn_out))


def _head_size(layer: nn.Module, row: Family) -> int:
    attention = dict(layer.named_modules()).get(row.attention)
    return 1 if attention is None else int(getattr(attention, row.head_size))
