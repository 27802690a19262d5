"""Tiny routed models, and what their sublayers must give, written in NumPy token by token and head by head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_models import GROUPED, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic import ElasticConfig, RoutingConfig, Supernet
from hf_elastic.testing import Case

Array = NDArray[Any]
ALL: dict[str, Any] = {
    "attention_tokens": [0.5], "heads": [1], "mlp_tokens": [0.6], "experts": [1], "num_experts": 3,
}  # fmt: skip


def case(family: str, *, config: ElasticConfig | None = None, **kinds: Any) -> Case:
    """A tiny model with routers of random weights, in causal models with thresholds; by default of all kinds."""
    return Case(lambda: tiny(family), config, routing=RoutingConfig(**(kinds or ALL)))


def routed(family: str, *, config: ElasticConfig | None = None, low: bool = True, **kinds: Any) -> Supernet:
    """As :func:`case`; with ``low`` the lowest capacities are active, and what else there is at its largest."""
    supernet = case(family, config=config, **kinds).supernet()
    if low:
        turn(supernet, 0)
    return supernet


def turn(supernet: Supernet, place: int) -> None:
    """Turns all capacities to the first (0) or the last (-1) of their values."""
    values = dict(supernet.active)
    for part in supernet.router_parts:
        for kind in part.routers:
            values[part.choice_name(kind)] = part.routers[kind].values[place]
    supernet.set_active(supernet.space.canonical(values))


def only(kind: str) -> dict[str, Any]:
    """What routes one kind alone."""
    return {kind: ALL[kind], **({"num_experts": 3} if kind == "experts" else {})}


def padded_inputs(model: PreTrainedModel, *, length: int = 9) -> dict[str, Tensor]:
    """Three rows: one whole, one padded on the left, one padded on the right; positions count what is real."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randperm(model.config.vocab_size - 3, generator=generator)[:length] for _ in range(3)]
    ids = torch.stack(drawn) + 3  # a token that stood twice in a row could score the same twice, but for rounding
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(model, mask)}


def positions_of(model: PreTrainedModel, mask: Tensor) -> Tensor:
    first = 2 if model.config.model_type == "roberta" else 0
    return (mask.cumsum(-1) - 1).clamp(min=0) + first


@dataclass
class Decided:
    """Decisions about tokens ``(T, ...)`` of one row, made by hand from their states ``(T, D)``.

    Attributes:
        routers: of the layer; where a kind is not routed, all enter and all serve with weight one.
        states: what the sublayer was given.
        real: which tokens are not padding.
        by_rank: whether the best tokens of the row enter, instead of those above a threshold.
        sublayer: kinds of tokens and of units.
        units: how many units there are.
    """

    routers: Any
    states: Array
    real: Array
    by_rank: bool
    sublayer: tuple[str, str]
    units: int
    enter: Array = field(init=False)
    gain: Array = field(init=False)
    share: Array = field(init=False)

    def __post_init__(self) -> None:
        tokens, units = self.sublayer
        self.enter, self.gain = self.real.copy(), np.ones(len(self.states))
        self.share = np.ones((len(self.states), self.units))
        if self.routers.active.get(tokens, 100) < 100:
            self._tokens(tokens)
        if units in self.routers and self.routers.active[units] < self.routers[units].of:
            self._units(units)

    def _scores(self, kind: str) -> Array:
        scores = self.routers[kind].scores
        return self.states @ array(scores.weight).T + array(scores.bias)

    def _tokens(self, kind: str) -> None:
        scores, capacity = self._scores(kind)[:, 0], self.routers.active[kind]
        self.gain = blended(2 / (1 + np.exp(-scores)), share=capacity / 100)
        if self.by_rank:
            real = [t for t in range(len(scores)) if self.real[t]]
            count = max(1, int(len(real) * capacity / 100 + 0.5))
            best = sorted(real, key=lambda t: -scores[t])[:count]
            self.enter = np.isin(np.arange(len(scores)), best)
        else:
            threshold = float(self.routers[kind].thresholds[self.routers[kind].values.index(capacity)])
            self.enter = self.real & (scores > threshold)

    def _units(self, kind: str) -> None:
        whole, active = self.routers[kind].of, self.routers.active[kind]
        count = max(1, int(active * self.units / whole + 0.5))
        for token, row in enumerate(self._scores(kind)[:, : self.units]):
            weights = blended(np.exp(row) / np.exp(row).sum() * self.units, share=count / self.units)
            served = np.argsort(-row)[:count]
            self.share[token] = np.where(np.isin(np.arange(self.units), served), weights, 0.0)


