"""Models in bfloat16 and float16 beside float32 copies of the very same weights, and how far the two may be apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import space, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic import ElasticError, Supernet, make_elastic

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOUD = 512.0
"""By what neurons and values of a loud model are larger: tiny activations of about 4 become about 2,000, whose squares
are beyond float16."""


CASES = pytest.mark.parametrize(
    ("dtype", "loud"),
    [
        pytest.param(torch.bfloat16, False, id="bf16"),
        pytest.param(torch.float16, True, id="fp16-loud"),
        pytest.param(torch.bfloat16, True, id="bf16-loud", marks=pytest.mark.slow),
        pytest.param(torch.float16, False, id="fp16", marks=pytest.mark.slow),
    ],
)
"""Both dtypes with quiet and with loud activations, of which two are in the fast tier."""


def tolerance(dtype: torch.dtype, roundings: int = 64) -> float:
    """What a quantity may be off that went through so many roundings of half precision: ``2 eps sqrt(n)``."""
    return 2 * torch.finfo(dtype).eps * roundings**0.5


def narrowed(model: nn.Module, dtype: torch.dtype) -> Any:
    """Rounds parameters, and leaves buffers as ``from_pretrained(dtype=...)`` does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def widened(model: nn.Module) -> Any:
    """A float32 copy of the rounded weights."""
    return copy.deepcopy(model).float()


def pair(
    family: str, dtype: torch.dtype, *, head: str = "lm", loud: bool = False, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in half precision, and the same weights in float32."""
    model = tiny(family, head, **changes)
    half = narrowed(louder_(model) if loud else model, dtype)
    return half, widened(half)


def supernets(
    family: str, dtype: torch.dtype, *, head: str = "lm", loud: bool = False, **changes: Any
) -> tuple[Supernet, Supernet]:
    """The same as supernets of :func:`tiny_models.space`."""
    half, exact = pair(family, dtype, head=head, loud=loud, **changes)
    return make_elastic(half, space(family)), make_elastic(exact, space(family))


_PAIRS = {
    "bert": [("intermediate.dense", "output.dense"), ("attention.self.value", "attention.output.dense")],
    "llama": [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")],
    "gpt2": [("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")],
}


@torch.no_grad()
def louder_(model: PreTrainedModel, factor: float = LOUD) -> PreTrainedModel:
    """Multiplies neurons and values, and divides what reads them: the squares of activations are beyond float16."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for first, second in _PAIRS[model.config.model_type]:
            if not name.endswith(f".{first}"):
                continue
            reader: Any = modules[name.removesuffix(first) + second]
            weight, bias = module.get_parameter("weight"), dict(module.named_parameters()).get("bias")
            values = slice(2 * weight.shape[1] // 3, None) if first == "attn.c_attn" else slice(None)
            rows = weight[:, values] if model.config.model_type == "gpt2" else weight
            rows.mul_(factor)
            if bias is not None:
                bias[values].mul_(factor)
            reader.weight.div_(factor)
    return model


def batches(model: PreTrainedModel, *, count: int = 3, rows: int = 4, tokens: int = 12, labels: bool = False) -> Any:
    """Batches of random tokens, the last row of each padded on the right; labels are the tokens or a class."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, int(model.config.vocab_size), (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens // 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            by_class = type(model).__name__.endswith("SequenceClassification")
            wanted = torch.arange(rows) % int(model.config.num_labels) if by_class else ids.masked_fill(mask == 0, -100)
            batch["labels"] = wanted
        found.append(batch)
    return found


def distance(got: Any, wanted: Any) -> float:
    """Relative distance of two tensors or numbers, ``|a - b| / |b|``; infinite where one is not finite."""
    one, other = (torch.as_tensor(value).detach().double() for value in (got, wanted))
    assert one.shape == other.shape
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    size, apart = float(other.norm()), float((one - other).norm())
    return apart / size if size else (0.0 if not apart else float("inf"))


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expects an ``ElasticError`` of one line with these words in it."""
    with pytest.raises(ElasticError) as caught:
        yield
    said = str(caught.value)
    assert said and "\n" not in said
    assert [word for word in words if word not in said] == [], said


def finite(model: nn.Module) -> bool:
    """Whether all weights are."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def output(model: nn.Module, feed: dict[str, Tensor]) -> Tensor:
    """First output without gradients, in float32."""
    with torch.no_grad():
        result: Tensor = model(**feed)[0]
    return result.float()
