"""Routers in a folder of their own: bit-equal after a round trip, and only on the base that they were trained on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from routed_checkpoints import chosen, padded, randomise, routed, routers_in, routing_of, run
from tiny_models import disk_full_at, outputs, space, tiny
from torch import nn

from hf_elastic import (
    CheckpointError,
    SpaceError,
    Supernet,
    UnsupportedModelError,
    add_routing,
    extract,
    make_elastic,
    set_capacity,
)
from hf_elastic.routers_folder import ROUTERS_FILE, WEIGHTS_FILE, save_routers
from hf_elastic.routing import load_routers

FAMILIES = ("bert", "roberta", "llama", "qwen3", "gpt2")


def elastic(family: str) -> Any:
    """A tiny model made elastic as :func:`routed` does it."""
    model = tiny(family)
    make_elastic(model, space(family, intermediate_size=[24, 48]))
    return model


def states(supernet: Supernet) -> dict[str, torch.Tensor]:
    """Everything that routers hold, by layer."""
    return {
        f"{part.layer.index}.{name}": tensor
        for part in supernet.router_parts
        for name, tensor in part.routers.state_dict().items()
    }


def equal(left: Supernet, right: Supernet) -> bool:
    ours, theirs = states(left), states(right)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].float().nan_to_num(9.0), theirs[name].float().nan_to_num(9.0)) for name in ours
    )


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "elastic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_come_back_bit_equal_onto_their_base(family: str, kind: str, tmp_path: Path) -> None:
    supernet = routed(family, elastic=kind == "elastic")
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(tiny(family) if kind == "plain" else elastic(family), tmp_path / "routers")
    assert again.space == supernet.space and equal(again, supernet)
    feed = padded(family, supernet.base)
    for point in (supernet.space.smallest(), supernet.space.midpoint(), supernet.space.largest()):
        assert torch.equal(outputs(again, point, **feed), outputs(supernet, point, **feed))


@pytest.mark.parametrize("changes", [
    {"router": "mlp", "router_hidden_size": 7}, {"share": "model"}, {"layers": [0, 2]}, {"every": 2},
    {"experts": [0.5], "mlp_tokens": None, "attention_tokens": None},
], ids=str)  # fmt: skip
def test_every_routing_config_survives(changes: dict[str, Any], tmp_path: Path) -> None:
    supernet = routed("llama", **changes)
    save_routers(supernet.model, tmp_path / "routers")  # a model will do
    again = load_routers(tiny("llama"), tmp_path / "routers")
    assert again.space == supernet.space and equal(again, supernet)


def test_thresholds_come_back_also_those_that_are_missing(tmp_path: Path) -> None:
    supernet = add_routing(tiny("gpt2"), routing_of("gpt2"))
    supernet.router_parts[1].routers["mlp_tokens"].thresholds.copy_(torch.tensor([0.5, torch.nan, -0.25]))
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(tiny("gpt2"), tmp_path / "routers")
    first, second = (again.router_parts[n].routers["mlp_tokens"].thresholds for n in (0, 1))
    assert first.isnan().all() and second[1].isnan()
    assert second[[0, 2]].tolist() == [0.5, -0.25]


@pytest.mark.parametrize("share", ["layer", "model"])
def test_what_was_active_is_active_again(share: str, tmp_path: Path) -> None:
    supernet = routed("bert", elastic=True, share=share)
    set_capacity(supernet, mlp_tokens=0.4, experts=2)
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(elastic("bert"), tmp_path / "routers")
    assert again.active == supernet.active != again.space.largest()
    feed = padded("bert", supernet.base)
    assert torch.equal(run(again.model, feed), run(supernet.model, feed))


def test_what_is_active_of_a_skipped_layer_is_not_told_and_comes_back_full(tmp_path: Path) -> None:
    supernet = routed("bert", elastic=True)
    values = {**chosen(supernet, experts=1), "layers.1.skip": "mlp"}
    supernet.set_active(supernet.space.canonical(values))
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(elastic("bert"), tmp_path / "routers")
    assert [again.active[f"layers.{n}.experts"] for n in range(3)] == [1, 4, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_was_cast_gives_the_routers_that_it_has(dtype: torch.dtype, tmp_path: Path) -> None:
    supernet = routed("llama")
    cast: nn.Module = supernet.base
    cast.to(dtype)
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(tiny("llama"), tmp_path / "routers")
    assert equal(again, supernet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_half_precision_is_the_same_base(dtype: torch.dtype, tmp_path: Path) -> None:
    supernet = routed("bert")
    save_routers(supernet, tmp_path / "routers")
    half: nn.Module = tiny("bert")
    half.to(dtype)
    again = load_routers(half, tmp_path / "routers")
    assert equal(again, supernet)
    assert {p.dtype for router in routers_in(half) for p in router.parameters()} == {torch.float32}


def test_routers_fit_another_head_on_the_same_layers(tmp_path: Path) -> None:
    save_routers(supernet := routed("bert", "lm"), tmp_path / "routers")
    other = tiny("bert", "sequence")
    other.base_model.load_state_dict(supernet.base.base_model.state_dict(), strict=False)
    assert equal(load_routers(other, tmp_path / "routers"), supernet)


def test_routers_of_a_model_with_stock_adapters_fit_the_base_without_and_with_them(tmp_path: Path) -> None:
    def adapted() -> Any:
        return get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    supernet = add_routing(adapted(), routing_of("llama"))
    randomise(routers_in(supernet.model))
    save_routers(supernet, tmp_path / "routers")
    for model in (tiny("llama"), adapted()):
        assert equal(load_routers(model, tmp_path / "routers"), supernet)


def test_a_folder_of_routers_is_a_few_kilobytes(tmp_path: Path) -> None:
    supernet = routed("gpt2")
    save_routers(supernet, tmp_path / "routers")
    files = {file.name: file.stat().st_size for file in (tmp_path / "routers").iterdir()}
    assert files.keys() == {ROUTERS_FILE, WEIGHTS_FILE}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in states(supernet).values())
    assert files[WEIGHTS_FILE] < weights + 4096 and files[ROUTERS_FILE] < 4096
    record = json.loads((tmp_path / "routers" / ROUTERS_FILE).read_text())
    assert record["format"] == 1 and record["routing"] == routing_of("gpt2").to_dict()


def test_loading_freezes_or_not_as_adding_does(tmp_path: Path) -> None:
    save_routers(routed("bert"), tmp_path / "routers")
    frozen, free = (load_routers(tiny("bert"), tmp_path / "routers", freeze=freeze) for freeze in (True, False))
    trained = {name for name, p in frozen.model.named_parameters() if p.requires_grad}
    assert trained and all(".routers." in name for name in trained)
    assert all(p.requires_grad for p in free.model.parameters())


# -- supernets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_saved_supernet_has_its_routers_beside_it_and_says_how_they_are_loaded(family: str, tmp_path: Path) -> None:
    supernet = routed(family, elastic=True)
    set_capacity(supernet, mlp_tokens=0.7)
    supernet.save_pretrained(tmp_path / "supernet")
    where = str(tmp_path / "supernet" / "routers")
    with pytest.warns(UserWarning, match="holds routers.*hf_elastic.load_routers") as caught:
        restored = Supernet.from_pretrained(tmp_path / "supernet")
    assert where in str(caught[0].message) and caught[0].filename == __file__
    assert not restored.router_parts
    again = load_routers(restored.model, where)
    assert again.space == supernet.space and again.active == supernet.active and equal(again, supernet)
    feed = padded(family, supernet.base)
    for point in (supernet.active, supernet.space.smallest()):
        assert torch.equal(outputs(again, point, **feed), outputs(supernet, point, **feed))
    model = extract(again, again.space.smallest())
    assert torch.equal(run(model, feed), run(extract(supernet, supernet.space.smallest()), feed))


def test_a_plain_model_with_routers_says_that_these_are_saved_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no ElasticConfig.*routers by save_routers"):
        routed("bert").save_pretrained(tmp_path / "supernet")
    assert not (tmp_path / "supernet").exists()


# -- other bases ------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_both_names_unless_it_is_allowed(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "one")
    tiny("llama", seed=1).save_pretrained(tmp_path / "two")
    load = type(tiny("llama")).from_pretrained
    supernet = add_routing(load(tmp_path / "one"), routing_of("llama"))
    randomise(routers_in(supernet.model))
    save_routers(supernet, tmp_path / "routers")
    other: Any = load(tmp_path / "two")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="one.*this is .*two.*allow_other_base=True") as caught:
        load_routers(other, tmp_path / "routers")
    assert "\n" not in str(caught.value)
    assert other.state_dict().keys() == before.keys() and all(p.requires_grad for p in other.parameters())
    assert equal(load_routers(other, tmp_path / "routers", allow_other_base=True), supernet)


def test_a_base_of_which_one_weight_was_trained_on_is_another(tmp_path: Path) -> None:
    save_routers(routed("bert"), tmp_path / "routers")
    other: Any = tiny("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].intermediate.dense.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="whose weights are others"):
        load_routers(other, tmp_path / "routers")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("roberta", {}, "with model_type=bert, this is a model without a name with roberta"),
        ("bert", {"num_hidden_layers": 2}, "num_hidden_layers=3.* with 2"),
        ("bert", {"intermediate_size": 64}, "intermediate_size=48.* with 64"),
        ("bert", {"hidden_size": 64}, "hidden_size=32.* with 64"),
        ("bert", {"num_attention_heads": 2}, "heads=4.* with 2"),
    ],
)
def test_a_base_of_another_shape_is_refused_whatever_is_allowed(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_routers(routed("bert"), tmp_path / "routers")
    with pytest.raises(CheckpointError, match=message):
        load_routers(tiny(family, **changes), tmp_path / "routers", allow_other_base=True)


# -- files that are not what they should be ---------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / ROUTERS_FILE).read_text())
    (folder / ROUTERS_FILE).write_text(json.dumps({**record, **changes}))


def without_capacity(folder: Path) -> Any:
    layers = json.loads((folder / ROUTERS_FILE).read_text())["layers"]
    del layers["1"]["heads"]["active"]
    return layers


def truncated(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated weights": (lambda folder: truncated(folder, WEIGHTS_FILE), "is truncated or is not the file"),
    "truncated record": (lambda folder: truncated(folder, ROUTERS_FILE), "is no JSON file"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "cannot read .*routers.safetensors"),
    "no record": (lambda folder: (folder / ROUTERS_FILE).unlink(), "holds no routers, it has no routers.json"),
    "a later format": (lambda folder: edited(folder, format=2), "has format 2, this version reads 1"),
    "no fingerprints": (lambda folder: edited(folder, fingerprints=None), "says nothing usable about fingerprints"),
    "fingerprints that are none": (
        lambda folder: edited(folder, fingerprints={"as it is": [1]}),
        "holds no usable fingerprints of its base",
    ),
    "another field": (lambda folder: edited(folder, routing={"novel": 1}), "has no usable RoutingConfig.*novel"),
    "another config": (
        lambda folder: edited(folder, routing=routing_of("bert", router="mlp").to_dict()),
        "has other routers than its RoutingConfig makes",
    ),
    "fewer layers": (
        lambda folder: edited(folder, routing=routing_of("bert", layers=[0]).to_dict()),
        "has other routers than its RoutingConfig makes",
    ),
    "no layers": (lambda folder: edited(folder, layers={}), "does not fit its routers.json: 24 tensors"),
    "malformed layers": (lambda folder: edited(folder, layers={"0": {"heads": 3}}), "nothing usable about its routers"),
    "no capacity": (lambda folder: edited(folder, layers=without_capacity(folder)), "no usable RoutingConfig.*active"),
    "an unknown type": (lambda folder: edited(folder, model_type="opt"), "nothing usable about its routers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files_are_refused_and_the_model_stays(damage: str, tmp_path: Path) -> None:
    save_routers(routed("bert"), tmp_path / "routers")
    change, message = DAMAGES[damage]
    change(tmp_path / "routers")
    model = tiny("bert")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_routers(model, tmp_path / "routers")
    assert "\n" not in str(caught.value)
    assert not list(routers_in(model)) and all(p.requires_grad for p in model.parameters())


def test_capacities_that_the_routers_do_not_have_are_noticed(tmp_path: Path) -> None:
    save_routers(routed("bert", layers=[0]), tmp_path / "routers")
    layers = json.loads((tmp_path / "routers" / ROUTERS_FILE).read_text())["layers"]
    layers["0"]["mlp_tokens"]["active"] = 55
    edited(tmp_path / "routers", layers=layers)
    with pytest.raises(CheckpointError, match="has other routers than its RoutingConfig makes"):
        load_routers(tiny("bert"), tmp_path / "routers")


def test_a_full_disk_and_a_folder_in_use_leave_nothing_half_written(tmp_path: Path) -> None:
    supernet = routed("bert")
    with disk_full_at(1024), pytest.raises(CheckpointError, match="cannot write"):
        save_routers(supernet, tmp_path / "routers")
    assert not list(tmp_path.iterdir())
    save_routers(supernet, tmp_path / "routers")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_routers(supernet, tmp_path / "routers")
    save_routers(supernet, tmp_path / "routers", overwrite=True)


def test_models_without_routers_of_ours_have_none_to_save(tmp_path: Path) -> None:
    for model in (tiny("bert"), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match="save_routers takes what hf_elastic.add_routing returned"):
            save_routers(model, tmp_path / "routers")
    supernet = routed("bert")
    with pytest.raises(UnsupportedModelError, match="whose routers are in its own checkpoint"):
        save_routers(extract(supernet, supernet.space.smallest()), tmp_path / "routers")
    assert not (tmp_path / "routers").exists()


def test_models_that_have_routers_or_are_none_get_no_others(tmp_path: Path) -> None:
    supernet = routed("bert")
    save_routers(supernet, tmp_path / "routers")
    with pytest.raises(UnsupportedModelError, match="has routers already"):
        load_routers(supernet.model, tmp_path / "routers")
    with pytest.raises(UnsupportedModelError, match="takes a transformers model, got a Linear"):
        load_routers(nn.Linear(2, 2), tmp_path / "routers")


def test_widths_that_cut_through_experts_are_refused_when_routers_are_loaded(tmp_path: Path) -> None:
    save_routers(routed("bert"), tmp_path / "routers")
    model = tiny("bert")
    make_elastic(model, space("bert", intermediate_size=[16, 48]))
    with pytest.raises(SpaceError, match="cuts through experts of 12 neurons"):
        load_routers(model, tmp_path / "routers")
