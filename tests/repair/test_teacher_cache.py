"""What is kept of a teacher, against its dense output in float64, example by example; and what interrupts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import disk_full_at, tiny
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic import CheckpointError, DataError, Distillation, TrainingError
from hf_elastic.distillation import TopK, top_k_distribution
from hf_elastic.repair import teacher_cache
from hf_elastic.repair.distilling import Lesson
from hf_elastic.repair.features import Padder, read_features
from hf_elastic.repair.teacher_cache import TeacherCache, cache_teacher, restored_signal

Row = dict[str, Any]


def rows(count: int = 7, *, labels: bool = False, seed: int = 0) -> list[Row]:
    """Examples of 3 to 11 tokens; of labels, a random half counts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (), generator=generator))
        ids = torch.randint(3, 61, (length,), generator=generator)
        row: Row = {"input_ids": ids.tolist()}
        if labels:
            kept = torch.rand(length, generator=generator) < 0.5
            kept[-1] = True
            row["labels"] = torch.where(kept, ids, -100).tolist()
        found.append(row)
    return found


def alone(teacher: PreTrainedModel, row: Row) -> Any:
    """The teacher's output of one example without padding."""
    with torch.no_grad():
        return teacher(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)


def scored_by_hand(row: Row, *, causal: bool) -> list[int]:
    """Positions whose logits are compared: those that predict a label, or all."""
    length = len(row["input_ids"])
    if "labels" not in row:
        return list(range(length))
    ahead = int(causal)
    return [t for t in range(length - ahead) if row["labels"][t + ahead] != -100]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_top_k_of_each_scored_position_is_that_of_the_dense_distribution(
    family: str, labels: bool, tmp_path: Path
) -> None:
    teacher, data = tiny(family), rows(labels=labels)
    cache = cache_teacher(
        teacher, data, tmp_path, target=Distillation(temperature=2.0, label_weight=0.0), top_k=5, batch_size=3
    )
    assert len(cache) == len(data) and cache.classes == 61
    for index, row in enumerate(data):
        kept = cache[index]
        logits = alone(teacher, row).logits[0].double()[scored_by_hand(row, causal=family != "bert")]
        p = (logits / 2.0).softmax(-1).numpy()  # (P, C)
        order = np.argsort(-p, axis=-1)[:, :5]
        assert kept["indices"].tolist() == order.tolist()
        top = np.take_along_axis(p, order, -1)
        np.testing.assert_allclose(kept["log_probabilities"].double(), np.log(top), rtol=1e-3)
        np.testing.assert_allclose(kept["log_tail"].double(), np.log(1 - top.sum(-1)), rtol=1e-4, atol=1e-5)


def test_classes_of_whole_sequences_are_kept_too(tmp_path: Path) -> None:
    teacher, data = tiny("bert", "sequence"), rows()
    cache = cache_teacher(teacher, data, tmp_path)
    for index, row in enumerate(data):
        p = alone(teacher, row).logits.double().softmax(-1)  # (1, 3)
        found = cache[index]["log_probabilities"].double().exp()
        torch.testing.assert_close(found, p.sort(descending=True).values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["embeddings", "last_hidden_state", "hidden_states"])
