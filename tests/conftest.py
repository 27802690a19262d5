"""Settings and fixtures of all tests. The environment is set before a library reads it."""

import os
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def quiet() -> Iterator[None]:
    """Keeps transformers from writing to the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by its kind; read only."""
    from tiny_checkpoints import KINDS

    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](root / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Text, or labelled rows, that fit a kind of checkpoint; read only."""
    from tiny_checkpoints import write_rows, write_text

    root = tmp_path_factory.mktemp("data")
    text, rows = write_text(root / "text.txt"), write_rows(root / "rows.jsonl")
    return lambda kind: rows if "classification" in kind else text


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the benchmark scripts importable as they are when run, and puts back what they set for their process."""
    import torch
    import transformers

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
