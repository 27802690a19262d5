"""Extracted adapters: loaded, merged and hot-swapped by stock peft, with and without an elastic base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import elastic, logits, sliced_stock, stock
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file
from tiny_models import inputs, space, tiny
from torch import Tensor

from hf_elastic import (
    CheckpointError,
    ElasticLoraConfig,
    ExportError,
    Supernet,
    UnsupportedModelError,
    export,
    extract,
    extract_adapter,
    make_elastic,
)

FAMILIES = ["llama", "bert", "gpt2"]


def mixed(supernet: Supernet) -> dict[str, Any]:
    """Another rank in each layer, the middle of everything else."""
    point = dict(supernet.space.midpoint())
    ranks = [choice for choice in supernet.space if choice.name.endswith("r")]
    for number, choice in enumerate(ranks):
        point[choice.name] = choice.values[number % len(choice.values)]
    return dict(supernet.space.canonical(point))


def in_another_process(base: Path, adapter: Path, feed: dict[str, Tensor], wanted: Tensor) -> tuple[float, float]:
    file = adapter.parent / "wanted.safetensors"
    save_file({**feed, "logits": wanted.contiguous()}, file)
    script = Path(__file__).parent / "loaded_by_stock_peft.py"
    done = subprocess.run(
        [sys.executable, str(script), str(base), str(adapter), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    unmerged, merged = map(float, done.stdout.split()[-2:])
    return unmerged, merged


def stock_merge_difference(family: str, ranks: dict[str, int]) -> float:
    """What stock peft's own merge changes, on the same weights at the same ranks."""
    model = sliced_stock(family, ranks)
    before = logits(model)
    return float((logits(model.merge_and_unload()) - before).abs().max())


# -- ranks alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_hf_elastic_loads_and_merges_it(family: str, tmp_path: Path) -> None:
    supernet = elastic(tiny(family))
    tiny(family).save_pretrained(tmp_path / "base")
    point = mixed(supernet)
    extract_adapter(supernet, point).save_pretrained(tmp_path / "adapter")
    with supernet.activate(point):
        wanted = logits(supernet.model)
    unmerged, merged = in_another_process(tmp_path / "base", tmp_path / "adapter", inputs(supernet.base), wanted)
    scale = float(wanted.abs().max())
    assert unmerged <= 1e-6 * scale
    ranks = {part.module_name: part.rank(point) for part in supernet.adapter_parts}  # type: ignore[attr-defined]
    assert merged <= max(5 * stock_merge_difference(family, ranks), 1e-6 * scale)


