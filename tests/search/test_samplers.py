"""Samplers as functions of a seed, and the trial encoding."""

import collections
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from hf_elastic.errors import SearchError
from hf_elastic.search import search_subnets
from hf_elastic.search.journal import Proposal, Record
from hf_elastic.search.objective import Objective
from hf_elastic.search.proposals import SamplerGenerator
from hf_elastic.search.samplers import TrialEncoding, algorithm_identity, sampler_factory, uniform_evolution
from hf_elastic.space import Choice, SearchSpace
from tests.search.toy import layers_problem, widths_problem


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_parameters_translate_back_to_the_architecture(seed):
    space, _ = layers_problem()
    encoding = TrialEncoding(space)
    architecture = space.sample(random.Random(seed))
    parameters = encoding.parameters(architecture)
    assert encoding.architecture(parameters) == architecture
    for name, distribution in encoding.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(parameters[name]))


def test_first_generation_covers_sizes_while_each_choice_stays_uniform():
    space = SearchSpace([Choice(f"c{i}", (1, 2, 3, 4)) for i in range(50)])
    encoding = TrialEncoding(space)
    objectives = [Objective("loss", len)]
    factory = sampler_factory("nsga2", encoding, objectives, evaluations=200)
    generator = SamplerGenerator(encoding, factory, objectives)
    drafts = [generator.draft(seed).architecture for seed in range(400)]
    means = [np.mean(list(a.values())) for a in drafts]
    assert min(means) < 1.2 and max(means) > 3.8
    counts = np.bincount([v for a in drafts for v in a.values()])[1:]
    assert counts == pytest.approx(np.full(4, 5000), rel=0.1)


@pytest.mark.parametrize(
    "algorithm", ["nsga2", "tpe", NSGAIISampler(population_size=4), TPESampler(n_startup_trials=4)]
)
def test_drafts_depend_on_seed_and_records_only_and_leave_no_trace(algorithm):
    space, objectives = widths_problem()
    encoding = TrialEncoding(space)
    factory = sampler_factory(algorithm, encoding, objectives, evaluations=200)
    one, other = (SamplerGenerator(encoding, factory, objectives) for _ in range(2))
    for number in range(30):
        wanted = one.draft(number)
        for noise in range(3):
            other.draft(1000 + noise)  # drafts that are thrown away
        assert other.draft(number) == wanted
        values = tuple(objective(wanted.architecture) for objective in objectives)
        for generator in (one, other):
            generator.observe(Record(number, wanted, values))


def test_generations_advance_with_the_population():
    space, objectives = widths_problem()
    encoding = TrialEncoding(space)
    factory = sampler_factory("nsga2", encoding, objectives, evaluations=100)
    generator = SamplerGenerator(encoding, factory, objectives)
    generations = []
    for number in range(35):
        draft = generator.draft(number)
        generations += draft.trial_attrs.values()
        values = tuple(objective(draft.architecture) for objective in objectives)
        failed = number in (3, 4)  # failed evaluations count for no generation
        generator.observe(Record(number, draft, None if failed else values))
    assert generations == [0] * 12 + [1] * 10 + [2] * 10 + [3] * 3


def test_a_sampler_without_a_random_generator_cannot_be_seeded():
    class Constant(BaseSampler):
        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, search_space):
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            return 0

    space, objectives = widths_problem()
    encoding = TrialEncoding(space)
    seeded = SamplerGenerator(encoding, sampler_factory(Constant(), encoding, objectives, evaluations=9), objectives)
    with pytest.raises(SearchError, match="cannot seed a Constant; pass a function"):
        seeded.draft(0)
    made = SamplerGenerator(
        encoding, sampler_factory(lambda seed: Constant(), encoding, objectives, evaluations=9), objectives
    )
    assert made.draft(0) == Proposal(space.smallest())


def test_a_sampler_that_writes_to_the_history_is_told_off():
    class Meddling(NSGAIISampler):
        def before_trial(self, study, trial):
            study.set_user_attr("mine", 1)

    space, objectives = widths_problem()
    encoding = TrialEncoding(space)
    factory = sampler_factory(lambda seed: Meddling(seed=seed), encoding, objectives, evaluations=9)
    with pytest.raises(SearchError, match="Meddling cannot propose: it tries to write a user attribute"):
        SamplerGenerator(encoding, factory, objectives).draft(0)


