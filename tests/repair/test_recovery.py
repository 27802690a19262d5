"""Recovery of cut models, against distances and losses computed densely in float64, one example at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny
from tiny_models import tokenizer as tiny_tokenizer
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import CheckpointError, DataError, Distillation
from hf_elastic.files import only_worker
from hf_elastic.repair.distilling import DistillingTrainer
from hf_elastic.repair.recovery import RecoverReport, affordable_steps
from hf_elastic.repair.teacher_cache import SignalReader, TeacherCache, cache_teacher
from hf_elastic.report import describe_folder
from tests.repair.cut_models import Row, bits, cut, output_of, rows, run, same


def scored_by_hand(row: Row, *, causal: bool) -> list[int]:
    length = len(row["input_ids"])
    if "labels" not in row:
        return list(range(length))
    return [t for t in range(length - causal) if row["labels"][t + causal] != -100]


def divergences(model: nn.Module, teacher: nn.Module, data: list[Row], *, causal: bool = True) -> Tensor:
    """Dense KL in float64 of every scored position, ``(P,)``."""
    found = []
    for row in data:
        q, p = (output_of(m, row).logits[0].double().log_softmax(-1) for m in (model, teacher))
        found.append((p.exp() * (p - q)).sum(-1)[scored_by_hand(row, causal=causal)])
    return torch.cat(found)


def missed_energy(model: nn.Module, teacher: nn.Module, data: list[Row], *, layer: int = -1) -> float:
    """Share of the energy of the teacher's states that the model misses, in float64."""
    pairs = [[output_of(m, row).hidden_states[layer][0].double() for m in (model, teacher)] for row in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def cosine_distance(model: nn.Module, teacher: nn.Module, data: list[Row]) -> float:
    pooled = [[output_of(m, row).hidden_states[-1][0].double().mean(0) for m in (model, teacher)] for row in data]
    return 1 - float(torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pooled]).mean())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_cut_model_comes_nearer_to_its_teachers_distribution(family: str, uniform: bool, tmp_path: Path) -> None:
    teacher, model = cut(family, "lm", uniform=uniform)
    causal, before = family != "bert", bits(teacher)
    at_first = divergences(model, teacher, rows(), causal=causal).mean()
    unseen = divergences(model, teacher, rows(seed=9), causal=causal).mean()
    assert run(model, teacher, rows(), tmp_path / "run", top_k=30, steps=60) is model
    assert divergences(model, teacher, rows(), causal=causal).mean() < 0.5 * at_first
    assert divergences(model, teacher, rows(seed=9), causal=causal).mean() < 0.9 * unseen
    assert same(bits(teacher), before)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("target", ["embeddings", "last_hidden_state", "hidden_states"])
@pytest.mark.parametrize("head", ["base", "lm"])
def test_a_cut_encoder_comes_nearer_to_its_teachers_states(
    head: str, target: Any, uniform: bool, tmp_path: Path
) -> None:
    teacher, model = cut("bert", head, uniform=uniform)
    distance = cosine_distance if target == "embeddings" else missed_energy
    at_first, unseen = (distance(model, teacher, rows(seed=seed)) for seed in (0, 9))
    embeddings = model.get_input_embeddings().weight.detach().clone()
    run(model, teacher, rows(), tmp_path / "run", target=target)
    assert distance(model, teacher, rows()) < 0.6 * at_first
    assert distance(model, teacher, rows(seed=9)) < 0.9 * unseen
    assert torch.equal(model.get_input_embeddings().weight, embeddings)  # frozen unless logits are compared


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_recover_too_and_leave_a_plain_model_that_reloads(family: str, uniform: bool, tmp_path: Path) -> None:
    teacher, model = cut(family, "lm", uniform=uniform)
    plain, before = type(model), bits(model)
    at_first = divergences(model, teacher, rows()).mean()
    run(model, teacher, rows(), tmp_path / "run", lora=8, learning_rate=2e-2)
    assert divergences(model, teacher, rows()).mean() < 0.7 * at_first
    assert type(model) is plain and model.state_dict().keys() == before.keys()
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert moved and all(model.state_dict()[name].dim() == 2 and "emb" not in name for name in moved)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is plain
    assert torch.equal(output_of(loaded, rows()[0]).logits, output_of(model, rows()[0]).logits)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("family", "label_weight"), [("gpt2", 0.0), ("gpt2", 0.7), ("bert", 0.0), ("bert", 0.7)])
