"""The Slurm example, run by bash with a scheduler that only takes notes."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.searching import BARE_PACKAGE, ROOT, evaluated, wait_for

SCRIPT = ROOT / "examples/slurm_search.sh"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run the script as a task of an array would, with a worker that needs no torch."""
    body = "import typer; from hf_elastic.workers.worker import WorkerOptions, work; work(WorkerOptions("
    worker = (
        f"#!{sys.executable}\n{BARE_PACKAGE}\npackage.__path__ = [{str(ROOT / 'hf_elastic')!r}]\n{body}"
        "sys.argv[2], sys.argv[sys.argv.index('--storage') + 1], evaluations=4))\n"
    )
    executable(folder / "scontrol", f'#!/bin/sh\necho "$@" > {folder}/requeued\n')
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{folder}",
        "HF_ELASTIC": str(executable(folder / "worker", worker)),
        "HF_ELASTIC_STORAGE": f"sqlite:///{folder / 's.db'}",
        "SLURM_JOB_ID": "12",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_task_hands_its_evaluation_back_and_queues_itself_again_if_its_time_is_over(
    tmp_path: Path, number: signal.Signals
) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    (tmp_path / "mine.py").write_text(
        "from tests.workers.searching import logged, problem\n"
        f"def make():\n    return problem()[0], logged({str(log)!r}, until={str(gate)!r})\n"
    )
    task = start(tmp_path, "mine:make")
    wait_for(lambda: evaluated(log))
    task.send_signal(number)
    errors = task.communicate(timeout=60)[1]
    with sqlite3.connect(tmp_path / "s.db") as database:
        assert database.execute("select lease_until from hf_elastic_claims").fetchall() == [(0.0,)]  # handed back
    requeued = tmp_path / "requeued"
    if number == signal.SIGUSR1:
        assert task.returncode == 0 and requeued.read_text() == "requeue 7_3\n", errors
        requeued.unlink()
    assert task.returncode == (0 if number == signal.SIGUSR1 else 143), errors
    gate.touch()
    again = start(tmp_path, "mine:make")
    errors = again.communicate(timeout=120)[1]
    assert again.returncode == 0, errors
    assert not requeued.exists() and len(evaluated(log)) == 5


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_task_without_a_source_says_how_it_is_used(tmp_path: Path) -> None:
    task = start(tmp_path)
    assert "usage: sbatch" in task.communicate(timeout=60)[1] and task.returncode == 2
