"""The benchmark scripts run, judge their bars and write what they found; the numbers themselves are not tested."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoints import options, sentence_encoder, write_text

from hf_elastic import compress

pytestmark = pytest.mark.usefixtures("scripts")


def script(name: str) -> ModuleType:
    return import_module(name)


def test_a_median_of_equal_values_has_an_interval_of_no_width() -> None:
    found = script("measuring").interval([2.0] * 9)
    assert (found.median, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 9)


def test_the_interval_of_a_median_mostly_holds_the_true_one() -> None:
    rng = random.Random(0)
    intervals = [script("measuring").interval([rng.gauss(1.0, 0.1) for _ in range(15)]) for _ in range(100)]
    assert sum(i.low <= 1.0 <= i.high for i in intervals) >= 88


@pytest.mark.parametrize(
    ("kind", "value", "met"),
    [("at most", 0.9, False), ("at most", 1.0, True), ("at least", 1.2, False), ("at least", 1.1, True)],
)
def test_a_bar_is_met_when_the_interval_reaches_it(kind: str, value: float, met: bool) -> None:
    measuring = script("measuring")
    found = measuring.Interval(median=1.05, low=0.95, high=1.15, count=9)
    assert measuring.Bar(kind, value).met(found) is met


def test_pairs_are_timed_in_alternating_order() -> None:
    called: list[str] = []
    clock = iter(range(100)).__next__
    pairs = script("measuring").paired_seconds(
        lambda: called.append("a"), lambda: called.append("b"), pairs=3, warmup=1, clock=clock
    )
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert pairs == [(1, 1)] * 3


def test_the_backbone_benchmark_measures_every_part_of_every_family(tmp_path: Path) -> None:
    backbone, file = script("backbone"), tmp_path / "backbone.json"
    tiny = "--layers 2 --hidden 192 --batch 1 --length 8 --pairs 2 --switches 20"
    backbone.main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    for family in ("bert", "llama", "gpt2"):
        rows = [row for row in found["rows"] if row["family"] == family]
        measured = [(row["first / second"].split(" / ")[0], row["pass"]) for row in rows]
        both = ["forward", "forward+backward"]
        subjects = ["stock", "elastic", "active", "active", "stock", "stock"]
        assert measured == [*((s, p) for s in subjects for p in both), ("ms of a switch", "4 layers")]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found["rows"])
    assert found["environment"]["torch"] == torch.__version__


def test_the_adapter_benchmark_measures_times_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "lora.json"
    tiny = "--families llama gpt2 --layers 1 --hidden 128 --batch 2 --length 64 --pairs 2"
    script("elastic_lora").main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    passes = ["forward", "forward+backward", "step"]
    for family in ("llama", "gpt2"):
        rows = [(row["what"], row["pass"]) for row in found["times"] if row["family"] == family]
        assert sorted(rows) == sorted((what, p) for what in ("control", "largest", "random") for p in passes)
        memory = {row["what"]: row for row in found["memory"] if row["family"] == family}
        assert memory["memory, largest"]["ratio"] == pytest.approx(1.0, abs=0.1)
        assert 0 < memory["memory, random"]["ratio"] <= 1.1
    assert "What elastic adapters cost" in script("render").page({"elastic-lora": found})


def test_the_benchmark_of_adapters_on_stories_reports_every_method(tmp_path: Path, data_dir: Path) -> None:
    file = tmp_path / "stories.json"
    quick = "--seeds 0 --steps 2 --batch-size 2 --tokens 32 --stories 60 --pieces 8 --evaluations 4"
    script("stories_adapters").main([*quick.split(), "--data", str(data_dir), "--json", str(file)])
    rows = json.loads(file.read_text())["summary"]
    whole = [row["method"] for row in rows if not row["subnet"]]
    assert whole == ["parent", "fixed-rank LoRA, 8", "fixed-rank LoRA, 4"]
    found = {row["method"]: row for row in rows if row["subnet"].startswith("found")}
    assert found["Mode B"]["MACs, merged"] <= 0.8 and found["Mode A"]["MACs, merged"] == 1.0
    assert "stories260K" in script("render").page({"stories-adapters": json.loads(file.read_text())})


def scanned(tokens: list[int], pieces: Sequence[str], scores: Sequence[float]) -> list[int]:
    """The loop of llama2.c: the best-scored pair of all, the first of equals, until nothing merges."""
    while True:
        best: tuple[float, int, int] | None = None
        for place in range(len(tokens) - 1):
            joined = pieces[tokens[place]] + pieces[tokens[place + 1]]
            if joined in pieces and (best is None or scores[pieces.index(joined)] > best[0]):
                best = (scores[pieces.index(joined)], place, pieces.index(joined))
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def test_the_tokenizer_merges_in_the_order_of_llama2c() -> None:
    pieces = ["<unk>", "<s>", "</s>", " ", "a", "b", "ab", "ba", "aa", " a", "aba", "abab", "aaa", "bb", " ab"]
    rng = random.Random(0)
    for _ in range(200):
        scores = [float(rng.randrange(5)) for _ in pieces]  # with ties
        text = "".join(rng.choice("aab c") for _ in range(rng.randrange(1, 30)))
        start = [pieces.index(c) if c in pieces else 0 for c in " " + text]
        encoded = script("llama2c_tokenizer").Llama2cTokenizer(pieces, scores).encode(text)
        assert encoded == [1, *scanned(start, pieces, scores)]


def test_a_character_outside_the_vocabulary_becomes_its_bytes_where_there_are_bytes() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), " "]
    tokenizer = script("llama2c_tokenizer").Llama2cTokenizer(pieces, [0.0] * len(pieces))
    assert tokenizer.encode("é") == [1, 259, *(3 + byte for byte in "é".encode())]


def test_the_stories_benchmark_reports_every_stage(tmp_path: Path, data_dir: Path) -> None:
    file = tmp_path / "stories.json"
    tiny = "--models babyllama105 --stories 24 --pieces 4 --tokens 32 --steps 2 --last-steps 1 --evaluations 4 --alone"
    script("stories").main([*tiny.split(), "--data", str(data_dir), "--json", str(file)])
    rows = json.loads(file.read_text())["results"][0]["rows"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == [
        "parent", "cut, not sorted", "cut, sorted", "supernet trained", "found subnet trained on", "one subnet alone",
    ]  # fmt: skip
    assert all(row["perplexity"] > 1 for row in rows)
    assert all(row["parameters"] <= 0.6 for row in rows if row["subnet"].startswith("found"))


def test_the_stories_benchmark_says_which_data_it_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("stories").main(["--data", str(tmp_path)])
    assert not stopped.value.code
    assert "HF_ELASTIC_DATA" in capsys.readouterr().out


def test_the_tokenizer_gives_the_documented_perplexity(data_dir: Path) -> None:
    stories = script("stories")
    model = stories.MODELS["babyllama105"]
    parent, tokenizer = stories.load_parent(stories.checked_data(data_dir), "babyllama105")
    found = stories.measured_perplexity(parent, tokenizer, model.validation(data_dir))
    assert found == pytest.approx(model.documented, abs=0.01)


def test_the_exact_front_benchmark_times_every_front_of_spaces_of_the_stated_size(tmp_path: Path) -> None:
    exact, file = script("exact_front"), tmp_path / "exact-front.json"
    tiny = "--encoder-layers 2 --decoder-layers 3 --repeats 2"
    exact.main([*tiny.split(), "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["space"], row["front"].removeprefix("damage x ")) for row in rows] == [
        ("encoder", "macs"), ("encoder", "parameters"),
        ("decoder", "macs"), ("decoder", "parameters"), ("decoder", "nanoseconds"),
    ]  # fmt: skip
    assert rows[2]["architectures"] == "8.00e3"
    assert all(row["points"] > 10 and row["low"] <= row["seconds"] <= row["slowest"] for row in rows)


def test_the_made_up_damages_grow_as_sizes_shrink() -> None:
    exact = script("exact_front")
    supernet = exact.supernet_of("bert", exact.Size(layers=2, hidden=384, heads=12, positions=8, vocabulary=32))
    for row in exact.quality_table(supernet, seed=0).damages:
        for sublayer in ("mlp", "attention"):
            sizes = sorted(int(name.partition("/")[2]) for name in row if name.startswith(sublayer))
            damages = [row[f"{sublayer}/{size}"] for size in sizes]
            assert damages == sorted(damages, reverse=True) and damages[-1] == 0 and sizes[0] == 0
        assert row["layer"] > row["mlp/0"] + row["attention/0"]


def test_the_memory_benchmark_measures_each_phase_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "refit-memory.json"
    tiny = (
        "--layers 3 --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 64 --batch 2 --length 64 "
        "--tokens 256 --held-tokens 64 --latency-seconds 0.1 --phases refit quality"
    )
    script("refit_memory").main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    assert [row["phase"] for row in found["rows"]] == ["refit", "quality"]
    for row in found["rows"]:
        assert row["peak GiB"] > row["baseline GiB"] > 0
        assert row["beyond GiB"] == pytest.approx(row["peak GiB"] - row["baseline GiB"] - row["weights GiB"])
    assert "up to 128 inputs" in found["rows"][0]["work"] and "evaluated" in found["rows"][1]["work"]


def test_a_peak_is_found_with_and_without_the_kernels_help(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script("refit_memory")

    def held() -> int:
        before = memory.resident()
        with memory.Peak("cpu") as peak:
            block = torch.ones(2**26, dtype=torch.uint8)
            time.sleep(0.1)
            del block
        return peak.value - before

    assert held() > 2**25
    monkeypatch.setattr(memory.Path, "write_text", failing)
    assert held() > 2**25


def failing(*_: object, **__: object) -> None:
    raise PermissionError("not here")


def test_the_benchmark_without_training_measures_every_model_at_every_limit(tmp_path: Path, data_dir: Path) -> None:
    file = tmp_path / "stories-fast.json"
    tiny = (
        "--models babyllama105 --stories 60 --pieces 4 --tokens 64 --seeds 2 --within 0.6 --calibration-tokens 800 "
        "--held-tokens 128 --sizes 3 --architectures 3 --recover 0.01"
    )
    script("stories_fast").main([*tiny.split(), "--data", str(data_dir), "--json", str(file)])
    (found,) = json.loads(file.read_text())["results"]
    assert [row["what"] for row in found["rows"]] == [
        "parent", "dropped layers", "uniform width, cut", "uniform width, refit", "exact answer, cut",
        "exact answer, refit", "exact answer, refit, 0.01 min of training",
    ]  # fmt: skip
    values = {row["what"]: row["perplexity"] for row in found["rows"]}
    assert values["parent"] < values["exact answer, refit"] < values["exact answer, cut"]
    assert [row["seeds"] for row in found["rows"]] == [1, *[2] * 6]
    assert all(row["parameters"] <= 0.606 for row in found["rows"][1:])
    assert found["additivity"]["architectures"] == 3 and set(found["architectures"]) == {"0", "1"}


def a_run(folder: Path, *, seed: int, recipe: str = "fast") -> str:
    """What ``compress`` notes about a run without a search, as far as it is read."""
    rows = [
        {"name": name, "parameters": size, "total_parameters": 2 * size, "macs": size, "latency": size / 100,
         "structure": 1.0, "cosine": 1.0, "loadability": "stock", "architecture": {"width": size}}
        for name, size in (("parent", 100), ("found", 60))
    ]  # fmt: skip
    stages = {"repair": {"architecture": {"width": 60}, "seconds": 30.0}, "compare": {"rows": rows, "seconds": 30.0}}
    if recipe == "balanced":
        stages["plan"] = {"supernet_steps": 0, "found_steps": 7}
    folder.mkdir()
    options = {"recipe": recipe, "seed": seed, "within": {"macs": 0.6}, "data": [str(folder)]}
    (folder / "result.json").write_text(json.dumps({"options": options, "stages": stages}))
    return str(folder)


@pytest.fixture
def judged_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of minilm.py with a folder of data, and similarities that the name of a model decides."""
    pairs = tmp_path / "data" / "glue" / "stsb_dev.jsonl"
    pairs.parent.mkdir(parents=True)
    pairs.write_text('{"sentence1": "a", "sentence2": "b", "score": 1.0}\n')
    values = {"parent": 0.8, "one": 0.78, "two": 0.79}
    monkeypatch.setattr(script("minilm"), "sts", lambda model, rows: values[Path(model).name])
    return ["--parent", "parent", "--data", str(tmp_path / "data"), "--json", str(tmp_path / "found.json")]


