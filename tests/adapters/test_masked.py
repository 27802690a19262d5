"""SparsePEFT and QA-SparsePEFT against the formula written plainly, with autograd keeping everything alive."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from lora_models import randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import inputs, tiny
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_elastic import (
    CheckpointError,
    CompressionError,
    ElasticConfig,
    ElasticLoraConfig,
    ExportError,
    RandomSubnet,
    SubnetSamplingCallback,
    SubnetStatistics,
    Supernet,
    TrainingError,
    UnsupportedModelError,
    add_lora,
    export,
    extract,
    extract_adapter,
    load_adapter,
    make_elastic,
    quantize_,
    sparsify_,
)
from hf_elastic.adapters.lora_part import LoraPart
from hf_elastic.packed_format import quantised_layers
from hf_elastic.quantgrid import grid_of
from hf_elastic.report import describe_folder

SETTINGS: dict[str, Any] = {"r": 8, "ranks": [2, 4], "lora_alpha": 12, "target_modules": "all-linear"}
KINDS: dict[str, dict[str, Any]] = {
    "sparse": {"sparse": True},
    "symmetric": {"sparse": True, "quantization_aware": True},
    "asymmetric": {"sparse": True, "quantization_aware": True},
    "dense integers": {"quantization_aware": True},
    "float base": {"sparse": True, "quantization_aware": True},
}
SLOWER = [("bert", "sparse"), ("bert", "symmetric"), ("bert", "dense integers"), ("bert", "float base")]
CASES = [
    *(("llama", kind) for kind in KINDS), ("bert", "asymmetric"), ("gpt2", "sparse"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER),
]  # fmt: skip
BY_HAND = pytest.mark.parametrize(("family", "kind"), CASES)


def feed_of(model: PreTrainedModel) -> dict[str, Tensor]:
    feed = inputs(model)
    return {**feed, "labels": feed["input_ids"].clone()}


def base(family: str, kind: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """A sparse model, maybe of integers, and the float one that it was rounded from where that is given."""
    model = tiny(family, **changes)
    if kind != "dense integers":
        sparsify_(model, method="magnitude", sparsity=0.5)
    before = copy.deepcopy(model)
    if kind != "sparse":
        quantize_(model, group_size=16, symmetric=kind != "asymmetric", method="rtn")
    return model, before if kind == "float base" else None


def adapted(family: str, kind: str, *, noise: bool = True, **settings: Any) -> Supernet:
    model, float_base = base(family, kind)
    config = ElasticLoraConfig(**{**SETTINGS, **KINDS[kind], **settings})
    supernet = add_lora(model, config, seed=0, float_base=float_base)
    if noise:
        randomise(supernet.model)
    return supernet


def parts_of(supernet: Supernet) -> list[LoraPart]:
    return [part for part in supernet.adapter_parts if isinstance(part, LoraPart)]


def by_hand(supernet: Supernet, *, rank: int) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Merged weights by the formula, by name of the weight, and the factors that they are made of."""
    weights, factors = {}, {}
    for part in parts_of(supernet):
        down = part.down.weight.detach().clone().requires_grad_()
        up = part.up.weight.detach().clone().requires_grad_()
        turned = isinstance(part.base, Conv1D)
        own = part.base.weight.detach().t() if turned else part.base.weight.detach()
        start = own if part.start is None else part.start
        delta = (12 / 8) * (up[:, :rank] @ down[:rank])
        if part.sparse:
            delta = delta * (start != 0)
        merged = start + delta
        grid = grid_of(part.base, name="")
        if grid is not None:
            args = QuantizationArgs(num_bits=4, symmetric=grid.symmetric, strategy="group", group_size=16)
            rounded = fake_quantize(merged.detach(), scale=grid.scale, zero_point=grid.zero, args=args)
            merged = merged + (rounded - merged).detach()
        weights[f"{part.module_name}.weight"] = merged.t() if turned else merged
        factors[part.module_name] = (down, up)
    return weights, factors


