r"""``fit_routers``: routers in closed form, without training, from what tokens, heads and experts are worth.

Let :math:`L(w)` be the distance of the model with routers at capacity :math:`w` in all places (tokens, heads or experts
are not left out, but weighted by :math:`w`) from the model itself. The worth of a token in a layer, or of a head or
expert for a token, is the integrated gradient (Sundararajan et al. 2017, arXiv 1703.01365) along the path from nothing
to everything, :math:`v_i = -\int_0^1 \partial L / \partial w_i \, dw`; worths add up to :math:`L(0) - L(1)`. What is
routed is chosen by rank, so a router of tokens is the ridge regression of their ranks on their states, one of units
that of their worths. ElastiFormer (arXiv 2411.15281) trains its routers; this is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_elastic.distillation import Pooling, embedding_loss, logits_loss, pooled
from hf_elastic.errors import DataError, TrainingError
from hf_elastic.layers import evaluating
from hf_elastic.least_squares import NormalEquations
from hf_elastic.models.elastic_routers import TOKENS, Router
from hf_elastic.routers import RouterPart
from hf_elastic.routing.handles import check_mask, require_routers
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import Batch, checked_batches, on_device
from hf_elastic.supernet import Supernet

SPREAD = 0.1
"""Standard deviation of the fitted scores of a unit around their mean, root mean square over units: what tokens differ
in moves weights little, and training can still change it."""
_LABELS = ("labels", "start_positions", "end_positions")

FitTarget = Literal["logits", "embeddings"]
Place = tuple[int, str]  # layer, kind


@dataclass(frozen=True)
class FittedRouter:
    """How well one router was fitted.

    Attributes:
        layer: number of the layer.
        kind: what is routed.
        explained: share of the variance of what is regressed that states of tokens explain, on the batches.
    """

    layer: int
    kind: str
    explained: float


@dataclass(frozen=True)
class RouterFit:
    """What :func:`fit_routers` did.

    Attributes:
        routers: one for each router.
        tokens: tokens of the batches, without padding.
        distance: of the model in which everything that is routed is left out from the whole one, as the worths tell:
            the mean over what is compared, logits of tokens or of rows (nats), or embeddings (cosine distance).
    """

    routers: tuple[FittedRouter, ...]
    tokens: int
    distance: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in lists, strings and numbers that JSON can hold."""
        return asdict(self) | {"routers": [asdict(each) for each in self.routers]}

    def __str__(self) -> str:
        """A table with a row for each router."""
        lines = [f"{'layer':>5}  {'kind':<16} {'explained':>9}"]
        lines += [f"{each.layer:>5}  {each.kind:<16} {each.explained:>9.1%}" for each in self.routers]
        lines.append(f"fitted on {self.tokens} tokens; explained: how much of what is worth computing the state tells")
        return "\n".join(lines)


def fit_routers(
    supernet: Supernet,
    batches: Iterable[Batch] | Batch,
    *,
    target: FitTarget | None = None,
    pooling: Pooling = "mean",
    points: int = 5,
    ridge: float = 1e-4,
) -> RouterFit:
    r"""Sets all routers of a model in closed form, in seconds; an answer by itself, or a start for training.

    For each batch the model runs forward once, and forward and backward ``points`` times: with everything that is
    routed weighted by :math:`(k + 1/2) / n`, the midpoint rule for the integral in the text of this module. A token
    that hardly enters attention is hardly seen by others either: the logarithm of its weight is added to the scores of
    its key. Then each router is a ridge regression on what it reads: of the ranks of tokens (in an encoder within their
    row, as they are chosen there; in a causal model within the batch) from -1/2 to 1/2, and of the worths of units less
    their mean for the token, scaled so that the scores of a unit vary by 0.1 around their mean. A router with a hidden
    layer keeps that layer as it is, with random features, and has its last one fitted.

    Sizes are the largest, adapters as they are. Behind this, causal models need
    :func:`~hf_elastic.calibrate_routing`. Nothing is drawn at random, and modes and the active architecture stay as
    they were.

    Args:
        supernet: a model with routers.
        batches: inputs of the model, with an ``attention_mask`` ``(B, T)`` where there is padding; some ten thousand
            tokens like those of later use. Labels are left out.
        target: what is to stay as it is: ``"logits"`` (forward Kullback-Leibler divergence, of tokens or of rows) or
            ``"embeddings"`` (cosine distance of sentences); by default logits where the model gives some.
        pooling: how token states become an embedding.
        points: of the path from nothing to everything, at least 1.
        ridge: relative strength of the ridge, above 0.

    Returns:
        How well each router was fitted.

    Raises:
        UnsupportedModelError: the model has no routers.
        DataError: there is no batch, a mask of another shape, a value that is not finite, or fewer tokens than a router
            reads features.
        TrainingError: an option is out of range, the model does not give the target, or gradients are off for good.
    """
    require_routers(supernet, "fit_routers")
    if target not in ("logits", "embeddings", None):
        raise TrainingError(f"fit_routers(target={target!r}) is unknown; allowed: 'logits', 'embeddings'")
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise TrainingError(f"fit_routers(points={points!r}) must be a whole number of at least 1")
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
        raise TrainingError(f"fit_routers(ridge={ridge!r}) must be above 0, and finite")
    if torch.is_inference_mode_enabled():
        raise TrainingError("fit_routers needs gradients; call it outside of torch.inference_mode()")
    data = checked_batches(batches)
    fitting = _Fitting(supernet, target=target, pooling=pooling)
    with evaluating(supernet.model), supernet.activate(_lowest(supernet)), _differentiable(supernet):
        for batch in data:
            plain = {name: value for name, value in batch.items() if name not in _LABELS}
            fitting.add(on_device(plain, supernet.base), points=points)
    return fitting.solve(ridge=ridge)


