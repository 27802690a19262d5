"""The comparison with rivals asks, times and judges rightly; stand-ins of stock transformers take the rivals' place."""

from __future__ import annotations

import argparse
import ast
import copy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SERVED = ("rival_serving", "rival_torch_pruning", "rival_whittle")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the scripts importable as they are when run, and puts the number of threads back."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def script(name: str) -> ModuleType:
    return import_module(name)


STAND_IN = f"""
import os, sys, time
sys.path.insert(0, {str(FOLDER)!r})
from rival_serving import serve

def make(stopwatch):
    def double(value):
        print("a library talks")
        os.write(1, b"and so does its C part\\n")
        time.sleep(1.0)
        return {{"value": stopwatch(lambda: time.sleep(0.05) or 2 * value)}}
    def end():
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
    return {{"double": double, "end": end, "hang": lambda: time.sleep(60)}}

serve(make)
"""


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Any]:
    """Starts a rival of three steps in a process of its own."""

    def start(**options: Any) -> Any:
        file = tmp_path / "stand_in.py"
        file.write_text(STAND_IN)
        made = {"log": tmp_path / "log", "options": ["--clock", "wall"], **options}
        return script("rival_process").Rival(Path(sys.executable), file, **made)

    return start


def test_only_what_a_step_times_is_counted_and_what_it_prints_is_no_answer(started: Callable[..., Any]) -> None:
    with started() as rival:
        found = [rival.run("double", value=value) for value in (3, 5)]
    assert [answer.found["value"] for answer in found] == [6, 10]
    assert all(0.05 <= answer.seconds < 1.0 for answer in found)
    assert rival.process.poll() == 0


def test_a_step_that_fails_leaves_the_rival_running_and_an_end_tells_its_last_words(
    started: Callable[..., Any],
) -> None:
    error = script("rival_process").RivalError
    with started() as rival:
        with pytest.raises(error, match="stand_in failed in double: TypeError"):
            rival.run("double", other=3)
        assert rival.run("double", value=1).found == {"value": 2}
        with pytest.raises(error, match="stand_in ended in end: the last words"):
            rival.run("end")
        with pytest.raises(error, match="stand_in ended"):
            rival.run("double", value=1)


def test_a_rival_that_hangs_is_ended(started: Callable[..., Any]) -> None:
    with started() as rival:
        rival.run("double", value=1)  # is up
        rival.patience = 0.5
        with pytest.raises(script("rival_process").RivalError, match=r"no answer to hang in 0\.5 s"):
            rival.run("hang")
    assert rival.process.poll() is not None


def test_calls_in_turns_each_come_first_in_turn() -> None:
    called: list[int] = []

    def made(number: int) -> Callable[[], float]:
        return lambda: called.append(number) or float(number)

    found = script("rival_process").in_turns([made(0), made(1), made(2)], rounds=3, warmup=1)
    assert called == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert found == [(0.0, 1.0, 2.0)] * 3


def fake_pip(folder: Path, body: str) -> None:
    """An environment whose Python does what a line of shell says."""
    python = folder / "some" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)


def environment(*commands: tuple[str, ...]) -> Any:
    return script("rival_process").Environment("some", "some==1.0", commands, "rival_some.py")


def test_an_environment_is_made_once_and_anew_when_its_commands_change(tmp_path: Path) -> None:
    fake_pip(tmp_path, f'echo "$@" >> {tmp_path}/said')
    installed = script("rival_process").installed
    wanted = (("install", "a==1"), ("uninstall", "-y", "b"))
    for _ in range(2):
        assert installed(environment(*wanted), tmp_path) == tmp_path / "some" / "bin" / "python"
    assert (tmp_path / "said").read_text().splitlines() == ["-m pip install a==1", "-m pip uninstall -y b"]
    installed(environment(("install", "a==2")), tmp_path)
    assert (tmp_path / "said").read_text().splitlines()[2:] == ["-m pip install a==2"]


def test_a_rival_that_cannot_be_installed_is_a_line_with_the_reason(tmp_path: Path) -> None:
    fake_pip(tmp_path, 'echo "ERROR: no some for this Python" >&2; echo "a notice about pip" >&2; exit 1')
    rivals = script("rivals")
    options = rivals.parsed(["--work", str(tmp_path)])
    (found,) = rivals.rows_of(environment(("install", "some==1.0")), failing, options=options)
    assert tuple(found) == script("comparing").COLUMNS
    assert (found["part"], found["against"], found["met"]) == ("rivals", "some 1.0", "")
    assert found["note"] == "some==1.0 cannot be installed: ERROR: no some for this Python"
    assert not (tmp_path / "some" / "installed.json").exists()


