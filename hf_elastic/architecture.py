"""One point of a search space: immutable, hashable, with the same digest in every process and version."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from hf_elastic.errors import ArchitectureError, ElasticError

Value = int | str

MAX_JSON_CHARACTERS = 64 * 2**20  # a space of 100,000 choices needs about a tenth of this
MAX_INT = 2**63  # exclusive: what every storage and JSON reader we hand architectures to can hold
_MAX_SHOWN = 12  # values named in an error message
_MAX_REPR = 200  # characters of a representation


class Architecture(Mapping[str, Value]):
    """One point of a space: an immutable, hashable mapping from every choice's name to its value.

    Made by a search space (which makes it canonical); equality and hash go by contents, and are the same in
    every process.

    Args:
        values: Name to value, in the order of the space.

    Raises:
        ArchitectureError: A name is no string, or a value is neither an integer nor a string.
    """

    __slots__ = ("_digest", "_hash", "_values")
    _values: dict[str, Value]
    _digest: str | None
    _hash: int | None

    def __init__(self, values: Mapping[str, Value]) -> None:
        contents = dict(values)
        for name, value in contents.items():
            if type(name) is not str:
                raise ArchitectureError(f"an architecture's names are strings, got {name!r}")
            _check_value(name, value)
        self._fill(contents)

    @classmethod
    def _trusted(cls, values: dict[str, Value]) -> Architecture:
        """Wrap ``values`` without checking or copying; the caller hands the dictionary over."""
        architecture = cls.__new__(cls)
        architecture._fill(values)
        return architecture

    def _fill(self, values: dict[str, Value]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_digest", None)
        object.__setattr__(self, "_hash", None)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Architecture cannot be changed; tried to set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an Architecture cannot be changed; tried to delete {name!r}")

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Architecture):
            return NotImplemented
        return self._values == other._values

    def __hash__(self) -> int:
        if self._hash is None:
            object.__setattr__(self, "_hash", int(self.digest[:15], 16))
        assert self._hash is not None
        return self._hash

    def __reduce__(self) -> tuple[type[Architecture], tuple[dict[str, Value]]]:
        return Architecture, (dict(self._values),)

    def __repr__(self) -> str:
        return f"Architecture({_grouped(self._values)})"

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the contents, independent of order, process and version."""
        if self._digest is None:
            object.__setattr__(self, "_digest", sha256_of(self._values))
        assert self._digest is not None
        return self._digest

    def to_json(self) -> str:
        """Return a JSON object, names in the order of the space."""
        return json.dumps(self._values)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what :meth:`to_json` wrote; whether it is a point of a space, ``space.validate`` says.

        Raises:
            ArchitectureError: The text is no JSON object of integers and strings.
        """
        return cls(read_json_object(text, what="an architecture", error=ArchitectureError))  # type: ignore[arg-type]


def read_json_object(text: str, *, what: str, error: type[ElasticError]) -> dict[str, object]:
    """Parse ``text`` as one JSON object without repeated names.

    Raises:
        ElasticError: Of the class ``error``; the text is too long, malformed, or not an object.
    """
    if not isinstance(text, str):
        raise error(f"{what} is read from a JSON text, got {type_name(text)}")
    if len(text) > MAX_JSON_CHARACTERS:
        raise error(f"{what} of {len(text)} characters is longer than the {MAX_JSON_CHARACTERS} allowed")
    try:
        data = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} cannot be read: malformed JSON ({str(problem).splitlines()[0][:120]})") from None
    if not isinstance(data, dict):
        raise error(f"{what} is a JSON object, got {type_name(data)}")
    return data


def sha256_of(data: object) -> str:
    """Return the hexadecimal SHA-256 of ``data`` as JSON with sorted names."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def shown(values: Iterable[object]) -> str:
    """Return the values as they are named in an error message: all of a few, the first of many."""
    shortened = list(itertools.islice(values, _MAX_SHOWN + 1))
    text = ", ".join(_clipped(repr(value), 80) for value in shortened[:_MAX_SHOWN])
    return f"{text}, ..." if len(shortened) > _MAX_SHOWN else text


def type_name(value: object) -> str:
    """Return the name of the type of ``value``."""
    return type(value).__name__


def is_finite(value: object) -> bool:
    """Say whether ``value`` is a number that a float holds: no boolean, and no integer that is too large for one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_value(name: str, value: object) -> None:
    if type(value) is str or (type(value) is int and abs(value) < MAX_INT):
        return
    raise ArchitectureError(
        f"{_clipped(repr(name), 80)} takes a 64-bit integer or a string, got {_clipped(repr(value), 80)}"
    )


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name is repeated")
    return data


def _grouped(values: Mapping[str, Value]) -> str:
    """Return values grouped by name without layer numbers, in runs: ``layers.*.skip=none*5,layer``."""
    groups: dict[str, list[Value]] = {}
    for name, value in values.items():
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(value)
    parts = []
    for name, group in groups.items():
        runs = [(value, len(list(run))) for value, run in itertools.groupby(group)]
        parts.append(f"{name}=" + ",".join(f"{v}*{n}" if n > 1 else f"{v}" for v, n in runs))
    return _clipped("; ".join(parts), _MAX_REPR)
