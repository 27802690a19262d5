"""What a model is set to during a distillation, and that all of it is taken back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import inputs, tiny
from torch import nn

from hf_elastic.training.preparation import prepared_for_distillation


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


def test_embeddings_train_where_they_are_not_to_be_frozen() -> None:
    model = tiny("bert", "base")
    with prepared_for_distillation(model, freeze_embeddings=False):
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rates_that_were_changed_after_loading_come_back_each_to_its_own() -> None:
    model = tiny("bert", "base")
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for number, module in enumerate(dropouts):
        module.p = number / 100
    with prepared_for_distillation(model, freeze_embeddings=True):
        assert {module.p for module in dropouts} == {0.0}
    assert [module.p for module in dropouts] == [number / 100 for number in range(len(dropouts))]
