"""Optuna samplers as pure functions of a seed, and the translation of architectures to trials."""

from __future__ import annotations

import copy
import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.samplers.nsgaii import UniformCrossover
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hf_elastic.architecture import shown
from hf_elastic.errors import SearchError
from hf_elastic.search.objective import Objective
from hf_elastic.space import Architecture, SearchSpace

SamplerFactory = Callable[[int], BaseSampler]
NAMED_ALGORITHMS = ("nsga2", "tpe", "random", "exhaustive", "exact")

_POPULATION = (10, 50)  # smallest and largest
_GENERATIONS = 10  # aimed at; evaluations / generations is the population
_SPREAD = 0.5  # share of the first generation that is spread in size
_LOCAL = 0.75  # share of later children that are local moves
_FROM_ELITE = 0.75  # share of local moves that start from the best in an objective
_ELITE = 3  # how many best per objective
_STEPS = (1, 2, 2, 3)  # lengths of local moves
EXCESS = "excess"  # attribute of a finished trial in the shadow: by how much it misses the limits


class TrialEncoding:
    """Translate architectures to Optuna parameters and back.

    An ordered choice becomes an integer (the index of its value, so that samplers see the order), a
    categorical choice stays categorical, a choice of one value is left out.

    Args:
        space: The search space.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._open = tuple(choice for choice in space.choices if len(choice.values) > 1)
        self._index = {c.name: {value: i for i, value in enumerate(c.values)} for c in self._open}
        self.distributions: dict[str, BaseDistribution] = {
            choice.name: IntDistribution(0, len(choice.values) - 1)
            if choice.kind == "ordered"
            else CategoricalDistribution(choice.values)
            for choice in self._open
        }
        # From the smallest to the largest value.
        self.ladders: dict[str, tuple[int | str, ...]] = {
            choice.name: tuple(range(len(choice.values))) if choice.kind == "ordered" else choice.descending[::-1]
            for choice in self._open
        }

    def parameters(self, architecture: Architecture) -> dict[str, int | str]:
        """Return the parameters of ``architecture``."""
        return {
            c.name: self._index[c.name][architecture[c.name]] if c.kind == "ordered" else architecture[c.name]
            for c in self._open
        }

    def architecture(self, parameters: Mapping[str, Any]) -> Architecture:
        """Return the canonical architecture of ``parameters``."""
        values = {choice.name: choice.values[0] for choice in self.space.choices}
        for choice in self._open:
            given = parameters[choice.name]
            values[choice.name] = choice.values[int(given)] if choice.kind == "ordered" else given
        return self.space.canonical(values)


class SubnetNSGAIISampler(NSGAIISampler):
    """NSGA-II (Deb et al. 2002, DOI 10.1109/4235.996017) as Optuna has it, with two additions for subnets.

    First generation: independent uniform choices make architectures of nearly equal size when there are many
    choices. Every other one therefore draws a level ``t`` uniformly and then each choice from
    ``Binomial(n - 1, t)`` over its values from smallest to largest: each choice alone is still uniform, sizes
    are spread from the smallest to the largest architecture.

    Later generations: a few hundred evaluations are few for dozens of choices. Three quarters of the
    children are therefore local moves, one to three single steps in size, mostly from the best feasible
    architectures so far in a measured objective, else from a parent of the generation. Where a limit binds,
    the repair that follows turns a step up into an exchange between choices. Plain NSGA-II is had with
    ``algorithm=lambda seed: NSGAIISampler(seed=seed)``.

    Args:
        encoding: Parameters of the space (known beforehand, so the history need not be searched for them).
        goals: Position and sign of the objectives whose best architectures are worth a local move.
        population_size: Architectures per generation.
        seed: Seed of this one proposal.
    """

    def __init__(
        self, encoding: TrialEncoding, goals: Sequence[tuple[int, int]], *, population_size: int, seed: int
    ) -> None:
        super().__init__(population_size=population_size, seed=seed)
        self._encoding = encoding
        self._goals = goals
        self._ladders = tuple(encoding.ladders.items())
        self._random = random.Random(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters of the space."""
        return self._encoding.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a child of the population, or in the first generation a draw of spread size."""
        child = super().sample_relative(study, trial, search_space)
        chance = self._random.random()
        if not child:
            return self._spread() if chance < _SPREAD else child
        return self._moved(self._start(study, trial)) if chance < _LOCAL else child

    def _spread(self) -> dict[str, Any]:
        level = self._random.random()
        return {
            name: ladder[sum(self._random.random() < level for _ in range(len(ladder) - 1))]
            for name, ladder in self._encoding.ladders.items()
        }

    def _start(self, study: Study, trial: FrozenTrial) -> Mapping[str, Any]:
        """Return the parameters of an architecture worth a local move."""
        parents = self.get_parent_population(study, self.get_trial_generation(study, trial))
        if self._random.random() >= _FROM_ELITE:
            return self._random.choice(parents).params
        position, sign = self._random.choice(self._goals)
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        feasible = [t for t in trials if t.user_attrs.get(EXCESS, 0.0) <= 0.0] or trials
        best = heapq.nsmallest(_ELITE, feasible, key=lambda t: (sign * t.values[position], t.number))
        # Squaring a uniform number prefers the first.
        return best[int(len(best) * self._random.random() ** 2)].params

    def _moved(self, start: Mapping[str, Any]) -> dict[str, Any]:
        moved = dict(start)
        for _ in range(self._random.choice(_STEPS)):
            name, ladder = self._random.choice(self._ladders)
            rung = ladder.index(moved[name]) + self._random.choice((-1, 1))
            moved[name] = ladder[min(max(rung, 0), len(ladder) - 1)]
        return moved


@dataclass(frozen=True)
class UniformEvolution:
    """What :func:`uniform_evolution` returns: a function from a seed to a sampler; equal where its settings are.

    Attributes:
        population_size: architectures per generation.
        mutation_prob: with which a choice of a child is drawn anew.
    """

    population_size: int
    mutation_prob: float

    def __call__(self, seed: int) -> BaseSampler:
        """Return a sampler of this seed."""
        return NSGAIISampler(
            population_size=self.population_size, mutation_prob=self.mutation_prob, crossover=UniformCrossover(),
            crossover_prob=_CROSSED, seed=seed,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"uniform evolution ({self.population_size}, {self.mutation_prob:g})"


_CROSSED = 0.5  # share of the children that have two parents


def uniform_evolution(population_size: int = 50, mutation_prob: float = 0.1) -> UniformEvolution:
    """Return the evolutionary search of single-path supernets (Guo et al. 2020, arXiv 1904.00420) and of ELM.

    Pass it as ``search_subnets(..., algorithm=hf_elastic.uniform_evolution())``. ELM (Wang 2025, arXiv 2510.27037) has
    a population of 50; half of the children take each choice from one of two parents at random, and a choice mutates
    with probability 0.1, which draws it anew from all its values.

    Where we differ from the author's code: parents are not drawn from the ten best so far but win a tournament of two
    within the population that survived (NSGA-II, so that several objectives will do); what two parents made mutates
    too; and what exceeds a limit is not thrown away but brought within it, as in every search here.

    Args:
        population_size: Architectures per generation, at least 2.
        mutation_prob: With which a choice of a child is drawn anew, from 0 to 1.

    Raises:
        SearchError: A number is not what is allowed.
    """
    if type(population_size) is not int or population_size < _FEWEST_PARENTS:
        raise SearchError(f"population_size={population_size!r} must be an integer of at least 2")
    if not isinstance(mutation_prob, int | float) or not 0 <= mutation_prob <= 1:
        raise SearchError(f"mutation_prob={mutation_prob!r} must be a number from 0 to 1")
    return UniformEvolution(population_size, mutation_prob)


_FEWEST_PARENTS = 2


def sampler_factory(
    algorithm: str | BaseSampler | SamplerFactory,
    encoding: TrialEncoding,
    objectives: Sequence[Objective],
    *,
    evaluations: int,
) -> SamplerFactory:
    """Return a function from a seed to a fresh sampler with that seed.

    Raises:
        SearchError: The algorithm is neither a known name, nor a sampler, nor a factory.
    """
    if algorithm == "nsga2":
        signs = [(position, objective.sign) for position, objective in enumerate(objectives)]
        goals = [pair for pair, objective in zip(signs, objectives, strict=True) if not objective.cost] or signs
        population = min(max(evaluations // _GENERATIONS, _POPULATION[0]), _POPULATION[1])
        return lambda seed: SubnetNSGAIISampler(encoding, goals, population_size=population, seed=seed)
    if algorithm == "tpe":
        return lambda seed: TPESampler(seed=seed)
    if isinstance(algorithm, BaseSampler):
        template = algorithm
        return lambda seed: _reseeded(template, seed)
    if callable(algorithm) and not isinstance(algorithm, str):
        return _checked_factory(algorithm)
    raise SearchError(
        f"algorithm={shown([algorithm])} is not known; allowed: {shown(NAMED_ALGORITHMS)}, "
        "an Optuna sampler, or a function from a seed to one"
    )


def algorithm_name(algorithm: object) -> str:
    """Return what the result calls the algorithm."""
    if isinstance(algorithm, str | UniformEvolution):
        return str(algorithm)
    return type(algorithm).__name__ if isinstance(algorithm, BaseSampler) else "sampler factory"


def algorithm_identity(algorithm: object) -> str:
    """Return the name by which a storage tells algorithms apart: of a factory, also what it makes or is set to.

    Raises:
        SearchError: The factory makes no Optuna sampler.
    """
    name = algorithm_name(algorithm)
    if callable(algorithm) and not isinstance(algorithm, str | BaseSampler | UniformEvolution):
        return f"{name} of {type(_checked_factory(algorithm)(0)).__name__}"
    return name


def _checked_factory(factory: SamplerFactory) -> SamplerFactory:
    def make(seed: int) -> BaseSampler:
        sampler = factory(seed)
        if not isinstance(sampler, BaseSampler):
            raise SearchError(f"algorithm= is a function that returned {shown([sampler])}, not an Optuna sampler")
        return sampler

    return make


def _reseeded(template: BaseSampler, seed: int) -> BaseSampler:
    """Return a copy of a sampler whose random generators, wherever they hang, start from ``seed``."""
    sampler = copy.deepcopy(template)
    generators = _generators(sampler, {})
    if not generators:
        raise SearchError(
            f"cannot seed a {type(sampler).__name__}; pass a function from a seed to a sampler as algorithm="
        )
    for offset, generator in enumerate(generators):
        _seed(generator, (seed + offset) % 2**32)
    return sampler


def _generators(owner: object, visited: dict[int, object]) -> list[object]:
    """Return the random generators held by ``owner`` and by the samplers it holds, in order."""
    found: list[object] = []
    for value in getattr(owner, "__dict__", {}).values():
        if id(value) in visited:
            continue
        visited[id(value)] = value
        if isinstance(value, LazyRandomState | np.random.RandomState | np.random.Generator | random.Random):
            found.append(value)
        elif isinstance(value, BaseSampler) or type(value).__module__.startswith("optuna.samplers"):
            found += _generators(value, visited)
    return found


def _seed(generator: object, seed: int) -> None:
    if isinstance(generator, LazyRandomState):
        generator.rng.seed(seed)
    elif isinstance(generator, np.random.RandomState | random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        fresh = type(generator.bit_generator)(seed)
        generator.bit_generator.state = fresh.state
