"""The contract by which vLLM serves foreign models: our exports keep it, and each breach is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from exported import mixed_folder, stock_folder
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_elastic import CheckpointError
from hf_elastic.runtimes import broken_vllm_rules


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "base"), ("roberta", "sequence"), ("llama", "lm"), ("qwen3", "lm")]
)
def test_remote_code_exports_keep_every_rule(family: str, head: str, tmp_path: Path) -> None:
    assert broken_vllm_rules(mixed_folder(tmp_path, family, head)) == []


def test_gpt2_keeps_all_but_the_one_about_linears(tmp_path: Path) -> None:
    (broken,) = broken_vllm_rules(mixed_folder(tmp_path, "gpt2"))
    assert "Conv1D" in broken


def changed(folder: Path, file: str, pattern: str, replacement: str) -> Path:
    """Changes the code of an export, which is checked to hold the pattern."""
    text = (folder / file).read_text(encoding="utf-8")
    found, count = re.subn(pattern, replacement, text)
    assert count, f"{file} has no {pattern}"
    (folder / file).write_text(found, encoding="utf-8")
    return folder


LAYERS, MODELING = "elastic_bert_layers.py", "modeling_elastic_bert.py"
BREACHES = {
    "keyword arguments": (LAYERS, r"scaling=self\.scaling,\n            \*\*kwargs,", "scaling=self.scaling,"),
    "does not go through": (
        LAYERS, r"ALL_ATTENTION_FUNCTIONS\.get_interface\(\n.*\n        \)", "eager_attention_forward",
    ),
    "_supports_attention_backend": (MODELING, "(_supports_attention_backend) = True", r"\1 = False"),
    "is_causal=True": (LAYERS, r"self\.is_causal = False", "self.is_causal = True"),
    "nn.Linear itself": (LAYERS, r"return nn\.Linear if .*", 'return type("Mine", (nn.Linear,), {})'),
    "layer_idx of its own": (LAYERS, r"self\.layer_idx = layer_idx\n        self\.num", "self.num"),
}  # fmt: skip


@pytest.mark.parametrize("reason", BREACHES)
def test_each_breach_is_named(reason: str, tmp_path: Path) -> None:
    file, pattern, replacement = BREACHES[reason]
    folder = changed(mixed_folder(tmp_path, "bert", "base"), file, pattern, replacement)
    assert any(reason in broken for broken in broken_vllm_rules(folder))


def test_a_config_without_automodel_breaks_the_first_rule(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, "bert", "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "names no AutoModel" in broken_vllm_rules(folder)[0]
    assert "names no AutoModel" in broken_vllm_rules(stock_folder(tmp_path, "bert"))[0]


def test_the_look_leaves_nothing_registered(tmp_path: Path) -> None:
    before = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    broken_vllm_rules(mixed_folder(tmp_path, "llama"))
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == before


def test_a_folder_without_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        broken_vllm_rules(tmp_path)
