"""Recorded runs, real runs of each kind on tiny checkpoints, and the helpers that read reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_checkpoints

from hf_elastic.pipeline import CompressRun, ElmRun, LoraRun

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "pipeline")]
import elm_runs  # noqa: E402  # found by their names only behind the line above
from recorded_runs import Make  # noqa: E402


@pytest.fixture(autouse=True)
def always_quiet(quiet: None) -> None:
    """All of these tests are."""


def _silent(text: str) -> None:
    """Says nothing."""


def _compress(root: Path) -> None:
    data = tiny_checkpoints.write_text(root / "text.txt")
    model = tiny_checkpoints.sentence_encoder(root / "model")
    options = tiny_checkpoints.options(model, data, root / "compress", loadability="any", evaluations=12)
    CompressRun(options, say=_silent).run()


def _adapters(root: Path) -> None:
    data, model = tiny_checkpoints.write_rows(root / "rows.jsonl"), tiny_checkpoints.classifier(root / "classifier")
    limits = {"adapter_parameters": 0.75}
    options = tiny_checkpoints.options(model, data, root / "adapters", lora="r=8,4,2", within=limits, minutes=0.01)
    LoraRun(options, say=_silent).run()


def _elm(root: Path) -> None:
    data = tiny_checkpoints.write_text(root / "elm.txt")
    teacher = tiny_checkpoints.masked_model(root / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        elm_runs.prepare(patch.setattr)
        patch.setitem(elm_runs.ELM_SIZES, "nano", elm_runs.NANO)
        ElmRun(elm_runs.options(teacher, data, root / "elm", fusion="merge", threshold=0.5), say=_silent).run()


MAKERS = {"compress": _compress, "adapters": _adapters, "elm": _elm}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Output folder of a real run of a kind; its run lies beside it. Each is made once; read only."""
    root, there = tmp_path_factory.mktemp("runs"), set[str]()

    def get(kind: str) -> Path:
        if kind not in there:
            there.add(kind)
            MAKERS[kind](root)
        return root / kind

    return get
