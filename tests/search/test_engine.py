"""search_subnets against brute force: fronts, limits, budgets, repetition."""

import warnings

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import (
    NSGAIIISampler,
    NSGAIISampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from hf_elastic.errors import ArchitectureError, InfeasibleError, SearchError
from hf_elastic.search import Objective, search_subnets
from hf_elastic.space import Choice, SearchSpace
from tests.search.toy import layers_problem, widths_problem


def brute_forced_front(space, objectives, allowed=lambda architecture: True):
    points = {a: tuple(o.sign * o(a) for o in objectives) for a in space.architectures() if allowed(a)}
    return {
        a
        for a, p in points.items()
        if not any(q != p and all(x <= y for x, y in zip(q, p, strict=True)) for q in points.values())
    }


def hypervolume(result, space, objectives):
    """Area dominated by the front, as a share of the box spanned by the extreme architectures."""
    loss, cost = (objective.function for objective in objectives)
    corner = (loss(space.smallest()), cost(space.largest()))
    ideal = (loss(space.largest()), cost(space.smallest()))
    area, roof = 0.0, corner[1]
    for x, y in sorted((e.values["loss"], e.values["parameters"]) for e in result.front):
        if x < corner[0] and y < roof:
            area += (corner[0] - x) * (roof - y)
            roof = y
    return area / ((corner[0] - ideal[0]) * (corner[1] - ideal[1]))


def counted(objective, calls):
    def function(architecture):
        calls.append(architecture.digest)
        return objective.function(architecture)

    return Objective(objective.name, function, direction=objective.direction, cost=objective.cost)


@pytest.mark.parametrize("problem", [lambda: widths_problem(layers=4), layers_problem])
def test_exhaustive_search_finds_the_brute_forced_front(problem):
    space, objectives = problem()
    calls = []
    result = search_subnets(
        space, [counted(objectives[0], calls), objectives[1]], algorithm="exhaustive", progress=False
    )
    assert len(calls) == len(set(calls)) == len(result.evaluations) == space.size
    assert {e.architecture for e in result.front} == brute_forced_front(space, objectives)


@pytest.mark.parametrize("fraction", [0.4, 0.8])
def test_exhaustive_search_within_limits_evaluates_what_keeps_them_and_the_midpoint(fraction):
    space, objectives = layers_problem()
    bound = fraction * objectives[1](space.largest())

    def allowed(architecture):
        return objectives[1](architecture) <= bound

    result = search_subnets(space, objectives, algorithm="exhaustive", within={"parameters": fraction}, progress=False)
    expected = {a for a in space.architectures() if allowed(a)}
    assert {e.architecture for e in result.evaluations} == expected | {space.midpoint()}
    assert {e.architecture for e in result.feasible} == expected
    assert {e.architecture for e in result.front} == brute_forced_front(space, objectives, allowed)


@pytest.mark.parametrize("algorithm", ["nsga2", "tpe", "random"])
def test_a_space_smaller_than_the_budget_is_exhausted_and_no_more(algorithm):
    space, objectives = widths_problem(layers=3, values=3)
    result = search_subnets(space, objectives, algorithm=algorithm, evaluations=100, progress=False)
    assert {e.architecture for e in result.evaluations} == set(space.architectures())
    assert len(result.evaluations) == space.size == 27


def test_limits_that_leave_few_architectures_are_exhausted_and_never_exceeded():
    space, objectives = layers_problem()
    calls = []
    result = search_subnets(
        space,
        [counted(objectives[0], calls), objectives[1]],
        evaluations=200,
        within={"parameters": 7},
        progress=False,
    )
    allowed = {a.digest for a in space.architectures() if objectives[1](a) <= 7}
    assert set(calls) == allowed | {space.midpoint().digest}
    assert len(result.evaluations) == len(calls)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("layers", "margin"), [(6, 0.01), (24, 0.08)])