@pytest.mark.parametrize(("recipe", "trained"), [("fast", "Nothing was trained"), ("balanced", "7 for the subnet")])
def test_runs_without_a_search_are_judged_over_their_seeds(
    tmp_path: Path, judged_runs: list[str], recipe: str, trained: str
) -> None:
    runs = [a_run(tmp_path / name, seed=seed, recipe=recipe) for seed, name in enumerate(("one", "two"))]
    script("minilm").main([*runs, *judged_runs, "--bar", "0.95"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["architecture"] == {"width": 60} and str(tmp_path) not in json.dumps(found)
    assert [(row["seed"], row["kept"]) for row in found["outputs"]] == [(0, 0.78 / 0.8), (1, 0.79 / 0.8)]
    assert found["summary"]["kept"] == pytest.approx(0.785 / 0.8) and found["summary"]["met"] is True
    page = script("render").page({f"minilm-{recipe}": found})
    assert f"recipe `{recipe}`" in page and trained in page and ">= 0.95, met" in page


def test_runs_of_different_options_are_not_averaged(tmp_path: Path, judged_runs: list[str]) -> None:
    runs = [a_run(tmp_path / "one", seed=0), a_run(tmp_path / "two", seed=1, recipe="balanced")]
    with pytest.raises(SystemExit, match="differ in their seeds alone"):
        script("minilm").main([*runs, *judged_runs])


def test_the_page_is_made_of_the_results_alone() -> None:
    render = script("render")
    results = {file.stem: json.loads(file.read_text()) for file in sorted(render.RESULTS.glob("*.json"))}
    assert render.PAGE.read_text(encoding="utf-8") == render.page(results)
    assert "##" not in render.page({})


def test_each_new_result_has_a_section_with_its_verdict() -> None:
    made = {"torch": "0"}
    row = {"space": "decoder", "points": 9, "bar": "<= 10", "met": "yes"}
    sizes = {"layers": 2, "hidden": 8, "intermediate": 16, "device": "cpu", "tokens": 32}
    timed = {"layers": 2, "hidden": 8, "batch": 1, "length": 4, "architectures": 3, "clock": "cpu"}
    kept = [("parent", 1.0, 1.0), ("uniform width, refit", 0.6, 3.0), ("exact answer, refit", 0.6, 2.0),
            ("exact answer, refit, 1 min of training", 0.6, 1.5), ("uniform width, refit", 0.8, 1.5),
            ("exact answer, refit", 0.8, 1.6)]  # fmt: skip
    sums = {"architectures": 3, "rank correlation": 0.5, "mean ratio": 1.2}
    model = {
        "model": "a", "additivity": sums, "seconds": {"0": {"sort": 1.0}},
        "rows": [{"what": what, "limit": limit, "perplexity": value} for what, limit, value in kept],
    }  # fmt: skip
    page = script("render").page({
        "exact-front": {"environment": made, "rows": [row]},
        "refit-memory": {"environment": made, "settings": sizes, "rows": [{**row, "bar": "<= 2"}]},
        "predicted-speedup": {"environment": made, "options": timed, "worst": [{**row, "met": "NO"}]},
        "stories-fast": {
            "environment": made, "settings": {"seeds": 3, "calibration_tokens": 99}, "results": [model],
        },
    })  # fmt: skip
    assert "| decoder | 9 | <= 10 | yes |" in page and "| <= 2 | yes |" in page and "| <= 10 | NO |" in page
    assert "Bar at 60%: met, 80%: **NOT met**." in page
    assert page.count("Measured with") == 4


def test_the_recover_benchmark_judges_and_times_a_run(
    tmp_path: Path, judged_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = sentence_encoder(tmp_path / "parent"), write_text(tmp_path / "text.txt", count=400)
    compress(options(model, text, tmp_path / "one", recipe="fast"), say=lambda line: None)
    benchmark = script("minilm_recover")
    monkeypatch.setattr(benchmark, "TIMED_SECONDS", 0.1)
    values = {"parent": 0.8, "one": 0.76, "recovered": 0.79}
    monkeypatch.setattr(script("minilm"), "sts", lambda place, rows: values[Path(place).name])
    given = [str(tmp_path / "one"), *judged_runs, "--minutes", "0.01"]
    given[given.index("parent")] = str(model)
    benchmark.main(given)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["kept"] for row in found["stsb"]] == [1.0, 0.76 / 0.8, 0.79 / 0.8]
    assert found["bars"]["STS-B >= 0.98 of the parent's"] is True and found["speedup"] > 0 and found["steps"] >= 1
    assert str(tmp_path) not in json.dumps(found)
    page = script("render").page({"minilm-recover": found})
    assert "| one |" not in page and "0.01 min of recover()" in page and "of the parent's: met; speed-up" in page


def test_a_result_that_the_page_would_not_show_is_refused() -> None:
    render = script("render")
    shown = {file.stem for file in render.RESULTS.glob("*.json")}
    assert shown <= set(render.MINILM) | set(render.SECTIONS) | render.ELSEWHERE
    with pytest.raises(SystemExit, match="no section of the page is about stories1M"):
        render.page({"stories1M": {}})


def test_the_benchmark_of_predictions_judges_the_worst_of_each_phase(tmp_path: Path) -> None:
    file = tmp_path / "predicted-speedup.json"
    tiny = (
        "--families llama --architectures 2 --layers 2 --hidden 96 --heads 4 --vocabulary 64 --batch 1 --length 8 "
        "--table-seconds 0.1 --seconds 0.1"
    )
    script("predicted_speedup").main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    assert [row["phase"] for row in found["worst"]] == ["prefill", "decode"]
    assert all(row["worst"] >= row["mean"] >= 0 and row["met"] in ("yes", "NO") for row in found["worst"])
    assert len(found["rows"]) == 6 and str(tmp_path) not in json.dumps(found)
    assert "Predicted against measured" in script("render").page({file.stem: found})


def test_the_benchmark_of_growth_judges_scores_at_both_widths_and_a_growth(tmp_path: Path) -> None:
    file = tmp_path / "elm.json"
    tiny = (
        "--layers 2 --hidden 32 --heads 4 --start 8 --largest 24 --batch 2 --length 16 --calc-freq 3 --count 3 "
        "--pairs 2 --idle-pairs 3 --growths 2"
    )
    script("elm").main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    assert [(row["what"], row["width"]) for row in found["rows"]] == [("scores", 8), ("growth", 8), ("scores", 24)]
    assert all(row["low"] <= row["share"] <= row["high"] and row["met"] in ("yes", "NO") for row in found["rows"])
    assert str(tmp_path) not in json.dumps(found)
    assert "what PCA growth costs" in script("render").page({file.stem: found})


@pytest.mark.slow
def test_the_wait_at_the_start_is_measured_against_its_bars(tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    script("startup").main(["--pairs", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["bar"] for row in rows] == ["<= 1", "<= 0.3", ""]
    assert all(row["met"] in ("yes", "NO") for row in rows[:2]) and rows[2]["ratio"] > 0
    assert "What one waits for at the start" in script("render").page({file.stem: json.loads(file.read_text())})


@pytest.mark.slow
def test_the_figures_of_a_device_cover_subnets_routing_and_commands(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    sizes = "--layers 4 --hidden 32 --intermediate 64 --heads 4 --kv-heads 2 --experts 4 --vocabulary 64"
    work = "--batch 2 --length 16 --tokens 128 --steps 1 --pairs 2 --group-size 16 --workloads 1x16 2x16d --routed 1x16"
    script("gpu").main([*f"--device cpu {sizes} {work}".split(), "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["workload"] for row in rows["subnets"]} == {"prefill 1x16", "decode 2x16"}
    assert all(row["MACs left"] < 1 and row["ms"] > 0 for row in rows["subnets"])
    assert len(rows["active"]) == 10 and len(rows["routing"]) == 5
    assert all(row["MACs left"] < 1 for row in rows["routing"] if row["half of"] != "nothing")
    assert all(row["seconds"] > 0 and row["peak GiB"] > 0 for row in rows["commands"])
    assert [row["command"] for row in rows["commands"]] == [
        "sort_by_importance_", "refit", "measure_quality_table", "measure_latency_table", "export",
        "1 training steps, one subnet a step", "1 training steps, sandwich rule, distilled",
        "1 training steps, elastic LoRA, one subnet a step", "merge of elastic LoRA",
        "sparsify_ (wanda)", "quantize_ (rtn)", "quantize_ (gptq)",
    ]  # fmt: skip
    assert "## On a GPU" in script("render").page({file.stem: json.loads(file.read_text())})


@pytest.mark.slow
def test_the_routing_benchmark_measures_every_kind_in_every_family(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    tiny = "--layers 2 --hidden 32 --heads 4 --experts 4 --length 32 --pairs 2 --threads 1"
    script("routing").main([*tiny.split(), "--json", str(file)])
    found = json.loads(file.read_text())
    prefill = [row for row in found["rows"] if "MACs left" in row]
    assert {row["family"] for row in prefill} == {"bert", "llama", "gpt2"} and len(prefill) == 18
    assert all(row["MACs left"] < 1 for row in prefill if row["half"] != "full")
    judged = [row for row in prefill if row.get("met")]
    assert len(judged) == 6 and all(row["met"] in ("yes", "NO") for row in judged)
    assert len(found["routers"]) == 12 and str(tmp_path) not in json.dumps(found)
    assert "the time that it saves" in script("render").page({file.stem: found})


@pytest.mark.slow
def test_the_benchmark_of_routing_quality_tells_what_is_lost_at_the_papers_points(
    tmp_path: Path, data_dir: Path
) -> None:
    file = tmp_path / "routing-stories260K.json"
    tiny = "--kinds mlp_tokens experts --capacities 0.56 0.8 --steps 4 --seeds 0 --held-out 8 --fit-rows 8"
    folders = ["--data", str(data_dir), "--output", str(tmp_path / "out")]
    script("routing_quality").main(["stories260K", *folders, "--json", str(file), "--", *tiny.split()])
    found = json.loads(file.read_text())
    assert {(row["kind"], round(row["capacity"], 2)) for row in found["bars"] if row["method"] == "fitted"} == {
        ("mlp_tokens", 0.8), ("experts", 0.56)
    }  # fmt: skip
    for row in found["bars"]:
        (told,) = [
            each["loss"] / found["parent"]["loss"] - 1
            for each in found["table"]
            if all(each[name] == row[name] for name in ("kind", "method", "capacity"))
        ]
        assert row["lost"] == pytest.approx(told) and row["met"] == (told <= 0.01)
    assert str(tmp_path) not in json.dumps(found) and str(data_dir) not in json.dumps(found)
    assert "Routing on a real model: stories260K" in script("render").page({file.stem: found})
