"""Exact search against brute force: integers and floats, conditional and shared choices, limits, any directions."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_elastic
from hf_elastic.errors import ArchitectureError, InfeasibleError, SearchError
from hf_elastic.search import AdditiveTable, SearchResult, search_subnets
from hf_elastic.search import exact as exact_module
from hf_elastic.search.exact import ExactSearch
from hf_elastic.search.limits import Limit
from hf_elastic.space import Choice, SearchSpace
from tests.search.additive import (
    a_limit,
    a_problem,
    a_table,
    an_objective,
    brute_forced_front,
    tied_problem,
    vectors_within,
    widths_problem,
)

ROOT = Path(hf_elastic.__file__).parents[1]


def exact_front(space, goals, *, limits=(), others=()):
    """The front found, checked to be sorted, without repetition, and attained by points of the space."""
    known = {objective.name: objective for objective in [*goals, *others]}
    found = ExactSearch(space, goals, limits=limits, known=known).front()
    for evaluation in found:
        space.validate(evaluation.architecture)
        assert evaluation.feasible
        assert evaluation.values == {n: known[n].additive.value(evaluation.architecture) for n in evaluation.values}
    vectors = [tuple(evaluation.values[goal.name] for goal in goals) for evaluation in found]
    firsts = [goals[0].sign * vector[0] for vector in vectors]
    assert firsts == sorted(firsts) and len(set(vectors)) == len(vectors)
    return set(vectors)


def searched(space, objectives, **options):
    return search_subnets(space, objectives, algorithm="exact", progress=False, **options)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_the_front_is_the_brute_forced_front(seed, count):
    _, space, goals = a_problem(seed, count)
    assert exact_front(space, goals) == brute_forced_front(space, goals)


@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 3))
@settings(max_examples=250, deadline=None)
def test_the_front_within_limits_is_the_brute_forced_front_of_what_keeps_them(seed, goals, count):
    rng, space, costs = a_problem(seed, goals + count)
    limits = [a_limit(cost, space, rng) for cost in rng.sample(costs, count)]
    options = {"limits": limits, "others": costs[goals:]}
    if vectors_within(space, costs, limits):
        assert exact_front(space, costs[:goals], **options) == brute_forced_front(space, costs[:goals], **options)
        return
    with pytest.raises(InfeasibleError) as caught:
        exact_front(space, costs[:goals], **options)
    rows = vectors_within(space, costs, ())
    for limit in limits:
        reachable = limit.best_of(row[limit.name] for row in rows)
        word = "smallest" if limit.direction == "minimize" else "largest"
        assert f"{limit} ({word} reachable: {reachable:g})" in str(caught.value)


@given(st.integers(0, 10**6), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_highs_finds_the_brute_forced_optimum_within_limits(seed, count):
    rng, space, (goal, *costs) = a_problem(seed, 1 + count)
    limits = [a_limit(cost, space, rng) for cost in costs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "MOST_LINKS", 0)  # no dynamic programming
        if vectors_within(space, [goal, *costs], limits):
            options = {"limits": limits, "others": costs}
            assert exact_front(space, [goal], **options) == brute_forced_front(space, [goal], **options)
        else:
            with pytest.raises(InfeasibleError, match="reachable"):
                exact_front(space, [goal], limits=limits, others=costs)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_decimals_that_tie_but_for_rounding_lose_nothing_else(seed):
    rng, space, (one, other) = a_problem(seed, 2)
    goals = [
        an_objective(
            goal.name,
            AdditiveTable(
                goal.additive.groups,
                tuple({key: rng.randint(0, 9) / 10 for key in table} for table in goal.additive.tables),
            ),
        )
        for goal in (one, other)
    ]
    found, expected = np.array(sorted(exact_front(space, goals))), np.array(sorted(brute_forced_front(space, goals)))
    for these, those in ((found, expected), (expected, found)):
        assert ((those[None] <= these[:, None] + 1e-12).all(axis=2)).any(axis=1).all()


def test_the_search_returns_the_front_the_midpoint_the_extremes_and_what_is_included():
    space, objectives = widths_problem(layers=4, widths=4)
    wanted = space.decode((3, 0, 0, 3))
    result = searched(space, objectives, include=[wanted])
    vectors = {tuple(e.values[o.name] for o in objectives) for e in result.front}
    assert vectors == brute_forced_front(space, objectives)
    assert [e.architecture for e in result.evaluations[:4]] == [
        space.midpoint(), space.largest(), space.smallest(), wanted,
    ]  # fmt: skip
    assert result.even_architecture == space.largest() and result.of(wanted) is not None
    assert [e.number for e in result.evaluations] == list(range(len(result.evaluations)))
    assert len({e.architecture for e in result.evaluations}) == len(result.evaluations)
    assert (result.algorithm, result.failures, result.seed) == ("exact", (), 0)
    assert SearchResult.from_json(result.to_json()) == result


def test_the_search_within_limits_marks_the_midpoint_over_them_and_has_the_even_architecture():
    space, objectives = widths_problem(layers=4, widths=4)
    asked = replace(objectives[0], related=lambda: {"parameters": objectives[1]})
    result = searched(space, [asked], within={"parameters": 0.5})
    bound = 0.5 * objectives[1](space.largest())
    best = min(
        (row["damage"] for row in vectors_within(space, objectives, [Limit("parameters", bound)])),
    )
    assert result.best("damage").values["damage"] == best
    assert result.even is not None and result.even.feasible and result.largest is None
    assert result.midpoint is not None and not result.midpoint.feasible
    assert all(set(e.values) == {"damage", "parameters"} for e in result.evaluations)
    assert result.references == {"parameters": objectives[1](space.largest())}


def test_a_single_architecture_within_the_limits_is_found_though_no_way_leads_there():
    rng = random.Random(0)
    space = SearchSpace(Choice(f"layers.{i}.a", (0, 1)) for i in range(18))
    groups = tuple((name,) for name in space.names)
    prices = [rng.randrange(10**6, 10**7) for _ in groups]
    tables = tuple({(0,): 0, (1,): price} for price in prices)
    wanted = sum(price for price in prices if rng.random() < 0.5)
    spent = an_objective("spent", AdditiveTable(groups, tables), cost=True)
    used = an_objective("used", AdditiveTable(groups, tables), direction="maximize", cost=True)
    count = AdditiveTable(groups, tuple({(0,): 0, (1,): 1} for _ in groups))
    goal = an_objective("count", count, related=lambda: {"spent": spent, "used": used})
    limits = {"spent": wanted, "used": wanted}
    for goals in ([goal, spent], [goal]):  # dynamic programming, HiGHS
        result = searched(space, goals, within=limits)
        assert {e.values["spent"] for e in result.feasible} == {wanted}
        assert result.even is None and result.best("count") in result.front


def test_integers_beyond_what_floats_tell_apart_are_compared_exactly():
    space = SearchSpace([Choice("a", (0, 1)), Choice("b", (0, 1))])
    big = 2.0**52
    costs = AdditiveTable((("a",), ("b",)), ({(0,): 4 * big, (1,): 4 * big + 4}, {(0,): 1.0, (1,): 0.0}))
    gains = AdditiveTable((("a",), ("b",)), ({(0,): 0, (1,): 1}, {(0,): 1, (1,): 0}))
    goals = [an_objective("cost", costs), an_objective("gain", gains, direction="maximize")]
    found = ExactSearch(space, goals, limits=(), known={}).front()
    # As floats, 4·2^52 + 1 is 4·2^52: the value of (0, 0) is that of (0, 1), and it gains more.
    assert [tuple(e.architecture.values()) for e in found] == [(0, 0), (1, 0)]


def test_too_many_values_of_shared_choices_leave_one_objective_to_highs():
    shared = [Choice(f"width.{i}", (1, 2, 3)) for i in range(12)]  # 3^12 > 100,000
    own = [Choice(f"layers.{i}.a", (1, 2)) for i in range(3)]
    space = SearchSpace([*shared, *own])
    groups = tuple((*(choice.name for choice in shared[i : i + 2]), own[i % 3].name) for i in range(0, 12, 2))
    rng = random.Random(1)
    costs = [an_objective(name, a_table(space, groups, "integers", rng), cost=True) for name in ("damage", "size")]
    assert len(searched(space, costs).front) > 1  # open at a time are few: no reason to refuse
    everything = tuple(choice.name for choice in shared)
    joined = ((*everything[:6], own[0].name), (*everything[6:], own[1].name), (*everything[4:9], own[2].name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "MOST_LINKS", 3**5 - 1)  # widths 4 to 8 stand in two groups
        wide = [an_objective(n, a_table(space, joined, "integers", rng), cost=True) for n in ("damage", "size")]
        with pytest.raises(SearchError, match="at most 242 values that choices shared .* here are 243; search one"):
            searched(space, wide)
        best = {}
        for goal in wide:
            best[goal.name] = searched(space, [goal]).best(goal.name).values[goal.name]
    front = searched(space, wide).front
    assert best == {goal.name: min(e.values[goal.name] for e in front) for goal in wide}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluations": 200}, "evaluations=200 does not apply; leave it out"),
        ({"storage": "sqlite:///search.db"}, "storage='sqlite:///search.db' does not apply; leave it out"),
        ({"seed": "0"}, "seed='0'"),
        ({"within": {"loss": 1}}, "'loss', which is not known"),
    ],
)
def test_unusable_arguments_are_named_in_one_line(options, words):
    space, objectives = widths_problem(layers=2, widths=2)
    with pytest.raises(SearchError) as caught:
        searched(space, objectives, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_objectives_and_limits_without_a_table_are_named_with_the_way_out():
    space, (damage, parameters) = widths_problem(layers=2, widths=2)
    bare = replace(parameters, additive=None)
    for goals, within in (([damage, bare], None), ([replace(damage, related=lambda: {bare.name: bare})], bare.name)):
        with pytest.raises(SearchError, match="'parameters' has no table; .* or use algorithm='nsga2'"):
            searched(space, goals, within={within: 0.5} if within else None)


def test_tables_that_do_not_fit_are_named():
    space, (damage, parameters) = widths_problem(layers=2, widths=2)
    other_space, (foreign, _) = widths_problem(layers=3, widths=2)
    with pytest.raises(SearchError, match="cannot use 'damage': its table names 'layers.2.intermediate_size'"):
        searched(space, [foreign, parameters])
    with pytest.raises(SearchError, match="cannot use 'damage': its table says nothing about 'layers.2"):
        searched(other_space, [damage])
    table = damage.additive
    turned = an_objective("turned", AdditiveTable(table.groups[::-1], table.tables[::-1]))
    with pytest.raises(SearchError, match="'damage' and 'turned' group the choices differently"):
        searched(space, [damage, turned])


def test_an_objective_that_is_not_what_its_table_says_is_refused():
    space, (damage, parameters) = widths_problem(layers=2, widths=3)
    off = replace(damage, function=lambda a: damage.function(a) * 1.00001)
    with pytest.raises(SearchError, match="the table of 'damage' is not one of that objective: .* make the table"):
        searched(space, [off, parameters])
    close = replace(damage, function=lambda a: damage.function(a) * 1.0000001)
    assert searched(space, [close, parameters]).front == searched(space, [damage, parameters]).front

    def broken(architecture):
        raise KeyError("labels")

    with pytest.raises(SearchError, match="objective 'damage' failed on .*KeyError\\('labels'\\)"):
        searched(space, [replace(damage, function=broken), parameters])
    with pytest.raises(SearchError, match="'damage' is not one of that objective"):
        searched(space, [replace(damage, function=lambda a: float("nan")), parameters])


def test_included_architectures_are_checked_before_the_front_is_computed(monkeypatch):
    space, objectives = widths_problem(layers=2, widths=2)
    monkeypatch.setattr(ExactSearch, "front", lambda *args, **options: pytest.fail("computed"))
    with pytest.raises(ArchitectureError):
        searched(space, objectives, include=[widths_problem(layers=3, widths=2)[0].largest()])


def test_limits_may_name_measured_objectives_that_have_tables():
    space, (damage, parameters) = widths_problem(layers=3, widths=3)
    asked = replace(parameters, related=lambda: {"damage": damage})
    bound = damage(space.midpoint())
    best = searched(space, [asked], within={"damage": bound}).best("parameters")
    rows = vectors_within(space, [damage, parameters], [Limit("damage", bound)])
    assert best.values["parameters"] == min(row["parameters"] for row in rows)


def test_choices_of_one_value_and_spaces_of_one_architecture_are_searched():
    space = SearchSpace([Choice("a", (3,))])
    goals = [an_objective("cost", AdditiveTable((("a",),), ({(3,): 2},), 1))]
    (only,) = searched(space, goals).evaluations
    assert only.values == {"cost": 3.0}


def test_progress_is_shown_when_asked_for(capsys):
    space, objectives = widths_problem(layers=3, widths=3)
    searched(space, objectives)
    assert capsys.readouterr() == ("", "")
    front = search_subnets(space, objectives, algorithm="exact").front
    written = capsys.readouterr().err
    assert "exact search: 100%" in written and "3/3" in written and f"{len(front)} kept" in written


def test_of_equal_values_the_same_architecture_is_found_in_every_process_without_torch():
    code = (
        "import sys, types; package = types.ModuleType('hf_elastic'); package.__path__ = ['hf_elastic'];"
        "sys.modules['hf_elastic'] = package; from tests.search.additive import tied_problem;"
        "from hf_elastic.search import search_subnets; space, goals = tied_problem();"
        "print(search_subnets(space, goals, algorithm='exact', progress=False).to_json());"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    space, goals = tied_problem()
    expected = searched(space, goals)
    assert len({tuple(o(a) for o in goals) for a in space.architectures()}) < space.size / 4
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "123"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == json.loads(expected.to_json())
