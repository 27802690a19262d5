"""A fingerprint notices other weights, other data and other settings, and nothing else."""

from __future__ import annotations

import torch
from tiny_models import tiny

from hf_elastic.fingerprints import fingerprint


def test_it_changes_with_weights_data_and_settings_only() -> None:
    model, data = tiny("bert"), [{"input_ids": torch.tensor([[3, 4]])}]
    start = fingerprint(model, data, rest=["a", 1])
    assert start == fingerprint(tiny("bert"), [dict(data[0])], rest=["a", 1])
    others = [
        fingerprint(tiny("bert", seed=1), data, rest=["a", 1]),
        fingerprint(model, [{"input_ids": torch.tensor([[3, 5]])}], rest=["a", 1]),
        fingerprint(model, [{"labels": torch.tensor([[3, 4]])}], rest=["a", 1]),
        fingerprint(model, data, rest=["a", 2]),
        fingerprint(model, data, rest=["a", torch.ones(1)]),
    ]
    assert len({start, *others}) == 6