@contextmanager
def _differentiable(supernet: Supernet) -> Iterator[None]:
    """Lets the embeddings of tokens ask for gradients inside the block.

    The first attention otherwise has none to give but those of its mask, and kernels of CUDA keep what they need for
    those only where a query, key or value asks too.
    """

    def ask(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(torch.is_grad_enabled())

    hook = supernet.base.get_input_embeddings().register_forward_hook(ask)
    try:
        yield
    finally:
        hook.remove()


def _lowest(supernet: Supernet) -> Architecture:
    """The largest sizes with the lowest capacities: all routers are asked."""
    lowest: dict[str, Value] = dict(supernet.space.largest())
    for part in supernet.router_parts:
        lowest |= {part.choice_name(kind): part.routers[kind].values[0] for kind in part.routers}
    return supernet.space.canonical(lowest)


class _Probe:
    """Weights that all routers of a model give in one forward, and the states that they read."""

    def __init__(self, parts: Iterable[RouterPart], *, weight: float, learning: bool) -> None:
        self._parts, self._weight, self._learning = list(parts), weight, learning
        self.weights: dict[Place, Tensor] = {}
        self.states: dict[Place, Tensor] = {}

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Inside the block routers answer with the probe's weights."""
        for part in self._parts:
            part.routers.probe = self._answers(part)
        try:
            yield
        finally:
            for part in self._parts:
                part.routers.probe = None

    def _answers(self, part: RouterPart) -> Any:
        def answer(kind: str, states: Tensor) -> Tensor:
            units = () if kind in TOKENS else (part.routers.available[kind],)
            weight = torch.full((*states.shape[:-1], *units), self._weight, device=states.device)
            weight.requires_grad_(self._learning)
            self.weights[part.layer.index, kind] = weight
            self.states[part.layer.index, kind] = states.detach()
            return weight

        return answer


class _Fitting:
    """Sums of the regressions of all routers."""

    def __init__(self, supernet: Supernet, *, target: FitTarget | None, pooling: Pooling) -> None:
        self._supernet, self._target, self._pooling = supernet, target, pooling
        self._parts = {part.layer.index: part for part in supernet.router_parts}
        self._sums: dict[Place, NormalEquations] = {}
        self._distance, self._tokens, self._compared = 0.0, 0, 0

    def add(self, batch: Batch, *, points: int) -> None:
        """Measures the worths in a batch, and adds it to the regressions."""
        check_mask(batch)
        with torch.no_grad():
            whole = _Probe(self._supernet.router_parts, weight=1.0, learning=False)
            teacher = self._signal(whole, batch)
        worths: dict[Place, Tensor] = {}
        for point in range(points):
            probe = _Probe(self._supernet.router_parts, weight=(point + 0.5) / points, learning=True)
            with torch.enable_grad():
                distance = self._distance_of(self._signal(probe, batch), teacher, batch)
            places = list(probe.weights)
            slopes = torch.autograd.grad(distance, [probe.weights[place] for place in places])
            for place, slope in zip(places, slopes, strict=True):
                worths[place] = worths.get(place, 0) - slope / points
        for place, worth in worths.items():
            self._add_rows(place, worth, whole.states[place])
        self._tokens += int(_real(next(iter(whole.states.values())), batch).sum())
        self._compared += int(self._positions(teacher, batch).sum())
        self._distance += sum(float(worth.sum()) for worth in worths.values())

    def _signal(self, probe: _Probe, batch: Batch) -> Tensor:
        """Logits ``(B, ..., C)``, or embeddings ``(B, D)``.

        Raises:
            TrainingError: the model does not give them.
        """
        wanted = {} if self._target == "logits" else {"output_hidden_states": True}
        if any(part.routers.causal for part in self._parts.values()):
            wanted["use_cache"] = False
        with probe.asked():
            outputs = self._supernet.model(**batch, **wanted)
        found: dict[str, Any] = dict(outputs) if isinstance(outputs, Mapping) else {}
        if self._target is None:
            self._target = "embeddings" if found.get("logits") is None else "logits"
        logits, layers = found.get("logits"), found.get("hidden_states")
        if self._target == "logits" and logits is not None:
            return logits
        if self._target == "embeddings" and layers is not None:
            last = found.get("last_hidden_state")
            return pooled(layers[-1] if last is None else last, batch.get("attention_mask"), pooling=self._pooling)
        raise TrainingError(
            f"cannot fit routers to {self._target}: the model returned {sorted(found) or type(outputs).__name__}; "
            "choose another fit_routers(target=...)"
        )

    def _distance_of(self, signal: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Summed over tokens, or over sentences, so that each counts alike in all batches."""
        if self._target == "embeddings":
            return embedding_loss(signal, teacher) * len(signal)
        if signal.shape[-1] == 1:
            raise TrainingError("logits of one class are always likely; give fit_routers(target='embeddings')")
        return logits_loss(signal, teacher, mask=self._positions(signal, batch), count=1.0)

    def _positions(self, signal: Tensor, batch: Batch) -> Tensor:
        """Which logits of tokens, or rows, are compared: those that are not padding alone, ``(B, T)`` or ``(B,)``."""
        real = _real(signal, batch)
        return real if signal.dim() > 2 and real.shape == signal.shape[:-1] else real.any(1)

    def _add_rows(self, place: Place, worth: Tensor, states: Tensor) -> None:
        layer, kind = place
        routers = self._parts[layer].routers
        real = routers.context.real(states, needed=True)
        if real is None:
            real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if kind in TOKENS:
            ranks = _ranks(worth[None], real[None])[0] if routers.causal else _ranks(worth, real)
            wanted = ranks[real, None]  # (N, 1)
        else:
            wanted = worth[real]  # (N, U)
            wanted = wanted - wanted.mean(-1, keepdim=True)
        if not bool(torch.isfinite(worth[real]).all()):
            raise DataError(
                f"worths of {kind} in layer {layer} hold NaN or infinity; check weights and batches, and load a model "
                "in half precision in float32 (model.float())"
            )
        features = routers[kind].features(states[real]).detach()  # (N, I)
        if place not in self._sums:
            self._sums[place] = NormalEquations(features.shape[1], wanted.shape[1], device=features.device)
        self._sums[place].add(features, wanted)

    def solve(self, *, ridge: float) -> RouterFit:
        """Sets the routers.

        Raises:
            DataError: too few tokens, or values that are not finite.
        """
        if not self._tokens:
            raise DataError("the batches have no tokens but padding; routers are fitted on some ten thousand")
        solved = {place: sums.solve(*_zeros(sums), ridge=ridge) for place, sums in self._sums.items()}
        found = []
        for (layer, kind), solution in sorted(solved.items()):
            sums = self._sums[layer, kind]
            spread = sums.square_y / sums.rows - float((sums.sum_y / sums.rows).square().sum())
            left = solution.error_after / spread if spread > 0 else 1.0
            assert solution.bias is not None
            scale = 1.0
            if kind not in TOKENS:
                scores = solution.weight * (sums.scatter(centred=True) @ solution.weight) / sums.rows  # (I, U)
                deviation = float(scores.sum(0).mean().clamp(min=0).sqrt())
                scale = SPREAD / deviation if deviation > 0 else 0.0
            _store(self._parts[layer].routers[kind], scale * solution.weight, scale * solution.bias)
            found.append(FittedRouter(layer, kind, 1 - left))
        return RouterFit(tuple(found), self._tokens, self._distance / self._compared)


def _real(signal: Tensor, batch: Batch) -> Tensor:
    """Which tokens are not padding, ``(B, T)``; of a signal of rows without a mask ``(B, 1)``."""
    mask = batch.get("attention_mask")
    if mask is None:
        return signal.new_ones(signal.shape[:2] if signal.dim() > 2 else (len(signal), 1), dtype=torch.bool)
    return mask != 0


def _ranks(worths: Tensor, real: Tensor) -> Tensor:
    """Rank of each real entry in its row ``(B, ...)``, from -1/2 to 1/2; of equal ones the first is lower."""
    flat, there = worths.flatten(1), real.flatten(1)  # (B, N)
    order = flat.masked_fill(~there, torch.inf).argsort(dim=-1, stable=True)
    ranks = order.argsort(dim=-1)
    return ((ranks + 0.5) / there.sum(-1, keepdim=True).clamp(min=1) - 0.5).view_as(worths)


def _zeros(sums: NormalEquations) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(sums.cross), torch.zeros_like(sums.sum_y)


def _store(router: Router, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        router.scores.weight.copy_(weight.t())
        router.scores.bias.copy_(bias)
        if router.thresholds is not None:
            router.thresholds.fill_(torch.nan)  # of other scores