def test_local_moves_start_from_the_best_that_keep_the_limits():
    space, objectives = widths_problem(layers=10)
    encoding = TrialEncoding(space)
    factory = sampler_factory("nsga2", encoding, objectives, evaluations=100)
    generator = SamplerGenerator(encoding, factory, objectives, excess=lambda a, values: values["parameters"] - 2000)
    best = space.midpoint()
    for number in range(20):
        # Best in the loss by far: two over the limit, one within; the others are bad and all the same.
        architecture, loss = (
            (best, 1.0) if number == 5 else (space.largest(), 0.1) if number < 2 else (space.smallest(), 9.0)
        )
        values = (loss, 3000.0 if number < 2 else 1000.0)
        attrs = {"SubnetNSGAIISampler:generation": 0}
        generator.observe(Record(number, Proposal(architecture, attrs), values))
    distances = []
    for seed in range(200):
        draft = generator.draft(seed)
        pairs = zip(space.encode(draft.architecture), space.encode(best), strict=True)
        distances.append(sum(abs(a - b) for a, b in pairs))
    assert sum(distance <= 3 for distance in distances) > 50
    worst = space.encode(space.largest())
    assert not any(sum(space.encode(generator.draft(s).architecture)) >= sum(worst) - 3 for s in range(200))


def blocks_problem(layers=8):
    """A block per layer, of which one is right; how many are wrong."""
    names = ("a", "b", "c", "d", "e", "f")
    sizes = (6, 5, 4, 3, 2, 1)
    space = SearchSpace(Choice(f"layers.{i}.block", names, "categorical", sizes) for i in range(layers))
    right = [names[(3 * i + 1) % 6] for i in range(layers)]

    def wrong(architecture):
        return float(sum(a != b for a, b in zip(architecture.values(), right, strict=True)))

    return space, Objective("wrong", wrong)


def test_uniform_evolution_is_resumed_as_if_it_had_not_been_interrupted(tmp_path):
    space, objective = blocks_problem()
    settings = {"algorithm": uniform_evolution(8), "seed": 3, "progress": False}
    whole = search_subnets(space, [objective], evaluations=30, **settings)
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    for evaluations in (13, 30):
        settings["algorithm"] = uniform_evolution(8)  # made anew, as in another process
        parts = search_subnets(space, [objective], evaluations=evaluations, storage=storage, **settings)
    assert [one.architecture for one in parts.evaluations] == [one.architecture for one in whole.evaluations]
    with pytest.raises(SearchError, match="uniform evolution"):
        settings["algorithm"] = uniform_evolution(9)
        search_subnets(space, [objective], evaluations=30, storage=storage, **settings)


def test_uniform_evolution_finds_better_blocks_than_as_many_random_ones():
    space, objective = blocks_problem()
    found, drawn = [], []
    for seed in range(2):
        settings = {"algorithm": uniform_evolution(12), "evaluations": 96, "seed": seed, "progress": False}
        found.append(search_subnets(space, [objective], **settings).best("wrong").values["wrong"])
        rng = random.Random(seed)
        drawn.append(min(objective(space.sample(rng)) for _ in range(96)))
    assert np.mean(found) <= np.mean(drawn) - 1


def test_children_of_uniform_evolution_have_the_choices_of_two_parents_and_a_tenth_drawn_anew():
    space, objective = blocks_problem(layers=40)
    encoding = TrialEncoding(space)
    factory = sampler_factory(uniform_evolution(), encoding, [objective], evaluations=200)
    generator = SamplerGenerator(encoding, factory, [objective])
    parents = [space.canonical({name: block for name in space.names}) for block in "abc"]
    for number in range(50):  # a generation of three kinds, alike in the objective
        attrs = {"NSGAIISampler:generation": 0}
        generator.observe(Record(number, Proposal(parents[number % 3], attrs), (1.0,)))
    shares, kinds = [], collections.Counter()
    for seed in range(120):
        values = collections.Counter(generator.draft(seed).architecture.values())
        common = [block for block in "abc" if values[block] > 10]
        kinds[len(common)] += 1
        shares.append(1 - sum(values[block] for block in common) / 40)
    assert set(kinds) == {1, 2} and kinds[2] > 20  # of two parents half the choices each
    # Of ten that are drawn anew one or two come out as they were.
    assert np.mean(shares) == pytest.approx(0.1 * 4.5 / 6, abs=0.025)


@pytest.mark.parametrize(("arguments", "words"), [((1,), "population_size=1"), ((50, 1.5), "mutation_prob=1.5")])
def test_an_evolution_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(SearchError, match=words):
        uniform_evolution(*arguments)


def test_evolutions_are_told_apart_by_what_they_are_set_to():
    assert algorithm_identity(uniform_evolution()) == "uniform evolution (50, 0.1)"
    assert algorithm_identity(uniform_evolution(10, 0.2)) == "uniform evolution (10, 0.2)"
    assert uniform_evolution() == uniform_evolution(50)
