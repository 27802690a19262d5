"""All proxies by name, and the one way to call them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.families import Family
from hf_elastic.layers import evaluating
from hf_elastic.proxies import activation, gradient, weight
from hf_elastic.proxies.roles import Roles, require_whole, roles_of
from hf_elastic.proxies.subject import Batch, Subject, Target
from hf_elastic.routers import require_unrouted
from hf_elastic.streams import checked_batches, on_device

Proxy = Callable[[Subject], float]

BASELINES: Mapping[str, Proxy] = {
    "params": weight.params, "decoder_params": weight.decoder_params, "depth": weight.depth,
    "width_depth": weight.width_depth,
}  # fmt: skip
"""Sizes that every proxy is to be compared with."""
DATA_FREE: Mapping[str, Proxy] = {
    "zerolm": weight.zerolm, "synflow": gradient.synflow, "log_synflow": gradient.log_synflow, "dss": gradient.dss,
}  # fmt: skip
"""Proxies of a model alone."""
ON_DATA: Mapping[str, Proxy] = {
    "fisher": gradient.fisher, "grad_norm": gradient.grad_norm, "snip": gradient.snip, "grasp": gradient.grasp,
    "jacobian_cosine": gradient.jacobian_cosine, "synaptic_saliency": gradient.synaptic_saliency,
    "synaptic_diversity": gradient.synaptic_diversity, "head_importance": gradient.head_importance,
    "attention_confidence": activation.attention_confidence, "softmax_confidence": activation.softmax_confidence,
    "activation_distance": activation.activation_distance, "eznas": gradient.eznas, "lpzero": gradient.lpzero,
}  # fmt: skip
"""Proxies that need batches."""
PROXIES: Mapping[str, Proxy] = {**DATA_FREE, **BASELINES, **ON_DATA}
"""All proxies by name."""


def score(
    model: nn.Module,
    name: str,
    batches: Iterable[Batch] | Batch = (),
    *,
    target: Target = "auto",
    roles: Roles | None = None,
    family: Family | None = None,
) -> float:
    """Scores a model without training it; higher is better.

    Parameters, gradients, modes, hooks and random state are as before. The model is scored as it is: make several draws
    of one that was not trained yet.

    Args:
        model: a stock model, or one that hf_elastic has exported; with ``roles`` any module.
        name: one of ``hf_elastic.proxies.PROXIES``.
        batches: inputs of the model, wherever they lie; for the proxies of ``ON_DATA``.
        target: what gradients are of, see :class:`~hf_elastic.proxies.Subject`.
        roles: which modules are what, of a model of one's own.
        family: row of a model type that hf_elastic does not know.

    Raises:
        DataError: there is no such proxy or target, batches or labels are missing, a batch is no dict of tensors, or
            the score or what it is made of is not finite.
        UnsupportedModelError: the model lacks what the proxy looks at, its weights are packed or not loaded, or a
            subnet is active in it, or it has routers.
    """
    if name not in PROXIES:
        raise DataError(f"there is no proxy {name!r}; known: {', '.join(PROXIES)}")
    if target not in get_args(Target):
        raise DataError(f"there is no target {target!r}; known: {', '.join(get_args(Target))}")
    require_unrouted(model, "a proxy")
    given = [batches] if isinstance(batches, Mapping) else list(batches)
    if roles is not None:
        require_whole(model)
    else:
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(f"{type(model).__name__} is no transformers model; pass roles=Roles(...)")
        roles = roles_of(model, family)
    data = tuple(on_device(batch, model) for batch in checked_batches(given)) if given else ()
    subject = Subject(model, roles, data, target)
    with evaluating(model), _in_dicts(model), torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        found = float(PROXIES[name](subject))
    if not math.isfinite(found):
        raise DataError(
            f"the score {name!r} of {type(model).__name__} is {found}; check its weights, and score it in float32"
        )
    return found


@contextmanager
def _in_dicts(model: nn.Module) -> Iterator[None]:
    """Lets modules hold their tensors in dicts inside the block.

    compressed-tensors holds those of a model that it has unpacked in caches, which copy what replaces a weight for one
    call into the weight itself.
    """
    kinds = ("_parameters", "_buffers")
    held = [(vars(module), kind) for module in model.modules() for kind in kinds]
    caches = [(state, kind, state[kind]) for state, kind in held if not isinstance(state[kind], dict)]
    for state, kind, cache in caches:
        state[kind] = dict(cache.items())
    try:
        yield
    finally:
        for state, kind, cache in caches:
            state[kind] = cache
