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
from distributed_run import CASES, run
from tiny_training import same, weights


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks ended with."""
    folder, here, port = tmp_path_factory.mktemp("ranks"), Path(__file__).parent, free_port()
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
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=240)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_keep_equal_weights_and_train_as_one_process_on_all_their_examples(
    ranks: list[dict[str, Any]], tmp_path: Path, case: str
) -> None:
    assert same(ranks[0][case], ranks[1][case])
    alone = weights(run(case, str(tmp_path), batch=4).model)
    for name, weight in alone.items():
        torch.testing.assert_close(ranks[0][case][name], weight, rtol=1e-3, atol=2e-4, msg=f"{case}: {name}")


@pytest.mark.slow
def test_skips_without_find_unused_parameters_are_refused_with_the_cure(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["refused"] for rank in ranks)


@pytest.mark.slow
def test_a_distributed_run_resumes_bit_equal(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["resumed"] for rank in ranks)
