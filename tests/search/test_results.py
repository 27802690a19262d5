"""Results: fronts, best within limits, saving and loading."""

import json
import os
import random
import stat
from dataclasses import replace

import pytest

from hf_elastic.errors import CheckpointError, InfeasibleError, SearchError
from hf_elastic.search import Evaluation, Failure, Objective, SearchResult, search_subnets
from tests.search.toy import layers_problem, widths_problem


def searched(**options):
    space, objectives = layers_problem()
    defaults = {"algorithm": "random", "evaluations": 60, "progress": False}
    return search_subnets(space, objectives, **{**defaults, **options})


def test_best_is_the_minimum_over_what_keeps_all_limits():
    result = searched(within={"parameters": 0.8})
    largest = result.references["parameters"]
    for limit in (0.9, 0.5, 0.3, 6, 9.5):
        bound = min(limit * largest if isinstance(limit, float) and limit <= 1 else limit, 0.8 * largest)
        allowed = [e for e in result.evaluations if e.values["parameters"] <= bound]
        best = result.best("loss", within={"parameters": limit})
        assert best in allowed
        assert best.values["loss"] == min(e.values["loss"] for e in allowed)
    assert result.best("loss").values["loss"] == min(e.values["loss"] for e in result.feasible)


def test_best_looks_up_costs_that_the_search_did_not_ask_for():
    space, (loss, cost) = widths_problem()
    macs = Objective("macs", lambda a: 3.0 * cost.function(a), cost=True)
    asked = Objective("loss", loss.function, related=lambda: {"macs": macs})
    result = search_subnets(space, [asked], evaluations=30, progress=False)
    best = result.best("loss", within={"macs": 0.6})
    assert macs(best.architecture) <= 0.6 * macs(space.largest())
    with pytest.raises(SearchError, match="'macs'"):
        SearchResult.from_json(result.to_json()).best("loss", within={"macs": 0.6})


def test_ties_go_by_digest_and_not_by_order():
    space, _ = widths_problem(layers=3)
    flat = Objective("loss", lambda a: 1.0)
    bests = set()
    for seed in range(5):
        result = search_subnets(space, [flat], evaluations=64, seed=seed, progress=False)
        bests.add(result.best("loss").architecture)
        assert len(result.front) == 64
    assert bests == {min(space.architectures(), key=lambda a: a.digest)}


def test_best_says_what_was_nearest_when_nothing_keeps_the_limits():
    result = searched()
    nearest = min(e.values["parameters"] for e in result.evaluations)
    with pytest.raises(InfeasibleError) as caught:
        result.best("loss", within={"parameters": 1})
    assert f"parameters <= 1 (nearest of 60 evaluated: {nearest:g})" in str(caught.value)


def test_unknown_names_list_the_known():
    result = searched()
    with pytest.raises(SearchError, match="no objective 'macs'; it has 'loss', 'parameters'"):
        result.best("macs")
    with pytest.raises(SearchError, match="known: 'loss', 'parameters'"):
        result.best("loss", within={"macs": 1})


def test_nothing_feasible_is_an_error_of_best_and_an_empty_front():
    result = searched(within={"loss": 1e-9})
    assert result.front == () and len(result.evaluations) == 60
    with pytest.raises(InfeasibleError, match="none of 60 evaluations keeps loss <= 1e-09"):
        result.best("loss")
    assert str(result) == "random, seed 0: 60 evaluations, 0 keep loss <= 1e-09"
    failures = (Failure(result.space.largest(), "it broke", 60),) * 2
    assert "60 evaluations, 2 failed, 0 keep" in str(replace(result, failures=failures))


def test_saved_results_are_equal_and_answer_the_same(tmp_path):
    result = searched(within={"parameters": 0.8})
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    assert loaded == result and loaded.to_json() == result.to_json()
    assert loaded.front == result.front and loaded.midpoint == result.midpoint
    within = {"parameters": 0.4}
    assert loaded.best("loss", within=within) == result.best("loss", within=within)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
def test_saved_results_may_be_read_by_others(tmp_path):
    searched(evaluations=5).save(tmp_path / "new" / "result.json")
    assert stat.S_IMODE((tmp_path / "new" / "result.json").stat().st_mode) == 0o644


def test_results_that_cannot_be_written_or_read_are_named(tmp_path):
    result = searched(evaluations=5)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder"):
        result.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        result.save(tmp_path / "file" / "result.json")
    with pytest.raises(CheckpointError, match="missing.json"):
        SearchResult.load(tmp_path / "missing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no text"):
        SearchResult.load(tmp_path / "binary")


def test_a_result_is_printed_as_a_line_and_not_as_all_its_evaluations():
    result = searched(within={"parameters": 0.8})
    line, front = str(result), result.front
    losses, parameters = ([e.values[name] for e in front] for name in ("loss", "parameters"))
    assert line.startswith(f"{result.algorithm}, seed {result.seed}: {len(result.evaluations)} evaluations")
    assert f", {len(result.feasible)} keep {result.limits[0]}; front of {len(front)}: " in line
    assert f"loss {min(losses):g} to {max(losses):g}, parameters {min(parameters):g} to {max(parameters):g}" in line
    assert "failed" not in line and len(line) < 200 and line in repr(result) and len(repr(result)) < 250


def test_texts_that_are_no_result_are_refused_in_one_line():
    text = searched(evaluations=8).to_json()
    rng = random.Random(0)
    for _ in range(200):
        cut = text[: rng.randrange(len(text))]
        with pytest.raises(SearchError) as caught:
            SearchResult.from_json(cut)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"space": None},
        {"space": {"format": "hf_elastic.search_space", "version": 1, "choices": []}},
        {"objectives": [{"name": "loss"}]},
        {"objectives": [{"name": "loss", "direction": "up", "unit": "", "cost": False}]},
        {"objectives": 3},
        {"limits": [{"name": "loss", "bound": 1.0, "surprise": 1}]},
        {"within": []},
        {"within": {"loss": "x"}},
        {"seed": "0"},
        {"names": ["loss"]},
        {"evaluations": [{"number": 0, "indices": [99], "values": [1.0, 2.0], "feasible": True}]},
        {"evaluations": [{"number": 0}]},
        {"evaluations": {}},
        {"failures": [None]},
        {"references": None},
        {"references": {"loss": 10**400}},
        {"limits": [{"name": "loss", "bound": float("nan")}]},
        {"limits": [{"name": "novel", "bound": 1.0}]},
        {"limits": [{"name": "loss", "bound": 1.0, "cost": "yes"}]},
        {"objectives": [{"name": "loss", "direction": "minimize", "unit": 3, "cost": False}]},
    ],
)
def test_json_that_is_no_result_is_refused(change):
    data = {**json.loads(searched(evaluations=8).to_json()), **change}
    if change == {"evaluations": {}}:
        assert SearchResult.from_json(json.dumps({**data, "evaluations": []})).evaluations == ()
        return
    with pytest.raises(SearchError):
        SearchResult.from_json(json.dumps(data))


def test_a_result_finds_the_evaluation_of_an_architecture():
    result = searched()
    for evaluation in result.evaluations:
        assert result.of(evaluation.architecture) is evaluation
        assert isinstance(evaluation, Evaluation)
    assert [e.number for e in result.evaluations] == list(range(60))
