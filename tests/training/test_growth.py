"""Scores against NumPy, growth against the published schedule, runs that were cut off against whole ones."""

from __future__ import annotations

import functools
import gc
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_run import (
    DENSE,
    KILLED,
    LAYERS,
    NARROW,
    PER_EPOCH,
    Bystander,
    Stop,
    Stream,
    Watch,
    block_parameters,
    callbacks,
    candidates,
    causal_candidates,
    check_new_rows_moved,
    growing,
    hooks,
    mean_parameters,
    outside,
    padded,
    published,
    run_alone,
    shared,
)
from own_processes import rank_environments
from tiny_training import bert_supernet, same, weights
from torch import Tensor
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import hf_elastic as he
from hf_elastic import Supernet, costs
from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.training import FixedSubnet, PCAGrowthCallback, SandwichRule, SubnetSamplingCallback, growth
from hf_elastic.training.pca import PreActivations
from hf_elastic.training.schedule import GrowthHistory

Arguments = Callable[..., TrainingArguments]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Every ``train()`` collects garbage, for which it need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def epochs(arguments: Arguments, count: float = 2, **changes: Any) -> TrainingArguments:
    """Settings of epochs of 6 steps of 8 examples."""
    rest = {"max_steps": -1, "num_train_epochs": count, "per_device_train_batch_size": 8, **changes}
    return arguments(**rest)


