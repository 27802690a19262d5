"""Exact search of spaces of the size it is made for, against dense dynamic programming, and of real supernets."""

import random
import time

import numpy as np
import pytest

from hf_elastic import objectives
from hf_elastic.errors import SearchError
from hf_elastic.search import AdditiveTable, Objective, SearchResult, folding, search_subnets
from hf_elastic.search import exact as exact_module
from hf_elastic.search.exact import ExactSearch
from hf_elastic.search.limits import Limit
from hf_elastic.space import Choice, Condition, SearchSpace
from hf_elastic.tables.additive import layer_table
from tests.search.additive import brute_forced_front, widths_problem
from tests.tiny_models import supernet_of

SECONDS = {"encoder": 2.0, "decoder": 10.0}


def encoder_layer(number):
    """16 widths, 12 heads, 4 skips."""
    skip = Choice(f"layers.{number}.skip", ("none", "attention", "mlp", "layer"), "categorical", (3, 2, 1, 0))
    heads, width = f"layers.{number}.num_attention_heads", f"layers.{number}.intermediate_size"
    return [
        skip,
        Choice(width, tuple(range(1, 17)), when=(Condition(skip.name, ("none", "attention")),)),
        Choice(heads, tuple(range(1, 13)), when=(Condition(skip.name, ("none", "mlp")),)),
    ]


def decoder_layer(number):
    """Four groups of heads and five widths: of 32 layers 2^64·5^32 architectures."""
    return [
        Choice(f"layers.{number}.num_key_value_heads", (1, 2, 3, 4)),
        Choice(f"layers.{number}.intermediate_size", (2, 3, 5, 7, 8)),
    ]


