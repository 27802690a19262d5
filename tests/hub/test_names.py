"""Names on the Hub, told from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_elastic.hub.names import dataset_name, hub_name


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


def test_data_sets_are_told_from_files(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    assert dataset_name("glue") == "glue" and dataset_name("user/data:train") == "user/data"
    assert [dataset_name(s) for s in ("my.txt", "a/b.jsonl", str(tmp_path / "data"), "x.csv")] == [None] * 4
