"""Markdown in which nothing that a record holds can become markup."""

from __future__ import annotations

from collections.abc import Sequence


def code(text: object) -> str:
    """A name as code, on one line and without what would end it."""
    shown = " ".join(str(text).split()).replace("`", "'").replace("|", "/")
    return f"`{shown[:200]}`"


def prose(text: object) -> str:
    """A text on one line, in which nothing is markup."""
    shown = " ".join(str(text).split())[:300]
    for mark in "\\`*_[]|#":
        shown = shown.replace(mark, f"\\{mark}")
    return shown.replace("<", "&lt;").replace(">", "&gt;")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    rule = [":--", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