def test_nsga2_beats_random_search_clearly(layers, margin, seed):
    space, objectives = widths_problem(layers=layers, values=4 if layers == 6 else 5)
    areas = {}
    for algorithm in ("nsga2", "random"):
        result = search_subnets(space, objectives, algorithm=algorithm, evaluations=200, seed=seed, progress=False)
        assert len({e.architecture for e in result.evaluations}) == 200
        areas[algorithm] = hypervolume(result, space, objectives)
    assert areas["nsga2"] > areas["random"] + margin


@pytest.mark.parametrize("algorithm", ["nsga2", "random"])
def test_searches_with_one_seed_are_equal_and_with_another_differ(algorithm):
    space, objectives = widths_problem()
    options = {"algorithm": algorithm, "evaluations": 40, "progress": False}
    one, again, other = (search_subnets(space, objectives, seed=seed, **options) for seed in (7, 7, 8))
    assert one.to_json() == again.to_json()
    assert {e.architecture for e in one.evaluations} != {e.architecture for e in other.evaluations}


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda seed: TPESampler(seed=seed, multivariate=True),
        lambda seed: NSGAIIISampler(seed=seed, population_size=8),
        lambda seed: QMCSampler(seed=seed, scramble=True),
        NSGAIISampler(population_size=8),
        NSGAIISampler(population_size=8, seed=5),
        TPESampler(),
        RandomSampler(),
    ],
)
def test_any_optuna_sampler_is_repeatable_and_repeats_nothing(algorithm):
    space, objectives = layers_problem()
    one, again = (
        search_subnets(
            space, objectives, algorithm=algorithm, evaluations=30, within={"parameters": 0.8}, progress=False
        )
        for _ in range(2)
    )
    assert one.to_json() == again.to_json()
    assert len({e.architecture for e in one.evaluations}) == 30
    bound = 0.8 * objectives[1](space.largest())
    assert all(e.values["parameters"] <= bound for e in one.evaluations if e.architecture != space.midpoint())


def test_a_sampler_inside_a_sampler_is_seeded_too():
    space, objectives = widths_problem()
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        algorithm = PartialFixedSampler({}, NSGAIISampler(population_size=8))
    options = {"algorithm": algorithm, "evaluations": 20, "progress": False}
    one, again = (search_subnets(space, objectives, **options) for _ in range(2))
    assert one.to_json() == again.to_json()


def test_a_sampler_that_evolves_sees_the_evaluated_architectures():
    space, objectives = widths_problem()
    histories = []

    class Watching(RandomSampler):
        def before_trial(self, study, trial):
            histories.append([(t.number, dict(t.params), t.values) for t in study.get_trials(deepcopy=False)[:-1]])

    result = search_subnets(
        space,
        objectives,
        algorithm=Watching,
        evaluations=20,
        within={"parameters": 0.4},
        progress=False,
    )
    expected = [
        (
            e.number,
            dict(zip(space.names, space.encode(e.architecture), strict=True)),
            [e.values["loss"], e.values["parameters"]],
        )
        for e in result.evaluations
    ]
    assert histories[-1] == expected[:-1]


def test_midpoint_extremes_and_included_architectures_come_first():
    space, objectives = widths_problem()
    wanted = space.decode((0, 1, 2, 3, 0, 1))
    result = search_subnets(space, objectives, evaluations=10, include=(wanted,), progress=False)
    first = [e.architecture for e in result.evaluations[:4]]
    assert first == [space.midpoint(), space.largest(), space.smallest(), wanted]
    assert (result.midpoint, result.largest, result.smallest) == result.evaluations[:3]


def test_an_infeasible_midpoint_is_evaluated_and_marked_but_extremes_are_not():
    space, objectives = widths_problem()
    result = search_subnets(space, objectives, evaluations=30, within={"parameters": 0.5}, progress=False)
    assert result.even in result.feasible
    assert result.midpoint is not None and not result.midpoint.feasible
    assert result.largest is None
    assert result.smallest is not None and result.smallest.feasible
    assert all(e.feasible for e in result.evaluations[1:])
    assert result.midpoint not in result.front


