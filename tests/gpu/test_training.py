"""Trainings on a device: subnets, distillation, mixed precision, checkpointing, adapters, and runs that go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import SETTINGS, randomise
from on_device import close, moved_alike, numbers_close, placed, sparse_adapted, stays
from tiny_models import inputs, space, tiny
from tiny_training import bert, bert_supernet, llama_supernet, same, sentences, texts, weights
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_elastic import (
    Distillation,
    ElasticConfig,
    ElasticLoraConfig,
    ElasticTrainer,
    FixedSubnet,
    ProgressiveShrinking,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
    SubnetStatistics,
    Supernet,
    TrainingError,
    add_lora,
    last_complete_checkpoint,
    make_elastic,
)
from hf_elastic.training import CompleteCheckpointCallback

Arguments = Callable[..., TrainingArguments]
FAST = {"learning_rate": 0.1, "weight_decay": 0.01}


def trained(model: Any, device: str) -> dict[str, Tensor]:
    """Weights behind a training, which are finite and where the training was."""
    stays(model, device)
    return weights(model)


# -- supernets --------------------------------------------------------------------------------------------------------


PLANS: dict[str, Any] = {
    "labels": False,
    "in place": True,
    "a teacher's states": lambda: Distillation(target="hidden_states", teacher=bert(seed=4)),
    "a teacher's embeddings": lambda: Distillation(target="embeddings", teacher=bert(seed=4), relational_weight=0.5),
    "top tokens": lambda: Distillation(teacher=bert(seed=4), top_tokens=2, temperature=2.0),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_sandwich_rule_trains_as_on_the_cpu(plan: str, device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made, distill = bert_supernet(skip=("mlp",)), PLANS[plan]
        trainer = ElasticTrainer(
            supernet=made,
            sampling=SandwichRule(seed=3, random=1),
            distill=distill() if callable(distill) else distill,
            args=arguments(where, gradient_accumulation_steps=2, **FAST),
            train_dataset=sentences(),
            eval_dataset=sentences(8, seed=7),
            eval_architectures={"small": made.space.smallest()},
        )
        trainer.train()
        metrics = trainer.evaluate()
        found.append((trained(made.model, where), metrics["eval_loss"], metrics["eval_small_loss"]))
    moved_alike(found[1][0], found[0][0], before=weights(bert_supernet(skip=("mlp",)).model))
    numbers_close(found[1][1:], found[0][1:], tolerance=1e-3, what="losses of the evaluation")


@pytest.mark.parametrize("per", ["step", "micro_batch"])
@pytest.mark.parametrize("make", [bert_supernet, llama_supernet], ids=["bert", "llama"])
def test_the_stock_trainer_trains_subnets_as_on_the_cpu(
    make: Callable[..., Supernet], per: Any, device: str, arguments: Arguments
) -> None:
    found = []
    for where in ("cpu", device):
        made = make(skip=("mlp",))
        rows = texts(uneven=True) if made.causal else sentences()
        sampling = SubnetSamplingCallback(made, RandomSubnet(seed=0), per=per, freeze_inactive=True)
        args = arguments(where, gradient_accumulation_steps=2, **FAST)
        Trainer(made.model, args, train_dataset=rows, callbacks=[sampling]).train()
        found.append(trained(made.model, where))
    moved_alike(found[1], found[0], before=weights(make(skip=("mlp",)).model))


def test_a_schedule_of_subnets_trains_as_on_the_cpu(device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made = llama_supernet()
        rule = ProgressiveShrinking(seed=1, steps_per_stage=1, subnets=2)
        ElasticTrainer(supernet=made, sampling=rule, args=arguments(where, **FAST), train_dataset=texts()).train()
        found.append(trained(made.model, where))
    moved_alike(found[1], found[0], before=weights(llama_supernet().model))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_of_the_largest_is_the_stock_step_on_the_device(optim: str, device: str, arguments: Arguments) -> None:
    made, plain = bert_supernet(), bert()
    sampling = SubnetSamplingCallback(made, FixedSubnet(made.space.largest()))
    Trainer(made.model, arguments(device, optim=optim), train_dataset=sentences(), callbacks=[sampling]).train()
    Trainer(plain, arguments(device, optim=optim), train_dataset=sentences()).train()
    assert same(trained(made.model, device), trained(plain, device))


@pytest.mark.parametrize("trainer", ["elastic", "stock"])
def test_mixed_precision_learns_nearly_what_single_precision_does(
    trainer: str, device: str, arguments: Arguments
) -> None:
    losses = []
    for bf16 in (False, True):
        made = bert_supernet(skip=("mlp",))
        args = arguments(device, bf16=bf16, max_steps=8, **FAST)
        given: dict[str, Any] = {"train_dataset": sentences(), "eval_dataset": sentences()}
        if trainer == "elastic":
            run: Trainer = ElasticTrainer(
                supernet=made, sampling=SandwichRule(seed=3), distill=True, args=args, **given
            )
        else:
            sampling = SubnetSamplingCallback(made, RandomSubnet(seed=3))
            run = Trainer(made.model, args, callbacks=[sampling], **given)
        before = run.evaluate()["eval_loss"]
        run.train()
        stays(made.model, device)
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        losses.append((run.evaluate()["eval_loss"], before))
    (single, before), (mixed, _) = losses
    assert single < before and mixed == pytest.approx(single, rel=0.02)


def test_loss_scaling_trains_subnets_without_weight_decay(device: str, arguments: Arguments) -> None:
    if torch.device(device).type == "cpu":
        pytest.skip("transformers scales losses for float16 on accelerators alone")
    before, made = weights(bert_supernet().model), bert_supernet()
    given: dict[str, Any] = {"sampling": SandwichRule(seed=3), "distill": True, "train_dataset": sentences()}
    args = arguments(device, fp16=True, weight_decay=0.0, max_steps=6, optim="adamw_torch")
    ElasticTrainer(supernet=made, args=args, **given).train()
    after = trained(made.model, device)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert any(not torch.equal(after[name].cpu(), tensor) for name, tensor in before.items())
    args = arguments(device, fp16=True, weight_decay=0.1, optim="adamw_torch")
    with pytest.raises(TrainingError, match="loss scaling may skip a step"):
        ElasticTrainer(supernet=bert_supernet(), args=args, **given).train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_weight(reentrant: bool, device: str, arguments: Arguments) -> None:
    found = []
    for checkpointed in (False, True):
        made = llama_supernet(skip=("mlp",))
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointed else {}
        args = arguments(device, gradient_checkpointing=checkpointed, **kwargs, **FAST)
        ElasticTrainer(
            supernet=made, sampling=SandwichRule(seed=3), distill=True, args=args, train_dataset=texts()
        ).train()
        found.append(trained(made.model, device))
    moved_alike(found[1], found[0], before=weights(llama_supernet(skip=("mlp",)).model))


# -- runs that go on --------------------------------------------------------------------------------------------------


SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch_fused"}


def interrupted(folder: Path) -> str:
    """The newest whole checkpoint but for the last, which an interrupted run had not written yet."""
    shutil.rmtree(folder / "checkpoint-4")
    found = last_complete_checkpoint(folder)
    assert found is not None and found.endswith("checkpoint-2")
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_with_dropout_resumes_bit_equal(bf16: bool, device: str, arguments: Arguments) -> None:
    args, finals, resume = arguments(device, bf16=bf16, gradient_accumulation_steps=2, **SAVING), [], None
    for _ in range(2):
        made = bert_supernet(skip=("mlp",), hidden_dropout_prob=0.2)
        ElasticTrainer(
            supernet=made,
            sampling=SandwichRule(seed=3, random=1),
            distill=True,
            per="micro_batch",
            args=args,
            train_dataset=sentences(),
        ).train(resume_from_checkpoint=resume)
        finals.append(trained(made.model, device))
        resume = interrupted(Path(str(args.output_dir))) if resume is None else resume
    assert same(*finals)


def test_a_run_of_the_stock_trainer_resumes_bit_equal(device: str, arguments: Arguments) -> None:
    args, finals, resume = arguments(device, **SAVING), [], None
    for _ in range(2):
        made = bert_supernet(hidden_dropout_prob=0.2)
        callbacks = [SubnetSamplingCallback(made, RandomSubnet(seed=0)), CompleteCheckpointCallback()]
        trainer = Trainer(made.model, args, train_dataset=sentences(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        finals.append(trained(made.model, device))
        resume = interrupted(Path(str(args.output_dir))) if resume is None else resume
    assert same(*finals)


def test_a_supernet_saved_on_the_device_is_restored_bit_equal(device: str, tmp_path: Path) -> None:
    made = placed(make_elastic(tiny("bert"), space("bert")), device)
    made.save_pretrained(tmp_path / "out")
    again = Supernet.from_pretrained(tmp_path / "out")
    stays(again.model, "cpu")
    assert same({n: t.cpu() for n, t in weights(made.model).items()}, weights(again.model))
    assert str(torch.device(device)) in str(made) or device == "cpu"


# -- adapters ---------------------------------------------------------------------------------------------------------


def lora_supernet(kind: str) -> Supernet:
    """Ranks alone, ranks on an elastic base, or adapters that are part of the weight of a sparse base of integers."""
    if kind == "in the weight":
        return sparse_adapted("integers")
    model = tiny("llama")
    if kind == "elastic base":
        make_elastic(model, ElasticConfig(intermediate_size=[16, 32], skip={1: ["mlp"]}))
    made = add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], "task_type": "CAUSAL_LM"}))
    randomise(made.model)
    return made


def lora_rows(count: int = 16) -> list[dict[str, Any]]:
    ids = inputs(tiny("llama"), batch_size=count)["input_ids"]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def adapter_weights(model: torch.nn.Module, device: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in trained(model, device).items() if ".lora_" in name}


LORAS = ["ranks", "elastic base", "in the weight"]


@pytest.mark.parametrize("trainer", ["elastic", "stock"])
@pytest.mark.parametrize("kind", LORAS)
def test_adapters_are_trained_as_on_the_cpu(kind: str, trainer: str, device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made = lora_supernet(kind)
        before = {n: p.detach().clone() for n, p in made.model.named_parameters() if not p.requires_grad}
        statistics = SubnetStatistics(made)
        given: dict[str, Any] = {"args": arguments(where, learning_rate=0.1), "train_dataset": lora_rows()}
        if trainer == "elastic":
            run: Trainer = ElasticTrainer(
                supernet=made, sampling=SandwichRule(seed=3, random=1), distill=True, callbacks=[statistics], **given
            )
        else:
            sampling = SubnetSamplingCallback(made, RandomSubnet(seed=5))
            run = Trainer(model=made.model, callbacks=[sampling, statistics], **given)
        run.train()
        after = {n: p.detach().cpu() for n, p in made.model.named_parameters() if not p.requires_grad}
        assert same(before, after), "the frozen base moved"
        found.append((adapter_weights(made.model, where), statistics))
    # Rounding to a grid is a step: which weights take it may differ.
    tolerance = 0.1 if kind == "in the weight" else 1e-3
    moved_alike(found[1][0], found[0][0], before=weights(lora_supernet(kind).model), tolerance=tolerance)
    (_, there), (_, here) = found
    assert here.steps == there.steps > 0 and here.most_frequent() == there.most_frequent()


@pytest.mark.parametrize("kind", ["ranks", "in the weight"])
def test_adapters_and_their_statistics_resume_bit_equal(kind: str, device: str, arguments: Arguments) -> None:
    args, finals, told, resume = arguments(device, **SAVING), [], list[Mapping[str, Any]](), None
    for _ in range(2):
        made = lora_supernet(kind)
        statistics = SubnetStatistics(made)
        callbacks = [SubnetSamplingCallback(made, RandomSubnet(seed=5)), statistics, CompleteCheckpointCallback()]
        trainer = Trainer(model=made.model, args=args, train_dataset=lora_rows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        finals.append(adapter_weights(made.model, device))
        told.append(statistics.lowest_loss_values())
        resume = interrupted(Path(str(args.output_dir))) if resume is None else resume
    assert same(*finals) and dict(told[0]) == dict(told[1])


@pytest.mark.parametrize("kind", LORAS)
def test_adapters_learn_in_mixed_precision(kind: str, device: str, arguments: Arguments) -> None:
    made = lora_supernet(kind)
    args = arguments(device, bf16=True, learning_rate=0.2, max_steps=8)
    trainer = ElasticTrainer(
        supernet=made, sampling=SandwichRule(seed=3), args=args, train_dataset=lora_rows(), eval_dataset=lora_rows()
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    stays(made.model, device)
    assert trainer.evaluate()["eval_loss"] < before


def test_ranks_by_activation_are_those_of_the_cpu(device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made = lora_supernet("ranks")
        statistics = SubnetStatistics(made)
        sampling = SubnetSamplingCallback(made, RandomSubnet(seed=5))
        args = arguments(where)
        Trainer(model=made.model, args=args, train_dataset=lora_rows(), callbacks=[sampling, statistics]).train()
        found.append(statistics)
    names = list(found[0]._energy)
    for name in names:
        close(found[1]._energy[name], found[0]._energy[name], tolerance=1e-3, what=f"energy of {name}")
