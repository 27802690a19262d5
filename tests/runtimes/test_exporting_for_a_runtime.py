"""``hf-elastic export --format``: an architecture of a supernet straight to a runtime; what ``info`` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import supernet_of

from hf_elastic.runtimes import open_runtime


@pytest.fixture
def supernet_folder(tmp_path: Path) -> Path:
    supernet_of("bert").save_pretrained(tmp_path / "supernet")
    return tmp_path / "supernet"


def test_an_architecture_is_written_for_a_runtime_and_computes_what_the_active_subnet_does(
    supernet_folder: Path, tmp_path: Path, command: Any
) -> None:
    pytest.importorskip("onnxruntime", reason='ONNX Runtime is missing: pip install "hf-elastic[onnx]"')
    ended = command("export", supernet_folder, "midpoint", "--format", "onnx", "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    supernet = supernet_of("bert")
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with supernet.activate(supernet.space.midpoint()), torch.no_grad():
        wanted = supernet.model(input_ids=ids, attention_mask=mask)[0].numpy()
    got = open_runtime(tmp_path / "out")(input_ids=ids.numpy(), attention_mask=mask.numpy())
    assert np.abs(next(iter(got.values())) - wanted).max() <= 1e-3 * np.abs(wanted).max()
    told = command("info", tmp_path / "out")
    assert told.code == 0 and "exported for a runtime" in told.out and "ONNX" in told.out


def test_options_of_a_runtime_need_its_name(supernet_folder: Path, tmp_path: Path, command: Any) -> None:
    ended = command("export", supernet_folder, "largest", "--int8", "dynamic", "--output", tmp_path / "out")
    assert ended.code == 2 and "--format" in ended.err and not (tmp_path / "out").exists()
    for option in (["--with-past"], ["--no-vocabulary"], ["--precision", "f32"], ["--sequence-length", "8"]):
        ended = command("export", supernet_folder, "largest", *option, "--output", tmp_path / "out")
        assert ended.code == 2 and f"{option[0]} is of a runtime's form" in ended.err


def test_export_takes_the_options_of_convert(tmp_path: Path, command: Any) -> None:
    gguf = pytest.importorskip("gguf")
    supernet_of("llama").save_pretrained(tmp_path / "supernet")
    arguments = ("export", tmp_path / "supernet", "midpoint", "--format", "gguf", "--output", tmp_path / "out")
    ended = command(*arguments, "--no-vocabulary", "--precision", "f32")
    assert ended.code == 0, ended.err
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    told = command("info", tmp_path / "out")
    assert told.code == 0 and "as model.gguf" in told.out and "vLLM" not in told.out
    refused = command(*arguments[:-1], tmp_path / "other", "--with-past")
    assert refused.code == 2 and "leave --with-past" in refused.err


def test_info_says_where_an_export_runs(supernet_folder: Path, tmp_path: Path, command: Any) -> None:
    assert command("export", supernet_folder, "smallest", "--output", tmp_path / "small").code == 0
    told = command("info", tmp_path / "small")
    for runtime in ("transformers", "vLLM", "ONNX", "GGUF"):
        assert runtime in told.out
