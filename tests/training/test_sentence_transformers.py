"""Trainers of sentence-transformers on supernets: a fixed subnet learns what the extracted encoder learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_checkpoints import sentence_encoder, sentences
from torch import Tensor, nn

from hf_elastic import (
    ElasticConfig,
    ElasticLoraConfig,
    ElasticTrainerMixin,
    FixedSubnet,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
    Supernet,
    TrainingError,
    add_lora,
    export,
    make_elastic,
)

st = pytest.importorskip(
    "sentence_transformers", reason='it is not installed: pip install "hf-elastic[sentence-transformers]"'
)
losses = pytest.importorskip("sentence_transformers.losses")
evaluation = pytest.importorskip("sentence_transformers.evaluation")
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST, SECOND = sentences(24), sentences(24, seed=1)
SCORES = [float(n % 5) / 4 for n in range(24)]


class ElasticSentenceTrainer(ElasticTrainerMixin, st.SentenceTransformerTrainer):  # type: ignore[misc,name-defined]
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(sentence_encoder(tmp_path_factory.mktemp("st") / "encoder", hidden_dropout_prob=0.0,
                                attention_probs_dropout_prob=0.0))  # fmt: skip


def encoder_of(checkpoint: str) -> Any:
    return st.SentenceTransformer(checkpoint, device="cpu")


def elastic(checkpoint: str) -> tuple[Any, Supernet]:
    encoder = encoder_of(checkpoint)
    return encoder, make_elastic(encoder[0].auto_model, ElasticConfig(intermediate_size=[16, 32, 64]))


def exported(checkpoint: str, supernet: Supernet, point: Any, folder: Path) -> Any:
    """The encoder that a subnet is written as."""
    export(supernet, point, folder, source=checkpoint)
    return encoder_of(str(folder))


def cosine(model: Any) -> nn.Module:
    return losses.CosineSimilarityLoss(model)


def ranking(model: Any) -> nn.Module:
    return losses.MultipleNegativesRankingLoss(model)


def cached_ranking(model: Any) -> nn.Module:
    """It runs the forward again inside the backward, in parts."""
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


def matryoshka(model: Any) -> nn.Module:
    return losses.MatryoshkaLoss(model, cosine(model), matryoshka_dims=[32, 8])


def trainer_of(model: Any, folder: Path, loss: Callable[[Any], nn.Module] = cosine, **changes: Any) -> Any:
    """A stock trainer, or one with the mixin if it gets a supernet."""
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
        "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
        "weight_decay": 0.1, "seed": 3, **changes.pop("arguments", {}),
    }  # fmt: skip
    scored = loss in (cosine, matryoshka)
    columns = {"sentence1": FIRST, "sentence2": SECOND, **({"score": SCORES} if scored else {})}
    made = ElasticSentenceTrainer if "supernet" in changes else st.SentenceTransformerTrainer
    return made(
        model=model, args=st.SentenceTransformerTrainingArguments(str(folder), **settings), loss=loss(model),
        train_dataset=Dataset.from_dict(columns), **changes,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def neurons_of(encoder: Any) -> list[int]:
    """Widths of one FFN in every forward from now on."""
    seen: list[int] = []
    projection = encoder[0].auto_model.encoder.layer[0].output.dense
    projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    return seen


@pytest.mark.parametrize("loss", [cosine, cached_ranking])
@pytest.mark.parametrize("by", [pytest.param("callback", marks=pytest.mark.slow), "mixin"])
def test_a_fixed_subnet_learns_what_the_extracted_encoder_learns(
    by: str, loss: Any, checkpoint: str, tmp_path: Path
) -> None:
    encoder, supernet = elastic(checkpoint)
    point = supernet.space.smallest()
    alone = exported(checkpoint, supernet, point, tmp_path / "before")
    trainer_of(alone, tmp_path / "a", loss).train()
    changes: dict[str, Any] = {"supernet": supernet, "sampling": FixedSubnet(point)}
    if by == "callback":
        changes = {"callbacks": [SubnetSamplingCallback(supernet, FixedSubnet(point))]}
    before, seen = weights(encoder), neurons_of(encoder)
    trainer_of(encoder, tmp_path / "b", loss, **changes).train()
    assert set(seen) == {16} and supernet.active == supernet.space.largest()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(encoder).items())
    trained = exported(checkpoint, supernet, point, tmp_path / "after")
    wanted = weights(alone)
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss", [cosine, ranking, cached_ranking, matryoshka])
def test_a_sandwich_runs_several_subnets_a_step(loss: Any, checkpoint: str, tmp_path: Path) -> None:
    encoder, supernet = elastic(checkpoint)
    before, seen = weights(encoder), neurons_of(encoder)
    trainer_of(
        encoder, tmp_path, loss, supernet=supernet, sampling=SandwichRule(seed=0, random=1),
        arguments={"gradient_accumulation_steps": 2},
    ).train()  # fmt: skip
    assert {16, 64} <= set(seen) <= {16, 32, 64} and supernet.active == supernet.space.largest()
    moved = [name for name, tensor in weights(encoder).items() if not torch.equal(tensor, before[name])]
    assert len(moved) > 40


@pytest.mark.slow
def test_the_loss_of_a_sandwich_is_the_mean_over_its_subnets(checkpoint: str, tmp_path: Path) -> None:
    encoder, supernet = elastic(checkpoint)
    sampling = SandwichRule(seed=0, random=1)
    arguments = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    trainer = trainer_of(encoder, tmp_path / "a", supernet=supernet, sampling=sampling, arguments=arguments)
    found = trainer.train().training_loss
    wanted = []
    for number, point in enumerate(sampling.draw(supernet.space, 0, 0)):
        alone = exported(checkpoint, supernet, point, tmp_path / f"subnet{number}")
        wanted.append(trainer_of(alone, tmp_path / f"{number}", arguments=arguments).train().training_loss)
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-5) and len(set(wanted)) > 1


def test_an_evaluator_sees_each_named_subnet(checkpoint: str, tmp_path: Path) -> None:
    encoder, supernet = elastic(checkpoint)
    point = supernet.space.smallest()
    judge = evaluation.EmbeddingSimilarityEvaluator(FIRST, SECOND, SCORES, name="x")
    data = Dataset.from_dict({"sentence1": FIRST, "sentence2": SECOND, "score": SCORES})
    found = trainer_of(
        encoder, tmp_path, supernet=supernet, sampling=RandomSubnet(seed=0), evaluator=judge, eval_dataset=data,
        eval_architectures={"small": point},
    ).evaluate()  # fmt: skip
    values = []
    for prefix, architecture in (("eval_small_", point), ("eval_", supernet.space.largest())):
        alone = exported(checkpoint, supernet, architecture, tmp_path / prefix)
        values.append(judge(alone)["x_spearman_cosine"])
        assert found[f"{prefix}x_spearman_cosine"] == pytest.approx(values[-1], abs=1e-6)
    assert values[0] != values[1]


def test_a_run_resumes_bit_equal_and_its_checkpoints_are_stock(checkpoint: str, tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 1}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        encoder, supernet = elastic(checkpoint)
        sampling = SandwichRule(seed=0, random=1)
        trainer = trainer_of(encoder, tmp_path, supernet=supernet, sampling=sampling, arguments=arguments)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(encoder)
    first, second = map(weights, runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    saved = st.SentenceTransformer(str(tmp_path / "checkpoint-3"), device="cpu")
    torch.testing.assert_close(
        saved.encode(FIRST, convert_to_tensor=True), runs[1].encode(FIRST, convert_to_tensor=True), rtol=1e-5, atol=1e-6
    )


def test_a_subnet_of_a_trained_encoder_is_exported_with_its_modules(checkpoint: str, tmp_path: Path) -> None:
    encoder, supernet = elastic(checkpoint)
    trainer_of(encoder, tmp_path / "t", supernet=supernet, sampling=SandwichRule(seed=0, random=1)).train()
    point = supernet.space.smallest()
    export(supernet, point, tmp_path / "small", source=checkpoint)
    small = st.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    with supernet.activate(point):
        wanted = encoder.eval().encode(FIRST, convert_to_tensor=True)
    torch.testing.assert_close(small.encode(FIRST, convert_to_tensor=True), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["callback", "mixin"])
def test_elastic_adapters_that_the_encoder_added_are_trained(by: str, checkpoint: str, tmp_path: Path) -> None:
    encoder = encoder_of(checkpoint)
    encoder.add_adapter(ElasticLoraConfig(r=8, ranks=[2, 4], target_modules=["query", "value"]))
    supernet = Supernet(encoder)
    seen: list[int] = []
    up = next(module for name, module in encoder.named_modules() if name.endswith("query.lora_B.default"))
    up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    changes: dict[str, Any] = {"supernet": supernet, "sampling": SandwichRule(seed=0, random=1)}
    if by == "callback":
        changes = {"callbacks": [SubnetSamplingCallback(supernet, FixedSubnet(supernet.space.smallest()))]}
    before = weights(encoder)
    trainer_of(encoder, tmp_path, **changes).train()
    moved = [name for name, tensor in weights(encoder).items() if not torch.equal(tensor, before[name])]
    assert moved and all("lora_" in name for name in moved)
    assert set(seen) == {2} if by == "callback" else {2, 8} <= set(seen)


def test_a_handle_on_the_adapted_model_alone_is_told_what_to_do(checkpoint: str, tmp_path: Path) -> None:
    encoder = encoder_of(checkpoint)
    config = ElasticLoraConfig(r=8, ranks=[2], target_modules=["query"])
    supernet = add_lora(encoder[0].auto_model, config)  # a PeftModel, which the encoder does not hold
    trainer = trainer_of(encoder, tmp_path, supernet=supernet, sampling=RandomSubnet(seed=0))
    with pytest.raises(TrainingError, match=r"does not hold the supernet.*supernet=Supernet\(model\)"):
        trainer.train()
    trainer_of(encoder, tmp_path, supernet=Supernet(encoder), sampling=RandomSubnet(seed=0)).train()


def test_distillation_by_the_mixin_is_refused_where_the_loss_is_the_trainers_own(
    checkpoint: str, tmp_path: Path
) -> None:
    encoder, supernet = elastic(checkpoint)
    trainer = trainer_of(encoder, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0), distill=True)
    with pytest.raises(TrainingError, match="ElasticSentenceTrainer computes a loss of its own"):
        trainer.train()


@pytest.mark.slow
def test_embeddings_of_a_teacher_are_distilled_by_the_trainers_own_loss(checkpoint: str, tmp_path: Path) -> None:
    encoder, supernet = elastic(checkpoint)
    wanted = encoder.encode(FIRST)
    data = Dataset.from_dict({"sentence": FIRST, "label": wanted.tolist()})
    point = supernet.space.smallest()

    def distance() -> float:
        with supernet.activate(point):
            return float((torch.tensor(encoder.eval().encode(FIRST)) - torch.tensor(wanted)).square().mean())

    before = distance()
    ElasticSentenceTrainer(
        model=encoder, supernet=supernet, sampling=FixedSubnet(point), loss=losses.MSELoss(encoder),
        train_dataset=data,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=20, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            learning_rate=3e-3, logging_strategy="no",
        ),
    ).train()  # fmt: skip
    assert distance() < 0.7 * before
