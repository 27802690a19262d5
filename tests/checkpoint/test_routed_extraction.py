"""Extracted routed models: that they equal the subnet, what they count, how they load, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from routed_checkpoints import chosen, padded, routed, routers_in, routing_of, run, same
from tiny_models import DECODERS, GROUPED, class_of, outputs, space, tiny, tokenizer
from transformers import BertForMultipleChoice

from hf_elastic import (
    ElasticLoraConfig,
    ExportError,
    RoutingConfig,
    Supernet,
    add_lora,
    add_routing,
    costs,
    export,
    extract,
    make_elastic,
)
from hf_elastic.models.elastic_routers import Decision, LayerRouters, routers_of

MODELS = [
    ("bert", "lm"), ("bert", "sequence"), ("bert", "token"), ("roberta", "lm"), ("roberta", "sequence"),
    ("llama", "lm"), ("llama", "sequence"), ("qwen3", "lm"), ("qwen2", "base"), ("mistral", "lm"), ("gpt2", "lm"),
    ("gpt2", "sequence"),
]  # fmt: skip
FAMILIES = ("bert", "llama", "gpt2")


def architectures(supernet: Supernet, *, sampled: int = 6) -> list[Any]:
    space, rng = supernet.space, random.Random(0)
    return [space.smallest(), space.midpoint(), *(space.sample(rng) for _ in range(sampled))]


# -- equal to the subnet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elastic", [False, True], ids=["plain", "elastic"])
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_an_extracted_routed_model_equals_the_subnet_with_padding(family: str, head: str, elastic: bool) -> None:
    supernet = routed(family, head, elastic=elastic)
    feed = padded(family, supernet.base)
    largest = outputs(supernet, supernet.space.largest(), **feed)
    seen = []
    for architecture in architectures(supernet):
        wanted = outputs(supernet, architecture, **feed)
        model = extract(supernet, architecture)
        assert same(run(model, feed), wanted, feed["attention_mask"])
        assert sum(p.numel() for p in model.parameters()) == costs.total_parameters(supernet, architecture)
        seen.append(wanted)
    assert not any(torch.equal(wanted, largest) for wanted in seen)


@pytest.mark.parametrize("changes", [
    {"router": "mlp", "router_hidden_size": 5}, {"share": "model"}, {"layers": [1]},
    {"heads": None, "experts": None, "num_experts": None}, {"mlp_tokens": None, "attention_tokens": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_router_is_extracted(family: str, changes: dict[str, Any]) -> None:
    supernet = routed(family, elastic=True, **changes)
    feed = padded(family, supernet.base)
    for architecture in architectures(supernet, sampled=4):
        model = extract(supernet, architecture)
        assert same(run(model, feed), outputs(supernet, architecture, **feed), feed["attention_mask"])
        found = sum(p.numel() for p in model.parameters()) - costs.embedding_parameters(supernet)
        assert found == costs.parameters(supernet, architecture)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_model_in_bfloat16_keeps_float32_routers(family: str, tmp_path: Path) -> None:
    supernet = routed(family)
    for parameter in supernet.base.parameters():  # of its routers too, not the frequencies of rotary embeddings
        parameter.data = parameter.data.to(torch.bfloat16)
    architecture = chosen(supernet, mlp_tokens=40, experts=2)
    model = extract(supernet, architecture)
    assert {p.dtype for router in routers_in(model) for p in router.state_dict().values()} == {torch.float32}
    feed = padded(family, supernet.base)
    assert torch.equal(run(model, feed), outputs(supernet, architecture, **feed))
    export(supernet, architecture, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert {p.dtype for router in routers_in(again) for p in router.state_dict().values()} == {torch.float32}
    assert torch.equal(run(again, feed), run(model, feed))


def test_routers_keep_their_thresholds_also_those_that_are_missing() -> None:
    supernet = routed("llama")
    for router in (part.routers["mlp_tokens"] for part in supernet.router_parts):
        router.thresholds.copy_(torch.tensor([0.25, torch.nan, torch.nan]))
    model = extract(supernet, chosen(supernet, mlp_tokens1=40))
    found = routers_of(model)[0]["mlp_tokens"].thresholds
    assert found[0] == 0.25 and found[1:].isnan().all() and len(found) == 3


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_only_layers_that_route_have_routers_and_are_numbered_anew() -> None:
    supernet = routed("bert", elastic=True)
    values = dict(chosen(supernet, experts1=1, mlp_tokens2=40)) | {"num_hidden_layers": 3}
    architecture = supernet.space.canonical(values)
    assert set(extract(supernet, architecture).config.routing["layers"]) == {"1", "2"}
    gone = supernet.space.canonical({**values, "num_hidden_layers": 2})  # layer 1 is the first to go
    model = extract(supernet, gone)
    assert model.config.num_hidden_layers == 2 and set(model.config.routing["layers"]) == {"1"}
    assert model.config.routing["layers"]["1"]["mlp_tokens"]["active"] == 40


def test_capacities_of_a_narrower_layer_are_those_that_its_units_make() -> None:
    supernet = routed("gpt2", elastic=True)
    values = {
        **supernet.space.largest(), "layers.0.intermediate_size": 24, "layers.0.experts": 1,
        "layers.1.num_attention_heads": 2, "layers.1.mlp_tokens": 70,
    }  # fmt: skip
    layers = extract(supernet, supernet.space.canonical(values)).config.routing["layers"]
    # 4 experts at 1, 2, 3 and 4 are, in half the width, 2 at 1 (.5 rounded up), 1, 2 (1.5 rounded up) and 2.
    assert layers["0"]["experts"] == {"of": 2, "values": [1, 2], "active": 1}
    assert layers["0"]["heads"] == {"of": 4, "values": [1, 2, 3, 4], "active": 4}
    assert layers["1"]["heads"] == {"of": 2, "values": [1, 2], "active": 2}
    assert layers["1"]["mlp_tokens"] == {"of": 100, "values": [40, 70, 100], "active": 70}


def test_routers_of_a_skipped_sublayer_and_of_one_unit_are_left_out() -> None:
    supernet = routed("llama", elastic=True)
    values = {
        **supernet.space.largest(), "layers.0.skip": "attention", "layers.0.experts": 2,
        "layers.1.num_key_value_heads": 1, "layers.1.experts": 2,
    }  # fmt: skip
    layers = extract(supernet, supernet.space.canonical(values)).config.routing["layers"]
    assert set(layers["0"]) == {"hidden", "mlp_tokens", "experts"}
    assert set(layers["1"]) == {"hidden", "attention_tokens", "mlp_tokens", "experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_routed_the_export_is_the_one_without_routers(family: str, tmp_path: Path) -> None:
    supernet = routed(family, elastic=True)
    plain = make_elastic(tiny(family), space(family, intermediate_size=[24, 48]))
    for number, changes in enumerate([{}, {"layers.1.intermediate_size": 24}]):
        architecture = supernet.space.canonical({**supernet.space.largest(), **changes})
        alike = plain.space.canonical({**plain.space.largest(), **changes})
        assert supernet.loadability(architecture) == plain.loadability(alike)
        forms = ["remote-code"] + (["stock"] if not changes else ["stock-padded"])
        for form in forms:
            here, there = tmp_path / f"{form}{number}", tmp_path / f"{form}{number}.plain"
            export(supernet, architecture, here, loadability=form)  # type: ignore[arg-type]
            export(plain, alike, there, loadability=form)  # type: ignore[arg-type]
            for name in ("config.json", "model.safetensors"):
                assert (here / name).read_bytes() == (there / name).read_bytes()


def test_rounding_to_all_units_that_are_there_routes_nothing() -> None:
    supernet = routed("bert", elastic=True)
    values = {**supernet.space.largest(), "layers.0.intermediate_size": 24, "layers.0.experts": 3}
    architecture = supernet.space.canonical(values)  # 3 of 4 are both of the 2 that are left
    narrow = supernet.space.canonical({**values, "layers.0.experts": 4})
    assert torch.equal(outputs(supernet, architecture), outputs(supernet, narrow))
    assert supernet.loadability(architecture) == "stock-padded" == supernet.loadability(narrow)
    assert costs.parameters(supernet, architecture) == costs.parameters(supernet, narrow)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_routed_model_loads_with_the_same_outputs_and_text(family: str, tmp_path: Path) -> None:
    supernet = routed(family, elastic=True)
    changes = {"layers.0.intermediate_size": 24, "layers.2.skip": "attention"}
    point = {**chosen(supernet, mlp_tokens=40, experts=1, attention_tokens=60, heads=1), **changes}
    known = {choice.name for choice in supernet.space.choices}
    architecture = supernet.space.canonical({name: value for name, value in point.items() if name in known})
    assert supernet.loadability(architecture) == "remote-code"
    report = export(supernet, architecture, tmp_path / "model", tokenizer=tokenizer())
    assert report.loadability == "remote-code" and report.max_difference <= 1e-5
    assert report.macs == costs.macs(supernet, architecture, seq_len=128)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model").eval()
    feed = padded(family, supernet.base)
    assert same(run(model, feed), outputs(supernet, architecture, **feed), feed["attention_mask"])
    record = json.loads((tmp_path / "model" / "architecture.json").read_text())
    assert record["architecture"] == dict(architecture)
    assert record["total_parameters"] == sum(p.numel() for p in model.parameters())
    if family in DECODERS:
        settings = {"max_new_tokens": 6, "do_sample": False}
        with supernet.activate(architecture):
            wanted = supernet.base.generate(**feed, **settings)
        assert torch.equal(model.generate(**feed, **settings), wanted)


def test_an_export_turns_the_dial_and_is_saved_with_it(tmp_path: Path) -> None:
    supernet = routed("llama")
    export(supernet, chosen(supernet, mlp_tokens=40), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    model.set_capacity(mlp_tokens=0.7, experts=2)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    feed = padded("llama", supernet.base)
    wanted = outputs(supernet, chosen(supernet, mlp_tokens=70, experts=2), **feed)
    assert same(run(model, feed), wanted, feed["attention_mask"]) and torch.equal(run(again, feed), run(model, feed))


@pytest.mark.parametrize(("turned", "share"), [("one token of a row", 1), ("every token", 30)])
def test_an_export_is_compared_with_the_decisions_of_the_subnet_where_rounding_turns_some(
    turned: str, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = routed("bert")
    own = {id(part.routers) for part in supernet.router_parts}
    choose = LayerRouters.choose_tokens

    def otherwise(self: LayerRouters, kind: str, states: torch.Tensor) -> Decision:
        decision = choose(self, kind, states)
        if id(self) not in own:
            decision.keep[:, :share].logical_not_()
        return decision

    monkeypatch.setattr(LayerRouters, "choose_tokens", otherwise)
    architecture = chosen(supernet, mlp_tokens=70)
    if turned == "one token of a row":
        assert export(supernet, architecture, tmp_path / "model").max_difference <= 1e-5
        return
    with pytest.raises(ExportError, match="the extracted model differs from the subnet"):
        export(supernet, architecture, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_stock_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    targets = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny("llama"), targets)
    supernet = add_routing(adapted, RoutingConfig(experts=[1], num_experts=4))
    for point in (supernet.space.smallest(), supernet.space.largest()):
        for act in (lambda p: extract(supernet, p), lambda p: export(supernet, p, tmp_path / "model")):
            with pytest.raises(
                ExportError, match=r"q_proj is a stock Linear.*call merge_and_unload\(\) first"
            ) as caught:
                act(point)
            assert "\n" not in str(caught.value)
    wanted = outputs(supernet, supernet.space.smallest())
    merged = Supernet(adapted.merge_and_unload())
    model = extract(merged, merged.space.smallest())
    feed = padded("llama", merged.base)
    assert same(outputs(merged, merged.space.smallest()), wanted)
    assert same(run(model, feed), outputs(merged, merged.space.smallest(), **feed), feed["attention_mask"])


@pytest.mark.parametrize("merge", [True, False])
def test_elastic_adapters_are_merged_or_left_out_of_a_routed_export(merge: bool, tmp_path: Path) -> None:
    config = ElasticLoraConfig(ranks=[1, 2], r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = add_lora(tiny("bert"), config, seed=0)
    supernet = add_routing(adapted.model, RoutingConfig(mlp_tokens=[0.5], experts=[1], num_experts=4))
    architecture = supernet.space.smallest()
    export(supernet, architecture, tmp_path / "model", merge=merge)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    feed = padded("bert", supernet.base)
    with supernet.activate(architecture):
        if merge:
            wanted = run(supernet.model, feed)
        else:
            with supernet.plain() as base:
                wanted = run(base, feed)
    got, mask = run(model, feed), feed["attention_mask"].bool()
    assert (got - wanted)[mask].abs().max() <= 5e-5 * wanted.abs().max()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stock", "stock-padded"])
def test_a_stock_checkpoint_of_what_routes_is_refused(form: Any, tmp_path: Path) -> None:
    supernet = routed("llama")
    architecture = chosen(supernet, experts=1)
    assert supernet.loadability(architecture) == "remote-code"
    for act in (lambda: extract(supernet, architecture, loadability=form),
                lambda: export(supernet, architecture, tmp_path / "model", loadability=form)):  # fmt: skip
        with pytest.raises(
            ExportError, match=f"a '{form}' checkpoint holds no routers.*loadability='remote-code'"
        ) as e:
            act()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "model").exists()
    assert type(extract(supernet, supernet.space.largest(), loadability="stock")) is class_of("llama", "lm")


def test_a_model_without_a_static_class_keeps_its_routers_to_itself() -> None:
    assert isinstance(model := tiny("bert", "choice"), BertForMultipleChoice)
    supernet = add_routing(model, RoutingConfig(mlp_tokens=[0.5]))
    with pytest.raises(ExportError, match="BertForMultipleChoice has no static class to hold routers; keep them with"):
        extract(supernet, supernet.space.smallest())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_model_is_not_written_before_it_is_calibrated(family: str, tmp_path: Path) -> None:
    supernet = add_routing(tiny(family), routing_of(family, attention_tokens=None))
    architecture = chosen(supernet, mlp_tokens=40)
    with pytest.raises(ExportError, match="mlp_tokens of layer 0 have no threshold at 40 %.*calibrate_routing"):
        export(supernet, architecture, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert torch.isnan(routers_of(extract(supernet, architecture))[0]["mlp_tokens"].thresholds).all()
    export(supernet, chosen(supernet, experts=1), tmp_path / "model")  # needs no threshold


def test_families_that_group_heads_route_groups() -> None:
    supernet = routed("qwen3")
    model = extract(supernet, chosen(supernet, heads=1))
    assert "qwen3" in GROUPED and model.config.routing["layers"]["0"]["heads"]["of"] == 2