def test_limits_on_measured_objectives_apply_to_results_only():
    space, objectives = widths_problem()
    result = search_subnets(space, objectives, evaluations=60, within={"loss": 2.0}, progress=False)
    assert any(e.values["loss"] > 2.0 for e in result.evaluations)
    assert result.front and all(e.values["loss"] <= 2.0 for e in result.front)
    assert result.best("parameters").values["loss"] <= 2.0


def test_limits_may_name_related_costs_and_lower_bounds_of_what_is_maximized():
    space, (loss, cost) = widths_problem()
    macs = Objective("macs", lambda a: 2.0 * cost.function(a), cost=True)
    saved = Objective("saved", lambda a: -cost.function(a), direction="maximize", cost=True)
    related = Objective("loss", loss.function, related=lambda: {"macs": macs, "saved": saved})
    bound = 0.6 * macs(space.largest())
    result = search_subnets(
        space, [related], evaluations=30, within={"macs": 0.6, "saved": -bound / 2.5}, progress=False
    )
    assert len(result.feasible) >= 29
    for evaluation in result.feasible:
        assert evaluation.values["macs"] <= bound and evaluation.values["saved"] >= -bound / 2.5


def test_three_objectives_with_mixed_directions_have_the_brute_forced_front():
    space, (loss, cost) = widths_problem(layers=3)
    spread = Objective("spread", lambda a: float(max(a.values()) - min(a.values())), direction="maximize")
    objectives = [loss, cost, spread]
    result = search_subnets(space, objectives, algorithm="exhaustive", progress=False)
    assert {e.architecture for e in result.front} == brute_forced_front(space, objectives)


@given(st.integers(0, 1000), st.floats(0.3, 1.0), st.sampled_from(["nsga2", "random"]))
@settings(max_examples=15, deadline=None)
def test_no_search_exceeds_its_budget_or_limits_or_repeats_itself(seed, fraction, algorithm):
    space, objectives = layers_problem()
    calls = []
    result = search_subnets(
        space,
        [counted(objectives[0], calls), objectives[1]],
        algorithm=algorithm,
        evaluations=25,
        within={"parameters": fraction},
        seed=seed,
        progress=False,
    )
    assert len(calls) == len(set(calls)) == len(result.evaluations) <= 25
    bound = fraction * objectives[1](space.largest())
    assert all(e.architecture in space for e in result.evaluations)
    assert all(e.feasible == (e.values["parameters"] <= bound) for e in result.evaluations)
    assert all(e.feasible for e in result.evaluations[1:])


