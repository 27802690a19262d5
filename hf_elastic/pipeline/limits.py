"""Limits of a run before any training: is anything left, and which subnets are near the limit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from hf_elastic import costs, objectives
from hf_elastic.errors import InfeasibleError
from hf_elastic.search import Objective
from hf_elastic.search.limits import Feasibility, resolve_limits
from hf_elastic.space import Architecture, SearchSpace
from hf_elastic.supernet import Supernet
from hf_elastic.training.sampling import generator


@dataclass(frozen=True)
class AmongSubnets:
    """Sampling rule: one architecture out of a list, uniformly.

    A short training is better spent on subnets near the limit than on the whole space: AttentiveNAS (Wang et al.
    2021, arXiv 2011.09011) trains where the front will be.

    Args:
        architectures: the list.
        seed: any integer.
    """

    architectures: tuple[Architecture, ...]
    seed: int

    @property
    def subnets(self) -> int:
        """One."""
        return 1

    def draw(self, space: SearchSpace, step: int, micro_step: int) -> tuple[Architecture, ...]:
        """Returns one architecture of the list, a pure function of (seed, step, micro-step)."""
        rng = generator(self.seed, step, micro_step)
        return (self.architectures[int(rng.random() * len(self.architectures))],)


def feasibility(
    supernet: Supernet, within: Mapping[str, float], *, known: Mapping[str, Objective] | None = None
) -> Feasibility:
    """Makes the limits of a run checkable.

    Args:
        supernet: the space.
        within: limits by name of a cost.
        known: the costs; by default parameters, total parameters and MACs.

    Raises:
        SearchError: a limit names no cost.
        InfeasibleError: nothing in the space keeps them; the message says how far the space reaches.
    """
    known = objectives.related_costs(supernet) if known is None else known
    limits = resolve_limits(within, known, supernet.space)
    found = Feasibility(supernet.space, limits, known)
    found.require_some()
    return found


def feasible_share(supernet: Supernet, limits: Feasibility, *, samples: int = 300) -> float:
    """Share of sampled architectures that keep the limits."""
    rng = random.Random(0)
    return sum(limits.allows(supernet.space.sample(rng)) for _ in range(samples)) / samples


def near_limit(supernet: Supernet, limits: Feasibility, *, count: int = 64, seed: int = 0) -> tuple[Architecture, ...]:
    """Distinct feasible architectures of the largest MACs found: what a short training should spend its steps on.

    Draws ``20 · count`` architectures, brings them within the limits, and keeps the ``count`` largest.

    Raises:
        InfeasibleError: all of them are without any layer.
    """
    rng = random.Random(seed)
    found: dict[Architecture, int] = {}
    for _ in range(20 * count):
        architecture = limits.repair(supernet.space.sample(rng), rng)
        if architecture not in found and not all(shape.skipped for shape in supernet.layer_shapes(architecture)):
            found[architecture] = costs.macs(supernet, architecture, seq_len=costs.LATENCY_TOKENS)
    if not found:
        raise InfeasibleError(
            "the limits leave only architectures without any layer, which compute nothing; loosen within= "
            "or give the space smaller widths"
        )
    ordered = sorted(found, key=lambda architecture: (-found[architecture], architecture.digest))
    return tuple(ordered[:count])
