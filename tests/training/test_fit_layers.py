"""Fit layers in a Trainer: initialisation, optimizer, gradients, checkpoints, several ranks.

Run as a script it is one of two ranks, see the last test.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_processes import run_two_ranks
from safetensors.torch import load_file, save_file
from tiny_training import (
    VOCABULARY,
    bert,
    bert_config,
    bert_supernet,
    same,
    seeded,
    sentences,
    settings,
    texts,
    weights,
)
from torch import Tensor
from transformers import BertForMaskedLM, TrainerCallback, TrainingArguments

from hf_elastic import ElasticConfig, Supernet, make_elastic
from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.models import config_class, model_class
from hf_elastic.training import (
    Distillation,
    ElasticTrainer,
    FixedSubnet,
    RandomSubnet,
    SandwichRule,
    last_complete_checkpoint,
)
from hf_elastic.training.fit_layers import FIT_FILE, FitLayers
from hf_elastic.training.sublayers import LayerStates

Arguments = Callable[..., TrainingArguments]


def narrow(**changes: Any) -> Supernet:
    return bert_supernet(base=True, hidden_size=16, **changes)


def trainer_of(args: TrainingArguments, *, supernet: Supernet | None = None, **kwargs: Any) -> ElasticTrainer:
    """A run without labels, from a teacher twice as wide as the student."""
    plan = Distillation(target="relational", teacher=bert(base=True, seed=9), fit=True, **kwargs.pop("plan", {}))
    given: dict[str, Any] = {"sampling": SandwichRule(seed=3, random=1), "train_dataset": sentences(labels=False)}
    return ElasticTrainer(supernet=supernet or narrow(), distill=plan, args=args, **{**given, **kwargs})


def fits(trainer: ElasticTrainer) -> dict[str, Tensor]:
    assert trainer.fit_layers is not None
    return weights(trainer.fit_layers)


# --- the maps


def test_maps_are_a_function_of_the_seed_and_disturb_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    one, other, third = (FitLayers(6, attention=[6, 2], teacher=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(weights(one), weights(other)) and not same(weights(one), weights(third))
    shapes = {name: tuple(parameter.shape) for name, parameter in one.named_parameters()}
    assert shapes == {
        "states.weight": (8, 6), "states.bias": (8,), "attention.2.weight": (8, 2), "attention.2.bias": (8,),
        "attention.6.weight": (8, 6), "attention.6.bias": (8,),
    }  # fmt: skip


def test_each_state_goes_through_the_map_of_its_kind_and_width() -> None:
    fit = FitLayers(6, attention=[6, 2], teacher=8, seed=1)
    wide, slim = torch.randn(2, 3, 6), torch.randn(2, 3, 2)
    found = fit(LayerStates(wide, {0: wide, 3: slim}, {3: wide.bfloat16()}, (slim,)))
    through = {name: wide @ fit.get_parameter(f"{name}.weight").T for name in ("states", "attention.6")}
    torch.testing.assert_close(found.embedding, through["states"] + fit.states.bias)
    torch.testing.assert_close(found.attention[0], through["attention.6"] + fit.get_parameter("attention.6.bias"))
    assert found.attention[3].shape == (2, 3, 8) and found.logits[0] is slim
    assert found.blocks[3].dtype == torch.float32
    with pytest.raises(TrainingError, match="4 wide, the fit layers take 2, 6"):
        fit(LayerStates(wide, {0: torch.zeros(1, 1, 4)}, {}))


# --- the optimizer


def test_the_optimizer_decays_the_weights_of_maps_and_not_their_biases(arguments: Arguments) -> None:
    trainer = trainer_of(arguments(weight_decay=0.1))
    before = fits(trainer)
    for _ in range(2):  # a second run keeps the optimizer
        trainer.train()
        assert trainer.fit_layers is not None and trainer.optimizer is not None
        names = {id(parameter): name for name, parameter in trainer.fit_layers.named_parameters()}
        held = [
            (names[id(parameter)], group["weight_decay"])
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
        ]
        assert sorted(held) == [(n, 0.1 if n.endswith("weight") else 0.0) for n in sorted(names.values())]
    assert all(not torch.equal(before[name], value) for name, value in fits(trainer).items())
    assert not any("fit" in name or "attention.16" in name for name in trainer.supernet.model.state_dict())


def test_an_optimizer_of_the_user_trains_the_maps_too_but_its_scheduler_would_not(arguments: Arguments) -> None:
    supernet = narrow()
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2, weight_decay=0.05)
    trainer = trainer_of(arguments(), supernet=supernet, optimizers=(optimizer, None))
    before = fits(trainer)
    trainer.train()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.05, 0.0]
    assert all(not torch.equal(before[name], value) for name, value in fits(trainer).items())
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(supernet.model.parameters(), lr=1), lambda step: 1)
    with pytest.raises(TrainingError, match=r"optimizers=\(optimizer, None\)"):
        trainer_of(arguments(), supernet=supernet, optimizers=(scheduler.optimizer, scheduler))


def test_gradients_of_maps_are_those_of_one_step_each(arguments: Arguments) -> None:
    supernet, rows = narrow(), sentences(4, labels=False)
    args = arguments(
        max_steps=3, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, weight_decay=0.0
    )
    rule = FixedSubnet(supernet.space.largest())
    plan = {"state_distance": "mse"}
    trainer = trainer_of(args, supernet=supernet, sampling=rule, train_dataset=rows, plan=plan)
    start = {"model": weights(supernet.model), "fit": fits(trainer)}
    trainer.train()
    ends = {"model": weights(supernet.model), "fit": fits(trainer)}

    supernet.model.load_state_dict(start["model"])
    assert trainer.fit_layers is not None and trainer.distillation is not None
    trainer.fit_layers.load_state_dict(start["fit"])
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    both = [*supernet.model.parameters(), *trainer.fit_layers.parameters()]
    for _ in range(3):
        trainer._elastic_teacher = None
        loss = trainer.compute_loss(supernet.model, dict(batch))
        for parameter, gradient in zip(both, torch.autograd.grad(loss, both, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.data -= 0.5 * gradient
    for name, value in weights(trainer.fit_layers).items():
        torch.testing.assert_close(ends["fit"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in weights(supernet.model).items():
        torch.testing.assert_close(ends["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_model_and_maps_are_clipped_together(arguments: Arguments) -> None:
    norms: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            assert trainer.fit_layers is not None
            both = [*kwargs["model"].parameters(), *trainer.fit_layers.parameters()]
            norms.append(sum(float(p.grad.square().sum()) for p in both if p.grad is not None) ** 0.5)

    trainer = trainer_of(arguments(max_steps=2, max_grad_norm=0.01), callbacks=[Look()])
    trainer.train()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


# --- checkpoints


def saving(folder: Path | str, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **settings(
            str(folder), max_steps=6, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            lr_scheduler_type="cosine", **changes,
        )
    )  # fmt: skip


def run(folder: Path | str, *, resume: str | bool | None = None, **changes: Any) -> ElasticTrainer:
    trainer = trainer_of(
        saving(folder, **changes), supernet=narrow(hidden_dropout_prob=0.2, skip=("mlp",)), per="micro_batch"
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ElasticTrainer]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_bit_equal_to_one_that_was_not_interrupted(
    finished: tuple[Path, ElasticTrainer], tmp_path: Path, step: int
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for later in range(step + 2, 8, 2):
        shutil.rmtree(folder / f"checkpoint-{later}")
    trainer = run(folder, resume=True)
    assert trainer.state.global_step == 6
    assert same(weights(trainer.supernet.model), weights(finished[1].supernet.model))
    assert same(fits(trainer), fits(finished[1]))


def test_checkpoints_hold_the_maps_in_a_file_of_their_own(finished: tuple[Path, ElasticTrainer]) -> None:
    folder, trainer = finished
    assert same(load_file(folder / "checkpoint-6" / FIT_FILE), fits(trainer))
    assert not same(load_file(folder / "checkpoint-2" / FIT_FILE), fits(trainer))
    saved = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == trainer.supernet.model.state_dict().keys()
    trainer.save_model(str(folder / "final"))
    assert not (folder / "final" / FIT_FILE).exists()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")


def test_maps_that_are_missing_damaged_or_of_others_stop_a_resume(
    finished: tuple[Path, ElasticTrainer], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    checkpoint = folder / "checkpoint-6"
    whole = (checkpoint / FIT_FILE).read_bytes()
    (checkpoint / "elastic_complete.json").unlink()

    def raises(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            run(folder, resume=str(checkpoint))
        assert "\n" not in str(caught.value)

    (checkpoint / FIT_FILE).write_bytes(whole[:-3])
    raises(f"{FIT_FILE} is truncated; resume from .*checkpoint-4")
    save_file({"states.weight": torch.zeros(2, 2)}, checkpoint / FIT_FILE)
    raises("resume with the student and the teacher that the checkpoint was made with")
    (checkpoint / FIT_FILE).unlink()
    raises(rf"has no {FIT_FILE}.* or start again")
    (checkpoint / FIT_FILE).write_bytes(whole)
    other = ElasticTrainer(
        supernet=narrow(), sampling=SandwichRule(seed=3), args=saving(folder), train_dataset=sentences(labels=False)
    )
    with pytest.raises(CheckpointError, match=r"saved by a run with fit layers, .*fit=True"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_maps_that_cannot_be_read_or_written_are_told_in_one_line(tmp_path: Path) -> None:
    fit = FitLayers(6, attention=[6], teacher=8, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        fit.save_to(tmp_path / "file")
    (tmp_path / FIT_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        fit.load_from(tmp_path)
    fit.save_to(tmp_path / "new" / "folder")
    other = FitLayers(6, attention=[6], teacher=8, seed=2)
    other.load_from(tmp_path / "new" / "folder")
    assert same(weights(fit), weights(other))


def test_the_best_model_comes_back_with_its_maps(tmp_path: Path) -> None:
    args = saving(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, learning_rate=3e-2,
    )  # fmt: skip
    trainer = trainer_of(args, eval_dataset=sentences(8, labels=False))
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"  # the loss falls, and the largest is asked for
    assert same(load_file(best / FIT_FILE), fits(trainer))


# --- several ranks


def of_blocks(folder: str) -> ElasticTrainer:
    """Candidate blocks of two widths, with predictions and labels."""
    config = config_class("elastic_bert")(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=16, candidate_blocks=["standard", "bottleneck"], bottleneck_size=4,
    )  # fmt: skip
    plan = Distillation(
        target="relational", fit=True, prediction="dist",
        teacher=seeded(lambda: BertForMaskedLM(bert_config(num_hidden_layers=2)), seed=9),
    )  # fmt: skip
    trainer = ElasticTrainer(
        supernet=make_elastic(seeded(lambda: model_class("elastic_bert", "ElasticBertForMaskedLM")(config))),
        sampling=RandomSubnet(seed=0), distill=plan, train_dataset=texts(64, uneven=True),
        args=TrainingArguments(**settings(f"{folder}/blocks", gradient_accumulation_steps=2)), per="micro_batch",
    )  # fmt: skip
    trainer.train()
    return trainer


def distributed(folder: str, *, distance: Any, batch: int) -> ElasticTrainer:
    """A masked-language model of which the states alone are compared, so that its head is not trained."""
    supernet = make_elastic(
        seeded(lambda: BertForMaskedLM(bert_config(hidden_size=16))),
        ElasticConfig(intermediate_size=[16, 48], skip=["mlp"]),
    )
    args = TrainingArguments(
        **settings(
            f"{folder}/{distance}", per_device_train_batch_size=batch, gradient_accumulation_steps=2,
            ddp_find_unused_parameters=True,
        )
    )  # fmt: skip
    rows = [row for row in sentences(64, labels=False) if row["attention_mask"].all()]
    plan = {"state_distance": distance}
    trainer = trainer_of(args, supernet=supernet, train_dataset=rows, plan=plan)
    trainer.train()
    return trainer


def all_weights(trainer: ElasticTrainer) -> dict[str, Tensor]:
    return {**weights(trainer.supernet.model), **{f"fit.{name}": value for name, value in fits(trainer).items()}}


@pytest.mark.slow
def test_two_ranks_keep_equal_maps_and_train_as_one_process(tmp_path: Path) -> None:
    ranks = run_two_ranks(__file__, tmp_path)
    for case in ("mse", "pearson", "blocks"):
        assert same(ranks[0][case], ranks[1][case])
    alone = all_weights(distributed(str(tmp_path / "alone"), distance="mse", batch=8))  # a mean over tokens: as one
    untrained = weights(seeded(lambda: BertForMaskedLM(bert_config(hidden_size=16))))
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0]["mse"][name], value, rtol=1e-3, atol=2e-4, msg=name)
        if name.startswith("cls.predictions.transform"):
            assert torch.equal(value, untrained[name]) and torch.equal(ranks[0]["mse"][name], untrained[name])


if __name__ == "__main__":
    output, number = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    results = {name: all_weights(distributed(output, distance=name, batch=4)) for name in ("mse", "pearson")}
    results["blocks"] = all_weights(of_blocks(output))
    torch.save(results, f"{output}/rank{number}.pt")
