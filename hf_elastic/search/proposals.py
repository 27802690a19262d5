"""The next architecture to evaluate, as a pure function of (seed, what is taken, finished records, attempt)."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from hf_elastic.errors import ElasticError, SearchError
from hf_elastic.search.journal import Proposal, Record
from hf_elastic.search.limits import Feasibility, neighbours
from hf_elastic.search.objective import Objective
from hf_elastic.search.samplers import EXCESS, SamplerFactory, TrialEncoding
from hf_elastic.search.shadow import SHADOW_NAME, ShadowStorage
from hf_elastic.space import Architecture, SearchSpace

LISTABLE = 20_000  # spaces up to this size are listed rather than sampled when unseen points get rare
_ATTEMPTS = 12  # drafts before we look for unseen architectures ourselves
_MUTATIONS = 64
_SAMPLES = 64


class Generator(Protocol):
    """Draft proposals from the records observed."""

    @property
    def ordered(self) -> bool:
        """Whether it asks nothing of the records observed."""

    @property
    def redraws(self) -> bool:
        """Whether drafts over the limits are better redrawn than repaired."""

    def observe(self, record: Record) -> None:
        """Take a finished record into account."""

    def draft(self, seed: int) -> Proposal:
        """Return a draft; it may be seen before or over the limits."""


class RandomGenerator:
    """Draft by ``space.sample``.

    Args:
        space: The search space.
    """

    redraws = True
    ordered = True

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    def observe(self, record: Record) -> None:
        """Ignore it."""

    def draft(self, seed: int) -> Proposal:
        """Return a random architecture."""
        return Proposal(self._space.sample(random.Random(seed)))


class SamplerGenerator:
    """Draft with a fresh Optuna sampler that sees the finished records and nothing else.

    Args:
        encoding: Translation of the space.
        factory: Seed to sampler.
        objectives: For their names and directions.
        excess: Architecture and values by name to the amount by which they miss the limits, if there are any;
            samplers that know constraints prefer what keeps them.
    """

    redraws = False
    ordered = False

    def __init__(
        self,
        encoding: TrialEncoding,
        factory: SamplerFactory,
        objectives: Sequence[Objective],
        *,
        excess: Callable[[Architecture, Mapping[str, float]], float] | None = None,
    ) -> None:
        self._encoding = encoding
        self._factory = factory
        self._names = tuple(objective.name for objective in objectives)
        self._excess = excess
        self._shadow = ShadowStorage()
        optuna.create_study(
            storage=self._shadow,
            study_name=SHADOW_NAME,
            directions=[objective.direction for objective in objectives],
            sampler=RandomSampler(0),
        )

    def observe(self, record: Record) -> None:
        """Add the record to what samplers see: the architecture evaluated, not the one first drafted."""
        excess = 0.0
        constraints = None
        if self._excess is not None and record.values is not None:
            values = dict(zip(self._names, record.values, strict=True))
            excess = self._excess(record.proposal.architecture, values)
            constraints = {"within": excess}
        trial = create_trial(
            state=TrialState.FAIL if record.values is None else TrialState.COMPLETE,
            values=record.values,
            params=self._encoding.parameters(record.proposal.architecture),
            distributions=self._encoding.distributions,
            system_attrs=dict(record.proposal.trial_attrs),
            user_attrs={EXCESS: excess},
            constraints=constraints,
        )
        trial.number = record.number
        self._shadow.add_finished(trial)
        for key, value in record.proposal.study_attrs.items():
            self._shadow.set_study_system_attr(0, key, value)

    def draft(self, seed: int) -> Proposal:
        """Return the architecture a sampler with this seed proposes.

        Raises:
            SearchError: The sampler cannot handle the space or the number of objectives.
        """
        sampler = self._factory(seed)
        trial = self._shadow.open_scratch()
        try:
            parameters = self._ask(sampler, trial)
        except ElasticError:
            raise
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
            raise SearchError(f"{type(sampler).__name__} cannot propose: {reason}") from error
        finally:
            noted = self._shadow.close_scratch()
        return Proposal(self._encoding.architecture(parameters), dict(trial.system_attrs), noted)

    def _ask(self, sampler: BaseSampler, trial: FrozenTrial) -> dict[str, Any]:
        # A study keeps a cache of trials for as long as it lives, so each proposal gets its own.
        study = optuna.load_study(study_name=SHADOW_NAME, storage=self._shadow, sampler=sampler)
        sampler.before_trial(study, trial)
        relative = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        for name, distribution in self._encoding.distributions.items():
            if name not in relative:
                value = sampler.sample_independent(study, trial, name, distribution)
            else:
                value = relative[name]
            trial.params[name] = value
            trial.distributions[name] = distribution
        return trial.params


class Proposer:
    """Turn drafts into proposals that keep the limits and were never seen before.

    Args:
        space: The search space.
        feasibility: The hard limits.
        generator: Where drafts come from.
        seed: Seed of the search.
    """

    def __init__(self, space: SearchSpace, feasibility: Feasibility, generator: Generator, *, seed: int) -> None:
        self._space = space
        self._feasibility = feasibility
        self._generator = generator
        self._seed = seed
        self.ordered = generator.ordered
        self._evaluated: list[Architecture] = []
        self._listed: list[Architecture] | None = None

    def observe(self, record: Record) -> None:
        """Take a finished record into account."""
        self._evaluated.append(record.proposal.architecture)
        self._generator.observe(record)

    def dress(self, architecture: Architecture, taken: Collection[str]) -> Proposal:
        """Return a proposal of a given architecture that counts for the sampler like one of its own."""
        draft = self._generator.draft(self._derived(taken, "given"))
        return Proposal(architecture, draft.trial_attrs, draft.study_attrs)

    def propose(self, taken: Collection[str]) -> Proposal | None:
        """Return a proposal whose digest is not ``taken``, or None when there is none left."""
        draft = None
        for attempt in range(_ATTEMPTS):
            seed = self._derived(taken, attempt)
            draft = self._generator.draft(seed)
            architecture = draft.architecture
            patient = self._generator.redraws and attempt < _ATTEMPTS - 1
            if not patient:
                architecture = self._feasibility.repair(architecture, random.Random(seed))
            if architecture.digest not in taken and self._feasibility.allows(architecture):
                return Proposal(architecture, draft.trial_attrs, draft.study_attrs)
        assert draft is not None
        unseen = self._unseen(draft.architecture, taken)
        return None if unseen is None else Proposal(unseen, draft.trial_attrs, draft.study_attrs)

    def _derived(self, taken: Collection[str], what: int | str) -> int:
        """Return a 32-bit seed from the search's seed, the number of architectures taken, and ``what``.

        Of what is taken, and not of what is finished, so that proposals which ask nothing of finished evaluations are
        the same however many are under evaluation at once.
        """
        text = f"{self._seed}:{len(taken)}:{what}"
        return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "big")

    def _unseen(self, near: Architecture, taken: Collection[str]) -> Architecture | None:
        """Return an unseen architecture that keeps the limits: a mutation, else a sample, else by listing."""
        rng = random.Random(self._derived(taken, "unseen"))
        for candidate in itertools.chain(self._mutations(near, rng), self._samples(rng)):
            repaired = self._feasibility.repair(candidate, rng)
            if repaired.digest not in taken:
                return repaired
        if self._space.size <= LISTABLE:
            if self._listed is None:
                self._listed = list_feasible(self._space, self._feasibility)
            left = [a for a in self._listed if a.digest not in taken]
            return rng.choice(left) if left else None
        return self._beside_the_evaluated(taken)

    def _mutations(self, near: Architecture, rng: random.Random) -> Iterator[Architecture]:
        open_names = [choice.name for choice in self._space.choices if len(choice.values) > 1]
        for attempt in range(_MUTATIONS if open_names else 0):
            # More and more choices change, from one to all.
            count = 1 + attempt * (len(open_names) - 1) // _MUTATIONS
            changed = {name: rng.choice(self._space[name].values) for name in rng.sample(open_names, count)}
            yield self._space.canonical({**near, **changed})

    def _samples(self, rng: random.Random) -> Iterator[Architecture]:
        for _ in range(_SAMPLES):
            yield self._space.sample(rng)

    def _beside_the_evaluated(self, taken: Collection[str]) -> Architecture | None:
        """Return an unseen neighbour of what was evaluated; without one a huge space counts as exhausted."""
        for architecture in reversed(self._evaluated):
            for neighbour in neighbours(self._space, architecture):
                if neighbour.digest not in taken and self._feasibility.allows(neighbour):
                    return neighbour
        return None


class ListProposer:
    """Propose a list of architectures one after the other (exhaustive search).

    Args:
        architectures: What to evaluate.
    """

    ordered = True

    def __init__(self, architectures: Sequence[Architecture]) -> None:
        self._architectures = architectures

    def observe(self, record: Record) -> None:
        """Ignore it."""

    def dress(self, architecture: Architecture, taken: Collection[str]) -> Proposal:
        """Return a proposal of a given architecture."""
        return Proposal(architecture)

    def propose(self, taken: Collection[str]) -> Proposal | None:
        """Return the first architecture of the list that is not ``taken``."""
        left = (a for a in self._architectures if a.digest not in taken)
        return next((Proposal(a) for a in left), None)


def list_feasible(space: SearchSpace, feasibility: Feasibility) -> list[Architecture]:
    """Return every architecture that keeps the hard limits, in lexicographic order."""
    return [architecture for architecture in space.architectures() if feasibility.allows(architecture)]
