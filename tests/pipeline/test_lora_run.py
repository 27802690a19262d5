"""``compress --lora``: every stage on tiny checkpoints, interrupted ones too; results load in stock peft."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import options
from typer.testing import CliRunner

from hf_elastic import CheckpointError, CompressOptions, ElasticConfig, ElasticError, SpaceError, compress
from hf_elastic.cli import app
from hf_elastic.pipeline import LoraResult, LoraRun, lora_run
from hf_elastic.pipeline.lora_run import parse_ranks

Find = Callable[[str], Path]
WIDTHS = ElasticConfig(intermediate_size=[0.125, 0.25, 0.5], loadability="stock")


def given(checkpoint: Find, data: Find, output: Path, kind: str, **changes: Any) -> CompressOptions:
    source = {"fresh": "masked-lm"}.get(kind, kind)
    rows = data("classification" if kind == "fresh" else kind)
    task = "classification" if kind == "fresh" else "auto"
    settings: dict[str, Any] = {"lora": "r=8,4,2", "within": None, "task": task}
    return options(checkpoint(source), rows, output, **{**settings, **changes})


def silent(chosen: CompressOptions) -> LoraResult:
    found = compress(chosen, say=lambda text: None)
    assert isinstance(found, LoraResult)
    return found


@pytest.fixture(autouse=True)
def eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is eight steps, whatever the machine."""
    monkeypatch.setattr(lora_run, "step_seconds", lambda *args, **kwargs: 60 / (8 * lora_run._OVERHEAD))


LATER = ("_searched", "_compared")
SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal-lm", "gpt2", "masked-lm")]


@pytest.mark.parametrize("kind", ["classification", "fresh", *SLOWER])
def test_ranks_alone_give_a_plain_adapter(kind: str, checkpoint: Find, data: Find, tmp_path: Path) -> None:
    chosen = given(checkpoint, data, tmp_path / "out", kind, minutes=1.0)
    result = silent(chosen)
    names = [row["name"] for row in result.rows]
    parent = [] if kind == "fresh" else ["parent"]
    assert names == [*parent, "largest", "found", "midpoint", "most frequent", "lowest loss", "smallest"]
    by_name = {row["name"]: row for row in result.rows}
    assert by_name["found"]["adapter_parameters"] <= 0.75 * by_name["largest"]["adapter_parameters"]
    most = 0.75 * by_name["largest"]["adapter_parameters"]
    over = {row["name"] for row in result.rows if row["adapter_parameters"] > most}
    assert {"largest"} <= over == {name for name, row in by_name.items() if row.get("over_limit")}
    assert all((f"{name} (over the limit)" in result.table) == (name in over) for name in names)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and "ranks" not in written
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert silent(chosen).rows == result.rows, "a finished run did something else when it was asked again"


