"""Whole runs on a device: compress with every recipe and with adapters, families, and ELM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import elm_runs
import pytest
import torch
import transformers
from elm_runs import options as elm_options
from on_device import output
from tiny_checkpoints import LABELS, options, time_by_parameters
from torch import Tensor

from hf_elastic import ElasticConfig, ElmResult, Supernet, compress, make_elm
from hf_elastic.checkpoint.run_record import RESULT_FILE
from hf_elastic.pipeline import CompressRun, ElmRun, lora_run
from hf_elastic.pipeline.training import device_of
from hf_elastic.spaces import ELM_SIZES

Find = Callable[[str], Path]
BATCH = {"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
AUTO: dict[str, Any] = {
    "embedding": transformers.AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}


def kind_of(device: str) -> str:
    """The device as options name it."""
    return torch.device(device).type


def loaded(folder: Path | str, kind: str) -> Any:
    """What was written, by stock transformers on the CPU."""
    model = AUTO[kind].from_pretrained(folder, trust_remote_code=True).eval()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    return model


def logits(model: Any) -> Tensor:
    found = output(model, BATCH)
    assert bool(torch.isfinite(found).all())
    return found


def whole(given: Any, result: Any) -> dict[str, Any]:
    """The record of a run, which is written beside the export too."""
    record = json.loads((given.run_folder / RESULT_FILE).read_text())
    assert (Path(given.output) / RESULT_FILE).is_file()
    assert all(stage.get("finished", True) for stage in record["stages"].values())
    assert all(row["latency"] > 0 for row in result.rows)
    return dict(record)


# -- compress ---------------------------------------------------------------------------------------------------------


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "a sentence encoder, fast": ("embedding", {"recipe": "fast"}),
    "a decoder, fast, compact": ("causal-lm", {"recipe": "fast", "loadability": "any"}),
    "a classifier, balanced": ("classification", {"recipe": "balanced", "minutes": 0.01}),
    "a sentence encoder, best, mixed precision": ("embedding", {"minutes": 0.01, "precision": "bf16"}),
    "a decoder, best": ("causal-lm", {"minutes": 0.01, "precision": "auto"}),
    "a masked model, best": ("masked-lm", {"minutes": 0.01}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_is_compressed_on_the_device(
    run: str, checkpoint: Find, data: Find, device: str, tmp_path: Path
) -> None:
    kind, changes = RUNS[run]
    given = options(checkpoint(kind), data(kind), tmp_path / "out", device=kind_of(device), **changes)
    said: list[str] = []
    result = compress(given, say=said.append)
    whole(given, result)
    parent, found = result.rows[0], result.rows[1]
    assert found["parameters"] <= 0.7 * parent["parameters"]
    logits(loaded(given.output, kind))
    again = compress(given, say=lambda text: None)
    assert again.rows == result.rows, "a finished run did something else when it was asked again"


def test_a_speedup_is_searched_for_with_latencies_of_the_device(
    checkpoint: Find, data: Find, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_by_parameters(monkeypatch)  # on a GPU tiny layers of all widths take as long
    given = options(
        checkpoint("causal-lm"), data("causal-lm"), tmp_path / "out", recipe="fast", within=None, speedup="1.05@2x16",
        memory="0.2MB@2x16", loadability="any", device=kind_of(device),
    )  # fmt: skip
    result = compress(given, say=lambda text: None)
    record = whole(given, result)
    assert kind_of(device) in record["stages"]["compare"]["setting"]
    family = result.family([1.02, 1.05], output=tmp_path / "family", say=lambda text: None)
    assert [size.name for size in family.sizes] == ["1.02x", "1.05x"]
    for size in family.sizes:
        logits(loaded(size.report.directory, "causal-lm"))


def test_a_dry_run_times_the_device(checkpoint: Find, data: Find, device: str, tmp_path: Path) -> None:
    given = options(
        checkpoint("embedding"), data("embedding"), tmp_path / "out", minutes=0.01, device=kind_of(device)
    )  # fmt: skip
    said = CompressRun(given, say=lambda text: None).dry_run()
    assert "training" in said and f"measured on {kind_of(device)}" in said
    assert not (tmp_path / "out").exists()


def test_auto_takes_the_gpu_if_there_is_one(checkpoint: Find, data: Find, device: str, tmp_path: Path) -> None:
    given = options(checkpoint("embedding"), data("embedding"), tmp_path / "out", device="auto")
    assert device_of(given) == ("cuda" if torch.cuda.is_available() else "cpu")
    if kind_of(device) == "cuda":
        assert device_of(given) == "cuda"


# -- adapters ---------------------------------------------------------------------------------------------------------


WIDTHS = ElasticConfig(intermediate_size=[0.125, 0.25, 0.5], loadability="stock")
LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks alone": ("classification", {}),
    "an elastic base": ("causal-lm", {"space": WIDTHS, "within": {"macs": 0.9}}),
    "a sparse base": ("causal-lm", {"sparsity": 0.5}),
    "a sparse base of integers": ("causal-lm", {"sparsity": 0.5, "bits": 4, "group_size": 16}),
    "integers apart": ("masked-lm", {"bits": 4, "group_size": 16, "apart": True}),
}


@pytest.mark.parametrize("run", LORAS)
def test_adapters_are_trained_searched_and_written_on_the_device(
    run: str, checkpoint: Find, data: Find, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_run, "step_seconds", lambda *args, **kwargs: 60 / (4 * lora_run._OVERHEAD))
    kind, changes = LORAS[run]
    settings: dict[str, Any] = {"lora": "r=8,4,2", "within": None, "minutes": 1.0, **changes}
    given = options(checkpoint(kind), data(kind), tmp_path / "out", device=kind_of(device), **settings)
    result = compress(given, say=lambda text: None)
    record = json.loads((given.run_folder / RESULT_FILE).read_text())
    assert record["stages"]["train"]["steps"] == 4 and record["stages"]["export"]["finished"]
    assert {"largest", "found", "smallest"} <= {row["name"] for row in result.rows}
    if run in ("an elastic base", "a sparse base"):
        logits(loaded(given.output, kind))
    elif run == "a sparse base of integers":
        assert (Path(given.output) / "model.safetensors").is_file()
        config = json.loads((Path(given.output) / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        logits(loaded(given.output, kind))
    else:
        assert (Path(given.output) / "adapter_model.safetensors").is_file()


# -- elm --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nano() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        elm_runs.prepare(patch.setattr)
        yield
    del ELM_SIZES["nano"]  # type: ignore[attr-defined]


ELMS: dict[str, tuple[str, dict[str, Any]]] = {
    "an encoder": ("masked-lm", {"precision": "fp32"}),
    "a decoder in mixed precision": ("causal-lm", {"precision": "bf16", "fusion": "remove", "threshold": 0.5}),
    "of a sentence encoder": ("embedding", {"fusion": "resplit", "threshold": 0.5}),
}


@pytest.mark.parametrize("run", ELMS)
def test_a_small_model_is_made_on_the_device(
    run: str, checkpoint: Find, data: Find, device: str, tmp_path: Path, nano: None
) -> None:
    kind, changes = ELMS[run]
    rows = (str(data("classification")),)
    given = elm_options(
        checkpoint(kind), data(kind), tmp_path / "out", finetune=rows, device=kind_of(device), **changes
    )
    result: ElmResult = make_elm(given, say=lambda text: None)
    record = whole(given, result)
    assert ElmRun(given, say=lambda text: None).setting.bf16 is (
        changes.get("precision", "auto") == "bf16" or (kind_of(device) == "cuda" and "precision" not in changes)
    )
    assert {"supernet", "search", "fusion", "retrain", "finetune", "compare", "export"} <= record["stages"].keys()
    assert all(row["loss"] is None or row["loss"] > 0 for row in result.rows)
    logits(loaded(given.output, "causal-lm" if kind == "causal-lm" else "masked-lm"))
    classifier = loaded(Path(given.output) / "classifier", "classification")
    assert logits(classifier).shape == (2, len(LABELS))
    again = Supernet.from_pretrained(given.run_folder / "supernet")
    assert again.space.size > 1


def test_latencies_of_an_elm_run_are_those_of_the_device(
    checkpoint: Find, data: Find, device: str, tmp_path: Path, nano: None
) -> None:
    given = elm_options(
        checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out", steps=4, latency="1s", device=kind_of(device)
    )
    result = make_elm(given, say=lambda text: None)
    record = whole(given, result)
    assert kind_of(device) in record["stages"]["latency"]["setting"]
