"""Workers on what ``compress`` leaves: the same search as ``hf-elastic search`` makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_elastic import compress
from hf_elastic.pipeline import search_run
from hf_elastic.search import SearchResult
from hf_elastic.workers import WorkerOptions, work
from tests.tiny_checkpoints import options, sentence_encoder, write_text


@pytest.mark.slow
def test_a_worker_searches_the_trained_supernet_of_a_run_as_the_search_command_does(tmp_path: Path) -> None:
    model, text = sentence_encoder(tmp_path / "model"), write_text(tmp_path / "text.txt")
    given = options(model, text, tmp_path / "small")
    compress(given, say=lambda text: None)
    run, within = given.run_folder, {"macs": 0.9}
    search_run(run, within=within, evaluations=8, seed=5)
    (kept,) = run.glob("search-macs*.json")
    told: list[str] = []
    for processes in (0, 1):
        url = f"sqlite:///{tmp_path / f'{processes}.db'}"
        settings = WorkerOptions(str(run), url, within=within, evaluations=8, seed=5, processes=processes)
        assert settings.study == "small"
        found = work(settings, say=told.append)
        wanted = SearchResult.load(kept)
        assert [e.architecture for e in found.evaluations] == [e.architecture for e in wanted.evaluations]
        for one, other in zip(found.evaluations, wanted.evaluations, strict=True):
            assert one.values == pytest.approx(other.values, rel=1e-5)
    assert sum("8 of them here" in line for line in told) == 2
