"""SubnetSamplingCallback in the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_training import bert, bert_supernet, llama_supernet, same, sentences, texts, weights
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_elastic import Supernet
from hf_elastic.errors import TrainingError
from hf_elastic.space import Architecture
from hf_elastic.training import (
    ElasticTrainer,
    FixedSubnet,
    ProgressiveShrinking,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
)

Arguments = Callable[..., TrainingArguments]


class Recorder(TrainerCallback):
    """Writes down what is active at each event."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self.outside: list[Architecture] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.outside.append(self.supernet.active)

    on_epoch_begin = on_step_end = on_epoch_end = on_evaluate = on_save = on_log = on_train_end = on_train_begin


def forwards(model: nn.Module, supernet: Supernet) -> list[Architecture]:
    """What is active in each training forward from now on."""
    seen: list[Architecture] = []
    model.register_forward_pre_hook(lambda *_: seen.append(supernet.active) if model.training else None)
    return seen


def stock(supernet: Supernet, args: TrainingArguments, *callbacks: TrainerCallback, **kwargs: Any) -> Trainer:
    return Trainer(model=supernet.model, args=args, train_dataset=sentences(), callbacks=list(callbacks), **kwargs)


def test_the_drawn_subnet_is_active_in_a_step_and_the_largest_outside(arguments: Arguments) -> None:
    supernet, rule = bert_supernet(skip=("layer",)), RandomSubnet(seed=4)
    recorder, seen = Recorder(supernet), forwards(supernet.model, supernet)
    sampling = SubnetSamplingCallback(supernet, rule)
    args = arguments(
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    # The recorder stands behind the sampling callback, and so sees what it leaves.
    stock(supernet, args, sampling, recorder, eval_dataset=sentences(4)).train()
    assert seen == [rule.draw(supernet.space, step, 0)[0] for step in range(4) for _ in range(2)]
    assert len(set(seen)) > 2
    assert set(recorder.outside) == {supernet.space.largest()}


def test_per_micro_batch_each_one_gets_a_subnet_of_its_own(arguments: Arguments) -> None:
    supernet, rule = bert_supernet(), RandomSubnet(seed=4)
    seen = forwards(supernet.model, supernet)
    sampling = SubnetSamplingCallback(supernet, rule, per="micro_batch")
    stock(supernet, arguments(gradient_accumulation_steps=2), sampling).train()
    assert seen == [rule.draw(supernet.space, step, micro)[0] for step in range(4) for micro in range(2)]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"])
def test_training_the_largest_subnet_is_bit_equal_to_the_stock_trainer(arguments: Arguments, optim: str) -> None:
    supernet, plain = bert_supernet(), bert()
    args = arguments(optim=optim, gradient_accumulation_steps=2)
    stock(supernet, args, SubnetSamplingCallback(supernet, FixedSubnet(supernet.space.largest()))).train()
    Trainer(model=plain, args=args, train_dataset=sentences()).train()
    assert same(weights(supernet.model), weights(plain))


def test_training_one_subnet_is_training_the_sliced_model_alone(arguments: Arguments) -> None:
    supernet, alone = bert_supernet(), bert(intermediate_size=16)
    values = {name: 16 if name.endswith("intermediate_size") else 4 for name in supernet.space.names}
    architecture = supernet.space.canonical(values)
    big = weights(supernet.model)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(big[name][tuple(slice(0, size) for size in p.shape)])
    stock(supernet, arguments(), SubnetSamplingCallback(supernet, FixedSubnet(architecture))).train()
    Trainer(model=alone, args=arguments(), train_dataset=sentences()).train()
    after = weights(supernet.model)
    for name, p in alone.named_parameters():
        sliced = after[name][tuple(slice(0, size) for size in p.shape)]
        torch.testing.assert_close(sliced, p.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing_recomputes_the_subnet_of_the_step(arguments: Arguments) -> None:
    finals = []
    for checkpointing in (False, True):
        supernet = llama_supernet(skip=("mlp",))
        sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=1), per="micro_batch")
        args = arguments(gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
        Trainer(model=supernet.model, args=args, train_dataset=texts(), callbacks=[sampling]).train()
        finals.append(weights(supernet.model))
    assert same(*finals)


class Bomb(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")


def test_after_an_exception_release_makes_the_largest_active_again(arguments: Arguments) -> None:
    supernet = bert_supernet()
    small = supernet.space.smallest()
    sampling = SubnetSamplingCallback(supernet, FixedSubnet(small))
    with pytest.raises(RuntimeError, match="boom"):
        stock(supernet, arguments(), sampling, Bomb()).train()
    assert supernet.active == small  # nobody told the callback
    sampling.release()
    assert supernet.active == supernet.space.largest()
    with pytest.raises(RuntimeError, match="boom"), sampling:
        stock(supernet, arguments(), sampling, Bomb()).train()
    assert supernet.active == supernet.space.largest()


def test_a_callback_can_be_used_again_after_an_exception(arguments: Arguments) -> None:
    supernet = bert_supernet()
    sampling = SubnetSamplingCallback(supernet, FixedSubnet(supernet.space.smallest()))
    with pytest.raises(RuntimeError, match="boom"):
        stock(supernet, arguments(), sampling, Bomb()).train()
    stock(supernet, arguments(), sampling).train()
    assert supernet.active == supernet.space.largest()


def test_frozen_slices_stay_where_they_are_while_others_train(arguments: Arguments) -> None:
    supernet = bert_supernet()
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0), freeze_inactive=True)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    history: list[tuple[int, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            active = int(supernet.active["layers.0.intermediate_size"])
            history.append((active, weights(supernet.model)[name]))

    stock(supernet, arguments(max_steps=6), sampling, Watch()).train()
    history.append((0, weights(supernet.model)[name]))
    assert {16, 48} <= {active for active, _ in history}
    for (active, before), (_, after) in zip(history[:-1], history[1:], strict=True):
        assert torch.equal(before[active:], after[active:])
        assert not torch.equal(before[:active], after[:active])


@pytest.mark.parametrize(
    "rule",
    [SandwichRule(seed=0), ProgressiveShrinking(seed=0, steps_per_stage=1, subnets=2)],
    ids=lambda rule: type(rule).__name__,
)
def test_a_rule_of_several_subnets_points_to_the_elastic_trainer(rule: Any) -> None:
    with pytest.raises(TrainingError, match="ElasticTrainer"):
        SubnetSamplingCallback(bert_supernet(), rule)


@pytest.mark.parametrize("with_stock", [True, False])
def test_a_decoder_keeps_its_cache(arguments: Arguments, with_stock: bool) -> None:
    """The stock Trainer sets ``use_cache=False``, and what is exported afterwards would generate without one."""
    supernet = llama_supernet()
    rule = RandomSubnet(seed=0)
    if with_stock:
        callbacks = [SubnetSamplingCallback(supernet, rule)]
        trainer = Trainer(model=supernet.model, args=arguments(), train_dataset=texts(), callbacks=callbacks)
    else:
        trainer = ElasticTrainer(supernet=supernet, sampling=rule, args=arguments(), train_dataset=texts())
    assert supernet.base.config.use_cache is False
    trainer.train()
    assert supernet.base.config.use_cache is True


def test_an_unknown_period_is_refused() -> None:
    with pytest.raises(TrainingError, match="'step', 'micro_batch'"):
        SubnetSamplingCallback(bert_supernet(), RandomSubnet(seed=0), per="epoch")  # type: ignore[arg-type]


def test_another_model_than_the_supernet_is_refused(arguments: Arguments) -> None:
    sampling = SubnetSamplingCallback(bert_supernet(), RandomSubnet(seed=0))
    with pytest.raises(TrainingError, match="supernet.model"):
        Trainer(model=bert(), args=arguments(), train_dataset=sentences(), callbacks=[sampling]).train()


def test_training_inside_activate_is_refused(arguments: Arguments) -> None:
    supernet = bert_supernet()
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
    with pytest.raises(TrainingError, match="leave activate"), supernet.activate(supernet.space.smallest()):
        stock(supernet, arguments(), sampling).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_gpu": 2}, "torchrun"), ({"deepspeed": "ds.json"}, "DeepSpeed"), ({"fsdp": "full_shard"}, "FSDP")],
)
def test_a_run_that_cannot_keep_the_promises_is_refused(
    arguments: Arguments, changes: dict[str, Any], message: str
) -> None:
    supernet, args = bert_supernet(), arguments()
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
    trainer = stock(supernet, args, sampling)

    class Told:
        n_gpu, deepspeed, fsdp = 1, None, None

    told = Told()
    vars(told).update(changes)
    with pytest.raises(TrainingError, match=message):
        sampling.on_train_begin(told, trainer.state, trainer.control, model=supernet.model)  # type: ignore[arg-type]