def layered(count, layer):
    """Damage, size and heads cut, all integers; damage is large where size is small, never a sum over sublayers."""
    rng = random.Random(0)
    layers = [layer(number) for number in range(count)]
    space = SearchSpace(choice for choices in layers for choice in choices)
    groups = tuple(tuple(choice.name for choice in choices) for choices in layers)
    found = {"damage": [], "size": [], "cuts": []}
    for choices in layers:
        keys = [tuple(point.values()) for point in SearchSpace(choices).architectures()]
        price = [rng.randint(5, 9) for _ in choices]
        sizes = [sum(p * v for p, v in zip(price, key, strict=True) if isinstance(v, int)) for key in keys]
        weight = rng.randint(10**4, 10**6)
        damages = [weight * 100 // (size + 10) + rng.randint(0, 10**4) for size in sizes]
        found["damage"].append(dict(zip(keys, damages, strict=True)))
        found["size"].append(dict(zip(keys, sizes, strict=True)))
        found["cuts"].append({key: rng.randint(0, 2) for key in keys})
    return space, {
        name: Objective(name, table.value, cost=name != "damage", additive=table)
        for name, table in ((name, AdditiveTable(groups, tuple(tables))) for name, tables in found.items())
    }


def least_by_cost(goal, costs):
    """The least goal for each exact sum of the costs, in a dense array: no dominance, no ceilings."""
    tables = [goal.additive.tables, *(cost.additive.tables for cost in costs)]
    shape = [1 + sum(max(table.values()) for table in cost) for cost in tables[1:]]
    best = np.full(shape, np.inf)
    best[(0,) * len(costs)] = 0
    for gains, *prices in zip(*tables, strict=True):
        after = np.full(shape, np.inf)
        for key, gain in gains.items():
            steps = [price[key] for price in prices]
            source = tuple(slice(0, size - step) for size, step in zip(shape, steps, strict=True))
            target = tuple(slice(step, None) for step in steps)
            after[target] = np.minimum(after[target], best[source] + gain)
        best = after
    return best


def steps_down(best):
    """``(goal, cost)`` wherever the goal is less than for every smaller cost."""
    least = np.minimum.accumulate(best)
    falls = np.append(np.isfinite(best[:1]), best[1:] < least[:-1])
    return {(float(best[cost]), float(cost)) for cost in np.flatnonzero(falls)}


@pytest.mark.parametrize(("kind", "count", "layer"), [("encoder", 6, encoder_layer), ("decoder", 32, decoder_layer)])
def test_the_front_of_a_space_beyond_listing_is_that_of_dense_dynamic_programming_and_in_time(kind, count, layer):
    space, known = layered(count, layer)
    goals = [known["damage"], known["size"]]
    if kind == "decoder":
        assert space.size == 2**64 * 5**32
    best, seconds = least_by_cost(goals[0], goals[1:]), -time.process_time()
    result = search_subnets(space, goals, algorithm="exact", progress=False)
    seconds += time.process_time()
    found = {tuple(e.values[goal.name] for goal in goals) for e in result.front}
    assert found == steps_down(best) and len(found) > 200
    assert seconds < SECONDS[kind]


@pytest.mark.parametrize(("count", "layer"), [(6, encoder_layer), (32, decoder_layer)])
def test_the_optimum_within_one_limit_and_within_two_is_that_of_dense_dynamic_programming(count, layer):
    space, known = layered(count, layer)
    goal, size, cuts = known.values()
    best = least_by_cost(goal, [size, cuts])
    options = {"known": known}
    for share, most in ((0.4, count), (0.7, count // 2), (0.9, 2)):
        bound = int(share * size(space.largest()))
        limits = [Limit("size", bound, cost=True), Limit("cuts", most, cost=True)]
        for some, within in ((limits[:1], best[: bound + 1]), (limits, best[: bound + 1, : most + 1])):
            (found,) = ExactSearch(space, [goal], limits=some, **options).front()
            assert found.values["damage"] == within.min()
            assert found.feasible and found.values["size"] == size(found.architecture) <= bound


def test_highs_finds_the_optimum_that_dynamic_programming_finds(monkeypatch):
    space, (damage, parameters) = widths_problem(layers=32, widths=5, seed=3)
    front = search_subnets(space, [damage, parameters], algorithm="exact", progress=False).front
    wanted = front[len(front) // 2].values
    limit = Limit("parameters", wanted["parameters"], cost=True)
    exact = ExactSearch(space, [damage], limits=[limit], known={"parameters": parameters})
    (optimum,) = exact.front()
    assert optimum.values == wanted
    monkeypatch.setattr(exact_module, "MOST_LINKS", 0)
    (other,) = exact.front()
    assert other.values["damage"] == wanted["damage"] and other.feasible


def test_selections_are_extended_in_portions_to_the_same_front(monkeypatch):
    space, known = layered(8, decoder_layer)
    goals = [known["damage"], known["size"]]
    whole = search_subnets(space, goals, algorithm="exact", progress=False)
    monkeypatch.setattr(folding, "_PORTION", 100)
    assert search_subnets(space, goals, algorithm="exact", progress=False) == whole


def test_too_much_to_keep_and_too_long_a_front_are_refused_with_the_way_out(monkeypatch):
    space, known = layered(4, decoder_layer)
    goals = [known["damage"], known["size"]]
    front = search_subnets(space, goals, algorithm="exact", progress=False).front
    monkeypatch.setattr(exact_module, "MOST_FOUND", len(front) - 1)
    with pytest.raises(SearchError, match=f"the front has {len(front)} architectures, .* at most .* coarser steps"):
        search_subnets(space, goals, algorithm="exact", progress=False)
    monkeypatch.setattr(folding, "_MOST_KEPT", {2: 30})
    with pytest.raises(SearchError, match="more than 30 partial selections in 2 objectives and limits; .* coarser"):
        search_subnets(space, goals, algorithm="exact", progress=False)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # one width and one depth for all
        ("bert", {"loadability": "stock", "skip": None, "num_attention_heads": None}),
        ("bert", {"loadability": "stock", "skip": ["layer"], "num_attention_heads": None}),
        ("llama", {"intermediate_size": [16, 1.0]}),  # widths, groups and skips of layers that a depth drops
        ("gpt2", {"intermediate_size": [0.5, 1.0], "num_hidden_layers": None, "skip": ["attention", "layer"]}),
    ],
)
def test_the_front_of_a_real_space_is_the_brute_forced_one(family, changes):
    supernet = supernet_of(family, "base", **changes)
    rng, known = random.Random(0), {}

    def damage(part, shape):
        return known.setdefault((part.index, shape), rng.random())

    table = layer_table(supernet, damage, constant=1.0)
    assert table is not None
    goals = [
        Objective("damage", table.value, additive=table),
        objectives.parameters(supernet),
        objectives.macs(supernet, seq_len=8),
    ]
    result = search_subnets(supernet.space, goals, algorithm="exact", progress=False)
    assert {tuple(e.values[goal.name] for goal in goals) for e in result.front} == brute_forced_front(
        supernet.space, goals
    )
    for evaluation in result.evaluations:
        assert evaluation.values["parameters"] == goals[1](evaluation.architecture)
    assert SearchResult.from_json(result.to_json()) == result