@BY_HAND
def test_outputs_and_gradients_are_those_of_the_formula(family: str, kind: str) -> None:
    supernet = adapted(family, kind)
    plain, _ = base(family, kind)
    feed = feed_of(plain)
    for rank in (8, 2):
        supernet.model.zero_grad()
        weights, factors = by_hand(supernet, rank=rank)
        wanted = functional_call(plain, weights, (), feed)
        wanted.loss.backward()
        with supernet.activate({choice.name: rank for choice in supernet.space}):
            found = supernet.model(**feed)
            found.loss.backward()
        largest = float(wanted.logits.abs().max())
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-6 * largest)
        for part in parts_of(supernet):
            for mine, theirs in zip((part.down.weight, part.up.weight), factors[part.module_name], strict=True):
                scale = float(theirs.grad.abs().max())
                assert scale > 0
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale)
        assert not torch.allclose(found.logits, plain(**feed).logits, atol=1e-3), "the adapter does nothing"


@BY_HAND
def test_right_after_conversion_the_model_gives_what_its_base_does(family: str, kind: str) -> None:
    supernet = adapted(family, kind, noise=False)
    plain, float_base = base(family, kind)
    feed = inputs(plain)
    with torch.no_grad():
        found, wanted = supernet.model(**feed)[0], plain(**feed)[0]
    # With the float weights as the start the integers are those that these round to, here the very same.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert (float_base is not None) == (kind == "float base")


@BY_HAND
@pytest.mark.parametrize("rank", [8, 2])
def test_a_merged_model_is_the_supernet_and_keeps_what_it_must(family: str, kind: str, rank: int) -> None:
    supernet = adapted(family, kind)
    plain, _ = base(family, kind)
    point = supernet.point({choice.name: rank for choice in supernet.space})
    merged = extract(supernet, point, merge=True)
    feed = inputs(plain)
    with torch.no_grad(), supernet.activate(point):
        wanted = supernet.model(**feed)[0]
    with torch.no_grad():
        torch.testing.assert_close(merged(**feed)[0], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    weights, _ = by_hand(supernet, rank=rank)
    for part in parts_of(supernet):
        name = part.module_name
        made, module = weights[f"{name}.weight"].detach(), merged.get_submodule(name)
        torch.testing.assert_close(module.weight.detach(), made, rtol=1e-6, atol=1e-7)
        grid = grid_of(module, name=name)
        if part.quantization_aware:
            assert grid is not None and torch.equal(grid.integers(made), grid.integers(module.weight))
        if part.sparse:
            own = part.base.weight if part.start is None else part.start
            assert bool((module.weight[own == 0] == 0).all()), f"{name} lost zeros"
            if kind == "sparse":
                assert torch.equal(module.weight == 0, own == 0)


def test_nothing_of_the_size_of_a_weight_outlives_the_forward() -> None:
    supernet = adapted("llama", "sparse")
    weights = {part.base.weight.numel() for part in parts_of(supernet)}
    own = {id(p) for p in supernet.model.parameters()} | {p.data_ptr() for p in supernet.model.parameters()}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() in weights and tensor.data_ptr() not in own and tensor.ndim == 2:
            kept.append(tuple(tensor.shape))
        return tensor

    feed = {"input_ids": torch.arange(7).unsqueeze(0) + 3}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supernet.model(**feed)[0].sum().backward()
    assert not kept


def test_dropout_acts_on_the_adapter_alone_and_before_rounding_on_everything() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for kind in ("sparse", "symmetric"):
        supernet = adapted("llama", kind, lora_dropout=0.5)
        part = parts_of(supernet)[0]
        part.wrapper.train()
        weights, _ = by_hand(supernet, rank=8)
        merged, own = weights[f"{part.module_name}.weight"].detach(), part.base.weight.detach()
        torch.manual_seed(4)
        found = part.wrapper(x)
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x, 0.5)
        wanted = x @ own.t() + dropped @ (merged - own).t() if kind == "sparse" else dropped @ merged.t()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        part.wrapper.eval()
        torch.testing.assert_close(part.wrapper(x), x @ merged.t(), rtol=1e-4, atol=1e-5)


def test_half_precision_trains_with_the_very_weight_that_merging_writes() -> None:
    model = tiny("llama").to(torch.bfloat16)
    sparsify_(model, method="magnitude")
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    supernet = add_lora(model, ElasticLoraConfig(**SETTINGS, sparse=True), seed=0)
    randomise(supernet.model)
    part = parts_of(supernet)[0]
    assert part.down.weight.dtype == torch.float32
    merged = extract(supernet, supernet.space.largest(), merge=True)
    x = torch.randn(4, 32).to(torch.bfloat16)
    module = merged.get_submodule(part.module_name)
    assert torch.equal(part.wrapper(x), nn.functional.linear(x, module.weight))
    assert all(bool((t[zeros[name]] == 0).all()) for name, t in merged.state_dict().items())
    supernet.model(**feed_of(model)).loss.backward()
    assert part.up.weight.grad is not None and bool(torch.isfinite(part.up.weight.grad).all())


