"""The whole path of ELM on tiny teachers: what each option does, what is written, and runs that were interrupted."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from elm_runs import options
from killed_elm import POINTS
from safetensors.torch import load_file
from tiny_checkpoints import language_model, sentences, write_rows, write_text

from hf_elastic import ElasticError, ElmOptions, ElmResult, Supernet, make_elm, objectives
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.pipeline import ElmRun, elm_run
from hf_elastic.pipeline.elm_data import read_texts
from hf_elastic.pipeline.elm_plan import plan_of
from hf_elastic.pipeline.elm_table import FOUND, FUSED, RETRAINED, TEACHER
from hf_elastic.pipeline.tasks import load_tokenizer
from hf_elastic.report import describe_folder

pytestmark = pytest.mark.usefixtures("nano")
Find = Callable[[str], Path]
NAMES = [TEACHER, FOUND, FUSED, RETRAINED]
STAGES = ["supernet", "search", "fusion", "retrain", "compare", "export"]


def silent(chosen: ElmOptions) -> ElmResult:
    return make_elm(chosen, say=lambda text: None)


def stages(result: ElmResult) -> dict[str, Any]:
    return dict(result.record["stages"])


def numbers(result: ElmResult) -> dict[str, Any]:
    """What a run found, without how long it took and where it is."""
    left = ("seconds", "snippet")
    return {name: {k: v for k, v in stage.items() if k not in left} for name, stage in stages(result).items()}


@pytest.fixture(scope="module")
def finished(
    checkpoint: Find, data: Find, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[ElmOptions, ElmResult, list[str]]]:
    """A finished run with every stage by its kind, made once; read only."""
    made: dict[str, tuple[ElmOptions, ElmResult, list[str]]] = {}

    def get(kind: str) -> tuple[ElmOptions, ElmResult, list[str]]:
        if kind not in made:
            said: list[str] = []
            output = tmp_path_factory.mktemp("finished") / "out"
            chosen = options(checkpoint(kind), data(kind), output, finetune=(str(data("classification")),))
            made[kind] = (chosen, make_elm(chosen, say=said.append), said)
        return made[kind]

    return get


Finished = Callable[[str], tuple[ElmOptions, ElmResult, list[str]]]
KINDS = ["masked-lm", "causal-lm"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_with_a_table_of_teacher_found_fused_and_retrained(kind: str, finished: Finished) -> None:
    chosen, result, said = finished(kind)
    assert [row["name"] for row in result.rows] == NAMES and list(stages(result)) == [
        *STAGES[:4], "finetune", *STAGES[4:]
    ]  # fmt: skip
    assert all(name in result.table for name in NAMES) and result.table in "\n".join(said)
    for row in result.rows[1:]:
        assert row["loss"] == pytest.approx(math.log(row["perplexity"])) and row["latency"] > 0
        assert len(row["blocks"]) == len(row["widths"]) == len(row["heads"]) == elm_layers(kind)
        assert row["loadability"] == "remote-code"
    assert result.rows[3]["perplexity"] < result.rows[1]["perplexity"]  # it was trained further
    assert result.rows[2]["total_parameters"] <= result.rows[1]["total_parameters"]
    assert stages(result)["search"]["within"] == {"total_parameters": stages(result)["supernet"]["budget"]}
    assert result.rows[1]["total_parameters"] <= stages(result)["supernet"]["budget"]
    assert result.rows[3]["accuracy"] == stages(result)["finetune"]["accuracy"]


def elm_layers(kind: str) -> int:
    return {"masked-lm": 3, "causal-lm": 2, "embedding": 3, "gpt2": 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_grow_to_the_budget_and_the_record_says_how(kind: str, finished: Finished) -> None:
    _, result, said = finished(kind)
    stage = stages(result)["supernet"]
    history = stage["growth"]
    start = {(layer, block): width for layer, block, width in history["start"]}
    assert set(start.values()) == {8} and history["budget"] == stage["budget"]
    grown = {(layer, block): after for entry in history["entries"] for layer, block, _, after in entry["grown"]}
    supernet = Supernet.from_pretrained(result.folder / "supernet")
    widths = {(part.index, block): part.width(block) for part in supernet.block_parts for block in part.blocks}
    assert widths == {**start, **grown} and grown
    assert stage["mean_parameters"] >= stage["budget"], "growth stopped below the budget"
    assert [entry["step"] for entry in stage["losses"]] == list(range(1, 13))
    for name in ("growth.html", "cka.html"):
        page = (result.folder / name).read_text()
        assert "plotly.min.js" in page and "https://cdn" not in page
    assert (result.folder / "plotly.min.js").stat().st_size > 10**6
    assert any(line.startswith("grown ") for line in said)
    assert any(line.startswith("runs where: transformers ") for line in said)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_may_keep_a_cache_as_before_training(kind: str, finished: Finished) -> None:
    chosen, result, _ = finished(kind)
    folders = [chosen.output_folder, chosen.output_folder / "classifier"]
    folders += [result.folder / name for name in ("supernet", "fused", "retrained")]
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True, folder


def test_nothing_is_left_in_the_run_but_what_it_keeps(finished: Finished) -> None:
    for kind in KINDS:
        _, result, _ = finished(kind)
        assert {file.name for file in result.folder.iterdir()} == {
            ".lock", "result.json", "supernet", "growth.html", "cka.html", "plotly.min.js", "search.db", "search.json",
            "fused", "retrained", "classifier",
        }  # fmt: skip
        assert {file.name for file in result.folder.parent.iterdir()} == {"out", "out.run"}


LOADED = """
import json, sys, torch, transformers
found = {{}}
for folder, auto in {folders!r}:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([tokenizer("the small dog sleeps near a river")["input_ids"]])
    with torch.no_grad():
        found[folder] = model(input_ids=ids).logits.double().sum().item()