def test_the_loss_of_a_step_is_the_mean_over_all_scored_positions_of_its_micro_batches(
    family: str, label_weight: float, cache: bool, labels: bool, tmp_path: Path
) -> None:
    """One step of two micro-batches with unequal numbers of labels."""
    teacher, model = cut(family, "lm")
    causal, data, reports = family != "bert", rows(8, labels=labels), list[RecoverReport]()
    by_row = [divergences(model, teacher, [row], causal=causal) for row in data]
    entropies = []
    for row in data:
        kept = scored_by_hand(row, causal=causal)
        q = output_of(model, row).logits[0].double().log_softmax(-1)
        entropies.append(torch.stack([-q[t, row["input_ids"][t + causal]] for t in kept if t + causal < len(q)]))
    # The default means: with labels over those of the step, without over the real tokens of each micro-batch.
    order = sorted(range(8), key=lambda index: len(data[index]["input_ids"]))
    run(
        model, teacher, data, tmp_path / "run", steps=1, batch_size=4, cache=cache, on_report=reports.append,
        target=Distillation(label_weight=label_weight),
        arguments={"gradient_accumulation_steps": 2, "logging_steps": 1},
    )  # fmt: skip
    groups = [range(8)] if labels else [order[:4], order[4:]]
    wanted = torch.stack([torch.cat([by_row[index] for index in group]).mean() for group in groups]).mean()
    if labels and label_weight:
        wanted = wanted + label_weight * torch.cat(entropies).mean()
    (((step, loss),),) = [report.losses for report in reports]
    assert step == 1
    assert loss == pytest.approx(float(wanted), rel=2e-3 if cache else 1e-4)


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "head", "given"),
    [
        ("gpt2", "lm", {"target": "logits", "top_k": 8}),
        ("llama", "lm", {"target": "logits", "cache": False}),
        ("llama", "lm", {"target": "logits", "lora": 4}),
        ("bert", "base", {"target": "last_hidden_state"}),
        ("bert", "base", {"target": "embeddings", "lora": LoraConfig(r=2, target_modules="all-linear")}),
    ],
)
def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(
    family: str, head: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model = cut(family, head)
    start, step = copy.deepcopy(model), DistillingTrainer.training_step
    taken: list[int] = []

    def stopping(self: DistillingTrainer, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(self.state.global_step)
        if len(taken) == 9:
            raise _Stop
        return step(self, *args, **kwargs)

    given = {"steps": 12, "batch_size": 5, **given}  # 4 whole batches in an epoch: the stop is in the third
    whole = bits(run(model, teacher, rows(), tmp_path / "whole", **given))
    monkeypatch.setattr(DistillingTrainer, "training_step", stopping)
    stopped = copy.deepcopy(start)
    with pytest.raises(_Stop):
        run(stopped, teacher, rows(), tmp_path / "parts", **given)
    assert not stopped.training and type(stopped) is type(start)
    torch.rand(7)  # whatever the random state that libraries share
    reports: list[RecoverReport] = []
    again = run(copy.deepcopy(start), teacher, rows(), tmp_path / "parts", on_report=reports.append, **given)
    assert taken[9:] == [8, 9, 10, 11] and reports[0].resumed_from == 8
    assert same(bits(again), whole)
    if "lora" not in given:  # what is left of an interrupted run can be loaded, too
        kept = AutoModel.from_pretrained(tmp_path / "parts" / "checkpoint-12", dtype=torch.float32)
        assert torch.equal(kept.get_input_embeddings().weight, again.get_input_embeddings().weight)
    third = run(copy.deepcopy(start), teacher, rows(), tmp_path / "parts", on_report=reports.append, **given)
    assert len(taken) == 13 and reports[1].resumed_from == 12  # what is done is not done again
    assert same(bits(third), whole)
    described = describe_folder(tmp_path / "parts")
    assert "distilled for 12 steps, seed 0\n  done in " in described and "loss " in described


def test_a_recovery_that_was_killed_at_its_very_start_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the record of the run and the note of its steps."""
    teacher, model = cut("llama", "lm")
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr("hf_elastic.checkpoint.run_record.RunRecord.note", stop)
        run(copy.deepcopy(model), teacher, rows(), tmp_path / "run", steps=2)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stages"] == {}
    run(copy.deepcopy(model), teacher, rows(), tmp_path / "run", steps=2)
    stage = json.loads((tmp_path / "run" / "result.json").read_text())["stages"]["recover"]
    assert stage["finished"] and stage["steps"] == 2
    run(copy.deepcopy(model), teacher, rows(), tmp_path / "run", steps=2)
    again = json.loads((tmp_path / "run" / "result.json").read_text())["stages"]["recover"]
    assert again["seconds"] >= stage["seconds"]  # of all attempts, not of the last


def stop(*_arguments: object, **_more: object) -> None:
    raise _Stop


def test_a_recovery_that_ends_without_numbers_is_not_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model = cut("llama", "lm")
    monkeypatch.setattr("hf_elastic.repair.recovery._check_finite", stop)
    with pytest.raises(_Stop):
        run(model, teacher, rows(), tmp_path / "run")
    assert "not finished: the same call goes on" in describe_folder(tmp_path / "run")


def test_two_recoveries_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    teacher, model = cut("llama", "lm")
    with only_worker(tmp_path / "run"), pytest.raises(CheckpointError, match="another process is at work in "):
        run(model, teacher, rows(), tmp_path / "run")
    run(model, teacher, rows(), tmp_path / "run")


def test_a_teacher_that_was_kept_beforehand_gives_the_same_model_without_a_teacher(tmp_path: Path) -> None:
    teacher, model = cut("llama", "lm")
    other, data = copy.deepcopy(model), rows(labels=True)
    cache = cache_teacher(teacher, data, tmp_path / "cache", top_k=6)
    run(model, teacher, data, tmp_path / "beside", top_k=6, batch_size=8)
    run(other, TeacherCache(cache.folder), data, tmp_path / "from", batch_size=8)
    for name, tensor in bits(model).items():
        torch.testing.assert_close(bits(other)[name], tensor, rtol=1e-2, atol=2e-3)


def test_with_a_cache_the_teacher_sees_each_example_of_the_steps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model = cut("gpt2", "lm")
    seen, read = [0], SignalReader.rows

    def counted(self: SignalReader, batch: dict[str, Tensor]) -> Any:
        seen[0] += len(batch["input_ids"])
        return read(self, batch)

    monkeypatch.setattr(SignalReader, "rows", counted)
    run(model, teacher, rows(), tmp_path / "long", steps=20)
    assert seen[0] == 24
    run(copy.deepcopy(model), teacher, rows(), tmp_path / "short", steps=2)
    assert seen[0] == 24 + 16  # a short run does not pay for examples that it never sees


def test_only_answers_count_in_conversations(tmp_path: Path) -> None:
    """The same model comes of conversations and of rows whose labels are written by hand."""
    made = tiny_tokenizer(words=" ".join(f"w{n}" for n in range(2, 59)) + " <user> <bot>")
    made.chat_template = (
        "{% for m in messages %}{{ '<bot>' if m['role'] == 'assistant' else '<user>' }} {{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    user, bot = made.convert_tokens_to_ids(["<user>", "<bot>"])
    generator, talks, by_hand = torch.Generator().manual_seed(0), [], []
    for _ in range(16):
        asked, said = (torch.randint(2, 59, (n,), generator=generator).tolist() for n in (3, 4))
        words = [" ".join(f"w{token}" for token in tokens) for tokens in (asked, said)]
        talks.append({"messages": [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]})
        by_hand.append({"input_ids": [user, *asked, bot, *said], "labels": [-100] * 5 + said})
    teacher, model = cut("llama", "lm")
    other = copy.deepcopy(model)
    run(model, teacher, talks, tmp_path / "talks", tokenizer=made, steps=4)
    run(other, teacher, by_hand, tmp_path / "rows", steps=4)
    assert same(bits(model), bits(other))
    with pytest.raises(DataError, match="need tokenizer="):
        run(model, teacher, talks, tmp_path / "none")
    made.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        run(model, teacher, talks, tmp_path / "none", tokenizer=made)


def test_a_model_of_fewer_layers_learns_the_states_of_those_it_has(tmp_path: Path) -> None:
    """The teacher's second layer adds nothing, so without it all states are equal, where they are paired rightly."""
    teacher = tiny("llama", num_hidden_layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[1].get_submodule(name).weight.data.zero_()
    model = tiny("llama", num_hidden_layers=3)
    model.load_state_dict(
        {name: tensor for name, tensor in bits(teacher).items() if "layers" not in name}, strict=False
    )
    model.model.layers.load_state_dict(nn.ModuleList(teacher.model.layers[n] for n in (0, 2, 3)).state_dict())
    assert torch.allclose(output_of(model, rows()[0]).logits, output_of(teacher, rows()[0]).logits, atol=1e-5)
    for kept, equal in (((0, 2, 3), True), ((1, 2, 3), True), ((0, 1, 2), False), ((0, 1, 3), True)):
        reports: list[RecoverReport] = []
        run(
            copy.deepcopy(model), teacher, rows(), tmp_path / str(kept), target="hidden_states", kept_layers=kept,
            steps=1, on_report=reports.append, arguments={"logging_steps": 1},
        )  # fmt: skip
        assert reports[0].losses[0][1] < 1e-8 if equal else reports[0].losses[0][1] > 1e-2


@pytest.mark.parametrize("cache", [False, True])
def test_states_of_several_layers_come_nearer_layer_by_layer(cache: bool, tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    before = [missed_energy(model, teacher, rows(), layer=layer) for layer in (1, 2, 3)]
    run(model, teacher, rows(), tmp_path / "run", target="hidden_states", cache=cache)
    after = [missed_energy(model, teacher, rows(), layer=layer) for layer in (1, 2, 3)]
    assert all(new < 0.8 * old for old, new in zip(before, after, strict=True))


def test_the_teacher_may_be_training_and_stays_as_it_is(tmp_path: Path) -> None:
    teacher, model = cut("bert", "lm")
    teacher.train()
    teacher.bert.embeddings.eval()
    modes, before = [module.training for module in teacher.modules()], bits(teacher)
    run(model, teacher, rows(), tmp_path / "run", steps=2, cache=False)
    assert [module.training for module in teacher.modules()] == modes and same(bits(teacher), before)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_nothing_of_the_trainer_stays_in_the_model(family: str, lora: int | None, tmp_path: Path) -> None:
    rates = {"gpt2": {"resid_pdrop": 0.3}, "llama": {"attention_dropout": 0.3}, "bert": {"hidden_dropout_prob": 0.3}}
    model, teacher = tiny(family, **rates[family]).train(), tiny(family, seed=1)
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    model.save_pretrained(tmp_path / "before")  # notes the class and the type in its config
    config, attributes = model.config.to_json_string(), set(vars(model))
    drops = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    arguments = {"bf16": True, "gradient_checkpointing": True}
    run(model, teacher, rows(), tmp_path / "run", steps=2, lora=lora, arguments=arguments, learning_rate=1e-3)
    assert model.config.to_json_string() == config and set(vars(model)) == attributes
    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == drops
    assert not model.training and not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert output_of(model, rows()[0]).logits.dtype == torch.float32
    copy.deepcopy(model).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("epoch", [None, 1, 7, 50])
@pytest.mark.parametrize(("student", "teacher"), [(1.0, 0.5), (0.25, 2.0), (3.0, 0.125)])
def test_as_many_steps_are_taken_as_the_time_allows(student: float, teacher: float, epoch: int | None) -> None:
    """Counted step by step: the teacher runs in each step, or until it has seen every example."""
    for seconds in (0.1, 10.0, 31.0, 99.5):
        spent, steps = 0.0, 0
        while True:
            spent += student + (teacher if epoch is None or steps < epoch else 0.0)
            if spent > seconds:
                break
            steps += 1
        assert affordable_steps(seconds, student=student, teacher=teacher, epoch=epoch) == max(1, steps)


def test_minutes_become_steps_that_a_continued_run_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = cut("gpt2", "lm")
    other, reports = copy.deepcopy(model), list[RecoverReport]()
    run(model, teacher, rows(), tmp_path / "run", steps=None, minutes=0.005, on_report=reports.append)
    monkeypatch.setattr("hf_elastic.repair.recovery.timed_steps", None)  # is not asked again
    run(other, teacher, rows(), tmp_path / "run", steps=None, minutes=0.005, on_report=reports.append)
    assert reports[0].step_seconds is not None and 0 < reports[0].step_seconds < 1
    assert reports[0].steps >= 1 and reports[1].resumed_from == reports[0].steps == reports[1].steps
    assert reports[1].step_seconds == reports[0].step_seconds and same(bits(model), bits(other))


def test_timing_steps_changes_nothing_of_what_is_trained(tmp_path: Path) -> None:
    teacher, model = cut("llama", "lm")
    timed, reports = copy.deepcopy(model), list[RecoverReport]()
    run(timed, teacher, rows(), tmp_path / "timed", steps=None, minutes=0.003, on_report=reports.append)
    run(model, teacher, rows(), tmp_path / "given", steps=reports[0].steps)
    assert same(bits(timed), bits(model))
