"""Search spaces: choices, architectures, and the set of canonical points (no torch, no transformers).

A :class:`SearchSpace` is an immutable list of choices; an :class:`Architecture` gives every choice a value. A
choice may be *conditional*: it is *in effect* only while all its conditions hold, and a condition holds only
while the choice it names is itself in effect. Architectures are kept *canonical*: a choice that is not in
effect takes its first value, so two architectures that mean the same subnet are equal and share one digest,
in every process and every version.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_elastic.architecture import (
    MAX_INT,
    Architecture,
    Value,
    read_json_object,
    sha256_of,
    shown,
    type_name,
)
from hf_elastic.counting import Conditions, count_points
from hf_elastic.errors import ArchitectureError, SpaceError

__all__ = ["Architecture", "Choice", "Condition", "Kind", "SearchSpace", "Value"]

Kind = Literal["ordered", "categorical"]
_Pick = Callable[[int], Value]  # position of a choice in effect -> the value it takes

_SPACE_FORMAT = "hf_elastic.search_space"


@dataclass(frozen=True)
class Condition:
    """Hold while ``choice`` is in effect and takes one of ``values``."""

    choice: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not isinstance(self.choice, str):
            raise SpaceError(f"a condition names a choice by its name, got {shown([self.choice])}")


@dataclass(frozen=True)
class Choice:
    """Describe one decision.

    Args:
        name: Name in Hugging Face config vocabulary, such as ``layers.3.intermediate_size``.
        values: Ordered: strictly ascending integers. Categorical: distinct strings.
        kind: ``"ordered"`` (sizes) or ``"categorical"`` (blocks, operators).
        parameters: Categorical only: parameter count that each value carries; it orders largest, smallest and
            midpoint (ties: the earlier value counts as larger).
        when: Conditions that must all hold for the choice to be in effect.

    Raises:
        SpaceError: The values are empty, repeated, unordered or of the wrong type.
    """

    name: str
    values: tuple[Value, ...]
    kind: Kind = "ordered"
    parameters: tuple[int, ...] | None = None
    when: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "when", tuple(self.when))
        if self.parameters is not None:
            object.__setattr__(self, "parameters", tuple(self.parameters))
        if not isinstance(self.name, str) or not self.name:
            raise SpaceError(f"a choice needs a non-empty name, got {self.name!r}")
        if not self.values:
            raise SpaceError(f"choice {self.name!r} has no values; give at least one")
        if self.kind == "ordered":
            self._check_ordered()
        elif self.kind == "categorical":
            self._check_categorical()
        else:
            raise SpaceError(f"choice {self.name!r} is of kind {self.kind!r}; allowed: ordered, categorical")

    def _check_ordered(self) -> None:
        for value in self.values:
            if type(value) is not int or abs(value) >= MAX_INT:
                raise SpaceError(f"ordered choice {self.name!r} takes 64-bit integers, got {value!r}")
        if any(a >= b for a, b in itertools.pairwise(self.values)):  # type: ignore[operator]
            raise SpaceError(f"ordered choice {self.name!r} needs strictly ascending values, got {shown(self.values)}")
        if self.parameters is not None:
            raise SpaceError(f"ordered choice {self.name!r} is ordered by its values; leave out parameters=")

    def _check_categorical(self) -> None:
        for value in self.values:
            if type(value) is not str:
                raise SpaceError(f"categorical choice {self.name!r} takes strings, got {value!r}")
        if len(set(self.values)) != len(self.values):
            raise SpaceError(f"categorical choice {self.name!r} repeats a value: {shown(self.values)}")
        counts = self.parameters
        if counts is None or len(counts) != len(self.values):
            got = "none" if counts is None else str(len(counts))
            raise SpaceError(
                f"categorical choice {self.name!r} needs one parameter count per value "
                f"({len(self.values)}), got {got}; pass parameters=(...)"
            )
        if any(type(count) is not int or not 0 <= count < MAX_INT for count in counts):
            raise SpaceError(f"categorical choice {self.name!r} needs counts >= 0, got {shown(counts)}")

    @property
    def descending(self) -> tuple[Value, ...]:
        """All values, largest first."""
        if self.parameters is None:
            return self.values[::-1]
        counts = self.parameters
        order = sorted(range(len(self.values)), key=lambda i: (-counts[i], i))
        return tuple(self.values[i] for i in order)

    @property
    def largest(self) -> Value:
        """The value with the largest size or parameter count."""
        return self.descending[0]

    @property
    def smallest(self) -> Value:
        """The value with the smallest size or parameter count."""
        return self.descending[-1]

    @property
    def midpoint(self) -> Value:
        """Element ``floor((n - 1) / 2)`` of the descending list (Shears' heuristic, arXiv 2404.10934)."""
        return self.descending[(len(self.values) - 1) // 2]


class SearchSpace:
    """Hold an immutable set of choices and answer questions about the architectures they span.

    Args:
        choices: At least one; names are distinct; conditions name earlier choices and values these can take.

    Raises:
        SpaceError: The choices do not make a space.
    """

    __slots__ = ("_choices", "_conditions", "_digest", "_indices", "_names", "_positions", "_size")

    def __init__(self, choices: Iterable[Choice]) -> None:
        self._choices = tuple(choices)
        if not self._choices:
            raise SpaceError("an empty search space: declare at least one choice")
        self._names = tuple(choice.name for choice in self._choices)
        self._positions: dict[str, int] = {}
        self._indices: tuple[dict[Value, int], ...] = tuple(
            {value: index for index, value in enumerate(choice.values)} for choice in self._choices
        )
        conditions: list[Conditions] = []
        for position, choice in enumerate(self._choices):
            if choice.name in self._positions:
                raise SpaceError(f"choice {choice.name!r} is declared twice; names must be distinct")
            conditions.append(tuple(self._compiled(choice, condition) for condition in choice.when))
            self._positions[choice.name] = position
        self._conditions = tuple(conditions)
        self._size: int | None = None
        self._digest: str | None = None

    def _compiled(self, choice: Choice, condition: Condition) -> tuple[int, frozenset[Value]]:
        position = self._positions.get(condition.choice)
        if position is None:
            raise SpaceError(f"choice {choice.name!r} depends on {condition.choice!r}, which is not declared before it")
        known = self._indices[position]
        wrong = [v for v in condition.values if type(v) not in (int, str) or v not in known]
        if wrong or not condition.values:
            got = shown(wrong) if wrong else "no values"
            allowed = shown(self._choices[position].values)
            raise SpaceError(f"choice {choice.name!r} depends on {condition.choice!r} taking {got}; it takes {allowed}")
        return position, frozenset(condition.values)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices in declared order."""
        return self._choices

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all choices in declared order."""
        return self._names

    def __getitem__(self, name: str) -> Choice:
        try:
            return self._choices[self._positions[name]]
        except KeyError:
            raise SpaceError(f"no choice {name!r} in this space; it has {shown(self._names)}") from None

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SearchSpace):
            return NotImplemented
        return self._choices == other._choices

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __repr__(self) -> str:
        count = _approximately(self.size)
        return f"SearchSpace({len(self)} choices, {count} architectures, {self.digest[:8]})"

    def __contains__(self, architecture: object) -> bool:
        if not isinstance(architecture, Mapping):
            return False
        try:
            self.validate(architecture)
        except ArchitectureError:
            return False
        return True

    @property
    def size(self) -> int:
        """Exact number of canonical architectures."""
        if self._size is None:
            self._size = count_points(tuple(c.values for c in self._choices), self._conditions)
        return self._size

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the choices: the same in every process and version."""
        if self._digest is None:
            self._digest = sha256_of(self._as_data())
        return self._digest

    def canonical(self, values: Mapping[str, Value]) -> Architecture:
        """Return the canonical architecture of ``values``, which must give every choice in effect.

        Raises:
            ArchitectureError: A name is unknown, a choice in effect is missing, or a value is not allowed.
        """
        values = dict(values)
        if not values.keys() <= self._positions.keys():
            unknown = shown(name for name in values if name not in self._positions)
            raise ArchitectureError(f"this space has no choice {unknown}; it has {shown(self._names)}")
        picked: list[Value | None] = []
        for choice, indices in zip(self._choices, self._indices, strict=True):
            value = values.get(choice.name)
            if value is not None and (type(value) not in (int, str) or value not in indices):
                raise _not_allowed(choice, value)
            picked.append(value)

        def pick(position: int) -> Value:
            value = picked[position]
            if value is None:
                choice = self._choices[position]
                raise ArchitectureError(f"no value for {choice.name!r}; allowed: {shown(choice.values)}")
            return value

        return self._walk(pick)

    def sample(self, rng: random.Random) -> Architecture:
        """Draw each choice in effect uniformly, in declared order: a pure function of the generator's state.

        Uniform over the values of each choice, not over canonical points: a value that switches much off is
        as likely as one that leaves much to choose.
        """
        choices, draw = self._choices, rng.random

        def pick(position: int) -> Value:
            values = choices[position].values
            # random() is the one method whose sequence Python promises to keep between versions.
            return values[int(draw() * len(values))]

        return self._walk(pick)

    def largest(self) -> Architecture:
        """Return the architecture of every choice's largest value."""
        return self._walk(lambda position: self._choices[position].largest)

    def smallest(self) -> Architecture:
        """Return the architecture of every choice's smallest value."""
        return self._walk(lambda position: self._choices[position].smallest)

    def midpoint(self) -> Architecture:
        """Return the architecture of every choice's middle value, the heuristic subnet of Shears and SQFT."""
        return self._walk(lambda position: self._choices[position].midpoint)

    def encode(self, architecture: Mapping[str, Value]) -> tuple[int, ...]:
        """Return the index of each choice's value, in declared order.

        Raises:
            ArchitectureError: It is not a canonical architecture of this space.
        """
        self.validate(architecture)
        return tuple(indices[architecture[name]] for name, indices in zip(self._names, self._indices, strict=True))

    def decode(self, indices: Sequence[int]) -> Architecture:
        """Return the canonical architecture whose choices take the values at ``indices``.

        Raises:
            ArchitectureError: There are too few or too many indices, or one is out of range.
        """
        if len(indices) != len(self._choices):
            raise ArchitectureError(f"{len(indices)} indices for a space of {len(self._choices)} choices")
        for choice, index in zip(self._choices, indices, strict=True):
            if type(index) is not int or not 0 <= index < len(choice.values):
                raise ArchitectureError(
                    f"index {index!r} of choice {choice.name!r} is outside 0..{len(choice.values) - 1}"
                )
        return self._walk(lambda position: self._choices[position].values[indices[position]])

    def validate(self, architecture: Mapping[str, Value]) -> None:
        """Check that ``architecture`` is a canonical point of this space.

        Raises:
            ArchitectureError: A choice (it is named) is missing, unknown, not allowed or not canonical.
        """
        canonical = self.canonical(architecture)
        for name, value in canonical.items():
            if name not in architecture:
                raise ArchitectureError(f"no value for {name!r}; canonical() fills in choices not in effect")
            if architecture[name] != value:
                raise ArchitectureError(
                    f"{name!r} is not in effect and must take its first value {value!r}, got "
                    f"{architecture[name]!r}; canonical() does that"
                )

    def in_effect(self, architecture: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the names of the choices in effect, in declared order.

        Raises:
            ArchitectureError: It is not a canonical architecture of this space.
        """
        self.validate(architecture)
        effective: list[str] = []

        def pick(position: int) -> Value:
            name = self._names[position]
            effective.append(name)
            return architecture[name]

        self._walk(pick)
        return tuple(effective)

    def architectures(self) -> Iterator[Architecture]:
        """Yield every canonical architecture once, in lexicographic order of indices."""
        indices = [0] * len(self._choices)
        while True:
            active: list[int] = []

            def pick(position: int, active: list[int] = active) -> Value:
                active.append(position)
                return self._choices[position].values[indices[position]]

            yield self._walk(pick)
            # Choices not in effect always hold index 0, so advancing those in effect visits each point once.
            last = next((p for p in reversed(active) if indices[p] + 1 < len(self._choices[p].values)), None)
            if last is None:
                return
            indices[last] += 1
            indices[last + 1 :] = [0] * (len(indices) - last - 1)

    def to_json(self) -> str:
        """Return a JSON object that :meth:`from_json` reads."""
        return json.dumps(self._as_data(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        """Read what :meth:`to_json` wrote.

        Raises:
            SpaceError: The text is not such a JSON object.
        """
        data = read_json_object(text, what="a search space", error=SpaceError)
        if data.get("format") != _SPACE_FORMAT or data.get("version") != 1:
            got = f"{data.get('format')!r} version {data.get('version')!r}"[:80]
            raise SpaceError(f"not a search space: its format is {got}, not {_SPACE_FORMAT!r} version 1")
        choices = data.get("choices")
        if not isinstance(choices, list):
            raise SpaceError(f"not a search space: 'choices' must be a list, got {type_name(choices)}")
        return cls(_read_choice(entry) for entry in choices)

    def _as_data(self) -> dict[str, object]:
        return {"format": _SPACE_FORMAT, "version": 1, "choices": [_choice_as_data(c) for c in self._choices]}

    def _walk(self, pick: _Pick) -> Architecture:
        """Ask ``pick`` for each choice in effect, in order; the others take their first value."""
        values: dict[str, Value] = {}
        effective: list[Value | None] = []  # None marks a choice that is not in effect
        for position, conditions in enumerate(self._conditions):
            holds = True
            for other, allowed in conditions:
                if effective[other] not in allowed:  # None is never allowed
                    holds = False
                    break
            if holds:
                value = pick(position)
                effective.append(value)
            else:
                value = self._choices[position].values[0]
                effective.append(None)
            values[self._names[position]] = value
        return Architecture._trusted(values)


def _not_allowed(choice: Choice, value: object) -> ArchitectureError:
    return ArchitectureError(f"{choice.name!r} cannot be {shown([value])}; allowed: {shown(choice.values)}")


def _approximately(count: int) -> str:
    return str(count) if count < 10**6 else f"about 10^{len(str(count)) - 1}"


def _choice_as_data(choice: Choice) -> dict[str, object]:
    data: dict[str, object] = {"name": choice.name, "kind": choice.kind, "values": list(choice.values)}
    if choice.parameters is not None:
        data["parameters"] = list(choice.parameters)
    if choice.when:
        data["when"] = [{"choice": c.choice, "values": list(c.values)} for c in choice.when]
    return data


def _read_choice(entry: object) -> Choice:
    data = _members(entry, allowed=("name", "kind", "values", "parameters", "when"))
    parameters = data.get("parameters")
    return Choice(
        name=data.get("name"),  # type: ignore[arg-type]  # Choice checks the types of what it is given
        values=_read_list(data.get("values")),
        kind=data.get("kind", "ordered"),  # type: ignore[arg-type]
        parameters=None if parameters is None else _read_list(parameters),
        when=tuple(_read_condition(condition) for condition in _read_list(data.get("when", []))),
    )


def _read_condition(entry: object) -> Condition:
    data = _members(entry, allowed=("choice", "values"))
    return Condition(data.get("choice"), _read_list(data.get("values")))  # type: ignore[arg-type]


def _members(entry: object, *, allowed: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(entry, dict) or not set(entry) <= set(allowed):
        got = shown(entry) if isinstance(entry, dict) else type_name(entry)
        raise SpaceError(f"not a search space: expected an object of {shown(allowed)}, got {got}")
    return entry


def _read_list(entry: object) -> tuple[Any, ...]:
    if not isinstance(entry, list):
        raise SpaceError(f"not a search space: expected a list, got {type_name(entry)}")
    return tuple(entry)
