from __future__ import annotations

import random

import pytest
from tiny_models import supernet_of, tiny

from hf_elastic import ElasticConfig, InfeasibleError, SearchError, costs, make_elastic
from hf_elastic.pipeline.limits import AmongSubnets, feasibility, feasible_share, near_limit


def test_limits_are_fractions_of_the_parent_up_to_one_and_absolute_above() -> None:
    supernet = supernet_of("bert", "base")
    whole = costs.parameters(supernet, supernet.space.largest())
    by_share, by_number = (feasibility(supernet, {"parameters": v}) for v in (0.6, 0.6 * whole))
    rng = random.Random(0)
    for point in (supernet.space.sample(rng) for _ in range(100)):
        allowed = costs.parameters(supernet, point) <= 0.6 * whole
        assert by_share.allows(point) == by_number.allows(point) == allowed


def test_several_limits_hold_together() -> None:
    supernet = supernet_of("llama")
    limits = feasibility(supernet, {"parameters": 0.8, "macs": 0.7})
    largest = supernet.space.largest()
    for point in near_limit(supernet, limits, count=8):
        assert costs.parameters(supernet, point) <= 0.8 * costs.parameters(supernet, largest)
        assert costs.macs(supernet, point, seq_len=128) <= 0.7 * costs.macs(supernet, largest, seq_len=128)


def test_an_unknown_limit_names_the_known_ones() -> None:
    with pytest.raises(SearchError, match="'weight'.*macs.*parameters.*total_parameters"):
        feasibility(supernet_of("bert", "base"), {"weight": 0.5})


def test_a_limit_out_of_reach_says_how_far_the_space_reaches() -> None:
    supernet = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[0.5]))
    smallest = costs.parameters(supernet, supernet.space.smallest())
    with pytest.raises(InfeasibleError, match=f"reachable: {smallest:g}"):
        feasibility(supernet, {"parameters": 0.1})


def test_the_feasible_share_is_that_of_the_space() -> None:
    supernet = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[16, 32], num_attention_heads=[1]))
    points = list(supernet.space.architectures())
    limits = feasibility(supernet, {"parameters": 0.8})
    exact = sum(limits.allows(point) for point in points) / len(points)
    assert 0.2 < exact < 0.9
    assert feasible_share(supernet, limits, samples=2000) == pytest.approx(exact, abs=0.05)
    assert feasible_share(supernet, feasibility(supernet, {"parameters": 1.0})) == 1.0


def test_the_pool_lies_within_the_limits_and_near_them() -> None:
    supernet = supernet_of("bert", "base")
    limits = feasibility(supernet, {"macs": 0.6})
    pool = near_limit(supernet, limits, count=10)
    assert len(set(pool)) == len(pool) == 10
    sizes = [costs.macs(supernet, point, seq_len=128) for point in pool]
    bound = 0.6 * costs.macs(supernet, supernet.space.largest(), seq_len=128)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.95 * bound and all(0.8 * bound < size <= bound for size in sizes)


def test_the_pool_depends_on_the_seed_only() -> None:
    one, other = (supernet_of("bert", "base") for _ in range(2))
    limits = [feasibility(s, {"parameters": 0.6}) for s in (one, other)]
    assert near_limit(one, limits[0], count=8, seed=3) == near_limit(other, limits[1], count=8, seed=3)


def test_a_limit_that_only_the_empty_model_keeps_is_refused() -> None:
    supernet = make_elastic(tiny("bert", "base"), ElasticConfig(skip=["attention", "mlp"]))
    limits = feasibility(supernet, {"macs": 0.05})
    with pytest.raises(InfeasibleError, match="without any layer"):
        near_limit(supernet, limits, count=4)


def test_a_space_with_an_infeasible_midpoint_has_a_pool() -> None:
    supernet = make_elastic(tiny("gpt2"), ElasticConfig(intermediate_size=[4, 8, 12, 32]))
    limits = feasibility(supernet, {"parameters": 0.65})
    assert not limits.allows(supernet.space.midpoint())
    assert all(limits.allows(point) for point in near_limit(supernet, limits, count=4))


def test_subnets_are_drawn_from_the_list_by_seed_and_step() -> None:
    supernet = supernet_of("bert", "base")
    pool = near_limit(supernet, feasibility(supernet, {"parameters": 0.7}), count=4)
    rule = AmongSubnets(pool, seed=1)
    drawn = [rule.draw(supernet.space, step, 0) for step in range(60)]
    assert drawn == [AmongSubnets(pool, seed=1).draw(supernet.space, step, 0) for step in range(60)]
    assert drawn != [AmongSubnets(pool, seed=2).draw(supernet.space, step, 0) for step in range(60)]
    assert {point for (point,) in drawn} == set(pool)
    assert rule.subnets == 1
