"""Sorts FFN neurons, heads and layers by importance, so that every prefix holds the most important units.

A permutation of FFN neurons (rows of the input projections, columns of the output projection) or of heads
leaves the function of a layer unchanged up to float rounding; afterwards the active prefix of a smaller
subnet is its best part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import DataError, SpaceError
from hf_elastic.layers import ElasticLinear, ElasticProjection, evaluating
from hf_elastic.least_squares import Scatter, elimination_order
from hf_elastic.parts import LayerPart
from hf_elastic.streams import (
    SUBLAYERS,
    Batch,
    HiddenStates,
    LayerRunner,
    Sublayer,
    Sublayers,
    checked_batches,
    kept_weight,
    output_path,
    output_projection,
)
from hf_elastic.supernet import Supernet

Method = Literal["activation", "reconstruction", "weight", "taylor"]
LossFunction = Callable[[nn.Module, Batch], Tensor]
_SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)  # that are tried in float16


def sort_by_importance_(
    supernet: Supernet,
    batches: Iterable[Batch] | None = None,
    *,
    method: Method | None = None,
    loss_function: LossFunction | None = None,
) -> dict[str, Tensor]:
    """Permutes neurons and heads in place so that every prefix holds the most important ones.

    With ``a`` the activations that enter an output projection ``W`` and ``g = ∂L/∂a``, the score of unit
    ``u`` is

    * ``activation``: ``E[‖W_u a_u‖²]``, the energy the unit adds to the residual stream (for a neuron
      ``E[a_u²]·‖W_u‖²``; FLAP, An et al. 2024, without its mean subtraction);
    * ``reconstruction``: how late the unit goes when units are given up one after the other and the rest is refitted
      by least squares (:func:`hf_elastic.least_squares.elimination_order`); a unit that others can stand in for goes
      early. The best order before a :func:`hf_elastic.refit`. One layer's normal equations are in memory at a time;
    * ``taylor``: ``E[|Σ_{i∈u} a_i g_i|]``, the first-order change of the loss when the unit is removed
      (Molchanov et al. 2017, eq. 6; per token, as Kwon et al. 2022 need the gradient of the mask);
    * ``weight``: ``‖W_u‖_F · Π ‖V_u‖_F`` over the unit's rows ``V_u`` in its input projections; no
      data.

    With data, the order in which ``num_hidden_layers`` keeps layers is replaced by their block influence
    ``1 - E[cos(h_in, h_out)]`` (Men et al. 2024, ShortGPT, eq. 1), so call this before sampling
    architectures: the space changes when it has a depth choice. Padding (``attention_mask`` 0) never counts.
    Gradients that the parameters hold stay as they are.

    Args:
        supernet: a supernet; its largest architecture is measured and sorted.
        batches: calibration inputs for the model, ``input_ids`` of ``(B, T)`` and what else it takes.
        method: by default ``activation`` with data and ``weight`` without.
        loss_function: ``(model, batch) -> scalar`` for ``taylor``; by default ``model(**batch).loss``.

    Returns:
        The scores of ``layers.i.intermediate_size`` and ``layers.i.<heads>`` before sorting, and ``layers``
        (block influence) when there is data.

    Raises:
        DataError: the method needs data and got none, a batch is no dict of tensors, the batches give no loss, or a
            score is NaN or infinite; nothing is sorted then.
        SpaceError: the method is unknown.
        UnsupportedModelError: the model has adapters, or its layers are candidate blocks.
    """
    supernet.require_plain("sort_by_importance_")
    supernet.require_layers("sort_by_importance_")
    chosen = method or ("weight" if batches is None else "activation")
    if chosen not in get_args(Method):
        raise SpaceError(f"method={chosen!r} is not one of {', '.join(map(repr, get_args(Method)))}")
    data = checked_batches(batches) if batches is not None else None
    if chosen != "weight" and not data:
        raise DataError(f"method={chosen!r} needs calibration batches; pass batches=[...] or method='weight'")
    with supernet.activate(supernet.space.largest()), evaluating(supernet.model):
        scores = _weight_scores(supernet) if chosen == "weight" else {}
        if data and chosen == "reconstruction":
            scores = _Eliminator(supernet, data).run()
        elif data:
            meter = _Meter(supernet, chosen)
            meter.run(data, loss_function or _model_loss)
            scores = {**meter.scores(), **scores}
        _check_finite(scores, supernet)
        with torch.no_grad():
            for part in supernet.layer_parts:
                _permute(part, scores)
    if data:
        _set_layer_order(supernet, scores["layers"])
    return scores


def _check_finite(scores: Mapping[str, Tensor], supernet: Supernet) -> None:
    """Refuses scores that give no order."""
    bad = next((name for name, values in scores.items() if not bool(torch.isfinite(values).all())), None)
    if bad is None:
        return
    if supernet.model.dtype == torch.float32:
        raise DataError(f"the scores of {bad} are NaN or infinite; check the weights and the batches")
    kind = str(supernet.model.dtype).removeprefix("torch.")
    raise DataError(
        f"the scores of {bad} are NaN or infinite in {kind}; load the model in float32 (model.float()), or check the "
        "weights and the batches"
    )


def _model_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)  # a base model has none
    if not isinstance(loss, Tensor):
        raise DataError("method='taylor' needs a loss: put labels into the batches or pass loss_function=")
    return loss


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Lets backward passes inside the block leave the gradients that the caller had accumulated."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _unit_columns(part: LayerPart, path: str) -> Tensor:
    """Weight of an output projection as ``(inputs, outputs)``."""
    projection = part.projections()[path]
    weight: Tensor = projection.weight
    return weight.t() if isinstance(projection, ElasticLinear) else weight


def _unit_size(part: LayerPart, path: str) -> int:
    """Inputs of an output projection that make one unit: a neuron, or a head."""
    return 1 if path == part.family.ffn_out else part.head_dim


class _Meter:
    """Accumulates scores over batches, by hooks on the output projections and on the layers."""

    def __init__(self, supernet: Supernet, method: Method) -> None:
        self.supernet, self.method = supernet, method
        self.totals: dict[tuple[int, str], Tensor] = {}
        self.influence = torch.zeros(len(supernet.layer_parts), dtype=torch.float64)
        self.tokens = 0
        self.mask: Tensor | None = None
        self.scale = 1.0  # of the loss

    def run(self, data: list[Batch], loss_function: LossFunction) -> None:
        model = self.supernet.model
        with ExitStack() as stack, torch.set_grad_enabled(self.method == "taylor"):
            stack.enter_context(_own_gradients(model))
            for index, part in enumerate(self.supernet.layer_parts):
                for path in (part.family.ffn_out, part.family.attention_out):
                    module = part.projections()[path]
                    stack.callback(module.register_forward_pre_hook(self._on_input(part, path)).remove)
                stack.callback(part.layer.register_forward_hook(self._on_layer(index), with_kwargs=True).remove)
            for batch in data:
                feed = {name: value.to(model.device) for name, value in batch.items()}
                self.mask = feed["attention_mask"].bool().flatten(0, -2) if "attention_mask" in feed else None
                if self.method == "taylor":
                    self._differentiate(model, feed, loss_function)
                else:
                    model(**feed)

    def _differentiate(self, model: PreTrainedModel, feed: dict[str, Tensor], loss_function: LossFunction) -> None:
        """Adds a batch; in float16 with a loss that is scaled as far as gradients stay finite, or small ones vanish."""
        totals, influence, tokens = self.totals, self.influence, self.tokens
        for scale in _SCALES if model.dtype == torch.float16 else (1.0,):
            self.totals, self.influence, self.tokens, self.scale = dict(totals), influence.clone(), tokens, scale
            model.zero_grad(set_to_none=True)  # a second one in place would write into the caller's
            loss = loss_function(model, feed)
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"method='taylor': the loss of a batch is {float(loss)}; check that it has labels that are scored, "
                    "and the weights (half precision overflows where float32 does not)"
                )
            (loss if scale == 1 else scale * loss.float()).backward()
            if all(bool(torch.isfinite(total).all()) for total in self.totals.values()):
                break

    def _kept(self, values: Tensor) -> Tensor:
        """Values (B, T, N) of real tokens as (tokens, N)."""
        if self.mask is None or self.mask.all():
            return values.flatten(0, -2)
        if values.shape[:2] != self.mask.shape:
            raise DataError(
                f"activations of {tuple(values.shape[:2])} tokens do not fit an attention_mask of "
                f"{tuple(self.mask.shape)}; pass batches without padding, and no chunk_size_feed_forward"
            )
        return values[self.mask]

    def _on_input(self, part: LayerPart, path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = inputs[0]  # (B, T, N)
            if self.method == "taylor":
                if not activations.requires_grad:
                    raise DataError(
                        "method='taylor' needs gradients, but the model's parameters are frozen; call "
                        "model.requires_grad_(True), or use method='activation'"
                    )
                wide = activations.detach().to(torch.promote_types(activations.dtype, torch.float32))
                activations.register_hook(
                    lambda gradient: self._add(part, path, self._taylor(part, path, wide * gradient))
                )
            else:
                self._add(part, path, self._energy(part, path, activations))

        return hook

    def _add(self, part: LayerPart, path: str, score: Tensor) -> None:
        key = (part.index, path)
        self.totals[key] = self.totals[key] + score if key in self.totals else score

    def _taylor(self, part: LayerPart, path: str, product: Tensor) -> Tensor:
        rows = self._kept(product).double() / self.scale  # (tokens, N)
        return rows.unflatten(-1, (-1, _unit_size(part, path))).sum(-1).abs().sum(0)  # (units,)

    def _energy(self, part: LayerPart, path: str, activations: Tensor) -> Tensor:
        columns, rows, unit = (
            _unit_columns(part, path),
            self._kept(activations),
            _unit_size(part, path),
        )  # (N, D)
        if unit == 1:
            return rows.double().square().sum(0) * columns.double().square().sum(1)  # (N,)
        per_unit = rows.float().unflatten(-1, (-1, unit))  # (tokens, U, d)
        grams = torch.einsum("nud,nue->ude", per_unit, per_unit).double()  # (U, d, d)
        blocks = columns.detach().double().unflatten(0, (-1, unit))  # (U, d, D)
        return torch.einsum("ude,udf,uef->u", grams, blocks, blocks)

    def _on_layer(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            kwargs, output = rest
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            rows_in, rows_out = self._kept(before.detach()).float(), self._kept(after.detach()).float()
            similarity = nn.functional.cosine_similarity(rows_in, rows_out, dim=-1)  # (tokens,)
            self.influence[index] += float((1 - similarity).double().sum())
            self.tokens += len(similarity) if index == 0 else 0

        return hook

    def scores(self) -> dict[str, Tensor]:
        if not self.tokens:
            raise DataError("the calibration batches hold no token that attention_mask does not hide")
        found = {"layers": self.influence / self.tokens}
        parts = {part.index: part for part in self.supernet.layer_parts}
        for (index, path), total in self.totals.items():
            part = parts[index]
            score = total if path == part.family.ffn_out else _per_group(part, total)
            found[_score_name(self.supernet, index, path)] = score / self.tokens
        return found


class _Eliminator:
    """Orders the units of one layer after the other, on the hidden states of the unchanged model."""

    def __init__(self, supernet: Supernet, data: list[Batch]) -> None:
        self.supernet, self.data = supernet, data
        self.runner, self.states = LayerRunner(supernet), HiddenStates()
        self.influence: list[float] = []

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        try:
            scores: dict[str, Tensor] = {}
            for part in self.supernet.layer_parts:
                for sublayer, sums in self._sums(part).items():
                    name = _score_name(self.supernet, part.index, output_path(part, sublayer))
                    scores[name] = self._scores(part, sublayer, sums)
            return {"layers": torch.tensor(self.influence, dtype=torch.float64), **scores}
        finally:
            self.states.close()

    def _sums(self, part: LayerPart) -> dict[Sublayer, Scatter]:
        device = self.supernet.model.device
        sizes = {s: len(_unit_columns(part, output_path(part, s))) for s in SUBLAYERS}
        sums = {s: Scatter(size, device=device) for s, size in sizes.items()}
        moved, tokens = 0.0, 0
        for index, batch in enumerate(self.data):
            calls = self.runner.calls(batch)
            hidden = calls.hidden if part.index == 0 else self.states[index]
            seen = Sublayers(part)
            with seen:
                after = self.runner.run(part.index, hidden, calls)
            self.states[index] = after
            for sublayer, total in sums.items():
                total.add(calls.rows(seen.inputs[sublayer]))
            before, behind = calls.rows(hidden).float(), calls.rows(after).float()
            moved += float((1 - nn.functional.cosine_similarity(before, behind, dim=-1)).double().sum())
            tokens += len(before)
        if not tokens:
            raise DataError("the calibration batches hold no token that attention_mask does not hide")
        self.influence.append(moved / tokens)
        return sums

    def _scores(self, part: LayerPart, sublayer: Sublayer, sums: Scatter) -> Tensor:
        """Units by how late they go, ``(U,)``: the first to go scores 1."""
        weight, bias = kept_weight(output_projection(part, sublayer))
        ratio = part.full.num_attention_heads // part.full.num_key_value_heads
        unit = 1 if sublayer == "mlp" else part.head_dim * ratio
        try:
            order = elimination_order(sums.matrix(centred=bias is not None), weight, unit=unit)
        except DataError as error:
            raise DataError(f"layer {part.index}, {sublayer}: {error}") from None
        scores = torch.empty(len(order), dtype=torch.float64, device=order.device)
        scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float64, device=order.device)
        return scores


def _score_name(supernet: Supernet, index: int, path: str) -> str:
    row = supernet.family
    return f"layers.{index}." + ("intermediate_size" if path == row.ffn_out else row.heads_choice)


@torch.no_grad()
def _weight_scores(supernet: Supernet) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for part in supernet.layer_parts:
        row, heads = part.family, part.full.num_attention_heads
        neurons = _norm(_unit_columns(part, row.ffn_out), 1)  # (F,)
        for path in row.ffn_in:
            neurons = neurons * _norm(_input_rows(part, path)[0], 1)
        units = _norm(_unit_columns(part, row.attention_out), part.head_dim)  # (H,)
        paths = (row.query,) if row.fused else (row.query, row.key, row.value)
        for rows in (rows for path in paths for rows in _input_rows(part, path)):
            norms = _norm(rows, part.head_dim)  # (H,) or (K,)
            units = units * norms.repeat_interleave(heads // len(norms))
        scores[_score_name(supernet, part.index, row.ffn_out)] = neurons
        scores[_score_name(supernet, part.index, row.attention_out)] = _per_group(part, units)
    return scores


def _input_rows(part: LayerPart, path: str) -> list[Tensor]:
    """Weight of an input projection as ``(outputs, inputs)``, one tensor per fused output."""
    projection = part.projections()[path]
    if isinstance(projection, ElasticLinear):
        return [projection.weight]
    return [third.t() for third in projection.weight.chunk(projection.fused, dim=1)]


def _norm(rows: Tensor, unit: int) -> Tensor:
    """Frobenius norm of each unit of ``unit`` consecutive rows."""
    return rows.double().unflatten(0, (-1, unit)).flatten(1).norm(dim=1)


def _per_group(part: LayerPart, heads: Tensor) -> Tensor:
    """Scores of query heads (H,) -> of the units that are chosen: heads, or key/value groups (K,)."""
    return heads.unflatten(0, (part.full.num_key_value_heads, -1)).sum(1)


def _permute(part: LayerPart, scores: Mapping[str, Tensor]) -> None:
    row = part.family
    prefix = f"layers.{part.index}."
    order = scores[prefix + "intermediate_size"].argsort(descending=True, stable=True)
    for path in row.ffn_in:
        _permute_outputs(part.projections()[path], order)
    _permute_inputs(part.projections()[row.ffn_out], order)
    ratio = part.full.num_attention_heads // part.full.num_key_value_heads
    groups = scores[prefix + row.heads_choice].argsort(descending=True, stable=True)  # (K,)
    queries = _expand(groups, ratio * part.head_dim)  # (H·d,)
    keys = _expand(groups, part.head_dim)  # (K·d,)
    if row.fused:
        _permute_outputs(part.projections()[row.query], queries)
    else:
        _permute_outputs(part.projections()[row.query], queries)
        _permute_outputs(part.projections()[row.key], keys)
        _permute_outputs(part.projections()[row.value], keys)
    _permute_inputs(part.projections()[row.attention_out], queries)


def _expand(order: Tensor, unit: int) -> Tensor:
    """Order of units -> order of their rows."""
    return (order[:, None] * unit + torch.arange(unit, device=order.device)).flatten()


def _permute_outputs(projection: ElasticProjection, order: Tensor) -> None:
    order = order.to(projection.weight.device)
    if isinstance(projection, ElasticLinear):
        projection.weight.copy_(projection.weight[order])
        if projection.bias is not None:
            projection.bias.copy_(projection.bias[order])
        return
    weight = projection.weight.unflatten(1, (projection.fused, -1))  # (in, fused, out)
    projection.weight.copy_(weight[:, :, order].flatten(1))
    projection.bias.copy_(projection.bias.unflatten(0, (projection.fused, -1))[:, order].flatten())


def _permute_inputs(projection: ElasticProjection, order: Tensor) -> None:
    order = order.to(projection.weight.device)
    weight = projection.weight
    weight.copy_(weight[:, order] if isinstance(projection, ElasticLinear) else weight[order])


def _set_layer_order(supernet: Supernet, influence: Tensor) -> None:
    order = [supernet.layer_parts[i].index for i in influence.argsort(descending=True, stable=True).tolist()]
    set_layer_order(supernet, order)


def set_layer_order(supernet: Supernet, order: list[int]) -> None:
    """Changes the order in which ``num_hidden_layers`` keeps layers; the space changes for all handles on the model.

    Args:
        order: every layer once, from the most to the least important.

    Raises:
        SpaceError: a layer is missing or named twice.
    """
    from hf_elastic.conversion import replan  # conversion builds the choices

    supernet.require_plain("set_layer_order")
    supernet.require_layers("set_layer_order")
    if sorted(map(repr, order)) != sorted(map(repr, range(len(supernet.layer_parts)))):
        raise SpaceError(f"layer order {order} must name each of the layers 0 to {len(supernet.layer_parts) - 1} once")
    if any(part.names.depth for part in supernet.layer_parts):
        replan(supernet, order)
