from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
import transformers
from killed_compress import POINTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import options, sentence_encoder, write_text

from hf_elastic import (
    CheckpointError,
    CompressOptions,
    CompressResult,
    ElasticConfig,
    ElasticError,
    InfeasibleError,
    SpaceError,
    UnsupportedModelError,
    compress,
)  # fmt: skip
from hf_elastic.files import only_worker
from hf_elastic.pipeline import CompressRun, export_family, open_supernet
from hf_elastic.tables.latencies import LatencyTable

Find = Callable[[str], Path]

SETTINGS: dict[str, dict[str, Any]] = {
    "embedding": {}, "masked-lm": {"within": {"macs": 0.8}}, "classification": {}, "causal-lm": {"loadability": "any"},
}  # fmt: skip


def silent(given: CompressOptions) -> CompressResult:
    return compress(given, say=lambda text: None)


@pytest.fixture(scope="module")
def results(
    checkpoint: Find, data: Find, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[CompressOptions, CompressResult]]:
    """A run of a second of training for every task."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for kind, changes in SETTINGS.items():
        given = options(checkpoint(kind), data(kind), root / kind, minutes=0.01, **changes)
        made[kind] = (given, silent(given))
    return made


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_finds_a_smaller_model_within_the_limits(results: dict[str, Any], kind: str) -> None:
    given, result = results[kind]
    parent, found = result.rows[0], result.rows[1]
    assert [row["name"] for row in result.rows][:3] == ["parent", "found", "midpoint"]
    assert result.rows[3]["name"] == "fast answer, untrained"
    for name, share in given.within.items():
        assert found[name] <= share * parent[name]
    model = transformers.AutoModel.from_pretrained(given.output, trust_remote_code=True)
    with safe_open(Path(given.output) / "model.safetensors", framework="pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert total == found["total_parameters"]
    assert sum(p.numel() for p in model.parameters()) <= total
    plan = result.record["stages"]["plan"]
    assert plan["supernet_steps"] > 0 and plan["found_steps"] > 0


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
@pytest.mark.parametrize("kind", ["embedding", "causal-lm"])
def test_a_recipe_runs_its_stages_and_no_others(
    checkpoint: Find, data: Find, tmp_path: Path, kind: str, recipe: Any
) -> None:
    given = options(checkpoint(kind), data(kind), tmp_path / "small", recipe=recipe, minutes=0.01)
    result = silent(given)
    stages = result.record["stages"]
    assert {name for name in ("tables", "repair", "train", "search", "specialise") if name in stages} == {
        "tables", "repair", *(["specialise"] if recipe == "balanced" else []),
    }  # fmt: skip
    assert stages.get("plan", {}).get("supernet_steps", 0) == 0
    assert (stages.get("plan", {}).get("found_steps", 0) > 0) is (recipe == "balanced")
    assert given.run_folder.joinpath("supernet").exists() is False
    rows = {row["name"]: row for row in result.rows}
    assert rows["found"]["parameters"] <= 0.7 * rows["parent"]["parameters"]
    assert rows["found"]["architecture"] == stages["repair"]["architecture"]
    assert ("fast answer, untrained" in rows) is (recipe == "balanced")
    assert "midpoint" not in rows
    repaired = rows["found" if recipe == "fast" else "fast answer, untrained"]
    for name, value in stages["repair"]["values"].items():
        assert repaired[name] == pytest.approx(value, rel=1e-4)
    assert 3 <= stages["tables"]["architectures"] <= 12 and -1 <= stages["tables"]["rank_correlation"] <= 1
    tried = [trial["architecture"] for trial in stages["repair"]["tried"]]
    assert dict(result.architecture) in tried and len(tried) == len({repr(point) for point in tried})
    told = silent(given)
    assert told.rows == result.rows
    with pytest.raises(CheckpointError, match=f"recipe {recipe}, which trains no supernet"):
        open_supernet(given.run_folder)


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_speedup_and_a_memory_are_searched_for_measured_and_told(
    checkpoint: Find, data: Find, tmp_path: Path, recipe: Any
) -> None:
    given = options(
        checkpoint("causal-lm"), data("causal-lm"), tmp_path / "small", recipe=recipe, within=None,
        speedup="1.02@2x32", memory="0.15MB@2x32", loadability="any",
    )  # fmt: skip
    said: list[str] = []
    result = compress(given, say=said.append)
    table = LatencyTable.load(given.run_folder / "latency.json")
    assert (table.setting.batch_size, table.setting.length) == (2, 32)
    check = result.record["stages"]["check"]
    assert [verdict["budget"] for verdict in check["budgets"]] == ["speedup", "memory"]
    assert check["predicted_speedup"] > 1.02 and check["measured_speedup"] > 0
    assert check["budgets"][1]["met"] and any("speed-up predicted" in text for text in said)
    assert said.count("measuring latencies: prefill of 2x32 in float32") == 1
    before_it_searches = said[: said.index("measuring the damage of every option, cut alone and repaired")]
    assert any("  runs where     transformers " in text and ", vLLM " in text for text in before_it_searches)
    (given.run_folder / "latency.json").write_text("of another machine by now")
    assert silent(given).record["stages"]["check"] == check  # a finished run is told, whatever stands here


def test_a_run_that_another_process_works_at_is_left_alone(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    given = options(checkpoint("embedding"), data("embedding"), tmp_path / "small", recipe="fast")
    with only_worker(given.run_folder), pytest.raises(CheckpointError, match="another process is at work in "):
        silent(given)
    assert [file.name for file in given.run_folder.iterdir()] == [".lock"]
    assert silent(given).report.directory == tmp_path / "small"


def test_a_dry_run_of_other_options_leaves_a_run_alone(results: dict[str, Any]) -> None:
    given, _ = results["embedding"]
    before = {f: f.read_bytes() for f in given.run_folder.rglob("*") if f.is_file()}
    with pytest.raises(CheckpointError, match="holds a run with speedup=None, now '1.01'"):
        CompressRun(replace(given, speedup="1.01")).dry_run()
    CompressRun(given).dry_run()
    assert before == {f: f.read_bytes() for f in given.run_folder.rglob("*") if f.is_file()}


def test_a_speedup_out_of_reach_is_refused_before_anything_is_written(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    given = options(checkpoint("embedding"), data("embedding"), tmp_path / "small", within=None, speedup=1000)
    with pytest.raises(InfeasibleError, match="speed-up of 1000 cannot be reached"):
        silent(given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "shown"), [("fast", ()), ("balanced", ("training",)), ("best", ("training", "search"))]
)
def test_a_dry_run_tells_the_time_of_the_stages_that_the_recipe_has(
    checkpoint: Find, data: Find, tmp_path: Path, recipe: Any, shown: tuple[str, ...]
) -> None:
    given = options(checkpoint("embedding"), data("embedding"), tmp_path / "small", recipe=recipe, minutes=0.01)
    told = CompressRun(given, say=lambda text: None).dry_run()
    found = tuple(word for word in ("training", "search") if f"\n  {word}  " in told)
    assert found == shown and f"recipe         {recipe}\n  untrained      about 0." in told


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_table_shows_every_row_with_its_numbers(results: dict[str, Any], kind: str) -> None:
    _, result = results[kind]
    lines = result.table.splitlines()
    assert len(lines) == 2 + len(result.rows)
    for line, row in zip(lines[2:], result.rows, strict=True):
        assert line.startswith(row["name"]) and line.endswith(row["loadability"])


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_record_is_in_the_output_and_says_how_everything_ended(results: dict[str, Any], kind: str) -> None:
    given, result = results[kind]
    written = json.loads((Path(given.output) / "result.json").read_text())
    assert {name for name, stage in written["stages"].items() if stage.get("finished")} >= {
        "space", "train", "search", "specialise", "compare", "export",
    }  # fmt: skip
    assert written["stages"]["compare"]["rows"] == [dict(row) for row in result.rows]
    assert written["options"]["model"] == given.model
    exported = json.loads((Path(given.output) / "architecture.json").read_text())
    assert exported["architecture"] == dict(result.architecture) and exported["parent"] == given.model
    assert not list(given.run_folder.glob("training-*"))  # optimizer states are not kept


LOAD = """
import json, sys, torch, transformers
for folder, auto, remote in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=remote)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        out = model(**tokenizer("the small dog runs over the river.", return_tensors="pt"))[0]
    assert torch.isfinite(out).all()
    print("loaded", type(model).__name__)