assert not any(name.startswith("hf_elastic.") for name in sys.modules)
print(json.dumps(found))
"""


def test_what_is_exported_loads_where_hf_elastic_is_not(finished: Finished) -> None:
    folders = []
    for kind, auto in zip(KINDS, ("AutoModelForMaskedLM", "AutoModelForCausalLM"), strict=True):
        output = finished(kind)[0].output_folder
        folders += [(str(output), auto), (str(output / "classifier"), "AutoModelForSequenceClassification")]
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(folders=folders)], capture_output=True, text=True, check=False,
        cwd=Path(folders[0][0]).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().split("\n")[-1])
    for kind, (folder, auto) in zip(("masked-lm", "masked-lm", "causal-lm", "causal-lm"), folders, strict=True):
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        tokenizer = load_tokenizer(finished(kind)[0].compress)
        ids = torch.tensor([tokenizer("the small dog sleeps near a river")["input_ids"]])
        with torch.no_grad():
            assert found[folder] == pytest.approx(model(input_ids=ids).logits.double().sum().item(), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_has_the_perplexity_of_the_table(kind: str, finished: Finished) -> None:
    chosen, result, _ = finished(kind)
    auto = {"masked-lm": transformers.AutoModelForMaskedLM, "causal-lm": transformers.AutoModelForCausalLM}[kind]
    model = auto.from_pretrained(chosen.output_folder).eval()
    total, weight = 0.0, 0
    for batch in read_texts(chosen).reported:
        labels = batch["labels"][:, 1:] if kind == "causal-lm" else batch["labels"]
        with torch.no_grad():
            total += float(model(**batch).loss) * int((labels != -100).sum())
        weight += int((labels != -100).sum())
    assert total / weight == pytest.approx(result.rows[3]["loss"], rel=1e-5)


def test_a_finished_run_says_the_same_again_and_trains_nothing(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, result, said = finished("causal-lm")
    monkeypatch.setattr(elm_run, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(Supernet, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded again"))
    again: list[str] = []
    other = make_elm(chosen, say=again.append)
    assert (other.rows, other.table, other.architecture) == (result.rows, result.table, result.architecture)
    assert again == said[-len(again) :]
    assert result.table in describe_folder(chosen.output_folder) and result.table in describe_folder(result.folder)


def test_a_run_with_other_options_is_not_continued(finished: Finished) -> None:
    chosen, _, _ = finished("causal-lm")
    settings = {name: value for name, value in chosen.to_dict().items() if name not in ("teacher", "data", "finetune")}
    for name, value in (("seed", 1), ("fusion", "none"), ("threshold", 0.5)):
        changed = ElmOptions(
            chosen.teacher, chosen.data, chosen.output, finetune=chosen.finetune, **{**settings, name: value}
        )  # fmt: skip
        for call in (lambda run: run.run(), lambda run: run.dry_run()):
            with pytest.raises(ElasticError, match=f"holds a run with {name}="):
                call(ElmRun(changed, say=lambda text: None))


@pytest.mark.parametrize("kind", ["embedding", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_teachers_without_a_head_and_of_another_family_teach_too(
    kind: str, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    chosen = options(checkpoint(kind), data(kind), tmp_path / "out", distill="mse" if kind == "gpt2" else "relational")
    run = ElmRun(chosen, say=lambda text: None)
    plan = run.setting.distillation
    assert not isinstance(plan, bool) and plan.prediction == (None if kind == "embedding" else "kl")
    assert plan.state_distance == ("pearson" if kind == "embedding" else "mse")
    result = run.run()
    assert (result.rows[0]["perplexity"] is None) == (kind == "embedding")
    assert not (chosen.output_folder / "modules.json").exists()  # of pooling in the teacher's width


def run_with(checkpoint: Find, data: Find, output: Path, **changes: Any) -> tuple[ElmResult, dict[str, Any], Supernet]:
    """A run of ten steps: what it found, its rows by name, and its supernet."""
    chosen = options(checkpoint("masked-lm"), data("masked-lm"), output, **{"steps": 10, **changes})
    result = silent(chosen)
    rows = {row["name"]: row for row in result.rows}
    return result, rows, Supernet.from_pretrained(result.folder / "supernet")


def test_without_growth_all_blocks_have_one_width_and_resplit_heads_keep_their_parameters(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    result, rows, supernet = run_with(
        checkpoint, data, tmp_path / "out", growth=False, fusion="resplit", threshold=0.2
    )  # fmt: skip
    widths = {part.width(block) for part in supernet.block_parts for block in part.blocks}
    assert len(widths) == 1 and "growth" not in stages(result)["supernet"]
    assert not (result.folder / "growth.html").exists() and (result.folder / "cka.html").exists()
    assert rows[FOUND]["total_parameters"] == rows[FUSED]["total_parameters"]
    assert sum(rows[FUSED]["heads"]) < sum(rows[FOUND]["heads"])


def test_limits_budget_and_growth_are_as_asked_and_removed_heads_are_gone(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    result, rows, supernet = run_with(
        checkpoint, data, tmp_path / "out", within={"macs": 0.7}, total_parameters=27_000, growth_every=5, calc_freq=2,
        fusion="remove", threshold=0.2,
    )  # fmt: skip
    macs = objectives.macs(supernet)
    assert macs(supernet.space.canonical(result.architecture)) <= 0.7 * macs(supernet.space.largest())
    assert [entry["step"] for entry in stages(result)["supernet"]["growth"]["entries"]] == [5, 10]
    fused = stages(result)["fusion"]
    gone = fused["parameters_before"] - fused["parameters_after"]
    assert rows[FOUND]["total_parameters"] - rows[FUSED]["total_parameters"] == gone > 0
    assert sum(rows[FUSED]["heads"]) == sum(layer["after"] for layer in fused["layers"])
    assert fused["report"].startswith("head fusion (remove, CKA above 0.2)")


def test_without_fusion_or_teacher_new_weights_are_trained(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    result, rows, _ = run_with(
        checkpoint, data, tmp_path / "out", fusion="none", distill="none", weights="fresh"
    )  # fmt: skip
    assert "report" not in stages(result)["fusion"] and not (result.folder / "cka.html").exists()
    assert rows[FUSED]["perplexity"] == pytest.approx(rows[FOUND]["perplexity"], rel=1e-5)
    kept, fresh = (load_file(result.folder / name / "model.safetensors") for name in ("fused", "retrained"))
    name = "bert.embeddings.word_embeddings.weight"
    assert (kept[name] - fresh[name]).abs().mean() > 0.01


@pytest.mark.slow
def test_a_path_of_one_layer_may_be_left_as_it_was_found(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    result, rows, _ = run_with(checkpoint, data, tmp_path / "out", layers=1, retrain_epochs=0)
    assert len(rows[FOUND]["blocks"]) == 1 and stages(result)["retrain"]["steps"] == 0
    assert RETRAINED not in rows


def test_a_speedup_is_searched_for_in_a_table_and_held_against_a_measurement(checkpoint: Find, tmp_path: Path) -> None:
    teacher = language_model(tmp_path / "teacher", hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    text = write_text(tmp_path / "text.txt")
    chosen = options(teacher, text, tmp_path / "out", speedup="12@2x16", steps=10)
    said = ElmRun(chosen).dry_run()
    assert "latencies" in said and "prefill of 2x16 tokens" in said and not chosen.run_folder.exists()
    result = silent(chosen)
    found, stage = stages(result)["latency"], stages(result)["compare"]
    assert found["fastest"] <= found["bound"] == pytest.approx(found["teacher"] / 12 / 1.03)
    last = result.rows[1]
    assert last["latency"] <= found["bound"] * 1.05
    assert result.rows[0]["latency"] == pytest.approx(found["teacher"], rel=0.05)
    assert stage["lines"][0].startswith("met: a speed-up of 12 over the teacher")
    assert any(line.startswith("found") for line in stage["lines"])
    assert stages(result)["search"]["within"].keys() == {"predicted_latency"}
    with pytest.raises(ElasticError, match="speedup=500 cannot be reached"):
        silent(options(teacher, text, tmp_path / "other", speedup=500, steps=10))
    assert not (tmp_path / "other.run").exists()


def test_a_stream_gives_other_blocks_than_were_held_out_and_then_starts_again(checkpoint: Find, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=300)
    chosen = options(checkpoint("masked-lm"), rows, tmp_path / "out", stream=True)
    texts = read_texts(chosen)
    assert texts.stream is not None and plan_of(chosen, texts).epoch is None
    whole = sum(1 for _ in _blocks(read_texts(options(checkpoint("masked-lm"), rows, tmp_path / "out"))))
    first = [tuple(block["input_ids"]) for block in itertools.islice(texts.stream, 1000)]
    length = first.index(first[0], 1)
    assert first[length : 2 * length] == first[:length]  # it starts again, in the same order
    held = {tuple(row) for batch in (*texts.searched, *texts.reported) for row in _unmasked(batch)}
    assert len(held) == 8 and not held & set(first)
    assert 0.8 * whole <= length + 8 <= whole


def _blocks(texts: Any) -> Iterator[Any]:
    yield from texts.data.train
    for batch in (*texts.searched, *texts.reported):
        yield from batch["labels"]


def _unmasked(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]).tolist()


@pytest.mark.parametrize("ending", ["txt", pytest.param("csv", marks=pytest.mark.slow)])
def test_a_run_on_a_stream_ends_as_others_do_also_when_it_was_interrupted(
    ending: str, checkpoint: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = sentences(300)
    text = "\n\n".join(lines) if ending == "txt" else "\n".join(["text", *(f'"{line}"' for line in lines)])
    (tmp_path / f"data.{ending}").write_text(text)
    settings = {"stream": True, "fusion": "none", "retrain_epochs": 5, "steps": 10}
    both = [
        options(checkpoint("causal-lm"), tmp_path / f"data.{ending}", tmp_path / name, **settings)
        for name in ("whole", "broken")
    ]
    whole = silent(both[0])
    interrupt(monkeypatch, "hf_elastic.training.trainer.ElasticTrainer.training_step", call=7)
    with pytest.raises(KeyboardInterrupt):
        silent(both[1])
    said: list[str] = []
    assert numbers(make_elm(both[1], say=said.append)) == numbers(whole)
    assert said[0] == f"going on with {both[1].run_folder} at stage supernet from step 4"
    assert stages(whole)["retrain"]["steps"] == 5


def interrupt(patch: pytest.MonkeyPatch, name: str, *, call: int) -> None:
    """Lets the named function be interrupted at one of its calls, and only then."""
    import importlib

    module, owner, last = name.rsplit(".", 2)
    holder = getattr(importlib.import_module(module), owner) if owner[0].isupper() else importlib.import_module(
        f"{module}.{owner}"
    )  # fmt: skip
    function, calls = getattr(holder, last), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    patch.setattr(holder, last, counted)


BROKEN = ["search_paths", "save_static", "export", "compared", "export"]  # the classifier is exported first


def test_a_run_that_was_interrupted_at_many_points_goes_on_to_the_same_end(
    finished: Finished, data: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, whole, _ = finished("masked-lm")
    again = options(
        Path(chosen.teacher), Path(chosen.data[0]), tmp_path / "out", finetune=(str(data("classification")),)
    )  # fmt: skip
    for name, stage in zip(BROKEN, ("supernet", "search", "fusion", "finetune from step 14", "compare"), strict=True):
        said: list[str] = []
        with monkeypatch.context() as patch:
            interrupt(patch, f"hf_elastic.pipeline.elm_run.{name}", call=1)
            with pytest.raises(KeyboardInterrupt):
                make_elm(again, say=said.append)
        gone_on = [line for line in said if line.startswith("going on with")]
        assert gone_on == ([] if stage == "supernet" else [f"going on with {again.run_folder} at stage {stage}"])
        assert not again.output_folder.exists()
        assert "not finished: the same elm command goes on" in describe_folder(again.run_folder)
    result = silent(again)
    assert numbers(result) == numbers(whole)
    assert str(again.output_folder) in result.report.snippet
    for name in ("model.safetensors", "classifier/model.safetensors"):
        one, other = load_file(again.output_folder / name), load_file(chosen.output_folder / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_an_output_that_was_deleted_is_written_again(finished: Finished, checkpoint: Find, tmp_path: Path) -> None:
    import shutil

    chosen, result, _ = finished("causal-lm")
    for name in ("out", "out.run"):
        shutil.copytree(chosen.output_folder.parent / name, tmp_path / name)
    again = ElmOptions(
        chosen.teacher, chosen.data, str(tmp_path / "out"), finetune=chosen.finetune,
        **{k: v for k, v in chosen.to_dict().items() if k not in ("teacher", "data", "finetune")},
    )  # fmt: skip
    shutil.rmtree(again.output_folder)
    assert silent(again).rows == result.rows
    one, other = (load_file(place.output_folder / "model.safetensors") for place in (again, chosen))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("masked-lm", {}), ("causal-lm", {"latency": "1ms"})])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    kind: str, settings: dict[str, Any], checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    points = [point for point in POINTS if settings or point != "latency"]
    script = Path(__file__).with_name("killed_elm.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (checkpoint(kind), data(kind), data("classification"), tmp_path)),
         json.dumps(settings), *points],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ends = json.loads(done.stdout.strip().split("\n")[-1])
    assert [end for _, end, _ in ends] == ["finished", *["killed"] * len(points), "finished"]
    for point, _, files in ends[1:-1]:
        assert not files or point == "exported" and {"config.json", "classifier", ARCHITECTURE_FILE} <= set(files)
    whole, killed = (
        json.loads((tmp_path / name / "result.json").read_text())["stages"] for name in ("whole", "killed")
    )  # fmt: skip
    for stage in (*whole.values(), *killed.values()):
        stage.pop("seconds", None)
        stage.pop("snippet", None)
    assert whole == killed
    for name in ("model.safetensors", "classifier/model.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole.run", "killed", "killed.run"}
