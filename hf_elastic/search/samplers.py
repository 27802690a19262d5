"""Optuna samplers as pure functions of a seed, and the translation of architectures to trials."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.study import Study
from optuna.trial import FrozenTrial

from hf_elastic.architecture import shown
from hf_elastic.errors import SearchError
from hf_elastic.space import Architecture, SearchSpace

SamplerFactory = Callable[[int], BaseSampler]
NAMED_ALGORITHMS = ("nsga2", "tpe", "random", "exhaustive")

_POPULATION = (10, 50)  # smallest and largest
_GENERATIONS = 10  # aimed at; evaluations / generations is the population


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


class SpreadNSGAIISampler(NSGAIISampler):
    """NSGA-II (Deb et al. 2002) as Optuna has it, with a first generation that covers the range of sizes.

    Independent uniform choices make architectures of nearly equal size when there are many choices. Every
    other architecture of the first generation therefore draws a level ``t`` uniformly and then each choice
    from ``Binomial(n - 1, t)`` over its values from smallest to largest: each choice alone is still uniform,
    sizes are spread from the smallest to the largest architecture.

    Args:
        encoding: Parameters of the space (known beforehand, so the history need not be searched for them).
        population_size: Architectures per generation.
        seed: Seed of this one proposal.
    """

    def __init__(self, encoding: TrialEncoding, *, population_size: int, seed: int) -> None:
        super().__init__(population_size=population_size, seed=seed)
        self._encoding = encoding
        self._spread = random.Random(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters of the space."""
        return self._encoding.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a child of the population, or in the first generation a draw of spread size."""
        child = super().sample_relative(study, trial, search_space)
        if child or self._spread.random() < 0.5:
            return child
        level = self._spread.random()
        return {
            name: ladder[sum(self._spread.random() < level for _ in range(len(ladder) - 1))]
            for name, ladder in self._encoding.ladders.items()
        }


def sampler_factory(
    algorithm: str | BaseSampler | SamplerFactory, encoding: TrialEncoding, *, evaluations: int
) -> SamplerFactory:
    """Return a function from a seed to a fresh sampler with that seed.

    Raises:
        SearchError: The algorithm is neither a known name, nor a sampler, nor a factory.
    """
    if algorithm == "nsga2":
        population = min(max(evaluations // _GENERATIONS, _POPULATION[0]), _POPULATION[1])
        return lambda seed: SpreadNSGAIISampler(encoding, population_size=population, seed=seed)
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
    if isinstance(algorithm, str):
        return algorithm
    return type(algorithm).__name__ if isinstance(algorithm, BaseSampler) else "sampler factory"


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
