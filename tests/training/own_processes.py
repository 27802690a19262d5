"""Starts scripts of these tests in processes of their own: alone, or as two ranks of one group on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def started(script: str | Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a script of this folder with one thread, which imports what this process can."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here), *sys.path])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    command = [sys.executable, str(here / script), *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended well."""
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, "".join(output[-3000:] for output in outputs)


def rank_environments() -> list[dict[str, str]]:
    """Variables that make two processes the ranks of a group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def run_two_ranks(script: str | Path, folder: Path) -> list[Any]:
    """Starts ``SCRIPT FOLDER RANK`` for two ranks; returns what each wrote as ``rank0.pt``, ``rank1.pt``."""
    wait_for([started(script, str(folder), ranked["RANK"], **ranked) for ranked in rank_environments()])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
