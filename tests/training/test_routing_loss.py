"""The loss for the stock Trainer, against what ElasticTrainer does with the same plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_routed import routed
from tiny_training import same, sentences, texts, weights
from transformers import Trainer, TrainingArguments

from hf_elastic import Supernet
from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.training import (
    Distillation,
    ElasticTrainer,
    FixedSubnet,
    RandomSubnet,
    RoutingLoss,
    RoutingLosses,
    SamplingRule,
    SubnetSamplingCallback,
)

Arguments = Callable[..., TrainingArguments]
WEIGHTS = RoutingLosses(tokens=0.3, balance=0.7)


def unlabelled(count: int = 20) -> list[dict[str, Any]]:
    rows = sentences(count, labels=False)
    return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]


def train_stock(
    supernet: Supernet, args: TrainingArguments, rows: Any, *, plan: Distillation, rule: SamplingRule, per: Any = "step"
) -> Trainer:
    loss = RoutingLoss(supernet, plan, routing=WEIGHTS)
    sampling = SubnetSamplingCallback(supernet, rule, per=per)
    trainer = Trainer(
        model=supernet.model, args=args, train_dataset=rows, compute_loss_func=loss, callbacks=[sampling, loss]
    )
    trainer.train()
    return trainer


CASES: dict[str, tuple[str, str, Distillation, Any]] = {
    "logits without labels": ("llama", "lm", Distillation(teacher="parent"), unlabelled()),
    "logits where there are labels": (
        "llama", "lm", Distillation(teacher="parent", label_weight=0), texts(20, uneven=True)
    ),
    "logits and labels": (
        "llama", "lm", Distillation(teacher="parent", label_weight=0.5, top_tokens=5), texts(20, uneven=True)
    ),
    "hidden states": ("llama", "lm", Distillation(teacher="parent", target="hidden_states"), unlabelled()),
    "embeddings": ("bert", "base", Distillation(teacher="parent", target="embeddings"), unlabelled()),
    "in place": ("llama", "lm", Distillation(label_weight=0.5), texts(20)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapters", ["stock", None])
def test_both_trainers_end_with_the_same_weights(arguments: Arguments, case: str, adapters: str | None) -> None:
    family, head, plan, rows = CASES[case]
    # 20 rows are 10 micro-batches: 3 steps of 3 and one of a single micro-batch, and a second epoch.
    args = arguments(gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=6, max_grad_norm=0.0)
    one, other = routed(family, head, adapters=adapters), routed(family, head, adapters=adapters)
    rule = RandomSubnet(seed=2)
    settings: dict[str, Any] = {"sampling": rule, "per": "micro_batch", "routing": WEIGHTS}
    ElasticTrainer(supernet=one, distill=plan, args=args, train_dataset=rows, **settings).train()
    train_stock(other, args, rows, plan=plan, rule=rule, per="micro_batch")
    ours, stock = weights(one.model), weights(other.model)
    assert not same(ours, weights(routed(family, head, adapters=adapters).model))
    for name, weight in ours.items():
        torch.testing.assert_close(stock[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("trainer", ["stock", "elastic"])
@pytest.mark.parametrize("adapters", ["stock", None])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    arguments: Arguments, adapters: str | None, trainer: str
) -> None:
    # 10 micro-batches: steps of 3, 3, 3 and 1; the first run stops in front of the last one.
    finals = []
    for first in (4, 3):
        for steps in dict.fromkeys((first, 4)):
            supernet = routed(adapters=adapters)
            args = arguments(
                max_steps=steps, save_strategy="steps", save_steps=3, lr_scheduler_type="constant",
                gradient_accumulation_steps=3, per_device_train_batch_size=2,
            )  # fmt: skip
            args.output_dir = f"{args.output_dir}-{first}"
            plan, rule = Distillation(teacher="parent", label_weight=0), RandomSubnet(seed=2)
            settings: dict[str, Any] = {"args": args, "train_dataset": unlabelled()}
            if trainer == "stock":
                loss, sampling = RoutingLoss(supernet, plan, routing=WEIGHTS), SubnetSamplingCallback(supernet, rule)
                both = [sampling, loss]
                run = Trainer(model=supernet.model, compute_loss_func=loss, callbacks=both, **settings)
            else:
                run = ElasticTrainer(supernet=supernet, sampling=rule, distill=plan, routing=WEIGHTS, **settings)
            run.train(resume_from_checkpoint=steps != first or None)
        finals.append(weights(supernet.model))
    assert same(*finals)


@pytest.mark.parametrize("trainer", ["stock", "elastic"])
def test_a_checkpoint_of_adapters_without_their_routers_is_refused(arguments: Arguments, trainer: str) -> None:
    settings: dict[str, Any] = {"train_dataset": unlabelled()}
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
    for resumes in (False, True):
        supernet, rule = routed(), RandomSubnet(seed=2)
        if trainer == "stock":
            loss, sampling = RoutingLoss(supernet), SubnetSamplingCallback(supernet, rule)
            both = [sampling, loss]
            run = Trainer(model=supernet.model, args=args, compute_loss_func=loss, callbacks=both, **settings)
        else:
            plan = Distillation(teacher="parent")
            run = ElasticTrainer(supernet=supernet, args=args, sampling=rule, distill=plan, **settings)
        if not resumes:
            run.train()
            (file,) = Path(args.output_dir).glob("checkpoint-1/elastic_routers.safetensors")
            file.unlink()
            continue
        with pytest.raises(CheckpointError, match="elastic_routers.* (cannot be read.*output_dir|is missing)"):
            run.train(resume_from_checkpoint=str(file.parent))


def test_an_evaluation_gives_the_loss_of_the_labels(arguments: Arguments) -> None:
    supernet, rows = routed(), texts(8, uneven=True)
    args = arguments(max_steps=1)
    trainer = train_stock(supernet, args, rows, plan=Distillation(teacher="parent"), rule=RandomSubnet(seed=2))
    found = trainer.evaluate(rows)["eval_loss"]
    plain = Trainer(model=supernet.model, args=args).evaluate(rows)["eval_loss"]
    assert found == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("labels", "kind"), [(1, "regression"), (3, "classification")])
def test_labels_of_sequences_are_learned_as_by_elastic_trainer(arguments: Arguments, labels: int, kind: str) -> None:
    rows = [{**row, "labels": float(row["labels"]) if labels == 1 else row["labels"]} for row in sentences(16)]
    plan = Distillation(teacher="parent", divergence="mse", weight=1e-6)
    args, rule = arguments(gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0.0), RandomSubnet(seed=2)
    found = []
    for trainer in ("elastic", "stock"):
        supernet = routed("llama", "sequence")
        supernet.base.config.num_labels = labels
        supernet.base.num_labels = labels
        supernet.base.score = torch.nn.Linear(32, labels, bias=False).requires_grad_(False)
        torch.nn.init.constant_(supernet.base.score.weight, 0.1)
        supernet.base.config.pad_token_id = 0
        if trainer == "stock":
            train_stock(supernet, args, rows, plan=plan, rule=rule)
        else:
            ElasticTrainer(
                supernet=supernet, distill=plan, args=args, train_dataset=rows, sampling=rule, routing=WEIGHTS
            ).train()
        found.append({name: w for name, w in weights(supernet.model).items() if "lora_" in name or "routers" in name})
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5, msg=f"{kind}: {name}")


def test_a_run_leaves_no_hook_on_the_model_and_an_exception_none_behind_the_block(arguments: Arguments) -> None:
    supernet = routed()
    hooks = (supernet.model._forward_hooks, supernet.model._forward_pre_hooks)
    before = [len(each) for each in hooks]
    train_stock(
        supernet, arguments(max_steps=1), texts(), plan=Distillation(teacher="parent"), rule=RandomSubnet(seed=2)
    )
    assert [len(each) for each in hooks] == before
    loss, sampling = RoutingLoss(supernet), SubnetSamplingCallback(supernet, RandomSubnet(seed=2))
    broken = [{"input_ids": torch.tensor([1000, 2, 3])}] * 4
    trainer = Trainer(
        model=supernet.model, args=arguments(), train_dataset=broken, compute_loss_func=loss, callbacks=[sampling, loss]
    )
    with pytest.raises(IndexError), loss, sampling:
        trainer.train()
    assert [len(each) for each in hooks] == before
    assert supernet.active == supernet.space.largest()


@pytest.mark.parametrize("missing", ["loss", "sampling"])
def test_a_run_without_one_of_the_two_callbacks_is_refused(arguments: Arguments, missing: str) -> None:
    supernet = routed()
    loss, sampling = RoutingLoss(supernet), SubnetSamplingCallback(supernet, RandomSubnet(seed=2))
    callbacks: list[Any] = [sampling] if missing == "loss" else [loss]
    trainer = Trainer(
        model=supernet.model, args=arguments(), train_dataset=texts(), compute_loss_func=loss, callbacks=callbacks
    )
    with (
        sampling,
        loss,
        pytest.raises(TrainingError, match=r"callbacks=\[" if missing == "loss" else "nothing samples"),
    ):
        trainer.train()


def test_in_place_distillation_without_labels_is_refused(arguments: Arguments) -> None:
    supernet = routed()
    rule = FixedSubnet(supernet.space.smallest())
    with pytest.raises(TrainingError, match="teacher='parent'"):
        train_stock(supernet, arguments(), unlabelled(), plan=Distillation(), rule=rule)


def test_a_relational_distillation_is_refused() -> None:
    with pytest.raises(TrainingError, match="ElasticTrainer"):
        RoutingLoss(routed(), Distillation(target="relational"))


@pytest.mark.parametrize("trainer", ["stock", "elastic"])
def test_training_makes_routers_uncalibrated(arguments: Arguments, trainer: str) -> None:
    supernet, rows = routed("llama", "lm"), unlabelled()
    routers = [part.routers[kind] for part in supernet.router_parts for kind in part.routers if "tokens" in kind]
    with torch.no_grad():
        for router in routers:
            router.thresholds.fill_(0.0)
    plan, args = Distillation(teacher="parent", label_weight=0.0), arguments(max_steps=1)
    if trainer == "stock":
        train_stock(supernet, args, rows, plan=plan, rule=RandomSubnet(seed=0))
    else:
        sampling = RandomSubnet(seed=0)
        ElasticTrainer(supernet=supernet, sampling=sampling, distill=plan, args=args, train_dataset=rows).train()
    assert routers and all(router.thresholds.isnan().all() for router in routers)


def test_a_loss_of_a_model_instead_of_its_handle_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"takes the handle, Supernet\(model\), got a LlamaForCausalLM"):
        RoutingLoss(routed("llama", "lm", adapters=None).model)  # type: ignore[arg-type]
