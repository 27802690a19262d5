"""Attention that follows its routers; see ``elastic_routed.py``.

A token that does not enter has no query, no key and no value. Of a token that enters, all keys and values are computed,
since any later token may need them, and the queries of the heads that serve it. In a KV cache the keys and values of
tokens that did not enter are zero, which is how later tokens know: a key that is exactly zero in all heads is not seen.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward as bert_eager
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward as gpt2_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager
from transformers.models.llama.modeling_llama import rotate_half
from transformers.pytorch_utils import Conv1D

from .elastic_mixins import Mixin
from .elastic_routed_cache import Gathered, ScatteringCache, has_gaps, is_fresh, note_gaps, present_keys
from .elastic_routers import Decision, LayerRouters, Observation

IMPLEMENTATIONS = ("eager", "sdpa")
BLOCK = 256
"""Gathered queries of a head that are asked together on a CPU."""
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of attention.

    Attributes:
        states: ``(B, T, D)``.
        mask: ``None`` (causal where the model is, all of it otherwise), or ``(B or 1, 1, T, S)``, of bool or additive.
        cache: KV cache, if there is one.
        rotation: cosines and sines ``(B or 1, T, d)`` of rotary embeddings, if there are such.
        rest: further keyword arguments.
    """

    states: torch.Tensor
    mask: torch.Tensor | None
    cache: Any
    rotation: Rotation | None
    rest: dict[str, Any]


