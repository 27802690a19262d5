"""Settings and fixtures of all tests. The environment is set before a library reads it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers of pytest-xdist share the cores; a thread pool in each would make them wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"


# Test files import `tiny_models` by its name, also where pytest-xdist starts them.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets and checkpoints; tests that need one are skipped where there is none."""
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HF_ELASTIC_DATA", beside_the_repository))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set HF_ELASTIC_DATA to a folder that has it")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``hf-elastic`` with arguments in this process."""
    from command_line import runner  # found by its name only behind the line above

    return runner(monkeypatch, capsys)
