"""``hf-elastic elm`` and ``hf-elastic reproduce elm``: what is printed, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Command
from tiny_checkpoints import language_model, write_text
from transformers import AutoTokenizer

from hf_elastic import ElmOptions
from hf_elastic.cli import app
from hf_elastic.errors import DataError, SearchError
from hf_elastic.pipeline import elm_reproduction
from hf_elastic.pipeline.elm_reproduction import teacher_with_tokenizer
from hf_elastic.pipeline.reproduction import reproduce

pytestmark = pytest.mark.usefixtures("nano")
Find = Callable[[str], Path]
FAST = ["--size", "nano", "--steps", "10", "--batch-size", "4", "--sequence-length", "16", "--evaluations", "6",
        "--device", "cpu"]  # fmt: skip


def test_the_command_has_every_option_with_the_default_of_python() -> None:
    command = typer.main.get_command(app).commands["elm"]  # type: ignore[attr-defined]
    given = {parameter.name: parameter.default for parameter in command.params}
    assert {entry.name for entry in fields(ElmOptions)} == given.keys() - {"dry_run", "help"}
    for entry in fields(ElmOptions):
        if entry.name not in ("teacher", "data", "output", "finetune"):
            assert given[entry.name] == entry.default, entry.name


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    command: Command, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    text = data("causal-lm")
    before = set(tmp_path.iterdir())
    ended = command(
        "elm", checkpoint("causal-lm"), "--data", text, "--output", tmp_path / "small", *FAST, "--dry-run",
        "--finetune", data("classification"), "--weights", "fresh", "--retrain-epochs", "20",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    for words in (
        "ElasticGPT2ForCausalLM supernet of size nano for causal-lm",
        "2 instead of 3, of which the teacher has 2; 24 wide, 3 heads, FFNs of 8 to 32 in steps of 8",
        "36 from 2 choices of 6 blocks",
        "of the mean path: K=4 blocks every 1 steps, 9 times; scores every 1 steps",
        "10 steps of 4 sequences",
        "then 20 of the found path, from new weights",
        "relational: 5 states by correlation, layer by layer, and predictions; labels of the text beside them",
        "6 evaluations within total_parameters=",
        "merge above a CKA of 0.9",
        "fine-tuning    3 epochs on",
    ):
        assert words in ended.out
    assert set(tmp_path.iterdir()) == before


def test_a_run_prints_its_table_and_the_same_command_shows_it_again(
    command: Command, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    arguments = ["elm", checkpoint("masked-lm"), "--data", data("masked-lm"), "--output", tmp_path / "small", *FAST]
    arguments += ["--within", "total_parameters=0.9,macs=0.9", "--no-growth"]
    arguments += ["--fusion", "remove", "--threshold", "0.5"]
    first, again = command(*arguments), command(*arguments)
    assert (first.code, again.code) == (0, 0), first.err
    for ended in (first, again):
        for words in ("after head fusion", "after retraining", "total parameters", "perplexity", "loads as"):
            assert words in ended.out
    assert "searched 6 paths" in first.out and "head fusion (remove, CKA above 0.5)" in first.out
    record = json.loads((tmp_path / "small" / "result.json").read_text())
    assert record["options"]["within"] == {"total_parameters": 0.9, "macs": 0.9} and not record["options"]["growth"]
    assert "run of ELM: size nano" in command("info", tmp_path / "small").out
    other = command(*arguments, "--seed", "1")
    assert other.code == 2 and "holds a run with --seed 0, now 1" in other.err and other.err.count("\n") == 1
    for name in ("small.run", "small"):
        folder, output = tmp_path / name, tmp_path / "no"
        for verb, *words in (
            ("search", "--within", "macs=0.9"), ("family", "--speedup", "2"), ("export", "largest", "--output", output),
        ):  # fmt: skip
            refused = command(verb, folder, *words)
            assert refused.code == 2 and refused.err.count("\n") == 1 and not (tmp_path / "no").exists()
            assert (
                f"hf-elastic export {tmp_path}/small.run/supernet '{tmp_path}/small.run/search.json#1'" in refused.err
            )
    row = f"{tmp_path / 'small.run' / 'search.json'}#1"
    exported = command("export", tmp_path / "small.run" / "supernet", row, "--output", tmp_path / "first")
    assert exported.code == 0, exported.err
    blocks = json.dumps({f"layers.{n}.block": "standard" for n in range(3)})
    exported = command("export", tmp_path / "small.run" / "supernet", blocks, "--output", tmp_path / "other")
    assert exported.code == 0 and (tmp_path / "other" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "huge"], "--size huge is not one of"),
        (["--layers", "2"], "--layers 2 does not divide the teacher's 3 layers"),
        (["--total-parameters", "1e9"], "--total-parameters 1,000,000,000 is above"),
        (["--evaluations", "2"], "--evaluations 2 must be an integer of at least 4"),
        (["--within", "macs=0.001"], "no path keeps macs=0.001"),
        (["--within", "macs"], "not of the form name=number"),
        (["--stream", "--data", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_an_error_is_one_line(
    command: Command, checkpoint: Find, data: Find, tmp_path: Path, arguments: list[str], words: str
) -> None:
    usual = list(FAST)
    if arguments[0] in usual and arguments[0] != "--within":  # an option of one value is given once
        place = usual.index(arguments[0])
        del usual[place : place + 2]
    ended = command(
        "elm", checkpoint("masked-lm"), "--data", data("masked-lm"), "--output", tmp_path / "small", *usual, *arguments
    )  # fmt: skip
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_retraining_has_no_row_of_it_and_a_missed_size_is_said(
    command: Command, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    arguments = ["elm", checkpoint("causal-lm"), "--data", data("causal-lm"), "--output", tmp_path / "small", *FAST]
    arguments += ["--retrain-epochs", "0", "--growth-every", "9", "--threshold", "0.01"]
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    assert "after head fusion" in ended.out and "after retraining" not in ended.out
    assert "MISSED what it was to grow to: train longer" in ended.out and "ended by" not in ended.out
    assert "stopped at min_heads in 2 of 2 blocks" in ended.out


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data as the reproduction wants it, with a teacher of seconds."""
    root = tmp_path / "data"
    language_model(root / "stories260K" / "hf", num_hidden_layers=2)
    (root / "tinystories").mkdir()
    write_text(root / "tinystories" / "train_944k.txt")
    small = {**elm_reproduction._SCALES["small"], "size": "nano", "batch_size": 4, "sequence_length": 16}
    monkeypatch.setitem(elm_reproduction._SCALES, "small", small)  # type: ignore[arg-type]
    return root