def test_limits_that_exclude_everything_raise_before_any_evaluation():
    space, objectives = widths_problem()
    smallest = objectives[1](space.smallest())

    def never(architecture):
        raise AssertionError("evaluated")

    with pytest.raises(InfeasibleError) as caught:
        search_subnets(space, [Objective("loss", never), objectives[1]], within={"parameters": 10}, progress=False)
    assert f"parameters <= 10 parameters (smallest reachable: {smallest:g})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm": "genetic"}, "'nsga2', 'tpe', 'random', 'exhaustive'"),
        ({"algorithm": 3}, "algorithm=3"),
        ({"algorithm": lambda seed: "nsga2"}, "not an Optuna sampler"),
        ({"evaluations": 0}, "evaluations=0"),
        ({"evaluations": 2}, "at least 3"),
        ({"evaluations": 2.5}, "evaluations=2.5"),
        ({"seed": None}, "seed=None"),
        ({"lease_seconds": 0}, "lease_seconds=0"),
        ({"within": {"macs": 0.5}}, "known: 'loss', 'parameters'"),
        ({"within": {"parameters": "half"}}, "finite number"),
        ({"within": {"parameters": float("nan")}}, "finite number"),
        ({"within": {"parameters": True}}, "finite number"),
        ({"algorithm": "exhaustive", "evaluations": 5}, "all 4096 architectures"),
        ({"algorithm": optuna.samplers.CmaEsSampler()}, "CmaEsSampler cannot propose"),
    ],
)
def test_unusable_arguments_are_named_in_one_line(options, words):
    space, objectives = widths_problem()
    with pytest.raises(SearchError) as caught:
        search_subnets(space, objectives, progress=False, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_exhaustive_search_of_a_big_space_says_what_to_do():
    space, objectives = widths_problem(layers=12)
    with pytest.raises(SearchError, match="at most 20000 architectures, this space has 16777216; use"):
        search_subnets(space, objectives, algorithm="exhaustive", progress=False)


def test_included_architectures_of_another_space_are_refused():
    space, objectives = widths_problem()
    with pytest.raises(ArchitectureError):
        search_subnets(space, objectives, include=(widths_problem(layers=4)[0].largest(),), progress=False)


def test_objectives_are_checked():
    space, (loss, cost) = widths_problem()
    for objectives, words in (
        ([], "at least one objective"),
        ([loss, loss], "'loss'"),
        ([len], "Objective"),
    ):
        with pytest.raises(SearchError, match=words):
            search_subnets(space, objectives, progress=False)


def test_an_objective_that_always_fails_stops_the_search_early_with_its_cause():
    space, (_, cost) = widths_problem()
    calls = []

    def broken(architecture):
        calls.append(architecture)
        raise KeyError("labels")

    with pytest.raises(SearchError, match="first 5 evaluations all failed; the last: loss: KeyError: 'labels'"):
        search_subnets(space, [Objective("loss", broken), cost], progress=False)
    assert len(calls) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_values_that_are_no_finite_numbers_are_failures(value):
    space, (loss, cost) = widths_problem(layers=2, values=3)

    def sometimes(architecture):
        return value if architecture == space.largest() else loss.function(architecture)

    result = search_subnets(space, [Objective("loss", sometimes), cost], evaluations=9, progress=False)
    assert [f.architecture for f in result.failures] == [space.largest()]
    assert "loss: " in result.failures[0].cause
    assert len(result.evaluations) == 8


def test_a_broken_cost_is_reported_as_such():
    space, (loss, _) = widths_problem()
    for function in (lambda a: 1 / 0, lambda a: float("nan")):
        cost = Objective("parameters", function, cost=True)
        with pytest.raises(SearchError, match="cost 'parameters'"):
            search_subnets(space, [loss, cost], within={"parameters": 5}, progress=False)


def test_choices_of_one_value_are_carried_along():
    space = SearchSpace([Choice("a", (3,)), Choice("b", ("x",), "categorical", (1,)), Choice("c", (1, 2, 3))])
    objectives = [Objective("loss", lambda a: float(a["c"]))]
    for algorithm in ("nsga2", "tpe", "random", "exhaustive"):
        result = search_subnets(space, objectives, algorithm=algorithm, progress=False)
        assert {e.architecture["c"] for e in result.evaluations} == {1, 2, 3}
        assert result.best("loss").architecture["b"] == "x"
    lonely = SearchSpace([Choice("a", (3,))])
    assert len(search_subnets(lonely, [Objective("loss", lambda a: 1.0)], progress=False).evaluations) == 1


def test_optuna_and_warnings_stay_quiet_and_as_they_were(capsys):
    space, objectives = widths_problem()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_subnets(
            space,
            objectives,
            algorithm=lambda seed: TPESampler(seed=seed, multivariate=True),
            evaluations=12,
            progress=False,
        )
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capsys.readouterr() == ("", "")


def test_progress_shows_the_midpoint_the_count_and_the_best_so_far(capsys):
    space, objectives = widths_problem()
    result = search_subnets(space, objectives, evaluations=12)
    written = capsys.readouterr().err
    midpoint = result.midpoint.values
    assert f"midpoint: loss {midpoint['loss']:.5g}, parameters {midpoint['parameters']:.5g} parameters" in written
    assert "12/12" in written
    assert f"best loss {result.best('loss').values['loss']:.5g}" in written
