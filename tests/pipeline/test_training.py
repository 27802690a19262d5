from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import options
from tiny_models import inputs, supernet_of, tiny
from torch import nn

from hf_elastic import ElasticTrainer, FixedSubnet, Supernet, TrainingError, make_elastic
from hf_elastic.pipeline.options import CompressOptions, default_space
from hf_elastic.pipeline.tasks import Task, TaskData, load_model, load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import (
    device_of,
    prepared_for_distillation,
    random_batches,
    step_seconds,
    train_phase,
    training_order,
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


def test_every_epoch_of_the_order_holds_each_example_at_most_once() -> None:
    order = training_order([5] * 30, batch_size=4, steps=20, seed=0)
    assert len(order) == 80
    for start in range(0, 80, 28):  # 7 whole batches of 30 examples; the other two wait for another epoch
        assert max(Counter(order[start : start + 28]).values()) == 1
    assert set(order) == set(range(30))


def test_the_order_is_a_function_of_the_seed_and_longer_trainings_begin_alike() -> None:
    lengths = [n % 7 for n in range(50)]
    order = training_order(lengths, batch_size=4, steps=40, seed=1)
    assert order == training_order(lengths, batch_size=4, steps=40, seed=1)
    assert order[:80] == training_order(lengths, batch_size=4, steps=20, seed=1)
    assert order != training_order(lengths, batch_size=4, steps=40, seed=2)


def test_batches_are_of_similar_length_and_not_sorted_by_it() -> None:
    lengths = [1 + (n * 37) % 60 for n in range(240)]
    order = training_order(lengths, batch_size=8, steps=30, seed=0)
    batches = [[lengths[i] for i in order[s : s + 8]] for s in range(0, len(order), 8)]
    assert max(max(batch) - min(batch) for batch in batches) <= 3
    longest = [max(batch) for batch in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_fewer_examples_than_a_batch_holds_are_repeated() -> None:
    order = training_order([1, 2, 3], batch_size=8, steps=2, seed=0)
    assert len(order) == 16 and set(Counter(order).values()) <= {5, 6}


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2"])
def test_dropout_and_frozen_embeddings_last_as_long_as_the_training(family: str) -> None:
    rates = {
        "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}, "llama": {"attention_dropout": 0.5},
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "distilbert": {"dropout": 0.5, "attention_dropout": 0.5},
    }[family]  # fmt: skip
    model = tiny(family, "base", **rates).train()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tables[-1].requires_grad_(False)  # by the caller, and not ours to undo

    def noisy() -> bool:
        with torch.no_grad():
            return not torch.equal(model(**inputs(model))[0], model(**inputs(model))[0])

    assert noisy()
    with pytest.raises(KeyboardInterrupt), prepared_for_distillation(model, freeze_embeddings=True):
        assert not noisy()
        assert not any(table.requires_grad for table in tables)
        assert all(p.requires_grad for p in model.parameters() if not any(p is table for table in tables))
        raise KeyboardInterrupt
    assert noisy()
    assert [table.requires_grad for table in tables] == [True] * (len(tables) - 1) + [False]


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