def test_a_reproduction_says_what_the_paper_has_what_we_have_and_what_differs(
    command: Command, stories: Path, tmp_path: Path
) -> None:
    arguments = ["reproduce", "elm", "--data", stories, "--output", tmp_path / "out", "--steps", "10"]
    ended = command(*arguments, "--evaluations", "6")
    assert ended.code == 0, ended.err
    for words in (
        "15.6 M (ELM-Small)", "GLUE 84.5 (ELM-Small)", "15-25 %, both together", "NOT FOUND", "7.1 GPU days",
        "what differs:", "teacher: paper BERT-base, ours stories260K", "evaluations: paper 2000", "ours 6",
        "arXiv 2510.27037",
    ):  # fmt: skip
        assert words in ended.out
    assert "learning rate: paper 0.0001" in ended.out and (tmp_path / "out" / "elm" / "config.json").is_file()
    again = command(*arguments, "--evaluations", "6")
    assert ended.out.split("\n")[-25:] == again.out.split("\n")[-25:]


def test_a_reproduction_at_full_scale_takes_files_and_the_papers_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[ElmOptions] = []

    def stop(options: ElmOptions, *, say: Any) -> None:
        asked.append(options)
        raise DataError("far enough")

    monkeypatch.setattr(elm_reproduction, "ElmRun", stop)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match="far enough"):
        reproduce("elm", output=tmp_path / "out", scale="full", data=tmp_path)
    (options,) = asked
    assert options.teacher == "google-bert/bert-base-uncased" and options.size == "small"
    assert (options.batch_size, options.learning_rate, options.epochs, options.weights) == (256, 1e-4, 10.0, "fresh")
    assert options.data == (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    with pytest.raises(DataError, match="far enough"):
        reproduce("elm", output=tmp_path / "out", scale="full", data="wikitext:train", model="other", steps=5)
    assert asked[1].teacher == "other" and asked[1].data == ("wikitext:train",) and asked[1].steps == 5
    assert (asked[0].stream, asked[1].stream) == (False, True)


def test_a_reproduction_without_data_or_scale_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_ELASTIC_DATA", raising=False)
    with pytest.raises(DataError, match="elm needs tinystories/train_944k.txt and stories260K/hf"):
        reproduce("elm", output=tmp_path / "out")
    with pytest.raises(DataError, match="scale full needs text"):
        reproduce("elm", output=tmp_path / "out", scale="full")
    with pytest.raises(DataError, match="holds no .txt file"):
        reproduce("elm", output=tmp_path / "out", scale="full", data=tmp_path)
    with pytest.raises(SearchError, match="scale='huge' is not one of small, full"):
        reproduce("elm", output=tmp_path / "out", scale="huge", data=tmp_path)
    with pytest.raises(SearchError, match="known: lonas-bert, elm"):
        reproduce("elms", output=tmp_path / "out", data=tmp_path)


def test_the_tokenizer_of_stories260k_is_that_of_llama2c(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "stories260K" / "hf"
    made = AutoTokenizer.from_pretrained(teacher_with_tokenizer(source, tmp_path / "teacher"))
    text = "Once upon a time, there was a caf\u00e9\nby the sea."
    stated = json.loads((source / "llama2c_tokenizer.json").read_text(encoding="utf-8"))
    pieces = stated["pieces"]
    ids = made(text)["input_ids"]
    # what llama2.c's own merging gives
    assert ids == _merged(text, pieces, stated["scores"])
    assert made.decode(ids, skip_special_tokens=True) == text
    assert teacher_with_tokenizer(tmp_path / "teacher", tmp_path / "copy") == tmp_path / "teacher"


def _merged(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Merges the neighbours whose piece has the best score, again and again, as llama2.c does."""
    tokens: list[int] = []
    for character in " " + text:
        known = character in pieces
        tokens += [pieces.index(character)] if known else [byte + 3 for byte in character.encode()]
    while True:
        pairs = [(pieces[a] + pieces[b], n) for n, (a, b) in enumerate(zip(tokens, tokens[1:], strict=False))]
        found = [(-scores[pieces.index(pair)], n) for pair, n in pairs if pair in pieces]
        if not found:
            return [1, *tokens]
        _, place = min(found)
        tokens[place : place + 2] = [pieces.index(pieces[tokens[place]] + pieces[tokens[place + 1]])]
