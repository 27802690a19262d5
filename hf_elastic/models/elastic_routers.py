"""Routers of ElastiFormer (arXiv 2411.15281): which tokens enter a sublayer, which heads and experts serve a token.

A router sees nothing but the state of one token, and all its decisions are made here; what follows from them is in
``elastic_routed.py``. This file travels with a checkpoint as remote code: it imports nothing but torch and files beside
it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TOKENS = ("attention_tokens", "mlp_tokens")
UNITS = ("heads", "experts")
KINDS = ("attention_tokens", "heads", "mlp_tokens", "experts")
"""What can be routed: the tokens that enter attention, the heads (groups of heads that share keys and values) that
serve a token, the tokens that enter the FFN, the experts (runs of FFN neurons) that serve a token."""
PERCENT = 100
SUBLAYERS = {"attention_tokens": "attention", "heads": "attention", "mlp_tokens": "mlp", "experts": "mlp"}


@dataclass(frozen=True)
class Decision:
    """What a router decided.

    Attributes:
        keep: ``(B, T)`` the tokens that enter, or ``(B, T, U)`` the units that serve each token.
        weight: the factors of what is computed for them, of the same shape, in float32.
    """

    keep: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Observation:
    """What observers of a layer's routers are told in a forward outside of training.

    Attributes:
        kind: what was decided about.
        decision: what was decided.
        rows: rows of tensors that were really computed for it.
        held: neurons or heads that the weights of all units hold together; 0 for tokens.
    """

    kind: str
    decision: Decision
    rows: int
    held: int = 0


class RouterScores(nn.Linear):
    """The linear that scores; a model that initialises its weights leaves it at zero."""


class Router(nn.Module):
    r"""Scores of one decision: :math:`z = W x + b`, or with a hidden layer :math:`z = W\,\mathrm{GELU}(V x + c) + b`.

    ``W`` and ``b`` start at zero, so that all weights are one. The scores are computed in float32.

    Args:
        hidden_size: width of what it reads.
        of: how many units there are, 100 (per cent) for tokens.
        values: capacities that it is meant for, ascending; at ``of`` it is bypassed.
        tokens: whether it decides about tokens, by one score.
        hidden: width of the hidden layer; ``None``: none.
        thresholds: whether tokens are decided one by one, by a score that is calibrated for each of ``values``.
    """

    thresholds: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        of: int,
        values: Sequence[int],
        tokens: bool,
        hidden: int | None = None,
        thresholds: bool = False,
    ) -> None:
        super().__init__()
        self.of, self.values = of, tuple(values)
        exact = torch.float32  # whatever precision a model around is made in
        self.hidden = None if hidden is None else nn.Linear(hidden_size, hidden, dtype=exact)
        self.scores = RouterScores(hidden_size if hidden is None else hidden, 1 if tokens else of, dtype=exact)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)
        unknown = torch.full((len(self.values),), torch.nan, dtype=exact)
        self.register_buffer("thresholds", unknown if thresholds else None)

    def forward(self, states: torch.Tensor, units: int | None = None) -> torch.Tensor:
        """Scores of states ``(..., D)``, in float32 whatever the precision around is.

        Args:
            states: of tokens.
            units: how many units there are now, the first ones.

        Returns:
            ``(..., 1)`` or ``(..., U)``.
        """
        with torch.autocast(states.device.type, enabled=False):
            return _linear(self.scores, self.features(states), rows=units)

    def features(self, states: torch.Tensor) -> torch.Tensor:
        """What the last layer reads, in float32: states ``(..., D)``, or what the hidden layer makes of them."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            return states if self.hidden is None else nn.functional.gelu(_linear(self.hidden, states))

    def threshold(self, value: int) -> torch.Tensor:
        """The score that a token must exceed at one of ``values``, a scalar.

        Raises:
            RuntimeError: it was not calibrated.
        """
        found = self.thresholds[self.values.index(value)]
        if bool(torch.isnan(found)):
            raise RuntimeError(
                f"a router of tokens has no threshold for a capacity of {value} %, by which a causal model decides "
                "token by token; call hf_elastic.calibrate_routing(supernet, batches) after training"
            )
        return found


def _linear(module: nn.Linear, states: torch.Tensor, *, rows: int | None = None) -> torch.Tensor:
    return nn.functional.linear(states, module.weight[:rows].float(), module.bias[:rows].float())