assert "hf_elastic" not in sys.modules
"""


def test_every_result_loads_in_a_process_that_does_not_know_us(results: dict[str, Any], tmp_path: Path) -> None:
    autos = {"embedding": "AutoModel", "masked-lm": "AutoModelForMaskedLM", "causal-lm": "AutoModelForCausalLM",
             "classification": "AutoModelForSequenceClassification"}  # fmt: skip
    forms = {kind: result.report.loadability for kind, (_, result) in results.items()}
    folders = [[given.output, autos[kind], forms[kind] == "remote-code"] for kind, (given, _) in results.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(folders)], capture_output=True, text=True, env=environment,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = re.findall(r"loaded (\w+)", done.stdout)
    assert names[:3] == ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"]
    assert names[3] in ("LlamaForCausalLM", "ElasticLlamaForCausalLM")


def test_a_result_shows_itself_in_a_few_lines(results: dict[str, Any]) -> None:
    assert all(len(repr(result)) < 2000 for _, result in results.values())


def test_the_sentence_encoder_keeps_its_modules(results: dict[str, Any]) -> None:
    assert "\nsentence_transformers.SentenceTransformer(" in results["embedding"][1].report.snippet
    library = pytest.importorskip("sentence_transformers")
    given, _ = results["embedding"]
    encoder = library.SentenceTransformer(given.output, device="cpu")
    vectors = encoder.encode(tiny_checkpoints.sentences(3), convert_to_tensor=True)
    assert vectors.shape == (3, 32) and torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_a_finished_run_is_told_again_not_done_again(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given, result = results["embedding"]
    before = {f: f.stat().st_mtime_ns for f in Path(given.output).rglob("*") if f.is_file()}
    for name in ("train_phase", "search_subnets", "export", "plain_alternatives", "training_plan"):
        monkeypatch.setattr(f"hf_elastic.pipeline.run.{name}", lambda *a, **k: pytest.fail("done again"))
    said: list[str] = []
    again = compress(given, say=said.append)
    assert (again.table, again.architecture, again.rows) == (result.table, result.architecture, result.rows)
    assert again.report.files == result.report.files and said[0].startswith(result.table)
    assert "met: parameters <= " in said[1]
    assert before == {f: f.stat().st_mtime_ns for f in Path(given.output).rglob("*") if f.is_file()}


def test_an_output_that_was_deleted_is_written_again(results: dict[str, Any]) -> None:
    given, result = results["masked-lm"]
    output = Path(given.output)
    before = load_file(output / "model.safetensors")
    shutil.rmtree(output)
    assert silent(given).architecture == result.architecture
    after = load_file(output / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (output / "result.json").is_file()


def test_an_output_whose_work_is_gone_is_not_written_over(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    given = options(checkpoint("classification"), data("classification"), tmp_path / "small", recipe="fast")
    silent(given)
    shutil.rmtree(given.run_folder)
    with pytest.raises(CheckpointError, match=r"not empty and the work of its run, .*small\.run, is gone; choose"):
        silent(given)


def test_other_options_in_the_same_place_are_refused_and_named(results: dict[str, Any]) -> None:
    given, _ = results["embedding"]
    settings = {name: getattr(given, name) for name in ("minutes", "evaluations", "within")}
    for changes in ({"seed": 1}, {"within": {"parameters": 0.5}}, {"minutes": 2.0}, {"batch_size": 3}):
        other = options(Path(given.model), Path(given.data[0]), Path(given.output), **{**settings, **changes})
        with pytest.raises(CheckpointError, match=f"with {next(iter(changes))}=") as caught:
            silent(other)
        assert "\n" not in str(caught.value)


def test_other_text_under_the_same_name_is_noticed(checkpoint: Find, tmp_path: Path) -> None:
    given = options(checkpoint("embedding"), write_text(tmp_path / "t.txt"), tmp_path / "out")
    silent(given)
    write_text(tmp_path / "t.txt", seed=9)
    with pytest.raises(CheckpointError, match="made from another text under the same name"):
        silent(given)


def test_another_checkpoint_under_the_same_name_is_noticed(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint("embedding"), tmp_path / "model")
    given = options(model, data("embedding"), tmp_path / "out")
    silent(given)
    weights = load_file(model / "model.safetensors")  # trained on, say: one entry of one tensor
    next(iter(weights.values())).view(-1)[5] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for gone in (False, True):  # the export would be written again from what the run keeps
        if gone:
            shutil.rmtree(given.output)
        with pytest.raises(CheckpointError, match="made from another checkpoint under the same name") as caught:
            silent(given)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="the checkpoint .*model is not what .* was made from; restore it"):
        export_family(given.run_folder, [1.2], say=lambda text: None)


def test_training_leaves_a_decoder_its_cache(results: dict[str, Any]) -> None:
    given, _ = results["causal-lm"]
    assert json.loads((Path(given.output) / "config.json").read_text())["use_cache"] is True


def test_the_same_seed_gives_the_same_model(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    """Without training the number of steps is the same on every machine."""
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        torch.rand(ord(name))  # whatever the random state that libraries share
        made.append(silent(options(checkpoint("embedding"), data("embedding"), tmp_path / name, seed=seed)))
    rows = [[{k: v for k, v in row.items() if k != "latency"} for row in result.rows] for result in made]
    assert rows[0] == rows[1] and made[0].architecture == made[1].architecture
    assert rows[0] != rows[2]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _killed(
    checkpoint: Path, data: Path, tmp_path: Path, points: list[str], settings: dict[str, Any]
) -> list[tuple[str, str, list[str]]]:
    script = Path(__file__).with_name("killed_compress.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(data), str(tmp_path), json.dumps(settings), *points],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(folder: Path) -> dict[str, Any]:
    """What a result.json says, without times and without what is measured in seconds."""
    record = json.loads((folder / "result.json").read_text())
    stages = {n: {k: v for k, v in s.items() if k != "seconds"} for n, s in record["stages"].items()}
    for row in stages["compare"]["rows"]:
        row.pop("latency")
    stages["export"].pop("snippet")  # names the folder
    return {**record, "stages": stages}


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("embedding", list(POINTS)),
        pytest.param("masked-lm", ["training", "specialising"], marks=pytest.mark.slow),
        pytest.param("causal-lm", ["training", "specialising"], marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    checkpoint: Find, data: Find, tmp_path: Path, kind: str, points: list[str]
) -> None:
    ends = _killed(checkpoint(kind), data(kind), tmp_path, points, {})
    assert [end for _, end, _ in ends] == ["finished", *["killed"] * len(points), "finished"]
    for point, _, files in ends[1:-1]:
        if point == "exported":
            assert "architecture.json" in files and "model.safetensors" in files
        else:
            assert files == []  # nothing, rather than something half-written
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert numbers(killed) == numbers(whole)
    one, other = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for folder in ("", ".run"):  # the work too: no copy of anything half-written is left in it
        found = [{f.name for f in Path(f"{path}{folder}").iterdir()} for path in (whole, killed)]
        assert found[0] == found[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole.run", "killed", "killed.run"}


def test_a_run_to_a_speedup_that_was_killed_keeps_its_latencies(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    points = ["sorted half-written", "tables", "repair", "comparing", "exported"]
    asked = {"recipe": "fast", "within": None, "speedup": "1.3@2x12"}
    ends = _killed(checkpoint("causal-lm"), data("causal-lm"), tmp_path, points, asked)
    assert [end for _, end, _ in ends] == ["finished", *["killed"] * len(points), "finished"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert numbers(killed) == numbers(whole)
    assert numbers(whole)["stages"]["check"]["budgets"][0]["met"]
    tables = [(tmp_path / f"{name}.run" / "latency.json").read_bytes() for name in ("whole", "killed")]
    assert LatencyTable.load(tmp_path / "killed.run" / "latency.json").finished and tables[0] == tables[1]
    one, other = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_dry_run_trains_nothing_and_writes_nothing(
    checkpoint: Find, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_elastic.pipeline.run.train_phase", lambda *a, **k: pytest.fail("trained"))
    given = options(checkpoint("embedding"), data("embedding"), tmp_path / "out" / "small", minutes=0.5)
    text = CompressRun(given).dry_run()
    assert list(tmp_path.iterdir()) == []
    for words in (
        "architectures",
        "limits         parameters=0.7: ",
        "% of the space",
        "loading as stock",
        "0.5 min: ",
        "6 eval",
    ):
        assert words in text


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm", "classification", "decoder-classification"])
def test_a_dry_run_describes_every_task(checkpoint: Find, data: Find, tmp_path: Path, kind: str) -> None:
    given = options(checkpoint(kind), data(kind), tmp_path / "out", sequence_length=16)
    text = CompressRun(given).dry_run()
    assert "0 min: 0 steps" in text and list(tmp_path.iterdir()) == []


def test_without_training_the_answer_is_still_valid(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    result = silent(options(checkpoint("embedding"), data("embedding"), tmp_path / "out", minutes=0))
    assert result.record["stages"]["plan"]["supernet_steps"] == result.record["stages"]["plan"]["found_steps"] == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == result.rows[1]["total_parameters"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_without_a_token_for_padding_is_compressed_as_a_classifier(
    tmp_path: Path, data: Find, family: str
) -> None:
    folder = tiny_checkpoints.decoder_classifier(tmp_path / "model", family)
    given = options(folder, data("classification"), tmp_path / "out", sequence_length=32, minutes=0.002)
    result = silent(given)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id is not None
    assert model(torch.ones(3, 5, dtype=torch.long)).logits.shape == (3, 2)
    assert 0 <= result.rows[1]["accuracy"] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path: Path, data: Find, dtype: torch.dtype) -> None:
    folder = tiny_checkpoints.language_model(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    silent(options(folder, data("causal-lm"), tmp_path / "out", minutes=0.002))
    small = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in small.values()} == {dtype}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_space_whose_midpoint_is_too_large_is_searched(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    space = ElasticConfig(intermediate_size=[8, 16, 56], loadability="stock")
    given = options(
        checkpoint("embedding"), data("embedding"), tmp_path / "out", within={"parameters": 0.65}, space=space
    )
    result = silent(given)
    rows = {row["name"]: row for row in result.rows}
    assert rows["midpoint"]["parameters"] > 0.65 * rows["parent"]["parameters"] >= rows["found"]["parameters"]


def test_what_would_only_be_padded_is_written_compactly_where_remote_code_is_allowed(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": {0: [16], 1: [64]}}
    for loadability, form in (("any", "remote-code"), ("stock-padded", "stock-padded")):
        given = options(
            checkpoint("causal-lm"), data("causal-lm"), tmp_path / form, within={"parameters": 0.85},
            space=ElasticConfig(**sizes, loadability=loadability),
        )  # fmt: skip
        result = silent(given)
        assert result.report.loadability == result.rows[1]["loadability"] == form
        told = result.record["stages"]["check"]["lines"]
        assert any("filled up with zeros" in line for line in told) is (form == "stock-padded")
        with safe_open(tmp_path / form / "model.safetensors", framework="pt") as file:
            shape = file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape()
        assert shape == [16 if form == "remote-code" else 64, 32]


def _occupied(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not delete")


def _run_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("do not delete")


def _foreign_record(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "result.json").write_text('{"score": 3}')


def _nothing(tmp_path: Path) -> None:
    pass


BAD: list[tuple[str, Callable[[Path], None], dict[str, Any], type[ElasticError], str]] = [
    ("out", _occupied, {}, CheckpointError, "not empty and no run made it"),
    ("out", _run_of_someone_else, {}, CheckpointError, "holds something else"),
    ("out", _foreign_record, {}, CheckpointError, "format None"),
    ("t.txt", _nothing, {}, CheckpointError, "is a file"),
    ("t.txt/below/a/file", _nothing, {}, CheckpointError, "cannot write"),
    ("out", _nothing, {"within": {"parameters": 0.01}}, InfeasibleError, "smallest reachable"),
    ("out", _nothing, {"within": {"speed": 0.5}}, ElasticError, "'speed'.*known"),
    ("out", _nothing, {"within": {"macs": 0.02}, "loadability": "any"}, InfeasibleError, "macs|any layer"),
    ("out", _nothing, {"space": ElasticConfig(intermediate_size=[100_000])}, SpaceError, "100000"),
    ("out", _nothing, {"space": ElasticConfig(intermediate_size=[1.0])}, SpaceError, "nothing to choose"),
    ("out", _nothing, {"space": ElasticConfig(num_key_value_heads=[1])}, SpaceError, "num_attention_heads"),
    ("out", _nothing, {"task": "classification", "label_column": "text"}, ElasticError, "label"),
    ("out", _nothing, {"task": "masked-lm"}, UnsupportedModelError, "lacks"),
]


@pytest.mark.parametrize(("output", "prepare", "changes", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_cannot_work_is_said_before_anything_is_trained_or_written(
    checkpoint: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, prepare: Callable[[Path], None],
    changes: dict[str, Any], error: type[ElasticError], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("hf_elastic.pipeline.run.train_phase", lambda *a, **k: pytest.fail("trained"))
    text = write_text(tmp_path / "t.txt", count=400)
    prepare(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(error, match=words) as caught:
        silent(options(checkpoint("embedding"), text, tmp_path / output, **changes))
    assert "\n" not in str(caught.value)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_run_with_corrected_limits_can_start_where_a_refused_one_would_have(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    with pytest.raises(InfeasibleError):
        silent(options(checkpoint("embedding"), data("embedding"), tmp_path / "out", within={"parameters": 0.01}))
    silent(options(checkpoint("embedding"), data("embedding"), tmp_path / "out"))


def test_the_parent_is_left_as_it_was(tmp_path: Path, data: Find) -> None:
    folder = sentence_encoder(tmp_path / "encoder")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    silent(options(folder, data("embedding"), tmp_path / "out"))
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
