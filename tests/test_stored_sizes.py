"""Configs that ask for more than the weights beside them are refused before memory or time is spent on them."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import BERT, classifier, language_model, sentence_encoder
from tiny_models import supernet_of, tiny
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertModel, LlamaForCausalLM

import hf_elastic as he
from hf_elastic import CheckpointError
from hf_elastic.files import file_digest
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.tasks import load_model, load_with_classifier, resolve_task
from hf_elastic.proxies import checkpoint_table
from hf_elastic.stored_sizes import require_counts, require_filled


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def saved(family: str, folder: Path, head: str = "lm") -> Path:
    tiny(family, head).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "qwen3", "mistral"])
def test_a_whole_checkpoint_is_filled_by_its_weights(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / family)
    kinds = {"bert": AutoModelForMaskedLM, "distilbert": AutoModelForMaskedLM}
    for kind in (AutoModel, kinds.get(family, AutoModelForCausalLM)):
        require_filled(folder, kind)


def test_sharded_half_precision_and_packed_checkpoints_are_filled_too(tmp_path: Path) -> None:
    tiny("bert").half().save_pretrained(tmp_path / "half", max_shard_size="10KB")
    require_filled(tmp_path / "half", AutoModelForMaskedLM)
    model = tiny("llama")
    he.quantize_(model, bits=4, group_size=16, method="rtn")
    he.save_quantized(model, tmp_path / "packed")
    require_filled(tmp_path / "packed", AutoModelForCausalLM)


def test_layers_without_a_tensor_of_their_own_are_no_matter(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    skipped = {f"layers.{n}.skip": "attention" for n in range(3)}
    he.export(supernet, supernet.space.canonical({**supernet.space.largest(), **skipped}), tmp_path / "small")
    require_filled(tmp_path / "small", AutoModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000, but the weights beside it are"),
        ({"num_hidden_layers": 10**400}, "but the weights beside it are"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers=nan, but the weights"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000, but the weights"),
        ({"num_labels": 10**9}, "num_labels=1000000000, but at most 100000 are read"),
        ({"hidden_size": 2**24, "head_dim": 2**22}, "asks for .* parameters, the weights beside it have"),
        ({"intermediate_size": 10**12}, "asks for .* parameters, the weights beside it have"),
        ({"vocab_size": 10**10}, "asks for .* parameters, the weights beside it have"),
        ({"head_dim": 10**11}, "asks for .* parameters, the weights beside it have"),
    ],
)
def test_absurd_sizes_are_refused_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = changed(saved("llama", tmp_path / "model"), **changes)
    began = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        require_filled(folder, LlamaForCausalLM)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20 and time.perf_counter() - began < 5


def test_a_folder_without_safetensors_is_not_looked_at_and_a_broken_one_is_named(tmp_path: Path) -> None:
    require_filled(tmp_path, BertModel)
    bare = saved("bert", tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(CheckpointError, match="bare holds no config.json, so its weights are of no model"):
        require_filled(bare, BertModel)
    require_filled(bare, AutoModel)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1000}')
    require_filled(tmp_path, BertModel)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1000000000}')
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000000, but no model has more than 1024"):
        require_filled(tmp_path, BertModel)
    folder = saved("bert", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
        require_counts(folder)


def _options(model: Path, **changes: Any) -> CompressOptions:
    return CompressOptions(str(model), ("-",), "out", **changes)


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "compress": (language_model, lambda f: load_model(resolve_task(_options(f)), _options(f))),
    "a classifier": (classifier, lambda f: load_model(resolve_task(_options(f)), _options(f))),
    "a new classifier": (sentence_encoder, lambda f: load_with_classifier(str(f), ["a", "b"], seed=0)),
    "the table of ZeroLM": (language_model, checkpoint_table),
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_loads_a_checkpoint_looks_first(reader: str, tmp_path: Path) -> None:
    make, read = READERS[reader]
    folder = make(tmp_path / "model")
    read(folder)
    changed(folder, num_hidden_layers=10**7)
    with pytest.raises(CheckpointError, match="but the weights beside it are"):
        read(folder)


@pytest.mark.parametrize("reader", ["compress", "a classifier", "a new classifier"])
def test_pickled_weights_are_not_read(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, read = READERS[reader]
    folder = make(tmp_path / "model")
    torch.save(BERT, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    with pytest.raises(CheckpointError, match="cannot load"):
        read(folder)


def test_a_supernet_of_absurd_sizes_or_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    supernet_of("bert").save_pretrained(tmp_path / "supernet")
    folder = tmp_path / "supernet"
    whole = (folder / "config.json").read_text()
    for changes in ({"num_hidden_layers": 10**7}, {"intermediate_size": 10**12}):
        changed(folder, **changes)
        with pytest.raises(CheckpointError, match="the weights beside it"):
            he.Supernet.from_pretrained(folder)
    (folder / "config.json").write_text(whole)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    record = json.loads((folder / "search_space.json").read_text())
    record["weights"] = {"pytorch_model.bin": file_digest(folder / "pytorch_model.bin")}
    (folder / "search_space.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        he.Supernet.from_pretrained(folder)
