"""ONNX and OpenVINO against torch: equal outputs for every architecture, whatever batch, length and padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import batch, mixed_folder, sentence_folder, stock_folder
from tiny_models import tiny
from transformers import AutoTokenizer

import hf_elastic.runtimes.graph_folder as graph_folder
from hf_elastic import CheckpointError, DataError, ExportError
from hf_elastic.runtimes import export_onnx, export_openvino, open_runtime
from hf_elastic.runtimes.graphs import traceable
from hf_elastic.runtimes.onnx_export import OnnxWriter
from hf_elastic.runtimes.opening import open_model
from hf_elastic.runtimes.openvino_export import OpenvinoWriter

TOLERANCE = 1e-3
EXPORTS: dict[str, Callable[..., Any]] = {"onnx": export_onnx, "openvino": export_openvino}
HEADS = [
    ("bert", "base"), ("bert", "sequence"), ("bert", "token"), ("bert", "qa"), ("roberta", "lm"),
    ("distilbert", "sequence"), ("llama", "sequence"), ("qwen2", "lm"), ("qwen3", "lm"), ("mistral", "lm"),
    ("gpt2", "lm"), ("gpt2", "sequence"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)


def difference(folder: Path, written: Path, *, left: bool = False) -> float:
    """Largest |difference| at real tokens between a checkpoint in torch and what was written of it."""
    model = open_model(folder)
    feed = batch(model, left=left)
    with torch.no_grad():
        wanted = model(**feed)
    found, worst = open_runtime(written)(**feed), 0.0
    for name, got in found.items():
        tensor, kept = wanted[name], feed["attention_mask"].bool()
        gap = (torch.from_numpy(got) - tensor).abs()
        worst = max(worst, float((gap[kept] if gap.shape[:2] == kept.shape else gap).max()))
    return worst


@pytest.mark.parametrize(
    ("family", "runtime"),
    [
        ("bert", "onnx"), ("llama", "openvino"),
        pytest.param("llama", "onnx", marks=pytest.mark.slow), pytest.param("bert", "openvino", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_layers_that_differ_give_torchs_outputs(family: str, runtime: str, tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, family)
    report = EXPORTS[runtime](folder, tmp_path / "written")
    assert report.max_difference <= TOLERANCE
    assert difference(folder, tmp_path / "written") <= TOLERANCE
    assert difference(folder, tmp_path / "written", left=True) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTS)
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_every_head_of_every_family_gives_torchs_outputs(family: str, head: str, runtime: str, tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, family, head)
    EXPORTS[runtime](folder, tmp_path / "written")
    assert difference(folder, tmp_path / "written") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTS)
@pytest.mark.parametrize(("family", "head"), [("bert", "lm"), ("llama", "lm"), ("gpt2", "lm"), ("distilbert", "base")])
def test_stock_checkpoints_give_torchs_outputs(family: str, head: str, runtime: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, family, head)
    EXPORTS[runtime](folder, tmp_path / "written")
    assert difference(folder, tmp_path / "written") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_decoding_with_a_cache_token_by_token_gives_the_logits_of_the_whole(
    family: str, runtime: str, tmp_path: Path
) -> None:
    folder = mixed_folder(tmp_path, family)
    EXPORTS[runtime](folder, tmp_path / "written", with_past=True)
    model, decoder = open_model(folder), open_runtime(tmp_path / "written")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    cache = empty_cache(decoder.inputs, model)
    for start, stop in ((0, 4), *((place, place + 1) for place in range(4, 9))):  # a prefill, then one by one
        found = decoder(
            input_ids=ids[:, start:stop], attention_mask=np.ones((2, stop), dtype=np.int64),
            position_ids=np.arange(start, stop)[None].repeat(2, axis=0), **cache,
        )  # fmt: skip
        assert np.abs(found["logits"] - wanted[:, start:stop].numpy()).max() <= TOLERANCE
        cache = {name.replace("present", "past_key_values"): found[name] for name in found if "present" in name}


def empty_cache(inputs: tuple[str, ...], model: Any, *, batch_size: int = 2) -> dict[str, Any]:
    """A cache of no token for each layer that has one."""
    found = {}
    for name in inputs:
        if name.startswith("past_key_values."):
            shape = model.config.per_layer_config[int(name.split(".")[1])]
            heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
            found[name] = np.zeros((batch_size, heads, 0, model.config.head_dim), dtype=np.float32)
    return found


@pytest.mark.parametrize(
    ("family", "runtime", "left"),
    [
        ("llama", "openvino", True),
        *(
            pytest.param(family, runtime, left, marks=pytest.mark.slow)
            for runtime in EXPORTS
            for family, left in (("llama", False), ("mistral", True), ("qwen3", True), ("gpt2", True), ("gpt2", False))
        ),
    ],
)  # fmt: skip
def test_a_padded_batch_decodes_as_each_sequence_alone(family: str, runtime: str, left: bool, tmp_path: Path) -> None:
    folder, lengths, more = mixed_folder(tmp_path, family), (6, 3, 1), 3
    EXPORTS[runtime](folder, tmp_path / "written", with_past=True)
    model, decoder = open_model(folder), open_runtime(tmp_path / "written")
    drawn = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 61, (1, length + more), generator=drawn) for length in lengths]
    with torch.no_grad():
        alone = [model(input_ids=row).logits[0].numpy() for row in rows]
    ids, mask = np.zeros((3, 6), dtype=np.int64), np.zeros((3, 6), dtype=np.int64)
    for number, length in enumerate(lengths):
        place = slice(6 - length, None) if left else slice(0, length)
        ids[number, place], mask[number, place] = rows[number][0, :length], 1
    found = decoder(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clip(0),
        **empty_cache(decoder.inputs, model, batch_size=3),
    )  # fmt: skip
    assert all(np.isfinite(states).all() for states in found.values())
    for number, length in enumerate(lengths):
        assert np.abs(found["logits"][number, mask[number] == 1] - alone[number][:length]).max() <= TOLERANCE
    for step in range(more):
        mask = np.concatenate([mask, np.ones((3, 1), dtype=np.int64)], axis=1)
        new = [[int(row[0, length + step])] for row, length in zip(rows, lengths, strict=True)]
        found = decoder(
            input_ids=np.array(new), attention_mask=mask, position_ids=mask.cumsum(-1)[:, -1:] - 1,
            **{name.replace("present", "past_key_values"): found[name] for name in found if "present" in name},
        )  # fmt: skip
        for number, length in enumerate(lengths):
            assert np.abs(found["logits"][number, 0] - alone[number][length + step]).max() <= TOLERANCE


def test_the_attention_of_graphs_is_not_left_in_a_model_or_its_config(tmp_path: Path) -> None:
    model = tiny("bert", "base")
    with traceable(model) as taken:
        assert taken is model and model.config._attn_implementation == "hf_elastic_graph"
    assert model.config._attn_implementation == "sdpa"
    export_openvino(model, tmp_path / "written")
    assert "hf_elastic_graph" not in (tmp_path / "written" / "config.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_layer_without_attention_has_no_cache_in_the_graph(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, "llama")
    report = export_openvino(folder, tmp_path / "written", with_past=True)
    assert "past_key_values.0.key" in report.inputs and "past_key_values.1.key" not in report.inputs


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "int8"), [("onnx", "dynamic"), ("onnx", "static"), ("openvino", "dynamic")])
def test_integers_are_smaller_and_near(runtime: str, int8: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, "bert", "base", hidden_size=128, intermediate_size=512, vocab_size=2000)
    batches = [batch(tiny("bert", vocab_size=2000), seed=seed) for seed in range(4)]
    floats = EXPORTS[runtime](folder, tmp_path / "floats")
    small = EXPORTS[runtime](folder, tmp_path / "small", int8=int8, calibration=batches)
    assert small.size < 0.6 * floats.size
    assert 0 < small.int8_difference < 0.25 and small.max_difference <= TOLERANCE
    assert 1e-4 < difference(folder, tmp_path / "small") < 2.0


@pytest.mark.slow
def test_nncf_rounds_activations_on_the_batches_given(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    folder = mixed_folder(tmp_path, "bert", "base")
    batches = [batch(open_model(folder), seed=seed) for seed in range(4)]
    report = export_openvino(folder, tmp_path / "small", int8="static", calibration=batches)
    assert "FakeQuantize" in (tmp_path / "small" / report.model_file).read_text(encoding="utf-8")


def test_a_sentence_transformers_folder_keeps_what_it_needs(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path)
    report = export_openvino(folder, tmp_path / "written")
    names = {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "modeling_elastic_bert.py"}
    assert names <= set(report.files)
    assert not list((tmp_path / "written").rglob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(tmp_path / "written")("a c").input_ids == [2, 4]
    record = json.loads((tmp_path / "written" / "runtime.json").read_text(encoding="utf-8"))
    assert record["runtime"] == "openvino" and record["max_difference"] == report.max_difference


def test_a_graph_that_differs_from_torch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stock_folder(tmp_path, "bert", "base")
    broken = graph_folder.check_graph

    def shifted(graph: Any, run: Any) -> Any:
        return broken(graph, lambda feed: {name: array + 0.01 for name, array in run(feed).items()})

    monkeypatch.setattr(graph_folder, "check_graph", shifted)
    with pytest.raises(ExportError, match="differs from torch by 1.00e-02"):
        export_openvino(folder, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_a_missing_package_is_said_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_elastic.runtimes.opening as opening

    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'pip install "hf-elastic\[onnx\]"'):
        export_onnx(tmp_path, tmp_path / "written")


def test_adapters_supernets_and_foreign_code_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for name, text, said in (
        ("adapter_config.json", "{}", "merge it first"),
        ("search_space.json", "{}", "export one of its architectures"),
        ("config.json", '{"model_type": "theirs", "auto_map": {"AutoModel": "theirs.Model"}}', "load it yourself"),
    ):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ExportError, match=said):
            export_openvino(folder, tmp_path / "written")
    with pytest.raises(CheckpointError, match="no config.json"):
        export_openvino(tmp_path, tmp_path / "written")


def test_static_integers_need_batches(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    folder = stock_folder(tmp_path, "bert", "base")
    with pytest.raises(DataError, match="needs calibration="):
        export_openvino(folder, tmp_path / "written", int8="static")
    with pytest.raises(ExportError, match="int8='tiny' is not one of"):
        export_openvino(folder, tmp_path / "written", int8="tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize(("runtime", "writer"), [("onnx", OnnxWriter), ("openvino", OpenvinoWriter)])
def test_what_a_quantiser_raises_is_one_line(
    runtime: str, writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such operation\n  in a file of theirs, line 7")

    monkeypatch.setattr(writer, "quantize", quantize)
    folder = stock_folder(tmp_path, "bert", "base")
    with pytest.raises(ExportError, match=r"makes no integers \(int8='dynamic'\) of a BertModel: no such operation$"):
        EXPORTS[runtime](folder, tmp_path / "written", int8="dynamic")
    assert not (tmp_path / "written").exists()


def test_a_model_of_few_positions_is_refused_before_it_is_run(tmp_path: Path) -> None:
    short = tiny("bert", "base", max_position_embeddings=16)
    with pytest.raises(ExportError, match="on up to 17 tokens, but a BertModel of this size has positions for 16"):
        export_openvino(short, tmp_path / "written")
    cached = tiny("gpt2", "lm", n_positions=20)
    with pytest.raises(ExportError, match="on up to 22 tokens, but a GPT2LMHeadModel of this size has"):
        export_openvino(cached, tmp_path / "written", with_past=True)


def test_text_that_is_too_long_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    long = {"input_ids": torch.full((1, 65), 5), "attention_mask": torch.ones(1, 65, dtype=torch.long)}
    with pytest.raises(DataError, match="65 tokens are more than the bert has positions for, 64; cut the text"):
        export_openvino(tiny("bert", "base"), tmp_path / "written", int8="static", calibration=[long])


def test_what_a_runtime_raises_of_its_inputs_is_one_line(tmp_path: Path) -> None:
    export_onnx(tiny("bert", "base"), tmp_path / "written")
    with pytest.raises(DataError, match=r"onnx does not run the model on input_ids \(1, 65\), attention_mask"):
        open_runtime(tmp_path / "written")(input_ids=np.full((1, 65), 5))


def test_a_cache_is_of_decoders_alone_and_unknown_inputs_are_not_passed_over(tmp_path: Path) -> None:
    encoder = tiny("bert", "base")
    with pytest.raises(ExportError, match="a BertModel does not generate, so it has no KV cache; leave with_past"):
        export_openvino(encoder, tmp_path / "cached", with_past=True)
    export_openvino(encoder, tmp_path / "graph")
    run, ids = open_runtime(tmp_path / "graph"), np.full((1, 4), 5)
    with pytest.raises(DataError, match="not atention_mask"):
        run(input_ids=ids, atention_mask=np.ones_like(ids))
