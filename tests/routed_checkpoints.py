"""Tiny routed models to be saved: routers at random, as if they were trained, thresholds set by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tiny_models import DECODERS, GROUPED, inputs, space, tiny

from hf_elastic import RoutingConfig, Supernet, add_routing, make_elastic
from hf_elastic.models.elastic_routers import LayerRouters, Router


def routing_of(family: str, **changes: Any) -> RoutingConfig:
    """Everything is routed, at a few capacities."""
    heads = [1] if family in GROUPED else [1, 2, 3]
    settings: dict[str, Any] = {
        "mlp_tokens": [0.4, 0.7], "attention_tokens": [0.6], "heads": heads, "experts": [1, 2, 3], "num_experts": 4,
    }  # fmt: skip
    return RoutingConfig(**{**settings, **changes})


def routed(family: str, head: str = "lm", *, elastic: bool = False, seed: int = 0, **changes: Any) -> Supernet:
    """A tiny model with :func:`routing_of`; an elastic one has widths of 2 and 4 experts, heads, skips and depth."""
    model = tiny(family, head, seed=seed)
    if elastic:
        make_elastic(model, space(family, intermediate_size=[24, 48]))
    supernet = add_routing(model, routing_of(family, **changes))
    randomise(routers_in(model), seed=seed)
    return supernet


def routers_in(model: torch.nn.Module) -> Iterator[Router]:
    """Every router of a model."""
    for module in model.modules():
        if isinstance(module, LayerRouters):
            yield from (module[kind] for kind in module)


def randomise(routers: Iterable[Router], *, seed: int = 0) -> None:
    """Weights at random; thresholds around the scores that these give."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if router.thresholds is not None:
            router.thresholds.copy_(torch.linspace(0.3, -0.3, len(router.values)))


def padded(family: str, model: Any, *, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Two rows of unequal length, padded on the left where the model decodes."""
    feed = inputs(model, tokens=tokens)
    mask = torch.ones_like(feed["input_ids"])
    mask[0, slice(3) if family in DECODERS else slice(6, None)] = 0
    return {**feed, "attention_mask": mask}


def chosen(supernet: Supernet, **capacities: int) -> Any:
    """The largest architecture at other capacities, in all layers, or as ``heads1=2`` in one."""
    values: dict[str, Any] = dict(supernet.space.largest())
    for name, value in capacities.items():
        kind, layer = (name[:-1], name[-1]) if name[-1].isdigit() else (name, None)
        for part in supernet.router_parts:
            if kind in part.routers and layer in (None, str(part.layer.index)):
                values[part.choice_name(kind)] = value
    return supernet.space.canonical(values)


def same(got: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether outputs are finite and equal up to rounding, outside of padding."""
    if mask is not None and got.ndim == 3:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    return bool(wanted.isfinite().all()) and bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def run(model: Any, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """First output, without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model(**feed)[0]
    return found
