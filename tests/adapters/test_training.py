"""Elastic adapters trained by the stock Trainer, by ElasticTrainer and by TRL; what training shows about subnets."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import SETTINGS, randomise
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_elastic import (
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    ElasticTrainer,
    ElasticTrainerMixin,
    FixedSubnet,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
    SubnetStatistics,
    Supernet,
    TrainingError,
    add_lora,
    make_elastic,
    objectives,
    search_subnets,
)
from hf_elastic.adapters.lora_part import LoraPart

ROWS = 24


def rows(count: int = ROWS, *, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (count, 9), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def supernet_of(*, mode_b: bool = False, **settings: Any) -> Supernet:
    model = tiny("llama")
    if mode_b:
        make_elastic(model, ElasticConfig(intermediate_size=[16, 32], skip={1: ["mlp"]}))
    supernet = add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], "task_type": "CAUSAL_LM", **settings}))
    randomise(supernet.model)
    return supernet


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 0,
        "logging_strategy": "no", "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**settings, **changes})


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def train(supernet: Supernet, folder: Path, *callbacks: TrainerCallback, rule: Any = None, **changes: Any) -> Any:
    per = changes.pop("per", "step")
    sampling = SubnetSamplingCallback(supernet, rule or RandomSubnet(seed=5), per=per)
    trainer = Trainer(
        model=supernet.model, args=arguments(folder, **changes), train_dataset=rows(), callbacks=[sampling, *callbacks]
    )
    trainer.train()
    return trainer


# -- the stock Trainer ------------------------------------------------------------------------------------------------


def test_at_the_largest_rank_the_stock_trainer_gives_what_stock_lora_gives(tmp_path: Path) -> None:
    supernet = supernet_of()
    train(supernet, tmp_path / "a", rule=FixedSubnet(supernet.space.largest()))
    plain = get_peft_model(tiny("llama"), LoraConfig(**{**SETTINGS, "task_type": "CAUSAL_LM"}))
    randomise(plain)
    Trainer(model=plain, args=arguments(tmp_path / "b"), train_dataset=rows()).train()
    wanted = adapters_of(plain)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapters_of(supernet.model).items())


@pytest.mark.parametrize("mode_b", [False, True])
def test_only_what_was_drawn_moves_and_the_base_never(mode_b: bool, tmp_path: Path) -> None:
    supernet = supernet_of(mode_b=mode_b)
    base = {name: t.clone() for name, t in supernet.model.state_dict().items() if ".lora_" not in name}
    before = adapters_of(supernet.model)
    point = supernet.space.smallest()
    with supernet.activate(point):
        regions = supernet.active_regions()
    train(supernet, tmp_path, rule=FixedSubnet(point), per="micro_batch")
    moved = 0
    for name, tensor in adapters_of(supernet.model).items():
        change = tensor - before[name]
        for box in regions[name]:
            moved += int(change[box].any())
            change[box] = 0
        assert not change.any()
    assert moved > 10
    assert all(torch.equal(tensor, base[n]) for n, tensor in supernet.model.state_dict().items() if n in base)


class RanksSeen(TrainerCallback):
    """Ranks of one adapter in every forward of a step, those that gradient checkpointing recomputes too."""

    def __init__(self, supernet: Supernet) -> None:
        part = next(part for part in supernet.adapter_parts if isinstance(part, LoraPart))
        self.seen: list[list[int]] = []
        part.up.register_forward_pre_hook(lambda _, inputs: self.seen[-1].append(inputs[0].shape[-1]))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append([])

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append([])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("per", ["step", "micro_batch"])
def test_gradient_checkpointing_recomputes_the_rank_that_was_drawn(per: str, reentrant: bool, tmp_path: Path) -> None:
    plain, checkpointed = supernet_of(), supernet_of()
    train(plain, tmp_path / "a", per=per, max_steps=6)
    ranks = RanksSeen(checkpointed)
    train(
        checkpointed, tmp_path / "b", ranks, per=per, max_steps=6, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert all(len(seen) == 2 and len(set(seen)) == 1 for seen in ranks.seen)  # the forward, and its recomputation
    assert len({seen[0] for seen in ranks.seen}) > 1
    wanted = adapters_of(plain.model)
    for name, tensor in adapters_of(checkpointed.model).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


def test_a_rank_that_is_redrawn_at_every_access_is_what_checkpointing_breaks(tmp_path: Path) -> None:
    """What the official code does: the oracle above must be able to fail."""
    supernet, rng = supernet_of(), random.Random(0)

    class Redrawn(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for part in supernet.adapter_parts:
                part.down.register_forward_pre_hook(lambda *_, part=part: self.redraw(part))  # type: ignore[attr-defined,misc]

        def redraw(self, part: LoraPart) -> None:
            rank = rng.choice(part.ranks)
            part.down.__dict__["active_out_features"] = part.up.__dict__["active_in_features"] = rank

    ranks = RanksSeen(supernet)
    kwargs = {"use_reentrant": True}  # the other kind notices that shapes differ, and raises
    train(supernet, tmp_path, Redrawn(), ranks, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert any(len(set(seen)) > 1 for seen in ranks.seen)


def test_a_run_resumes_bit_equal(tmp_path: Path) -> None:
    whole = supernet_of(mode_b=True)
    train(whole, tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed = supernet_of(mode_b=True)
    sampling = SubnetSamplingCallback(resumed, RandomSubnet(seed=5))
    args = arguments(tmp_path / "whole", save_strategy="steps", save_steps=2)
    trainer = Trainer(model=resumed.model, args=args, train_dataset=rows(), callbacks=[sampling])
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    wanted = adapters_of(whole.model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapters_of(resumed.model).items())


def test_a_subnet_without_anything_to_train_is_refused_before_training(tmp_path: Path) -> None:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(skip=["mlp", "attention"]))
    supernet = add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2]}))
    with pytest.raises(TrainingError, match="smallest subnet skips all that is trained"):
        train(supernet, tmp_path)
    supernet.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="the model is frozen"):
        train(supernet, tmp_path)


# -- ElasticTrainer and TRL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode_b", [False, True])
def test_elastic_trainer_runs_the_sandwich_and_distils_in_place(mode_b: bool, tmp_path: Path) -> None:
    supernet = supernet_of(mode_b=mode_b)
    before = adapters_of(supernet.model)
    trainer = ElasticTrainer(
        supernet=supernet, sampling=SandwichRule(seed=0), distill=True, args=arguments(tmp_path, eval_strategy="no"),
        train_dataset=rows(), eval_dataset=rows(6, seed=1), eval_architectures={"small": supernet.space.smallest()},
    )  # fmt: skip
    first = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert supernet.active == supernet.space.largest()
    assert after["eval_small_loss"] != first["eval_small_loss"]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapters_of(supernet.model).items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixed_in", [False, True])
def test_the_trainer_of_trl_trains_subnets(mixed_in: bool, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset
    from tiny_models import tokenizer

    supernet = supernet_of(mode_b=True)
    before = adapters_of(supernet.model)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True, bf16=False,
        logging_strategy="no", save_strategy="no", disable_tqdm=True, gradient_checkpointing=True, max_length=9,
    )  # fmt: skip
    seen = RanksSeen(supernet)
    if mixed_in:

        class Mixed(ElasticTrainerMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
            pass

        trainer: Any = Mixed(
            model=supernet.model, supernet=supernet, sampling=SandwichRule(seed=0, random=1), args=args,
            train_dataset=data, processing_class=tokenizer(), callbacks=[seen],
        )  # fmt: skip
    else:
        sampling = SubnetSamplingCallback(supernet, FixedSubnet(supernet.space.smallest()))
        trainer = trl.SFTTrainer(
            model=supernet.model, args=args, train_dataset=data, processing_class=tokenizer(),
            callbacks=[sampling, seen],
        )  # fmt: skip
    trainer.train()
    assert {rank for step in seen.seen for rank in step} >= ({8, 2} if mixed_in else {2})
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapters_of(supernet.model).items())


# -- selection --------------------------------------------------------------------------------------------------------


def recorded(supernet: Supernet, folder: Path, **changes: Any) -> SubnetStatistics:
    statistics = SubnetStatistics(supernet)
    train(supernet, folder, statistics, **{"max_steps": 12, "per": "micro_batch", **changes})
    return statistics


def test_statistics_are_those_of_the_forwards_of_training(tmp_path: Path) -> None:
    supernet = supernet_of()
    statistics = recorded(supernet, tmp_path)
    rule, space = RandomSubnet(seed=5), supernet.space
    drawn = [rule.draw(space, step, micro)[0] for step in range(12) for micro in range(2)]
    assert statistics.steps == len(drawn)
    for name in space.names:
        counts = {value: sum(a[name] == value for a in drawn) for value in space[name].values}
        assert counts[statistics.most_frequent()[name]] == max(counts.values())
    with torch.no_grad():
        supernet.model(**{name: value.unsqueeze(0) for name, value in rows()[0].items()})
    assert statistics.steps == len(drawn), "an evaluation, or a forward after training, was recorded"


class ByHand(SubnetStatistics):
    """Statistics of losses that are known."""

    def __init__(self, supernet: Supernet, loss: Callable[[Any], float], count: int) -> None:
        super().__init__(supernet)
        rule = RandomSubnet(seed=1)
        self._drawn = [rule.draw(supernet.space, step, 0)[0] for step in range(count)]
        self._losses = [(3.0 - step / count) * loss(a) for step, a in enumerate(self._drawn)]  # falling by a third


def test_the_lowest_loss_is_found_under_a_falling_one() -> None:
    supernet = supernet_of()
    best = {"layers.0.r": 4, "layers.1.r": 8, "layers.2.r": 2}

    def loss(architecture: Any) -> float:
        return 1.0 + 0.05 * sum(architecture[name] != value for name, value in best.items())

    statistics = ByHand(supernet, loss, 400)
    assert dict(statistics.lowest_loss_values()) == best
    assert dict(statistics.lowest_loss(1)[0]) == best
    assert len(statistics.lowest_loss(5)) == 5


def test_ranks_follow_the_activation_of_their_components(tmp_path: Path) -> None:
    supernet = supernet_of(target_modules=["q_proj"])
    with torch.no_grad():
        for part in supernet.adapter_parts:
            assert isinstance(part, LoraPart)
            keep = {"0": 2, "1": 4, "2": 8}[part.module_name.split(".")[2]]
            part.up.weight[:, keep:] = 0.0
            part.up.weight[:, :keep] += 1.0
    statistics = SubnetStatistics(supernet)
    with statistics, torch.enable_grad():
        supernet.model.train()(input_ids=rows()[0]["input_ids"].unsqueeze(0))
    assert dict(statistics.most_active(0.999)) == {"layers.0.r": 2, "layers.1.r": 4, "layers.2.r": 8}
    part = supernet.adapter_parts[0]
    assert isinstance(part, LoraPart)
    hidden: list[Tensor] = []
    handle = part.up.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    supernet.model(input_ids=rows()[0]["input_ids"].unsqueeze(0))
    handle.remove()
    energy = (hidden[0][0].square().mean(0) * part.up.weight.square().sum(0)).double()
    torch.testing.assert_close(statistics._held(part).double(), energy.cumsum(0) / energy.sum(), rtol=1e-5, atol=1e-6)


def test_statistics_survive_a_resume_and_their_absence_is_said(tmp_path: Path) -> None:
    whole = recorded(supernet_of(), tmp_path / "a", save_strategy="steps", save_steps=6)
    supernet = supernet_of()
    statistics = SubnetStatistics(supernet)
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=5), per="micro_batch")
    args = arguments(tmp_path / "a", max_steps=12, save_strategy="steps", save_steps=6)
    trainer = Trainer(model=supernet.model, args=args, train_dataset=rows(), callbacks=[sampling, statistics])
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert statistics.steps == whole.steps
    assert statistics.lowest_loss(3) == whole.lowest_loss(3)
    assert statistics.most_active() == whole.most_active()
    (tmp_path / "a" / "checkpoint-6" / "subnet_statistics.json").unlink()
    with pytest.raises(TrainingError, match="statistics.json is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_statistics_are_in_a_checkpoint_before_what_makes_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    there: list[bool] = []
    save = TrainerState.save_to_json

    def watched(self: TrainerState, path: str) -> None:
        there.append(Path(path).with_name("subnet_statistics.json").is_file())
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    recorded(supernet_of(), tmp_path, save_strategy=strategy, save_steps=6)
    assert there and all(there)


@pytest.mark.parametrize("first", ["sampling", "statistics"])
def test_statistics_record_nothing_of_a_run_that_was_over_when_it_was_resumed(first: str, tmp_path: Path) -> None:
    whole = recorded(supernet_of(), tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    supernet = supernet_of()
    statistics = SubnetStatistics(supernet)
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=5), per="micro_batch")
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    callbacks: list[TrainerCallback] = [sampling, statistics] if first == "sampling" else [statistics, sampling]
    trainer = Trainer(model=supernet.model, args=args, train_dataset=rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert statistics.steps == whole.steps and trainer.state.global_step == 3
    assert not (tmp_path / "checkpoint-4").exists()


def test_nothing_recorded_is_said() -> None:
    statistics = SubnetStatistics(supernet_of())
    for attempt in (statistics.most_frequent, statistics.lowest_loss, statistics.lowest_loss_values):
        with pytest.raises(DataError, match="no loss was recorded"):
            attempt()
    with pytest.raises(DataError, match="no activation was recorded"):
        statistics.most_active()
    with pytest.raises(DataError, match="share"):
        statistics.most_active(1.5)


def test_a_search_weighs_loss_against_parameters_of_adapters_and_macs() -> None:
    supernet = supernet_of(mode_b=True)
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask", "labels")}
    loss = objectives.loss(supernet, [batch])
    goals = [loss, objectives.adapter_parameters(supernet), objectives.macs(supernet, seq_len=9)]
    result = search_subnets(
        supernet.space, goals, evaluations=30, within={"adapter_parameters": 0.7, "macs": 0.9}, seed=0
    )
    largest = supernet.space.largest()
    for found in result.front:
        assert found.values["adapter_parameters"] <= 0.7 * goals[1](largest)
        assert found.values["macs"] <= 0.9 * goals[2](largest)


def test_a_value_is_judged_by_the_steps_in_which_it_had_an_effect() -> None:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(skip={1: ["layer"]}))
    supernet = add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2]}))

    def loss(architecture: Any) -> float:
        if architecture["layers.1.skip"] == "layer":
            return 3.0
        return 1.0 if architecture["layers.1.r"] == 2 else 1.5

    chosen = ByHand(supernet, loss, 300).lowest_loss_values()
    assert chosen["layers.1.skip"] == "none" and chosen["layers.1.r"] == 2


def test_statistics_keep_adapters_apart() -> None:
    supernet = supernet_of(target_modules=["q_proj"])
    supernet.model.add_adapter("wide", ElasticLoraConfig(r=16, ranks=[4], target_modules=["q_proj"]))
    both = Supernet(supernet.model)
    statistics = SubnetStatistics(both)
    with statistics, torch.enable_grad():
        for name in ("default", "wide"):
            both.model.set_adapter(name)
            both.model.train()(input_ids=rows()[0]["input_ids"].unsqueeze(0))
    assert len(statistics._energy) == 6
    alone = SubnetStatistics(both)
    with alone, torch.enable_grad():
        both.model(input_ids=rows()[0]["input_ids"].unsqueeze(0))
    chosen = alone.most_active()
    assert all(chosen[f"layers.{i}.r"] == both.space.midpoint()[f"layers.{i}.r"] for i in range(3))


def test_a_second_training_begins_new_statistics(tmp_path: Path) -> None:
    supernet = supernet_of()
    statistics = SubnetStatistics(supernet)
    for folder in ("a", "b"):
        train(supernet, tmp_path / folder, statistics, max_steps=3, per="micro_batch")
        assert statistics.steps == 6


def test_results_of_different_adapters_do_not_mix_in_a_storage() -> None:
    supernet = supernet_of(target_modules=["q_proj"])
    supernet.model.add_adapter("other", ElasticLoraConfig(r=8, ranks=[4], target_modules=["q_proj"]))
    both = Supernet(supernet.model)
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}
    prints = set()
    for name in ("default", "other"):
        both.model.set_adapter(name)
        prints.add(objectives.loss(both, [batch]).fingerprint)
    with both.model.disable_adapter():
        prints.add(objectives.loss(both, [batch]).fingerprint)
    assert len(prints) == 3
