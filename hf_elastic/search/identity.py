"""What makes a search the search it is: everything that its evaluations and their labels depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_elastic.search.limits import Limit
from hf_elastic.search.objective import Objective
from hf_elastic.space import SearchSpace

_VERSION = 2
_MAX_SHOWN = 120  # characters of one value in an error message


@dataclass(frozen=True)
class Identity:
    """Tell one search from another. The number of evaluations is no part of it: a search may be continued.

    Args:
        space: The search space.
        objectives: What is optimised.
        seed: Seed of all proposals.
        algorithm: Name of the algorithm.
        limits: The limits as absolute bounds.
        known: The objectives that limits may name, for their fingerprints.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    seed: int
    algorithm: str
    limits: Sequence[Limit] = ()
    known: Mapping[str, Objective] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Return the identity as JSON data; two searches are the same when it is equal."""
        limits = [[x.name, x.direction, x.bound, self.known[x.name].fingerprint] for x in self.limits]
        return {
            "version": _VERSION,
            "space": [self.space.digest, len(self.space)],
            "objectives": [[o.name, o.direction, o.fingerprint] for o in self.objectives],
            "seed": self.seed,
            "algorithm": self.algorithm,
            "limits": sorted(limits),
        }

    def differences(self, found: Mapping[str, Any] | None) -> str:
        """Say in words how a study with the identity data ``found`` differs from this search; "" when it does not."""
        wanted = self.to_data()
        if found == wanted:
            return ""
        if found is None:
            return "a study that hf_elastic did not make"
        if found.get("version") != _VERSION:
            return "a search of another version of hf_elastic"
        parts = []
        for key, show in _SHOWN.items():
            if found.get(key) != wanted[key]:
                parts.append(f"{key} {_cut(show(found[key]))} instead of {_cut(show(wanted[key]))}")
        return f"a search with {', '.join(parts)}"


def _space(data: Sequence[Any]) -> str:
    return f"{data[0][:8]} ({data[1]} choices)"


def _objectives(data: Sequence[Sequence[Any]]) -> str:
    return "(" + ", ".join(f"{direction} {name}{_tag(mark)}" for name, direction, mark in data) + ")"


def _limits(data: Sequence[Sequence[Any]]) -> str:
    signs = {"minimize": "<=", "maximize": ">="}
    return "(" + ", ".join(f"{name} {signs[d]} {bound!r}{_tag(mark)}" for name, d, bound, mark in data) + ")"


def _tag(fingerprint: str) -> str:
    return f" [{fingerprint[:8]}]" if fingerprint else ""


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


_SHOWN = {"space": _space, "objectives": _objectives, "seed": repr, "algorithm": repr, "limits": _limits}
