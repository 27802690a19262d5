"""The documentation as a site: links lead somewhere, public names are described, numbers are those of the results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from page_snippets import ROOT, pages
from typer.core import TyperGroup

import hf_elastic
from hf_elastic.cli import app

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE = re.compile(r"""(?:<(?:script|img|iframe)[^>]+src|<link[^>]+href)=["']?((?:https?:)?//[^"'\s>]+)""")
FETCHED_BY_STYLES = re.compile(r"url\(([\"']?https?:[^)]+)\)")
MADE_BY_THE_SITE = {"readme.md"}


def prose(page: str) -> str:
    """A page without its fenced blocks and code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings, and those that the API reference makes of names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = (re.sub(r"[^\w\s-]", "", title.lower()) for title in re.findall(r"^#+ +(.*)$", text, re.MULTILINE))
    return {heading.strip().replace(" ", "-") for heading in headings} | set(re.findall(r"^::: (\S+)", text, re.M))


def broken_links(page: str) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            yield f"{page}: there is no {link}"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            yield f"{page}: {link} has no such heading"


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_and_headings_that_there_are(page: str) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("## A heading, here\n")
    (tmp_path / "a.md").write_text("[x](b.md#a-heading-here) [y](b.md#other) [z](c.md) `[no](d.md)`\n")
    said = [line.split(": ")[1] for line in broken_links("a.md")]
    assert said == ["b.md#other has no such heading", "there is no c.md"]


def test_the_contents_name_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w/-]+\.md$", text.partition("\nnav:")[2], re.MULTILINE)
    there = {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")}
    assert sorted(listed) == sorted(there | MADE_BY_THE_SITE)


def test_every_public_name_is_in_the_reference_and_its_index() -> None:
    folder = ROOT / "docs" / "api"
    described = {
        name.rpartition(".")[2]
        for page in folder.glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    public = set(hf_elastic.__all__) - {"__version__"}
    errors = {name for name in public if name.endswith("Error")}
    assert sorted(public - errors - described) == [] and "errors" in described
    index = (folder / "index.md").read_text(encoding="utf-8")
    assert sorted(name for name in described if f"[`{name}`]" not in index) == []


@pytest.mark.usefixtures("scripts")
def test_pages_hold_the_numbers_of_the_results() -> None:
    methods = import_module("render_methods")
    stale = [page for page, text in methods.written(methods.results()).items() if text != _text(ROOT / page)]
    assert stale == [], "run python benchmarks/render_methods.py"


@pytest.mark.usefixtures("scripts")
def test_the_figure_shows_the_numbers_of_the_results() -> None:
    figure, methods = import_module("figure_minilm"), import_module("render_methods")
    points = figure.points(methods.results())
    assert figure.drawing(points) == _text(figure.FIGURE), "run python benchmarks/figure_minilm.py"
    inside = [figure.LEFT < figure.x(p.speedup) < figure.WIDTH and 0 < figure.y(p.kept) < figure.HEIGHT for p in points]
    assert all(inside) and len(points) == 9


@pytest.mark.usefixtures("scripts")
def test_rows_of_methods_name_pages_commands_functions_and_tests_that_there_are() -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    for method in import_module("render_methods").METHODS:
        assert (ROOT / "docs" / method.page).is_file() and (ROOT / "tests" / method.test).is_file(), method
        assert set(method.api) <= set(hf_elastic.__all__), method
        name, *words = method.command.split() or [""]
        options = {option for param in commands.commands[name].params for option in param.opts} if name else set()
        assert {word for word in words if word.startswith("--")} <= options, method


@pytest.mark.usefixtures("scripts")
def test_a_page_without_marks_is_refused() -> None:
    placed = import_module("render_methods").placed
    assert placed("a <!-- x -->old<!-- /x --> b", "x", "new") == "a <!-- x -->\n\nnew\n\n<!-- /x --> b"
    with pytest.raises(SystemExit, match="<!-- y -->"):
        placed("a <!-- x --><!-- /x -->", "y", "new")


def runtime_row(model: str, weights: str, *, speed: float, kept: float) -> dict[str, Any]:
    runtime = "onnx" if weights == "int8" or model != "parent" else "torch"
    return {"model": model, "runtime": runtime, "weights": weights, "speed-up 16x128": speed, "spearman": 0.8 * kept,
            "kept": kept}  # fmt: skip


@pytest.mark.usefixtures("scripts")
def test_the_crossover_of_int8_is_where_a_cut_gets_faster_than_int8_alone() -> None:
    crossovers = import_module("render_crossovers")
    alone = [runtime_row("parent", "fp32", speed=1, kept=1), runtime_row("parent", "int8", speed=2.9, kept=0.997)]
    ours = [runtime_row("cut", "fp32", speed=1.6, kept=0.97), runtime_row("cut", "int8", speed=4.1, kept=0.965)]
    said = crossovers.int8({"rows": [*alone, *ours], "environment": {"threads": 1}})
    assert "INT8 alone is 2.90x as fast as the parent in torch and keeps 99.7%" in said
    assert "None of the 1 cuts in floats" in said and "up to 2.9x take INT8 alone" in said and "4.10x at 96.5%" in said
    slower = [*alone, runtime_row("cut", "int8", speed=2.5, kept=0.99)]
    assert "No cut measured here was faster" in crossovers.int8({"rows": slower, "environment": {}})


@pytest.mark.usefixtures("scripts")
def test_the_crossovers_of_cuts_and_zeros_are_the_first_that_are_surely_faster() -> None:
    crossovers, found = import_module("render_crossovers"), import_module("render_methods").results()
    rows = [
        {"FFN width": round(1000 * share), "parameters left": share, "if time followed": 1 / share, "speed-up": speed,
         "low": speed - 0.1, "high": speed + 0.1}
        for share, speed in ((0.9, 1.1), (0.8, 1.2), (0.5, 1.6))
    ]  # fmt: skip
    assert "crossover is 80% of the parameters" in crossovers.cuts(rows, 1.05, found)
    lucky = [{**rows[0], "low": 1.06}, {**rows[1], "low": 1.0}, rows[2]]  # a larger cut that is not surely faster
    assert "crossover is 50% of the parameters" in crossovers.cuts(lucky, 1.05, found)
    assert "No cut measured here is surely 5% faster" in crossovers.cuts(rows[:1], 1.05, found)
    kernels = [
        {"zeros": share, "served as": how, "speed-up": speed, "low": speed - 0.1, "high": speed + 0.1}
        for share, sparse in ((0.5, 0.4), (0.9, 1.05), (0.95, 1.5))
        for how, speed in (("dense matrix", 1.0), ("sparse matrix", sparse))
    ]
    assert "crossover is 95% zeros" in crossovers.zeros(kernels, 8, found)
    assert "slower up to 50% zeros" in crossovers.zeros(kernels[:2], 8, found)


@pytest.mark.usefixtures("scripts")
def test_crossovers_are_measured_for_every_cut_and_share_of_zeros(tmp_path: Path) -> None:
    script, threads = import_module("crossovers"), torch.get_num_threads()
    sizes = "--layers 1 --hidden 48 --batch 1 --length 8 --pairs 2 --json"
    script.main([*sizes.split(), str(tmp_path / "found.json")])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    widths = [row["FFN width"] for row in found["cuts"]]
    assert len(widths) == len(script.SHARES) + 2 and widths[0] == 192 and all(w % 32 == 0 for w in widths[:-1])
    assert len(found["zeros"]) == 2 * len(script.ZEROS) and found["settings"]["worth"] == script.WORTH
    assert all(row["low"] <= row["speed-up"] <= row["high"] for row in found["cuts"] + found["zeros"])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("mkdocs") is None, reason='the site is built with pip install -e ".[docs]"')
def test_the_site_is_built_without_warnings_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    for name in ("docs", "hf_elastic", "examples", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    built = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(built, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    outside = {
        found
        for file in [*site.rglob("*.html"), *site.rglob("*.css")]
        for pattern in (OUTSIDE, FETCHED_BY_STYLES)
        for found in pattern.findall(file.read_text(encoding="utf-8"))
    }
    assert outside == set()
    readme = (site / "readme.html").read_text(encoding="utf-8")
    assert 'href="choose.html"' in readme and 'src="figures/minilm.svg"' in readme
    assert (site / "source" / "hf_elastic" / "families.py.html").is_file()
