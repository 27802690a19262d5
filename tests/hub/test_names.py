"""Names on the Hub, told from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_elastic.hub.names import dataset_name, hub_name, local_folder, without_folders


@pytest.mark.parametrize("name", ["gpt2", "user/model", "User-1/a.b_c"])
def test_names_are_names(name: str) -> None:
    assert hub_name(name) == name


@pytest.mark.parametrize("name", [None, 7, "", "/home/me/model", "a/b/c", "../up", "C:\\models\\x", "a b", "~/model"])
def test_what_is_no_name_is_none(name: object) -> None:
    assert hub_name(name) is None


def test_a_folder_of_that_name_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("user/model") is None and hub_name("user/other") == "user/other"


def test_a_snapshot_in_the_cache_has_the_name_of_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub_name(str(snapshot)) == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub_name(str(tmp_path / "models--gpt2" / "snapshots" / "abc")) == "gpt2"


def test_a_relative_folder_is_found_from_any_folder_above_the_record(tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    record = tmp_path / "out" / "deep" / "adapter"
    record.mkdir(parents=True)
    assert hub_name("out/model") == "out/model" and hub_name("out/model", beside=record) is None
    assert local_folder("out/model", beside=record) == tmp_path / "out" / "model"
    assert hub_name("out/other", beside=record) == "out/other" and local_folder("out/other", beside=record) is None


def test_a_reader_sees_names_and_no_folders(tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    record = tmp_path / "out" / "adapter"
    record.mkdir()
    cases = {
        "gpt2": "gpt2", "user/model": "user/model", "/home/me/model/": "model", "../up/model": "model",
        "C:\\me\\model": "model", "out/model": "model",
        "/x/hub/models--user--model/snapshots/0123": "user/model",
        "/x/hub/datasets--user--data/snapshots/0123": "user/data",
    }  # fmt: skip
    assert {text: without_folders(text, beside=record) for text in cases} == cases


def test_data_sets_are_told_from_files(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    assert dataset_name("glue") == "glue" and dataset_name("user/data:train") == "user/data"
    assert [dataset_name(s) for s in ("my.txt", "a/b.jsonl", str(tmp_path / "data"), "x.csv")] == [None] * 4