@pytest.mark.parametrize(("family", "head"), [("bert", "base"), ("llama", "lm")])
def test_states_and_embeddings_are_those_of_each_example_alone(
    family: str, head: str, target: Any, tmp_path: Path
) -> None:
    teacher, data = tiny(family, head), rows()
    cache = cache_teacher(teacher, data, tmp_path, target=target, batch_size=4)
    assert cache.classes is None
    for index, row in enumerate(data):
        states, kept = alone(teacher, row).hidden_states, cache[index]
        if target == "embeddings":
            torch.testing.assert_close(kept["embeddings"], states[-1].mean(1), rtol=1e-4, atol=1e-5)
            continue
        wanted = states if target == "hidden_states" else states[-1:]
        assert len(kept) == len(wanted)
        for number, state in enumerate(wanted):
            torch.testing.assert_close(kept[f"states.{number}"].float(), state[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("target", ["logits", "embeddings", "last_hidden_state", "hidden_states"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_loss_from_the_cache_is_that_beside_a_running_teacher(
    family: str, target: Any, labels: bool, tmp_path: Path
) -> None:
    """All classes are kept, so that the two losses are the same."""
    teacher, student, data = tiny(family), tiny(family, seed=1), rows(labels=labels)
    plan = Distillation(target=target, label_weight=0.0, state_distance="relative", relational_weight=0.5)
    cache = cache_teacher(teacher, data, tmp_path, target=plan, top_k=61 if target == "logits" else None)
    batch = Padder(student)(read_features(data))
    kept = {name: torch.cat([cache[n][name] for n in range(len(data))]) for name in cache[0]}
    online = Lesson(student, plan, teacher=teacher, pairs=None)
    beside, _ = online.loss(student, batch, taught=online.taught(batch))
    stored, _ = Lesson(student, plan, teacher=None, pairs=None).loss(
        student, batch, taught=restored_signal(kept, batch["attention_mask"])
    )
    assert beside.item() > 1e-3
    assert stored.item() == pytest.approx(beside.item(), rel=2e-3)


def test_fewer_classes_than_the_default_are_all_kept(tmp_path: Path) -> None:
    cache = cache_teacher(tiny("gpt2"), rows(), tmp_path / "all")
    assert cache[0]["indices"].shape[1] == 61 and cache.identity.settings["top_k"] == 61
    large = cache_teacher(tiny("gpt2", vocab_size=90), rows(), tmp_path / "some")
    assert large[0]["indices"].shape[1] == 64 and large.identity.settings["top_k"] == 64


def test_the_teacher_is_unchanged(tmp_path: Path) -> None:
    teacher = tiny("bert").train()
    teacher.bert.encoder.layer[0].eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    cache_teacher(teacher, rows(), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [module.training for module in teacher.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


class _Killed(BaseException):
    pass


def test_a_killed_run_goes_on_behind_its_last_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_SHARD", 4)
    teacher, data, seen = tiny("gpt2"), rows(11), []
    whole = cache_teacher(teacher, data, tmp_path / "whole", batch_size=2)
    write, forward = teacher_cache._write_shard, teacher_cache.SignalReader.rows

    def killed(file: Path, tensors: dict[str, Tensor]) -> None:
        if file.name == "shard-00001.safetensors":
            file.write_bytes(b"half a file")
            raise _Killed
        write(file, tensors)

    def counted(self: Any, batch: dict[str, Tensor]) -> Any:
        seen.append(len(batch["input_ids"]))
        return forward(self, batch)

    monkeypatch.setattr(teacher_cache, "_write_shard", killed)
    with pytest.raises(_Killed):
        cache_teacher(teacher, data, tmp_path / "parts", batch_size=2)
    with pytest.raises(CheckpointError, match="shard-00001.safetensors of the teacher cache is missing or truncated"):
        TeacherCache(tmp_path / "parts")
    monkeypatch.setattr(teacher_cache, "_write_shard", write)
    monkeypatch.setattr(teacher_cache.SignalReader, "rows", counted)
    again = cache_teacher(teacher, data, tmp_path / "parts", batch_size=2)
    assert sum(seen) == 7  # the first four are not run again
    for index in range(11):
        assert all(torch.equal(again[index][name], values) for name, values in whole[index].items())
    seen.clear()
    cache_teacher(teacher, data, tmp_path / "parts", batch_size=2)
    assert not seen


def test_an_example_that_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    cache = cache_teacher(tiny("gpt2"), rows(3), tmp_path)
    for index in (3, -1):
        with pytest.raises(IndexError):
            cache[index]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    teacher, data, folder = tiny("gpt2"), rows(), tmp_path / "cache"
    cache_teacher(teacher, data, folder, top_k=4)
    for changed, message in (
        ({"teacher": tiny("gpt2", seed=1)}, "another teacher"),
        ({"data": rows(seed=1)}, "other data"),
        ({"top_k": 5}, "top_k=4 instead of 5"),
        ({"target": "embeddings", "top_k": None}, "pooling=None instead of 'mean'"),
        ({"target": Distillation(temperature=2.0)}, "temperature=1.0 instead of 2.0"),
    ):
        given = {"teacher": teacher, "data": data, "target": "logits", "top_k": 4, **changed}
        with pytest.raises(CheckpointError) as caught:
            cache_teacher(given["teacher"], given["data"], folder, target=given["target"], top_k=given["top_k"])
        assert message in str(caught.value) and "give another folder, or delete it" in str(caught.value)


def test_a_cache_that_was_damaged_is_refused(tmp_path: Path) -> None:
    cache_teacher(tiny("gpt2"), rows(), tmp_path)
    shard, note = tmp_path / "shard-00000.safetensors", tmp_path / "cache.json"
    described = json.loads(note.read_text())
    note.write_text(json.dumps({**described, "examples": 8}))
    with pytest.raises(CheckpointError, match="do not hold 8 examples"):
        TeacherCache(tmp_path)
    note.write_text(json.dumps({"teacher": "x"}))
    with pytest.raises(CheckpointError, match="describes no teacher cache"):
        TeacherCache(tmp_path)
    note.write_text(json.dumps(described))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing or truncated; call cache_teacher"):
        TeacherCache(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        TeacherCache(tmp_path / "nowhere")


def test_a_full_disk_says_so_and_leaves_no_half_file(tmp_path: Path) -> None:
    with disk_full_at(2000), pytest.raises(CheckpointError, match="free space or give another folder"):
        cache_teacher(tiny("bert", "base"), rows(40), tmp_path, target="last_hidden_state")
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.parametrize(
    ("head", "target", "top_k", "message"),
    [
        ("lm", "logits", 0, r"top_k=0 is not within 1\.\.61"),
        ("lm", "logits", 62, r"top_k=62 is not within 1\.\.61"),
        ("qa", "logits", None, "two tensors of logits"),
        ("base", "logits", None, "cannot distil logits"),
        ("lm", Distillation(divergence="mse"), None, "not kept"),
        ("lm", Distillation(teacher=torch.nn.Linear(2, 2)), None, r"leave Distillation\(teacher=...\) out"),
        ("lm", "nonsense", None, "target='nonsense'"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    head: str, target: Any, top_k: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        cache_teacher(tiny("bert", head), rows(), tmp_path / "cache", target=target, top_k=top_k)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("target", ["logits", "embeddings", "last_hidden_state"])
def test_a_teacher_that_gives_nan_is_refused(target: Any, tmp_path: Path) -> None:
    teacher = tiny("gpt2")
    teacher.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        cache_teacher(teacher, rows(), tmp_path, target=target)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no data"),
        ([{"text": "hi"}], r"row 1 of the data has no 'input_ids', only \['text'\]"),
        (["hi"], "must be a dict"),
        ([{"input_ids": []}], "must be a list of token ids"),
        ([{"input_ids": [[1]]}], "must be a list of token ids"),
        ([{"input_ids": [1.5]}], "must be a list of token ids"),
        ([{"input_ids": ["a"]}], "holds no plain numbers"),
        ([{"input_ids": [3, 4], "labels": [3]}], r"labels of row 1 has shape \(1,\)"),
        ([{"input_ids": [3, 4], "attention_mask": [0, 0]}], "all padding"),
        ([{"input_ids": [3, 4]}, {"input_ids": [3], "labels": [3]}], "rows differ in their columns"),
        ([{"input_ids": [3, 4]}, {"input_ids": [3, 61]}], r"row 2 has token 61, the model knows 0\.\.60"),
        ([{"input_ids": [3, -1]}], "row 1 has token -1"),
        ([{"input_ids": [3] * 65}], "row 1 has 65 tokens, the model 64 positions"),
        ([{"input_ids": [3, 4], "labels": [3, -100]}], "all labels are -100"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "need tokenizer="),
    ],
)
def test_data_that_cannot_be_read_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        cache_teacher(tiny("gpt2"), data, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_restored_top_k_is_that_of_the_logits(tmp_path: Path) -> None:
    teacher, data = tiny("gpt2"), rows(2)
    cache = cache_teacher(teacher, data, tmp_path, top_k=3)
    kept = {name: torch.cat([cache[n][name] for n in range(2)]) for name in cache[0]}
    found = restored_signal(kept, torch.ones(2, 1))
    assert isinstance(found, TopK)
    logits = torch.cat([alone(teacher, row).logits[0] for row in data])
    wanted = top_k_distribution(logits, 3)
    assert torch.equal(found.indices.long(), wanted.indices)
    torch.testing.assert_close(found.log_tail, wanted.log_tail, rtol=1e-4, atol=1e-5)
