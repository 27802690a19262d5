"""Sublayers that follow their routers: what is not chosen is not computed (ElastiFormer, arXiv 2411.15281).

In training and under a probe everything is computed and then weighted or masked, so that routers get gradients;
otherwise tokens are gathered, computed and scattered, heads and experts computed for the tokens that they serve. Both
give the same.
This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .elastic_mixins import Mixin, with_mixin
from .elastic_routed_attention import RoutedAttention, RoutedPostNormAttention
from .elastic_routers import Decision, LayerRouters, Observation, RoutingContext


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its sublayers, and these their parts.

    Attributes:
        attention: the module that is called for attention.
        mlp_in, mlp_out: the modules that are called for the FFN, one or two.
        neurons: projections of ``mlp_in`` to the FFN's neurons; of two the first one is the gate.
        act: activation of ``mlp_in``.
        down: projection of ``mlp_out`` back.
        causal: whether the model decodes left to right.
        attention_outputs: 2 where attention returns its weights too, else 1.
    """

    attention: str
    mlp_in: str
    mlp_out: str
    neurons: tuple[str, ...]
    act: str
    down: str
    causal: bool
    attention_outputs: int = 2


_BERT = Layout("attention", "intermediate", "output", ("dense",), "intermediate_act_fn", "dense", causal=False)
_LLAMA = Layout("self_attn", "mlp", "mlp", ("gate_proj", "up_proj"), "act_fn", "down_proj", causal=True)
_GPT2 = Layout("attn", "mlp", "mlp", ("c_fc",), "act", "c_proj", causal=True)
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "elastic_bert": replace(_BERT, attention_outputs=1),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "elastic_llama"), _LLAMA),
    **dict.fromkeys(("gpt2", "elastic_gpt2"), _GPT2),
}
"""Model type -> layout of its layers."""


def attach_routers(
    base: nn.Module,
    layers: Iterable[nn.Module],
    specs: Mapping[int, Mapping[str, Any]],
    *,
    model_type: str,
    hidden_size: int,
) -> RoutingContext:
    """Gives layers their routers, as a child named ``routers``, and lets their sublayers follow these.

    Args:
        base: the base model, whose forward sees the mask of padding.
        layers: of the model.
        specs: by number of the layer, see :class:`~hf_elastic.models.elastic_routers.LayerRouters`.
        model_type: one of :data:`LAYOUTS`.
        hidden_size: width of the residual stream.

    Returns:
        What the routers share.
    """
    layout = LAYOUTS[model_type]
    context = RoutingContext(base.forward)
    base.register_forward_pre_hook(context.begin, with_kwargs=True)
    for number, layer in enumerate(layers):
        if number in specs:
            routers = LayerRouters(hidden_size, spec=specs[number], context=context, causal=layout.causal)
            layer.add_module("routers", routers.train(layer.training))
            follow_routers(layer, routers, layout)
    return context


def follow_routers(layer: nn.Module, routers: LayerRouters, layout: Layout) -> None:
    """Lets the sublayers of a layer that have routers follow these, by class swap; the routers' place is elsewhere."""
    if {"attention_tokens", "heads"} & set(routers):
        pre_norm = layout.mlp_in == layout.mlp_out
        _swap(
            layer,
            layout.attention,
            RoutedAttention if pre_norm else RoutedPostNormAttention,
            routers=routers,
            layout=layout,
        )
    if {"mlp_tokens", "experts"} & set(routers):
        if layout.mlp_in == layout.mlp_out:
            _swap(layer, layout.mlp_in, RoutedMlp, routers=routers, layout=layout)
        else:
            _swap(layer, layout.mlp_in, RoutedIntermediate, routers=routers, layout=layout)
            _swap(layer, layout.mlp_out, RoutedOutput, routers=routers, layout=layout)
            layer.get_submodule(layout.mlp_out).__dict__["entering"] = layer.get_submodule(layout.mlp_in)


def _swap(layer: nn.Module, path: str, mixin: type[nn.Module], *, routers: LayerRouters, layout: Layout) -> None:
    module = layer.get_submodule(path)
    module.__class__ = with_mixin(type(module), mixin)
    # Not as a child: they are the layer's, and a module has one name.
    module.__dict__["routers"], module.__dict__["layout"] = routers, layout


