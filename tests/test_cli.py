from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Command, Ended
from safetensors.torch import load_file
from tiny_checkpoints import (
    classifier,
    language_model,
    sentence_encoder,
    time_by_parameters,
    write_rows,
    write_text,
)  # fmt: skip
from typer.main import get_command

from hf_elastic import SearchResult, SpaceError
from hf_elastic.cli import app, main, parse_limits

FAST = [
    "--recipe", "best", "--minutes", "0", "--evaluations", "6", "--sequence-length", "24", "--batch-size", "8",
    "--device", "cpu",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Checkpoints and data for commands; read only."""

    encoder: Path
    decoder: Path
    classifier: Path
    text: Path
    rows: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("cli")
    return Place(
        sentence_encoder(root / "encoder"), language_model(root / "decoder"), classifier(root / "classifier"),
        write_text(root / "text.txt"), write_rows(root / "rows.jsonl"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a finished run."""
    output = tmp_path_factory.mktemp("finished") / "small"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        arguments = [place.encoder, "--data", place.text, "--output", output, "--within", "parameters=0.7", *FAST]
        patch.setattr(sys, "argv", ["hf-elastic", "compress", *map(str, arguments)])
        main()
    return output


def test_compress_prints_one_table_and_writes_a_checkpoint(command: Command, place: Place, tmp_path: Path) -> None:
    ended = command(
        "compress", place.encoder, "--data", place.text, "--output", tmp_path / "small",
        "--within", "parameters=0.7", "--within", "macs=0.9,total_parameters=0.9", *FAST,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    for words in (
        "parent",
        "found",
        "midpoint",
        "uniform width, untrained",
        "speed-up",
        "structure",
        "from_pretrained",
    ):
        assert words in ended.out
    assert ended.out.count("MACs at 128") == 1
    record = json.loads((tmp_path / "small" / "result.json").read_text())
    assert record["options"]["within"] == {"parameters": 0.7, "macs": 0.9, "total_parameters": 0.9}
    model = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long))[0]).all()


def test_the_same_command_shows_the_finished_run(command: Command, place: Place, finished: Path) -> None:
    arguments = ["compress", place.encoder, "--data", place.text, "--output", finished, "--within", "parameters=0.7"]
    again = command(*arguments, *FAST)
    assert again.code == 0 and "found" in again.out


def test_rows_with_labels_are_compressed_by_their_columns(command: Command, place: Place, tmp_path: Path) -> None:
    renamed = place.rows.read_text().replace('"text"', '"body"').replace('"label"', '"mood"')
    (tmp_path / "rows.jsonl").write_text(renamed)
    columns = ["--text-column", "body", "--label-column", "mood", "--precision", "fp32", "--seed", "3"]
    ended = command(
        "compress", place.classifier, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "small", *columns, *FAST
    )
    assert ended.code == 0 and "accuracy" in ended.out


