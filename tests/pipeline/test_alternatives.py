from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_models import class_of, tiny
from transformers import PreTrainedModel

from hf_elastic import Architecture, ElasticConfig, Supernet, costs, extract, make_elastic
from hf_elastic.pipeline.alternatives import plain_alternatives

Load = Callable[[], PreTrainedModel]


def macs_of(model: PreTrainedModel) -> int:
    """MACs of a stock model at 128 tokens, counted on a supernet of it."""
    supernet = make_elastic(model, ElasticConfig(intermediate_size=[8], num_hidden_layers=[1]))
    return costs.macs(supernet, supernet.space.largest(), seq_len=128)


def found(load: Load, *, share: float, order: tuple[int, ...]) -> dict[str, tuple[Supernet, Architecture]]:
    limit = int(share * macs_of(load()))
    return {name: (s, a) for name, s, a in plain_alternatives(load, limit=limit, layer_order=order)}


@pytest.mark.parametrize(("family", "order"), [("bert", (2, 0, 1)), ("llama", (0, 2, 1)), ("distilbert", (1, 2, 0))])
def test_the_alternatives_are_the_largest_stock_models_within_the_limit(family: str, order: tuple[int, ...]) -> None:
    head = "lm" if family == "llama" else "base"

    wide = {"hidden_dim" if family == "distilbert" else "intermediate_size": 160}

    def load() -> PreTrainedModel:
        return tiny(family, head, **wide)

    limit = 0.8 * macs_of(load())
    made = found(load, share=0.8, order=order)
    assert list(made) == ["uniform width, untrained", "dropped layers, untrained"]
    supernet, point = made["uniform width, untrained"]
    assert costs.macs(supernet, point, seq_len=128) <= limit
    wider = supernet.space.canonical({"intermediate_size": int(point["intermediate_size"]) + 8})
    assert costs.macs(supernet, wider, seq_len=128) > limit
    supernet, point = made["dropped layers, untrained"]
    assert point["num_hidden_layers"] == 2
    assert [i for i, shape in enumerate(supernet.layer_shapes(point)) if shape.skipped] == [order[-1]]
    for supernet, point in made.values():
        assert supernet.loadability(point) == "stock"
        assert type(extract(supernet, point)) is class_of(family, head)


def test_the_alternatives_have_the_parents_weights() -> None:
    parent = tiny("bert", "base").state_dict()
    for supernet, _ in found(lambda: tiny("bert", "base"), share=0.9, order=(0, 1, 2)).values():
        assert all((tensor == parent[name]).all() for name, tensor in supernet.model.state_dict().items())


def test_what_cannot_be_had_within_the_limit_is_left_out() -> None:
    assert list(found(lambda: tiny("bert", "base"), share=0.4, order=(0, 1, 2))) == [
        "dropped layers, untrained",
        "one layer more, untrained",
    ]
    assert not found(lambda: tiny("bert", "base"), share=0.05, order=(0, 1, 2))


def test_a_model_of_one_layer_has_no_layer_to_drop() -> None:
    made = found(lambda: tiny("bert", "base", num_hidden_layers=1), share=0.9, order=(0,))
    assert list(made) == ["uniform width, untrained"]


def test_one_layer_more_is_the_smallest_depth_above_the_limit() -> None:
    made = found(lambda: tiny("bert", "base"), share=0.5, order=(2, 0, 1))
    depths = [made[name][1]["num_hidden_layers"] for name in ("dropped layers, untrained", "one layer more, untrained")]
    assert depths == [1, 2]
