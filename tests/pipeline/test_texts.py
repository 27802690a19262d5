from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_elastic import DataError
from hf_elastic.pipeline.texts import digest, read_rows, shuffled, split_sentences


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    assert read_rows([str(tmp_path / "a.txt")], text_column="t") == [{"t": "one\ntwo"}]


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    rows = read_rows([str(tmp_path / f"{name}.txt") for name in "ba"], text_column="text")
    assert [row["text"] for row in rows] == ["b", "a"]


def test_rows_of_json_keep_all_columns_and_odd_line_separators(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c\nd", "label": 1}, {"text": "e", "label": "x"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    assert read_rows([str(tmp_path / "a.jsonl")], text_column="text") == rows


def test_rows_of_csv_are_read_by_their_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"a, ""b""",1\nc,0\n', encoding="utf-8")
    rows = read_rows([str(tmp_path / "a.csv")], text_column="text")
    assert rows == [{"text": 'a, "b"', "label": "1"}, {"text": "c", "label": "0"}]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "no column": ("a.jsonl", b'{"text": "a"}\n{"body": "b", "label": 1}', "row 2 of .*'text'.*body, label"),
    "a column of numbers": ("a.jsonl", b'{"text": 3}', "row 1 of .*'text'"),
    "rows of lists": ("a.jsonl", b"[1, 2]", "row 1 of .* is a JSON list"),
    "a broken row": ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is no JSON"),
    "rows nested beyond reading": ("a.jsonl", b"[" * 100_000, "line 1 of .* is no JSON"),
    "another encoding": ("a.jsonl", b'{"text": "\xff"}', "cannot read"),
    "csv without the column": ("a.csv", b"body,label\na,1\n", "'text'.*body, label"),
    "csv with a short row": ("a.csv", b"label,text\n1\n", "row 1"),
    "csv with a long row": ("a.csv", b"label\n1,2,3\n", "'text'"),
    "csv with an endless field": ("a.csv", b"text\n" + b"a" * 200_000, "cannot read"),
    "something binary": ("a.parquet", b"PAR1\0\0\0", "is no text"),
    "empty rows": ("a.jsonl", b"\n\n", "holds no text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unreadable_data_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, contents, words = BROKEN[case]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=words) as caught:
        read_rows([str(tmp_path / name)], text_column="text")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_missing_file_is_not_looked_up_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(DataError, match="there is no file"):
        read_rows([str(tmp_path / "nowhere.txt")], text_column="text")


def test_a_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_rows([str(tmp_path)], text_column="text")


def test_a_data_set_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(["me/some-set", "other:test"], text_column="text") == [{"text": "a"}] * 2
    assert asked == [("me/some-set", "train"), ("other", "test")]


def test_a_name_that_is_neither_file_nor_data_set_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, split: str) -> None:
        raise FileNotFoundError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="neither a file nor a data set") as caught:
        read_rows(["me/nowhere"], text_column="text")
    assert "\n" not in str(caught.value)


def test_sentences_are_distinct_whole_and_in_order() -> None:
    text = 'The first sentence is here. "A second one follows it!" Short. The first sentence is here.'
    assert split_sentences([text + "\n\nA paragraph that is new"]) == [
        "The first sentence is here.", '"A second one follows it!', "A paragraph that is new",
    ]  # fmt: skip


def test_long_sentences_are_cut_at_commas() -> None:
    clause = "this clause of the sentence has some forty letters"
    pieces = split_sentences([", ".join([f"{clause} {n}" for n in range(9)]) + "."])
    assert len(pieces) == 9 and all(20 <= len(piece) <= 300 for piece in pieces)


@given(st.lists(st.text(alphabet="abc .,!?\n\"'", max_size=400), max_size=4))
def test_every_sentence_is_of_20_to_300_characters_and_has_no_line_break(texts: list[str]) -> None:
    found = split_sentences(texts)
    assert len(set(found)) == len(found)
    assert all(20 <= len(sentence) <= 300 and "\n" not in sentence for sentence in found)


def test_the_order_of_shuffled_items_depends_on_the_seed_only() -> None:
    items = list(range(50))
    assert shuffled(items, seed=1) == shuffled(items, seed=1) != shuffled(items, seed=2)
    assert sorted(shuffled(items, seed=1)) == items == list(range(50))


def test_the_digest_sees_every_named_column_and_its_borders() -> None:
    rows = [{"text": "ab", "label": 1}, {"text": "c", "label": 0}]
    assert digest(rows, ["text"]) == digest([{"text": "ab"}, {"text": "c"}], ["text"])
    assert digest(rows, ["text"]) != digest([{"text": "a"}, {"text": "bc"}], ["text"])
    assert digest(rows, ["text", "label"]) != digest([{**row, "label": 1} for row in rows], ["text", "label"])
