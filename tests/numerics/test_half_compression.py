"""Zeros, integers and adapters in half precision, against float32 copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from half_models import CASES, HALVES, batches, distance, finite, narrowed, output, pair, refused, tolerance, widened
from lora_models import SETTINGS, elastic
from peft import LoraConfig, get_peft_model
from tiny_models import inputs, tiny
from torch import Tensor, nn

from hf_elastic import ElasticLoraConfig, Supernet, extract, extract_adapter, quantize_, sparsify_, sparsity_of
from hf_elastic.compression.sparsity import pruned
from hf_elastic.layers import seeded
from hf_elastic.quantgrid import Grid

FAMILIES = ("bert", "llama", "gpt2")
EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


def linears(model: nn.Module) -> dict[str, Any]:
    """The projections inside the blocks, by name."""
    kinds = ("Linear", "Conv1D")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and (".layer" in n or ".h." in n)}


def matrix(module: Any) -> Tensor:
    """``(O, I)``."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def entering(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """What enters each projection at real tokens, ``(N, I)`` in float64."""
    rows: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: rows[name].append(args[0]))
        for name, module in linears(model).items()
    ]
    for batch in data:
        output(model, batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    return {
        name: torch.cat([x.reshape(*m.shape, -1)[m] for x, m in zip(seen, masks, strict=True)]).double()
        for name, seen in rows.items()
    }


@CASES
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_zeros_of_wanda_cost_no_more_than_those_of_float32(
    family: str, pattern: Any, dtype: torch.dtype, loud: bool
) -> None:
    half, exact = pair(family, dtype, loud=loud)
    data = batches(half)
    first = ".0."  # what enters later blocks depends on what was pruned before
    norms = {name: x.square().sum(0).sqrt() for name, x in entering(exact, data).items() if first in name}
    report = sparsify_(half, data, pattern=pattern)
    assert report.share == pytest.approx(0.5, abs=0.01) and finite(half)
    for name, norm in norms.items():
        score = matrix(linears(exact)[name]).double().abs() * norm  # Wanda's eq. 1, in float64
        best = score[pruned(score, 0.5, pattern=pattern)].sum()
        gone = score[matrix(linears(half)[name]) == 0].sum()
        assert best <= gone * (1 + 1e-9) and gone <= best * (1 + tolerance(dtype))


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_takes_the_very_weights_of_float32(family: str, dtype: torch.dtype) -> None:
    half, exact = pair(family, dtype)
    sparsify_(half, method="magnitude")
    sparsify_(exact, method="magnitude")
    for name, module in linears(half).items():
        assert torch.equal(module.weight.float(), linears(exact)[name].weight)
    assert sparsity_of(half) == sparsity_of(exact)


@CASES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_integers_in_half_precision_are_as_near_as_those_of_float32(
    family: str, method: Any, symmetric: bool, dtype: torch.dtype, loud: bool
) -> None:
    half, exact = pair(family, dtype, loud=loud)
    data = batches(half, count=4, tokens=16)
    before = {name: matrix(module).double().clone() for name, module in linears(half).items()}
    rows = {name: x for name, x in entering(exact, data).items() if ".0." in name}
    report = quantize_(half, data, group_size=16, method=method, symmetric=symmetric)
    quantize_(exact, data, group_size=16, method=method, symmetric=symmetric)
    assert finite(half) and half.dtype == dtype
    for name, x in rows.items():
        whole = x @ before[name].t()
        moved = [float((x @ (before[name] - matrix(linears(m)[name]).double()).t()).norm()) for m in (half, exact)]
        # The scale is rounded to the dtype, and with it every value.
        assert moved[0] <= 1.25 * moved[1] + torch.finfo(dtype).eps * float(whole.norm())
        if method == "gptq":
            share = (moved[0] / float(whole.norm())) ** 2
            assert report.errors[name] == pytest.approx(share, rel=0.05, abs=tolerance(dtype) ** 2)


@EVERY
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_in_half_precision_rounds_as_numpy_does(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = (torch.randn(6, 32, generator=generator) * torch.logspace(-2, 3, 6)[:, None]).to(dtype)
    grid = Grid.fit(weight, bits=bits, group_size=8, symmetric=symmetric)
    wide = weight.double().numpy().reshape(6, 4, 8)
    scale, zero = grid.scale.double().numpy()[..., None], grid.zero.double().numpy()[..., None]
    least, most = grid.levels
    integers = np.clip(np.round(wide / scale + zero), least, most)
    values = grid.nearest(weight).double().numpy().reshape(6, 4, 8)
    eps = torch.finfo(dtype).eps
    assert (np.abs(grid.integers(weight).double().numpy().reshape(6, 4, 8) - integers) <= 1).all()  # a tie may turn
    assert (np.abs(values - scale * (integers - zero)) <= scale * 1.01 * (np.abs(values / scale) * eps + 1)).all()
    span = np.maximum(wide.max(-1), 0) - np.minimum(wide.min(-1), 0)
    if symmetric:
        span = 2 * np.abs(wide).max(-1)
    step = span / (2**bits - 1)
    assert (np.abs(values - wide).max(-1) <= (0.5 + 2**bits * eps) * step + eps * np.abs(wide).max(-1)).all()


def test_integers_beyond_float16_are_refused() -> None:
    model = narrowed(tiny("bert"), torch.float16)
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = -65000.0  # the least value is 16/15 of it
    with refused("layer.0.intermediate.dense", "float16", "float32"):
        quantize_(model, group_size=16, method="rtn")
    fine = tiny("bert")
    with torch.no_grad():
        fine.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = -65000.0
    quantize_(narrowed(fine, torch.bfloat16), group_size=16, method="rtn")
    assert finite(fine)


def adapted(model: nn.Module, *, ranks: bool = True, **settings: Any) -> Any:
    """Adapters of noise in the dtype that peft gives them."""
    config: Any = ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], **settings}) if ranks else LoraConfig(**SETTINGS)
    with seeded(0):
        wrapped: Any = get_peft_model(model, config).eval()
    for name, parameter in sorted(wrapped.named_parameters()):
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return wrapped


@CASES
@pytest.mark.parametrize("family", FAMILIES)
def test_elastic_adapters_on_a_half_base_are_those_of_float32(family: str, dtype: torch.dtype, loud: bool) -> None:
    found, merged = [], []
    for model in pair(family, dtype, loud=loud):
        supernet = Supernet(adapted(model))
        architecture = supernet.space.smallest()
        with supernet.activate(architecture):
            found.append(output(supernet.model, inputs(model)))
        small = extract(supernet, architecture, merge=True)
        assert small.dtype == model.dtype and finite(small)
        merged.append(output(small, inputs(model)))
        adapter = extract_adapter(supernet, architecture)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.weights.values())
    assert distance(*found) <= tolerance(dtype)
    assert distance(*merged) <= tolerance(dtype) and distance(merged[0], found[0]) <= tolerance(dtype)


@EVERY
@pytest.mark.parametrize("kind", ["sparse", "quantization_aware", "both"])
def test_merged_weights_of_half_adapters_are_numpys(kind: str, dtype: torch.dtype) -> None:
    model = narrowed(tiny("llama"), dtype)
    data = batches(model)
    if kind != "quantization_aware":
        sparsify_(model, data)
    if kind != "sparse":
        quantize_(model, data, group_size=16)
    settings = {"sparse": kind != "quantization_aware", "quantization_aware": kind != "sparse"}
    supernet = Supernet(adapted(model, target_modules=["up_proj"], **settings))
    part = supernet.adapter_parts[0]
    base = part.base.get_parameter("weight").detach().double().numpy()
    factors = {n: p.detach().double().numpy() for n, p in supernet.model.named_parameters() if "layers.0." in n}
    down = next(value for name, value in factors.items() if ".lora_A." in name)
    up = next(value for name, value in factors.items() if ".lora_B." in name)
    product = 12 / 8 * up @ down
    wanted = base + (product * (base != 0) if settings["sparse"] else product)
    small = extract(supernet, supernet.space.largest(), merge=True)
    weight = small.model.layers[0].mlp.up_proj.weight.detach().double()
    if kind == "sparse":
        assert distance(weight, wanted) <= torch.finfo(dtype).eps
        assert bool((weight.numpy()[base == 0] == 0).all())
    else:
        scale = part.base.weight_scale.detach().double().repeat_interleave(16, dim=1).numpy()
        on_grid = scale * np.clip(np.round(wanted / scale), -8, 7)
        near_a_tie = np.abs(np.abs(wanted / scale - np.floor(wanted / scale)) - 0.5) < 1e-3
        apart = np.abs(weight.numpy() - on_grid) > torch.finfo(dtype).eps * np.abs(on_grid)
        assert not (apart & ~near_a_tie).any()


@EVERY
def test_gradients_of_sparse_adapters_on_a_half_base_are_those_of_float32(dtype: torch.dtype) -> None:
    half, _ = pair("llama", dtype)
    sparsify_(half, method="magnitude")
    found = []
    for model in (half, widened(half)):
        wrapped = adapted(model, sparse=True)
        wrapped(**batches(model, labels=True)[0]).loss.backward()
        gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
        found.append(torch.cat([g.float().flatten() for g in gradients if g is not None]))
    assert len(found[0]) == len(found[1]) > 0 and distance(*found) <= 2 * tolerance(dtype)


def test_the_helper_of_these_tests_gives_what_the_adapters_tests_use() -> None:
    assert elastic(tiny("bert")).space.size == Supernet(adapted(tiny("bert"))).space.size
