"""Optimizer steps on active slices, against stock optimizers on whole and on hand-sliced weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tiny_training import bert_supernet, same, sentences, weights
from torch import Tensor

from hf_elastic import Supernet
from hf_elastic.errors import TrainingError
from hf_elastic.space import Architecture
from hf_elastic.training.decay import ActiveSliceStep

Optimizer = torch.optim.Optimizer
Build = Callable[[Any], Optimizer]

STOCK: dict[str, Build] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3),
    "adam-maximize": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3, maximize=True),
    "nadam-decoupled": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.3, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.3, momentum=0.9),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.3, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=0.3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2, weight_decay=0.3),
}
every_optimizer = pytest.mark.parametrize("build", STOCK.values(), ids=STOCK.keys())


def batch(number: int) -> dict[str, Tensor]:
    rows = sentences(4, seed=number)
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def small(supernet: Supernet, **changes: int | str) -> Architecture:
    """A subnet of FFN width 16 and one head, unless ``changes`` say otherwise by the end of the name."""
    sizes: dict[str, int | str] = {
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "skip": "none",
        **changes,
    }
    return supernet.space.canonical({name: sizes[name.rpartition(".")[2]] for name in supernet.space.names})


def steps_of(
    supernet: Supernet,
    optimizer: Optimizer,
    subnets: list[list[Architecture]],
    *,
    freeze: bool = False,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs one optimizer step per list of subnets, with the gradients of all of them added up."""
    slices = ActiveSliceStep(supernet, freeze_inactive=freeze)
    slices.start(optimizer)
    for step, drawn in enumerate(subnets):
        optimizer.zero_grad()
        slices.forget()
        for architecture in drawn:
            with supernet.activate(architecture):
                slices.record()
                supernet.model(**batch(step)).loss.backward()
        slices.before_step(optimizer)
        optimizer.step()
        slices.after_step()
        after(step)
    slices.release()


@every_optimizer
def test_steps_of_the_largest_subnet_are_bit_equal_to_the_stock_optimizer(build: Build) -> None:
    supernet, stock = bert_supernet(), bert_supernet()
    optimizer = build(stock.model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        stock.model(**batch(step)).loss.backward()
        optimizer.step()
    steps_of(supernet, build(supernet.model.parameters()), [[supernet.space.largest()]] * 4)
    assert same(weights(supernet.model), weights(stock.model))


@every_optimizer
def test_steps_of_a_subnet_move_its_slices_as_the_stock_optimizer_moves_hand_sliced_copies(
    build: Build,
) -> None:
    supernet = bert_supernet()
    before, architecture = weights(supernet.model), small(supernet)
    with supernet.activate(architecture):
        regions = supernet.active_regions()
    # The oracle: each active box is a parameter of its own, fed the slice of the same gradient.
    copies: dict[str, list[Tensor]] = {}
    for name, p in supernet.model.named_parameters():
        copies[name] = [p.detach()[box].clone().requires_grad_() for box in regions.get(name, ((...,),))]
    oracle = build([copy for held in copies.values() for copy in held])
    optimizer = build(supernet.model.parameters())
    slices = ActiveSliceStep(supernet)
    slices.start(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        slices.forget()
        with supernet.activate(architecture):
            slices.record()
            supernet.model(**batch(step)).loss.backward()
        for name, p in supernet.model.named_parameters():
            for copy, box in zip(copies[name], regions.get(name, ((...,),)), strict=True):
                copy.grad = None if p.grad is None else p.grad[box].clone()
        slices.before_step(optimizer)
        optimizer.step()
        slices.after_step()
        oracle.step()
    for name, p in supernet.model.named_parameters():
        expected = before[name].clone()
        for copy, box in zip(copies[name], regions.get(name, ((...,),)), strict=True):
            expected[box] = copy.detach()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7, msg=name)
        untouched = torch.ones_like(p, dtype=torch.bool)
        for box in regions.get(name, ((...,),)):
            untouched[box] = False
        assert torch.equal(p.detach()[untouched], before[name][untouched]), name


@every_optimizer
def test_a_slice_that_no_subnet_used_does_not_move_at_all(build: Build) -> None:
    supernet = bert_supernet(skip=("mlp", "layer"))
    before = weights(supernet.model)
    wide, heads = small(supernet, intermediate_size=32), small(supernet, num_attention_heads=2)
    skipping = supernet.space.canonical({**small(supernet), "layers.1.skip": "layer"})
    steps_of(supernet, build(supernet.model.parameters()), [[wide], [heads], [skipping], [wide, heads]])
    for name, p in supernet.model.named_parameters():
        moved = p.detach() != before[name]
        if "intermediate.dense" in name:
            assert not moved[32:].any(), name
        elif "attention.self" in name:
            assert not moved[16:].any() and moved[:16].any(), name
        elif name.endswith("attention.output.dense.weight"):
            assert not moved[:, 16:].any(), name
    alone = bert_supernet(skip=("layer",))
    before = weights(alone.model)
    skipping = alone.space.canonical({**alone.space.largest(), "layers.1.skip": "layer"})
    steps_of(alone, build(alone.model.parameters()), [[skipping]] * 3)
    third = [name for name in before if ".layer.1." in name]
    assert third and all(torch.equal(before[name], weights(alone.model)[name]) for name in third)


def test_decay_acts_on_the_union_of_subnets_that_are_not_nested() -> None:
    supernet = bert_supernet()
    wide, heads = small(supernet, intermediate_size=48), small(supernet, num_attention_heads=4)
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    parameter = dict(supernet.model.named_parameters())[name]
    before = weights(supernet.model)
    # A rate of 1 and zero gradients leave nothing but the decay to be seen.
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1.0, weight_decay=0.5)
    slices = ActiveSliceStep(supernet)
    slices.start(optimizer)
    for p in supernet.model.parameters():
        p.grad = torch.zeros_like(p)
    for architecture in (wide, heads):
        with supernet.activate(architecture):
            slices.record()
    slices.before_step(optimizer)
    optimizer.step()
    slices.after_step()
    assert torch.equal(parameter.detach(), before[name] * 0.5)
    assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)


