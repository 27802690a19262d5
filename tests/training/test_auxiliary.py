"""What routers add to the loss of a step, and which parameters it reaches: against sums written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_routed import EVERY_KIND, plain, routed
from tiny_training import GradientsOfFirstStep, llama_supernet, texts
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_elastic import Supernet
from hf_elastic.distillation import label_mask, logits_loss
from hf_elastic.errors import TrainingError
from hf_elastic.routing import RoutingConfig, add_routing, train_routers
from hf_elastic.space import Architecture
from hf_elastic.training import (
    Distillation,
    ElasticTrainer,
    FixedSubnet,
    RandomSubnet,
    RoutingLosses,
    SandwichRule,
    SubnetSamplingCallback,
)

Arguments = Callable[..., TrainingArguments]
PARENT = Distillation(teacher="parent", label_weight=0)
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}
WEIGHTS = RoutingLosses(tokens=0.3, balance=0.7)


def first_gradients(supernet: Supernet, args: TrainingArguments, **kwargs: Any) -> dict[str, Tensor]:
    keep = GradientsOfFirstStep()
    settings = {"distill": PARENT, "routing": WEIGHTS, "train_dataset": texts(4), **kwargs}
    ElasticTrainer(supernet=supernet, args=args, callbacks=[keep], **settings).train()
    return keep.found


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def step_by_hand(supernet: Supernet, batch: dict[str, Tensor], architecture: Architecture) -> Tensor:
    """The loss of a subnet: KL from a second copy of the stock model, and the means of what its routers noted."""
    with torch.no_grad():
        teacher = plain()(**batch).logits
    outputs = supernet.model.train()(**batch)
    losses = supernet.router_parts[0].routers.context.losses
    loss = logits_loss(outputs.logits, teacher, mask=label_mask(batch["labels"], shifted=True))
    for kind, factor in (("tokens", 0.3), ("balance", 0.7)):
        each = losses.get(kind, [])
        assert len(each) == sum(kinds_of(kind, supernet, architecture))
        loss = loss + factor * sum(each, torch.zeros(())) / max(1, len(each))
    return loss


def kinds_of(kind: str, supernet: Supernet, architecture: Architecture) -> list[bool]:
    """Which routers of the architecture add a loss of a kind: those that it does not bypass."""
    names = ("mlp_tokens", "attention_tokens") if kind == "tokens" else ("heads", "experts")
    largest = supernet.space.largest()
    return [value != largest[name] for name, value in architecture.items() if name.rpartition(".")[2] in names]


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_has_the_gradient_of_distillation_and_the_means_of_router_losses_over_its_subnets(
    arguments: Arguments,
) -> None:
    supernet, rule, batch = routed(), SandwichRule(seed=3, random=2), collated(texts(4))
    drawn = rule.draw(supernet.space, 0, 0)
    supernet.model.zero_grad()
    for architecture in drawn:
        with supernet.activate(architecture):
            (step_by_hand(supernet, batch, architecture) / len(drawn)).backward()
    expected = {name: p.grad.clone() for name, p in supernet.model.named_parameters() if p.grad is not None}
    assert any("routers" in name for name in expected) and any("lora_" in name for name in expected)
    assert_equal_gradients(first_gradients(supernet, arguments(**ONE_STEP), sampling=rule), expected)


def test_micro_batches_add_up_to_the_mean_of_their_losses(arguments: Arguments) -> None:
    supernet, rows = routed(), texts(4)
    small = supernet.space.smallest()
    args = arguments(**ONE_STEP, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = ElasticTrainer(
        supernet=supernet, args=args, train_dataset=rows, sampling=FixedSubnet(small), distill=PARENT, routing=WEIGHTS
    )
    order = [{name: batch[name] for name in rows[0]} for batch in trainer.get_train_dataloader()]
    supernet.model.zero_grad()
    with supernet.activate(small):
        for batch in order:
            (step_by_hand(supernet, batch, small) / 2).backward()
    expected = {name: p.grad.clone() for name, p in supernet.model.named_parameters() if p.grad is not None}
    supernet.model.zero_grad()
    found = first_gradients(supernet, args, sampling=FixedSubnet(small), train_dataset=rows)
    for name, gradient in expected.items():  # one seed shuffles both in one order
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpointed_activations_give_the_same_gradients(arguments: Arguments) -> None:
    found = []
    for checkpointing in (False, True):
        args = arguments(**ONE_STEP, gradient_checkpointing=checkpointing)
        found.append(first_gradients(routed(), args, sampling=SandwichRule(seed=3, random=1)))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_reentrant_checkpointing_which_hides_router_losses_is_refused(arguments: Arguments) -> None:
    args = arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    supernet = routed()
    with pytest.raises(TrainingError, match="'use_reentrant': False"):
        first_gradients(supernet, args, sampling=FixedSubnet(supernet.space.smallest()))
    assert supernet.active == supernet.space.largest()


@pytest.mark.parametrize("trainer", ["stock", "elastic"])
def test_a_router_that_is_bypassed_gets_no_gradient_and_does_not_move(arguments: Arguments, trainer: str) -> None:
    supernet = routed(config=RoutingConfig(mlp_tokens=[0.5], experts=[2], num_experts=4))
    values = {**supernet.space.largest(), "layers.0.mlp_tokens": 50, "layers.1.experts": 2}
    rule = FixedSubnet(supernet.space.canonical(values))
    before = {name: p.detach().clone() for name, p in supernet.model.named_parameters()}
    args = arguments(max_steps=3, weight_decay=0.3)
    if trainer == "stock":
        sampling = SubnetSamplingCallback(supernet, rule)
        Trainer(model=supernet.model, args=args, train_dataset=texts(), callbacks=[sampling]).train()
    else:
        ElasticTrainer(supernet=supernet, args=args, train_dataset=texts(), sampling=rule, distill=PARENT).train()
    moved = {name for name, p in supernet.model.named_parameters() if not torch.equal(p, before[name])}
    used = {"layers.0.routers.mlp_tokens", "layers.1.routers.experts"}
    assert {".".join(name.split(".")[-6:-2]) for name in moved if "routers" in name} == used
    assert all("routers" in name or "lora_" in name for name in moved)


def test_a_subnet_that_uses_nothing_trained_is_run_and_teaches_nothing(arguments: Arguments) -> None:
    supernet = routed(adapters=None)
    largest = FixedSubnet(supernet.space.largest())
    before = {name: p.detach().clone() for name, p in supernet.model.named_parameters()}
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=largest)
    assert all(not gradient.any() for gradient in found.values())
    assert all(torch.equal(p, before[name]) for name, p in supernet.model.named_parameters())
    # Beside others, in the order in which it comes first, it changes nothing but the share of their losses.
    both = SandwichRule(seed=0, random=0)
    together = first_gradients(routed(adapters=None), arguments(**ONE_STEP), sampling=both)
    small = FixedSubnet(supernet.space.smallest())
    alone = first_gradients(routed(adapters=None), arguments(**ONE_STEP), sampling=small)
    for name, gradient in alone.items():
        torch.testing.assert_close(2 * together[name], gradient, msg=name)


def test_routers_that_get_peft_model_froze_are_refused_until_train_routers(arguments: Arguments) -> None:
    from peft import LoraConfig, get_peft_model

    stock = plain()
    add_routing(stock, EVERY_KIND)
    model = get_peft_model(stock, LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    supernet = Supernet(model)
    settings: dict[str, Any] = {"sampling": RandomSubnet(seed=0), "distill": PARENT, "train_dataset": texts()}
    with pytest.raises(TrainingError, match=r"layer 0 is frozen.*hf_elastic.train_routers\(model\)"):
        ElasticTrainer(supernet=supernet, args=arguments(), **settings).train()
    assert train_routers(model) is model
    ElasticTrainer(supernet=supernet, args=arguments(max_steps=1), **settings).train()


def test_routers_that_were_trained_may_be_frozen(arguments: Arguments) -> None:
    supernet = routed()
    for part in supernet.router_parts:
        part.routers.requires_grad_(False)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=RandomSubnet(seed=0))
    assert found and all("lora_" in name for name in found)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "much", True])
def test_a_factor_that_is_no_number_of_at_least_zero_is_refused(value: Any) -> None:
    with pytest.raises(TrainingError, match="at least 0"):
        RoutingLosses(balance=value)


def test_factors_for_a_model_without_routers_are_refused(arguments: Arguments) -> None:
    settings: dict[str, Any] = {"sampling": RandomSubnet(seed=0), "args": arguments(), "train_dataset": texts()}
    with pytest.raises(TrainingError, match="no routers"):
        ElasticTrainer(supernet=llama_supernet(), routing=RoutingLosses(), **settings)
    wrong: Any = {"tokens": 1}
    with pytest.raises(TrainingError, match="RoutingLosses"):
        ElasticTrainer(supernet=routed(), routing=wrong, **settings)