@pytest.mark.parametrize("hotswap", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_it_computes_what_was_active(settings: dict[str, Any], hotswap: bool) -> None:
    supernet = elastic(tiny("bert"), **settings)
    for point in (mixed(supernet), supernet.space.smallest(), supernet.space.largest()):
        with supernet.activate(point):
            wanted = logits(supernet.model)
        found = logits(extract_adapter(supernet, point, hotswap=hotswap).onto(tiny("bert")))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_ranks_and_scalings_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    supernet = elastic(tiny("llama"), target_modules=["q_proj"])
    point = {"layers.0.r": 2, "layers.1.r": 4, "layers.2.r": 8}
    extract_adapter(supernet, point).save_pretrained(tmp_path / "mixed")
    written = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (8, 12)
    assert sorted(written["rank_pattern"].values()) == [2, 4] and sorted(written["alpha_pattern"].values()) == [3, 6]
    assert sorted(written["target_modules"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert not {"ranks", "share", "trained_on"} & written.keys()
    uniform = extract_adapter(supernet, supernet.space.smallest()).config
    assert (uniform.r, uniform.lora_alpha, uniform.rank_pattern, uniform.alpha_pattern) == (2, 3, {}, {})


def test_hot_swapping_is_exact_in_the_padded_form(tmp_path: Path) -> None:
    supernet = elastic(tiny("llama"))
    points = {"a": mixed(supernet), "b": dict(supernet.space.smallest())}
    wanted = {}
    for name, point in points.items():
        extract_adapter(supernet, point, hotswap=True).save_pretrained(tmp_path / name)
        with supernet.activate(point):
            wanted[name] = logits(supernet.model)
    served = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a").eval()
    for name in ("a", "b", "a"):
        hotswap_adapter(served, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(logits(served), wanted[name], rtol=1e-5, atol=2e-6)


def test_the_named_adapter_is_extracted_and_others_stay_out() -> None:
    from test_elastic_lora import with_two

    supernet = with_two()
    supernet.model.set_adapter("other")
    point = supernet.space.smallest()
    with supernet.activate(point):
        wanted = logits(supernet.model)
    adapter = extract_adapter(supernet, point, adapter_name="other")
    assert adapter.config.r == 3 and all("up_proj" not in name for name in adapter.weights)
    torch.testing.assert_close(logits(adapter.onto(tiny("llama"))), wanted, rtol=1e-5, atol=2e-6)
    with pytest.raises(ExportError, match="no adapter 'math'.*default, other"):
        extract_adapter(supernet, point, adapter_name="math")


def test_modules_to_save_go_with_the_adapter() -> None:
    supernet = elastic(tiny("bert", "sequence"), target_modules=["query"], modules_to_save=["classifier"])
    with torch.no_grad():
        supernet.model.base_model.model.classifier.modules_to_save["default"].weight += 1.0
    point = supernet.space.smallest()
    with supernet.activate(point):
        wanted = logits(supernet.model)
    found = extract_adapter(supernet, point).onto(tiny("bert", "sequence"))
    torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=2e-6)
    merged = extract(supernet, point, merge=True)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)


# -- with an elastic base ---------------------------------------------------------------------------------------------


def mode_b(family: str, **changes: Any) -> Supernet:
    model = tiny(family)
    make_elastic(model, space(family, skip={1: ["attention", "mlp"]}, **changes))
    return elastic(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_base_and_its_adapter_load_in_a_process_without_hf_elastic(family: str, tmp_path: Path) -> None:
    supernet = mode_b(family)
    point = mixed(supernet)
    export(supernet, point, tmp_path / "base", loadability="remote-code", merge=False)
    extract_adapter(supernet, point, base=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    with supernet.activate(point):
        wanted = logits(supernet.model)
    unmerged, merged = in_another_process(tmp_path / "base", tmp_path / "adapter", inputs(supernet.base), wanted)
    scale = float(wanted.abs().max())
    assert unmerged <= 5e-6 * scale and merged <= 2e-5 * scale


def test_layers_that_are_left_out_are_left_out_of_the_adapter_too() -> None:
    supernet = mode_b("llama")
    point = supernet.point({**supernet.space.largest(), "num_hidden_layers": 2})
    kept = [shape for shape in supernet.layer_shapes(point) if not shape.skipped]
    adapter = extract_adapter(supernet, point)
    assert len(kept) == 2 and {name.split(".")[4] for name in adapter.weights} == {"0", "1"}
    base = extract(supernet, point, merge=False)
    with supernet.activate(point):
        torch.testing.assert_close(logits(adapter.onto(base)), logits(supernet.model), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["stock", "stock-padded", "remote-code"])
def test_a_merged_export_is_one_plain_model(form: Any, tmp_path: Path) -> None:
    supernet = mode_b("llama", num_key_value_heads=None) if form == "stock" else mode_b("llama")
    point = supernet.space.canonical(
        {**supernet.space.largest(), **{f"layers.{i}.intermediate_size": 24 for i in range(3)}, "layers.0.r": 2}
    )
    if form != "stock":
        point = supernet.space.canonical({**point, "layers.0.intermediate_size": 16})
    report = export(supernet, point, tmp_path / "merged", loadability=form, merge=True)
    assert report.loadability == form
    with supernet.activate(point):
        wanted = logits(supernet.model)
    found = extract(supernet, point, loadability=form, merge=True)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5)
    assert all(".lora_" not in name and "base_layer" not in name for name in found.state_dict())


def test_a_merged_export_of_ranks_alone_is_the_parent_class(tmp_path: Path) -> None:
    supernet = elastic(tiny("gpt2"))
    export(supernet, supernet.space.smallest(), tmp_path / "merged", merge=True)
    loaded = type(tiny("gpt2")).from_pretrained(tmp_path / "merged").eval()
    with supernet.activate(supernet.space.smallest()):
        torch.testing.assert_close(logits(loaded), logits(supernet.model), rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in supernet.base.state_dict().items()}
    export(supernet, supernet.space.largest(), tmp_path / "again", merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.base.state_dict().items())


def test_a_supernet_with_adapters_is_saved_as_a_stock_checkpoint_with_the_adapters_beside_it(tmp_path: Path) -> None:
    from hf_elastic import load_adapter

    supernet = mode_b("llama")
    supernet.save_pretrained(tmp_path / "saved")
    base = Supernet.from_pretrained(tmp_path / "saved")
    assert base.space == make_elastic(tiny("llama"), space("llama", skip={1: ["attention", "mlp"]})).space
    again = load_adapter(base.model, tmp_path / "saved" / "adapter")
    assert again.space == supernet.space
    for point in (mixed(supernet), supernet.space.smallest()):
        with supernet.activate(point), again.activate(point):
            assert torch.equal(logits(again.model), logits(supernet.model))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_becomes_of_adapters_must_be_said() -> None:
    supernet = elastic(tiny("llama"))
    with pytest.raises(ExportError, match="merge=True"):
        extract(supernet, supernet.space.largest())
    plain = make_elastic(tiny("llama"), space("llama"))
    with pytest.raises(ExportError, match="no adapters"):
        extract(plain, plain.space.largest(), merge=True)


@pytest.mark.parametrize("unload", [False, True])
def test_nothing_is_extracted_from_a_merged_model(unload: bool) -> None:
    supernet = elastic(tiny("llama"))
    point = supernet.space.largest()
    model = supernet.model.merge_and_unload() if unload else supernet.model
    if not unload:
        model.merge_adapter()
    for attempt in (lambda: extract_adapter(supernet, point), lambda: extract(supernet, point, merge=True)):
        with pytest.raises(ExportError, match="merged into the weights"):
            attempt()
    if unload:
        with pytest.raises(UnsupportedModelError, match="no elastic part"):
            Supernet(model)


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    supernet = elastic(tiny("llama"))
    with pytest.raises(CheckpointError, match="not empty"):
        extract_adapter(supernet, supernet.space.largest()).save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_stock_models_stay_what_they_are() -> None:
    assert torch.equal(logits(stock(tiny("llama"))), logits(elastic(tiny("llama")).model))


def test_what_merging_would_break_is_refused() -> None:
    tied = elastic(tiny("llama", tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ExportError, match="lm_head shares its weight"):
        extract(tied, tied.space.largest(), merge=True)
    biased = elastic(tiny("llama"), lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(ExportError, match="no bias to merge"):
        extract(biased, biased.space.largest(), merge=True)
    from test_elastic_lora import quantised

    packed = get_peft_model(quantised(4)[0], ElasticLoraConfig(r=8, ranks=[2], target_modules=["query"]))
    supernet = Supernet(packed)
    for merge in (True, False):
        with pytest.raises(ExportError, match="quantised"):
            extract(supernet, supernet.space.largest(), merge=merge)


def test_the_cut_base_is_written_in_the_form_that_its_adapter_fits(tmp_path: Path) -> None:
    supernet = mode_b("bert")
    widths = {f"layers.{i}.intermediate_size": width for i, width in enumerate((16, 24, 48))}
    point = supernet.space.canonical({**supernet.space.largest(), **widths})
    assert supernet.loadability(point) == "stock-padded"
    assert export(supernet, point, tmp_path / "base", merge=False).loadability == "remote-code"
    with pytest.raises(ExportError, match="does not fit a base that is padded"):
        export(supernet, point, tmp_path / "padded", merge=False, loadability="stock-padded")


def test_a_plain_adapter_beside_elastic_ones_can_be_extracted() -> None:
    supernet = elastic(tiny("llama"), target_modules=["q_proj"])
    supernet.model.add_adapter("plain", LoraConfig(r=5, target_modules=["q_proj"]))
    both = Supernet(supernet.model)
    assert extract_adapter(both, both.space.smallest(), adapter_name="plain").config.r == 5
