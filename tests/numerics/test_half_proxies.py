"""Scores without training, and tables of latencies, of models in half precision."""

from __future__ import annotations

from typing import Any

import block_models
import pytest
import torch
from half_models import CASES, HALVES, batches, distance, narrowed, pair, refused, supernets, tolerance
from tiny_models import inputs, point

from hf_elastic import (
    make_elastic,
    measure_block_latency_table,
    measure_latency_table,
    objectives,
    score,
)
from hf_elastic.proxies import PROXIES, ZeroLMTable

EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
EXACT = {
    "zerolm", "synflow", "log_synflow", "dss", "grasp", "eznas", "params", "decoder_params", "depth", "width_depth",
}  # fmt: skip
"""What is computed in float32 or wider whatever the weights are."""
OF_GRADIENTS = {
    "fisher", "grad_norm", "snip", "jacobian_cosine", "synaptic_saliency", "synaptic_diversity", "head_importance",
    "lpzero",
}  # fmt: skip


@CASES
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_a_score_is_that_of_float32_or_is_refused(name: str, family: str, dtype: torch.dtype, loud: bool) -> None:
    half, exact = pair(family, dtype, loud=loud)
    data = batches(half, labels=True, count=2)
    if (name, family) == ("jacobian_cosine", "llama"):
        with refused("learned positions"):
            score(half, name, data)
        return
    if name in OF_GRADIENTS and (family, dtype, loud) == ("gpt2", torch.float16, True):
        with refused("check"):  # the slope of transformers' gelu_new is inf * 0 there
            score(half, name, data)
        return
    before = {n: t.clone() for n, t in half.state_dict().items()}
    found, wanted = score(half, name, data), score(exact, name, data)
    assert found == pytest.approx(wanted, rel=1e-6 if name in EXACT else tolerance(dtype))
    assert all(torch.equal(before[n], t) for n, t in half.state_dict().items())


@EVERY
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_zerolm_of_large_half_weights_is_that_of_float64(family: str, dtype: torch.dtype) -> None:
    half, exact = supernets(family, dtype)
    with torch.no_grad():
        for part in half.layer_parts:
            part.projections()[part.family.ffn_out].weight.mul_(2000)  # squares are beyond float16
        for part in exact.layer_parts:
            weight = part.projections()[part.family.ffn_out].weight
            weight.copy_((weight.to(dtype) * 2000).float())
    tables = [ZeroLMTable.of_model(supernet.base) for supernet in (half, exact)]
    for architecture in (half.space.largest(), half.space.smallest(), point(half, ffn1=24)):
        parts = [table.parts(half.layer_shapes(architecture)) for table in tables]
        assert parts[0] == pytest.approx(parts[1], rel=1e-6)
    wanted = sum(
        float(p.weight.double().square().sum()) / min(p.weight.shape)
        for part in half.layer_parts
        for path, p in part.projections().items()
        if path in (part.family.ffn_out, *part.family.ffn_in)
    )
    assert tables[0].parts(half.layer_shapes(half.space.largest()))[1] == pytest.approx(wanted, rel=1e-5)


@EVERY
@pytest.mark.parametrize("name", ["zerolm", "snip"])
def test_proxies_as_objectives_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    values = []
    for supernet in supernets("bert", dtype):
        objective = objectives.proxy(supernet, name, batches=batches(supernet.model, labels=True))
        values.append(objective(point(supernet, ffn0=16, heads1=1)))
    assert values[0] == pytest.approx(values[1], rel=tolerance(dtype))


class _Clock:
    """Seconds in proportion to how many bytes a model's parameters have; runs the call, so that it must work."""

    def __call__(self, call: Any) -> float:
        call()
        return 1e-9 * sum(p.numel() * p.element_size() for p in call.model.parameters())


@EVERY
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_latencies_are_timed_in_the_dtype_of_the_model(family: str, dtype: torch.dtype) -> None:
    half, exact = supernets(family, dtype)
    tables = [measure_latency_table(s, length=8, rounds=3, timer=_Clock()) for s in (half, exact)]
    assert tables[0].setting.dtype == str(dtype).removeprefix("torch.")
    part, other = half.layer_parts[0], exact.layer_parts[0]
    shape = point(half, ffn0=16, heads0=1)
    seconds = [t.seconds(p, p.shape(shape)) for t, p in zip(tables, (part, other), strict=True)]
    assert seconds[0] == pytest.approx(seconds[1] / 2, rel=0.2)  # norms and routers apart, half the bytes


@EVERY
def test_latencies_of_blocks_are_timed_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    supernet = make_elastic(narrowed(block_models.tiny("elastic_bert"), dtype))
    table = measure_block_latency_table(supernet, length=8, rounds=3, timer=_Clock())
    assert table.setting.dtype == str(dtype).removeprefix("torch.")
    part = supernet.block_parts[0]
    assert all(0 < table.nanoseconds(part, block) < 10**9 for block in part.blocks)


def test_a_proxy_does_not_mind_autocast_around_it() -> None:
    half, _ = pair("bert", torch.bfloat16)
    data = [inputs(half)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score(half, "zerolm", data)
    assert distance(inside, score(half, "zerolm", data)) == 0
