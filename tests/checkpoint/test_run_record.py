from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_elastic import CheckpointError
from hf_elastic.checkpoint.run_record import RESULT_FILE, RunRecord, read_record

OPTIONS = {"model": "m", "within": {"parameters": 0.6}, "data": ["a.txt"], "seed": 0}


def test_a_new_record_holds_options_versions_and_no_stage(tmp_path: Path) -> None:
    RunRecord(tmp_path / "run", OPTIONS)
    data = json.loads((tmp_path / "run" / RESULT_FILE).read_text())
    assert data["options"] == OPTIONS and data["stages"] == {}
    assert {"torch", "transformers", "optuna"} <= set(data["versions"])
    assert set(data["machine"]) == {"platform", "python"}


def test_a_record_is_continued_with_what_it_knows(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, OPTIONS)
    with record.stage("search"):
        record.note("search", best=0.5)
    again = RunRecord(tmp_path, dict(OPTIONS))
    assert again.finished("search") and not again.finished("export")
    assert again.numbers("search")["best"] == 0.5 and again.numbers("export") == {}
    assert again.data == record.data


def test_a_stage_that_fails_is_not_finished_and_its_seconds_add_up(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, OPTIONS)
    for _ in range(2):
        with pytest.raises(KeyError), record.stage("train"):
            raise KeyError
    assert not record.finished("train")
    record.note("train", seconds=100.0)
    with record.stage("train"):
        pass
    assert record.finished("train") and record.numbers("train")["seconds"] >= 100


def test_what_a_stage_noted_is_on_disk_before_it_ends(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, OPTIONS)
    with record.stage("plan"):
        record.note("plan", steps=7)
        assert json.loads((tmp_path / RESULT_FILE).read_text())["stages"]["plan"] == {"steps": 7}


def test_numbers_are_a_copy(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, OPTIONS)
    record.note("plan", steps=7)
    record.numbers("plan")["steps"] = 8
    assert record.numbers("plan") == {"steps": 7}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed=0, now 1"),
        ({"within": {"parameters": 0.5}}, "within={'parameters': 0.6}, now {'parameters': 0.5}"),
        ({"new": 3}, "new=None, now 3"),
        ({"long": "x" * 1000}, r"long=None, now 'x+\.\.\.;"),
        ({"text": "x" * 1000}, "made from another text under the same name; restore it"),
        ({"parent": "x"}, "made from another checkpoint under the same name; restore it"),
    ],
)
def test_other_options_are_refused_by_name(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    RunRecord(tmp_path, OPTIONS)
    before = (tmp_path / RESULT_FILE).read_bytes()
    with pytest.raises(CheckpointError, match=words) as caught:
        RunRecord(tmp_path, {**OPTIONS, **changes})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert (tmp_path / RESULT_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "contents",
    ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "options": {}, "stages": {"train": 3}}',
     '{"format": 1, "options": [], "stages": {}}'],
)  # fmt: skip
def test_a_record_of_something_else_is_refused_and_kept(tmp_path: Path, contents: str) -> None:
    (tmp_path / RESULT_FILE).write_text(contents)
    with pytest.raises(CheckpointError) as caught:
        RunRecord(tmp_path, OPTIONS)
    assert "\n" not in str(caught.value) and RESULT_FILE in str(caught.value)
    assert (tmp_path / RESULT_FILE).read_text() == contents
    with pytest.raises(CheckpointError):
        read_record(tmp_path / RESULT_FILE)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        RunRecord(tmp_path / "file" / "run", OPTIONS)


def test_a_number_that_json_cannot_hold_leaves_the_record_whole(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, OPTIONS)
    with pytest.raises(ValueError):
        record.note("compare", quality=float("nan"))
    assert RunRecord(tmp_path, OPTIONS).numbers("compare") == {}
    assert [file.name for file in tmp_path.iterdir()] == [RESULT_FILE]
