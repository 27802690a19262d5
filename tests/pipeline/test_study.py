"""Studies of adapters and reproductions: on tiny checkpoints, interrupted, and with nonsense."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import sentences
from typer.testing import CliRunner

from hf_elastic import (
    CheckpointError,
    CompressionError,
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    SearchError,
    add_lora,
    make_elastic,
)
from hf_elastic.cli import app
from hf_elastic.pipeline.reproduction import PUBLISHED, reproduce
from hf_elastic.pipeline.study import Plan, Study
from hf_elastic.report import describe_folder

Find = Callable[[str], Path]
TARGETS = ["query", "value"]


def labelled(path: Path, *, count: int, seed: int, column: str = "text") -> Path:
    rows = [{column: text, "label": int("runs" in text or "sings" in text)} for text in sentences(count, seed=seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def plan(checkpoint: Find, tmp_path: Path) -> Plan:
    return Plan(
        model=str(checkpoint("masked-lm")), train=str(labelled(tmp_path / "train.jsonl", count=90, seed=0)),
        test=str(labelled(tmp_path / "test.jsonl", count=30, seed=1)), steps=6, evaluations=6, batch_size=8,
        validation=24, sequence_length=24,
    )  # fmt: skip


def lora(head: list[str], **settings: Any) -> ElasticLoraConfig:
    return ElasticLoraConfig(r=4, ranks=[2], target_modules=TARGETS, modules_to_save=head, **settings)


def mode_b(model: Any, head: list[str]) -> Any:
    make_elastic(model, ElasticConfig(intermediate_size=[0.125, 0.25, 0.5]))
    return add_lora(model, lora(head), seed=0)


def test_all_ways_are_trained_on_the_same_rows_and_kept(plan: Plan, tmp_path: Path) -> None:
    study = Study(plan, tmp_path / "study", say=lambda text: None)
    fixed = study.fixed("fixed", rank=4, targets=TARGETS)
    ranks = study.elastic("A", lambda m, head: add_lora(m, lora(head), seed=0), within={"adapter_parameters": 0.75})
    both = study.elastic("B", mode_b, within={"macs": 0.85}, near=True, judged_by="loss", teacher="fixed", further=0.5)
    assert fixed[0]["adapter_parameters"] == ranks[0]["adapter_parameters"]
    assert [row["subnet"] for row in ranks] == [
        "largest", "found", "midpoint", "smallest", "most frequent", "lowest loss", "most active",
    ]  # fmt: skip
    assert [row["subnet"] for row in both[-2:]] == ["found, trained further", "kept"]
    assert both[-1]["accuracy"] in (both[1]["accuracy"], both[-2]["accuracy"])
    assert both[-1]["macs_share"] == both[-2]["macs_share"] == both[1]["macs_share"] <= 0.85
    assert ranks[1]["adapter_parameters"] <= 0.75 * ranks[0]["adapter_parameters"]
    assert 3 <= ranks[1]["evaluations"] <= 6 and all(0 <= row["accuracy"] <= 1 for row in [*fixed, *ranks, *both])
    assert "study of adapters" in describe_folder(tmp_path / "study")
    again = Study(plan, tmp_path / "study", say=lambda text: None)
    again._train = lambda *args, **kwargs: pytest.fail("what was measured is measured again")  # type: ignore[method-assign]
    assert again.fixed("fixed", rank=4, targets=TARGETS) == fixed
    with pytest.raises(CheckpointError, match="steps"):
        Study(Plan(**{**vars(plan), "steps": 7}), tmp_path / "study")


def test_a_teacher_is_what_was_trained_and_is_learned_from(plan: Plan, tmp_path: Path) -> None:
    study = Study(plan, tmp_path / "study", say=lambda text: None)
    with pytest.raises(CheckpointError, match="keeps no adapters of 'fixed'"):
        study.elastic("B", mode_b, within={"macs": 0.85}, teacher="fixed")
    accuracy = study.fixed("fixed", rank=4, targets=TARGETS)[0]["accuracy"]
    teacher = study.trained("fixed")
    assert study._accuracy(teacher) == accuracy and not teacher.training
    assert any(p.abs().sum() > 0 for name, p in teacher.named_parameters() if ".lora_B." in name)
    seen: list[Any] = []
    inner = study._train
    study._train = lambda *given, **more: seen.append(more["distill"]) or inner(*given, **more)  # type: ignore[method-assign, func-returns-value]
    study.elastic("B", mode_b, within={"macs": 0.85}, teacher="fixed", further=0.5)
    assert len(seen) == 2 and all(isinstance(plan.teacher, torch.nn.Module) for plan in seen)


def test_a_sparse_parent_and_merged_adapters(plan: Plan, tmp_path: Path) -> None:
    study = Study(Plan(**{**vars(plan), "sparsity": 0.5}), tmp_path / "study", say=lambda text: None)
    alone = study.head_alone("alone")[0]
    sparse = study.merged("sparse", lambda head: lora(head, sparse=True))[0]
    assert sparse["bits"] is None and alone["zeros"] == pytest.approx(sparse["zeros"], abs=1e-3)
    assert 0.3 < sparse["zeros"] <= 0.5 and sparse["adapter_parameters"] > 0 == alone["adapter_parameters"]
    config = {"sparse": True, "quantization_aware": True}
    with pytest.raises(CompressionError, match="does not divide"):  # groups of 128, the model has 32 inputs
        study.merged("integers", lambda head: lora(head, **config), bits=4)
    assert sorted(study.record.data["stages"]) == ["alone", "integers", "sparse"]


def test_ways_begin_with_the_same_weights(plan: Plan, tmp_path: Path) -> None:
    study = Study(plan, tmp_path / "study", say=lambda text: None)
    first, second = study.parent(), study.parent()
    assert first[1] == second[1] and any("classifier" in name for name in first[1])
    theirs = second[0].state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first[0].state_dict().items())
    state = random.getstate(), torch.get_rng_state()
    study.parent()
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_a_test_row_is_never_trained_on_and_labels_are_needed(plan: Plan, tmp_path: Path) -> None:
    study = Study(plan, tmp_path / "study", say=lambda text: None)
    held = {tuple(ids[ids != 0].tolist()) for batch in study.validation for ids in batch["input_ids"]}
    assert held and not held & {tuple(feature["input_ids"]) for feature in study.train}
    with pytest.raises(DataError, match="no column 'topic'"):
        Study(Plan(**{**vars(plan), "label": "topic"}), tmp_path / "other")


def test_a_reproduction_prints_paper_ours_and_what_differs(checkpoint: Find, tmp_path: Path) -> None:
    for name, seed in (("sst2_train", 0), ("sst2_dev", 1)):
        labelled(tmp_path / "data" / "glue" / f"{name}.jsonl", count=80, seed=seed, column="sentence")
    arguments = [
        "reproduce", "lonas-bert", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--model",
        str(checkpoint("masked-lm")), "--steps", "4", "--evaluations", "5",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    texts = ("92.06", "93.23", "101.3%", "71%", "LoNAS, found", "LoNAS, midpoint", "what differs:", "epochs: paper 60")
    assert all(shown in done.output for shown in texts)
    again = CliRunner().invoke(app, arguments)
    assert again.output.partition("SST-2")[2].strip() == done.output.partition("SST-2")[2].strip()


def test_what_is_unknown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ELASTIC_DATA", raising=False)
    with pytest.raises(SearchError, match="known: lonas-bert"):
        reproduce("bert", output=tmp_path)
    with pytest.raises(SearchError, match="small, full"):
        reproduce("lonas-bert", output=tmp_path, scale="huge")
    with pytest.raises(DataError, match="--data FOLDER"):
        reproduce("lonas-bert", output=tmp_path / "out")
    assert PUBLISHED["lonas-bert"].macs == pytest.approx(0.714, abs=1e-3)
    assert not (tmp_path / "out").exists()
