"""The Pareto front of a run goes with its card where it was searched and can be drawn; else the push says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import made
import pytest
from huggingface_hub import HfApi
from tiny_models import supernet_of

import hf_elastic as he
from hf_elastic.hub.pushing import plan_push, push_to_hub
from hf_elastic.reporting import write_figures

SHOWN = "![Pareto front of the search](pareto_front.svg)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a copy of its run's record; the run with its search lies beside it."""
    folder = made.remote(tmp_path_factory.mktemp("run") / "small")
    found = json.loads((folder / "architecture.json").read_text())["architecture"]
    supernet = supernet_of("llama")
    goals = [
        he.Objective("loss", lambda point: sum(sum(map(ord, f"{name}{value}")) % 13 for name, value in point.items())),
        he.objectives.parameters(supernet),
    ]
    work = folder.with_name("small.run")
    he.search_subnets(supernet.space, goals, algorithm="random", evaluations=30, progress=False).save(
        work / "search.json"
    )
    record = {
        "format": 1, "options": {"within": {}, "model": "me/parent", "seed": 0}, "versions": {},
        "stages": {"search": {"architecture": found}},
    }  # fmt: skip
    for place in (folder, work):
        (place / "result.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def small(run: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    for name in ("small", "small.run"):
        shutil.copytree(run.with_name(name), tmp_path / name)
    return tmp_path / "small"


def files_of(hub: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = hub.repositories["tester/small"].files()
    return found


def test_the_front_that_a_report_draws_is_pushed_beside_the_card_that_shows_it(
    hub: Any, small: Path, tmp_path: Path
) -> None:
    wanted = {path.name: path.read_bytes() for path in write_figures(small.with_name("small.run"), tmp_path / "drawn")}
    report = push_to_hub(small, "small")  # a name without its user makes the card twice
    assert files_of(hub)["pareto_front.svg"] == wanted["front.svg"] and SHOWN in files_of(hub)["README.md"].decode()
    assert not any("figure" in note for note in report.notes) and not (small / "pareto_front.svg").exists()
    assert push_to_hub(small, "tester/small").commit == report.commit  # equal runs give equal pictures


def test_the_front_is_found_from_the_run_that_is_named(small: Path) -> None:
    (small / "result.json").unlink()
    work = small.with_name("small.run").rename(small.with_name("elsewhere"))
    for named in (work, work / "result.json"):
        plan = plan_push(small, "tester/small", run=named)
        assert SHOWN in plan.card and plan.files["pareto_front.svg"] > 1000


def test_without_a_search_there_is_no_figure_and_nothing_to_say(small: Path) -> None:
    (small.with_name("small.run") / "search.json").unlink()
    for spoil in (lambda: None, lambda: shutil.rmtree(small.with_name("small.run")), (small / "result.json").unlink):
        spoil()
        plan = plan_push(small, "tester/small")
        assert "pareto_front.svg" not in plan.files and "![" not in plan.card
        assert not any("figure" in note for note in plan.notes)


def test_the_search_of_another_run_is_not_drawn(small: Path) -> None:
    work = small.with_name("small.run") / "result.json"
    record = json.loads(work.read_text())
    work.write_text(json.dumps({**record, "options": {**record["options"], "seed": 1}}))
    assert "pareto_front.svg" not in plan_push(small, "tester/small").files


def test_a_front_that_cannot_be_drawn_is_said_and_the_card_does_without(
    hub: Any, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        report = push_to_hub(small, "tester/small")
    assert any("the card has no figure" in n and 'pip install "hf-elastic[report]"' in n for n in report.notes)
    (small.with_name("small.run") / "search.json").write_text("{")
    broken = push_to_hub(small, "tester/small")
    assert any("the card has no figure of the Pareto front: " in n and "search.json" in n for n in broken.notes)
    assert "pareto_front.svg" not in files_of(hub) and "![" not in files_of(hub)["README.md"].decode()


def test_a_picture_that_is_given_goes_before_the_one_that_could_be_drawn(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"picture")
    plan = plan_push(small, "tester/small", figure=tmp_path / "mine.png")
    assert plan.files["pareto_front.png"] == 7 and "pareto_front.svg" not in plan.files


def test_no_front_is_pushed_that_no_card_shows(hub: Any, small: Path) -> None:
    hub.new("tester/small")
    HfApi().upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="tester/small")
    assert "pareto_front.svg" not in push_to_hub(small, "tester/small").files
    (small / "README.md").write_text("# Mine\n")
    assert "pareto_front.svg" not in plan_push(small, "tester/small").files
