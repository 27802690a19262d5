"""Makes the harness importable by its names, and runs it in a process of its own, which only imports and forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a script of this folder with operations and options; returns what it wrote."""

    def run(script: str, *words: str) -> Any:
        folder = tmp_path_factory.mktemp(Path(script).stem)
        found = folder / "found.json"
        command = [sys.executable, str(HERE / script), str(folder / "work"), "--json", str(found), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(found.read_text())

    return run
