"""Two gloo ranks whose supernet torch's ``fully_shard`` shards, against one process on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_processes import run_two_ranks
from sharded_run import CASES, supernet_of, train


@pytest.mark.slow
def test_sharded_subnets_have_the_losses_gradients_and_weights_of_one_process(tmp_path: Path) -> None:
    ranks = run_two_ranks("sharded_run.py", tmp_path)
    for case in CASES:
        alone = train(supernet_of(case), rank=0, ranks=1, whole=lambda tensor: tensor)
        smaller = [a for a in alone["architectures"] if a != dict(supernet_of(case).space.largest())]
        assert len(smaller) >= 4, "subnets were sampled"
        for found in (rank[case] for rank in ranks):
            assert found["kinds"] == {"DTensor"} and found["local"] < 0.6 * found["total"]
            assert found["architectures"] == alone["architectures"]
            compare(found, alone, case)
        losses = [sum(pair) / 2 for pair in zip(*(rank[case]["losses"] for rank in ranks), strict=True)]
        torch.testing.assert_close(losses, alone["losses"], rtol=1e-5, atol=1e-5)
        assert any(one != other for one, other in zip(*(rank[case]["losses"] for rank in ranks), strict=True))
        assert all("weight_decay=0" in rank[case]["decay"] and "shard" in rank[case]["decay"] for rank in ranks)
    assert all("FSDP" in rank["trainer"] and "ACCELERATE_USE_FSDP" in rank["trainer"] for rank in ranks)


def compare(found: dict[str, Any], alone: dict[str, Any], case: str) -> None:
    for step, gradients in enumerate(alone["gradients"]):
        for name, gradient in gradients.items():
            sharded, where = found["gradients"][step][name], f"{case}: step {step}: {name}"
            if gradient is None or sharded is None:
                # One process leaves out what a subnet skips; a group of shards is given zeros instead, or left out too.
                assert all(one is None or not one.any() for one in (gradient, sharded)), where
            else:
                torch.testing.assert_close(sharded, gradient, rtol=1e-4, atol=1e-5, msg=where)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=f"{case}: {name}")
