"""Reads a report as a browser would: tables, charts, what it refers to."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """What is in a page: cells of tables by caption, elements, text, the data of its charts."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self._rows: list[list[str]] = []
        self._caption, self._figures = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.figures: dict[str, Any] = json.loads(self._figures or "{}")

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside.append(tag if dict(attributes).get("id") != "figures" else "figures")
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        if tag in ("meta", "link", "img"):
            self._inside.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption] = self._rows
        if self._inside:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["figures"]:
            self._figures += data
        elif self._inside[-1:] == ["caption"]:
            self._caption += data
        elif "td" in self._inside or "th" in self._inside:
            self._rows[-1][-1] += data
        elif not {"script", "style"} & set(self._inside):
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def trace(self, figure: str, name: str) -> dict[str, Any]:
        """The series of a chart that is called so."""
        return next(one for one in self.figures[figure]["data"] if one.get("name") == name)
