"""Training of models in half precision: bfloat16 follows float32, float16 is refused before a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_models
import pytest
import torch
from half_models import HALVES, batches, distance, finite, narrowed, pair, refused, supernets, tolerance, widened
from peft import LoraConfig, get_peft_model
from tiny_training import settings
from transformers import Trainer, TrainingArguments

from hf_elastic import (
    ElasticTrainer,
    HeadFusionCallback,
    PCAGrowthCallback,
    RandomSubnet,
    RoutingConfig,
    RoutingLoss,
    SandwichRule,
    SubnetSamplingCallback,
    Supernet,
    add_routing,
    make_elastic,
)
from hf_elastic.training import Distillation

EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
Arguments = Callable[..., TrainingArguments]


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    def build(**changes: Any) -> TrainingArguments:
        given = {"learning_rate": 1e-3, "max_steps": 3, **changes}
        return TrainingArguments(**settings(str(tmp_path / "run"), **given))

    return build


def rows(model: Any, *, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    held = batches(model, labels=labels)
    return [{name: value[row] for name, value in batch.items()} for batch in held for row in range(4)]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


def elastic_trainer(supernet: Supernet, args: TrainingArguments) -> Trainer:
    return ElasticTrainer(
        supernet=supernet, sampling=SandwichRule(seed=0), distill=True, args=args, train_dataset=rows(supernet.model)
    )


def stock_trainer(supernet: Supernet, args: TrainingArguments) -> Trainer:
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
    return Trainer(model=supernet.model, args=args, train_dataset=rows(supernet.model), callbacks=[sampling])


@pytest.mark.parametrize("made", [elastic_trainer, stock_trainer], ids=["ElasticTrainer", "Trainer"])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bert", "gpt2"))])
def test_bfloat16_is_trained_as_float32_but_for_rounding(family: str, made: Any, arguments: Arguments) -> None:
    found = []
    for supernet in supernets(family, torch.bfloat16):
        before = weights(supernet.model)
        made(supernet, arguments()).train()
        assert finite(supernet.model) and not torch.equal(before, weights(supernet.model))
        found.append(weights(supernet.model))
    assert distance(*found) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("made", [elastic_trainer, stock_trainer], ids=["ElasticTrainer", "Trainer"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_float16_is_refused_before_a_weight_moves(family: str, made: Any, arguments: Arguments) -> None:
    supernet, _ = supernets(family, torch.float16)
    before = weights(supernet.model)
    with refused("float16", "model.float()"):
        made(supernet, arguments()).train()
    assert torch.equal(before, weights(supernet.model))


@EVERY
@pytest.mark.parametrize("callback", ["growth", "fusion"])
def test_growth_and_fusion_take_bfloat16_and_refuse_float16(
    callback: str, dtype: torch.dtype, arguments: Arguments
) -> None:
    narrow = {"candidate_widths": [[16] * 6] * 3}
    half = narrowed(block_models.tiny("elastic_bert", **narrow), dtype)
    histories = []
    for model in (half, widened(half)):
        supernet = make_elastic(model)
        data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
                for row in block_models.tokens(batch=16)]  # fmt: skip
        sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
        made: Any = PCAGrowthCallback(supernet, total_parameters=19_000, step=8, count=2, calc_freq=1, every=2)
        if callback == "fusion":
            feed = {name: torch.stack([row[name] for row in data]) for name in data[0]}
            made = HeadFusionCallback(supernet, [feed], threshold=0.5, min_heads=1, every=2)
        trainer = Trainer(
            model=model, args=arguments(max_steps=4), train_dataset=data, callbacks=[sampling, made]
        )
        if model is half and dtype == torch.float16:
            with refused("float16", "model.float()"):
                trainer.train()
            return
        trainer.train()
        assert finite(model)
        histories.append(made)
    if callback == "growth":
        ours, theirs = (history.history.entries for history in histories)
        assert len(ours) == len(theirs) > 0
        scores = [[score for _, score in sorted(e.scores.items())] for e in (ours[0], theirs[0])]
        assert scores[0] == pytest.approx(scores[1], abs=2 / 16)  # one direction more or less of 16
    else:
        pairs = zip(histories[0].reports[0].layers, histories[1].reports[0].layers, strict=True)
        assert max(distance(one.cka, other.cka) for one, other in pairs) <= 2 * tolerance(dtype)


@EVERY
def test_adapters_on_a_half_base_are_trained_in_float32(dtype: torch.dtype, arguments: Arguments) -> None:
    found = []
    for model in pair("llama", dtype):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        base = weights(model.model.embed_tokens)
        Trainer(model=wrapped, args=arguments(), train_dataset=rows(model)).train()
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32} and torch.equal(base, weights(model.model.embed_tokens))
        found.append(torch.cat([p.detach().flatten() for p in trained]))
    assert distance(*found) <= 2 * tolerance(dtype)


@EVERY
def test_routers_on_a_half_model_are_trained_in_float32(dtype: torch.dtype, arguments: Arguments) -> None:
    found = []
    for model in pair("bert", dtype):
        model.requires_grad_(False)
        supernet = add_routing(model, RoutingConfig(mlp_tokens=[0.5], heads=[1]))
        for part in supernet.router_parts:
            part.routers.requires_grad_(True)
        loss = RoutingLoss(supernet)
        sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
        Trainer(
            model=supernet.model, args=arguments(), train_dataset=rows(model), compute_loss_func=loss,
            callbacks=[sampling, loss],
        ).train()  # fmt: skip
        routers = [p.detach().flatten() for part in supernet.router_parts for p in part.routers.parameters()]
        found.append(torch.cat(routers))
    assert bool(torch.isfinite(found[0]).all()) and float(found[0].abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("distance_of", ["pearson", "mse", "relative"])
def test_relational_distillation_in_bfloat16_follows_float32(distance_of: Any, arguments: Arguments) -> None:
    found = []
    for supernet in supernets("bert", torch.bfloat16):
        plan = Distillation(target="relational", state_distance=distance_of, fit=True)
        trainer = ElasticTrainer(
            supernet=supernet, sampling=SandwichRule(seed=0, random=0), distill=plan, args=arguments(max_steps=2),
            train_dataset=rows(supernet.model),
        )  # fmt: skip
        trainer.train()
        found.append(weights(supernet.model))
    assert distance(*found) <= tolerance(torch.bfloat16)
