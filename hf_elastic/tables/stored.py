"""Tables as files: a frozen dataclass as JSON, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json, write_json

FORMAT = 1


class Table(Protocol):
    """A frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


AnyTable = TypeVar("AnyTable", bound=Table)


def write_table(table: Table, path: str | Path) -> None:
    """Writes a table.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_json(Path(path), {"format": FORMAT, **asdict(table)})


def read_table(
    kind: type[AnyTable],
    path: str | Path,
    *,
    name: str,
    readers: Mapping[str, Callable[[Any], object]],
    sound: Callable[[AnyTable], bool],
) -> AnyTable:
    """Reads what :func:`write_table` wrote.

    Args:
        kind: the class of the table.
        path: of the file.
        name: what a user calls such a table.
        readers: make a field's value out of what JSON holds, where that differs.
        sound: whether all values are what they should be.

    Raises:
        CheckpointError: the file holds no such table.
    """
    data = read_json(Path(path))
    try:
        if data.pop("format") != FORMAT or set(data) != {entry.name for entry in fields(kind)}:
            raise ValueError
        made = kind(**{**data, **{field: reader(data[field]) for field, reader in readers.items()}})
        if not sound(made):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} holds no {name} of format {FORMAT}; delete it and measure again") from None
    return made
