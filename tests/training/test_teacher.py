"""The teacher "parent": the supernet itself without what is trained, against a second copy of the stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_routed import EVERY_KIND, TARGETS, plain, routed
from tiny_training import llama_supernet, texts
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_elastic import Supernet
from hf_elastic.errors import TrainingError
from hf_elastic.routing import add_routing
from hf_elastic.training import Distillation, ElasticTrainer, RandomSubnet
from hf_elastic.training.teacher import Teacher, adapters_off

PARENT = Distillation(teacher="parent", label_weight=0)
Arguments = Callable[..., TrainingArguments]


def inputs(count: int = 4) -> dict[str, Tensor]:
    rows = texts(count)
    mask = torch.ones(count, len(rows[0]["input_ids"]), dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "attention_mask": mask}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("first", ["routers", "adapters"])
@pytest.mark.parametrize("adapters", ["stock", "elastic", None])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_parent_says_what_the_stock_model_said_whatever_is_active(
    family: str, adapters: str | None, first: str
) -> None:
    supernet, batch = routed(family, adapters=adapters, first=first), inputs()
    supernet.model.train()
    before = flags(supernet.model)
    with torch.no_grad():
        wanted = plain(family)(**batch).logits
        assert adapters is None or not torch.allclose(supernet.model(**batch).logits, wanted, atol=1e-3)
    with supernet.activate(supernet.space.smallest()):
        found = Teacher(PARENT, supernet).signal({**batch, "labels": batch["input_ids"]})
        assert supernet.active == supernet.space.smallest()
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, wanted)
    assert not found.requires_grad
    assert supernet.model.training and flags(supernet.model) == before
    with torch.no_grad():
        assert adapters is None or not torch.allclose(supernet.model.eval()(**batch).logits, wanted, atol=1e-3)


def test_an_adapter_that_was_frozen_stays_so_when_adapters_were_off() -> None:
    supernet = routed()
    for name, parameter in supernet.model.named_parameters():
        parameter.requires_grad_("lora_A" not in name and parameter.requires_grad)
    before = flags(supernet.model)
    with adapters_off(supernet.model):
        pass
    assert flags(supernet.model) == before


def test_a_head_that_was_trained_beside_the_adapters_is_off_too() -> None:
    stock = plain("bert", "sequence")
    add_routing(stock, EVERY_KIND)
    model = get_peft_model(stock, LoraConfig(r=1, target_modules=TARGETS["bert"], modules_to_save=["classifier"]))
    supernet, batch = Supernet(model), inputs()
    teacher = Teacher(PARENT, supernet)
    teacher.check()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 1
    with torch.no_grad():
        torch.testing.assert_close(teacher.signal(batch), plain("bert", "sequence")(**batch).logits)


def test_embeddings_of_the_parent_are_learned_by_routers_without_labels(arguments: Arguments) -> None:
    supernet = routed("bert", "base")
    plan = Distillation(teacher="parent", target="embeddings")
    rows = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in texts(16)]
    before = {name: p.detach().clone() for name, p in supernet.model.named_parameters()}
    args = arguments(max_steps=2, weight_decay=0.0)
    trainer = ElasticTrainer(
        supernet=supernet, sampling=RandomSubnet(seed=0), distill=plan, args=args, train_dataset=rows
    )
    trainer.train()
    moved = {name for name, p in supernet.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("routers" in name or "lora_" in name for name in moved)


@pytest.mark.parametrize("trained", ["lm_head", "layers.0.mlp.up_proj"])
def test_a_parent_of_which_a_parameter_is_trained_is_refused(trained: str, arguments: Arguments) -> None:
    supernet = routed()
    for name, parameter in supernet.model.named_parameters():
        if trained in name:
            parameter.requires_grad_()
    trainer = ElasticTrainer(
        supernet=supernet, sampling=RandomSubnet(seed=0), distill=PARENT, args=arguments(), train_dataset=texts()
    )
    with pytest.raises(TrainingError, match=f"{trained}.*is trained.*requires_grad_\\(False\\)"):
        trainer.train()


def test_a_supernet_whose_weights_are_trained_is_no_parent_of_itself() -> None:
    with pytest.raises(TrainingError, match="is trained"):
        Teacher(PARENT, llama_supernet()).check()


def test_adapters_that_cannot_be_switched_off_are_refused_with_the_cure() -> None:
    supernet = routed()
    inside = Supernet(supernet.base)
    with pytest.raises(TrainingError, match=r"Supernet\(peft_model\)"):
        Teacher(PARENT, inside).check()


def test_a_word_that_names_no_teacher_is_refused() -> None:
    wrong: Any = "largest"
    with pytest.raises(TrainingError, match="'parent'"):
        Distillation(teacher=wrong)
