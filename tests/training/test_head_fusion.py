"""Head fusion in the stock Trainer: what stays still, runs that are resumed, two ranks. As a script it is one rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import supernet_of
from own_processes import run_two_ranks, started
from safetensors.torch import load_file
from tiny_training import bert_supernet, same, sentences, settings, texts, weights
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_elastic import HeadFusionCallback, Supernet, extract
from hf_elastic.errors import CompressionError, DataError, TrainingError, UnsupportedModelError
from hf_elastic.training import (
    CompleteCheckpointCallback,
    ElasticTrainer,
    FixedSubnet,
    PCAGrowthCallback,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
    last_complete_checkpoint,
)

Arguments = Callable[..., TrainingArguments]
STEPS = 4  # of an epoch
SOME = {"threshold": 0.35, "min_heads": 1}  # some heads of these random models are so much alike
TWICE = 0.15  # so that there is something to fuse again
BLOCKS = ["standard", "bottleneck-kv"]
SINGLE = {"candidate_blocks": None, "per_layer_config": {1: {"block": "standard-qv"}}}
GROWING = {"candidate_widths": [[16, 8]] * 2}


def blocks(kind: str = "elastic_bert", **changes: Any) -> Supernet:
    """A supernet of two layers with dropout, of candidates unless ``changes`` say otherwise."""
    bert = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.1}
    own = bert if kind == "elastic_bert" else {"n_layer": 2, "resid_pdrop": 0.1}
    return supernet_of(kind, "sequence" if own is bert else "lm", **{"candidate_blocks": BLOCKS, **own, **changes})


def rows_for(supernet: Supernet, count: int = 4 * STEPS) -> list[dict[str, Any]]:
    return texts(count) if supernet.causal else sentences(count)


def batches(supernet: Supernet, *, seed: int = 5) -> list[dict[str, Tensor]]:
    rows = (texts if supernet.causal else sentences)(24, seed=seed)
    return [{name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}]


def fusion_of(supernet: Supernet, **changes: Any) -> HeadFusionCallback:
    return HeadFusionCallback(supernet, batches(supernet), **{**SOME, **changes})


def sampling_of(supernet: Supernet, **changes: Any) -> SubnetSamplingCallback:
    single = supernet.space.size == 1
    rule = FixedSubnet(supernet.space.largest()) if single else RandomSubnet(seed=3)
    return SubnetSamplingCallback(supernet, rule, **changes)


def trainer_of(supernet: Supernet, args: TrainingArguments, *callbacks: TrainerCallback, **kwargs: Any) -> Trainer:
    kwargs = {"train_dataset": rows_for(supernet), **kwargs}
    return Trainer(model=supernet.model, args=args, callbacks=list(callbacks), **kwargs)


def heads_of(supernet: Supernet) -> list[Any]:
    return [part.heads[block] for part in supernet.block_parts for block in part.blocks]


def epochs(arguments: Arguments, number: int = 3, **changes: Any) -> TrainingArguments:
    return arguments(max_steps=-1, num_train_epochs=number, lr_scheduler_type="constant", **changes)


def off_entries(supernet: Supernet) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of attention, with a mask of what belongs to heads that were left out."""
    for part in supernet.block_parts:
        for block in part.blocks:
            attention, kept = part.module(block).attention, part.heads[block]
            if not isinstance(kept, list):
                continue
            size = attention.self.config_head_size
            off = torch.tensor([row // size not in kept for row in range(attention.self.query.out_features)])
            for projection in (m for m in attention.self.children() if isinstance(m, torch.nn.Linear)):
                yield projection.weight, off[:, None].expand_as(projection.weight)
                yield projection.bias, off
            yield attention.output.dense.weight, off.expand_as(attention.output.dense.weight)


class Watch(TrainerCallback):
    """Looks at gradients before every step, and keeps the weights with which each epoch begins."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet, self.looked = supernet, 0
        self.starts: list[dict[str, Tensor]] = []
        self.sizes: list[dict[str, int]] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(weights(self.supernet.model))

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter, off in off_entries(self.supernet):
            if parameter.grad is not None:
                assert not parameter.grad[off].any()
                self.looked += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.supernet.active == self.supernet.space.largest()


@pytest.mark.parametrize("mode", ["merge", "remove"])
@pytest.mark.parametrize("changes", [{}, SINGLE], ids=["candidates", "one block per layer"])
def test_heads_that_went_have_no_gradient_and_do_not_move_while_the_others_train(
    arguments: Arguments, changes: dict[str, Any], mode: Any
) -> None:
    supernet = blocks(**changes)
    identities = {name: (id(p), p.shape) for name, p in supernet.model.named_parameters()}
    fusion, watch = fusion_of(supernet, mode=mode), Watch(supernet)
    sampling = sampling_of(supernet, freeze_inactive=True)
    trainer_of(supernet, epochs(arguments), sampling, fusion, watch).train()
    assert {name: (id(p), p.shape) for name, p in supernet.model.named_parameters()} == identities
    (report,) = fusion.reports
    assert any(entry.after < entry.before for entry in report.layers) and watch.looked > 0
    assert heads_of(supernet) == [entry.heads for entry in report.layers]
    names = {id(p): name for name, p in supernet.model.named_parameters()}
    moved = 0
    for parameter, off in off_entries(supernet):
        before = watch.starts[1][names[id(parameter)]]
        assert torch.equal(parameter[off], before[off])
        moved += int((parameter != before).any())
    assert moved > 0
    assert supernet.active == supernet.space.largest()
    small = extract(supernet, supernet.space.largest())
    feed = {name: tensor for name, tensor in batches(supernet)[0].items() if name != "labels"}
    supernet.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(**feed)[0], supernet.model(**feed)[0], rtol=0, atol=1e-5)


def test_a_stock_optimizer_behind_a_split_anew_trains_all_weights(arguments: Arguments) -> None:
    supernet = blocks(**SINGLE)
    fusion, watch = fusion_of(supernet, mode="resplit"), Watch(supernet)
    trainer_of(supernet, epochs(arguments, 2), fusion, watch).train()
    (report,) = fusion.reports
    assert report.parameters_after == report.parameters_before
    assert any(isinstance(heads, int) for heads in heads_of(supernet))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert (supernet.model.get_parameter(name) != watch.starts[1][name]).all()


def saved_logits(supernet: Supernet, folder: str) -> tuple[Tensor, Tensor]:
    """Logits of a model in memory, and of what was saved of it."""
    feed = {name: tensor for name, tensor in batches(supernet)[0].items() if name != "labels"}
    with torch.no_grad():
        loaded = type(supernet.model).from_pretrained(folder).eval()
        return supernet.model.eval()(**feed).logits, loaded(**feed).logits


@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("kind", ["elastic_bert", "elastic_gpt2"])
@pytest.mark.parametrize("changes", [{}, SINGLE], ids=["candidates", "one block per layer"])
def test_what_a_trainer_saves_computes_what_is_in_memory(
    arguments: Arguments, kind: str, mode: Any, changes: dict[str, Any]
) -> None:
    supernet = blocks(kind, **changes)
    fusion = fusion_of(supernet, mode=mode, threshold=TWICE, every=3)
    callbacks = [fusion] if changes else [sampling_of(supernet), fusion]
    args = epochs(arguments, 1, save_strategy="steps", save_steps=STEPS, weight_decay=0.0)
    trainer_of(supernet, args, *callbacks).train()
    assert all(any(entry.after < entry.before for entry in report.layers) for report in fusion.reports)
    here, saved = saved_logits(supernet, f"{args.output_dir}/checkpoint-{STEPS}")
    torch.testing.assert_close(saved, here, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adafactor"])
def test_no_optimizer_moves_what_heads_that_went_would_write(arguments: Arguments, optim: str) -> None:
    supernet = blocks(**SINGLE)
    args = epochs(arguments, 1, optim=optim, optim_args="momentum=0.9" if optim != "adafactor" else None)
    trainer_of(supernet, args, fusion_of(supernet, threshold=TWICE, every=2)).train()
    written = [(p, off) for p, off in off_entries(supernet) if p.ndim == 2 and not off.all(1).any()]
    assert written and all(off.any() and not parameter[off].any() for parameter, off in written)


@pytest.mark.parametrize("first", ["sampling", "fusion"])
def test_every_few_steps_heads_are_fused_as_often_as_is_said_in_whatever_order(
    arguments: Arguments, first: str
) -> None:
    finals = []
    for order in ("sampling", first):
        supernet = blocks()
        fusion, steps = fusion_of(supernet, every=3, times=2, threshold=TWICE), []

        class Count(TrainerCallback):
            def on_step_end(self, *args: Any, fusion: Any = fusion, steps: Any = steps, **kwargs: Any) -> None:
                steps.append(len(fusion.reports))

        pair = [sampling_of(supernet), fusion]
        trainer_of(supernet, epochs(arguments), *(pair if order == "sampling" else pair[::-1]), Count()).train()
        assert steps == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
        again = fusion.reports[1]
        assert [entry.before for entry in again.layers] == [entry.after for entry in fusion.reports[0].layers]
        assert supernet.active == supernet.space.largest()
        finals.append(weights(supernet.model))
    assert same(*finals)


# --- runs that are resumed


def run(
    folder: Path, kind: str, *, resume: int | None = None, growth: str = "", **changes: Any
) -> tuple[Supernet, HeadFusionCallback]:
    """Three epochs with checkpoints; with growth, that callback stands before or behind the fusion."""
    fused = {name: changes.pop(name) for name in ("mode", "every", "times", "threshold") if name in changes}
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 3, "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "steps" if resume is None else "no", "save_steps": 2, **changes}
    args = TrainingArguments(**settings(str(folder), **options))
    supernet = blocks(kind, **(GROWING if growth else {}))
    fusion = fusion_of(supernet, **{"times": 2, "threshold": TWICE, **fused})
    callbacks: list[TrainerCallback] = [fusion]
    if growth:
        grows = PCAGrowthCallback(supernet, total_parameters=15_000, step=8, count=2, calc_freq=1)
        callbacks = [grows, fusion] if growth == "before" else [fusion, grows]
    trainer = trainer_of(supernet, args, sampling_of(supernet), *callbacks, CompleteCheckpointCallback())
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return supernet, fusion


def end_of(supernet: Supernet) -> tuple[Any, ...]:
    widths = [part.width(block) for part in supernet.block_parts for block in part.blocks]
    config = supernet.model.config
    return heads_of(supernet), widths, supernet.space, supernet.active, config.candidate_heads, config.candidate_widths


CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "epochs": ("elastic_bert", {"save_steps": 4}, (4, 8)),
    "epochs of GPT-2, removed": ("elastic_gpt2", {"mode": "remove", "threshold": 0.25, "save_steps": 3}, (3, 6)),
    "epochs, resplit": ("elastic_bert", {"mode": "resplit", "threshold": 0.25, "save_steps": 4}, (4,)),
    "a last epoch": ("elastic_bert", {"times": 1, "num_train_epochs": 1, "save_steps": 4}, (4,)),
    "steps": ("elastic_bert", {"every": 3, "save_steps": 3}, (3,)),
    "checkpoints of whole epochs": ("elastic_bert", {"save_strategy": "epoch"}, (4, 8)),
    "accumulation with a rest": (
        "elastic_bert", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "save_steps": 2}, (4,),
    ),
    "beside growth before it": ("elastic_bert", {"growth": "before", "save_steps": 2}, (4, 6)),
    "beside growth behind it": ("elastic_bert", {"growth": "behind", "save_steps": 4}, (4, 8)),
}  # fmt: skip


SLOW = ("checkpoints of whole epochs", "epochs, resplit", "accumulation with a rest", "beside growth behind it")


@pytest.mark.parametrize(
    ("kind", "changes", "stops"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_a_resumed_run_ends_bit_by_bit_as_the_whole_one_wherever_it_stopped(
    kind: str, changes: dict[str, Any], *, stops: tuple[int, ...], tmp_path: Path
) -> None:
    whole, fusion = run(tmp_path, kind, **changes)
    assert len(fusion.reports) == changes.get("times", 2)
    changed = [any(entry.after < entry.before for entry in report.layers) for report in fusion.reports]
    assert all(changed[:2])
    for stop in stops:
        resumed, _ = run(tmp_path, kind, resume=stop, **changes)
        assert end_of(resumed) == end_of(whole), stop
        assert same(weights(resumed.model), weights(whole.model)), stop


def test_a_run_that_ends_within_an_epoch_fuses_behind_the_whole_one(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", "elastic_bert", save_strategy="no")
    part, fusion = run(tmp_path / "part", "elastic_bert", max_steps=6, save_steps=3)
    assert len(fusion.reports) == 1
    resumed, later = run(tmp_path / "part", "elastic_bert", resume=6)
    assert len(later.reports) == 1
    assert end_of(resumed) == end_of(whole) and same(weights(resumed.model), weights(whole.model))


def test_the_best_model_has_the_heads_it_was_saved_with(tmp_path: Path) -> None:
    for best, fused in ((2, False), (6, True)):
        scores = count(abs(best - 2), -1 if best > 2 else 1)
        folder = tmp_path / str(best)
        args = TrainingArguments(
            **settings(
                str(folder), max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                load_best_model_at_end=True, metric_for_best_model="number", greater_is_better=False,
            )
        )  # fmt: skip
        supernet = blocks()
        fusion = fusion_of(supernet)
        trainer = trainer_of(
            supernet, args, sampling_of(supernet), fusion, eval_dataset=sentences(4),
            compute_metrics=lambda prediction, scores=scores: {"number": next(scores)},
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
        assert len(fusion.reports) == 1 and any(heads_of(supernet)) == fused
        again = blocks()
        again.model.load_state_dict(load_file(folder / f"checkpoint-{best}" / "model.safetensors"))
        assert same(weights(again.model), weights(supernet.model))


# --- what is refused


def test_settings_that_no_run_could_use_are_refused_at_once() -> None:
    supernet = blocks()
    with pytest.raises(UnsupportedModelError, match=r"hf_elastic\.fuse_heads"):
        HeadFusionCallback(bert_supernet(), [])
    with pytest.raises(UnsupportedModelError, match=r"got a ElasticBertFor.*hf_elastic\.make_elastic"):
        HeadFusionCallback(supernet.model, batches(supernet))  # type: ignore[arg-type]
    for changes in ({"every": 0}, {"every": "step"}, {"every": True}, {"every": 2.0}, {"times": 0}, {"times": 1.5}):
        with pytest.raises(TrainingError, match="at least 1"):
            fusion_of(supernet, **changes)
    for changes in ({"mode": "sum"}, {"threshold": 2}, {"samples": "sequences"}, {"min_heads": 0}):
        with pytest.raises(CompressionError):
            fusion_of(supernet, **changes)
    with pytest.raises(DataError, match="at least one"):
        HeadFusionCallback(supernet, [])
    lonely = [*batches(supernet), {"input_ids": torch.tensor([[5, 6]])}]
    with pytest.raises(DataError, match="batch 1 holds one sequence"):
        HeadFusionCallback(supernet, lonely, mode="resplit", samples="sequences")


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from sentences(8)


def test_a_run_in_which_no_heads_would_be_fused_is_refused(arguments: Arguments) -> None:
    supernet = blocks()
    with pytest.raises(TrainingError, match="ends after 3 steps, heads would be fused after 4"):
        trainer_of(supernet, arguments(max_steps=3), fusion_of(supernet)).train()
    with pytest.raises(TrainingError, match="ends after 4 steps, heads would be fused after 5"):
        trainer_of(supernet, arguments(max_steps=4), fusion_of(supernet, every=5)).train()
    with pytest.raises(TrainingError, match="no length"):
        trainer_of(supernet, arguments(), fusion_of(supernet), train_dataset=Endless()).train()
    fusion = fusion_of(supernet, every=3)
    trainer_of(supernet, arguments(max_steps=4), sampling_of(supernet), fusion, train_dataset=Endless()).train()
    assert len(fusion.reports) == 1
    with pytest.raises(TrainingError, match=r"pass model=supernet\.model"):
        Trainer(
            model=blocks().model, args=arguments(), callbacks=[fusion_of(supernet)], train_dataset=sentences(16)
        ).train()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a checkpoint of step 5."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run(folder, "elastic_bert", save_steps=5)
    return folder


def test_a_checkpoint_of_another_run_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    def resume(folder: Path, *, restore: bool = False, **changes: Any) -> None:
        supernet = blocks()
        args = TrainingArguments(
            **settings(str(tmp_path), max_steps=12, restore_callback_states_from_checkpoint=restore)
        )
        fusion = fusion_of(supernet, **{"times": 2, "threshold": TWICE, **changes})
        trainer = trainer_of(supernet, args, sampling_of(supernet), fusion)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))

    for changes in ({"mode": "remove"}, {"threshold": 0.6}, {"every": 3}):
        ((name, value),) = changes.items()
        with pytest.raises(TrainingError, match=f"this run says {value!r}; resume with the settings") as raised:
            resume(checkpoints, **changes)
        assert f"was fused with {name}=" in str(raised.value)
    with pytest.raises(TrainingError, match="restore_callback_states_from_checkpoint=False"):
        resume(checkpoints, restore=True)
    folder = Path(shutil.copytree(checkpoints, tmp_path / "copy"))
    state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["HeadFusionCallback"]
    (folder / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="does not say which heads are in use"):
        resume(folder)


def test_a_run_goes_on_where_earlier_fusions_left_nothing_to_fuse(arguments: Arguments) -> None:
    supernet = blocks()
    fusion = fusion_of(supernet, threshold=0.01, every=2, times=5)
    trainer_of(supernet, epochs(arguments), sampling_of(supernet), fusion).train()
    assert [{entry.after for entry in report.layers} for report in fusion.reports] == [{1}]


@pytest.mark.parametrize("mode", ["merge", "resplit"])
def test_where_too_few_heads_would_be_left_the_fewest_allowed_stay_and_training_goes_on(
    arguments: Arguments, mode: Any
) -> None:
    supernet = blocks()
    fusion = fusion_of(supernet, threshold=0.01, min_heads=2, mode=mode)
    with pytest.warns(UserWarning, match=r"stopped at min_heads in 4 of 4 blocks: 0 \(standard\): 2 instead of 1"):
        trainer_of(supernet, epochs(arguments), sampling_of(supernet), fusion).train()
    assert {(entry.before, entry.after, entry.alike) for entry in fusion.reports[0].layers} == {(4, 2, 1)}


def test_the_elastic_trainer_takes_it_too(arguments: Arguments) -> None:
    supernet = blocks("elastic_gpt2")
    fusion = fusion_of(supernet)
    ElasticTrainer(
        supernet=supernet, sampling=SandwichRule(seed=0, random=1), args=epochs(arguments, 2), distill=True,
        train_dataset=rows_for(supernet), callbacks=[fusion],
    ).train()  # fmt: skip
    assert heads_of(supernet) == [entry.heads for entry in fusion.reports[0].layers]
    assert any(heads_of(supernet)) and supernet.active == supernet.space.largest()


# --- processes of their own


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bit_by_bit(tmp_path: Path) -> None:
    process = started(__file__, str(tmp_path), "killed")
    assert (process.wait(timeout=240), process.stdout) and process.returncode == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    resumed, _ = run(tmp_path, "elastic_bert", resume=6)
    whole, _ = run(tmp_path / "whole", "elastic_bert")
    assert end_of(resumed) == end_of(whole) and same(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
def test_two_ranks_end_with_equal_weights_and_heads(tmp_path: Path) -> None:
    first, second = run_two_ranks(__file__, tmp_path)
    assert first.keys() == second.keys() and len(first) == len(MODES)
    for mode, (heads, found) in first.items():
        assert heads == second[mode][0] and any(heads), mode
        assert same(found, second[mode][1]), mode


MODES = ("merge", "remove", "resplit")


class Killer(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def train_rank(folder: str, rank: int) -> dict[str, Any]:
    """Heads and weights with which a rank ends; each measures on batches of its own, and the first one's count."""
    ends = {}
    for mode in MODES:
        supernet = blocks()
        changes = {"max_steps": 6, "per_device_train_batch_size": 2, "ddp_find_unused_parameters": True}
        args = TrainingArguments(**settings(f"{folder}/{mode}", **changes))
        fusion = HeadFusionCallback(supernet, batches(supernet, seed=rank), mode=mode, **SOME)  # type: ignore[arg-type]
        trainer_of(supernet, args, sampling_of(supernet), fusion).train()
        ends[mode] = (heads_of(supernet), weights(supernet.model))
    return ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "killed":
        original = trainer_of
        globals()["trainer_of"] = lambda *given, **named: original(*given, Killer(), **named)
        run(Path(sys.argv[1]), "elastic_bert")
    torch.save(train_rank(sys.argv[1], int(os.environ["RANK"])), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