def trained(supernet: Supernet, args: TrainingArguments, *more: TrainerCallback, **rule: Any) -> PCAGrowthCallback:
    """Train uniform paths with growth; ``more`` stands behind it."""
    both = callbacks(supernet, **rule)
    Trainer(supernet.model, args, train_dataset=padded(), eval_dataset=padded(8), callbacks=[*both, *more]).train()
    return both[1]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every step": ({}, {"calc_freq": 1}),
    "every fourth step": ({}, {"calc_freq": 4}),
    "padding as well": ({}, {"include_padding": True}),
    "per neuron, most of the variance": ({}, {"normalise": "width", "eta": 0.99}),
    "accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
    "checkpointed in the old way": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {},
    ),
    "evaluated between": ({"eval_strategy": "steps", "eval_steps": 1}, {"calc_freq": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_pre_activations_of_a_whole_step(case: str, arguments: Arguments) -> None:
    training, rule = CASES[case]
    supernet = candidates()
    watch = Watch(supernet, padding=rule.get("include_padding", False))
    found = trained(supernet, epochs(arguments, **training), watch, **rule).history
    measured = {key: rule[key] for key in ("eta", "normalise") if key in rule}
    freq = rule.get("calc_freq", 2)
    for number, entry in enumerate(found.entries):
        steps = [s for s in range(number * PER_EPOCH, (number + 1) * PER_EPOCH) if s % freq == 0]
        assert dict(entry.scores) == pytest.approx(watch.scores(steps, **measured), rel=1e-12)
    assert len(found.entries) == 2 and {len(rows) for rows in watch.rows.values()} == {LAYERS}


def test_scores_of_a_causal_model_are_those_of_its_pre_activations(arguments: Arguments) -> None:
    supernet = causal_candidates()
    watch = Watch(supernet, padding=False, dense="transformer.h.{}.candidates.{}.mlp.c_fc")
    found = trained(supernet, epochs(arguments), watch, total_parameters=4_200)
    for number, entry in enumerate(found.history.entries):
        steps = range(number * PER_EPOCH, (number + 1) * PER_EPOCH, 2)
        assert dict(entry.scores) == pytest.approx(watch.scores(steps), rel=1e-12)
    assert found.history.widths() != found.history.start


def test_accumulated_micro_batches_score_as_the_whole_batch(arguments: Arguments) -> None:
    runs = [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    one, other = (trained(candidates(), epochs(arguments, **run), calc_freq=1).history for run in runs)
    assert [entry.scores for entry in one.entries] == [entry.scores for entry in other.entries]
    assert one == other


def test_an_ffn_that_takes_its_tokens_in_chunks_scores_the_same(arguments: Arguments) -> None:
    whole, chunked = (trained(candidates(chunk_size_feed_forward=size), epochs(arguments)).history for size in (0, 2))
    assert whole == chunked


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_token_counts_once_also_where_a_teacher_runs_between_forward_and_backward(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    counts: list[int] = []
    plain = growth.pca_score

    def counting(moments: PreActivations, **rest: Any) -> float:
        counts.append(moments.tokens)
        return plain(moments, **rest)

    supernet, args = candidates(), epochs(arguments, gradient_checkpointing=checkpointing)
    callback = callbacks(supernet, calc_freq=1)[1]
    monkeypatch.setattr(growth, "pca_score", counting)
    small = FixedSubnet(supernet.space.smallest())
    he.ElasticTrainer(
        supernet=supernet, sampling=small, distill=True, args=args, train_dataset=padded(), callbacks=[callback]
    ).train()
    assert sum(counts) == 2 * LAYERS * sum(int(row["attention_mask"].sum()) for row in padded())


@pytest.mark.parametrize("budget", [3_900, 4_700])
@pytest.mark.parametrize("check", ["block", "epoch"])
def test_blocks_grow_as_published(arguments: Arguments, check: str, budget: int) -> None:
    supernet, widths = candidates(), {(layer, block): NARROW for layer in range(LAYERS) for block in BLOCKS}
    rule = {"total_parameters": budget, "check": check, "count": 7, "calc_freq": 1}
    history = trained(supernet, epochs(arguments, 5), **rule).history
    assert history.start == widths
    for number, entry in enumerate(history.entries, 1):
        assert (entry.epoch, entry.step) == (number, number * PER_EPOCH)
        assert entry.parameters_before == pytest.approx(mean_parameters(supernet, widths), rel=1e-12)
        made = published(supernet, widths, entry.scores, count=7, cap=budget, check=check)
        assert [(grown.layer, grown.block) for grown in entry.grown] == made
        assert history.widths(number) == widths
        assert entry.parameters_after == pytest.approx(mean_parameters(supernet, widths), rel=1e-12)
    counts = [len(entry.grown) for entry in history.entries]
    # The cheap budget is reached in the first epoch: by its fourth growth, or overshot by all seven and seen later.
    assert counts == [7, 7, 7, 7, 3] if budget == 4_700 else counts == ([4] if check == "block" else [7, 0])


@pytest.mark.parametrize("every", ["epoch", 4])
def test_only_what_is_in_use_moves_and_space_and_largest_follow(arguments: Arguments, every: Any) -> None:
    supernet = candidates()
    bystander = Bystander(supernet)
    args = epochs(arguments, 4, eval_strategy="steps", eval_steps=3, save_strategy="epoch", logging_strategy="epoch")
    history = trained(supernet, args, bystander, every=every, calc_freq=1).history
    changed = [entry for entry in history.entries if entry.grown]
    assert len(bystander.digests) == len(set(bystander.digests)) == 1 + len(changed) > 3
    check_new_rows_moved(supernet, bystander.initial, history)
    assert dict(supernet.space.largest()) == {
        f"layers.{n}.block": max(BLOCKS, key=lambda b: block_parameters(b, history.widths()[n, b]))  # noqa: B023
        for n in range(LAYERS)
    }


def test_growth_may_stand_before_or_behind_the_sampling(arguments: Arguments) -> None:
    found = []
    for order in (1, -1):
        supernet = candidates()
        both, bystander = callbacks(supernet, every=3), Bystander(supernet)
        given = [*both[::order], bystander]
        Trainer(supernet.model, epochs(arguments), train_dataset=padded(), callbacks=given).train()
        found.append((both[1].history, supernet.space.digest, weights(supernet.model)))
    assert found[0][:2] == found[1][:2] and same(found[0][2], found[1][2])


def test_the_elastic_trainer_grows_too(arguments: Arguments) -> None:
    supernet, rule = candidates(), SandwichRule(seed=3, random=1)
    bystander, watch = Bystander(supernet), Watch(supernet, padding=False)
    callback = callbacks(supernet, calc_freq=1)[1]
    he.ElasticTrainer(
        supernet=supernet, sampling=rule, distill=True, args=epochs(arguments, 3), train_dataset=padded(),
        callbacks=[callback, bystander, watch],
    ).train()  # fmt: skip
    for entry in callback.history.entries:
        scores = watch.scores(range(entry.step - PER_EPOCH, entry.step))
        assert dict(entry.scores) == pytest.approx(scores, rel=1e-12)
    assert watch.forwards == 3 * 3 * PER_EPOCH and len(bystander.digests) > 2
    check_new_rows_moved(supernet, bystander.initial, callback.history)


def test_model_config_sizes_costs_and_files_agree_on_the_widths(arguments: Arguments, tmp_path: Path) -> None:
    supernet = candidates()
    history = trained(supernet, epochs(arguments, 3)).history
    widths, ids = history.widths(), padded(2)[0]["input_ids"][None]
    assert sorted(set(widths.values()))[:2] == [NARROW, 2 * NARROW]
    stated = supernet.base.config.candidate_widths
    assert widths == {(n, block): stated[n][place] for n in range(LAYERS) for place, block in enumerate(BLOCKS)}
    for block in BLOCKS:  # each is in one of these paths in each layer
        path = supernet.space.canonical({"layers.0.block": block, "layers.1.block": BLOCKS[-1 - BLOCKS.index(block)]})
        named = {n: (n, str(path[f"layers.{n}.block"])) for n in range(LAYERS)}
        with supernet.activate(path):
            assert supernet.measured(input_ids=ids) == supernet.expected(path)
            logits = supernet.model.eval()(input_ids=ids).logits
        for n, key in named.items():
            assert supernet.expected(path)[f"layers.{n}.intermediate_size"] == widths[key]
        assert costs.total_parameters(supernet, path) == outside(supernet) + sum(
            block_parameters(key[1], widths[key]) for key in named.values()
        )
        he.export(supernet, path, tmp_path / block)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / block).eval()
        shapes = [layer.intermediate.dense.weight.shape[0] for layer in loaded.bert.encoder.layer]
        assert shapes == [widths[key] for key in named.values()]
        assert (loaded(input_ids=ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert sum(p.numel() for p in loaded.parameters()) == costs.total_parameters(supernet, path)
    supernet.save_pretrained(tmp_path / "whole")
    assert Supernet.from_pretrained(tmp_path / "whole").space.digest == supernet.space.digest


def test_nothing_is_measured_any_more_once_the_budget_is_reached(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(growth, "pca_score", lambda *_, **__: steps.append(0) or 0.5)
    with pytest.warns(UserWarning, match="PCA scores are flat"):
        callback = trained(candidates(), epochs(arguments, 3), total_parameters=3_810, calc_freq=1)
    assert callback.finished and len(callback.history.entries) == 1
    assert len(steps) == LAYERS * PER_EPOCH


def ended(trainer: Trainer, callback: PCAGrowthCallback) -> tuple[GrowthHistory, Any, dict[str, Tensor]]:
    return callback.history, callback.supernet.base.config.candidate_widths, weights(trainer.model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[GrowthHistory, Any, dict[str, Tensor]]]:
    """What a run of a case ends with that nothing interrupts; where it saves makes no difference."""

    @functools.cache
    def run(stream: bool) -> tuple[GrowthHistory, Any, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("whole")
        trainer, callback = growing("on a stream" if stream else "where every epoch is saved", str(folder))
        trainer.train()
        assert len(callback.history.entries) == 3 and all(entry.grown for entry in callback.history.entries)
        return ended(trainer, callback)

    return lambda case: run(case == "on a stream")


def check_resumed(case: str, folder: Path, expected: tuple[GrowthHistory, Any, dict[str, Tensor]]) -> None:
    trainer, callback = growing(case, str(folder))
    trainer.train(resume_from_checkpoint=True)
    history, widths, parameters = ended(trainer, callback)
    assert history == expected[0] and widths == expected[1] and same(parameters, expected[2])


@pytest.mark.parametrize(
    ("case", "stop"),
    [
        ("in the middle of an epoch", Stop(10, "on_step_begin")),
        ("behind the last step of an epoch", Stop(12, "on_save")),
        ("behind the last step of all", Stop(18, "on_save")),
        ("where every epoch is saved", Stop(12, "on_save")),
        ("where every epoch is saved", Stop(9, "on_step_end", raises=False)),
        ("on a stream", Stop(14, "on_step_begin")),
    ],
)
def test_a_run_that_ended_early_goes_on_bit_equal(case: str, stop: Stop, tmp_path: Path, whole: Any) -> None:
    cut, _ = growing(case, str(tmp_path))
    cut.add_callback(stop)
    with pytest.raises(RuntimeError, match="boom") if stop.raises else nullcontext():
        cut.train()
    check_resumed(case, tmp_path, whole(case))


@pytest.mark.slow
def test_killed_runs_go_on_bit_equal(tmp_path: Path, whole: Any) -> None:
    run_alone("killed", tmp_path, {})  # one start for all, since it takes most of the time
    assert torch.load(tmp_path / "killed.pt") == dict.fromkeys(KILLED, int(signal.SIGKILL))
    for case in KILLED:
        check_resumed(case, tmp_path, whole(case))


@pytest.mark.slow
def test_two_ranks_grow_alike_and_as_one_process_does(tmp_path: Path) -> None:
    run_alone("ranks", tmp_path, *rank_environments())
    one, other = (torch.load(tmp_path / f"rank{n}.pt") for n in range(2))
    alone = shared(str(tmp_path / "alone"), batch=4)[1].history
    assert one["history"] == other["history"] == alone.to_dict()
    assert same(one["weights"], other["weights"])
    assert len(alone.entries) == 2 and all(entry.grown for entry in alone.entries)


def test_the_best_model_is_loaded_with_the_widths_it_was_evaluated_with(arguments: Arguments) -> None:
    supernet, logits = candidates(), []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            logits.append((metrics["eval_loss"], supernet.model.eval()(padded(1)[0]["input_ids"][None]).logits))

    args = epochs(
        arguments, 3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    history = trained(supernet, args, Evaluated()).history
    best = max(logits, key=lambda pair: pair[0])
    assert best is logits[0] and len(history.entries) == 1
    assert {tuple(widths) for widths in supernet.base.config.candidate_widths} != {(NARROW,) * len(BLOCKS)}
    assert torch.equal(supernet.model.eval()(padded(1)[0]["input_ids"][None]).logits, best[1])


def test_a_run_that_is_made_longer_keeps_its_count(arguments: Arguments) -> None:
    args = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    rule = {"count": None, "average_growths": 0.5}
    first = trained(candidates(), epochs(arguments, 2, **args), **rule).history
    second = callbacks(candidates(), **rule)
    Trainer(second[1].supernet.model, epochs(arguments, 3, **args), train_dataset=padded(), callbacks=[*second]).train(
        resume_from_checkpoint=True
    )
    assert second[1].history.entries[:2] == first.entries
    counts = [len(entry.grown) for entry in second[1].history.entries]
    assert counts == [3, 3, 3]  # 2 layers * 6 blocks * 0.5 / 2 epochs


def test_growth_comes_behind_whole_epochs_alone(arguments: Arguments) -> None:
    history = trained(candidates(), epochs(arguments, 1.5)).history
    assert [entry.step for entry in history.entries] == [PER_EPOCH]


def test_training_again_starts_a_new_history_from_the_widths_now(arguments: Arguments) -> None:
    supernet = candidates()
    both = callbacks(supernet)
    trainer = Trainer(supernet.model, epochs(arguments), train_dataset=padded(), callbacks=[*both])
    trainer.train()
    first = both[1].history
    trainer.train()
    second = both[1].history
    assert second.start == first.widths() != first.start
    assert [entry.epoch for entry in second.entries] == [1, 2] and second.widths() != second.start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_parameters": 3_000}, r"total_parameters=3,000 is below the 3,799 of the mean path before any"),
        ({"total_parameters": 5_000}, r"total_parameters=5,000 is above the 4,843 .* at their largest"),
        ({"total_parameters": math.nan}, "total_parameters=nan"),
        ({"step": 0}, "step=0 must be an integer of at least 1"),
        ({"step": 0.25 * 32}, "step=8.0 must be an integer"),
        ({"count": 0}, "count=0"),
        ({"count": 1.5}, "count=1.5 must be an integer"),
        ({"calc_freq": 0}, "calc_freq=0 must be an integer of at least 1"),
        ({"every": 0}, "every=0 must be an integer of at least 1, or 'epoch'"),
        ({"every": "step"}, "every='step' must be an integer of at least 1, or 'epoch'"),
        ({"check": "path"}, "check='path'"),
        ({"eta": 1.0}, "eta=1.0"),
        ({"normalise": "max"}, "normalise='max'"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        callbacks(candidates(), **changes)


def test_a_supernet_without_candidates_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="candidate_blocks"):
        callbacks(bert_supernet())


@pytest.mark.parametrize(
    ("training", "rule", "message"),
    [
        ({"max_steps": 6}, {"count": None}, "max_steps leaves the number of epochs open"),
        ({"max_steps": 5}, {}, "ends before its first 6 steps.*smaller number of steps as every="),
        ({}, {"count": None, "average_growths": 0.1}, "less than one growth"),
        ({}, {"calc_freq": 7}, "calc_freq=7 measures in none of the steps 36 to 41.*6 and less"),
        ({}, {"every": 3, "calc_freq": 4}, "calc_freq=4 measures in none of the steps 9 to 11.*3 and less"),
    ],
)
def test_a_run_that_growth_does_not_fit_is_refused_before_its_first_step(
    arguments: Arguments, training: dict[str, Any], rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        trained(candidates(), epochs(arguments, 8, **training), Stop(0, "on_step_begin"), **rule)


def test_epochs_of_a_stream_are_refused_and_steps_point_the_way(arguments: Arguments) -> None:
    supernet = candidates()
    trainer = Trainer(supernet.model, arguments(), train_dataset=Stream(), callbacks=[*callbacks(supernet)])
    with pytest.raises(TrainingError, match="no length.*every="):
        trainer.train()


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run that ended behind its second epoch."""
    trainer, _ = growing("where every epoch is saved", str(folder := tmp_path_factory.mktemp("cut")))
    trainer.add_callback(Stop(12, "on_save"))
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train()
    return folder / "where every epoch is saved"


@pytest.fixture
def saved(cut_off: Path, tmp_path: Path, arguments: Arguments) -> TrainingArguments:
    """Settings that go on from there."""
    shutil.copytree(cut_off, tmp_path / "run")
    return epochs(arguments, 3, save_strategy="epoch")


@pytest.mark.parametrize("changes", [{"step": 3}, {"calc_freq": 3}, {"eta": 0.8}])
def test_resuming_with_other_settings_says_which(saved: TrainingArguments, changes: dict[str, Any]) -> None:
    supernet = candidates()
    both = callbacks(supernet, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(TrainingError, match=rf"{name}=.*, this run says {value!r}; resume with"):
        Trainer(supernet.model, saved, train_dataset=padded(), callbacks=[*both]).train(resume_from_checkpoint=True)


def test_resuming_from_a_checkpoint_without_growth_is_refused(saved: TrainingArguments) -> None:
    file = Path(str(saved.output_dir)) / "checkpoint-12" / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"].pop("PCAGrowthCallback")
    file.write_text(json.dumps(state))
    supernet = candidates()
    trainer = Trainer(supernet.model, saved, train_dataset=padded(), callbacks=[*callbacks(supernet)])
    with pytest.raises(TrainingError, match="the checkpoint of step 12 holds no growth history"):
        trainer.train(resume_from_checkpoint=True)


def test_a_trainer_that_would_make_the_callback_anew_is_told_not_to(saved: TrainingArguments) -> None:
    saved.restore_callback_states_from_checkpoint = True
    supernet = candidates()
    both = callbacks(supernet)
    trainer = Trainer(supernet.model, saved, train_dataset=padded(), callbacks=[*both])
    with pytest.raises(TrainingError, match="restore_callback_states_from_checkpoint=False"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="restores itself"):
        PCAGrowthCallback.from_state(both[1].state())


def test_pre_activations_that_are_no_numbers_name_their_block(arguments: Arguments) -> None:
    supernet = candidates()
    path = supernet.space.canonical({"layers.0.block": "standard", "layers.1.block": "bottleneck-kv"})
    supernet.model.get_parameter(DENSE.format(1, "bottleneck-kv") + ".bias").data[2] = math.nan
    sampling, callback = SubnetSamplingCallback(supernet, FixedSubnet(path)), callbacks(supernet, calc_freq=6)[1]
    trainer = Trainer(supernet.model, epochs(arguments), train_dataset=padded(), callbacks=[sampling, callback])
    with pytest.raises(TrainingError, match="diverged.*block 'bottleneck-kv' of layer 1 in epoch 1 is nan"):
        trainer.train()


def test_flat_scores_warn_with_their_numbers_and_growth_goes_on(arguments: Arguments) -> None:
    with pytest.warns(UserWarning, match=rf"PCA scores are flat.*between {1 / NARROW:.6g} and {1 / NARROW:.6g}"):
        history = trained(candidates(), epochs(arguments, 1), eta=1e-9).history
    assert len(history.entries[0].grown) == 5


@pytest.mark.parametrize(
    ("event", "step", "leave"),
    [("on_train_begin", 0, "with"), ("on_pre_optimizer_step", 3, "release"), ("on_epoch_end", 6, "with")],
)
def test_an_exception_leaves_no_hooks(arguments: Arguments, event: str, step: int, leave: str) -> None:
    supernet = candidates()
    (sampling, callback), none = callbacks(supernet), hooks(supernet)
    given = [sampling, callback, Stop(step, event)]
    trainer = Trainer(supernet.model, epochs(arguments), train_dataset=padded(), callbacks=given)
    context: AbstractContextManager[Any] = callback if leave == "with" else nullcontext()
    with pytest.raises(RuntimeError, match="boom"), context, sampling:
        trainer.train()
    if leave == "release":
        assert hooks(supernet) == none + 2 + LAYERS * len(BLOCKS)  # nobody told the callback
        callback.release()
    assert hooks(supernet) == none


def test_the_end_of_training_leaves_no_hooks_and_a_callback_can_be_used_again(arguments: Arguments) -> None:
    supernet = candidates()
    both, none = callbacks(supernet), hooks(supernet)
    for _ in range(2):
        Trainer(supernet.model, epochs(arguments, 1), train_dataset=padded(), callbacks=[*both]).train()
        assert hooks(supernet) == none and both[1].history.entries
