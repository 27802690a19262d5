"""What was pushed is pulled by a fresh process without hf_elastic, by the snippet of its card, and gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, CompressedTensorsConfig

import hf_elastic as he
from hf_elastic.hub.pushing import push_to_hub

pytestmark = pytest.mark.slow

LOGITS = "result = model.eval()(input_ids=ids)[0]"
TEXTS = ["The small dog runs.", "She sees a river again."]


@pytest.fixture(scope="module")
def pulled(shared_hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Every kind of artefact pushed, then read in one process that has no hf_elastic."""
    root = tmp_path_factory.mktemp("artefacts")
    push_to_hub(made.stock(root / "stock"), "tester/stock")
    push_to_hub(made.remote(root / "remote"), "tester/remote")
    push_to_hub(made.remote(root / "remote-bert", "bert"), "tester/remote-bert")
    push_to_hub(made.integers(root / "integers"), "tester/integers")
    push_to_hub(made.base(root), "tester/base")
    supernet = made.adapted(root / "base")
    adapter = he.extract_adapter(supernet, supernet.space.midpoint())
    push_to_hub(adapter, "tester/adapter", base_model="tester/base")
    adapter.save_pretrained(root / "adapter")
    supernet.model.save_pretrained(root / "elastic")
    push_to_hub(root / "elastic", "tester/elastic", base_model="tester/base")
    _apart(root)
    push_to_hub(root / "apart", "tester/apart")
    names = ("stock", "remote", "remote-bert", "integers", "adapter", "apart")
    jobs = {f"tester/{name}": LOGITS for name in names}
    jobs["tester/elastic"] = (
        f"{made.OWN}from peft import AutoPeftModelForCausalLM\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("tester/elastic")\n{LOGITS}'
    )
    reader = tmp_path_factory.mktemp("reader")
    yield root, made.read_from(shared_hub, reader, jobs, with_us=False)


def _apart(root: Path) -> None:
    """Adapters in one folder with the base of integers that they were trained on."""
    made.integers(root / "apart" / "base")
    parent = AutoModelForCausalLM.from_pretrained(
        root / "apart" / "base", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    supernet = he.add_lora(parent, he.ElasticLoraConfig(**made.LORA), seed=0)
    he.extract_adapter(supernet, supernet.space.largest(), base=str(root / "apart" / "base")).write(root / "apart")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=made.token_ids())[0]


def same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of sums, which differs between processes with where weights lie in memory."""
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_a_stock_export_is_pulled_by_transformers_alone(pulled: tuple[Path, dict[str, Tensor]]) -> None:
    root, results = pulled
    assert same(results["tester/stock"], logits(AutoModelForCausalLM.from_pretrained(root / "stock")))


@pytest.mark.parametrize("name", ["remote", "remote-bert"])
def test_a_remote_code_export_brings_its_code(pulled: tuple[Path, dict[str, Tensor]], name: str) -> None:
    root, results = pulled
    auto = AutoModelForMaskedLM if name.endswith("bert") else AutoModelForCausalLM
    assert same(results[f"tester/{name}"], logits(auto.from_pretrained(root / name)))


def test_a_model_of_integers_is_pulled_as_such(pulled: tuple[Path, dict[str, Tensor]], shared_hub: Any) -> None:
    root, results = pulled
    assert same(results["tester/integers"], logits(AutoModelForCausalLM.from_pretrained(root / "integers")))
    files = shared_hub.repositories["tester/integers"].files()
    assert len(files["model.safetensors"]) < 100_000 and b"pack-quantized" in files["config.json"]


def test_an_adapter_is_pulled_by_peft_with_its_base(pulled: tuple[Path, dict[str, Tensor]]) -> None:
    from peft import PeftModel

    root, results = pulled
    plain = AutoModelForCausalLM.from_pretrained(root / "base")
    unadapted = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, str(root / "adapter")))
    assert same(results["tester/adapter"], wanted) and not same(wanted, unadapted)


def test_an_elastic_adapter_is_pulled_by_peft_at_its_largest_rank(pulled: tuple[Path, dict[str, Tensor]]) -> None:
    root, results = pulled
    supernet = made.adapted(root / "base")
    with supernet.activate(supernet.space.largest()):
        assert same(results["tester/elastic"], logits(supernet.model))


def test_an_adapter_is_pulled_beside_its_base_of_integers(pulled: tuple[Path, dict[str, Tensor]]) -> None:
    from peft import PeftModel

    root, results = pulled
    unpacked = CompressedTensorsConfig(dequantize=True)
    parent = AutoModelForCausalLM.from_pretrained(root / "apart" / "base", quantization_config=unpacked)
    wanted = logits(PeftModel.from_pretrained(parent, str(root / "apart")))
    assert same(results["tester/apart"], wanted)


def test_a_sentence_encoder_of_a_run_is_pulled_by_sentence_transformers(shared_hub: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    small = made.compressed(tmp_path)
    push_to_hub(small, "tester/sentences")
    reader = tmp_path / "reader"
    reader.mkdir()
    code = f"result = model.encode({TEXTS!r})"
    found = made.read_from(shared_hub, reader, {"tester/sentences": code}, with_us=False)["tester/sentences"]
    wanted = sentence_transformers.SentenceTransformer(str(small)).encode(TEXTS)
    assert same(found, torch.as_tensor(wanted))
    assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-6)  # the Normalize module, whose folder is empty