@pytest.mark.parametrize("as_file", [False, True])
def test_a_space_is_given_as_json_or_as_a_file_of_it(
    command: Command, place: Place, tmp_path: Path, as_file: bool
) -> None:
    text = json.dumps({"intermediate_size": [16, 32], "skip": {"1": ["layer"]}, "loadability": "any"})
    (tmp_path / "space.json").write_text(text)
    ended = command(
        "compress", place.decoder, "--data", place.text, "--output", tmp_path / "small", "--dry-run",
        "--space", tmp_path / "space.json" if as_file else text, *FAST,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "from 3 choices" in ended.out and "loading as" in ended.out


def test_a_space_without_a_word_on_it_is_as_loadable_as_the_option_says(
    command: Command, place: Place, tmp_path: Path
) -> None:
    arguments = ["compress", place.encoder, "--data", place.text, "--output", tmp_path / "small", "--dry-run", *FAST]
    space = ["--space", '{"intermediate_size": [16, 32]}', "--within", "parameters=0.7"]
    assert "3 from 1 choices" in command(*arguments, *space).out
    assert "27 from 3 choices" in command(*arguments, *space, "--loadability", "any").out


def test_a_dry_run_writes_nothing(command: Command, place: Place, tmp_path: Path) -> None:
    ended = command("compress", place.encoder, "--data", place.text, "--output", tmp_path / "small", "--dry-run", *FAST)
    assert ended.code == 0 and list(tmp_path.iterdir()) == []
    for words in ("architectures", "loadability", "limits", "training", "search"):
        assert words in ended.out


def test_info_describes_what_a_run_leaves(command: Command, place: Place, finished: Path) -> None:
    run = finished.with_name("small.run")
    expected = {
        finished: "exported       stock", run: "speed-up", run / "supernet": "supernet (bert)",
        place.decoder: "LlamaForCausalLM checkpoint", place.encoder: "can be made elastic",
    }  # fmt: skip
    for folder, words in expected.items():
        ended = command("info", folder)
        assert ended.code == 0 and words in ended.out, folder


def test_search_prints_the_front_under_other_limits(command: Command, finished: Path) -> None:
    run = finished.with_name("small.run")
    ended = command("search", run, "--within", "parameters=0.5", "--evaluations", "5", "--seed", "4")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].split() == ["row", "architecture", "structure", "parameters"]
    assert len(SearchResult.load(run / "search-parameters-0.5-4.json").evaluations) == 5


