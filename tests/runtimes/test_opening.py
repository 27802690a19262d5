"""What a broken or hostile folder is told when it is opened for a conversion: one line, and nothing is made of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny

from hf_elastic import CheckpointError, ElasticError, ExportError
from hf_elastic.runtimes import runs_where_folder
from hf_elastic.runtimes.opening import open_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", "lm").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def restate(folder: Path, changes: Mapping[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_folder_is_opened_in_fp32_as_it_was_saved(folder: Path) -> None:
    found = open_model(folder).state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(found, torch.float32)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() <= found.keys() and all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("name", ["AutoTokenizer", "pipeline", "LlamaConfig", "nothing", "", 5, None])
def test_a_class_that_is_no_model_is_refused(name: Any, folder: Path) -> None:
    restate(folder, {"architectures": [name]})
    with pytest.raises(ExportError if isinstance(name, str) else ElasticError) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 10**9}, "asks for"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "is no config"),
        ({"hidden_size": 0}, "cannot be loaded as LlamaForCausalLM"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_in_one_line(
    changes: dict[str, Any], words: str, folder: Path
) -> None:
    restate(folder, changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.file), "w")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Touch(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": [5]}, {"architectures": {}}, {"architectures": ["\ud800"]}, {"num_key_value_heads": 0},
        {"quantization_config": [1]}, {"per_layer_config": {"0": {"head_dim": 4}}, "model_type": "elastic_gpt2"},
    ],
)  # fmt: skip
def test_where_a_broken_config_runs_is_one_line(changes: dict[str, Any], folder: Path) -> None:
    restate(folder, changes)
    with pytest.raises(CheckpointError) as caught:
        runs_where_folder(folder)
    assert "\n" not in str(caught.value)
