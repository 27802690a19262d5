"""What a user would get at the same cost without us: one width for all layers, or fewer layers, both untrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from hf_elastic import costs
from hf_elastic.conversion import make_elastic
from hf_elastic.declaration import ElasticConfig
from hf_elastic.families import family_of, ffn_neurons, layers_of
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

_WIDTH_STEP = 8
UNIFORM, DROPPED, ONE_MORE = "uniform width, untrained", "dropped layers, untrained", "one layer more, untrained"

Alternative = tuple[str, Supernet, Architecture]


def plain_alternatives(
    load: Callable[[], PreTrainedModel], *, limit: int, layer_order: Sequence[int]
) -> list[Alternative]:
    """Finds what plain cutting gives at the cost of a subnet, with the parent's sorted weights and no training.

    The largest uniform FFN width and the largest depth within the limit, and the depth one layer above it, since
    layers are coarse steps.

    Args:
        load: returns the parent, its neurons sorted by importance.
        limit: MACs at 128 tokens.
        layer_order: layers from the most to the least important; the last are dropped first.

    Returns:
        Name, supernet and architecture of each that can be had within the limit.
    """
    model = load()
    family = family_of(model)
    widths = list(range(_WIDTH_STEP, ffn_neurons(model, family), _WIDTH_STEP))
    depths = list(range(1, len(layers_of(model, family))))
    spaces = {
        UNIFORM: ElasticConfig(intermediate_size=widths, loadability="stock") if widths else None,
        DROPPED: ElasticConfig(num_hidden_layers=depths, layer_order=layer_order) if depths else None,
    }
    found = []
    for name, space in spaces.items():
        if space is None:
            continue
        supernet = make_elastic(load(), space)
        sized = sorted(
            ((costs.macs(supernet, a, seq_len=costs.LATENCY_TOKENS), a) for a in supernet.space.architectures()),
            key=lambda pair: pair[0],
        )
        within = [point for size, point in sized if size <= limit]
        above = [point for size, point in sized[:-1] if size > limit]  # the last is the parent itself
        if within:
            found.append((name, supernet, within[-1]))
        if name == DROPPED and within and above:
            found.append((ONE_MORE, supernet, above[0]))
    return found
