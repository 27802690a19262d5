"""Reads what ``--data`` names: plain text, rows of JSON or CSV, or a data set."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_elastic.errors import DataError
from hf_elastic.files import given_path

Row = dict[str, Any]

_SHORTEST, _LONGEST = 20, 300  # characters of a sentence worth learning from
_MOST_CHARACTERS = 2 * 10**9
_LOOKED_AT = 10_000  # characters in which a file that is no text shows itself
_ENDINGS = (".txt", ".jsonl", ".csv", ".json", ".md")  # no data set is named like this


def read_rows(sources: Sequence[str], *, text_column: str) -> list[Row]:
    """Reads all sources as rows with a text column.

    Args:
        sources: paths of ``.txt``, ``.jsonl`` or ``.csv`` files, or names of data sets on the Hub (``name`` or
            ``name:split``).
        text_column: the column that must be there; rows of text files have only that.

    Raises:
        DataError: a source is missing, empty, or has no such column.
    """
    rows = [row for source in sources for row in _read(source, text_column)]
    if not rows:
        raise DataError(f"{', '.join(sources)} holds no text")
    return rows


def _read(source: str, text_column: str) -> Iterable[Row]:
    path = given_path(source, error=DataError)
    if not path.exists():
        if path.suffix in _ENDINGS:
            raise DataError(f"there is no file {source}; check the path")
        return _checked(_read_dataset(source), source, text_column)
    if path.is_dir():
        raise DataError(f"{source} is a folder; name its files")
    try:
        if path.stat().st_size > _MOST_CHARACTERS:
            raise DataError(f"{source} has {path.stat().st_size} bytes, more than fits in memory; pass a part of it")
        if path.suffix == ".jsonl":
            return _checked(_read_json_lines(path), source, text_column)
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return _checked(list(csv.DictReader(file)), source, text_column)
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source}: {error}") from error
    if "\0" in text[:_LOOKED_AT]:
        raise DataError(f"{source} is no text; pass plain text, .jsonl or .csv, or a data set's name")
    return [{text_column: text}]


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    # Only line feeds end a row: JSON may hold the other line separators of Unicode as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}") from error
    return rows


def _read_dataset(source: str) -> list[Row]:
    import datasets  # takes a second, and only this branch needs it

    name, _, split = source.partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split or "train")]
    except Exception as error:
        raise DataError(
            f"{source!r} is neither a file nor a data set that can be loaded ({type(error).__name__}); "
            "check the path, or write name:split"
        ) from error


def _checked(rows: list[Row], source: str, text_column: str) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"row {number} of {source} is a JSON {type(row).__name__}, expected an object with columns")
        if not isinstance(row.get(text_column), str):
            columns = ", ".join(str(name) for name in row)
            raise DataError(
                f"row {number} of {source} has no text in column {text_column!r}, its columns are: {columns}; "
                "set text_column (--text-column)"
            )
    return rows


def split_sentences(texts: Iterable[str]) -> list[str]:
    """Cuts texts into distinct sentences of 20 to 300 characters, in their order.

    Long sentences are cut at commas and semicolons, so that short phrases are learnt from as well.
    """
    paragraphs = (p for text in texts for p in re.split(r"\n\s*\n|\r", text.replace("<|endoftext|>", "\n\n")))
    sentences = (s for p in paragraphs for s in re.split(r"(?<=[.!?])[\"')\]]*\s+", re.sub(r"\s+", " ", p).strip()))
    return list(dict.fromkeys(piece for sentence in sentences for piece in _pieces(sentence.strip())))


def _pieces(sentence: str) -> Iterable[str]:
    if len(sentence) <= _LONGEST:
        return [sentence] if len(sentence) >= _SHORTEST and re.search(r"[A-Za-z]{3}", sentence) else []
    parts = re.split(r"(?<=[,;:])\s+", sentence)
    return [part for part in parts if _SHORTEST <= len(part) <= _LONGEST and re.search(r"[A-Za-z]{3}", part)]


def shuffled(items: Sequence[Any], *, seed: int) -> list[Any]:
    """Returns the items in an order that depends on the seed only."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def digest(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """SHA-256 over columns of rows, to notice that the data changed between two attempts of a run."""
    sha = hashlib.sha256()
    for row in rows:
        for column in columns:
            sha.update(str(row.get(column)).encode("utf-8", errors="replace") + b"\0")
    return sha.hexdigest()
