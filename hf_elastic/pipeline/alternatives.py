"""What a user would get at the same cost without us: one width for all layers, or fewer layers, both untrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from hf_elastic import costs
from hf_elastic.conversion import make_elastic
from hf_elastic.declaration import ElasticConfig
from hf_elastic.families import family_of, layers_of
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

_WIDTH_STEP = 8

Alternative = tuple[str, Supernet, Architecture]


def plain_alternatives(
    load: Callable[[], PreTrainedModel], *, limit: int, layer_order: Sequence[int]
) -> list[Alternative]:
    """Finds the largest uniform FFN width and the largest depth within a limit, with the parent's sorted weights.

    Args:
        load: returns the parent, its neurons sorted by importance.
        limit: MACs at 128 tokens.
        layer_order: layers from the most to the least important; the last are dropped first.

    Returns:
        Name, supernet and architecture of each that can be had within the limit.
    """
    model = load()
    family = family_of(model)
    layers = layers_of(model, family)
    neurons = layers[0].get_parameter(f"{family.ffn_out}.weight").numel() // model.config.hidden_size
    widths = list(range(_WIDTH_STEP, neurons, _WIDTH_STEP))
    depths = list(range(1, len(layers)))
    spaces = {
        "uniform width, untrained": ElasticConfig(intermediate_size=widths, loadability="stock") if widths else None,
        "dropped layers, untrained": ElasticConfig(num_hidden_layers=depths, layer_order=layer_order)
        if depths
        else None,
    }
    found = []
    for name, space in spaces.items():
        if space is None:
            continue
        supernet = make_elastic(load(), space)
        point = _largest_within(supernet, limit)
        if point is not None:
            found.append((name, supernet, point))
    return found


def _largest_within(supernet: Supernet, limit: int) -> Architecture | None:
    sized = [(costs.macs(supernet, a, seq_len=costs.LATENCY_TOKENS), a) for a in supernet.space.architectures()]
    within = [pair for pair in sized if pair[0] <= limit]
    return max(within, key=lambda pair: pair[0])[1] if within else None
