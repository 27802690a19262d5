"""Sections as one HTML file: style, script and plotly.js inside it, nothing from elsewhere, every text escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from hf_elastic.reporting.charts import Cells, Chart, Picture
from hf_elastic.reporting.content import Fact, LeftOut, Section, Table, Verdict, number_text
from hf_elastic.reporting.plotly_form import figure_of, numbers_of

_MOST_ROWS = 400  # of the numbers below a chart
_CROWDED = 8  # series from which on a chart needs the whole width
_SMALL = 4  # pictures of a section from which on they are small
# The browser itself refuses whatever is not in the file.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page_of(title: str, sections: Sequence[Section], left_out: Sequence[LeftOut]) -> str:
    """One HTML document."""
    from plotly.offline import get_plotlyjs

    figures = {picture.slug: figure_of(picture) for section in sections for picture in section.pictures}
    links = "".join(f'<a href="#{_text(s.slug)}">{_text(s.title)}</a>' for s in sections)
    scripts = f"<script>{get_plotlyjs()}</script>\n" if figures else ""
    scripts += f'<script type="application/json" id="figures">{_json(figures)}</script>\n' if figures else ""
    scripts += f"<script>{_own('page.js')}</script>\n" if figures else ""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_own('page.css')}</style>\n</head>\n<body>\n"
        f'<header><h1>{_text(title)}</h1>\n<nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>\n{body}\n</main>\n<footer>{_missing(left_out)}</footer>\n{scripts}</body>\n</html>\n"
    )


def _own(name: str) -> str:
    return files("hf_elastic.reporting").joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(section: Section) -> str:
    parts = [f'<section id="{_text(section.slug)}">', f"<h2>{_text(section.title)}</h2>"]
    parts += [f"<p>{_text(words)}</p>" for words in section.words]
    parts += [_verdicts(section.verdicts)] if section.verdicts else []
    parts += [_facts(section.facts)] if section.facts else []
    parts += [_pictures(section.pictures)] if section.pictures else []
    parts += [table_html(table) for table in section.tables]
    parts += [f"<pre><code>{_text(section.code)}</code></pre>"] if section.code else []
    return "\n".join([*parts, "</section>"])


def _verdicts(verdicts: Iterable[Verdict]) -> str:
    shown = ((*(("met", "met") if one.met else ("missed", "MISSED")), _text(one.sentence)) for one in verdicts)
    lines = (f'<li><b class="{look}">{word}</b> {sentence}</li>' for look, word, sentence in shown)
    return f'<ul class="verdicts">{"".join(lines)}</ul>'


def _facts(facts: Iterable[Fact]) -> str:
    cards = (
        f"<div><dt>{_text(fact.name)}</dt><dd>{_text(fact.value)}</dd>"
        + (f'<dd class="note">{_text(fact.note)}</dd>' if fact.note else "")
        + "</div>"
        for fact in facts
    )
    return f'<dl class="facts">{"".join(cards)}</dl>'


def _pictures(pictures: Sequence[Picture]) -> str:
    small = len(pictures) > _SMALL and all(isinstance(picture, Cells) for picture in pictures)
    wide = [isinstance(picture, Chart) and len(picture.series) >= _CROWDED for picture in pictures]
    if not small and (len(pictures) - sum(wide)) % 2 == 1:  # the first of those that would stand alone
        wide[wide.index(False)] = True
    drawn = (_picture(picture, wide=is_wide) for picture, is_wide in zip(pictures, wide, strict=True))
    return f'<div class="pictures{" small" if small else ""}">{"".join(drawn)}</div>'


def _picture(picture: Picture, *, wide: bool) -> str:
    slug, label = _text(picture.slug), _text(f"{picture.title}. {picture.description}")
    header, rows = numbers_of(picture)
    cells = [[number_text(cell) for cell in row] for row in rows[:_MOST_ROWS]]
    more = f", {len(rows) - _MOST_ROWS} more in the run's files" if len(rows) > _MOST_ROWS else ""
    numbers = table_html(Table(f"Numbers of: {picture.title}{more}", header, cells))
    return (
        f'<figure{" class=wide" if wide else ""} id="{slug}"><h3>{_text(picture.title)}</h3>'
        f"<figcaption>{_text(picture.description)}</figcaption>"
        f'<div class="chart" id="chart-{slug}" role="img" aria-label="{label}"></div>'
        f"<noscript><p>Scripts are off; the numbers are below.</p></noscript>"
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def table_html(table: Table) -> str:
    """A table in a box that scrolls by itself, also by keyboard."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    body = "".join(_row(table, number, row) for number, row in enumerate(table.rows))
    look = " class=barred" if table.shares else " class=plain" if len(table.header) == 2 else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.caption)}"><table{look}>'
        f"<caption>{_text(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(table: Table, number: int, row: Sequence[str]) -> str:
    bar = f'<span class="bar" style="width:{table.shares[number]:.1%}"></span>' if table.shares else ""
    first = f'<th scope="row">{_text(row[0])}{bar}</th>'
    marked = " class=marked" if number in table.marked else ""
    return f"<tr{marked}>{first}{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>"


def _missing(left_out: Sequence[LeftOut]) -> str:
    lines = "".join(f"<li>{_text(one.title)} {_text(one.why)}.</li>" for one in left_out)
    return f"<p>Not in this report:</p><ul>{lines}</ul>" if lines else ""
