"""Calibration inputs of tiny models, and their linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def batches_of(model: PreTrainedModel, *, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of random tokens, the last rows padded."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, int(model.config.vocab_size), (3, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, 7:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def linears(layer: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def rows_of(module: Any) -> Tensor:
    weight: Tensor = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight
