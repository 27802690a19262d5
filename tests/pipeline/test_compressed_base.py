"""``sparsify``, ``quantize``, ``merge`` and ``compress --lora`` on a compressed base, on tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_checkpoints import options
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from hf_elastic import (
    CheckpointError,
    CompressionError,
    CompressOptions,
    ElasticLoraConfig,
    SpaceError,
    add_lora,
    compress,
    unpack_,
)
from hf_elastic.checkpoint.run_record import RunRecord
from hf_elastic.cli import app
from hf_elastic.packed_format import quantised_layers
from hf_elastic.pipeline import lora_run
from hf_elastic.pipeline.lora_run import LoraResult, LoraRun

Find = Callable[[str], Path]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture(autouse=True)
def eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is eight steps, whatever the machine."""
    monkeypatch.setattr(lora_run, "step_seconds", lambda *args, **kwargs: 60 / (8 * lora_run._OVERHEAD))


@pytest.mark.parametrize("kind", ["causal-lm", "embedding"])
def test_a_checkpoint_becomes_sparse_then_of_integers(kind: str, checkpoint: Find, data: Find, tmp_path: Path) -> None:
    sparse, packed = str(tmp_path / "sparse"), str(tmp_path / "packed")
    told = run("sparsify", str(checkpoint(kind)), "--data", str(data(kind)), "--output", sparse, "--sparsity", "0.5")
    assert "parent" in told and "sparsify" in told and ("perplexity" if kind == "causal-lm" else "cosine") in told
    assert "zeros          by layer: 0 50.0%" in run("info", sparse)
    told = run("quantize", sparse, "--data", str(data(kind)), "--output", packed, "--group-size", "8")
    assert "4 bits" in told and "quantize" in told
    info = run("info", packed)
    assert "integers       4 bits, groups of 8, pack-quantized" in info and "zeros          by layer: 0 5" in info
    count = next(line for line in run("info", sparse).splitlines() if "parameters" in line).split()[1]
    assert count in info, "a packed checkpoint has as many parameters as the float one"
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    model = (AutoModelForCausalLM if kind == "causal-lm" else AutoModel).from_pretrained(packed)
    assert quantised_layers(unpack_(model))
    assert "on disk" in info


def test_asymmetric_integers_are_told_as_what_they_are(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    given = ["--data", str(data("causal-lm")), "--output", out, "--group-size", "8", "--method", "rtn"]
    run("quantize", str(checkpoint("causal-lm")), *given, "--asymmetric", "--skip", "down_proj")
    assert "int-quantized" in run("info", out)
    names = quantised_layers(unpack_(AutoModelForCausalLM.from_pretrained(out)))
    assert names and not any(name.endswith("down_proj") for name in names)


def test_what_cannot_be_is_said_and_nothing_written(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    given = ["--data", str(data("causal-lm")), "--output", str(tmp_path / "out")]
    with pytest.raises(CompressionError, match="does not divide"):
        run("quantize", str(checkpoint("causal-lm")), *given, "--group-size", "5")
    with pytest.raises(CompressionError, match="from 0 to below 1"):
        run("sparsify", str(checkpoint("causal-lm")), *given, "--sparsity", "2")
    with pytest.raises(CompressionError, match="'nothing', but"):
        run("sparsify", str(checkpoint("causal-lm")), *given, "--override", "nothing=0.5")
    assert not (tmp_path / "out").exists()


# -- SQFT -------------------------------------------------------------------------------------------------------------


def sqft(checkpoint: Find, data: Find, output: Path, kind: str = "causal-lm", **changes: Any) -> CompressOptions:
    settings = {"lora": "r=8,4,2", "within": None, "minutes": 1.0, "learning_rate": 1e-2, "group_size": 8}
    return options(checkpoint(kind), data(kind), output, **{**settings, **changes})


def silent(chosen: CompressOptions) -> LoraResult:
    found = compress(chosen, say=lambda text: None)
    assert isinstance(found, LoraResult)
    return found


def test_sparse_adapters_are_merged_into_one_sparse_model(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    chosen = sqft(checkpoint, data, tmp_path / "out", sparsity=0.5)
    result = silent(chosen)
    assert [row["name"] for row in result.rows][:4] == ["parent", "base without adapters", "largest", "found"]
    assert result.rows[0]["perplexity"] != result.rows[1]["perplexity"]
    assert not any(row.get("over_limit") for row in result.rows), "a rank costs nothing once it is merged"
    base = AutoModelForCausalLM.from_pretrained(result.folder / "base").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    layers = [name for name in base if "layers." in name and "proj" in name]
    assert layers and all(torch.equal(base[name] == 0, merged[name] == 0) for name in layers)
    assert any(not torch.equal(base[name], merged[name]) for name in layers)
    assert silent(chosen).rows == result.rows, "a finished run did something else when it was asked again"


def test_quantization_aware_adapters_are_merged_into_one_model_of_integers(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    result = silent(sqft(checkpoint, data, tmp_path / "out", sparsity=0.5, bits=4))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(result.folder / "base")
    ours, theirs = (quantised_layers(unpack_(model)) for model in (merged, base))
    assert ours.keys() == theirs.keys() and ours
    assert all(bool((ours[name].weight[theirs[name].weight == 0] == 0).all()) for name in ours)
    assert any(not torch.equal(ours[name].weight, theirs[name].weight) for name in ours)
    assert "4 bits" in run("info", str(tmp_path / "out"))


def test_adapters_kept_apart_stand_beside_their_base(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    chosen = sqft(checkpoint, data, tmp_path / "out", sparsity=0.5, bits=4, apart=True)
    result = silent(chosen)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((tmp_path / "out" / "base").resolve())
    snippet = result.record["stages"]["export"]["snippet"]
    model = eval(snippet, {"peft": peft, "transformers": transformers})  # noqa: S307
    run_again = LoraRun(chosen, say=lambda text: None)
    run_again.record = RunRecord(result.folder, run_again._identity)
    supernet = run_again._trained()
    ids = torch.arange(9).unsqueeze(0) + 3
    with torch.no_grad(), supernet.activate(result.architecture):
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, supernet.model.eval()(input_ids=ids).logits)


def test_a_checkpoint_of_integers_is_a_base(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    packed = str(tmp_path / "packed")
    given = ["--data", str(data("causal-lm")), "--output", packed, "--group-size", "8", "--method", "rtn"]
    run("quantize", str(checkpoint("causal-lm")), *given)
    silent(sqft(lambda kind: Path(packed), data, tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(Path(packed).resolve())
    model = unpack_(AutoModelForCausalLM.from_pretrained(packed))
    config = ElasticLoraConfig(
        r=4, ranks=[2], target_modules="all-linear", quantization_aware=True, task_type="CAUSAL_LM"
    )
    supernet = add_lora(model, config, seed=0)
    for name, parameter in supernet.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    supernet.model.save_pretrained(tmp_path / "adapter")
    told = run("merge", str(tmp_path / "adapter"), "--base", packed, "--output", str(tmp_path / "merged"),
               "--architecture", "smallest")  # fmt: skip
    assert "4-bit integers" in told
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(9).unsqueeze(0) + 3
    with torch.no_grad(), supernet.activate(supernet.space.smallest()):
        torch.testing.assert_close(again(input_ids=ids).logits, supernet.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("packed", [False, True], ids=["rounded by the run", "packed already"])
def test_a_checkpoint_that_is_sparse_already_stays_so(
    packed: bool, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    given, base = ["--data", str(data("causal-lm"))], str(tmp_path / "sparse")
    run("sparsify", str(checkpoint("causal-lm")), *given, "--output", base)
    if packed:
        packs = ["--output", str(tmp_path / "packed"), "--group-size", "8"]
        run("quantize", base, *given, *packs)
        base = str(tmp_path / "packed")
        with pytest.raises(CompressionError, match="is of 4-bit integers; say bits=4 to keep them"):
            silent(sqft(lambda kind: Path(base), data, tmp_path / "out", bits=8))
    result = silent(sqft(lambda kind: Path(base), data, tmp_path / "out", bits=4))
    before = unpack_(AutoModelForCausalLM.from_pretrained(result.folder / "base"))
    merged = quantised_layers(unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    own = quantised_layers(before)
    assert merged and merged.keys() == own.keys()
    assert all(bool((module.weight[own[name].weight == 0] == 0).all()) for name, module in merged.items())
    assert all(float((module.weight == 0).float().mean()) > 0.45 for module in merged.values())
    assert any(not torch.equal(module.weight, own[name].weight) for name, module in merged.items())
    if packed:
        theirs = quantised_layers(unpack_(AutoModelForCausalLM.from_pretrained(base)))
        assert all(torch.equal(theirs[name].weight, module.weight) for name, module in own.items())


def test_adapters_that_saw_the_float_weights_are_merged_with_them(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    source, packed = str(checkpoint("causal-lm")), str(tmp_path / "packed")
    run("quantize", source, "--data", str(data("causal-lm")), "--output", packed, "--group-size", "8")
    config = ElasticLoraConfig(r=4, target_modules="all-linear", quantization_aware=True, task_type="CAUSAL_LM")
    before = AutoModelForCausalLM.from_pretrained(source)
    supernet = add_lora(AutoModelForCausalLM.from_pretrained(packed), config, seed=0, float_base=before)
    supernet.model.save_pretrained(tmp_path / "adapter")
    given = ["merge", str(tmp_path / "adapter"), "--base", packed, "--output", str(tmp_path / "merged")]
    with pytest.raises(CheckpointError, match="was trained with --float-base;"):
        run(*given)
    run(*given, "--float-base", source)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(9).unsqueeze(0) + 3
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, supernet.model.eval()(input_ids=ids).logits)


def test_a_compressed_checkpoint_keeps_its_precision(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint("causal-lm")).bfloat16().save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((checkpoint("causal-lm") / name).read_bytes())
    given = ["--data", str(data("causal-lm"))]
    run("sparsify", str(tmp_path / "half"), *given, "--output", str(tmp_path / "sparse"))
    run("quantize", str(tmp_path / "sparse"), *given, "--output", str(tmp_path / "packed"), "--group-size", "8")
    for name in ("sparse", "packed"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == torch.bfloat16


NONSENSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lora": None, "sparsity": 0.5}, SpaceError, "give lora="),
    ({"apart": True}, SpaceError, "give sparsity= or bits="),
    ({"sparsity": 1.0}, CompressionError, "above 0 and below 1"),
    ({"sparsity": "half"}, CompressionError, "above 0 and below 1"),
    ({"bits": 16}, CompressionError, "from 2 to 8"),
    ({"bits": 4, "group_size": 5}, CompressionError, "does not divide"),
]


@pytest.mark.parametrize(("settings", "error", "message"), NONSENSE)
def test_nonsense_is_said_before_anything_is_written(
    settings: dict[str, Any], error: type[Exception], message: str, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        silent(sqft(checkpoint, data, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