def blended(weights: Any, *, share: float) -> Any:
    """The weights of what a router lets in: nearer to one, the larger the share is."""
    return share + (1 - share) * weights


def array(tensor: Any) -> Array:
    return tensor.detach().double().numpy()


def projected(module: nn.Module, inputs: Array, *, rows: int, columns: int | None = None, third: int = 0) -> Array:
    """What the first rows and columns of a projection give; of three fused ones, one."""
    weight: Any = module.weight
    matrix, bias = array(weight), module.bias
    if not isinstance(module, nn.Linear):  # a Conv1D stands the other way round
        matrix = matrix.T
    start = third * (matrix.shape[0] // 3)
    columns = matrix.shape[1] if columns is None else columns
    result = inputs[:, :columns] @ matrix[start : start + rows, :columns].T
    return result if bias is None else result + array(bias)[start : start + rows]


def rms_norm(module: nn.Module, values: Array) -> Array:
    epsilon: Any = module.variance_epsilon
    return values / np.sqrt((values**2).mean(-1, keepdims=True) + epsilon) * array(module.weight)


def layer_norm(module: Any, values: Array) -> Array:
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps)
    return scaled * array(module.weight) + array(module.bias)


def rotated(values: Array, positions: Sequence[int], *, theta: float = 10000.0) -> Array:
    """Rotary embedding of ``(T, d)``: pairs ``(i, i + d/2)`` are turned by ``position / theta^(2i/d)``."""
    half = values.shape[1] // 2
    result = values.copy()
    for token, position in enumerate(positions):
        for i in range(half):
            angle = position / theta ** (2 * i / values.shape[1])
            a, b = values[token, i], values[token, i + half]
            result[token, i] = a * math.cos(angle) - b * math.sin(angle)
            result[token, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def heads_by_hand(core: Any, x: Array, positions: Sequence[int], *, heads: int, groups: int, size: int) -> list[Array]:
    """Queries, keys and values ``(heads or groups, T, d)``."""
    if core.config.model_type == "gpt2":
        found = [projected(core.c_attn, x, rows=heads * size, third=n) for n in range(3)]
    else:
        names = ("query", "key", "value") if "query" in dict(core.named_children()) else ("q_proj", "k_proj", "v_proj")
        counts = (heads, groups, groups)
        found = [projected(getattr(core, n), x, rows=c * size) for n, c in zip(names, counts, strict=True)]
    split = [part.reshape(len(x), -1, size).transpose(1, 0, 2) for part in found]
    norms = dict(core.named_children())
    for place, name in ((0, "q_norm"), (1, "k_norm")):
        split[place] = rms_norm(norms[name], split[place]) if name in norms else split[place]
    if core.config.model_type in GROUPED:
        split[:2] = [np.stack([rotated(head, positions) for head in part]) for part in split[:2]]
    return split


def attended_by_hand(
    core: Any, x: Array, decided: Decided, *, positions: Sequence[int], sizes: Mapping[str, int]
) -> Array:
    """Heads side by side ``(T, H d)`` of tokens that see those that enter; zero for those that do not."""
    heads, groups, size = sizes["heads"], sizes["groups"], sizes["size"]
    queries, keys, values = heads_by_hand(core, x, positions, heads=heads, groups=groups, size=size)
    causal, window = core.config.model_type in (*GROUPED, "gpt2"), getattr(core.config, "sliding_window", None)
    result = np.zeros((len(x), heads * size))
    for t in (t for t in range(len(x)) if decided.enter[t]):
        seen = [s for s in range(len(x)) if decided.enter[s] and (s <= t or not causal)]
        seen = [s for s in seen if window is None or s > t - window]
        for h in range(heads):
            g = h // (heads // groups)
            scores = np.array([queries[h, t] @ keys[g, s] for s in seen]) / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed = sum(share * values[g, s] for share, s in zip(shares, seen, strict=True))
            result[t, h * size : (h + 1) * size] = decided.share[t, g] * mixed
    return result


ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
    "gelu_new": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


def neurons_by_hand(projections: Sequence[nn.Module], x: Array, decided: Decided, *, act: str, width: int) -> Array:
    """Neurons ``(T, F)``, expert after expert, each with its weight for each token."""
    each = width // decided.units
    outputs = [projected(module, x, rows=width) for module in projections]
    hidden = ACTIVATIONS[act](outputs[0])
    hidden = hidden if len(outputs) == 1 else hidden * outputs[1]
    for token in range(len(x)):
        for expert in range(decided.units):
            hidden[token, expert * each : (expert + 1) * each] *= decided.share[token, expert]
    return hidden
