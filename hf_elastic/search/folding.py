"""Every architecture whose partial sums no other one dominates, group by group: dynamic programming with pruning.

After each group, of all selections so far only those are kept that no other one dominates (Nemhauser and Ullmann
1969, DOI 10.1287/mnsc.15.9.494, for the knapsack problem): whatever the remaining groups add, a dominated one stays
dominated. Choices shared between groups are what the selections so far and the remaining groups have to agree on.
They make the *key* of a selection, only selections of one key compare, and a choice leaves the key with the last
group that it stands in (nonserial dynamic programming: Bertelè and Brioschi 1972).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hf_elastic.errors import SearchError
from hf_elastic.search.contributions import AdditiveProblem, Dimension, Integers, Picks
from hf_elastic.search.front import nondominated
from hf_elastic.search.objective import Combination, subspace

MOST_LINKS = 100_000
Places = NDArray[np.int32]

_MOST_KEPT = {1: 2_000_000, 2: 2_000_000, 3: 500_000}  # by dimensions: a step then takes about ten seconds
_MOST_KEPT_BEYOND = 50_000
_PORTION = 1 << 22  # candidates in memory at a time


def count_links(problem: AdditiveProblem) -> int:
    """Return how many values the shared choices of one group and those open before it take together, at most."""
    return max(
        subspace(problem.space, common).size if (common := problem.shared.intersection((*names, *before))) else 1
        for names, before in zip(problem.groups, _open_names(problem), strict=False)
    )


def fold(problem: AdditiveProblem, dimensions: Sequence[Dimension], *, progress: bool = False) -> Picks:
    """Return the architectures within all ceilings that no other one dominates; of equal sums one.

    Which one of equals is a function of the tables alone: it is the same in every process.

    Raises:
        SearchError: Too many selections have to be kept.
    """
    keys = _keys(problem)
    states = _States.of(tuple(np.zeros(1, np.int64) for _ in dimensions))
    trail: list[tuple[Places, Places]] = []
    rests = [sum(dimension.least()) for dimension in dimensions]  # what the remaining groups add at least
    bar = tqdm(problem.groups, desc="exact search", unit="group", disable=not progress, dynamic_ncols=True)
    for group, _ in enumerate(bar):
        rests = [rest - dimension.least()[group] for rest, dimension in zip(rests, dimensions, strict=True)]
        ceilings = [
            None if dimension.ceiling is None else dimension.ceiling - rest
            for rest, dimension in zip(rests, dimensions, strict=True)
        ]
        step = _Step.of(problem, group, dimensions, keys=keys[group : group + 2], ceilings=ceilings)
        states = step.advance(states)
        trail.append((states.parents, states.picks))
        bar.set_postfix_str(f"{len(states)} kept", refresh=False)
    return _traced(trail)


class _Keys(NamedTuple):
    """Values that some choices can take together."""

    names: tuple[str, ...]
    values: list[Combination]


@dataclass(frozen=True)
class _States:
    """Selections from the groups so far that are kept.

    Args:
        sums: Per dimension ``(N,)``.
        keys: ``(N,)`` which values the open choices have.
        parents: ``(N,)`` the selection, one group earlier, that each one extends.
        picks: ``(N,)`` by which combination.
    """

    sums: tuple[Integers, ...]
    keys: Places
    parents: Places
    picks: Places

    @classmethod
    def of(cls, sums: tuple[Integers, ...]) -> _States:
        """Return selections from no group yet."""
        nothing = np.zeros(len(sums[0]), np.int32)
        return cls(sums, nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.keys)

    def taken(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> _States:
        """Return some of them."""
        sums = tuple(column[which] for column in self.sums)
        return _States(sums, self.keys[which], self.parents[which], self.picks[which])

    def followed_by(self, other: _States) -> _States:
        """Return these, then the others."""
        pairs = zip(self.sums, other.sums, strict=True)
        return _States(
            tuple(np.concatenate(pair) for pair in pairs),
            np.concatenate((self.keys, other.keys)),
            np.concatenate((self.parents, other.parents)),
            np.concatenate((self.picks, other.picks)),
        )


@dataclass(frozen=True)
class _Step:
    """How selections are extended by one more group.

    The combinations are sorted by the values of their shared choices: a *class* has the same ones, and is what a key
    agrees with or not. A *link* is a pair of a key and a class that agree.

    Args:
        picks: ``(M,)`` the combinations that none of their class dominates.
        contributions: Per dimension ``(M,)``.
        links: ``(keys + 1,)`` where the links of each key start.
        starts: ``(links,)`` where the class of each link starts among the combinations.
        sizes: ``(links,)`` how many combinations it has.
        keys: ``(links,)`` the key after the group.
        ceilings: Largest sum of each dimension that may still end within its limit.
    """

    picks: Places
    contributions: tuple[Integers, ...]
    links: NDArray[np.intp]
    starts: NDArray[np.intp]
    sizes: NDArray[np.intp]
    keys: Places
    ceilings: Sequence[int | None]

    @classmethod
    def of(
        cls,
        problem: AdditiveProblem,
        group: int,
        dimensions: Sequence[Dimension],
        *,
        keys: Sequence[_Keys],
        ceilings: Sequence[int | None],
    ) -> _Step:
        """Return the step for one group, between the keys before and after it."""
        own = tuple(name for name in problem.groups[group] if name in problem.shared)
        classes, of_each = problem.classes(group)
        picks = problem.undominated(group, dimensions)
        ends = np.searchsorted(of_each[picks], np.arange(len(classes) + 1))
        links = _links(_Keys(own, classes), before=keys[0], after=keys[1])
        which = np.array([link[1] for link in links])
        counts = np.bincount([link[0] for link in links])
        return cls(
            picks.astype(np.int32),
            tuple(dimension.contributions[group][picks] for dimension in dimensions),
            np.append(0, np.cumsum(counts)),
            ends[which],
            ends[which + 1] - ends[which],
            np.array([link[2] for link in links], np.int32),
            ceilings,
        )

    def advance(self, states: _States) -> _States:
        """Return the selections with one more group that are to be kept.

        Raises:
            SearchError: They are too many.
        """
        kept = _States.of(tuple(np.zeros(0, np.int64) for _ in self.contributions))
        for portion in self._portions(states):
            kept = kept.followed_by(self._extended(states, portion))
            keys = kept.keys if self.keys.any() else None
            kept = kept.taken(nondominated(kept.sums, keys=keys))
            _check_count(len(kept), len(self.contributions))
        return kept

    def _portions(self, states: _States) -> Iterator[NDArray[np.intp]]:
        """Yield positions of states that together have not too many extensions."""
        of_key = np.add.reduceat(self.sizes, self.links[:-1])
        ends = np.cumsum(of_key[states.keys]) // _PORTION
        yield from np.split(np.arange(len(states)), np.flatnonzero(ends[1:] != ends[:-1]) + 1)

    def _extended(self, states: _States, portion: NDArray[np.intp]) -> _States:
        """Return all extensions of some states that stay below the ceilings."""
        keys = states.keys[portion]
        counts = self.links[keys + 1] - self.links[keys]
        links = _ranges(self.links[keys], counts)
        parents = np.repeat(np.repeat(portion, counts), self.sizes[links])
        chosen = _ranges(self.starts[links], self.sizes[links])
        sums = tuple(s[parents] + added[chosen] for s, added in zip(states.sums, self.contributions, strict=True))
        inside = np.ones(len(parents), bool)
        for column, ceiling in zip(sums, self.ceilings, strict=True):
            inside &= True if ceiling is None else column <= ceiling
        after = np.repeat(self.keys[links], self.sizes[links])
        return _States(sums, after, parents.astype(np.int32), self.picks[chosen]).taken(inside)


def _links(classes: _Keys, *, before: _Keys, after: _Keys) -> list[tuple[int, int, int]]:
    """Return each key before a group, each class of the group that agrees with it, and the key after, in order."""
    common = [name for name in classes.names if name in before.names]
    agreeing: dict[Combination, list[int]] = {}
    for number, values in enumerate(classes.values):
        known = dict(zip(classes.names, values, strict=True))
        agreeing.setdefault(tuple(known[name] for name in common), []).append(number)
    numbers = {key: number for number, key in enumerate(after.values)}
    found = []
    for number, key in enumerate(before.values):
        known = dict(zip(before.names, key, strict=True))
        for agrees in agreeing[tuple(known[name] for name in common)]:
            known.update(zip(classes.names, classes.values[agrees], strict=True))
            found.append((number, agrees, numbers[tuple(known[name] for name in after.names)]))
    return found


def _open_names(problem: AdditiveProblem) -> list[tuple[str, ...]]:
    """Return which shared choices are open before the first group and after each: met already and needed later."""
    found = []
    for group in range(len(problem.groups) + 1):
        met = {name for names in problem.groups[:group] for name in names}
        needed = {name for names in problem.groups[group:] for name in names}
        found.append(tuple(name for name in problem.space.names if name in met and name in needed))
    return found


def _keys(problem: AdditiveProblem) -> list[_Keys]:
    """Return the keys before the first group and after each.

    Open choices have all choices that their conditions name among them, since every group that they stand in does.
    """
    opened = _open_names(problem)
    listed: dict[tuple[str, ...], list[Combination]] = {(): [()]}
    for names in set(opened) - {()}:
        listed[names] = [tuple(point.values()) for point in subspace(problem.space, names).architectures()]
    return [_Keys(names, listed[names]) for names in opened]


def _ranges(starts: NDArray[np.intp], sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return ``start, start + 1, ...`` of each size, one after the other."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    found: NDArray[np.intp] = np.arange(total) + np.repeat(starts - (ends - sizes), sizes)
    return found


def _traced(trail: Sequence[tuple[Places, Places]]) -> Picks:
    """Follow the parents back and return the combination of each group."""
    states = np.arange(len(trail[-1][0]), dtype=np.int32)
    picks = np.empty((len(states), len(trail)), np.int32)
    for group in range(len(trail) - 1, -1, -1):
        parents, chosen = trail[group]
        picks[:, group] = chosen[states]
        states = parents[states]
    return picks


def _check_count(count: int, dimensions: int) -> None:
    most = _MOST_KEPT.get(dimensions, _MOST_KEPT_BEYOND)
    if count > most:
        raise SearchError(
            f"algorithm='exact' would have to keep more than {most} partial selections in {dimensions} objectives and "
            "limits; leave one out, round a cost to coarser steps, or use algorithm='nsga2'"
        )
