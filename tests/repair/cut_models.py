"""Cut tiny models, examples, and short quiet recoveries of the one on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import point, supernet_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic import extract
from hf_elastic.repair.recovery import recover

Row = dict[str, Any]
QUIET = {"use_cpu": True, "disable_tqdm": True}


def rows(count: int = 24, *, labels: bool = False, seed: int = 0) -> list[Row]:
    """Examples of 4 to 11 tokens, each length equally often; of labels, a random half counts."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Row] = []
    for number in range(count):
        length = 4 + 3 * number % 8
        ids = torch.randint(3, 61, (length,), generator=generator)
        row: Row = {"input_ids": ids.tolist()}
        if labels:
            kept = torch.rand(length, generator=generator) < 0.5
            kept[-1] = True
            row["labels"] = torch.where(kept, ids, -100).tolist()
        found.append(row)
    return found


def cut(family: str, head: str, *, uniform: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A parent, and it with narrower FFNs: all alike (stock class), or each layer otherwise (``elastic_*``)."""
    made = supernet_of(family, head)
    shapes: dict[str, Any] = {"ffn0": 24, "ffn1": 24, "ffn2": 24}
    if not uniform:
        shapes = {"ffn0": 16, "ffn1": 24, "heads0": 2, "skip1": "attention", "skip2": "mlp"}
    model = extract(made, point(made, **shapes))
    assert model.config.model_type == (family if uniform else f"elastic_{family}")
    return made.model, model


def run(model: PreTrainedModel, teacher: Any, data: Any, output: Path, **given: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {"steps": 30, "batch_size": 8, "learning_rate": 5e-3, **given}
    settings["arguments"] = {**QUIET, **settings.get("arguments", {})}
    return recover(model, teacher, data, output=output, **settings)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def output_of(model: nn.Module, row: Row) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
