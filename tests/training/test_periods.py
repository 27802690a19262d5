"""Runs that go on from a checkpoint whose blocks were grown, or whose heads were fused, and what they must not undo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grown_run import callbacks, candidates, padded
from test_head_fusion import TWICE, blocks, fusion_of, rows_for, run, sampling_of
from tiny_training import settings
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_elastic import Supernet, make_elastic
from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.training import ElasticTrainer, PCAGrowthCallback, RandomSubnet
from hf_elastic.training.periods import ends_with_step


def resumed(supernet: Supernet, folder: Path, *given: TrainerCallback, rows: Any, elastic: bool = False) -> None:
    args = TrainingArguments(**settings(str(folder / "again"), max_steps=-1, num_train_epochs=3))
    if elastic:
        trainer: Trainer = ElasticTrainer(
            supernet=supernet, sampling=RandomSubnet(seed=3), args=args, train_dataset=rows, callbacks=list(given)
        )
    else:
        trainer = Trainer(supernet.model, args, train_dataset=rows, callbacks=list(given))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    supernet = candidates()
    changes = {"max_steps": 6, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 6}
    args = TrainingArguments(**settings(str(folder), **changes))
    Trainer(supernet.model, args, train_dataset=padded(), callbacks=[*callbacks(supernet, every=3)]).train()
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    run(folder, "elastic_bert", save_steps=6)
    return folder


@pytest.mark.parametrize("elastic", [False, True])
def test_growth_is_not_undone_by_a_run_without_its_callback(grown: Path, elastic: bool) -> None:
    supernet = candidates()
    sampling = [] if elastic else callbacks(supernet)[:1]
    with pytest.raises(TrainingError, match=r"step 6 was grown by PCAGrowthCallback, which this run has not") as raised:
        resumed(supernet, grown, *sampling, rows=padded(), elastic=elastic)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("elastic", [False, True])
def test_fusion_is_not_undone_by_a_run_without_its_callback(fused: Path, elastic: bool) -> None:
    supernet = blocks()
    sampling = [] if elastic else [sampling_of(supernet)]
    with pytest.raises(TrainingError, match=r"was fused by HeadFusionCallback.*; add HeadFusionCallback with the"):
        resumed(supernet, fused, *sampling, rows=rows_for(supernet), elastic=elastic)


def test_a_run_that_was_over_is_told_so_too(grown: Path, tmp_path: Path) -> None:
    supernet = candidates()
    args = TrainingArguments(**settings(str(tmp_path), max_steps=6, per_device_train_batch_size=8))
    trainer = Trainer(supernet.model, args, train_dataset=padded(), callbacks=[callbacks(supernet)[0]])
    with pytest.raises(TrainingError, match="was grown by PCAGrowthCallback"):
        trainer.train(resume_from_checkpoint=str(grown / "checkpoint-6"))


def test_each_callback_asks_for_the_other(grown: Path, fused: Path) -> None:
    supernet = blocks()
    growth = PCAGrowthCallback(blocks(candidate_widths=[[16, 8]] * 2), total_parameters=15_000, step=8, count=2)
    growth.on_train_begin = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="was fused by HeadFusionCallback"):
        resumed(supernet, fused, growth, rows=rows_for(supernet))
    narrow = candidates()
    fusion = fusion_of(blocks())
    fusion.supernet, fusion.on_train_begin = narrow, lambda *args, **kwargs: None  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="was grown by PCAGrowthCallback"):
        resumed(narrow, grown, fusion, rows=padded())


def test_a_model_that_has_the_sizes_of_the_checkpoint_goes_on_without_the_callback(grown: Path) -> None:
    first = candidates()
    model = type(first.model).from_pretrained(grown / "checkpoint-6")
    supernet = make_elastic(model)
    resumed(supernet, grown, callbacks(supernet)[0], rows=padded())
    assert model.config.candidate_widths != first.model.config.candidate_widths


def test_with_their_callbacks_runs_go_on(fused: Path) -> None:
    supernet = blocks()
    fusion = fusion_of(supernet, times=2, threshold=TWICE)
    resumed(supernet, fused, fusion, sampling_of(supernet), rows=rows_for(supernet))
    assert fusion.reports


def test_other_candidates_are_one_line(grown: Path) -> None:
    for own, words in ((("standard", "bottleneck"), "standard, bottleneck;"), (("standard",), "standard;")):
        supernet = candidates(blocks=own)
        with pytest.raises(CheckpointError, match=f"bottleneck-kv, this supernet of {words} resume with") as raised:
            resumed(supernet, grown, rows=padded(), elastic=True)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_step_behind_the_last_one_ends_no_period() -> None:
    state = TrainerState(global_step=12, max_steps=11)
    assert not ends_with_step(6, state)
    state.max_steps = 12
    assert ends_with_step(6, state) and not ends_with_step("epoch", state)
