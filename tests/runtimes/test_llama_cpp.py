"""llama.cpp itself runs what was written, where llama-cpp-python is installed here or where HF_ELASTIC_LLAMA_CPP says.

``HF_ELASTIC_LLAMA_CPP`` is a Python that has llama-cpp-python, which is compiled when it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import byte_tokenizer, mixed_folder, sentencepiece_like, stock_folder
from tiny_models import tiny

from hf_elastic.runtimes import export_gguf
from hf_elastic.runtimes.gguf_vocabulary import CUTS
from hf_elastic.runtimes.opening import open_model

pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import llama_cpp
file, ids, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = llama_cpp.Llama(file, n_ctx=32, n_batch=32, logits_all=True, verbose=False, n_threads=1)
if text:
    print(json.dumps(model.tokenize(text.encode())))
else:
    model.eval(ids)
    print(json.dumps(model.scores[: len(ids)].tolist()))
"""


def answer(folder: Path, *, ids: list[int] | None = None, text: str = "") -> Any:
    """Logits of token ids, or the ids of a text, by llama.cpp in a process of its own."""
    python = os.environ.get("HF_ELASTIC_LLAMA_CPP", sys.executable)
    if python == sys.executable and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("no llama-cpp-python here: set HF_ELASTIC_LLAMA_CPP to a Python that has it")
    arguments = [python, "-c", PROGRAM, str(folder / "model.gguf"), json.dumps(ids or []), text]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


UNEQUAL: list[dict[str, str]] = [{}, {"skip2": "mlp"}, {"skip0": "attention", "skip1": "none"}]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_uniform_models_give_torchs_logits(family: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, family)
    export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False)
    compare(folder, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("changes", UNEQUAL)
def test_unequal_layers_give_torchs_logits(family: str, changes: dict[str, str], tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, family, **changes)
    assert export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False).architecture == "deci"
    compare(folder, tmp_path / "out")


def compare(folder: Path, written: Path) -> None:
    ids = [5, 17, 3, 42, 8]
    with torch.no_grad():
        wanted = open_model(folder)(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(np.array(answer(written, ids=ids)) - wanted).max() < 1e-2


TEXTS = ("ab abc cab", "aab bc\n\nb 1234 ab", "abcd \u00e9 it's")


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt-2", "llama-bpe", "qwen2"])
def test_text_is_cut_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    patterns = {name: pattern for pattern, name in CUTS.items()}
    tokenizer = sentencepiece_like() if kind == "sentencepiece" else byte_tokenizer(patterns.get(kind))
    export_gguf(tiny("llama", vocab_size=300), tmp_path / "out", tokenizer=tokenizer)
    for text in TEXTS:
        assert answer(tmp_path / "out", text=text) == tokenizer(text).input_ids
