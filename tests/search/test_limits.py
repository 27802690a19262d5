"""Limits: what they mean, and the way back from architectures that exceed them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.errors import InfeasibleError, SearchError
from hf_elastic.search.limits import Feasibility, Limit, neighbours, resolve_limits
from hf_elastic.search.objective import Objective, known_objectives
from tests.search.toy import layers_problem, widths_problem


def feasibility_of(problem, within):
    space, objectives = problem
    known = known_objectives(objectives)
    return space, objectives[1], Feasibility(space, resolve_limits(within, known, space), known)


def test_floats_up_to_one_are_fractions_of_the_largest_cost_and_nothing_else_is():
    space, (loss, cost) = widths_problem()
    known = {"loss": loss, "parameters": cost}
    largest = cost(space.largest())
    for value, bound in ((0.5, 0.5 * largest), (1.0, largest), (1, 1.0), (1.5, 1.5), (700, 700.0), (-2.0, -2.0)):
        (limit,) = resolve_limits({"parameters": value}, known, space)
        assert limit == Limit("parameters", bound, "minimize", True, "parameters")
    (measured,) = resolve_limits({"loss": 0.5}, known, space)
    assert measured == Limit("loss", 0.5)
    assert resolve_limits(None, known, space) == ()


def test_limits_bound_from_the_side_that_the_direction_says():
    upper, lower = Limit("loss", 2.0), Limit("accuracy", 0.5, "maximize")
    assert upper.allows(2.0) and not upper.allows(2.1) and upper.excess(3.0) == 0.5 and upper.excess(1.0) == 0
    assert lower.allows(0.5) and not lower.allows(0.4) and lower.excess(0.25) == 0.5 and lower.excess(0.7) == 0
    assert (upper.best_of([3, 1]), lower.best_of([3, 1])) == (1, 3)
    assert (str(upper), str(lower)) == ("loss <= 2", "accuracy >= 0.5")


@given(st.integers(0, 10_000), st.floats(0.3, 1.0), st.sampled_from([widths_problem, layers_problem]))
@settings(max_examples=100, deadline=None)
def test_repaired_architectures_keep_the_limits_and_allowed_ones_stay(seed, fraction, problem):
    space, cost, feasibility = feasibility_of(problem(), {"parameters": fraction})
    architecture = space.sample(random.Random(seed))
    repaired = feasibility.repair(architecture, random.Random(seed))
    bound = fraction * cost(space.largest())
    assert repaired in space and cost(repaired) <= bound
    assert (repaired == architecture) == (cost(architecture) <= bound)
    assert feasibility.repair(architecture, random.Random(seed)) == repaired


def test_repair_shrinks_no_more_than_one_step_too_far():
    space, cost, feasibility = feasibility_of(widths_problem(layers=12), {"parameters": 0.6})
    bound = 0.6 * cost(space.largest())
    for seed in range(50):
        repaired = feasibility.repair(space.largest(), random.Random(seed))
        # The last step made it fit: some choice one value larger would not.
        assert any(cost(n) > bound for n in neighbours(space, repaired))
        assert cost(repaired) > 0.45 * cost(space.largest())


def test_the_even_architecture_is_the_largest_of_one_proportion_within_the_limits():
    space, cost, feasibility = feasibility_of(widths_problem(layers=4), {"parameters": 0.8})
    even = feasibility.even()
    bound = 0.8 * cost(space.largest())
    sizes = set(even.values())
    assert cost(even) <= bound and max(sizes) - min(sizes) <= 64
    assert any(cost(n) > bound for n in neighbours(space, even))
    assert feasibility_of(widths_problem(), {})[2].even() == widths_problem()[0].largest()


def test_the_even_architecture_skips_blocks_only_when_sizes_are_not_enough():
    for fraction, skips in ((0.5, {"none"}), (0.1, {"none", "mlp", "layer"})):
        space, cost, feasibility = feasibility_of(layers_problem(), {"parameters": fraction})
        even = feasibility.even()
        assert cost(even) <= fraction * cost(space.largest())
        assert {even[name] for name in space.names if name.endswith("skip")} <= skips


def test_costs_that_are_not_monotone_are_still_satisfied():
    space, objectives = widths_problem()
    target = space.decode((1, 3, 0, 2, 1, 3))

    def distance(architecture):
        pairs = zip(space.encode(architecture), space.encode(target), strict=True)
        return float(sum(abs(a - b) for a, b in pairs))

    cost = Objective("distance", distance, cost=True)
    feasibility = Feasibility(space, resolve_limits({"distance": 0}, {"distance": cost}, space), {"distance": cost})
    feasibility.require_some()
    assert feasibility.repair(space.largest(), random.Random(0)) == target


def test_limits_that_contradict_each_other_name_what_each_could_reach():
    space, (_, cost) = widths_problem()
    saved = Objective("saved", lambda a: -cost.function(a), direction="maximize", cost=True)
    used = Objective("used", cost.function, direction="maximize", cost=True)
    known = {"saved": saved, "used": used}
    limits = resolve_limits({"saved": -500, "used": 1500}, known, space)
    with pytest.raises(InfeasibleError) as caught:
        Feasibility(space, limits, known).require_some()
    assert "saved >= -500" in str(caught.value) and "used >= 1500" in str(caught.value)


def test_each_cost_is_computed_once_per_architecture():
    space, (_, cost) = widths_problem()
    calls = []
    counting = Objective("parameters", lambda a: calls.append(a) or cost.function(a), cost=True)
    known = {"parameters": counting}
    feasibility = Feasibility(space, (Limit("parameters", 900.0, cost=True),), known)
    for _ in range(3):
        feasibility.allows(space.midpoint())
        assert feasibility.limited_costs(space.midpoint()) == {"parameters": cost(space.midpoint())}
    assert len(calls) == 1


def test_neighbours_are_all_canonical_architectures_one_change_away():
    space, _ = layers_problem()
    architecture = space.largest()
    found = list(neighbours(space, architecture))
    assert len({a.digest for a in found}) == len(found)
    changed = {a for a in space.architectures() if sum(a[n] != architecture[n] for n in space.names) == 1}
    assert changed <= set(found) and all(a in space for a in found)


@pytest.mark.parametrize("value", ["1", None, True, float("inf"), [1]])
def test_limits_that_are_no_numbers_are_named(value):
    space, (loss, cost) = widths_problem()
    with pytest.raises(SearchError, match="'parameters'.*finite number"):
        resolve_limits({"parameters": value}, {"parameters": cost}, space)
