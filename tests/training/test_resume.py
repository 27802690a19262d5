"""Whole and half-written checkpoints, and runs that go on as if never interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed_run import elastic_trainer
from safetensors.torch import save_file
from tiny_models import disk_full_at
from tiny_training import bert_supernet, same, sentences, settings, weights
from transformers import Trainer, TrainingArguments

from hf_elastic.errors import CheckpointError
from hf_elastic.training import (
    CompleteCheckpointCallback,
    ElasticTrainer,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
    last_complete_checkpoint,
)
from hf_elastic.training.resume import MARKER, checkpoint_errors, incompleteness, is_whole_safetensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Output folder and final weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = elastic_trainer(str(folder))
    trainer.train()
    return folder, weights(trainer.supernet.model)


def resumed(folder: Path, checkpoint: str | bool = True) -> dict[str, torch.Tensor]:
    trainer = elastic_trainer(str(folder))
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6
    return weights(trainer.supernet.model)


def test_a_run_killed_while_it_saves_ends_bit_equal_to_one_that_was_not(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here), *sys.path]),
    }
    killed = subprocess.run(
        [sys.executable, str(here / "killed_run.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert same(resumed(tmp_path), finished[1])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_each_checkpoint_can_be_gone_on_from_bit_equal(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert same(resumed(folder, str(folder / "checkpoint-4")), finished[1])


def test_the_stock_trainer_with_callbacks_resumes_bit_equal(
    tmp_path: Path,
) -> None:
    finals = []
    for interrupted in (False, True):
        folder = str(tmp_path / str(interrupted))
        args = TrainingArguments(**settings(folder, max_steps=6, save_strategy="steps", save_steps=3))

        def train(resume: str | None, args: TrainingArguments = args) -> dict[str, torch.Tensor]:
            supernet = bert_supernet(hidden_dropout_prob=0.2)
            callbacks = [
                SubnetSamplingCallback(supernet, RandomSubnet(seed=0)),
                CompleteCheckpointCallback(),
            ]
            trainer = Trainer(supernet.model, args, train_dataset=sentences(), callbacks=callbacks)
            trainer.train(resume_from_checkpoint=resume)
            return weights(supernet.model)

        final = train(None)
        if interrupted:
            shutil.rmtree(tmp_path / "True" / "checkpoint-6")
            final = train(last_complete_checkpoint(tmp_path / "True"))
        finals.append(final)
    assert same(*finals)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir())


@pytest.mark.parametrize("means", ["ElasticTrainer", "sampling", "marking"])
def test_a_run_that_was_over_when_it_was_resumed_moves_no_weight_and_saves_nothing(means: str, tmp_path: Path) -> None:
    def run() -> Trainer:
        changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        args = TrainingArguments(**settings(str(tmp_path), **changes))
        supernet = bert_supernet()
        if means == "ElasticTrainer":
            return ElasticTrainer(
                supernet=supernet, sampling=RandomSubnet(seed=0), args=args, train_dataset=sentences()
            )  # fmt: skip
        sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
        callback = sampling if means == "sampling" else CompleteCheckpointCallback()
        return Trainer(supernet.model, args, train_dataset=sentences(), callbacks=[callback])

    first = run()
    first.train()
    assert checkpoints(tmp_path) == [2, 4, 5]
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(weights(again.model), weights(first.model))
    assert (again.state.global_step, again.state.epoch) == (first.state.global_step, first.state.epoch)
    assert checkpoints(tmp_path) == [2, 4, 5]


def test_a_resumed_run_marks_the_checkpoint_it_goes_on_from_and_tidies_the_one_it_writes_again(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "checkpoint-4" / MARKER).unlink()
    truncate(folder / "checkpoint-6" / "trainer_state.json")
    (folder / "checkpoint-6" / ".tmpAbC123").write_bytes(b"x")  # as safetensors calls it
    assert same(resumed(folder), finished[1])
    assert (folder / "checkpoint-4" / MARKER).is_file() and not (folder / "checkpoint-6" / ".tmpAbC123").exists()
    assert ".tmpAbC123" not in (folder / "checkpoint-6" / MARKER).read_text()


@pytest.mark.parametrize("size", [10, 1000, 20_000, 60_000])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, size: int
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-6")
    trainer = elastic_trainer(str(folder))
    with disk_full_at(size), pytest.raises(CheckpointError, match="cannot write .*checkpoint-6.*") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert same(resumed(folder), finished[1])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a trainer state": lambda folder: truncate(folder / "trainer_state.json"),
    "half of the weights": lambda folder: truncate(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half an optimizer": lambda folder: truncate(folder / "optimizer.pt"),
    "half a scheduler": lambda folder: truncate(folder / "scheduler.pt"),
    "half of the random states": lambda folder: truncate(folder / "rng_state.pth"),
    "an index of missing shards": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    ),
    "half an index": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_m'),
}


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_checkpoint_is_passed_over(
    finished: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    damage: Callable[[Path], None],
    marked: bool,
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    if not marked:
        (folder / "checkpoint-6" / MARKER).unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    damage(folder / "checkpoint-6")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")


def test_the_marker_tells_of_a_file_that_is_missing_or_shorter(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    config = (folder / "config.json").read_text()
    truncate(folder / "config.json")
    assert incompleteness(folder) == "config.json is truncated"
    (folder / "config.json").unlink()
    assert incompleteness(folder) == "config.json is missing"
    (folder / "config.json").write_text(config)
    assert incompleteness(folder) is None
    (folder / MARKER).write_text("[]")
    assert incompleteness(folder) is not None


def test_a_checkpoint_whose_removal_was_killed_is_not_whole_whatever_is_left_of_it(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The Trainer removes files of old checkpoints one after the other, the marker maybe first."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    old = folder / "checkpoint-4"
    assert incompleteness(old) is None
    (old / MARKER).unlink()
    for file in ("", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        if file:
            (old / file).unlink()
        assert "was being removed" in str(incompleteness(old))
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    (folder / "checkpoint-6" / MARKER).unlink()  # the newest, killed before it was marked, is named by nobody
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")


def test_the_marker_of_an_earlier_run_is_gone_before_its_checkpoint_is_written_again(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    seen: list[bool] = []

    class Looking(ElasticTrainer):
        def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
            seen.append((folder / f"checkpoint-{self.state.global_step}" / MARKER).exists())
            super()._save_checkpoint(*args, **kwargs)

    elastic_trainer(str(folder), kind=Looking).train()
    assert seen == [False, False, False]
    assert (folder / "checkpoint-6" / MARKER).is_file()


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_resuming_without_a_whole_checkpoint_raises_before_training(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        elastic_trainer(str(tmp_path)).train(resume_from_checkpoint=True)
    folder = shutil.copytree(finished[0], tmp_path / "run")
    truncate(folder / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer.pt is truncated; resume from .*checkpoint-4"):
        elastic_trainer(str(folder)).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    with pytest.raises(CheckpointError, match="not a folder"):
        elastic_trainer(str(folder)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]", b"\x08" + b"\x00" * 7 + b'{"a": 1}'],
)
def test_foreign_bytes_are_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert not is_whole_safetensors(file)
    assert not is_whole_safetensors(tmp_path / "missing.safetensors")


def test_every_shorter_or_longer_safetensors_file_is_told_from_the_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, file)
    content = file.read_bytes()
    assert is_whole_safetensors(file)
    for size in range(len(content)):
        file.write_bytes(content[:size])
        assert not is_whole_safetensors(file), size
    file.write_bytes(content + b"\x00")
    assert not is_whole_safetensors(file)
    save_file({}, file)
    assert is_whole_safetensors(file)


def test_a_rule_of_another_seed_is_another_run(finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    trainer = elastic_trainer(str(tmp_path))
    trainer.sampling = SandwichRule(seed=4, random=1)
    trainer.train()
    assert not same(weights(trainer.supernet.model), finished[1])


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "deepspeed.json"), ConnectionRefusedError(111, "refused")],
)
def test_what_is_no_full_disk_is_said_as_it_is(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, checkpoint_errors(Path("checkpoint-2")):
        raise error
    assert caught.value is error