@pytest.mark.parametrize("freeze", [False, True])
def test_momentum_moves_what_was_active_earlier_unless_it_is_frozen(freeze: bool) -> None:
    supernet = bert_supernet()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    seen: list[Tensor] = []
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2, weight_decay=0.3)
    steps_of(
        supernet,
        optimizer,
        [[supernet.space.largest()], [small(supernet)]],
        freeze=freeze,
        after=lambda step: seen.append(weights(supernet.model)[name]),
    )
    assert torch.equal(seen[0][16:], seen[1][16:]) == freeze
    assert not torch.equal(seen[0][:16], seen[1][:16])


def test_freezing_changes_nothing_for_the_active_slices() -> None:
    drawn = []
    for freeze in (False, True):
        supernet = bert_supernet()
        optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2, weight_decay=0.3)
        steps_of(supernet, optimizer, [[small(supernet)]] * 3, freeze=freeze)
        drawn.append(weights(supernet.model))
    assert same(*drawn)


def test_a_parameter_without_a_gradient_is_not_decayed() -> None:
    supernet = bert_supernet()
    frozen = supernet.model.bert.encoder.layer[1].intermediate.dense.weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    steps_of(supernet, torch.optim.AdamW(supernet.model.parameters(), weight_decay=0.3), [[small(supernet)]])
    assert torch.equal(frozen, before)


def test_the_saved_optimizer_state_is_a_stock_one() -> None:
    supernet = bert_supernet()
    optimizer = torch.optim.AdamW(supernet.model.parameters(), weight_decay=0.3)
    keys = set(optimizer.param_groups[0])
    states: list[dict[str, Any]] = []
    steps_of(supernet, optimizer, [[small(supernet)]] * 2, after=lambda step: states.append(optimizer.state_dict()))
    assert [state["param_groups"][0]["weight_decay"] for state in states] == [0.3, 0.3]
    assert set(states[0]["param_groups"][0]) == {*keys}


def test_a_step_that_raises_gives_the_decay_back_on_release() -> None:
    supernet = bert_supernet()
    optimizer = torch.optim.AdamW(supernet.model.parameters(), weight_decay=0.3)
    slices = ActiveSliceStep(supernet)
    slices.start(optimizer)
    with supernet.activate(small(supernet)):
        slices.record()
        supernet.model(**batch(0)).loss.backward()
    slices.before_step(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    slices.release()
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_the_wrapper_of_accelerate_is_seen_through() -> None:
    supernet = bert_supernet()
    wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(supernet.model.parameters(), weight_decay=0.3))
    assert isinstance(wrapped, AcceleratedOptimizer)
    before = weights(supernet.model)
    steps_of(supernet, wrapped, [[small(supernet)]])
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(weights(supernet.model)[name][16:], before[name][16:])


class Unknown(torch.optim.Optimizer):
    def __init__(self, parameters: Any, *, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * group["weight_decay"] * p.data)


def test_an_optimizer_that_decays_in_an_unknown_way_is_refused_only_if_it_decays_elastic_weights() -> None:
    supernet = bert_supernet()
    slices = ActiveSliceStep(supernet)
    with pytest.raises(TrainingError, match="Unknown would decay inactive slices"):
        slices.start(Unknown(supernet.model.parameters(), weight_decay=0.1))
    slices.start(Unknown(supernet.model.parameters(), weight_decay=0.0))
    slices.start(Unknown(supernet.model.classifier.parameters(), weight_decay=0.1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(TrainingError, match="no parameter of the supernet"):
        ActiveSliceStep(bert_supernet()).start(torch.optim.AdamW(bert_supernet().model.parameters()))


def test_loss_scaling_is_refused_with_weight_decay() -> None:
    supernet = bert_supernet()
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(
        torch.optim.AdamW(supernet.model.parameters(), weight_decay=0.1), scaler=torch.amp.GradScaler("cpu")
    )
    with pytest.raises(TrainingError, match="fp16"):
        ActiveSliceStep(supernet).start(optimizer)
