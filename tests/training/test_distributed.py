"""Two gloo ranks with DDP, against each other and against one process on the same examples."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import CASES, ROUTED, run, run_routed
from tiny_training import same, weights

from hf_elastic.training import RoutingLosses


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_two_ranks(folder: Path) -> list[dict[str, Any]]:
    """Return what each of two ranks ended with."""
    here, port = Path(__file__).parent, free_port()
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here), *sys.path]),
        }
        command = [sys.executable, str(here / "distributed_run.py"), str(folder), str(rank)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_keep_equal_weights_train_as_one_process_refuse_skips_and_resume(
    tmp_path: Path,
) -> None:
    ranks = run_two_ranks(tmp_path)  # one start for all, since it takes most of the time
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
