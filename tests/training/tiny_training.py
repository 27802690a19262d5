"""Tiny supernets and data of the training tests, and of the scripts that these run on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from hf_elastic import ElasticConfig, Supernet, make_elastic

VOCABULARY, TOKENS = 40, 8


def seeded(build: Callable[[], PreTrainedModel], *, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def bert_config(**changes: Any) -> BertConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**settings, **changes})


def bert(*, seed: int = 0, base: bool = False, **changes: Any) -> PreTrainedModel:
    config = bert_config(**changes)
    return seeded(lambda: (BertModel if base else BertForSequenceClassification)(config), seed=seed)


def bert_supernet(*, skip: tuple[str, ...] = (), seed: int = 0, base: bool = False, **changes: Any) -> Supernet:
    space = {"intermediate_size": [16, 32, 48], "num_attention_heads": [1, 2, 4]}
    return make_elastic(bert(seed=seed, base=base, **changes), ElasticConfig(**space, skip=skip or None))


def llama_supernet(*, skip: tuple[str, ...] = (), seed: int = 0) -> Supernet:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    model = seeded(lambda: LlamaForCausalLM(config), seed=seed)
    space = {"intermediate_size": [16, 32, 48], "num_key_value_heads": [1, 2]}
    return make_elastic(model, ElasticConfig(**space, skip=skip or None))


def sentences(count: int = 32, *, labels: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Classification examples; the second half of each is padding for odd ones."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        mask = torch.ones(TOKENS, dtype=torch.long)
        mask[TOKENS - 3 * (n % 2) :] = 0
        row = {"input_ids": torch.randint(VOCABULARY, (TOKENS,), generator=generator), "attention_mask": mask}
        rows.append({**row, "labels": n % 2} if labels else row)
    return rows


def texts(count: int = 32, *, seed: int = 0, uneven: bool = False) -> list[dict[str, Any]]:
    """Language-model examples; with ``uneven``, the number of labels differs between them."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        labels = ids.clone()
        if uneven:
            labels[: n % TOKENS] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def settings(output_dir: str, **changes: Any) -> dict[str, Any]:
    """Quiet TrainingArguments on the CPU; keyword arguments replace them."""
    quiet: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return {**quiet, **changes}


class GradientsOfFirstStep(TrainerCallback):
    """Keeps the gradients that reach the first optimizer step, of the model and of the fit layers."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.found:
            named = kwargs["model"].named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}