def test_the_adapter_of_a_new_classifier_loads_in_stock_peft_and_does_what_was_measured(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    chosen = given(checkpoint, data, tmp_path / "out", "fresh", minutes=2.0, learning_rate=5e-3)
    result = silent(chosen)
    quality = next(row["accuracy"] for row in result.rows if row["name"] == "found")
    run = LoraRun(chosen, say=lambda text: None)
    features = [
        {"ids": ids.tolist(), "label": int(label)}
        for batch in run.data.validation
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(features))
    script = f"""
import json, sys, torch, peft
model = peft.AutoPeftModelForSequenceClassification.from_pretrained({str(tmp_path / "out")!r}, num_labels=2).eval()
right = []
for row in json.load(open({str(tmp_path / "rows.json")!r})):
    ids = torch.tensor([[token for token in row["ids"] if token != 0]])
    right.append(int(model(input_ids=ids).logits.argmax(-1)) == row["label"])
assert not any(name.startswith("hf_elastic") for name in sys.modules)
print(sum(right) / len(right))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(quality, abs=1e-9)


@pytest.mark.parametrize("kind", ["classification", "fresh", "causal-lm", "embedding"])
def test_with_a_space_the_merged_smaller_model_is_written(
    kind: str, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    chosen = given(
        checkpoint, data, tmp_path / "out", kind, minutes=1.0, within={"macs": 0.85}, space=WIDTHS, sequence_length=16
    )
    said: list[str] = []
    result = compress(chosen, say=said.append)
    assert any(line.startswith("runs where: transformers yes") for line in said)
    rows = {row["name"]: row for row in result.rows}
    assert rows["found"]["macs"] <= 0.85 * rows["largest"]["macs"]
    loaded = lora_run.load_model(LoraRun(chosen).task, chosen, folder=tmp_path / "out")
    assert type(loaded).__name__.startswith(("Bert", "Llama"))
    assert not any("lora" in name for name in loaded.state_dict())
    assert result.record["stages"]["export"]["loadability"] == "stock"


@pytest.mark.parametrize("broken", ["_train", "_exported", *(pytest.param(n, marks=pytest.mark.slow) for n in LATER)])
def test_a_run_that_broke_off_goes_on_to_the_same_end(
    broken: str, checkpoint: Find, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"minutes": 1.0, "within": {"macs": 0.85}, "space": WIDTHS}
    whole = silent(given(checkpoint, data, tmp_path / "whole", "classification", **settings))
    chosen = given(checkpoint, data, tmp_path / "out", "classification", **settings)

    class Broken(Exception):
        pass

    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise Broken

        patch.setattr(LoraRun, broken, fail)
        with pytest.raises(Broken):
            silent(chosen)
    result = silent(chosen)
    assert result.rows == whole.rows and result.architecture == whole.architecture
    task = LoraRun(chosen).task
    ours, theirs = (lora_run.load_model(task, chosen, folder=tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_interrupted_training_resumes_with_its_statistics(
    checkpoint: Find, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = silent(given(checkpoint, data, tmp_path / "whole", "classification", minutes=2.0))
    chosen = given(checkpoint, data, tmp_path / "out", "classification", minutes=2.0)
    calls = []
    original = lora_run.ElasticTrainer.training_step

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lora_run.ElasticTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            silent(chosen)
    result = silent(chosen)
    assert result.rows == whole.rows
    assert result.record["stages"]["train"]["selected"] == whole.record["stages"]["train"]["selected"]


def test_the_command_line_takes_ranks(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    arguments = [
        "compress", str(checkpoint("classification")), "--data", str(data("classification")), "--output",
        str(tmp_path / "out"), "--lora", "r=8,4", "--minutes", "0", "--evaluations", "4", "--sequence-length", "24",
        "--device", "cpu",
    ]  # fmt: skip
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0 and "adapter_parameters=0.75" in shown.output and not (tmp_path / "out.run").exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "AutoPeftModelForSequenceClassification" in done.output and "adapter parameters" in done.output


def test_a_run_is_described_and_not_taken_for_one_of_supernets(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    silent(given(checkpoint, data, tmp_path / "out", "classification"))
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "out.run")])
    assert shown.exit_code == 0 and "adapters r=8,4,2" in shown.output and "adapter parameters" in shown.output
    assert "plain peft" in CliRunner().invoke(app, ["info", str(tmp_path / "out")]).output
    for command in (["search", str(tmp_path / "out.run"), "--within", "parameters=0.5"],
                    ["export", str(tmp_path / "out.run"), "largest", "--output", str(tmp_path / "new")],
                    ["family", str(tmp_path / "out.run"), "--speedup", "1.5"]):  # fmt: skip
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, CheckpointError) and "run of adapters" in str(refused.exception)


def test_ranks_are_read_and_nonsense_is_refused(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    assert parse_ranks("r=16, 32,24") == [32, 24, 16]
    for text in ("32,24", "r=", "r=8,8", "r=0,4", "r=8;4", "rank=8"):
        with pytest.raises(SpaceError, match="r=32,24,16"):
            parse_ranks(text)
    chosen = given(checkpoint, data, tmp_path / "out", "classification")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"recipe": "fast"}, "recipe='fast'"),
        ({"within": {"macs": 0.5}}, "macs"),
        ({"within": {"adapter_parameters": 0.01}}, "adapter_parameters"),
        ({"lora": "r=4"}, "nothing to choose|empty"),
    ]
    for changes, says in cases:
        with pytest.raises(ElasticError, match=says):
            silent(replace(chosen, **changes))
        assert not (tmp_path / "out").exists()
    with pytest.raises(SpaceError, match="within="):
        replace(chosen, speedup="2", within=None)
    with pytest.raises(ElasticError, match="give a space"):
        LoraRun(given(checkpoint, data, tmp_path / "out", "embedding"))


def test_an_output_of_someone_else_is_left_alone(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="no run made it"):
        silent(given(checkpoint, data, tmp_path / "out", "classification"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_checkpoint_without_statistics_that_cannot_be_removed_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = tmp_path / "checkpoint-2"
    stuck.mkdir()
    monkeypatch.setattr(lora_run, "last_complete_checkpoint", lambda folder: str(stuck) if stuck.is_dir() else None)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="cannot be removed; delete it"):
        patched.setattr(lora_run, "remove_folder", lambda folder: None)
        lora_run._resumable(tmp_path)
    assert lora_run._resumable(tmp_path) is None
    assert not stuck.exists()
