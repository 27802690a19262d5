"""An exported static model loads, with the same logits, in a process that has no hf_elastic."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_static import EVERY_HEAD, LANGUAGE_MODELS, build, output, tokens

from hf_elastic.models import source_files

READER = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

sys.modules["hf_elastic"] = None  # importing it now raises, whatever is installed
root, trust = Path(sys.argv[1]), sys.argv[2] == "True"
ids = load_file(root / "ids.safetensors")["ids"]
results = {}
for folder, auto_class in json.loads((root / "jobs.json").read_text()):
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(root / folder, trust_remote_code=trust).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        results[folder] = model(input_ids=ids, return_dict=False)[0].contiguous()
    if auto_class == "AutoModelForCausalLM":
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        results[folder + ".text"] = text
    model.save_pretrained(root / "again" / folder)
    again = auto.from_pretrained(root / "again" / folder, trust_remote_code=trust).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, return_dict=False)[0], results[folder])
save_file(results, root / "results.safetensors")
"""


def run_without_hf_elastic(root: Path, *jobs: tuple[str, str], trust: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the reader in a bare working directory; ``-I`` keeps it and PYTHONPATH off the module path."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", READER, str(root), str(trust)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def export(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    for file in source_files(model.config.model_type):
        shutil.copyfile(file, folder / file.name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every head of every type, exported and read in one process without hf_elastic."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("remote")
    save_file({"ids": tokens()}, root / "ids.safetensors")
    models, jobs = {}, []
    for model_type, name in EVERY_HEAD:
        models[name] = build(model_type, name)
        export(models[name], root / name)
        jobs.append((name, f"AutoModelFor{name.split('For')[-1]}" if "For" in name else "AutoModel"))
    # A sequence classifier read first, in a process that has not loaded the base class before.
    jobs.sort(key=lambda job: "SequenceClassification" not in job[1])
    result = run_without_hf_elastic(root, *jobs)
    assert result.returncode == 0, result.stderr[-3000:]
    return root, {"models": models, "results": load_file(root / "results.safetensors")}


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_remote_code_gives_the_same_output(exported: tuple[Path, dict[str, Any]], model_type: str, name: str) -> None:
    model, results = exported[1]["models"][name], exported[1]["results"]
    assert torch.equal(results[name], output(model, input_ids=tokens()))
    if LANGUAGE_MODELS.get(model_type) == name:
        ids = tokens()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert torch.equal(results[f"{name}.text"], text)


@pytest.mark.parametrize(("model_type", "name"), EVERY_HEAD)
def test_a_model_of_remote_code_saves_its_code_again(
    exported: tuple[Path, dict[str, Any]], model_type: str, name: str
) -> None:
    again = exported[0] / "again" / name
    assert {file.name for file in source_files(model_type)} <= {file.name for file in again.iterdir()}
    first = json.loads((exported[0] / name / "config.json").read_text())
    second = json.loads((again / "config.json").read_text())
    assert first["auto_map"] == second["auto_map"]


def test_without_trust_the_code_is_not_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    export(build("elastic_llama", "ElasticLlamaForCausalLM"), tmp_path / "model")
    save_file({"ids": tokens()}, tmp_path / "ids.safetensors")
    result = run_without_hf_elastic(tmp_path, ("model", "AutoModelForCausalLM"), trust=False)
    assert result.returncode != 0
    assert "trust_remote_code=True" in result.stderr
    assert not (tmp_path / "results.safetensors").exists()


def test_the_files_that_travel_are_found_by_their_relative_imports() -> None:
    for model_type in ("elastic_bert", "elastic_llama", "elastic_gpt2"):
        files = source_files(model_type)
        names = {file.stem for file in files}
        for file in files:
            text = file.read_text()
            assert "import hf_elastic" not in text and "from hf_elastic" not in text
            needed = {line.split()[1][1:] for line in text.splitlines() if line.startswith("from .")}
            assert needed <= names
