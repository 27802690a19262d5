"""Where an architecture runs: said before any export, and the same of the folder that the export writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import block_models
import pytest
from exported import MIXED, mixed_folder, sentence_folder, stock_folder
from routed_checkpoints import routed, routing_of
from tiny_models import point, supernet_of, tiny, tokenizer

from hf_elastic import (
    ElasticConfig,
    ElasticLoraConfig,
    ExportError,
    add_lora,
    add_routing,
    export,
    make_elastic,
    quantize_,
    save_quantized,
)
from hf_elastic.runtimes import export_gguf, runs_where, runs_where_folder, runs_where_space

RUNTIMES = ("transformers", "PEFT", "sentence-transformers", "vLLM", "ONNX / OpenVINO", "GGUF / llama.cpp")


def answers(found: Any) -> dict[str, str]:
    assert tuple(row.runtime for row in found.rows) == RUNTIMES
    assert all(row.reason and "\n" not in row.reason for row in found.rows)
    return {row.runtime: row.answer for row in found.rows}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "qwen3"])
def test_what_is_said_before_is_what_the_folder_says(family: str, tmp_path: Path) -> None:
    supernet = supernet_of(family, "base" if family == "bert" else "lm")
    for name, changes in {"uniform": {}, "mixed": MIXED}.items():
        at = point(supernet, **changes)
        before = runs_where(supernet, at)
        export(supernet, at, tmp_path / name, loadability=None if name == "uniform" else "remote-code")
        after = runs_where_folder(tmp_path / name)
        converted = RUNTIMES[-2:]
        assert [before[runtime] for runtime in converted] == [after[runtime] for runtime in converted]
        if supernet.loadability(at) != "stock-padded":
            assert answers(before) == answers(after)


def test_adapters_on_layers_that_are_cut_are_taken_to_be_merged() -> None:
    for family, target in (("bert", "query"), ("llama", "q_proj"), ("gpt2", "c_attn")):
        kind = "base" if family == "bert" else "lm"
        supernet = supernet_of(family, kind)
        config = ElasticLoraConfig(r=4, ranks=[2, 4], target_modules=[target])
        adapted = add_lora(supernet_of(family, kind).model, config)
        before = adapted.base.state_dict().keys()
        for changes in ({}, MIXED):
            wanted = runs_where(supernet, point(supernet, **changes))
            at = {**adapted.space.largest(), **dict(point(supernet, **changes))}
            assert runs_where(adapted, at).rows == wanted.rows
        assert len(runs_where_space(adapted).rows) == len(RUNTIMES)
        assert adapted.base.state_dict().keys() == before


def test_a_stock_llama_runs_everywhere_but_as_a_sentence_encoder() -> None:
    supernet = supernet_of("llama")
    found = answers(runs_where(supernet, supernet.space.largest()))
    assert found == {**dict.fromkeys(RUNTIMES, "yes"), "sentence-transformers": "no"}


def test_layers_that_differ_are_padded_for_loaders_and_compact_for_converters() -> None:
    supernet = supernet_of("llama")
    found = runs_where(supernet, point(supernet, **MIXED))
    assert "no faster" in found["transformers"].reason and "no faster" in found["vLLM"].reason
    assert found["GGUF / llama.cpp"].reason.endswith("as deci")


def test_conditions_of_vllm_name_what_differs_between_layers(tmp_path: Path) -> None:
    widths = runs_where_folder(mixed_folder(tmp_path / "a", "bert", "base", heads0=4, skip1="none"))["vLLM"]
    assert widths.answer == "if" and "49797" not in widths.reason and "KV" not in widths.reason
    everything = runs_where_folder(mixed_folder(tmp_path / "b", "llama"))["vLLM"]
    assert "49797" in everything.reason and "without attention" in everything.reason


def test_heads_decide_what_serves_a_model(tmp_path: Path) -> None:
    token = runs_where_folder(stock_folder(tmp_path, "bert", "token"))
    assert token["vLLM"].answer == token["sentence-transformers"].answer == token["GGUF / llama.cpp"].answer == "no"
    pairs = runs_where_folder(stock_folder(tmp_path, "bert", "sequence"))
    assert pairs["sentence-transformers"].reason == "as a CrossEncoder" and pairs["vLLM"].answer == "yes"


def test_a_sentence_encoder_of_unequal_layers_needs_trust(tmp_path: Path) -> None:
    found = runs_where_folder(sentence_folder(tmp_path))
    assert found["sentence-transformers"].answer == "if"
    assert "trust_remote_code" in found["sentence-transformers"].reason
    assert answers(found)["ONNX / OpenVINO"] == "yes" and answers(found)["GGUF / llama.cpp"] == "no"


def test_routers_run_in_transformers_alone(tmp_path: Path) -> None:
    supernet = routed("llama")
    low = supernet.space.smallest()
    found = answers(runs_where(supernet, low))
    assert [name for name in RUNTIMES if found[name] != "no"] == ["transformers", "PEFT"]
    export(supernet, low, tmp_path / "out", tokenizer=tokenizer())
    assert answers(runs_where_folder(tmp_path / "out")) == found


def test_full_capacity_routes_nothing() -> None:
    supernet = add_routing(tiny("llama"), routing_of("llama"))
    assert answers(runs_where(supernet, supernet.space.largest()))["ONNX / OpenVINO"] == "yes"


def test_candidate_blocks_are_judged_by_their_path() -> None:
    supernet = block_models.supernet_of("elastic_bert", "base")
    found = runs_where(supernet, supernet.space.smallest())
    assert found["ONNX / OpenVINO"].answer == "yes"
    assert found["vLLM"].answer == found["GGUF / llama.cpp"].answer == "no"


def test_a_space_for_stock_checkpoints_says_yes_for_every_point() -> None:
    config = ElasticConfig(intermediate_size=[16, 32, 48], num_hidden_layers=[2, 3], loadability="stock")
    supernet = make_elastic(tiny("bert", "base"), config)
    for architecture in supernet.space.architectures():
        found = answers(runs_where(supernet, architecture))
        assert {found[name] for name in RUNTIMES if name != "sentence-transformers"} == {"yes"}


def test_a_space_is_told_by_the_shares_of_its_architectures() -> None:
    supernet = make_elastic(tiny("qwen3"), ElasticConfig(intermediate_size=[16, 48]))
    found = runs_where_space(supernet)
    assert found["transformers"].answer == "yes" and found["sentence-transformers"].answer == "no"
    gguf = found["GGUF / llama.cpp"]  # of eight architectures two are of one shape
    assert gguf.answer == "if" and gguf.reason.startswith("no for 75%, such as: llama.cpp's deci")
    assert gguf.reason.endswith("yes for 25%, such as: hf-elastic convert --format gguf, as qwen3")


ADAPTER = {"base_model_name_or_path": "their/base", "r": 8, "peft_type": "LORA"}


@pytest.mark.parametrize(
    ("changes", "peft", "vllm"),
    [
        ({}, "yes", "if"),
        ({"rank_pattern": {"q_proj": 4}}, "yes", "no"),
        ({"ranks": [4, 8]}, "if", "no"),
        ({"ranks": [4, 8], "sparse": True}, "no", "no"),
    ],
)
def test_adapters_are_peft_s_and_vllm_reads_one_rank(
    changes: dict[str, Any], peft: str, vllm: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}), encoding="utf-8")
    found = answers(runs_where_folder(tmp_path))
    assert found["PEFT"] == peft and found["vLLM"] == vllm and found["GGUF / llama.cpp"] == "if"


def test_a_folder_with_a_gguf_file_is_no_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export_gguf(stock_folder(tmp_path, "llama"), tmp_path / "out", vocabulary=False)
    (row,) = runs_where_folder(tmp_path / "out").rows
    assert (row.runtime, row.answer) == ("GGUF / llama.cpp", "yes") and row.reason.startswith("as model.gguf")
    with pytest.raises(ExportError, match="give the checkpoint it was made from"):
        export_gguf(tmp_path / "out", tmp_path / "again", vocabulary=False)


def said_of(folder: Path, architecture: str, **config: Any) -> Any:
    """What vLLM's row says of a folder with a config alone."""
    config = {"architectures": [architecture], **config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return runs_where_folder(folder)["vLLM"]


@pytest.mark.parametrize(
    ("model_type", "architecture", "answer"),
    [
        ("qwen2", "Qwen2ForCausalLM", "yes"),
        ("roberta", "RobertaModel", "yes"),
        ("distilbert", "DistilBertForSequenceClassification", "no"),
        ("llama", "LlamaForQuestionAnswering", "no"),
        ("ctrl", "CTRLLMHeadModel", "unknown"),
        ("llama", "LlamaModel", "unknown"),
        ("xlnet", "XLNetForSequenceClassification", "unknown"),
    ],
)
def test_vllm_says_yes_for_classes_that_are_known_alone(
    model_type: str, architecture: str, answer: str, tmp_path: Path
) -> None:
    assert said_of(tmp_path, architecture, model_type=model_type).answer == answer


INTEGERS = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INTEGERS, "input_activations": None}},
}  # fmt: skip