def joined_mask(mask: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
    """A mask in which what is not ``seen`` (broadcast to ``(B, 1, T, S)``) is hidden too."""
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def causal_mask(tokens: int, device: torch.device) -> torch.Tensor:
    """``(1, 1, T, T)``: each token sees itself and those before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]


class RoutedAttention(Mixin):
    """The attention of a pre-norm layer, whose result is added to the residual stream."""

    routers: LayerRouters
    layer_idx: int

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        gaps = has_gaps(kwargs.get("past_key_values"), self.layer_idx)
        if not (gaps or self.routers.routes("attention_tokens", "heads")) or not hidden_states.numel():
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("routed attention takes its arguments by keyword, as the layers of transformers give them")
        rest = dict(kwargs)
        mask, cache = rest.pop("attention_mask", None), rest.pop("past_key_values", None)
        call = Call(hidden_states, mask, cache, rest.pop("position_embeddings", None), rest)
        return run_routed(self, call, self.attended), None

    def attended(self, call: Call) -> torch.Tensor:
        """What all tokens of a call get, each from the heads that serve it."""
        if self.routers.routes("heads"):
            children = dict(self.named_children())
            mixed = served_by_heads(self, call, self.routers, out=children[_OUT[_kind(self)]])
            dropout = children.get("resid_dropout")
            return mixed if dropout is None else dropout(mixed)
        given = {} if call.rotation is None else {"position_embeddings": call.rotation}
        result: torch.Tensor = super().forward(
            hidden_states=call.states, attention_mask=call.mask, past_key_values=call.cache, **given, **call.rest
        )[0]
        return result


class RoutedPostNormAttention(Mixin):
    """The attention sublayer of a post-norm layer: the norm of ``x + g A(x)`` for a token of weight ``g``.

    For the others it is the norm of ``x``, see :class:`~hf_elastic.models.elastic_routed.RoutedOutput`.
    """

    routers: LayerRouters
    layout: Any

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.routers.routes("attention_tokens", "heads") or not hidden_states.numel():
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        call = Call(hidden_states, attention_mask, cache=None, rotation=None, rest=kwargs)
        update = run_routed(self, call, self.attended)
        children: Any = dict(self.named_children())
        result = children["output"].LayerNorm(update + hidden_states)
        return (result, None) if self.layout.attention_outputs == 2 else result

    def attended(self, call: Call) -> torch.Tensor:
        """What attention adds to all tokens of a call."""
        children: Any = dict(self.named_children())
        core, output = children["self"], children["output"]
        if self.routers.routes("heads"):
            mixed = served_by_heads(core, call, self.routers, out=output.dense)
        else:
            mixed = output.dense(core(call.states, attention_mask=call.mask, **call.rest)[0])
        result: torch.Tensor = output.dropout(mixed)
        return result


def run_routed(module: Any, call: Call, attend: Callable[[Call], torch.Tensor]) -> torch.Tensor:
    """Runs attention for the tokens that enter, weighted; the others get zero.

    Args:
        module: the routed module.
        call: its arguments.
        attend: what the module adds to the tokens of a call.

    Raises:
        ValueError: the attention implementation is one that takes no mask of ours.
    """
    routers: LayerRouters = module.routers
    core = dict(module.named_children()).get("self", module)
    implementation = core.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"routed attention runs with attn_implementation {' or '.join(IMPLEMENTATIONS)}, this model has "
            f"{implementation!r}; call model.set_attn_implementation('sdpa')"
        )
    if not routers.routes("attention_tokens"):
        gaps = call.cache is not None and has_gaps(call.cache, core.layer_idx)
        return attend(_seeing_entered(core, call) if gaps and not is_fresh(call.cache, core.layer_idx) else call)
    fresh = call.cache is None or is_fresh(call.cache, core.layer_idx)
    decision = routers.choose_tokens("attention_tokens", call.states)
    if routers.whole:
        seen = _learning_mask(call, decision.keep, causal=routers.causal)
        if routers.probe is not None:
            seen = _weighted_mask(seen, decision.weight.to(call.states.dtype))
        masked = replace(call, mask=seen)
        factors = (decision.weight * decision.keep).to(call.states.dtype)
        return attend(masked) * factors.unsqueeze(-1)  # (B, T, D)
    tokens = Gathered(decision.keep)
    routers.observe(Observation("attention_tokens", decision, tokens.order.numel()))
    if not tokens.order.shape[1]:
        _write_nothing(core, call)
        return torch.zeros_like(call.states)
    mask = _gathered_mask(call, tokens, causal=routers.causal, layer_idx=None if fresh else core.layer_idx)
    gathered = replace(
        call,
        states=tokens.take(call.states),
        mask=_for_implementation(mask, implementation, call.states.dtype),
        cache=None if call.cache is None else ScatteringCache(call.cache, tokens, alone=fresh),
        rotation=None if call.rotation is None else (tokens.take(call.rotation[0]), tokens.take(call.rotation[1])),
    )
    factors = tokens.take(decision.weight).to(call.states.dtype)
    return tokens.put(attend(gathered) * factors.unsqueeze(-1))


def _learning_mask(call: Call, keep: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """All tokens are computed; each sees those that enter, and itself, so that none sees nothing."""
    count = keep.shape[1]
    own = torch.eye(count, dtype=torch.bool, device=keep.device)
    seen = keep[:, None, None, :] | own  # (B, 1, T, T)
    if call.mask is None:
        return seen & causal_mask(count, keep.device) if causal else seen
    if call.mask.shape[-1] != count:
        raise ValueError("routers of attention are trained on whole sequences; leave past_key_values out of the inputs")
    return joined_mask(call.mask, seen)


def _weighted_mask(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A mask that adds the logarithm of a token's weight ``(B, T)`` to the scores of its key, but for its own query."""
    own = torch.eye(weight.shape[1], dtype=torch.bool, device=weight.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=weight.dtype).masked_fill(~mask, torch.finfo(weight.dtype).min)
    return mask + weight.log()[:, None, None, :].masked_fill(own, 0.0)


def _seeing_entered(core: Any, call: Call) -> Call:
    """A call at full capacity whose tokens do not see those that did not enter when the capacity was lower."""
    everything = Gathered(torch.ones(call.states.shape[:2], dtype=torch.bool, device=call.states.device))
    mask = _gathered_mask(call, everything, causal=True, layer_idx=core.layer_idx)
    return replace(call, mask=_for_implementation(mask, core.config._attn_implementation, call.states.dtype))


def _write_nothing(core: Any, call: Call) -> None:
    """Gives the cache a place for each token where none enters."""
    if call.cache is None:
        return
    size, kind = core.head_dim, _kind(core)
    key = getattr(core, _PROJECTIONS[kind][1])
    inner = dict(key.named_children()).get("base_layer", key)
    outputs = vars(inner).get("active_out_features", inner.nf if isinstance(inner, Conv1D) else inner.out_features)
    heads = outputs // size // (3 if kind == "gpt2" else 1)
    zeros = call.states.new_zeros(call.states.shape[0], heads, call.states.shape[1], size)  # (B, K, T, d)
    call.cache.update(zeros, zeros, core.layer_idx)
    note_gaps(call.cache, core.layer_idx)


def _gathered_mask(call: Call, tokens: Gathered, *, causal: bool, layer_idx: int | None) -> torch.Tensor | None:
    """The mask of gathered queries: over the gathered keys, or over those that ``layer_idx`` of a cache returns.

    ``None`` where that of the implementation is right: causal, as gathered tokens keep their order and what fills up a
    row comes last; or everything.
    """
    batch, count = tokens.order.shape
    rows = None  # (B, n, S): what the queries may see
    if call.mask is not None:
        rows = call.mask.expand(batch, -1, -1, -1)[:, 0][tokens.rows, tokens.order]
    if layer_idx is None:
        if rows is None:
            return None if causal or tokens.whole else tokens.filled[:, None, None, :].expand(-1, -1, count, -1)
        among = rows.gather(2, tokens.order[:, None, :].expand(-1, count, -1))  # (B, n, n)
        return joined_mask(among[:, None], tokens.filled[:, None, None, :])
    present = present_keys(call.cache, layer_idx, tokens.keep)[:, None, None, :]  # (B, 1, 1, S)
    if rows is not None:
        return joined_mask(rows[:, None], present)
    if tokens.keep.shape[1] > 1:  # the first call on a preallocated cache
        places = torch.arange(present.shape[-1], device=present.device)
        return present & (places <= tokens.order[:, None, :, None])
    return present


def _for_implementation(mask: torch.Tensor | None, implementation: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Eager attention adds its mask to the scores."""
    if mask is None or implementation != "eager" or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


_PROJECTIONS = {
    "gpt2": ("c_attn", "c_attn", "c_attn"),
    "bert": ("query", "key", "value"),
    "llama": ("q_proj", "k_proj", "v_proj"),
}
_OUT = {"gpt2": "c_proj", "llama": "o_proj"}
_EAGER = {"gpt2": gpt2_eager, "bert": bert_eager, "llama": llama_eager}


def _kind(core: nn.Module) -> str:
    """Which family's names a module of attention has."""
    children = dict(core.named_children())
    return next(kind for kind, (query, *_) in _PROJECTIONS.items() if query in children)


def served_by_heads(core: Any, call: Call, routers: LayerRouters, *, out: Any) -> torch.Tensor:
    """Attention in which each token gets the heads that serve it, weighted; ``(B, n, D)`` after ``out``, undropped.

    Args:
        core: the module with the projections.
        call: its arguments.
        routers: of the layer.
        out: projection from the heads back.
    """
    decision = routers.choose_units("heads", call.states)
    heads = _Heads(core, call, routers.available["heads"], whole=routers.whole)
    if routers.whole:
        mixed = heads.attend(heads.queries(), call.mask)  # (B, n, G, r * d)
        factors = (decision.weight * decision.keep).to(mixed.dtype).unsqueeze(-1)
        result: torch.Tensor = out((mixed * factors).flatten(-2))
        return result
    return _grouped_heads(heads, call, decision, routers=routers, out=out)


def _grouped_heads(heads: "_Heads", call: Call, decision: Decision, *, routers: LayerRouters, out: Any) -> torch.Tensor:
    """The groups of heads one after another, each with queries of the tokens that it serves alone."""
    batch, count, width = call.states.shape
    states = call.states.flatten(0, 1)  # (B * n, D)
    weight, bias = _active_weight(out) or (None, None)
    by_group = None if weight is None else weight.unflatten(1, (heads.count, -1))  # (out, G, r * d)
    result = states.new_zeros(batch * count, heads.width if by_group is None else by_group.shape[0])
    total = 0
    for group in range(heads.count):
        tokens = Gathered(decision.keep[..., group])
        if not tokens.order.shape[1]:
            continue
        rows, columns = tokens.filled.nonzero(as_tuple=True)  # (N,) each
        places = rows * count + tokens.order[rows, columns]  # (N,)
        queries = heads.group_queries(group, states, places)  # (N, r, d)
        spread = queries.new_zeros(*tokens.order.shape, *queries.shape[1:])
        spread[rows, columns] = queries  # (B, m, r, d)
        mixed = heads.attend_some(spread.transpose(1, 2), tokens, group=group)[rows, columns].flatten(1)  # (N, r * d)
        mixed = mixed * decision.weight.flatten(0, 1)[places, group, None].to(mixed.dtype)
        if by_group is None:
            result[places, group * mixed.shape[1] : (group + 1) * mixed.shape[1]] = mixed
        else:
            served = nn.functional.linear(mixed, by_group[:, group])
            result.index_add_(0, places, served.to(result.dtype))  # autocast has a dtype of its own
        total += len(places)
    routers.observe(Observation("heads", decision, total, held=heads.width // heads.size))
    if by_group is None:
        whole: torch.Tensor = out(result.view(batch, count, -1))
        return whole
    result = result if bias is None else result + bias
    return result.view(batch, count, width)


class _Heads:
    """Keys and values of a call, written to its cache, and queries of all heads or of one group."""

    def __init__(self, core: Any, call: Call, count: int, *, whole: bool) -> None:
        self.core, self.call, self.count, self.kind = core, call, count, _kind(core)
        self.size: int = core.attention_head_size if self.kind == "bert" else core.head_dim
        query, key, value = (getattr(core, name) for name in _PROJECTIONS[self.kind])
        self.query = query
        self.fused = self.kind == "gpt2"
        self.weights = _active_weight(query)
        self.whole: torch.Tensor | None = None  # (B, n, H * d) queries, where they cannot be computed by group
        if not self.fused:
            keys, values = key(call.states), value(call.states)
        elif self.weights is None or whole:
            self.whole, keys, values = query(call.states).chunk(3, dim=-1)
        else:
            weight, bias = self.weights[0].chunk(3), self.weights[1].chunk(3)
            keys, values = (nn.functional.linear(call.states, weight[n], bias[n]) for n in (1, 2))
            self.weights = (weight[0], bias[0])
        keys, values = (part.unflatten(-1, (-1, self.size)) for part in (keys, values))  # (B, n, K, d)
        keys = self._rotated(self._normed("k_norm", keys), call.rotation).transpose(1, 2)
        values = values.transpose(1, 2)
        if call.cache is not None:
            keys, values = call.cache.update(keys, values, core.layer_idx)
        self.keys, self.values = keys, values

    @property
    def width(self) -> int:
        """Features of all heads together."""
        whole = self.weights[0].shape[0] if self.weights is not None else self._all().shape[-1]
        return int(whole)

    def _normed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        norm = dict(self.core.named_children()).get(name)
        return values if norm is None else norm(values)

    def _rotated(self, values: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Rotary embedding of ``(..., heads, d)`` with cosines and sines ``(..., d)``."""
        if rotation is None:
            return values
        cos, sin = (part.unsqueeze(-2) for part in rotation)
        return values * cos + rotate_half(values) * sin

    def _all(self) -> torch.Tensor:
        if self.whole is None:
            self.whole = self.query(self.call.states)
        return self.whole

    def queries(self) -> torch.Tensor:
        """Of all heads, ``(B, H, n, d)``."""
        whole = self._all().unflatten(-1, (-1, self.size))
        return self._rotated(self._normed("q_norm", whole), self.call.rotation).transpose(1, 2)

    def group_queries(self, group: int, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Of one group's heads, for some of the tokens ``(B * n, D)``: ``(N, r, d)``."""
        if self.weights is None:
            queries = self._all().flatten(0, 1)[places].unflatten(-1, (self.count, -1))[:, group]
        else:
            weight, bias = self.weights
            own = weight.unflatten(0, (self.count, -1))[group]  # (r * d, D)
            queries = nn.functional.linear(
                states[places], own, None if bias is None else bias.unflatten(0, (self.count, -1))[group]
            )
        queries, rotation = self._normed("q_norm", queries.unflatten(-1, (-1, self.size))), self.call.rotation
        if rotation is not None:
            batch, count = self.call.states.shape[:2]
            rotation = tuple(part.expand(batch, count, -1).flatten(0, 1)[places] for part in rotation)  # type: ignore[assignment]
        return self._rotated(queries, rotation)

    def attend_some(self, queries: torch.Tensor, tokens: Gathered, *, group: int) -> torch.Tensor:
        """Queries ``(B, r, m, d)`` of gathered tokens on the keys of a group: ``(B, m, 1, r * d)``.

        Causal queries are asked in blocks, each on the keys up to its last token: what is behind that is not computed,
        as in the causal kernels that attention to all queries has.
        """
        mask, device = self.call.mask, queries.device
        if mask is not None:
            own = mask.expand(queries.shape[0], -1, -1, -1)[:, 0][tokens.rows, tokens.order][:, None]  # (B, 1, m, S)
            return self.attend(queries, own, group=group)
        if tokens.keep.shape[1] == 1 or not self.core.is_causal:
            return self.attend(queries, None, group=group)
        step = BLOCK if device.type == "cpu" else queries.shape[2]
        pieces = []
        for start in range(0, queries.shape[2], step):
            order = tokens.order[:, None, start : start + step, None]  # (B, 1, b, 1)
            last = int(order.max()) + 1
            seen = torch.arange(last, device=device) <= order  # (B, 1, b, last)
            pieces.append(self.attend(queries[:, :, start : start + step], seen, group=group, last=last))
        return torch.cat(pieces, dim=1)

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, *, group: int | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Queries ``(B, heads, m, d)`` on the first keys of all groups, or of one: ``(B, m, groups, r * d)``."""
        core, chosen = self.core, slice(None) if group is None else slice(group, group + 1)
        implementation = core.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _EAGER[self.kind])
        dropout = {"llama": "attention_dropout", "gpt2": "attn_dropout", "bert": "dropout"}[self.kind]
        rate = getattr(core, dropout) if core.training else 0.0
        mixed, _ = interface(
            core,
            queries,
            self.keys[:, chosen, :last],
            self.values[:, chosen, :last],
            _for_implementation(mask, implementation, queries.dtype),
            dropout=rate.p if isinstance(rate, nn.Dropout) else rate,
            scaling=core.scaling,
            **self.call.rest,
        )  # (B, m, heads, d)
        return mixed.unflatten(2, (self.count if group is None else 1, -1)).flatten(3)


def _active_weight(projection: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Active weight ``(out, in)`` and bias of a plain linear; ``None`` of another module, such as an adapter's."""
    if not isinstance(projection, nn.Linear | Conv1D):
        return None
    active, bias = vars(projection), projection.bias
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()
    parts, inputs = active.get("fused", 1), active.get("active_in_features", weight.shape[1])
    each = active.get("active_out_features", weight.shape[0]) // parts
    weight = weight.unflatten(0, (parts, -1))[:, :each, :inputs].flatten(0, 1)
    bias = bias if bias is None else bias.unflatten(0, (parts, -1))[:, :each].flatten()
    return weight, bias
