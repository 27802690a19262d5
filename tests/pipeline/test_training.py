from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import options
from tiny_models import inputs, supernet_of

from hf_elastic import ElasticTrainer, FixedSubnet, Supernet, TrainingError, make_elastic
from hf_elastic.pipeline.options import CompressOptions, default_space
from hf_elastic.pipeline.tasks import Task, TaskData, load_model, load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import (
    device_of,
    random_batches,
    step_seconds,
    train_phase,
)

Find = Callable[[str], Path]


def opened(given: CompressOptions) -> tuple[Task, TaskData, Supernet]:
    task = resolve_task(given)
    rows = read_rows(given.data, text_column=given.text_column)
    data = task.prepare(load_tokenizer(given), rows, given)
    model = load_model(task, given)
    return task, data, make_elastic(model, default_space(model, given.loadability))


def weights(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in supernet.model.named_parameters()}


@pytest.mark.parametrize("kind", ["embedding", "classification", "masked-lm", "causal-lm"])
def test_a_phase_trains_the_subnet_and_nothing_else(checkpoint: Find, data: Find, tmp_path: Path, kind: str) -> None:
    task, made, supernet = opened(options(checkpoint(kind), data(kind), tmp_path / "out"))
    given, point, before = options(checkpoint(kind), data(kind), tmp_path / "out"), supernet.space.smallest(), {}
    before = weights(supernet)
    parent = load_model(task, given).requires_grad_(False)
    with supernet.activate(point):
        regions = supernet.active_regions()
    train_phase(
        supernet, FixedSubnet(point), task=task, data=made, options=given, folder=tmp_path / "work", steps=3,
        bf16=False, teacher=parent,
    )  # fmt: skip
    after = weights(supernet)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    for name, boxes in regions.items():
        inside = torch.zeros_like(before[name], dtype=torch.bool)
        for box in boxes:
            inside[box] = True
        assert torch.equal(before[name][~inside], after[name][~inside])
    frozen = {name for name in before if "embeddings.weight" in name}
    assert not (moved & frozen) or kind != "embedding"
    assert all(p.requires_grad for p in supernet.model.parameters())
    assert supernet.active == supernet.space.largest()


class _Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["embedding", "masked-lm"])
def test_a_phase_that_is_continued_ends_as_if_never_interrupted(
    checkpoint: Find, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given = options(checkpoint(kind), data(kind), tmp_path / "out", sequence_length=8)
    step = ElasticTrainer.training_step

    def run(folder: str, *, stop_at: int | None) -> dict[str, torch.Tensor]:
        task, made, supernet = opened(given)
        parent = load_model(task, given).requires_grad_(False)

        def stopping(self: ElasticTrainer, *args: object, **kwargs: object) -> torch.Tensor:
            if self.state.global_step == stop_at:
                raise _Stop
            return step(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(ElasticTrainer, "training_step", stopping)
        torch.rand(len(folder))  # whatever the random state that libraries share
        train_phase(
            supernet, FixedSubnet(supernet.space.midpoint()), task=task, data=made, options=given,
            folder=tmp_path / folder, steps=30, bf16=False, teacher=parent,
        )  # fmt: skip
        return weights(supernet)

    assert len(opened(given)[1].train) // given.batch_size < 20  # the stop is in a later epoch
    whole = run("whole", stop_at=None)
    with pytest.raises(_Stop):
        run("parts", stop_at=27)
    continued = run("parts", stop_at=None)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_measuring_a_step_changes_nothing() -> None:
    supernet = supernet_of("bert", "sequence")
    before = weights(supernet)
    batches = [{**inputs(supernet.model, batch_size=4), "labels": torch.zeros(4, dtype=torch.long)}]
    for bf16 in (False, True):
        pool = (supernet.space.smallest(), supernet.space.midpoint())
        assert 0 < step_seconds(supernet, pool, batches=batches, bf16=bf16) < 10
    assert all(torch.equal(before[name], p) for name, p in supernet.model.named_parameters())
    assert all(p.grad is None for p in supernet.model.parameters())
    assert not supernet.model.training and supernet.active == supernet.space.largest()


def test_probe_batches_spread_over_the_lengths(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    _, made, _ = opened(options(checkpoint("embedding"), data("embedding"), tmp_path / "out"))
    batches = random_batches(made, size=8)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert all(len(batch["input_ids"]) == 8 for batch in batches)
    everything = random_batches(made, size=10_000)
    assert all(len(batch["input_ids"]) == len(made.train) for batch in everything)


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no GPU"):
        device_of(options(tmp_path, tmp_path, tmp_path / "out", device="cuda"))
    assert device_of(options(tmp_path, tmp_path, tmp_path / "out", device="auto")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(options(tmp_path, tmp_path, tmp_path / "out", device="auto")) == "cuda"
    assert device_of(options(tmp_path, tmp_path, tmp_path / "out", device="cpu")) == "cpu"