class RoutingContext:
    """What the routers of one model share: which tokens are padding, and what a forward adds to the loss.

    Attributes:
        losses: since the last forward began, sums and counts by kind of loss: ``"tokens"``, ``"balance"``.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._place = list(inspect.signature(forward).parameters).index("attention_mask")
        self._mask: torch.Tensor | None = None
        self._before: int | None = None  # tokens in the cache when the forward began, if there is one
        self.losses: dict[str, list[torch.Tensor]] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Reads the mask of padding off the arguments of the base model; its forward hook."""
        self._mask = kwargs.get("attention_mask", args[self._place] if len(args) > self._place else None)
        cache = kwargs.get("past_key_values")
        self._before = None if cache is None else int(cache.get_seq_length())
        self.losses = {}

    def real(self, states: torch.Tensor, *, needed: bool) -> torch.Tensor | None:
        """Which tokens ``(B, T)`` of states ``(B, T, D)`` are not padding; ``None``: all.

        Args:
            states: of the tokens that are run now.
            needed: whether decisions about a row depend on how many of its tokens are padding.

        Raises:
            ValueError: they do, and the mask does not say it.
        """
        mask = self._mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            count = states.shape[1]
            if self._before is not None and mask.shape[1] > self._before + count:  # of all places in a fixed cache
                mask = mask[:, : self._before + count]
            return mask[:, -count:].to(states.device, torch.bool)
        if mask is not None and needed:
            raise ValueError(
                "routing by row must know which tokens are padding; give attention_mask of shape (batch, tokens)"
            )
        return None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: nothing of the forward that is running, whose graph cannot be copied."""
        return {**vars(self), "_mask": None, "losses": {}}

    def add_loss(self, kind: str, loss: torch.Tensor) -> None:
        """Adds a router's loss to those of the forward that is running."""
        self.losses.setdefault(kind, []).append(loss)


