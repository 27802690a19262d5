from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import language_model, options, sentence_encoder, write_text
from tiny_models import supernet_of

from hf_elastic import CheckpointError, compress, costs, export
from hf_elastic.report import aligned, checkpoint_shapes, comparison_table, count, describe_folder, legend, stage_times

PARENT = {
    "name": "parent", "parameters": 2000, "total_parameters": 3000, "macs": 4_000_000, "latency": 0.010,
    "loadability": "stock", "structure": 1.0, "cosine": 1.0,
}  # fmt: skip
FOUND = {
    "name": "found", "parameters": 1000, "total_parameters": 2000, "macs": 1_000_000, "latency": 0.004,
    "loadability": "remote-code", "structure": 0.98765, "cosine": None,
}  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_shows_numbers_and_their_share_of_the_parents() -> None:
    header, rule, parent, found = comparison_table(
        [PARENT, FOUND], quality=["structure", "cosine"], seq_len=128
    ).splitlines()
    assert cells(header) == [
        "parameters", "with embeddings", "MACs at 128", "latency", "speed-up", "structure", "cosine", "loads as",
    ]  # fmt: skip
    assert cells(parent) == [
        "parent", "2.00 k (100%)", "3.00 k (100%)", "4.00 M (100%)", "10.0 ms", "1.00x", "1.0000", "1.0000", "stock",
    ]  # fmt: skip
    assert cells(found) == [
        "found", "1.00 k (50%)", "2.00 k (67%)", "1.00 M (25%)", "4.0 ms", "2.50x", "0.9877", "-", "remote-code",
    ]  # fmt: skip
    assert set(rule) == {"-"} and len({len(line) for line in (header, rule, found)}) == 1


def test_a_latency_that_was_not_measured_is_a_dash() -> None:
    rows = [PARENT, {**FOUND, "latency": None}]
    found = comparison_table(rows, quality=["structure"], seq_len=128).splitlines()[-1]
    assert cells(found)[4:6] == ["-", "-"]


def test_columns_are_padded_to_their_widest_cell() -> None:
    assert aligned([["", "b"], ["long name", "1"], ["x", "12345"]]).splitlines() == [
        "               b", "----------------", "long name      1", "x          12345",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (1234567, "1.23 M"), (2.5e9, "2.50 G"), (3e12, "3.00 T"), (0.5, "0.5")],
)
def test_numbers_have_units(number: float, text: str) -> None:
    assert count(number) == text


def test_stages_are_listed_with_their_seconds() -> None:
    record = {"stages": {"space": {"seconds": 1.26}, "plan": {"steps": 3}, "train": {"seconds": 60.0}}}
    assert [cells(line) for line in stage_times(record).splitlines()[2:]] == [["space", "1.3"], ["train", "60.0"]]
    assert len(stage_times({}).splitlines()) == 2


def test_a_checkpoint_is_described_by_its_family_and_size(tmp_path: Path) -> None:
    text = describe_folder(language_model(tmp_path / "model"))
    total = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    assert "LlamaForCausalLM checkpoint (llama)" in text and count(total) in text
    assert "num_key_value_heads" in text


