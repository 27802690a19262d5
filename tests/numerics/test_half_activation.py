"""Conversion, activation, extraction, export and costs of models in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from half_models import CASES, HALVES, batches, distance, narrowed, output, supernets, tolerance
from tiny_models import CONFIGS, point, space, tiny
from transformers import AutoModel

from hf_elastic import Supernet, costs, export, extract, make_elastic

FAMILIES = ("bert", "llama", "gpt2")


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_conversion_keeps_every_bit_of_the_logits(family: str, dtype: torch.dtype) -> None:
    model = narrowed(tiny(family), dtype)
    feed = {"input_ids": torch.arange(3, 15).view(2, 6)}
    before = output(model, feed)
    supernet = make_elastic(model, space(family))
    assert supernet.model.dtype == dtype and torch.equal(output(supernet.model, feed), before)


@CASES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_subnet_is_that_of_float32_but_for_rounding(family: str, dtype: torch.dtype, loud: bool) -> None:
    half, exact = supernets(family, dtype, loud=loud)
    (feed, *_) = batches(half.model)
    for changes in ({"ffn0": 16, "heads1": 1}, {"skip1": "attention", "skip2": "mlp"}, {"ffn2": 24, "heads2": 2}):
        found = []
        for supernet in (half, exact):
            with supernet.activate(point(supernet, **changes)):
                found.append(output(supernet.model, feed)[feed["attention_mask"].bool()])
        assert distance(*found) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_extracted_subnet_is_the_active_one_in_the_same_dtype(family: str, dtype: torch.dtype) -> None:
    supernet, _ = supernets(family, dtype)
    (feed, *_) = batches(supernet.model)
    architecture = point(supernet, ffn0=16, heads1=1, skip2="mlp")
    small = extract(supernet, architecture)
    assert small.dtype == dtype
    with supernet.activate(architecture):
        kept = feed["attention_mask"].bool()
        assert distance(output(small, feed)[kept], output(supernet.model, feed)[kept]) <= tolerance(dtype, 1)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_subnet_loads_with_its_dtype_and_its_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    supernet, _ = supernets(family, dtype)
    architecture = point(supernet, ffn0=24, ffn1=24, ffn2=24)
    export(supernet, architecture, tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert loaded.dtype == dtype
    wanted = dict(extract(supernet, architecture).base_model.named_parameters())
    found = dict(loaded.named_parameters())
    shared = sorted(set(found) & set(wanted))
    assert len(shared) > 10 and all(torch.equal(found[name], wanted[name]) for name in shared)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_supernet_comes_back_with_every_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    supernet, _ = supernets(family, dtype)
    supernet.save_pretrained(tmp_path / "saved")
    again = Supernet.from_pretrained(tmp_path / "saved", dtype=dtype)
    before, after = supernet.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and again.model.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_float32_and_bytes_half_of_them(family: str, dtype: torch.dtype) -> None:
    half, exact = supernets(family, dtype)
    for architecture in (half.space.largest(), half.space.smallest()):
        for count in (costs.parameters, costs.total_parameters):
            assert count(half, architecture) == count(exact, architecture)
        assert costs.macs(half, architecture, seq_len=16) == costs.macs(exact, architecture, seq_len=16)