def grouped(**changes: Any) -> dict[str, Any]:
    return {**PACKED, "config_groups": {"group_0": {**PACKED["config_groups"]["group_0"], **changes}}}


@pytest.mark.parametrize(
    ("stated", "answer"),
    [
        (PACKED, "yes"),
        (grouped(weights={**INTEGERS, "num_bits": 8}), "yes"),
        (grouped(weights={**INTEGERS, "num_bits": 3}), "unknown"),
        (grouped(weights={**INTEGERS, "symmetric": False}), "unknown"),
        (grouped(weights={**INTEGERS, "type": "float"}), "unknown"),
        (grouped(input_activations=INTEGERS), "unknown"),
        ({**PACKED, "format": "int-quantized"}, "unknown"),
        ({**PACKED, "config_groups": {}}, "unknown"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "unknown"),
    ],
)
def test_vllm_says_yes_for_integers_that_are_known_alone(stated: dict[str, Any], answer: str, tmp_path: Path) -> None:
    found = said_of(tmp_path, "LlamaForCausalLM", model_type="llama", quantization_config=stated)
    assert found.answer == answer and (answer == "yes" or stated["quant_method"] in found.reason)


@pytest.mark.parametrize(("symmetric", "answer"), [(True, "yes"), (False, "unknown")])
def test_what_save_quantized_writes_is_judged_by_its_format(symmetric: bool, answer: str, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=32, intermediate_size=64)
    quantize_(model, method="rtn", bits=4, group_size=32, symmetric=symmetric)
    save_quantized(model, tmp_path / "out", tokenizer=tokenizer())
    assert runs_where_folder(tmp_path / "out")["vLLM"].answer == answer


def test_a_supernet_is_asked_by_architecture(tmp_path: Path) -> None:
    supernet_of("bert").save_pretrained(tmp_path / "supernet")
    with pytest.raises(ExportError, match="runs_where"):
        runs_where_folder(tmp_path / "supernet")


def test_the_table_has_a_line_for_each_runtime() -> None:
    supernet = supernet_of("gpt2")
    lines = str(runs_where(supernet, supernet.space.largest())).splitlines()
    assert [line.split("  ")[1].strip() for line in lines] == list(RUNTIMES)
    assert len({line.index(answer) for line, answer in zip(lines, ["yes", "yes", "no"], strict=False)}) == 1


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_llamacpp_is_refused_where_the_conversion_refuses(family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = mixed_folder(tmp_path, family)
    assert runs_where_folder(folder)["GGUF / llama.cpp"].answer == "no"
    with pytest.raises(ExportError, match="one shape for all layers|one width and head count"):
        export_gguf(folder, tmp_path / "out", vocabulary=False)
