"""Candidate blocks on a device: growth, head fusion and relational distillation, beside what they give on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_run import PER_EPOCH, callbacks, candidates, causal_candidates, padded
from on_device import close, moved_alike, output, placed, stays, token_batches
from tiny_models import tiny
from tiny_training import bert, bert_supernet, same, seeded, sentences, texts, weights
from torch import Tensor
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

import hf_elastic as he
from hf_elastic import (
    Distillation,
    ElasticTrainer,
    FixedSubnet,
    HeadFusionCallback,
    RandomSubnet,
    Supernet,
    make_elastic,
)
from hf_elastic.models import config_class, model_class
from hf_elastic.training import CompleteCheckpointCallback

Arguments = Callable[..., TrainingArguments]
EPOCHS: dict[str, Any] = {
    "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1,
    "weight_decay": 0.01,
}  # fmt: skip


# -- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [candidates, causal_candidates], ids=["bert", "gpt2"])
def test_blocks_grow_as_on_the_cpu(make: Callable[[], Supernet], device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made = make()
        sampling, growth = callbacks(made)
        args = arguments(where, gradient_accumulation_steps=2, **{**EPOCHS, "per_device_train_batch_size": 4})
        Trainer(made.model, args, train_dataset=padded(), callbacks=[sampling, growth]).train()
        stays(made.model, where)
        found.append((growth.history.to_dict(), weights(made.model)))
    (there, wanted), (here, got) = found
    assert here == there and len(here["entries"]) == 2
    moved_alike(got, wanted, before=weights(make().model))


def test_blocks_grow_in_mixed_precision(device: str, arguments: Arguments) -> None:
    made = candidates()
    sampling, growth = callbacks(made)
    Trainer(
        made.model, arguments(device, bf16=True, **EPOCHS), train_dataset=padded(), callbacks=[sampling, growth]
    ).train()
    stays(made.model, device)
    assert any(growth.history.entries[0].scores.values()) and growth.history.entries[0].grown


def test_a_growing_run_with_dropout_resumes_bit_equal(device: str, arguments: Arguments) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch_fused"}
    args, finals, resume = arguments(device, **EPOCHS, **saving), list[tuple[Any, dict[str, Tensor]]](), None
    for _ in range(2):
        made = candidates(hidden_dropout_prob=0.1)
        sampling, growth = callbacks(made)
        trainer = Trainer(
            made.model, args, train_dataset=padded(), callbacks=[sampling, growth, CompleteCheckpointCallback()]
        )
        trainer.train(resume_from_checkpoint=resume)
        finals.append((growth.history.to_dict(), weights(made.model)))
        folder = Path(str(args.output_dir))
        if resume is None:
            for later in (PER_EPOCH + 2, 2 * PER_EPOCH):
                shutil.rmtree(folder / f"checkpoint-{later}")
            resume = he.last_complete_checkpoint(folder)
            assert resume is not None and resume.endswith("checkpoint-4")
    (history, one), (again, other) = finals
    assert history == again and same(one, other)


# -- head fusion ------------------------------------------------------------------------------------------------------


def blocks(**changes: Any) -> Supernet:
    config = config_class("elastic_bert")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
        **{"candidate_blocks": ["standard", "standard-qv", "bottleneck-kv"], "bottleneck_size": 16, **changes},
    )  # fmt: skip
    return make_elastic(seeded(lambda: model_class("elastic_bert", "ElasticBertForSequenceClassification")(config)))


def calibration() -> list[dict[str, Tensor]]:
    rows = sentences(24, seed=5)
    return [{name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}]


@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
def test_heads_are_fused_as_on_the_cpu(mode: Any, device: str, arguments: Arguments) -> None:
    found = []
    for where in ("cpu", device):
        made = blocks()
        fusion = HeadFusionCallback(made, calibration(), mode=mode, threshold=0.35, min_heads=1, every=2)
        sampling = he.SubnetSamplingCallback(made, RandomSubnet(seed=3))
        args = arguments(where, learning_rate=0.1, weight_decay=0.01)
        Trainer(model=made.model, args=args, train_dataset=sentences(), callbacks=[sampling, fusion]).train()
        stays(made.model, where)
        (report,) = fusion.reports
        small = he.extract(made, made.space.smallest())
        stays(small, where)
        found.append((report, output(small, calibration()[0])))
    (there, wanted), (here, got) = found
    assert [(one.after, one.heads) for one in here.layers] == [(one.after, one.heads) for one in there.layers]
    assert any(one.after < one.before for one in here.layers)
    for one, other in zip(here.layers, there.layers, strict=True):
        close(one.cka, other.cka, tolerance=1e-3, what=f"CKA of layer {one.layer}")
    close(got, wanted, tolerance=5e-3, what="outputs")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_of_a_finished_model_are_fused_on_the_device(family: str, device: str) -> None:
    batches = token_batches(tiny(family))
    there, wanted = he.fuse_heads(tiny(family), batches, threshold=0.3, min_heads=1)
    model = placed(tiny(family), device)
    here, got = he.fuse_heads(model, batches, threshold=0.3, min_heads=1)
    stays(here, device)
    stays(model, device)
    assert [one.heads for one in got.layers] == [one.heads for one in wanted.layers]
    close(output(here, batches[0]), output(there, batches[0]), tolerance=1e-3, what="outputs")


def test_a_path_of_blocks_is_written_from_the_device(device: str, tmp_path: Path) -> None:
    made = placed(candidates(), device)
    batch = {"input_ids": torch.arange(3, 15)[None]}
    for number, point in enumerate((made.space.largest(), made.space.midpoint())):
        report = he.export(made, point, tmp_path / str(number))
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / str(number), trust_remote_code=True).eval()
        with made.activate(point):
            close(output(loaded, batch), output(made.model.eval(), batch), what=f"logits of a {report.loadability}")
    made.save_pretrained(tmp_path / "supernet")
    again = Supernet.from_pretrained(tmp_path / "supernet")
    assert same({n: t.cpu() for n, t in weights(made.model).items()}, weights(again.model))


# -- relational distillation ------------------------------------------------------------------------------------------


def relational(**changes: Any) -> Distillation:
    teacher = bert(base=True, seed=4, hidden_size=40, num_hidden_layers=2, num_attention_heads=4)
    return Distillation(target="relational", teacher=teacher, fit=True, **changes)


@pytest.mark.parametrize("distance", ["pearson", "mse"])
def test_states_are_distilled_through_fit_layers_as_on_the_cpu(
    distance: Any, device: str, arguments: Arguments
) -> None:
    found = []
    for where in ("cpu", device):
        made = candidates()
        trainer = ElasticTrainer(
            supernet=made,
            sampling=RandomSubnet(seed=1),
            distill=relational(state_distance=distance),
            args=arguments(where, learning_rate=0.05, gradient_accumulation_steps=2),
            train_dataset=padded(),
        )
        trainer.train()
        stays(made.model, where)
        assert trainer.fit_layers is not None
        stays(trainer.fit_layers, where)
        found.append({**weights(made.model), **{f"fit.{n}": t for n, t in weights(trainer.fit_layers).items()}})
    wanted, got = found
    before = {**weights(candidates().model)}
    moved_alike({n: got[n] for n in before}, {n: wanted[n] for n in before}, before=before)
    for name in got.keys() - before.keys():
        close(got[name], wanted[name], tolerance=1e-3, what=name)


@pytest.mark.parametrize("prediction", ["dist", "kl"])
def test_predictions_of_a_causal_teacher_are_distilled_as_on_the_cpu(
    prediction: Any, device: str, arguments: Arguments
) -> None:
    found = []
    for where in ("cpu", device):
        made = causal_candidates()
        teacher = tiny("gpt2", vocab_size=40, n_layer=2)
        plan = Distillation(target="relational", teacher=teacher, fit=True, prediction=prediction, label_weight=0.5)
        args = arguments(where, learning_rate=0.05)
        ElasticTrainer(
            supernet=made, sampling=RandomSubnet(seed=1), distill=plan, args=args, train_dataset=texts()
        ).train()
        found.append(weights(made.model))
    moved_alike(found[1], found[0], before=weights(causal_candidates().model))


def test_fit_layers_resume_bit_equal_on_the_device(device: str, arguments: Arguments) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    args, finals, resume = arguments(device, bf16=True, **saving), [], None
    for _ in range(2):
        made = bert_supernet(skip=("mlp",), hidden_dropout_prob=0.1, num_hidden_layers=2)
        trainer = ElasticTrainer(
            supernet=made, sampling=FixedSubnet(made.space.midpoint()), distill=relational(), args=args,
            train_dataset=sentences(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.fit_layers is not None
        stays(trainer.fit_layers, device)
        finals.append({**weights(made.model), **{f"fit.{n}": t for n, t in weights(trainer.fit_layers).items()}})
        if resume is None:
            shutil.rmtree(Path(str(args.output_dir)) / "checkpoint-4")
            resume = he.last_complete_checkpoint(str(args.output_dir))
            assert resume is not None
    assert same(*finals)
