"""``optuna-dashboard`` opens the storage of a run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import Make

from hf_elastic.search import SearchResult

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def asked(address: str, *, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def test_the_dashboard_shows_every_evaluation_of_a_run(made: Make) -> None:
    program = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("optuna-dashboard is not installed: pip install optuna-dashboard")
    run, port = Path(f"{made('compress')}.run"), free_port()
    command = [program, f"sqlite:///{run / 'search.db'}", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            (study,) = asked(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
            shown = asked(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}")
        finally:
            server.terminate()
    result = SearchResult.load(run / "search.json")
    wanted = [[e.values[goal.name] for goal in result.objectives] for e in result.evaluations]
    found = [trial["values"] for trial in shown["trials"] if trial["state"] == "Complete"]
    assert sorted(found) == sorted(wanted) and len(found) == 12
    assert study["directions"] == [goal.direction for goal in result.objectives]