def failing(*_: object, **__: object) -> Iterator[Any]:
    raise AssertionError("there is nothing to compare with")
    yield


@pytest.mark.parametrize("name", SERVED)
def test_what_the_rivals_python_runs_imports_nothing_of_ours(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {file.stem for file in FOLDER.glob("*.py")} - {"rival_serving"} | {"hf_elastic"}
    assert not {module.partition(".")[0] for module in imported} & ours


class Masked:
    """whittle's stand-in: a stock LLaMA whose units outside the subnet have zero weights on both of their sides."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale, self.steps = scale, []

    def run(self, step: str, **given: Any) -> Any:
        self.steps.append(step)
        found = getattr(self, step)(**given) or {}
        return script("rival_process").Answer(2.0, found)

    def about(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "transformers": transformers.__version__, "litgpt": "none"}

    def load(self, folder: str) -> dict[str, Any]:
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.ids = torch.load(f"{folder}/ids.pt")
        with torch.no_grad():
            logits = self.model(self.ids).logits
        torch.save({"litgpt": logits, "whittle": logits * self.scale}, f"{folder}/theirs.pt")
        return {"dtype": "torch.float32"}

    def masked(self, shape: Any) -> Any:
        model = copy.deepcopy(self.model)
        per_group = model.config.num_attention_heads // model.config.num_key_value_heads
        layers = zip(model.model.layers, shape["widths"], shape["groups"], strict=True)
        with torch.no_grad():
            for layer, width, groups in layers:
                size = layer.self_attn.head_dim * groups
                layer.mlp.gate_proj.weight[width:] = layer.mlp.up_proj.weight[width:] = 0
                layer.mlp.down_proj.weight[:, width:] = 0
                layer.self_attn.v_proj.weight[size:] = 0
                layer.self_attn.o_proj.weight[:, per_group * size :] = 0
        return model

    def forward(self, model: str) -> None:
        assert model in ("whittle", "litgpt")

    def switch(self, shapes: list[Any]) -> None:
        assert len(shapes) == 50

    def active(self, shape: Any, out: str | None = None) -> None:
        with torch.no_grad():
            found = self.masked(shape)(self.ids).logits
        if out is not None:
            torch.save(found, out)

    def train(self, shape: Any) -> dict[str, Any]:
        model = self.masked(shape)
        loss = cross_entropy(model(self.ids).logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
        loss.backward()
        norm = torch.stack([weight.grad.square().sum() for weight in model.parameters()]).sum().sqrt()
        return {"loss": loss.item(), "gradient": norm.item()}

    def extract(self, shape: Any, out: str | None = None) -> dict[str, Any]:
        self.active(shape, out)
        config = self.model.config
        head, per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        rows = 3 * shape["widths"][0] + (2 + 2 * per_group) * head * shape["groups"][0] + 2
        whole = 2 * config.vocab_size + config.num_hidden_layers * rows + 1
        return {"parameters": config.hidden_size * whole}

    def save(self, shape: Any, folder: str) -> None:
        config, (width, *_), (groups, *_) = self.model.config, shape["widths"], shape["groups"]
        size = config.head_dim * groups
        rows = {"gate_proj": width, "up_proj": width, "k_proj": size, "v_proj": size}
        rows["q_proj"] = size * config.num_attention_heads // config.num_key_value_heads
        columns = {"down_proj": width, "o_proj": rows["q_proj"]}
        state = {}
        for name, weight in self.model.state_dict().items():
            kind = name.split(".")[-2]
            state[name] = weight[: rows.get(kind), : columns.get(kind)] if weight.ndim == 2 else weight
        Path(folder).mkdir()
        torch.save(state, f"{folder}/model.pth")


def tiny(tmp_path: Path, *given: str) -> argparse.Namespace:
    words = "--pairs 2 --layers 2 --hidden 384 --batch 1 --length 8"
    return script("rivals").parsed(["--work", str(tmp_path), *words.split(), *given])


def test_equal_models_are_timed_on_equal_subnets_and_a_missing_config_is_no_reload(tmp_path: Path) -> None:
    rival = Masked()
    found = list(script("against_whittle").compare(rival, tiny(tmp_path), against="whittle 1", folder=tmp_path))
    assert all(tuple(row) == script("comparing").COLUMNS for row in found)
    assert [row["what"] for row in found] == [
        "forward, largest", "forward, largest over own stock", "forward, stock transformers",
        "switch to a random subnet", "switch, forward and back, random subnets",
        "switch, forward, backward and back, random subnets", "extract a subnet",
        "reloads in stock transformers, LLaMA subnet",
    ]  # fmt: skip
    whole, over, _, switch, *_, last = found
    assert whole["theirs"] == 2.0 and over["theirs"] == 1.0 and switch["theirs"] == 1e3 * 2.0 / 50
    assert whole["ratio"] == pytest.approx(whole["ours"] / 2) and whole["met"] == "yes"
    assert all(row["pairs"] == 2 for row in found[:-1])
    assert (last["ours"], last["theirs"]) == ("yes", "no") and "its logits are equal" in last["note"]
    assert rival.steps.count("train") == 1 + 3  # the check, a pair to warm up, two that count


def test_models_that_differ_are_not_compared(tmp_path: Path) -> None:
    lines = script("against_whittle").compare(Masked(scale=1.01), tiny(tmp_path), against="w", folder=tmp_path)
    with pytest.raises(script("rival_process").RivalError, match="not comparable: the whole model of whittle"):
        next(lines)


class Halved:
    """Torch-Pruning's stand-in: knows what a halved model's sizes are by building it from its config."""

    def __init__(self, *, heads: int = 2) -> None:
        self.heads = heads

    def run(self, step: str, **given: Any) -> Any:
        found = getattr(self, step)(**given) or {}
        return script("rival_process").Answer(3.0, found)

    def load(self, family: str, folder: str) -> dict[str, Any]:
        kind = LlamaForCausalLM if family == "llama" else BertModel
        self.model = kind.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.save(self.model(torch.load(f"{folder}/ids.pt"))[0], f"{folder}/theirs.pt")
        return {"dtype": "torch.float32"}

    def prune(self, family: str) -> dict[str, Any]:
        shapes = []
        for name, weight in self.model.named_parameters():
            shape = list(weight.shape)
            if any(
                part in name for part in ("q_proj", "k_proj", "v_proj", "query", "key.", "value", "gate", "up_proj")
            ):
                shape[0] //= self.heads
            elif "intermediate" in name:
                shape[0] //= 2
            elif any(part in name for part in ("o_proj", "down_proj")) or name.endswith("output.dense.weight"):
                shape[-1] //= 2
            shapes.append(shape)
        return {"shapes": sorted(shapes)}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_smaller_models_are_timed_where_sizes_are_equal_and_refused_where_not(tmp_path: Path, family: str) -> None:
    against, options = script("against_torch_pruning"), tiny(tmp_path)
    torch.manual_seed(0)
    model = getattr(against, family)(options).eval()
    ours = against.Ours(model, script("rival_serving").Stopwatch("cpu"))
    names = (family, "Torch-Pruning 1", "versions")
    found = against.times(Halved(), ours, options, names=names, folder=tmp_path / family)
    assert (found["theirs"], found["pairs"], found["met"]) == (3.0, 2, "yes") and 0 < found["ratio"] < 1
    with pytest.raises(script("rival_process").RivalError, match=f"the smaller {family} has other sizes"):
        against.times(Halved(heads=3), ours, options, names=names, folder=tmp_path / family)


@pytest.mark.parametrize(
    ("family", "heads", "form"),
    [("llama", False, "stock"), ("llama", True, "stock"), ("bert", False, "stock"), ("bert", True, "stock-padded")],
)
def test_what_is_saved_for_a_reload_gives_what_is_expected(tmp_path: Path, family: str, heads: bool, form: str) -> None:
    config: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    kind = LlamaForCausalLM if family == "llama" else BertModel
    model = (kind(LlamaConfig(**config)) if family == "llama" else kind(BertConfig(**config))).eval()
    ours = script("against_torch_pruning").Ours(model, script("rival_serving").Stopwatch("cpu"))
    ids = torch.randint(32, (2, 7))
    assert ours.export(tmp_path / "out", heads=heads, ids=ids) == form
    with torch.no_grad():
        found = kind.from_pretrained(tmp_path / "out").eval()(ids)[0]
    assert torch.allclose(found, torch.load(tmp_path / "out" / "expected.pt"), atol=1e-5)
    assert not torch.allclose(found, model(ids)[0], atol=1e-3)


def test_without_data_the_quality_is_a_line_that_says_so(tmp_path: Path) -> None:
    options = tiny(tmp_path, "--data", str(tmp_path))
    (found,) = script("against_torch_pruning").quality(SimpleNamespace(), options, against="x", folder=tmp_path)
    assert found["ratio"] == "" and "set HF_ELASTIC_DATA" in found["note"]
