"""Bases that sparse and quantization-aware adapters may stand on: no merge fills zeros or moves integers unsaid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import randomise
from peft import get_peft_model
from tiny_models import inputs, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_elastic import (
    CheckpointError,
    CompressionError,
    ElasticLoraConfig,
    ExportError,
    Supernet,
    UnsupportedModelError,
    add_lora,
    export,
    extract,
    load_adapter,
    quantize_,
    save_quantized,
    sparsify_,
    unpack_,
)
from hf_elastic.packed_format import is_quantised, quantised_layers
from hf_elastic.pipeline.compressed_base import merge_adapter
from hf_elastic.quantgrid import grid_of, pruned_share

SETTINGS: dict[str, Any] = {"r": 8, "ranks": [2, 4], "lora_alpha": 12, "target_modules": "all-linear"}
AWARE: dict[str, Any] = {**SETTINGS, "sparse": True, "quantization_aware": True}


def sparse(family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = tiny(family, **changes)
    sparsify_(model, method="magnitude", sparsity=0.5)
    return model


def rounded(model: PreTrainedModel, *, bits: int = 4, **settings: Any) -> PreTrainedModel:
    quantize_(model, group_size=16, method="rtn", bits=bits, **settings)
    return model


def trained(model: PreTrainedModel, config: dict[str, Any], **about: Any) -> Supernet:
    supernet = add_lora(model, ElasticLoraConfig(**config), seed=0, **about)
    randomise(supernet.model)
    return supernet


def integers(model: torch.nn.Module) -> dict[str, Tensor]:
    grids = {name: (module, grid_of(module, name=name)) for name, module in quantised_layers(model).items()}
    return {name: grid.integers(module.weight) for name, (module, grid) in grids.items() if grid is not None}


def test_an_adapter_that_fills_zeros_of_a_pruned_integer_base_is_not_merged() -> None:
    supernet = trained(rounded(sparse()), {**SETTINGS, "quantization_aware": True})
    with pytest.raises(ExportError, match="had 50% zeros before it was quantised .* train with sparse=True too"):
        extract(supernet, supernet.space.largest(), merge=True)
    extract(supernet, supernet.space.largest(), merge=True, allow_dense=True)
    dense = trained(rounded(tiny("llama")), {**SETTINGS, "quantization_aware": True})
    extract(dense, dense.space.largest(), merge=True)  # its zeros are there by rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_file_tells_pruned_zeros_from_rounded_ones(bits: int, symmetric: bool, tmp_path: Path) -> None:
    for name, made, wanted in (("dense", tiny("llama"), 0.0), ("sparse", sparse(), 0.5)):
        save_quantized(rounded(made, bits=bits, symmetric=symmetric), tmp_path / name)
        loaded = unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        shares = [pruned_share(module, name=n) for n, module in quantised_layers(loaded).items()]
        assert shares and all(abs(share - wanted) < 0.1 for share in shares), name


def test_a_float_base_is_the_one_that_was_quantised() -> None:
    before = sparse()
    base = rounded(copy.deepcopy(before))
    add_lora(copy.deepcopy(base), ElasticLoraConfig(**AWARE), float_base=before)
    wrong: list[tuple[PreTrainedModel, dict[str, Any], str]] = [
        (tiny("llama"), AWARE, "no weight of float_base is zero"),
        (sparse(seed=5), AWARE, "is zero in float_base where the base is not"),
        (tiny("llama", seed=5), {**SETTINGS, "quantization_aware": True}, "has other weights in float_base"),
    ]
    for float_base, config, message in wrong:
        with pytest.raises(CompressionError, match=message):
            add_lora(copy.deepcopy(base), ElasticLoraConfig(**config), float_base=float_base)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_float_base_of_few_bits_is_recognised(bits: int, method: Any) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model)
    quantize_(model, [inputs(model, batch_size=8)], group_size=16, method=method, bits=bits)
    add_lora(model, ElasticLoraConfig(**SETTINGS, quantization_aware=True), float_base=before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (7, False), (4, True)])
def test_a_file_holds_the_very_integers_in_every_precision(
    bits: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = rounded(tiny("llama").to(dtype), bits=bits, symmetric=symmetric)
    save_quantized(model, tmp_path / "out")
    loaded = unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype))
    ours, theirs = integers(model), integers(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rounded_adapters_are_merged_in_the_precision_that_they_saw(tmp_path: Path) -> None:
    save_quantized(rounded(sparse().bfloat16()), tmp_path / "base")
    supernet = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), AWARE)
    supernet.model.save_pretrained(tmp_path / "adapter")
    export(supernet, supernet.space.largest(), tmp_path / "here", merge=True)
    merge_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "there"))
    here, there = (unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("here", "there"))
    ours, theirs = integers(here), integers(there)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert there.dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"in bfloat16, and in float32 would round .* dtype=torch.bfloat16"):
        load_adapter(wide, tmp_path / "adapter")


def _other_integers(model: PreTrainedModel) -> None:
    name, module = list(quantised_layers(model).items())[-1]
    grid = grid_of(module, name=name)
    assert grid is not None
    moved = grid.integers(module.weight)
    moved[1, 1] = 3 if moved[1, 1] != 3 else 2
    module.weight.data = grid.values(moved)


def _other_embeddings(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.data.mul_(-1)  # type: ignore[operator]


def _filled(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight").data.add_(0.01)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_other_integers, "integers", "other integers or scales"),
        (_other_embeddings, "zeros", "embed_tokens has other"),
        (_filled, "zeros", r"trained on a base with \d+ zeros"),
    ],
)  # fmt: skip
def test_another_base_is_noticed_wherever_it_differs(
    change: Callable[[PreTrainedModel], None], kind: str, message: str, tmp_path: Path
) -> None:
    made: Callable[[], PreTrainedModel] = (lambda: rounded(sparse())) if kind == "integers" else sparse
    config = AWARE if kind == "integers" else {**SETTINGS, "sparse": True}
    trained(made(), config).model.save_pretrained(tmp_path)
    load_adapter(made(), tmp_path)
    other = made()
    change(other)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("order", [["plain", "sp"], ["sp", "plain"]])
def test_a_plain_adapter_beside_a_sparse_one_does_not_change_its_mask(order: list[str]) -> None:
    model = get_peft_model(sparse(), ElasticLoraConfig(**SETTINGS), "plain")
    model.add_adapter("sp", ElasticLoraConfig(**SETTINGS, sparse=True))
    randomise(model)
    model.base_model.set_adapter(order)
    supernet = Supernet(model.eval())
    with torch.no_grad():
        wanted = model(**inputs(supernet.base)).logits
        one = extract(supernet, supernet.space.largest(), merge=True, allow_dense=True)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=order)
        for found in (one, merged):
            assert float((found(**inputs(one)).logits - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    held = copy.deepcopy(model)
    held.merge_adapter(["plain"])
    with pytest.raises(ValueError, match="hides the zeros"):
        held.merge_adapter(["sp"])


@pytest.mark.parametrize("kind", ["zeros", "integers", "plain"])
def test_merging_under_autocast_writes_the_same_weights(kind: str) -> None:
    config = {"zeros": {**SETTINGS, "sparse": True}, "integers": AWARE, "plain": SETTINGS}[kind]
    base = {"zeros": sparse, "integers": lambda: rounded(sparse()), "plain": lambda: tiny("llama")}[kind]()
    supernet = trained(base, config)
    wanted = extract(supernet, supernet.space.largest(), merge=True).state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extract(supernet, supernet.space.largest(), merge=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_model_with_adapters_is_not_written_as_a_quantised_one(tmp_path: Path) -> None:
    supernet = trained(rounded(tiny("llama")), SETTINGS)
    for model in (supernet.base, supernet.model):
        with pytest.raises(ExportError, match=r"has an adapter: export\(supernet"):
            save_quantized(model, tmp_path / "out")
    with supernet.plain() as plain:
        save_quantized(plain, tmp_path / "out")
    assert quantised_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_base_of_other_numbers_than_integers_is_refused_for_rounding() -> None:
    model = rounded(tiny("llama"))
    for module in quantised_layers(model).values():
        vars(module)["quantization_scheme"].weights.type = "float"
    assert all(is_quantised(module) for module in quantised_layers(model).values())
    with pytest.raises(UnsupportedModelError, match="quantised to no integers of 2 to 8 bits"):
        add_lora(model, ElasticLoraConfig(**SETTINGS, quantization_aware=True))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_broken_scales_of_a_checkpoint_are_noticed_also_where_adapters_stay_apart(value: float, tmp_path: Path) -> None:
    model = rounded(tiny("llama"))
    save_quantized(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.get_submodule("model.layers.1.mlp.up_proj").weight_scale.data[0, 0] = value
    with pytest.raises(CheckpointError, match="up_proj has quantisation scales that are not positive"):
        add_lora(loaded, ElasticLoraConfig(**SETTINGS))
