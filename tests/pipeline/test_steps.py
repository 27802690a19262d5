from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import options, write_text

from hf_elastic import (
    ArchitectureError,
    CheckpointError,
    DataError,
    ElasticError,
    InfeasibleError,
    SearchError,
    SearchResult,
    compress,
)
from hf_elastic.pipeline import open_for_export, open_supernet, search_run
from hf_elastic.pipeline.kept import options_of
from hf_elastic.pipeline.steps import front_row, front_table

Find = Callable[[str], Path]


@pytest.fixture(scope="module")
def finished(checkpoint: Find, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a finished run; its data lies beside it."""
    root = tmp_path_factory.mktemp("steps")
    given = options(checkpoint("embedding"), write_text(root / "text.txt"), root / "small")
    compress(given, say=lambda text: None)
    return given.run_folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "small.run"))


def edited(run: Path, change: Callable[[dict], object]) -> Path:
    record = json.loads((run / "result.json").read_text())
    change(record)
    (run / "result.json").write_text(json.dumps(record))
    return run


def test_the_supernet_of_a_run_is_the_trained_one(run: Path, checkpoint: Find) -> None:
    supernet, parent = open_supernet(run)
    assert parent == str(checkpoint("embedding"))
    assert supernet.active == supernet.space.largest()
    shutil.rmtree(run / "sorted")
    assert open_supernet(run)[0].space == supernet.space


def test_what_is_exported_of_a_run_has_the_dtype_of_its_parent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_elastic.pipeline.steps.export_dtype", lambda model: torch.bfloat16)
    assert {p.dtype for p in open_for_export(run)[0].model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in open_supernet(run)[0].model.parameters()} == {torch.float32}
    assert {p.dtype for p in open_for_export(run / "supernet")[0].model.parameters()} == {torch.float32}


def test_a_supernet_folder_is_its_own_parent(run: Path) -> None:
    supernet, parent = open_supernet(run / "supernet")
    assert parent == str(run / "supernet") and len(supernet.space) > 0


def test_a_run_is_searched_again_under_other_limits(run: Path) -> None:
    table = search_run(run, within={"parameters": 0.5, "macs": 0.9}, evaluations=8, seed=1)
    result = SearchResult.load(run / "search-macs-0.9-parameters-0.5-1.json")
    assert table.startswith(front_table(result))
    header, rule, *rows = table.splitlines()
    assert header.split() == ["row", "architecture", "structure", "parameters"] and set(rule) == {"-"}
    assert len(rows) == len(result.front) + 2 and len(result.evaluations) <= 8
    largest = result.references
    for evaluation in result.front:
        assert evaluation.values["parameters"] <= 0.5 * largest["parameters"]
        assert evaluation.values["macs"] <= 0.9 * largest["macs"]


def test_a_search_goes_on_where_it_stopped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search_run(run, within={"parameters": 0.5}, evaluations=6, seed=0)
    monkeypatch.setattr("hf_elastic.objectives.embeddings", lambda *a, **k: pytest.fail("evaluated again"))
    assert search_run(run, within={"parameters": 0.5}, evaluations=6, seed=0) == first


def test_a_search_with_other_limits_is_another_search(run: Path) -> None:
    for limit in (0.5, 0.50000001):
        search_run(run, within={"parameters": limit}, evaluations=6, seed=0)
    assert len(list(run.glob("search-*.db"))) == 2


def test_the_front_begins_with_the_best_quality(run: Path) -> None:
    search_run(run, within={"macs": 0.9}, evaluations=12, seed=0)
    result = SearchResult.load(run / "search-macs-0.9-0.json")
    qualities = [float(line.split()[-2]) for line in front_table(result).splitlines()[2:]]
    assert qualities == sorted(qualities, reverse=True)


def test_a_row_of_the_table_names_its_architecture(run: Path) -> None:
    table = search_run(run, within={"macs": 0.9}, evaluations=8, seed=0)
    kept = run / "search-macs-0.9-0.json"
    assert f"'{kept}#ROW'" in table
    result = SearchResult.load(kept)
    found = [front_row(f"{kept}#{number}") for number in range(1, len(result.front) + 1)]
    assert [line.split()[0] for line in table.splitlines()[2:-2]] == [str(n) for n in range(1, len(found) + 1)]
    assert set(found) == {evaluation.architecture for evaluation in result.front}
    best = result.best(result.objectives[0].name)
    assert result.of(found[0]).values[result.objectives[0].name] == best.values[result.objectives[0].name]
    for text in (f"{kept}#0", f"{kept}#99", f"{kept}#x", f"{kept}#{'9' * 5000}", f"{kept}#\u00b2", f"{kept}#\u0663"):
        with pytest.raises(ArchitectureError, match="rows 1 to"):
            front_row(text)


def _forget_training(run: Path) -> None:
    edited(run, lambda record: record["stages"].pop("train"))


def _other_text(run: Path) -> None:
    text = write_text(run.parent / "other.txt", seed=5)
    edited(run, lambda record: record["options"].update(data=[str(text)]))


def _no_text(run: Path) -> None:
    edited(run, lambda record: record["options"].update(data=[str(run / "nowhere.txt")]))


def _empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def _foreign(run: Path) -> None:
    _empty(run)
    (run / "result.json").write_text('{"score": 3}')


def _foreign_options(run: Path) -> None:
    edited(run, lambda record: record.update(options={"verbosity": 3}))


def _truncated(run: Path) -> None:
    file = run / "supernet" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD: dict[str, tuple[Callable[[Path], object], type[ElasticError], str]] = {
    "not trained yet": (_forget_training, CheckpointError, "without a trained supernet yet"),
    "other text": (_other_text, CheckpointError, "is not what .* was made from"),
    "no text": (_no_text, DataError, "no file"),
    "empty folder": (_empty, CheckpointError, "no supernet and no run"),
    "foreign record": (_foreign, CheckpointError, "format None"),
    "foreign options": (_foreign_options, CheckpointError, "no usable options"),
    "truncated weights": (_truncated, CheckpointError, "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_searched_is_named_in_one_line(run: Path, case: str) -> None:
    damage, error, words = BAD[case]
    damage(run)
    with pytest.raises(error, match=words) as caught:
        search_run(run, within={"parameters": 0.5}, evaluations=6, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("within", "evaluations", "error", "words"),
    [
        ({"parameters": 0.001}, 6, InfeasibleError, "reachable"),
        ({"speed": 0.5}, 6, SearchError, "'speed'.*known"),
        ({"parameters": 0.5}, 1, SearchError, "always evaluated"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    run: Path, within: dict[str, float], evaluations: int, error: type[ElasticError], words: str
) -> None:
    with pytest.raises(error, match=words):
        search_run(run, within=within, evaluations=evaluations, seed=0)


def test_the_options_of_a_run_are_those_it_was_started_with(run: Path, checkpoint: Find, finished: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    restored = options_of(record, output="elsewhere")
    given = options(checkpoint("embedding"), finished.parent / "text.txt", Path("elsewhere"))
    assert restored == given
