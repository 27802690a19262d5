"""Weights in half precision on a device, where TF32 is allowed, generation, and answers that a teacher writes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import block_models
import pytest
import torch
from lora_models import randomise
from on_device import close, feed, output, placed, share_equal, stays, token_batches
from test_answers import PROMPTS, teacher, tokenizer
from tiny_models import point, space, supernet_of, tiny
from tiny_training import bert_supernet, llama_supernet, sentences, settings, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig, Trainer, TrainingArguments

import hf_elastic as he
from hf_elastic import ElasticLoraConfig, RandomSubnet, Supernet, extract, make_elastic
from hf_elastic.packed_format import quantised_layers
from hf_elastic.repair.answers import write_answers

BF16, FP16 = torch.bfloat16, torch.float16
ROUGH = {BF16: 0.05, FP16: 0.02}  # of the largest output
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
NARROW = {"ffn0": 16, "ffn1": 24, "heads0": 1, "skip2": "mlp"}


def half(family: str, device: str, dtype: torch.dtype = BF16) -> Supernet:
    return make_elastic(placed(tiny(family).to(dtype), device), space(family))


# -- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "distilbert", "gpt2"])
def test_an_extracted_subnet_in_half_precision_equals_the_active_one(
    family: str, dtype: torch.dtype, device: str
) -> None:
    made, single = half(family, device, dtype), supernet_of(family)
    batch = token_batches(made.model)[0]
    for architecture in (made.space.largest(), made.space.midpoint(), made.space.smallest()):
        with made.activate(architecture):
            wanted = output(made.model, batch)
        got = extract(made, architecture)
        stays(got, device)
        assert {p.dtype for p in got.parameters()} == {dtype}
        close(output(got, batch), wanted, tolerance=ROUGH[dtype], what=repr(architecture))
        with single.activate(architecture):
            close(wanted, output(single.model, batch), tolerance=3 * ROUGH[dtype], what="beside single precision")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_supernet_in_half_precision_is_sorted_repaired_and_written(family: str, device: str, tmp_path: Path) -> None:
    made = half(family, device)
    batches = token_batches(made.model, rows=10)
    he.sort_by_importance_(made, batches)
    architecture = point(made, **NARROW)
    repaired = he.refit(made, architecture, batches)
    stays(repaired, device)
    assert {p.dtype for p in made.model.parameters()} == {p.dtype for p in repaired.parameters()} == {BF16}
    report = he.export(made, architecture, tmp_path / "out", model=repaired)
    loaded = AUTO[family].from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto").eval()
    theirs = loaded.state_dict()
    assert all(torch.equal(t.cpu(), theirs[n]) for n, t in repaired.state_dict().items()), report.loadability
    close(output(loaded, batches[0]), output(repaired, batches[0]), tolerance=ROUGH[BF16], what="logits on the CPU")


def test_half_precision_weights_are_made_sparse_and_of_integers(device: str, tmp_path: Path) -> None:
    model = placed(tiny("llama").to(BF16), device)
    batches = token_batches(model)
    he.sparsify_(model, batches)
    he.quantize_(model, batches, group_size=16)
    stays(model, device)
    he.save_quantized(model, tmp_path / "out")
    loaded = he.unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval())
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            assert torch.equal(loaded.get_parameter(name), parameter.cpu()), name


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_adapters_on_a_half_precision_base_merge_into_what_they_compute(kind: str, device: str) -> None:
    model = tiny("llama")
    if kind == "sparse":
        he.sparsify_(model, method="magnitude")
    config = ElasticLoraConfig(r=8, ranks=[2, 4], target_modules="all-linear", sparse=kind == "sparse")
    made = he.add_lora(model, config)
    randomise(made.model)
    made.base.to(BF16)
    placed(made, device)
    batch = token_batches(made.base)[0]
    for architecture in (made.space.largest(), made.space.smallest()):
        with made.activate(architecture):
            wanted = output(made.model, batch)
        merged = extract(made, architecture, merge=True)
        stays(merged, device)
        close(output(merged, batch), wanted, tolerance=ROUGH[BF16], what=repr(architecture))


def test_half_precision_adapters_round_to_the_same_integers_on_the_cpu(device: str) -> None:
    """What was trained on a GPU is merged by ``hf-elastic merge`` on a CPU."""
    model = tiny("llama").to(BF16)
    he.sparsify_(model, method="magnitude")
    he.quantize_(model, group_size=16, method="rtn")
    config = ElasticLoraConfig(
        r=8, ranks=[2, 4], target_modules="all-linear", sparse=True, quantization_aware=True
    )  # fmt: skip
    made = he.add_lora(model, config)
    randomise(made.model)
    made.model.to(BF16)
    merged = []
    for where in ("cpu", device):
        placed(made, where)
        merged.append(quantised_layers(extract(made, made.space.largest(), merge=True)))
    there, here = ([module.weight for module in layers.values()] for layers in merged)
    alike = share_equal(here, there)
    assert alike >= 0.999, f"{alike:.2%} of the weights are equal"


@pytest.mark.parametrize("kind", block_models.TYPES)
def test_paths_of_blocks_in_half_precision_equal_the_active_ones(kind: str, device: str) -> None:
    made = make_elastic(placed(block_models.tiny(kind, **block_models.FUSED).to(BF16), device))
    batch = {"input_ids": block_models.tokens()}
    for architecture in (made.space.largest(), made.space.midpoint(), made.space.smallest()):
        with made.activate(architecture):
            wanted = output(made.model, batch)
        close(output(extract(made, architecture), batch), wanted, tolerance=ROUGH[BF16], what=repr(architecture))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_routers_of_a_half_precision_model_are_fitted_and_written(family: str, device: str, tmp_path: Path) -> None:
    config = he.RoutingConfig(mlp_tokens=[0.5], attention_tokens=[0.6], heads=[1])
    made = he.add_routing(placed(tiny(family).to(BF16), device), config)
    batches = [feed(batch, device) for batch in token_batches(made.model, rows=8)]
    he.fit_routers(made, batches)
    he.calibrate_routing(made, batches)
    he.set_capacity(made, mlp_tokens=0.5, attention_tokens=0.6, heads=1)
    assert bool(torch.isfinite(output(made.model, batches[0])).all())
    he.export(made, made.active, tmp_path / "out")
    loaded = AUTO[family].from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto").eval()
    assert bool(torch.isfinite(output(placed(loaded, device), batches[0])).all())


# -- behind a training in mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["elastic", "stock"])
@pytest.mark.parametrize("make", [bert_supernet, llama_supernet], ids=["bert", "llama"])
def test_a_supernet_that_was_trained_in_mixed_precision_is_written(
    make: Callable[..., Supernet], trainer: str, device: str, tmp_path: Path
) -> None:
    made = make(skip=("mlp",))
    where = {"use_cpu": torch.device(device).type == "cpu", "bf16": True}
    args, rows = TrainingArguments(**settings(str(tmp_path / "run"), **where)), texts() if made.causal else sentences()
    if trainer == "elastic":
        he.ElasticTrainer(supernet=made, sampling=RandomSubnet(seed=1), args=args, train_dataset=rows).train()
    else:
        sampling = he.SubnetSamplingCallback(made, RandomSubnet(seed=1))
        Trainer(made.model, args, train_dataset=rows, callbacks=[sampling]).train()
    for number, architecture in enumerate((made.space.largest(), made.space.midpoint())):
        report = he.export(made, architecture, tmp_path / str(number))
        assert report.max_difference < 1e-4


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_subnets_are_written_where_tf32_is_allowed(family: str, device: str, tmp_path: Path, tf32: None) -> None:
    made = placed(supernet_of(family), device)
    for number, architecture in enumerate((made.space.midpoint(), point(made, **NARROW))):
        he.export(made, architecture, tmp_path / str(number))


# -- generation -------------------------------------------------------------------------------------------------------


def generated(model: Any, prompt: Tensor) -> Tensor:
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    where = next(model.parameters()).device
    with torch.no_grad():
        found: Tensor = model.generate(prompt.to(where), generation_config=settings)
    return found.cpu()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_an_active_subnet_generates_what_it_generates_once_extracted(family: str, device: str) -> None:
    made = placed(make_elastic(tiny(family, eos_token_id=None), space(family)), device)
    prompt = torch.arange(3, 15).view(2, 6)
    for architecture in (made.space.midpoint(), made.space.smallest()):
        with made.activate(architecture):
            wanted = generated(made.model, prompt)
        assert wanted.shape == (2, 16)
        assert torch.equal(generated(extract(made, architecture), prompt), wanted), repr(architecture)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_teacher_writes_the_same_answers_again_on_the_device(temperature: float, device: str, tmp_path: Path) -> None:
    model = placed(teacher(), device)
    given: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2, "temperature": temperature, "seed": 3}
    generator = torch.Generator(device)
    state = (torch.get_rng_state(), generator.get_state())
    found = [
        write_answers(model, tokenizer(), PROMPTS, output=tmp_path / f"{number}.jsonl", **given) for number in range(2)
    ]
    assert found[0] == found[1] and len(found[0]) == len(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state[0])
    if not temperature:
        on_cpu = write_answers(teacher(), tokenizer(), PROMPTS, output=tmp_path / "cpu.jsonl", **given)
        assert [row["messages"] for row in found[0]] == [row["messages"] for row in on_cpu]