def test_autocast_computes_in_its_dtype_and_gives_gradients_of_the_factors() -> None:
    supernet = adapted("llama", "sparse")
    part = parts_of(supernet)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = supernet.model(**feed_of(supernet.base))
        assert part.wrapper(torch.randn(2, 32)).dtype == torch.bfloat16
    output.loss.backward()
    half = part.up.weight.grad.clone()
    supernet.model.zero_grad()
    supernet.model(**feed_of(supernet.base)).loss.backward()
    assert half.dtype == torch.float32
    assert float((half - part.up.weight.grad).norm()) < 0.1 * float(half.norm())


@pytest.mark.parametrize("kind", ["sparse", "symmetric"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        supernet = adapted("llama", kind)
        if checkpointing:
            supernet.base.gradient_checkpointing_enable({"use_reentrant": False})
            supernet.model.train()
        supernet.model(**feed_of(supernet.base)).loss.backward()
        gradients.append([part.up.weight.grad for part in parts_of(supernet)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- as peft is used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "asymmetric"])
def test_pefts_own_merging_merges_the_mask_and_gives_the_weights_back(kind: str) -> None:
    supernet = adapted("llama", kind)
    feed = inputs(supernet.base)
    before = {part.module_name: part.base.weight.clone() for part in parts_of(supernet)}
    with torch.no_grad():
        wanted = supernet.model(**feed)[0]
        supernet.model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(supernet.model(**feed)[0], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
        supernet.model.unmerge_adapter()
        assert torch.equal(supernet.model(**feed)[0], wanted)
        for part in parts_of(supernet):
            added = part.wrapper.get_delta_weight("default")
            assert bool((added[part.base.weight == 0] == 0).all()) and bool((added != 0).any())
    assert all(torch.equal(part.base.weight, before[part.module_name]) for part in parts_of(supernet))
    with torch.no_grad():
        plain = supernet.model.merge_and_unload()
        torch.testing.assert_close(plain(**feed)[0], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    if kind == "sparse":
        assert all(torch.equal(plain.get_submodule(name).weight == 0, own == 0) for name, own in before.items())


def test_a_broken_adapter_is_not_merged_safely() -> None:
    supernet = adapted("llama", "sparse")
    parts_of(supernet)[0].up.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        supernet.model.merge_adapter(safe_merge=True)


def test_several_adapters_add_up_and_rows_choose_among_them() -> None:
    supernet = adapted("llama", "sparse")
    model: Any = supernet.model
    model.add_adapter("plain", ElasticLoraConfig(**SETTINGS))
    model.add_adapter("other", ElasticLoraConfig(**SETTINGS, sparse=True))
    randomise(model)
    model.eval()
    supernet = Supernet(model)
    feed = {"input_ids": torch.arange(24).reshape(4, 6) + 3}
    alone = {}
    with torch.no_grad():
        for name in ("default", "plain", "other"):
            model.set_adapter(name)
            alone[name] = model(**feed)[0]
        with model.disable_adapter():
            alone["__base__"] = model(**feed)[0]
        names = ["other", "__base__", "plain", "default"]
        mixed = model(**feed, adapter_names=names)[0]
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
        model.base_model.set_adapter(["default", "plain", "other"])
        layers = {part.module_name: part.wrapper for part in parts_of(supernet)}
        name, layer = next(iter(layers.items()))
        x = torch.randn(3, 32)
        own = layer.get_base_layer().weight
        products = {a: 1.5 * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in ("default", "plain", "other")}
        total = own + (products["default"] + products["other"]) * (own != 0) + products["plain"]
        torch.testing.assert_close(layer(x), x @ total.t(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_names"):
        model(**feed, adapter_names=["other"])


def test_an_adapter_with_a_bias_is_merged_with_it() -> None:
    supernet = adapted("gpt2", "sparse", lora_bias=True)
    feed = inputs(supernet.base)
    merged = extract(supernet, supernet.space.smallest(), merge=True)
    with torch.no_grad(), supernet.activate(supernet.space.smallest()):
        wanted = supernet.model(**feed)[0]
        torch.testing.assert_close(merged(**feed)[0], wanted, rtol=1e-5, atol=1e-5)
    name = next(part.module_name for part in parts_of(supernet))
    assert not torch.equal(merged.get_submodule(name).bias, supernet.base.get_submodule(name).base_layer.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("first", ["default", "other"])
def test_two_adapters_cannot_decide_the_same_integers(first: str, dropout: float) -> None:
    supernet = adapted("llama", "symmetric", lora_dropout=dropout)
    model: Any = supernet.model
    kind = KINDS["symmetric"] if not dropout else {}
    model.add_adapter("other", ElasticLoraConfig(**SETTINGS, **kind, lora_dropout=dropout))
    Supernet(model)
    model.train(dropout > 0)
    model.base_model.set_adapter([first, "other" if first == "default" else "default"])
    with pytest.raises(UnsupportedModelError, match="one adapter at a time"):
        model(**inputs(supernet.base))
    model.set_adapter("other")
    model(**inputs(supernet.base))


def test_a_fixed_rank_can_be_trained_and_exported(tmp_path: Path) -> None:
    model, _ = base("llama", "sparse")
    supernet = Supernet(get_peft_model(model, ElasticLoraConfig(r=4, target_modules=["q_proj"], sparse=True)))
    assert supernet.space.size == 1
    supernet.model.save_pretrained(tmp_path / "adapter")
    assert "load_adapter alone" in describe_folder(tmp_path / "adapter")
    other = get_peft_model(base("llama", "sparse")[0], ElasticLoraConfig(r=4, target_modules=["q_proj"], sparse=True))
    other.save_pretrained(tmp_path / "other")  # no handle was ever made, so nothing is noted of its base
    assert load_adapter(base("llama", "sparse")[0], tmp_path / "other").space.size == 1
    randomise(supernet.model)
    report = export(supernet, supernet.space.largest(), tmp_path / "out", merge=True)
    assert report.sparsity == pytest.approx(0.5, abs=0.02) and "zero" in str(report)


def test_copies_and_pickles_compute_the_same() -> None:
    supernet = adapted("llama", "float base")
    feed = inputs(supernet.base)
    for copied in (copy.deepcopy(supernet.model), pickle.loads(pickle.dumps(supernet.model))):  # noqa: S301
        with torch.no_grad():
            assert torch.equal(copied(**feed)[0], supernet.model(**feed)[0])


def test_what_is_active_is_measured() -> None:
    supernet = adapted("llama", "sparse")
    for point in (supernet.space.largest(), supernet.space.smallest()):
        with supernet.activate(point):
            assert supernet.measured(**inputs(supernet.base)) == supernet.expected(point)


def test_a_cut_base_keeps_its_zeros_too() -> None:
    """Mode B with a sparse base: the mask is cut along."""
    model, _ = base("llama", "sparse")
    make_elastic(model, ElasticConfig(intermediate_size=[0.5], num_key_value_heads=[1]))
    supernet = add_lora(model, ElasticLoraConfig(**SETTINGS, sparse=True), seed=0)
    randomise(supernet.model)
    for point in (supernet.space.largest(), supernet.space.smallest()):
        merged = extract(supernet, point, merge=True)
        with torch.no_grad(), supernet.activate(point):
            wanted = supernet.model(**inputs(supernet.base))[0]
        torch.testing.assert_close(merged(**inputs(supernet.base))[0], wanted, rtol=1e-5, atol=1e-5)
        share = float((merged.model.layers[1].mlp.down_proj.weight == 0).float().mean())
        assert 0.3 < share < 0.7


def test_a_fused_projection_is_cut_in_each_third() -> None:
    model, _ = base("gpt2", "sparse")
    make_elastic(model, ElasticConfig(num_attention_heads=[2], intermediate_size=[0.5]))
    supernet = add_lora(model, ElasticLoraConfig(**SETTINGS, sparse=True), seed=0)
    randomise(supernet.model)
    point = supernet.space.smallest()
    merged = extract(supernet, point, merge=True)
    with torch.no_grad(), supernet.activate(point):
        wanted = supernet.model(**inputs(supernet.base))[0]
        supernet.model.merge_adapter()
        torch.testing.assert_close(supernet.model(**inputs(supernet.base))[0], wanted, rtol=1e-5, atol=1e-5)
        supernet.model.unmerge_adapter()
    torch.testing.assert_close(merged(**inputs(supernet.base))[0], wanted, rtol=1e-5, atol=1e-5)


# -- training and files -----------------------------------------------------------------------------------------------


def train(supernet: Supernet, folder: Path, *callbacks: Any, steps: int = 6) -> None:
    feed = inputs(supernet.base)
    rows = [{"input_ids": ids, "labels": ids} for ids in feed["input_ids"]] * 8
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with sampling:
        Trainer(model=supernet.model, args=args, train_dataset=rows, callbacks=[sampling, *callbacks]).train()
    supernet.model.eval()


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
folder, family, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
model = auto.from_pretrained(folder).eval()
with torch.no_grad():
    out = model(input_ids=torch.tensor(ids)).logits
assert not any(name.split(".")[0] == "hf_elastic" for name in sys.modules), "hf_elastic was imported"
print(json.dumps(out.double().flatten().tolist()))
"""


SLOW = pytest.mark.slow
OTHERS = [("llama", "asymmetric"), ("gpt2", "sparse")]
LOADED = [("llama", "symmetric"), *(pytest.param(*case, marks=SLOW) for case in OTHERS)]


@pytest.mark.parametrize(("family", "kind"), LOADED)
def test_a_trained_model_is_loaded_exactly_by_stock_transformers(family: str, kind: str, tmp_path: Path) -> None:
    supernet = adapted(family, kind, noise=False)
    train(supernet, tmp_path / "training")
    point = supernet.space.midpoint()
    report = export(supernet, point, tmp_path / "out", merge=True)
    assert report.bits == (None if kind == "sparse" else 4) and report.sparsity > 0.4
    ids = inputs(supernet.base)["input_ids"]
    arguments = [str(tmp_path / "out"), family, json.dumps(ids.tolist())]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, check=True)
    with torch.no_grad(), supernet.activate(point):
        ours = supernet.model(input_ids=ids)[0].double().flatten()
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


def test_the_integers_in_the_file_are_those_of_the_training_forward(tmp_path: Path) -> None:
    supernet = adapted("llama", "symmetric", noise=False)
    train(supernet, tmp_path / "training")
    base_integers = {n: grid_of(m, name=n).integers(m.weight) for n, m in quantised_layers(supernet.base).items()}  # type: ignore[union-attr]
    export(supernet, supernet.space.largest(), tmp_path / "out", merge=True)
    file = load_file(tmp_path / "out" / "model.safetensors")
    weights, _ = by_hand(supernet, rank=8)
    moved = 0
    for part in parts_of(supernet):
        name = part.module_name
        shape = part.base.weight.shape
        written = unpack_from_int32(file[f"{name}.weight_packed"], 4, torch.Size(shape))
        grid = grid_of(part.base, name=name)
        assert grid is not None and torch.equal(written, grid.integers(weights[f"{name}.weight"].detach()))
        held = next(t for n, t in base_integers.items() if n.startswith(name))
        moved += int((written != held).sum())
    assert moved > 100, "training changed no integer"


@pytest.mark.parametrize("kind", ["sparse", "float base"])
def test_saved_adapters_are_put_back_and_plain_peft_refuses_them(kind: str, tmp_path: Path) -> None:
    supernet = adapted("llama", kind)
    supernet.model.save_pretrained(tmp_path / "adapter")
    model, float_base = base("llama", kind)
    again = load_adapter(model, tmp_path / "adapter", float_base=float_base)
    feed = inputs(supernet.base)
    with torch.no_grad(), supernet.activate(supernet.space.smallest()), again.activate(again.space.smallest()):
        assert torch.equal(supernet.model(**feed)[0], again.model(**feed)[0])
    with pytest.raises(ValueError, match=r"hf_elastic\.load_adapter"):
        PeftModel.from_pretrained(base("llama", kind)[0], str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(tiny("llama") if kind == "sparse" else base("llama", kind, seed=1)[0], tmp_path / "adapter",
                     float_base=float_base)  # fmt: skip
    if kind == "float base":
        with pytest.raises(CheckpointError, match="was trained with float_base="):
            load_adapter(base("llama", kind)[0], tmp_path / "adapter")
        with pytest.raises(CheckpointError, match="another base"):
            load_adapter(base("llama", kind)[0], tmp_path / "adapter", float_base=base("llama", kind, seed=1)[1])
    else:
        with pytest.raises(CheckpointError, match="without float_base="):
            load_adapter(base("llama", kind)[0], tmp_path / "adapter", float_base=tiny("llama"))


def test_statistics_of_training_know_the_components(tmp_path: Path) -> None:
    supernet = adapted("llama", "sparse", noise=False)
    statistics = SubnetStatistics(supernet)
    train(supernet, tmp_path, statistics)
    assert statistics.steps == 6 and supernet.point(statistics.most_active(0.9))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_merge_that_would_lose_zeros_or_integers_is_refused() -> None:
    model, _ = base("llama", "sparse")
    supernet = add_lora(model, ElasticLoraConfig(**SETTINGS), seed=0)
    randomise(supernet.model)
    largest = supernet.space.largest()
    with pytest.raises(ExportError, match=r"50% zeros and its adapter was trained without sparse=True"):
        extract(supernet, largest, merge=True)
    dense = extract(supernet, largest, merge=True, allow_dense=True)
    assert float((dense.model.layers[0].mlp.up_proj.weight == 0).float().mean()) < 0.01
    extract(supernet, largest, merge=False)
    model, _ = base("llama", "symmetric")
    supernet = add_lora(model, ElasticLoraConfig(**SETTINGS), seed=0)
    with pytest.raises(ExportError, match="trained without quantization_aware=True"):
        extract(supernet, largest, merge=True)
    for kind in ("sparse", "symmetric"):
        supernet = adapted("llama", kind)
        with pytest.raises(ExportError, match="part of the weight, which no plain LoRA computes"):
            extract_adapter(supernet, supernet.space.largest())


REFUSED: list[tuple[Callable[[], PreTrainedModel], dict[str, Any], type[Exception], str]] = [
    (lambda: tiny("llama"), {"sparse": True}, CompressionError, "none of the targeted weights is zero"),
    (lambda: tiny("llama"), {"quantization_aware": True}, CompressionError, "no targeted layer has a grid"),
    (lambda: tiny("gpt2"), {"quantization_aware": True}, CompressionError, "no targeted layer has a grid"),
]


@pytest.mark.parametrize(("make", "kind", "error", "message"), REFUSED)
def test_a_base_that_does_not_fit_is_refused_and_left_as_it_was(
    make: Callable[[], PreTrainedModel], kind: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, before = make(), make().state_dict()
    with pytest.raises(error, match=message):
        add_lora(model, ElasticLoraConfig(**SETTINGS, **kind))
    assert model.state_dict().keys() == before.keys()


def test_a_float_base_must_fit() -> None:
    model, before = base("llama", "float base")
    config = ElasticLoraConfig(**SETTINGS, **KINDS["symmetric"])
    with pytest.raises(CompressionError, match="of the shape of the base's"):
        add_lora(model, config, float_base=tiny("llama", intermediate_size=64))
    with pytest.raises(CompressionError, match="float_base is for quantization_aware=True"):
        add_lora(base("llama", "sparse")[0], ElasticLoraConfig(**SETTINGS, sparse=True), float_base=before)
    add_lora(model, config, float_base=before)


def test_a_base_that_is_trained_itself_is_refused() -> None:
    supernet = adapted("llama", "sparse")
    parts_of(supernet)[0].base.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="is trained itself"):
        supernet.model(**inputs(supernet.base))


def test_a_packed_checkpoint_is_unpacked_before_adapters(tmp_path: Path) -> None:
    supernet = adapted("llama", "symmetric")
    export(supernet, supernet.space.largest(), tmp_path / "out", merge=True)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = ElasticLoraConfig(**SETTINGS, **KINDS["symmetric"])
    with pytest.raises(UnsupportedModelError, match=r"unpack_\(model\)"):
        get_peft_model(copy.deepcopy(packed), config)
    again = add_lora(packed, config, seed=0)
    feed = inputs(supernet.base)
    with torch.no_grad():
        assert torch.equal(again.model(**feed)[0], supernet.model(**feed)[0])
