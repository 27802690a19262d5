"""Families: nested sizes against brute force on made-up tables, and whole runs timed by their parameters."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoints import language_model, options, parameter_seconds, time_by_parameters, write_text
from tiny_models import supernet_of

from hf_elastic import (
    CheckpointError,
    CompressOptions,
    DataError,
    ElasticError,
    InfeasibleError,
    SpaceError,
    Supernet,
    compress,
    costs,
    extract,
)
from hf_elastic.checkpoint.run_record import RunRecord
from hf_elastic.files import only_worker
from hf_elastic.parts import LayerShape
from hf_elastic.pipeline import FamilyResult, export_family, nested
from hf_elastic.pipeline.goal import Goal, goal_of
from hf_elastic.report import describe_folder
from hf_elastic.space import Architecture
from hf_elastic.tables.budgets import LATENCY
from hf_elastic.tables.latencies import LatencyTable, measure_latency_table
from hf_elastic.tables.quality import QualityTable, predicted_damage, sublayer_options

Find = Callable[[str], Path]
SPEEDUPS = [1.2, 1.5, 2]
NAMES = ["1.2x", "1.5x", "2x"]


def made_up(supernet: Supernet, *, seed: int) -> QualityTable:
    """Damages that grow with what is cut, by random steps."""
    rng, rows = random.Random(seed), []
    for part in supernet.layer_parts:
        row = {"layer": 1 + 4 * rng.random()}
        for sublayer in ("mlp/", "attention/"):
            named = [name for name in sublayer_options(part, sizes=99) if name.startswith(sublayer)]
            row |= {name: float(place and place + rng.random()) for place, name in enumerate(named)}
        rows.append(row)
    return QualityTable("hidden", "made up", tuple(rows))


def goals(supernet: Supernet, speedups: list[Any]) -> dict[str, Goal]:
    table = measure_latency_table(supernet, rounds=3, timer=parameter_seconds)
    asked = nested.parse_speedups(speedups)
    return {name: goal_of(supernet, b, dtype=torch.float32, table=table) for name, b in asked.items()}


def is_nested(small: LayerShape, large: LayerShape) -> bool:
    """Widths and heads as they count: of what is left out, none."""

    def sizes(shape: LayerShape) -> tuple[int, int]:
        return (shape.attention and shape.num_attention_heads, shape.mlp and shape.intermediate_size)

    return all(one <= other for one, other in zip(sizes(small), sizes(large), strict=True))


def are_nested(supernet: Supernet, small: Architecture, large: Architecture) -> bool:
    return all(map(is_nested, supernet.layer_shapes(small), supernet.layer_shapes(large)))


SPACES: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes per layer": ("bert", {"num_hidden_layers": None, "skip": ["attention", "mlp", "layer"],
                                  "intermediate_size": [16, 1.0]}),
    "heads in groups": ("llama", {"num_hidden_layers": None, "skip": ["layer"]}),
    "one width for all layers": ("bert", {"num_attention_heads": None, "num_hidden_layers": None, "skip": ["layer"],
                                          "intermediate_size": [8, 16, 24, 32, 40, 48], "loadability": "stock"}),
    "depth": ("gpt2", {"num_attention_heads": None, "skip": None, "num_hidden_layers": [1, 2, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPACES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_size_is_the_least_damage_that_is_fast_enough_and_nested_in_the_one_before(case: str, seed: int) -> None:
    family, changes = SPACES[case]
    supernet = supernet_of(family, **changes)
    quality, found = made_up(supernet, seed=seed), goals(supernet, [2, 1.2, "1.5"])
    plan = nested.nested_architectures(supernet, quality, found)
    assert list(plan) == NAMES
    outer = supernet.space.largest()
    for name, goal in found.items():
        allowed = [
            point
            for point in supernet.space.architectures()
            if are_nested(supernet, point, outer) and goal.feasible.allows(point)
            if not all(shape.skipped for shape in supernet.layer_shapes(point))
        ]
        least = min(predicted_damage(supernet, quality, point) for point in allowed)
        assert plan[name] in allowed
        assert predicted_damage(supernet, quality, plan[name]) == pytest.approx(least, rel=1e-9)
        outer = plan[name]


def test_a_size_alone_may_be_what_it_could_not_be_inside_a_larger_one() -> None:
    """The reason for solving them one inside the other: least damage at each speed-up alone does not nest."""
    supernet = supernet_of("bert", **SPACES["shapes per layer"][1])
    crossing, found = 0, goals(supernet, SPEEDUPS)
    for seed in range(6):
        quality = made_up(supernet, seed=seed)
        alone = [nested.nested_architectures(supernet, quality, {n: g})[n] for n, g in found.items()]
        crossing += not all(are_nested(supernet, small, large) for large, small in zip(alone, alone[1:], strict=False))
        plan = list(nested.nested_architectures(supernet, quality, found).values())
        assert all(are_nested(supernet, small, large) for large, small in zip(plan, plan[1:], strict=False))
        assert plan[0] == alone[0]
    assert crossing


def test_no_size_is_without_any_layer_though_the_sum_prefers_it() -> None:
    supernet = supernet_of("bert", **SPACES["heads in groups"][1], num_attention_heads=None)
    quality = made_up(supernet, seed=0)
    damages = tuple({**row, "layer": -1.0} for row in quality.damages)
    plan = nested.nested_architectures(supernet, replace(quality, damages=damages), goals(supernet, [1.2, 2]))
    kept = [sum(not shape.skipped for shape in supernet.layer_shapes(point)) for point in plan.values()]
    assert kept == [1, 1]


def test_a_size_that_would_leave_no_layer_is_refused_with_what_can_be_reached() -> None:
    supernet = supernet_of("bert", **SPACES["heads in groups"][1], num_attention_heads=None)
    quality, found = made_up(supernet, seed=0), goals(supernet, [1.2])
    table = next(iter(found.values())).table
    assert table is not None
    bare = [p for p in supernet.space.architectures() if sum(not s.skipped for s in supernet.layer_shapes(p)) == 1]
    fastest = max(table.speedup(supernet, point) for point in bare)
    beyond = table.speedup(supernet, supernet.space.smallest()) / 1.1
    assert beyond > fastest
    with pytest.raises(InfeasibleError, match=f"cut from 1.2x, the space goes up to {fastest:.3g} times") as caught:
        nested.nested_architectures(supernet, quality, goals(supernet, [1.2, round(beyond, 2)]))
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def _timed_by_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    time_by_parameters(monkeypatch)


@pytest.fixture(scope="module")
def runs(checkpoint: Find, data: Find, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompressOptions]:
    """A finished run of each recipe; to be copied."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for recipe, kind, changes in (
        ("fast", "causal-lm", {"loadability": "any", "within": None, "speedup": "1.02@2x16"}),
        ("balanced", "classification", {}),
        ("best", "embedding", {}),
    ):
        given = options(checkpoint(kind), data(kind), root / recipe, recipe=recipe, **changes)
        compress(given, say=lambda text: None)
        made[recipe] = given
    return made