def test_a_checkpoint_in_several_files_is_counted_whole(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    before = checkpoint_shapes(folder)
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for number in range(2):
        save_file(dict(tensors[number::2]), folder / f"model-0000{number + 1}-of-00002.safetensors")
    assert checkpoint_shapes(folder) == before


def test_a_checkpoint_of_another_family_is_described_as_such(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    assert "no family hf_elastic has a row for" in describe_folder(folder)


@pytest.mark.parametrize("form", ["stock-padded", "remote-code"])
def test_an_export_is_described_by_its_architecture(tmp_path: Path, form: Any) -> None:
    supernet = supernet_of("llama", skip=None, num_hidden_layers=None)
    sizes = [choice.values[n % 2] for n, choice in enumerate(supernet.space.choices)]
    point = supernet.space.canonical(dict(zip(supernet.space.names, sizes, strict=True)))
    export(supernet, point, tmp_path / "out", loadability=form)
    text = describe_folder(tmp_path / "out")
    assert f"exported       {form}" in text and "layers         3 of 3" in text
    assert f"{count(costs.parameters(supernet, point))} parameters without embeddings" in text
    assert ("a static model of hf_elastic" in text) == (form == "remote-code")


def test_a_supernet_is_described_by_its_space(tmp_path: Path) -> None:
    supernet = supernet_of("bert", "base")
    supernet.save_pretrained(tmp_path / "supernet")
    text = describe_folder(tmp_path / "supernet")
    assert "BertModel supernet (bert)" in text and f"from {len(supernet.space)} choices" in text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a finished run, the output beside it."""
    root = tmp_path_factory.mktemp("run")
    given = options(sentence_encoder(root / "encoder"), write_text(root / "text.txt"), root / "small")
    compress(given, say=lambda text: None)
    return given.run_folder


def test_a_run_and_its_output_show_the_table_of_the_run(run: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    table = comparison_table(record["stages"]["compare"]["rows"], quality=["structure", "cosine"], seq_len=128)
    for folder in (run, run.with_suffix("")):
        text = describe_folder(folder)
        assert table in text and "not finished" not in text
        assert "search" in text and "within parameters=0.7, recipe best, seed 0" in text
        assert f"latency: {record['stages']['compare']['setting']}" in text and "\nmet: parameters <= " in text
    assert "BertModel checkpoint" in describe_folder(run.with_suffix(""))


def test_a_run_in_the_middle_says_that_it_goes_on(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    record["stages"] = {"space": record["stages"]["space"]}
    (tmp_path / "result.json").write_text(json.dumps(record))
    text = describe_folder(tmp_path)
    assert "not finished: the same compress command goes on" in text and "speed-up" not in text


def _rewritten(name: str, contents: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(contents) and None  # type: ignore[func-returns-value]


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _header_only(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 8)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (_truncated, "truncated or no safetensors file"),
    "foreign weights": (_header_only, "truncated or no safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
    "empty": (_emptied, "no checkpoint, supernet or run"),
    "no folder": (shutil.rmtree, "is no folder"),
    "a broken config": (_rewritten("config.json", '{"model_type"'), "config.json is no JSON"),
    "a config that is a list": (_rewritten("config.json", "[1]"), "expected an object"),
    "a config of something else": (_rewritten("config.json", '{"architectures": 3}'), "config.json is not what"),
    "a foreign architecture": (_rewritten("architecture.json", '{"by": "someone"}'), "architecture.json is not what"),
    "layers that are none": (_rewritten("architecture.json", '{"layers": [1, 2]}'), "architecture.json is not what"),
    "a foreign record": (_rewritten("result.json", '{"score": 3}'), "format None"),
    "a record without options": (
        _rewritten("result.json", '{"format": 1, "options": {}, "stages": {}}'), "result.json is not what"
    ),
    "a foreign space": (_rewritten("search_space.json", '{"x": 1}'), "search_space.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_described_in_one_line_that_names_the_file(run: Path, tmp_path: Path, case: str) -> None:
    damage, words = BROKEN[case]
    folder = Path(shutil.copytree(run.with_suffix(""), tmp_path / "small"))
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        describe_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_supernet_is_not_described(tmp_path: Path) -> None:
    supernet_of("bert", "base").save_pretrained(tmp_path / "supernet")
    _truncated(tmp_path / "supernet")
    with pytest.raises(CheckpointError, match="truncated"):
        describe_folder(tmp_path / "supernet")


def test_below_a_table_stands_what_its_qualities_are() -> None:
    lines = legend(["structure", "cosine", "mine"], "here").splitlines()
    assert lines[0] == "latency: here" and [line.partition(":")[0] for line in lines[1:]] == ["structure", "cosine"]
