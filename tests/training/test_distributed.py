"""Two gloo ranks with DDP, against each other and against one process on the same examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_run import CASES, ROUTED, run, run_routed
from own_processes import run_two_ranks
from tiny_training import same, weights

from hf_elastic.training import RoutingLosses


@pytest.mark.slow
def test_two_ranks_keep_equal_weights_train_as_one_process_refuse_skips_and_resume(
    tmp_path: Path,
) -> None:
    ranks = run_two_ranks("distributed_run.py", tmp_path)  # one start for all, since it takes most of the time
    for case in CASES:
        assert same(ranks[0][case], ranks[1][case]), case
        alone = weights(run(case, str(tmp_path / "alone"), batch=4).model)
        for name, weight in alone.items():
            torch.testing.assert_close(ranks[0][case][name], weight, rtol=1e-3, atol=2e-4, msg=f"{case}: {name}")
    for case in ROUTED:
        # Losses of routers look at a rank's tokens together, so that one process sees others.
        assert same(ranks[0][case], ranks[1][case]), case
        assert same(ranks[0][f"{case} with losses"], ranks[1][f"{case} with losses"]), case
        none = RoutingLosses(tokens=0.0, balance=0.0)
        alone = weights(run_routed(case, str(tmp_path / "alone"), batch=4, losses=none).model)
        for name, weight in alone.items():
            torch.testing.assert_close(ranks[0][case][name], weight, rtol=1e-3, atol=2e-4, msg=f"{case}: {name}")
    for name, weight in ranks[0]["routed with losses"].items():
        torch.testing.assert_close(ranks[0]["routed-stock with losses"][name], weight, rtol=1e-3, atol=2e-4, msg=name)
    assert all(rank["refused"] for rank in ranks)
    assert all(rank["resumed"] for rank in ranks)
