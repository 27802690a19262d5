"""Checkpoints and data of the pipeline tests, each made once; ``killed_compress`` becomes importable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_checkpoints
import transformers

sys.path.append(str(Path(__file__).parent))

KINDS: dict[str, Callable[[Path], Path]] = {
    "embedding": tiny_checkpoints.sentence_encoder,
    "masked-lm": tiny_checkpoints.masked_model,
    "classification": tiny_checkpoints.classifier,
    "causal-lm": tiny_checkpoints.language_model,
    "gpt2": lambda folder: tiny_checkpoints.language_model(folder, "gpt2"),
    "decoder-classification": tiny_checkpoints.decoder_classifier,
    "gpt2-classification": lambda folder: tiny_checkpoints.decoder_classifier(folder, "gpt2"),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by its kind; read only."""
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
    root = tmp_path_factory.mktemp("data")
    text = tiny_checkpoints.write_text(root / "text.txt")
    rows = tiny_checkpoints.write_rows(root / "rows.jsonl")
    return lambda kind: rows if "classification" in kind else text