def test_family_writes_several_sizes_and_one_table_and_tells_them_again(
    command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_by_parameters(monkeypatch)
    run = shutil.copytree(finished.with_name("small.run"), tmp_path / "small.run")
    ended = command("family", run, "--speedup", "1.5@2x16", "--speedup", "1.2@2x16")
    assert ended.code == 0, ended.err
    for name in ("1.2x", "1.5x"):
        assert f"{name}: met: speed-up {name[:-1]} for prefill of 2x16: measured " in ended.out
        assert transformers.AutoModel.from_pretrained(tmp_path / "small.family" / name).config.hidden_size == 32
    assert ended.out.count("MACs at 128") == 1
    again = command("family", run, "--speedup", "1.2@2x16", "--speedup", "1.5@2x16")
    assert again.code == 0 and again.out in ended.out
    elsewhere = command("family", run, "--speedup", "1.2", "--output", tmp_path / "sizes")
    assert elsewhere.code == 0 and [path.name for path in (tmp_path / "sizes").iterdir()] == ["1.2x"]


def test_an_interrupted_family_says_how_it_goes_on(
    command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_elastic.pipeline.goal.measure_latency_table", interrupted)
    ended = command("family", finished.with_name("small.run"), "--speedup", "1.2", "--output", tmp_path / "sizes")
    assert (ended.code, ended.err) == (130, "hf-elastic: interrupted; run the same command again to go on\n")


@pytest.mark.parametrize("point", ["largest", "midpoint", "smallest", "json", "file"])
def test_export_writes_one_architecture(command: Command, finished: Path, tmp_path: Path, point: str) -> None:
    chosen = json.loads((finished / "architecture.json").read_text())["architecture"]
    (tmp_path / "a.json").write_text((finished / "architecture.json").read_text())
    given = {"json": json.dumps(chosen), "file": str(tmp_path / "a.json")}.get(point, point)
    ended = command("export", finished.with_name("small.run"), given, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "from_pretrained" in ended.out
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "modules.json").is_file()
    if point in ("json", "file"):
        assert json.loads((tmp_path / "out" / "architecture.json").read_text())["architecture"] == chosen
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").config.hidden_size == 32


def test_export_takes_a_supernet_folder_and_a_form(command: Command, finished: Path, tmp_path: Path) -> None:
    supernet = finished.with_name("small.run") / "supernet"
    ended = command("export", supernet, "midpoint", "--output", tmp_path / "out", "--loadability", "remote-code")
    assert ended.code == 0, ended.err
    assert "trust_remote_code" in ended.out and list((tmp_path / "out").glob("modeling_*.py"))


def test_export_replaces_a_folder_only_when_told_to(command: Command, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    arguments = ["export", finished.with_name("small.run"), "smallest", "--output", tmp_path]
    assert is_one_line(command(*arguments), "not empty")
    assert (tmp_path / "old.txt").exists()
    assert command(*arguments, "--overwrite").code == 0
    assert not (tmp_path / "old.txt").exists() and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("texts", "limits"),
    [
        (["parameters=0.6"], {"parameters": 0.6}),
        (["parameters=0.6", "macs=6e9"], {"parameters": 0.6, "macs": 6e9}),
        (["parameters = 0.6, macs=1"], {"parameters": 0.6, "macs": 1.0}),
    ],
)
def test_limits_are_read_as_name_and_number(texts: list[str], limits: dict[str, float]) -> None:
    assert parse_limits(texts) == limits


@pytest.mark.parametrize("text", ["parameters", "parameters=", "parameters=much", "=0.5", "parameters=0.5,", ""])
def test_a_malformed_limit_shows_the_form(text: str) -> None:
    with pytest.raises(SpaceError, match="name=number"):
        parse_limits([text])


def test_a_limit_named_twice_is_refused() -> None:
    with pytest.raises(SpaceError, match="twice"):
        parse_limits(["macs=0.5", "macs=0.6"])


def is_one_line(ended: Ended, words: str) -> bool:
    """Whether a command ended as bad input has to: exit code 2, one line, no traceback."""
    lines = ended.err.splitlines()
    assert ended.code == 2, ended
    assert len(lines) == 1 and lines[0].startswith("hf-elastic: "), ended.err
    assert "Traceback" not in ended.err and words in lines[0], ended.err
    return True


def _quantised(place: Place, folder: Path) -> Path:
    model = Path(shutil.copytree(place.encoder, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return model


def _truncated(place: Place, folder: Path) -> Path:
    model = Path(shutil.copytree(place.encoder, folder / "model"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    return model


def _unknown_type(place: Place, folder: Path) -> Path:
    model = Path(shutil.copytree(place.encoder, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    return model


def _short(place: Place, folder: Path) -> Path:
    return write_text(folder / "short.txt", count=12)


def _unknown_label(place: Place, folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(place.rows.read_text() + '\n{"text": "a dog", "label": "angry"}')
    return folder / "rows.jsonl"


def _occupied(place: Place, folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("do not delete")
    return folder / "full"


Given = str | Callable[[Place, Path], Path]
# What is wrong: arguments of compress beside those that are right, and words of the message.
BAD: dict[str, tuple[dict[str, Given], str]] = {
    "unknown model": ({"model": "no-such/model"}, "no-such/model"),
    "model path that is nowhere": ({"model": "/no/such/model"}, "/no/such/model"),
    "quantised model": ({"model": _quantised}, "is quantised (bitsandbytes)"),
    "unknown model type": ({"model": _unknown_type}, "'opt'"),
    "truncated weights": ({"model": _truncated}, "cannot load"),
    "missing file": ({"--data": "/no/such/text.txt"}, "there is no file"),
    "too little text": ({"--data": _short}, "at least 40"),
    "row without the column": ({"--data": lambda p, f: p.rows, "--text-column": "body"}, "'body'"),
    "label unknown": ({"model": lambda p, f: p.classifier, "--data": _unknown_label}, "'angry'"),
    "limits out of reach": ({"--within": "parameters=0.01"}, "smallest reachable"),
    "unknown limit": ({"--within": "speed=0.5"}, "known: 'macs'"),
    "malformed limit": ({"--within": "parameters:0.5"}, "name=number"),
    "limit of nothing": ({"--within": "parameters=0"}, "limit above 0"),
    "limit that is no number": ({"--within": "parameters=nan"}, "limit above 0"),
    "space that is no JSON": ({"--space": '{"skip": ['}, "malformed JSON"),
    "space that is no file": ({"--space": "widths.json"}, "neither a JSON object nor a readable file"),
    "space that is a list": ({"--space": "[1]"}, "neither a JSON object nor a readable file"),
    "space nested beyond reading": ({"--space": '{"skip":' + "[" * 5000}, "malformed JSON"),
    "space with an unknown field": ({"--space": '{"widths": [1]}'}, "unknown ElasticConfig fields"),
    "space with a layer that is none": ({"--space": '{"skip": {"first": ["layer"]}}'}, "expected numbers"),
    "size larger than the model": ({"--space": '{"intermediate_size": [4096]}'}, "between 1 and the model's own 64"),
    "size of the wrong kind": ({"--space": '{"intermediate_size": "half"}'}, "list of fractions or sizes"),
    "empty space": ({"--space": "{}"}, "nothing to choose"),
    "folder that is not there": ({"model": "/nowhere/model"}, "/nowhere/model does not exist; pass the folder"),
    "speed-up that is no number": ({"--speedup": "abc"}, "not of the form 1.7 or 1.7@16x128"),
    "output that is not ours": ({"--output": _occupied}, "not empty and no run made it"),
    "output below a file": ({"--output": lambda p, f: p.text / "small"}, "cannot write"),
    "output without a name": ({"--output": "/"}, "names no folder"),
    "output on a read-only system": ({"--output": "/proc/small"}, "cannot write"),
    "too long sequences": ({"--sequence-length": "65"}, "at most 64"),
    "too few evaluations": ({"--evaluations": "2"}, "--evaluations 2"),
    "negative time": ({"--minutes": "-1"}, "--minutes -1"),
    "negative seed": ({"--seed": "-1"}, "--seed -1"),
    "no GPU": ({"--device": "cuda"}, "no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_trained_or_written(
    command: Command, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("hf_elastic.pipeline.run.train_phase", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong, words = BAD[case]
    folder = tmp_path / "given"
    folder.mkdir()
    changed = {name: given if isinstance(given, str) else given(place, folder) for name, given in wrong.items()}
    settings = dict(zip(FAST[::2], FAST[1::2], strict=True)) | {"--minutes": "1"}
    settings = {"--data": place.text, "--output": tmp_path / "small", **settings, **changed}
    model = settings.pop("model", place.encoder)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    ended = command("compress", model, *(part for pair in settings.items() for part in pair))
    assert is_one_line(ended, words)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "{run}/nowhere"], "is no folder"),
        (["info", "{text}"], "is no folder"),
        (["info", "{empty}"], "no checkpoint, supernet or run"),
        (["search", "{empty}", "--within", "macs=0.5"], "no supernet and no run"),
        (["search", "{run}", "--within", "macs"], "name=number"),
        (["search", "{run}", "--within", "macs=0.0001"], "reachable"),
        (["search", "{run}", "--within", "speed=0.5"], "'speed'"),
        (["search", "{run}", "--within", "macs=0.5", "--evaluations", "1"], "always evaluated"),
        (["family", "{empty}", "--speedup", "1.3"], "is no run"),
        (["family", "{run}", "--speedup", "1"], "above 1"),
        (["family", "{run}", "--speedup", "1.3x"], "not of the form"),
        (["family", "{run}", "--speedup", "1.3", "--speedup", "1.30"], "asked for twice"),
        (["family", "{run}", "--speedup", "1.3@1x16", "--speedup", "1.7"], "one family is of one workload"),
        (["family", "{run}", "--speedup", "1.3", "--output", "{text}"], "cannot write"),
        (["family", "{run}", "--speedup", "1.3", "--phase", "decode"], "does not generate"),
        (["export", "{empty}", "largest", "--output", "{empty}/out"], "no supernet and no run"),
        (["export", "{run}", "huge", "--output", "{empty}/out"], "neither a JSON object nor a readable file"),
        (["export", "{run}", '{"architecture": 3}', "--output", "{empty}/out"], "JSON object of choices"),
        (["export", "{run}", '{"width": 3}', "--output", "{empty}/out"], "width"),
        (["export", "{run}", '{"intermediate_size": 7}', "--output", "{empty}/out"], "intermediate_size"),
        (["export", "{run}", "largest", "--output", "{text}"], "is a file"),
        (["export", "{run}", "largest", "--output", "{text}/out"], "cannot write"),
    ],
)
def test_bad_input_of_single_steps_is_one_line(
    command: Command, place: Place, finished: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"run": finished.with_name("small.run"), "text": place.text, "empty": tmp_path}
    for name, path in places.items():
        arguments = [argument.replace("{" + name + "}", str(path)) for argument in arguments]
    assert is_one_line(command(*arguments), words)
    assert list(tmp_path.iterdir()) == []


def test_other_options_for_a_run_that_exists_are_refused_in_one_line(
    command: Command, place: Place, finished: Path
) -> None:
    arguments = ["compress", place.encoder, "--data", place.text, "--output", finished, *FAST]
    assert is_one_line(command(*arguments, "--within", "parameters=0.6"), "--within {'parameters': 0.7}")


def test_an_option_of_one_value_is_given_once_and_others_again_and_again(command: Command, place: Place) -> None:
    twice = command("evaluate", place.encoder, "--metric", "spearman", "--metric", "perplexity")
    assert is_one_line(twice, "--metric is given 2 times; it takes one value")
    limits = ["--within", "parameters=0.6", "--within", "macs=0.6", "--data", place.text, "--data", place.text]
    assert command("compress", place.encoder, *limits, "--output", "never", "--dry-run").code == 0


def test_errors_speak_of_options_but_leave_calls_as_they_are() -> None:
    words = get_command(app).commands["convert"]._in_words_of_options  # type: ignore[attr-defined]
    assert words("pass overwrite=True, or int8='static'") == "pass --overwrite, or --int8 'static'"
    assert words("vocabulary=False writes ids alone") == "--no-vocabulary writes ids alone"
    assert words("merge it by export(model, overwrite=True)") == "merge it by export(model, overwrite=True)"
    assert words("an output folder (format= names it)") == "an output folder (--format names it)"


def test_an_interrupted_run_says_how_it_goes_on(
    command: Command, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    arguments = ["compress", place.encoder, "--data", place.text, "--output", tmp_path / "small", *FAST]
    with monkeypatch.context() as patch:
        patch.setattr("hf_elastic.pipeline.run.near_limit", interrupted)
        ended = command(*arguments)
    assert (ended.code, ended.err) == (130, "hf-elastic: interrupted; run the same command again to go on\n")
    assert command(*arguments).code == 0


def test_help_names_every_command(command: Command) -> None:
    ended = command("--help")
    commands = ("compress", "family", "info", "search", "export", "score")
    assert ended.code == 0 and all(name in ended.out for name in commands)


def test_a_process_of_its_own_says_one_line_too(place: Place, tmp_path: Path) -> None:
    """Whatever libraries print at their import stays off the stream of errors."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", "from hf_elastic.cli import main; main()", "compress", place.encoder, "--data",
         place.text, "--output", tmp_path / "small", "--within", "parameters=0.01"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert is_one_line(Ended(done.returncode, done.stdout, done.stderr), "smallest reachable")
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_exported_weights_are_those_of_the_trained_supernet(command: Command, finished: Path, tmp_path: Path) -> None:
    run = finished.with_name("small.run")
    assert command("export", run, "largest", "--output", tmp_path / "out").code == 0
    exported, trained = (load_file(f / "model.safetensors") for f in (tmp_path / "out", run / "supernet"))
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in exported)