class LayerRouters(nn.ModuleDict):
    """The routers of one layer, by kind, and what is asked of them now.

    Args:
        hidden_size: width of the residual stream.
        spec: for each kind that is routed ``of``, ``values`` and ``active`` (see :class:`Router`), and for all the
            width of their ``hidden`` layer.
        context: shared by all layers.
        causal: whether tokens are decided one by one at inference.

    Attributes:
        active: value of each kind.
        available: heads and experts that there are now: fewer than ``of`` where the layer is narrower than it was made.
        observers: told what was decided and computed.
        probe: gives the weights of a decision about states, ``(B, T)`` or ``(..., U)``, instead of the routers: nothing
            is left out then, all is weighted.
    """

    def __init__(self, hidden_size: int, *, spec: Mapping[str, Any], context: RoutingContext, causal: bool) -> None:
        super().__init__(
            {
                kind: Router(
                    hidden_size,
                    of=spec[kind]["of"],
                    values=spec[kind]["values"],
                    tokens=kind in TOKENS,
                    hidden=spec.get("hidden"),
                    thresholds=causal and kind in TOKENS,
                )
                for kind in KINDS
                if kind in spec
            }
        )
        self.context, self.causal = context, causal
        self.active: dict[str, int] = {kind: spec[kind]["active"] for kind in self}
        self.available: dict[str, int] = {kind: spec[kind]["of"] for kind in self if kind in UNITS}
        self.observers: list[Callable[[Observation], None]] = []
        self.probe: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether everything is computed, and weighted or masked afterwards, so that weights get gradients."""
        return self.training or self.probe is not None

    def __getitem__(self, kind: str) -> Router:
        router = super().__getitem__(kind)
        assert isinstance(router, Router)
        return router

    def routes(self, *kinds: str) -> bool:
        """Whether one of these kinds is routed now, that is, not all tokens are to enter or not all units to serve."""
        return any(kind in self and self._below(kind) for kind in kinds)

    def _below(self, kind: str) -> bool:
        if kind in UNITS:
            return self.units(kind) < self.available[kind]
        return self.active[kind] < self[kind].of

    def units(self, kind: str) -> int:
        """How many heads or experts serve a token now: the share that ``active`` is of all, of those available."""
        there, whole = self.available[kind], self[kind].of
        return max(1, (self.active[kind] * there + whole // 2) // whole)

    def choose_tokens(self, kind: str, states: torch.Tensor) -> Decision:
        r"""Decides which tokens of states ``(B, T, D)`` enter a sublayer.

        A token's update is weighted by :math:`g = c + (1 - c)\,2\sigma(z)`, which is 1 for a score of 0 and at full
        capacity :math:`c`, and lets gradients reach the router. (The paper's weights are not known; with
        :math:`2\sigma(z)` alone a router that learns for half of the tokens spoils what nearly all of them give.)

        In training, and in encoders always, those with the highest scores of each row enter: ``capacity`` of its tokens
        that are not padding, rounded to the nearest, at least one; of equal scores the first. In a causal model that
        would need tokens to come; there a token enters if its score exceeds the calibrated threshold. In training,
        scores learn to tell the two apart by a binary cross entropy; the paper's threshold is unknown, ours is, for
        this loss, the one that as many tokens of the whole batch exceed.
        """
        if self.probe is not None:
            return _everything(self.probe(kind, states))
        router, capacity = self[kind], self.active[kind]
        by_rank = self.training or not self.causal
        real = self.context.real(states, needed=by_rank)
        scores = router(states).squeeze(-1)  # (B, T)
        if by_rank:
            keep = _highest(scores, capacity, real)
        else:
            keep = scores > router.threshold(capacity)
            keep = keep if real is None else keep & real
        if self.training and self.causal and torch.is_grad_enabled():
            self.context.add_loss("tokens", _rank_loss(scores, keep, real))
        return Decision(keep, _blended(2 * scores.sigmoid(), capacity / PERCENT))

    def choose_units(self, kind: str, states: torch.Tensor) -> Decision:
        r"""Decides which of ``U`` heads or experts serve each token of states ``(..., D)``.

        Those with the highest scores, of equal ones the first; with a share of :math:`c` each is weighted by
        :math:`c + (1 - c)\,U\,\mathrm{softmax}(z)`, which is 1 for equal scores and where all serve. In training the
        load-balancing loss of Switch Transformers (arXiv 2101.03961, equation 4) is noted, with the share of decisions
        instead of that of tokens.
        """
        if self.probe is not None:
            return _everything(self.probe(kind, states))
        count, there = self.units(kind), self.available[kind]
        scores = self[kind](states, there)  # (..., U)
        shares = scores.softmax(-1)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        keep.scatter_(-1, order[..., :count], True)
        if self.training and torch.is_grad_enabled():
            self.context.add_loss("balance", self._balance_loss(keep, shares))
        return Decision(keep, _blended(there * shares, count / there))

    def _balance_loss(self, keep: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """``U * sum_u f_u P_u``: 1 where decisions are spread evenly."""
        real = self.context.real(shares, needed=True)
        chosen, wanted = (t.flatten(0, -2) if real is None else t[real] for t in (keep.float(), shares))  # (N, U)
        if not len(chosen):  # nothing but padding
            return shares.sum() * 0
        spread = chosen.mean(0) / chosen.mean(0).sum()
        return keep.shape[-1] * (spread * wanted.mean(0)).sum()

    def observe(self, observation: Observation) -> None:
        """Tells observers what was decided, and what was really computed for it."""
        for observer in self.observers:
            observer(observation)


def _everything(weight: torch.Tensor) -> Decision:
    return Decision(torch.ones_like(weight, dtype=torch.bool), weight)


def _blended(weight: torch.Tensor, capacity: float) -> torch.Tensor:
    """Moves weights towards one, as far as the capacity is towards full, where the router is bypassed."""
    return capacity + (1 - capacity) * weight


def _highest(scores: torch.Tensor, percent: int, real: torch.Tensor | None) -> torch.Tensor:
    """The tokens with the highest scores ``(B, T)`` of each row."""
    if real is None:
        count = scores.new_full((scores.shape[0],), scores.shape[1], dtype=torch.long)
    else:
        count, scores = real.sum(-1), scores.masked_fill(~real, -torch.inf)
    wanted = ((count * percent + PERCENT // 2) // PERCENT).clamp(min=1)  # (B,)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    keep = rank < wanted[:, None]
    return keep if real is None else keep & real


def _rank_loss(scores: torch.Tensor, keep: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Binary cross entropy of ``sigmoid(z - z0)`` against what was kept; as many scores exceed ``z0`` as were kept."""
    flat, chosen = (t.flatten() if real is None else t[real] for t in (scores, keep))  # (N,)
    ordered, count = flat.detach().sort(descending=True).values, int(chosen.sum())
    if not count:  # nothing but padding
        return flat.sum() * 0
    border = (ordered[count - 1] + ordered[min(count, len(ordered) - 1)]) / 2
    return nn.functional.binary_cross_entropy_with_logits(flat - border, chosen.float())


def routers_of(model: nn.Module) -> list[LayerRouters]:
    """The routers of a model, layer after layer."""
    return [module for module in model.modules() if isinstance(module, LayerRouters)]