class _Experts:
    """The FFN of a module or two as experts: runs of neurons of equal length, of which the first ones are active."""

    def __init__(self, entering: Any, leaving: Any, *, layout: Layout, routers: LayerRouters) -> None:
        self.act: Callable[[torch.Tensor], torch.Tensor] = getattr(entering, layout.act)
        self.projections = [getattr(entering, name) for name in layout.neurons]
        self.down = getattr(leaving, layout.down)
        self.count = routers.available["experts"]
        self.held = 0  # neurons of the weights that were used

    def neurons(self, states: torch.Tensor) -> torch.Tensor:
        """All active neurons ``(..., F)`` of states ``(..., D)``."""
        return self._joined([projection(states) for projection in self.projections])

    def _joined(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        return self.act(outputs[0]) if len(outputs) == 1 else self.act(outputs[0]) * outputs[1]

    def weighted(self, neurons: torch.Tensor, decision: Decision) -> torch.Tensor:
        """Neurons ``(..., F)`` times the weights of their experts, zero where these do not serve the token."""
        factors = (decision.weight * decision.keep).to(neurons.dtype).unsqueeze(-1)  # (..., U, 1)
        return (neurons.unflatten(-1, (self.count, -1)) * factors).flatten(-2)  # (..., F)

    def grouped(self, states: torch.Tensor, decision: Decision) -> tuple[torch.Tensor, int]:
        """What the experts make of states ``(N, D)``, each of the tokens that it serves; and how many rows that was."""
        parts = [_by_unit(projection, self.count, rows=True) for projection in self.projections]
        down, bias = _by_unit(self.down, self.count, rows=False)
        self.held = down.shape[0] * down.shape[2]
        result = states.new_zeros(states.shape[0], down.shape[1])  # (N, D)
        if bias is not None:
            result += bias
        weight, total = decision.weight.to(states.dtype), 0
        for expert in range(self.count):
            rows = decision.keep[:, expert].nonzero().squeeze(-1)  # (n,)
            if not len(rows):
                continue
            mine = states[rows]  # (n, D)
            entered = [
                nn.functional.linear(mine, w[expert], None if b is None else b[expert]) for w, b in parts
            ]  # (n, F/U) each
            hidden = self._joined(entered) * weight[rows, expert, None]
            served = nn.functional.linear(hidden, down[expert])
            result.index_add_(0, rows, served.to(result.dtype))  # autocast has a dtype of its own
            total += len(mine)
        return result, total


def _by_unit(projection: Any, count: int, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The active weight of a projection by unit, and its bias, by unit too where units are rows.

    ``(U, out/U, in)`` where units are ``rows`` (outputs), else ``(U, out, in/U)``.

    Raises:
        ValueError: it is no plain linear, of which rows could be computed alone.
    """
    if not isinstance(projection, nn.Linear | Conv1D):
        raise ValueError(
            f"experts compute rows of a {type(projection).__name__} alone, which an adapter on it does not allow; put "
            "adapters on the projections of attention, or merge them"
        )
    weight: torch.Tensor = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()
    outputs = vars(projection).get("active_out_features", weight.shape[0])
    inputs = vars(projection).get("active_in_features", weight.shape[1])
    weight = weight[:outputs, :inputs]
    bias: torch.Tensor | None = None if projection.bias is None else projection.bias[:outputs]
    if rows:
        return weight.unflatten(0, (count, -1)), None if bias is None else bias.unflatten(0, (count, -1))
    return weight.unflatten(1, (count, -1)).transpose(0, 1), bias  # (out, U, in/U) -> (U, out, in/U)


class RoutedMlp(Mixin):
    """The FFN of a pre-norm layer, whose result is added to the residual stream: zero for tokens that do not enter."""

    routers: LayerRouters
    layout: Layout

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self.routers.routes("mlp_tokens", "experts") or not states.numel():
            return super().forward(states)
        return self._learning(states) if self.routers.whole else self._skipping(states)

    def _learning(self, states: torch.Tensor) -> torch.Tensor:
        routers, whole = self.routers, super().forward
        if routers.routes("experts"):
            experts = _Experts(self, self, layout=self.layout, routers=routers)
            decision = routers.choose_units("experts", states)
            result = self._dropped(experts.down(experts.weighted(experts.neurons(states), decision)))
        else:
            result = whole(states)
        if routers.routes("mlp_tokens"):
            tokens = routers.choose_tokens("mlp_tokens", states)
            result = result * (tokens.weight * tokens.keep).to(result.dtype).unsqueeze(-1)  # (B, T, D)
        return result

    def _skipping(self, states: torch.Tensor) -> torch.Tensor:
        routers, flat = self.routers, states.flatten(0, -2)  # (N, D)
        if not routers.routes("mlp_tokens"):
            return self._served(flat).view_as(states)
        tokens = routers.choose_tokens("mlp_tokens", states)
        rows = tokens.keep.flatten().nonzero().squeeze(-1)  # (n,)
        entered = flat[rows]  # (n, D)
        routers.observe(Observation("mlp_tokens", tokens, len(entered)))
        result = torch.zeros_like(flat)
        if len(entered):
            factors = tokens.weight.flatten()[rows].to(flat.dtype)
            served = self._served(entered) * factors.unsqueeze(-1)
            result.index_copy_(0, rows, served.to(result.dtype))
        return result.view_as(states)

    def _served(self, states: torch.Tensor) -> torch.Tensor:
        """The FFN, or its experts, for states ``(n, D)``."""
        if not self.routers.routes("experts"):
            return super().forward(states)
        decision = self.routers.choose_units("experts", states)
        experts = _Experts(self, self, layout=self.layout, routers=self.routers)
        result, rows = experts.grouped(states, decision)
        self.routers.observe(Observation("experts", decision, rows, held=experts.held))
        return result

    def _dropped(self, states: torch.Tensor) -> torch.Tensor:
        """Dropout after the FFN, where the family has one."""
        dropout = dict(self.named_children()).get("dropout")
        return states if dropout is None else dropout(states)


class RoutedIntermediate(Mixin):
    """The first half of a post-norm FFN. It decides, and hands the second half the rows that enter.

    Outside of training its result has a row for each token that enters; where experts are routed it is what came in.
    """

    routers: LayerRouters
    layout: Layout

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        routers = self.routers
        if not routers.routes("mlp_tokens", "experts") or not states.numel():
            return super().forward(states)
        tokens = routers.choose_tokens("mlp_tokens", states) if routers.routes("mlp_tokens") else None
        if routers.whole:
            served = routers.choose_units("experts", states) if routers.routes("experts") else None
            self.__dict__["decided"] = (tokens, served)
            return super().forward(states)
        flat = states.flatten(0, -2)  # (N, D)
        if tokens is not None:
            flat = flat[tokens.keep.flatten()]  # (n, D)
            routers.observe(Observation("mlp_tokens", tokens, len(flat)))
        served = routers.choose_units("experts", flat) if routers.routes("experts") else None
        self.__dict__["decided"] = (tokens, served)
        return flat if served is not None else super().forward(flat)


class RoutedOutput(Mixin):
    """The second half of a post-norm FFN: the norm of ``x + g FFN(x)`` for a token of weight ``g`` that enters.

    For the others it is the norm of ``x``: what comes after expects states that were normalised as often. (With random
    tokens left out of MiniLM's FFNs, half of them, embeddings keep a cosine of .80 so, and of .40 if ``x`` stays.)
    """

    routers: LayerRouters
    layout: Layout
    entering: RoutedIntermediate

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if not self.routers.routes("mlp_tokens", "experts") or not residual.numel():
            return super().forward(states, residual)
        tokens, served = vars(self.entering).pop("decided")
        children: Any = dict(self.named_children())
        if self.routers.whole:
            if served is not None:
                experts = _Experts(self.entering, self, layout=self.layout, routers=self.routers)
                states = experts.weighted(states, served)
            update = children["dropout"](children["dense"](states))
            if tokens is not None:
                update = update * (tokens.weight * tokens.keep).to(update.dtype).unsqueeze(-1)  # (B, T, D)
        else:
            update = self._spread(self._served(states, served), residual, tokens)
        normalised: torch.Tensor = children["LayerNorm"](update + residual)
        return normalised

    def _served(self, states: torch.Tensor, served: Decision | None) -> torch.Tensor:
        """What the FFN adds to the tokens that entered, ``(n, D)``."""
        if served is None:
            result: torch.Tensor = getattr(self, self.layout.down)(states)
            return result
        experts = _Experts(self.entering, self, layout=self.layout, routers=self.routers)
        result, rows = experts.grouped(states, served)
        self.routers.observe(Observation("experts", served, rows, held=experts.held))
        return result

    def _spread(self, update: torch.Tensor, residual: torch.Tensor, tokens: Decision | None) -> torch.Tensor:
        """``(n, D) -> (B, T, D)``, weighted, zero for tokens that did not enter."""
        if tokens is None:
            return update.view_as(residual)
        rows = tokens.keep.flatten().nonzero().squeeze(-1)  # (n,)
        weighted = update * tokens.weight.flatten()[rows].to(update.dtype).unsqueeze(-1)
        spread = torch.zeros_like(residual).flatten(0, -2)  # (N, D)
        return spread.index_copy_(0, rows, weighted.to(spread.dtype)).view_as(residual)
