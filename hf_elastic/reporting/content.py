"""What a section of a report holds, before it is a page: words, tables, pictures, or why it is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_elastic.reporting.charts import Picture


@dataclass(frozen=True)
class Table:
    """Rows of cells as text.

    Attributes:
        caption: what it holds.
        header: names of the columns; the first column heads its row.
        rows: cells.
        marked: numbers of the rows that matter most.
        shares: for each row a number from 0 to 1 that is drawn as a bar behind its first cell; none without bars.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    shares: Sequence[float] = ()


@dataclass(frozen=True)
class Fact:
    """One number that is to be seen first: what it is, the number, and a word on it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether something that was asked for is so."""

    met: bool
    sentence: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        slug: its place in the page.
        title: its heading.
        words: paragraphs.
        verdicts: what was asked for, and whether it is so.
        facts: numbers to be seen first.
        pictures: each with its numbers as a table below it.
        tables: further tables.
        code: lines to be copied.
    """

    slug: str
    title: str
    words: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    facts: Sequence[Fact] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    code: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A section that a run has nothing for.

    Attributes:
        title: its heading.
        why: the rest of the sentence that begins with the title.
    """

    title: str
    why: str


def number_text(value: Any) -> str:
    """A number for people: 4 digits that say something, units above a thousand; ``-`` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.2f} {unit}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def share_text(value: Any, whole: Any) -> str:
    """A number and which share of a whole it is."""
    known = isinstance(value, int | float) and isinstance(whole, int | float) and whole
    return f"{number_text(value)} ({value / whole:.0%})" if known else number_text(value)


def seconds_text(seconds: Any) -> str:
    """A duration for people."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
