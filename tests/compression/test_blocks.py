"""What cannot be calibrated on is said, and by name; never scores or grids of NaN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_models import batches_of
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic import CompressionError, DataError, quantize_, sparsify_

CHANGES: dict[str, Callable[[PreTrainedModel, list[dict[str, Tensor]]], object]] = {
    "sparsify_": sparsify_,
    "quantize_": lambda model, batches: quantize_(model, batches, group_size=16),
}
EACH = pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))


@EACH
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_named_before_anything_changes(change: Any, name: str, value: float) -> None:
    model = tiny("llama")
    model.get_parameter(name).data[3] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError, match=f"the weight of {name.removesuffix('.weight')} is NaN or infinite"):
        change(model, batches_of(model))
    after = model.state_dict()
    assert all(torch.equal(after[n].nan_to_num(), tensor.nan_to_num()) for n, tensor in before.items())


@EACH
def test_activations_that_overflow_are_named(change: Any) -> None:
    model = tiny("llama").to(torch.float16)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(6e4)
    with pytest.raises(CompressionError, match=r"what enters .* is NaN or infinite; load the model again"):
        change(model, batches_of(model))


@EACH
def test_text_without_a_token_is_refused(change: Any) -> None:
    model = tiny("llama")
    ids = torch.full((2, 5), 7)
    with pytest.raises(DataError, match="padding only"):
        change(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(DataError, match="has no tokens"):
        change(model, [{"input_ids": ids[:, :0], "attention_mask": ids[:, :0]}])


def test_weights_near_the_largest_number_get_a_grid_or_an_error() -> None:
    model = tiny("llama")
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, :2] = torch.tensor([3e38, -3e38])
    quantize_(model, group_size=16, method="rtn", symmetric=False)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