def copied(runs: Mapping[str, CompressOptions], recipe: str, folder: Path) -> Path:
    return Path(shutil.copytree(runs[recipe].run_folder, folder / "small.run"))


@pytest.fixture(scope="module")
def whole(runs: dict[str, CompressOptions], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FamilyResult]:
    """A family of the run of recipe ``best`` and where it is; read only."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        time_by_parameters(patch)
        return folder / "small.family", silent(copied(runs, "best", folder))


def silent(run: Path, speedups: Any = SPEEDUPS, **changes: Any) -> FamilyResult:
    return export_family(run, speedups, say=lambda text: None, **changes)


AUTOS = {"fast": "AutoModelForCausalLM", "balanced": "AutoModelForSequenceClassification", "best": "AutoModel"}


@pytest.mark.parametrize("recipe", AUTOS)
def test_a_run_of_any_recipe_has_a_family_of_ordinary_checkpoints(
    runs: dict[str, CompressOptions], tmp_path: Path, recipe: str
) -> None:
    run, said = copied(runs, recipe, tmp_path), []
    result = export_family(run, SPEEDUPS, say=said.append)
    supernet = Supernet.from_pretrained(run / "sorted")
    assert [size.name for size in result.sizes] == NAMES
    assert sorted(path.name for path in (tmp_path / "small.family").iterdir()) == NAMES
    outer = supernet.space.largest()
    for size, row in zip(result.sizes, result.rows[1:], strict=True):
        folder = tmp_path / "small.family" / size.name
        remote = size.report.loadability == "remote-code"
        assert remote or recipe != "fast" or size.report.loadability == "stock"
        model = getattr(transformers, AUTOS[recipe]).from_pretrained(folder, trust_remote_code=remote)
        assert sum(p.numel() for p in model.parameters()) == row["total_parameters"]
        assert row["total_parameters"] == costs.total_parameters(supernet, size.architecture)
        assert (folder / "tokenizer.json").is_file() and size.report.directory == folder
        assert are_nested(supernet, size.architecture, outer)
        assert row["name"] == f"{size.name}, {size.start}" and row["architecture"] == dict(size.architecture)
        met, predicted = size.lines
        assert met.startswith(f"met: speed-up {size.name[:-1]} for prefill of 1x64: measured ")
        assert predicted.startswith("speed-up predicted ") and "measured" in predicted
        assert any(f"{size.name}: {met}" in text for text in said)
        outer = size.architecture
        described = describe_folder(folder)
        assert met in described and f"within speedup={size.name[:-1]}@1x64, recipe {recipe}" in described
        assert f"\n{row['name']} " in described and "exported " in described
        with pytest.raises(CheckpointError, match="is what a run exported"):
            export_family(folder, SPEEDUPS)
    listed = describe_folder(tmp_path / "small.family")
    assert [line for line in listed.splitlines() if line in NAMES] == NAMES and listed.count("  exported ") == 3
    assert any(text.startswith(result.table) for text in said)
    assert result.table in describe_folder(run) and f"2x: {result.sizes[-1].lines[0]}" in describe_folder(run)


def test_the_speedups_of_the_table_are_those_of_the_verdicts(whole: tuple[Path, FamilyResult]) -> None:
    _, result = whole
    parent = result.rows[0]["latency"]
    for size, row in zip(result.sizes, result.rows[1:], strict=True):
        assert f"measured {parent / row['latency']:.2f}x" in size.lines[1]


def test_a_size_that_is_too_slow_is_said_to_be_missed(
    runs: dict[str, CompressOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, measure = copied(runs, "best", tmp_path), nested.measure_models

    def slower(models: Any, setting: Any, **more: Any) -> Any:
        timed = measure(models, setting, **more)
        factors = {name: 1 if name == "parent" else 2 for name in timed}
        return {n: replace(t, samples=tuple(factors[n] * s for s in t.samples)) for n, t in timed.items()}

    monkeypatch.setattr(nested, "measure_models", slower)
    assert all(size.lines[0].startswith("MISSED: speed-up ") for size in silent(run).sizes)


def test_the_weights_are_the_parents_repaired_in_closed_form(runs: dict[str, CompressOptions], tmp_path: Path) -> None:
    run = copied(runs, "fast", tmp_path)
    result = silent(run, [1.3])
    size = result.sizes[0]
    supernet, data = Supernet.from_pretrained(run / "sorted"), nested.FinishedRun(run).data
    cut = extract(supernet, size.architecture, loadability=size.report.loadability).state_dict()
    with nested.refitted(supernet, size.architecture, data.calibration):
        repaired = extract(supernet, size.architecture, loadability=size.report.loadability).state_dict()
    exported = load_file(tmp_path / "small.family" / "1.3x" / "model.safetensors")
    assert all(torch.equal(tensor, repaired[name]) for name, tensor in exported.items())
    assert not all(torch.equal(tensor, cut[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("better", ["repaired", "trained"])
def test_of_a_trained_supernet_the_weights_that_measure_better_are_kept(
    runs: dict[str, CompressOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    run = copied(runs, "best", tmp_path)
    distances = iter([1.0, 2.0] if better == "repaired" else [2.0, 1.0])
    monkeypatch.setattr(nested, "distance_of", lambda measures, values: next(distances))
    size = silent(run, [1.3]).sizes[0]
    assert size.start == better
    trained = extract(Supernet.from_pretrained(run / "supernet"), size.architecture).state_dict()
    exported = load_file(tmp_path / "small.family" / "1.3x" / "model.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in exported.items()) is (better == "trained")
    entries = json.loads((run / "result.json").read_text())["stages"][nested.EXPORTS]
    tried = next(iter(entries.values()))["tried"]
    assert set(tried) == {"repaired", "trained"} and all(set(v) == {"structure", "cosine"} for v in tried.values())


def test_latencies_of_the_run_are_used_for_its_workload_and_others_are_kept_beside_them(
    runs: dict[str, CompressOptions], tmp_path: Path
) -> None:
    run = copied(runs, "fast", tmp_path)
    table = measure_latency_table(
        Supernet.from_pretrained(run / "sorted"), batch_size=2, length=16, timer=parameter_seconds, rounds=3
    )
    table.save(run / "latency.json")
    before = (run / "latency.json").read_bytes()
    silent(run, ["1.2@2x16", "1.5@2x16"])
    assert [path.name for path in run.glob("latency*.json")] == ["latency.json"]
    silent(run, ["1.2@4x8"], output=tmp_path / "other")
    silent(run, [1.2], phase="decode", output=tmp_path / "third")
    names = {path.name for path in run.glob("latency*.json")}
    assert names == {"latency.json", "latency-prefill-4x8.json", "latency-decode-1x63.json"}
    assert LatencyTable.load(run / "latency-decode-1x63.json").setting.phase == "decode"
    assert (run / "latency.json").read_bytes() == before


def test_half_precision_is_kept_in_every_size(tmp_path: Path, data: Find) -> None:
    folder = language_model(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    given = options(folder, data("causal-lm"), tmp_path / "small", recipe="fast")
    result = compress(given, say=lambda text: None).family([1.2, 1.5], say=lambda text: None)
    for size in result.sizes:
        assert {t.dtype for t in load_file(size.report.directory / "model.safetensors").values()} == {torch.bfloat16}
    assert "in bfloat16" in result.setting


def test_a_finished_family_is_told_again_and_a_larger_one_makes_only_what_is_new(
    runs: dict[str, CompressOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(runs, "best", tmp_path)
    result = silent(run, SPEEDUPS[:2])
    exports, export = [], nested.export
    monkeypatch.setattr(nested, "export", lambda *a, **k: exports.append(a[2].name) or export(*a, **k))
    (tmp_path / "small.family" / "1.5x" / "result.json").write_text("{}")
    longer = silent(run, SPEEDUPS)
    stage = json.loads((run / "result.json").read_text())["stages"]
    rows = next(found["rows"] for name, found in stage.items() if name.startswith("family 1.2x 1.5x 2x"))
    for row, name in zip(rows[1:], NAMES, strict=True):
        own = json.loads((tmp_path / "small.family" / name / "result.json").read_text())
        assert own["stages"]["compare"]["rows"] == [rows[0], row]
    assert exports == ["2x"] and longer.sizes[:2] == tuple(
        replace(size, lines=lines) for size, lines in zip(result.sizes, [s.lines for s in longer.sizes], strict=False)
    )
    for name in ("export", "refitted", "measure_models", "latencies_for", "nested_architectures"):
        monkeypatch.setattr(nested, name, lambda *a, **k: pytest.fail("done again"))
    before = (run / "result.json").read_bytes()
    assert silent(run, SPEEDUPS[:2]) == result and silent(run, SPEEDUPS) == longer
    assert json.loads((run / "result.json").read_bytes()) == json.loads(before)


def test_a_size_that_was_deleted_is_written_again_as_it_was(runs: dict[str, CompressOptions], tmp_path: Path) -> None:
    run = copied(runs, "best", tmp_path)
    result = silent(run)
    folder = tmp_path / "small.family" / "1.5x"
    before = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    assert silent(run) == result
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Killed(BaseException):
    """Ends a call as a signal would."""


@pytest.mark.parametrize(
    ("function", "calls"),
    [("refitted", 2), ("export", 2), ("RunRecord.note", 3), ("RunRecord.note", 5), ("measure_models", 1)],
)
def test_a_family_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    runs: dict[str, CompressOptions], whole: tuple[Path, FamilyResult], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, function: str, calls: int,
) -> None:  # fmt: skip
    run, made = copied(runs, "best", tmp_path), []
    owner = RunRecord if "." in function else nested
    name = function.rpartition(".")[2]
    original, count = getattr(owner, name), iter(range(calls - 1, -1, -1))

    def killed(*arguments: Any, **more: Any) -> Any:
        if not next(count, 1):
            raise Killed
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            silent(run)
    done = [path.name for path in sorted((tmp_path / "small.family").iterdir())]
    assert set(done) <= set(NAMES) and len(done) == {3: 1, 5: 2, 2: 1, 1: 3}[calls]
    (tmp_path / "small.family" / f".{NAMES[len(done) % 3]}.12345678.partial").mkdir()
    export = nested.export
    monkeypatch.setattr(nested, "export", lambda *a, **k: made.append(a[2].name) or export(*a, **k))
    again = silent(run)
    recorded = done[:-1] if "note" in function else done  # killed behind the export, before it was recorded
    assert made == [name for name in NAMES if name not in recorded]
    folder, result = whole
    assert [size.architecture for size in again.sizes] == [size.architecture for size in result.sizes]
    assert again.rows == result.rows and again.table == result.table
    for name in NAMES:
        one, other = (load_file(f / name / "model.safetensors") for f in (folder, tmp_path / "small.family"))
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)
    if made:
        assert not any(path.name.startswith(f".{made[0]}") for path in (tmp_path / "small.family").iterdir())


def edited(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((run / "result.json").read_text())
    change(record)
    (run / "result.json").write_text(json.dumps(record))


def _unfinished(run: Path) -> None:
    edited(run, lambda record: record["stages"].pop("export"))


def _other_text(run: Path) -> None:
    text = write_text(run.parent / "other.txt", seed=5)
    edited(run, lambda record: record["options"].update(data=[str(text)]))


def _padded(run: Path) -> None:
    edited(run, lambda record: record["options"].update(loadability="stock-padded"))


def _no_run(run: Path) -> None:
    (run / "result.json").unlink()


def _output_instead(run: Path) -> None:
    (run / "config.json").write_text("{}")


def _occupied(run: Path) -> None:
    (run.parent / "small.family" / "1.2x").mkdir(parents=True)
    (run.parent / "small.family" / "1.2x" / "thesis.txt").write_text("do not delete")


def _something_beside(run: Path) -> None:
    (run.parent / "small.family").mkdir()
    (run.parent / "small.family" / "thesis.txt").write_text("do not delete")


def _file(run: Path) -> None:
    (run.parent / "small.family").write_text("do not delete")


def _nothing(run: Path) -> None:
    pass


BAD: list[tuple[Any, Callable[[Path], None], type[ElasticError], str]] = [
    ([], _nothing, SpaceError, "list of one or more speed-ups"),
    ("1.7", _nothing, SpaceError, "list of one or more speed-ups"),
    (1.7, _nothing, SpaceError, "list of one or more speed-ups"),
    ([1.7, 1], _nothing, SpaceError, "must be a number above 1"),
    ([0.5], _nothing, SpaceError, "must be a number above 1"),
    ([float("nan")], _nothing, SpaceError, "not of the form"),
    (["fast"], _nothing, SpaceError, "not of the form"),
    ([1.7, 1.3, "1.70"], _nothing, SpaceError, "1.7x is asked for twice"),
    (["1.3@1x32", 1.7], _nothing, SpaceError, "1.3x is for 1x32, 1.7x is for 1x64; one family is of one workload"),
    (["1.3@1x999"], _nothing, DataError, "at most 64"),
    ([1.2, 900], _nothing, InfeasibleError, "speed-up of 900 cannot be reached"),
    ([1.2], _unfinished, CheckpointError, "repeat its compress command first"),
    ([1.2], _other_text, CheckpointError, "is not what .* was made from"),
    ([1.2], _padded, SpaceError, "never faster"),
    ([1.2], _no_run, CheckpointError, "is no run"),
    ([1.2], _output_instead, CheckpointError, "is what a run exported"),
    ([1.2], _occupied, CheckpointError, "holds 1.2x, which no family"),
    ([1.2], _something_beside, CheckpointError, "holds thesis.txt, which no family"),
    ([1.2], _file, CheckpointError, "cannot write"),
]


@pytest.mark.parametrize(("speedups", "prepare", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_cannot_be_is_said_in_one_line_before_anything_is_written(
    runs: dict[str, CompressOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedups: Any,
    prepare: Callable[[Path], None], error: type[ElasticError], words: str,
) -> None:  # fmt: skip
    run = copied(runs, "best", tmp_path)
    prepare(run)
    monkeypatch.setattr(nested, "refitted", lambda *a, **k: pytest.fail("repaired"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(error, match=words) as caught:
        silent(run, speedups)
    assert "\n" not in str(caught.value)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert before == {file: content for file, content in after.items() if not file.name.startswith("latency-")}


def test_two_families_of_a_run_at_once_are_refused(runs: dict[str, CompressOptions], tmp_path: Path) -> None:
    run = copied(runs, "fast", tmp_path)
    with only_worker(run), pytest.raises(CheckpointError, match="another process is at work in .*small.run; wait"):
        silent(run)
    assert len(silent(run).sizes) == 3


def test_a_size_of_another_family_is_not_replaced(
    runs: dict[str, CompressOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(runs, "fast", tmp_path)
    size = silent(run, [2]).sizes[0]
    before = (size.report.directory / "model.safetensors").read_bytes()
    largest = Supernet.from_pretrained(run / "sorted").space.largest()
    monkeypatch.setattr(nested, "nested_architectures", lambda *a: {"1.2x": largest, "2x": largest})
    with pytest.raises(CheckpointError, match="2x is of another family") as caught:
        silent(run, [1.2, 2])
    assert "\n" not in str(caught.value) and not (tmp_path / "small.family" / "1.2x").exists()
    assert (size.report.directory / "model.safetensors").read_bytes() == before


def test_every_size_keeps_its_limit_with_the_margin(whole: tuple[Path, FamilyResult]) -> None:
    folder, result = whole
    supernet = Supernet.from_pretrained(folder.with_name("small.run") / "sorted")
    for size, goal in zip(result.sizes, goals(supernet, SPEEDUPS).values(), strict=True):
        assert goal.known[LATENCY](size.architecture) <= goal.within[LATENCY]
