"""TRL's trainers on supernets: a fixed subnet learns what the extracted model learns from the stock trainer."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_checkpoints import decoder_tokenizer, language_model, sentences
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_elastic import (
    Architecture,
    Distillation,
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
    extract,
    make_elastic,
)
from hf_elastic.distillation import label_mask, logits_loss

trl = pytest.importorskip("trl", reason='trl is not installed: pip install "hf-elastic[trl]"')
pytestmark = pytest.mark.filterwarnings("ignore")

ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


class ElasticSFT(ElasticTrainerMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
    pass


class ElasticDPO(ElasticTrainerMixin, trl.DPOTrainer):  # type: ignore[misc,name-defined]
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("trl") / "model")


def loaded(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def supernet_of(checkpoint: Path, **changes: Any) -> Supernet:
    return make_elastic(loaded(checkpoint), ElasticConfig(**{"intermediate_size": [16, 32, 64], **changes}))


def texts(count: int = 16) -> Dataset:
    return Dataset.from_list([{"text": text[:24]} for text in sentences(count)])


def preferences(count: int = 16) -> Dataset:
    replies = zip(sentences(count), sentences(count, seed=1), sentences(count, seed=2), strict=True)
    return Dataset.from_list([{"prompt": p[:12], "chosen": c[:10], "rejected": r[:14]} for p, c, r in replies])


def settings(kind: Any, folder: Path, **changes: Any) -> Any:
    quiet = {
        "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "bf16": False,
        "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "max_length": 32, "learning_rate": 1e-2,
        "weight_decay": 0.1, "seed": 3,
    }  # fmt: skip
    return kind(str(folder), **{**quiet, **changes})


def trainer_of(kind: str, model: nn.Module, folder: Path, **changes: Any) -> Any:
    """A trainer of TRL, stock or with the mixin if it gets a supernet; ``arguments`` are those of its config."""
    arguments = changes.pop("arguments", {})
    elastic = "supernet" in changes
    made: Any
    if kind == "sft":
        made, config, data = (ElasticSFT if elastic else trl.SFTTrainer), trl.SFTConfig, texts()
    else:
        made, config, data = (ElasticDPO if elastic else trl.DPOTrainer), trl.DPOConfig, preferences()
    return made(
        model=model, args=settings(config, folder, **arguments), train_dataset=data,
        processing_class=decoder_tokenizer(), **changes,
    )  # fmt: skip


def with_reference(kind: str, checkpoint: Path) -> dict[str, Any]:
    return {} if kind == "sft" else {"ref_model": loaded(checkpoint)}


def assert_close(one: nn.Module, other: nn.Module, *, named: str = "") -> None:
    wanted = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if named in name:
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=2e-5)


class Kept(TrainerCallback):
    """Batches and gradients of a training, as they are before an optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.model, self.gradients, self.batches = trainer.model, [], []  # type: ignore[var-annotated]
        trainer.add_callback(self)
        step = trainer.training_step

        def kept(model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
            self.batches.append({name: value.clone() for name, value in inputs.items()})
            loss: Tensor = step(model, inputs, *rest)
            self.loss = loss
            return loss

        trainer.training_step = kept

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", [pytest.param("callback", marks=pytest.mark.slow), "mixin"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_fixed_subnet_learns_what_the_extracted_model_learns(
    kind: str, by: str, accumulate: int, checkpoint: Path, tmp_path: Path
) -> None:
    supernet = supernet_of(checkpoint)
    point = supernet.space.smallest()
    alone = extract(supernet, point)
    arguments = {"gradient_accumulation_steps": accumulate}
    reference = with_reference(kind, checkpoint)
    trainer_of(kind, alone, tmp_path / "a", arguments=arguments, **copy.deepcopy(reference)).train()
    changes: dict[str, Any] = {"supernet": supernet, "sampling": FixedSubnet(point)}
    if by == "callback":
        changes = {"callbacks": [SubnetSamplingCallback(supernet, FixedSubnet(point))]}
    before = weights(supernet.model)
    trainer_of(kind, supernet.model, tmp_path / "b", arguments=arguments, **reference, **changes).train()
    assert len(moved(supernet.model, before)) > 15 and supernet.active == supernet.space.largest()
    assert_close(extract(supernet, point), alone)
    gate = supernet.base.model.layers[0].mlp.gate_proj.weight
    assert torch.equal(gate[16:], before["model.layers.0.mlp.gate_proj.weight"][16:])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_sandwich_step_has_the_mean_gradient_of_its_subnets(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    supernet = supernet_of(checkpoint, skip=["mlp"])
    before = copy.deepcopy(supernet.model.state_dict())
    reference = with_reference(kind, checkpoint)
    trainer = trainer_of(
        kind, supernet.model, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0, random=1), arguments=ONE_STEP,
        **reference,
    )  # fmt: skip
    drawn = trainer.sampling.draw(supernet.space, 0, 0)
    kept = Kept(trainer)
    trainer.train()
    losses = []
    supernet.model.load_state_dict(before)
    supernet.model.zero_grad()
    for architecture in drawn:
        with supernet.activate(architecture):
            own = by_hand(kind, supernet.model, kept.batches[0], reference)
            losses.append(own.detach())
            (own / len(drawn)).backward()
    assert len(set(drawn)) == 3
    torch.testing.assert_close(kept.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    for name, parameter in supernet.model.named_parameters():
        torch.testing.assert_close(kept.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


def by_hand(kind: str, model: Any, batch: dict[str, Tensor], reference: dict[str, Any]) -> Tensor:
    """Mean cross entropy of the next token; or the loss of DPO (Rafailov et al. 2023, equation 7), beta 0.1."""
    if kind == "sft":
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    with torch.no_grad():
        base = likelihoods(reference["ref_model"], batch)
    ratios = likelihoods(model, batch) - base  # chosen ones first, then the rejected
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def likelihoods(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-likelihood of each reply, the sum over its tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, replies = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (F.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0] * replies).sum(-1)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_evaluation_of_a_named_subnet_is_that_of_the_extracted_model(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    supernet = supernet_of(checkpoint, skip=["layer"])
    point = supernet.space.smallest()
    held_out = (texts if kind == "sft" else preferences)(6)
    reference = with_reference(kind, checkpoint)
    found = trainer_of(
        kind, supernet.model, tmp_path / "a", supernet=supernet, sampling=RandomSubnet(seed=0), eval_dataset=held_out,
        eval_architectures={"small": point}, **reference,
    ).evaluate()  # fmt: skip
    alone = trainer_of(kind, extract(supernet, point), tmp_path / "b", eval_dataset=held_out, **reference).evaluate()
    assert found["eval_small_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert found["eval_small_loss"] != pytest.approx(found["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_trained_supernet_is_extracted_and_exported_as_any_other(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """TRL hangs a forward of its own on the model object, which no copy may take along."""
    supernet = supernet_of(checkpoint, skip=["mlp"])
    sampling = SandwichRule(seed=0, random=1)
    reference = with_reference(kind, checkpoint)
    trainer_of(kind, supernet.model, tmp_path / "t", supernet=supernet, sampling=sampling, **reference).train()
    assert "forward" in vars(supernet.model)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    for number, point in enumerate((supernet.space.smallest(), supernet.space.largest())):
        folder = tmp_path / f"export{number}"
        export(supernet, point, folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert "forward" not in vars(extract(supernet, point))
        with torch.no_grad(), supernet.activate(point):
            torch.testing.assert_close(again(ids).logits, supernet.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_reference_that_trl_loads_itself_is_the_whole_parent(checkpoint: Path, tmp_path: Path) -> None:
    supernet = supernet_of(checkpoint)
    trainer = trainer_of("dpo", supernet.model, tmp_path, supernet=supernet, sampling=RandomSubnet(seed=0))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        whole = trainer.compute_loss(trainer.model, dict(batch))
        with supernet.activate(supernet.space.smallest()):
            part = trainer.compute_loss(trainer.model, dict(batch))
    assert float(whole) == pytest.approx(math.log(2), rel=1e-5)  # policy and reference agree
    wanted = by_hand("dpo", extract(supernet, supernet.space.smallest()), batch, {"ref_model": loaded(checkpoint)})
    assert float(part) == pytest.approx(float(wanted), rel=1e-4) and float(part) != pytest.approx(math.log(2), rel=1e-3)


def test_reference_likelihoods_computed_beforehand_are_those_of_the_largest_subnet(
    checkpoint: Path, tmp_path: Path
) -> None:
    supernet, plain = supernet_of(checkpoint), loaded(checkpoint)
    arguments = {"precompute_ref_log_probs": True}
    trainer = trainer_of(
        "dpo", supernet.model, tmp_path, supernet=supernet, sampling=RandomSubnet(seed=0), arguments=arguments
    )
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    base = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    with torch.no_grad():
        torch.testing.assert_close(base, likelihoods(plain, batch), rtol=1e-4, atol=1e-4)
    trainer.train()


# -- adapters ---------------------------------------------------------------------------------------------------------


def randomise(model: nn.Module) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("by", [pytest.param("callback", marks=pytest.mark.slow), "mixin"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_at_the_largest_rank_elastic_adapters_learn_what_stock_ones_learn(
    kind: str, by: str, checkpoint: Path, tmp_path: Path
) -> None:
    reference = with_reference(kind, checkpoint)
    plain = get_peft_model(loaded(checkpoint), LoraConfig(**LORA))
    randomise(plain)
    trainer_of(kind, plain, tmp_path / "a", **copy.deepcopy(reference)).train()
    supernet = add_lora(loaded(checkpoint), ElasticLoraConfig(**LORA, ranks=[2, 4]))
    randomise(supernet.model)
    point = supernet.space.largest()
    changes: dict[str, Any] = {"supernet": supernet, "sampling": FixedSubnet(point)}
    if by == "callback":
        changes = {"callbacks": [SubnetSamplingCallback(supernet, FixedSubnet(point))]}
    before = weights(supernet.model)
    trainer_of(kind, supernet.model, tmp_path / "b", **reference, **changes).train()
    assert all(".lora_" in name for name in moved(supernet.model, before))
    assert_close(supernet.model, plain, named=".lora_")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_ranks_of_a_sandwich_are_what_runs(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    model = loaded(checkpoint)
    make_elastic(model, ElasticConfig(intermediate_size=[16, 64], skip={1: ["mlp"]}))
    supernet = add_lora(model, ElasticLoraConfig(**LORA, ranks=[2, 4]))
    randomise(supernet.model)
    seen: list[int] = []
    up = next(module for name, module in supernet.model.named_modules() if name.endswith("q_proj.lora_B.default"))
    up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    before = weights(supernet.model)
    trainer_of(
        kind, supernet.model, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0, random=1),
        **with_reference(kind, checkpoint),
    ).train()  # fmt: skip
    names = moved(supernet.model, before)
    assert {2, 8} <= set(seen) <= {2, 4, 8} and names and all(".lora_" in name for name in names)


@pytest.mark.parametrize("by", ["callback", "mixin"])
def test_an_adapter_that_the_trainer_adds_itself_is_refused_before_training(
    by: str, checkpoint: Path, tmp_path: Path
) -> None:
    def attempt(kind: str, supernet: Supernet, **more: Any) -> None:
        changes: dict[str, Any] = {"supernet": supernet, "sampling": RandomSubnet(seed=0)}
        if by == "callback":
            changes = {"callbacks": [SubnetSamplingCallback(supernet, RandomSubnet(seed=0))]}
        trainer_of(kind, supernet.model, tmp_path, **changes, **more).train()

    adapted = add_lora(loaded(checkpoint), ElasticLoraConfig(**LORA, ranks=[2, 4]))
    with pytest.raises(TrainingError, match="default, ref now, they were default.*unless it is given a ref_model="):
        attempt("dpo", adapted)
    if by == "mixin":
        message = "adapters of the model are default now, they were none.*instead of peft_config="
        with pytest.raises(TrainingError, match=message):
            attempt("sft", supernet_of(checkpoint), peft_config=LoraConfig(**LORA))


# -- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_reaches_the_weights_through_a_trainer_that_hides_its_logits(
    checkpoint: Path, tmp_path: Path
) -> None:
    """TRL gives logits of a forward without gradient; a loss made of those would teach nothing, and say nothing."""
    supernet = supernet_of(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        teacher = LlamaForCausalLM(LlamaConfig(**loaded(checkpoint).config.to_diff_dict()))
    point = supernet.space.smallest()
    trainer = trainer_of(
        "sft", supernet.model, tmp_path, supernet=supernet, sampling=FixedSubnet(point),
        distill=Distillation(teacher=teacher, temperature=2.0),
        arguments={**ONE_STEP, "max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.0},
    )  # fmt: skip
    kept = Kept(trainer)
    trainer.train()
    for batch, found in zip(kept.batches, kept.gradients, strict=True):  # the second time the trainer is known
        supernet.model.zero_grad()
        with supernet.activate(point):
            feed = {name: batch[name] for name in ("input_ids", "attention_mask")}
            student = supernet.model(**feed).logits
            with torch.no_grad():
                wanted = teacher.eval()(**feed).logits
            soft = logits_loss(student, wanted, temperature=2.0, mask=label_mask(batch["labels"], shifted=True))
            hard = by_hand("sft", supernet.model, batch, {})
            (soft + hard).backward()
        for name, parameter in supernet.model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(kept.loss, (soft + hard).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_in_place_distillation_changes_what_a_subnet_learns(checkpoint: Path, tmp_path: Path) -> None:
    trained = {}
    for distill in (False, True):
        supernet = supernet_of(checkpoint)
        trainer_of(
            "sft", supernet.model, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0, random=0), distill=distill
        ).train()
        trained[distill] = weights(supernet.model)
    assert any(not torch.equal(trained[True][name], trained[False][name]) for name in trained[True])


def test_without_distillation_a_subnet_costs_one_forward_and_no_warning(checkpoint: Path, tmp_path: Path) -> None:
    supernet = supernet_of(checkpoint)
    trainer = trainer_of("sft", supernet.model, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0, random=1))
    runs: list[Architecture] = []
    supernet.base.model.register_forward_pre_hook(lambda *_: runs.append(supernet.active))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*return_outputs=True.*")
        trainer.train()
    assert len(runs) == 3 * 3  # steps, subnets


@pytest.mark.parametrize("how", ["in place", "teacher"])
def test_distillation_is_refused_where_it_would_replace_the_trainers_own_loss(
    how: str, checkpoint: Path, tmp_path: Path
) -> None:
    supernet = supernet_of(checkpoint)
    plan = Distillation() if how == "in place" else Distillation(teacher=loaded(checkpoint))
    trainer = trainer_of(
        "dpo", supernet.model, tmp_path, supernet=supernet, sampling=SandwichRule(seed=0), distill=plan
    )
    with pytest.raises(TrainingError, match="ElasticDPO computes a loss of its own of batches without"):
        trainer.train()


# -- what TRL does to batches -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"packing": True}, {"padding_free": True, "max_length": None}, {"gradient_checkpointing": True},
        {"loss_type": "dft"},
    ],
)  # fmt: skip
def test_packed_and_padding_free_batches_are_those_of_the_extracted_model(
    arguments: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    supernet = supernet_of(checkpoint)
    point = supernet.space.smallest()
    alone = extract(supernet, point)
    trainer_of("sft", alone, tmp_path / "a", arguments=arguments).train()
    trainer_of(
        "sft", supernet.model, tmp_path / "b", supernet=supernet, sampling=FixedSubnet(point), arguments=arguments
    ).train()
    assert_close(extract(supernet, point), alone)
