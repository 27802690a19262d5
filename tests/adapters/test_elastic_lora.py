"""Elastic LoRA layers against stock peft: the same weights at the largest rank, weights cut by hand below it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import SETTINGS, base_of, elastic, logits, randomise, sliced_stock, stock
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import inputs, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from hf_elastic import (
    ActivationError,
    ElasticConfig,
    ElasticError,
    ElasticLoraConfig,
    SpaceError,
    Supernet,
    UnsupportedModelError,
    add_lora,
    costs,
    make_elastic,
    measure_latency_table,
    refit,
    set_layer_order,
    sort_by_importance_,
)
from hf_elastic.adapters.elastic_lora import ElasticLoraLayer
from hf_elastic.adapters.lora_part import choice_name, split_name
from hf_elastic.adapters.recognition import check_variants

FAMILIES = ["llama", "bert", "gpt2"]
VARIANTS = [{}, {"use_rslora": True}]


def architecture(supernet: Supernet, rank: int) -> dict[str, int]:
    return {choice.name: rank for choice in supernet.space}


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_rank_is_stock_lora_bit_for_bit(family: str, settings: dict[str, Any]) -> None:
    supernet = elastic(tiny(family), **settings)
    assert torch.equal(logits(supernet.model), logits(stock(tiny(family), **settings)))


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_rank_is_stock_lora_of_the_first_components(
    family: str, rank: int, settings: dict[str, Any]
) -> None:
    supernet, by_hand = elastic(tiny(family), **settings), sliced_stock(family, {"": rank}, **settings)
    with supernet.activate(architecture(supernet, rank)):
        found = logits(supernet.model)
    torch.testing.assert_close(found, logits(by_hand), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, logits(supernet.model), atol=1e-3)


def test_a_bias_of_the_adapter_stays_whole_at_every_rank() -> None:
    supernet = elastic(tiny("bert"), lora_bias=True)
    by_hand = sliced_stock("bert", {"": 2}, lora_bias=True)
    with supernet.activate(architecture(supernet, 2)):
        torch.testing.assert_close(logits(supernet.model), logits(by_hand), rtol=1e-5, atol=1e-6)


def test_the_scaling_is_that_of_the_largest_rank() -> None:
    supernet = elastic(tiny("llama"), use_rslora=True)
    with supernet.activate(architecture(supernet, 2)):
        layer = next(module for module in supernet.model.modules() if isinstance(module, ElasticLoraLayer))
        assert layer.scaling["default"] == pytest.approx(12 / 8**0.5)


def test_macs_and_parameters_of_adapters_are_those_that_are_counted() -> None:
    supernet = elastic(tiny("llama", attn_implementation="eager"), lora_bias=False)
    feed = {"input_ids": torch.arange(9).unsqueeze(0) + 3}
    for rank in (2, 8):
        point = supernet.point(architecture(supernet, rank))
        with supernet.activate(point), FlopCounterMode(display=False) as counted, torch.no_grad():
            supernet.model(**feed)
        with supernet.plain() as base, FlopCounterMode(display=False) as without, torch.no_grad():
            base(**feed)
        macs = (counted.get_total_flops() - without.get_total_flops()) // 2
        assert costs.adapter_macs(supernet, point, seq_len=9) == macs
        state = {n: t for n, t in supernet.model.state_dict().items() if ".lora_" in n}
        kept = {n: t[:rank] if ".lora_A." in n else t[:, :rank] for n, t in state.items()}
        assert costs.adapter_parameters(supernet, point) == sum(t.numel() for t in kept.values())
        assert costs.total_parameters(supernet, point) == sum(p.numel() for p in tiny("llama").parameters())


# -- merging ----------------------------------------------------------------------------------------------------------


WITH_BIAS = [(family, {"lora_bias": bias}) for family in ("bert", "gpt2") for bias in (False, True)]


@pytest.mark.parametrize(("family", "settings"), [("llama", {}), *WITH_BIAS])  # LLaMA has no bias to merge one into
def test_merging_merges_the_active_rank(family: str, settings: dict[str, Any]) -> None:
    supernet = elastic(tiny(family), **settings)
    with supernet.activate(architecture(supernet, 4)):
        wanted = logits(supernet.model)
        supernet.model.merge_adapter()
        assert torch.allclose(logits(supernet.model), wanted, atol=1e-4)
        supernet.model.unmerge_adapter()
        assert torch.allclose(logits(supernet.model), wanted, atol=1e-4)
        merged = supernet.model.merge_and_unload(safe_merge=True)
        assert torch.allclose(logits(merged), wanted, atol=1e-4)
    assert type(merged) is type(tiny(family))


def test_no_subnet_can_be_activated_while_adapters_are_merged() -> None:
    supernet = elastic(tiny("llama"))
    supernet.model.merge_adapter()
    with pytest.raises(ActivationError, match="unmerge_adapter"), supernet.activate(supernet.space.smallest()):
        pass
    supernet.model.unmerge_adapter()
    with supernet.activate(supernet.space.smallest()):
        assert supernet.active == supernet.space.smallest()


# -- several adapters -------------------------------------------------------------------------------------------------


def with_two() -> Supernet:
    supernet = elastic(tiny("llama"), target_modules=["q_proj", "up_proj"])
    config = ElasticLoraConfig(r=6, ranks=[3], lora_alpha=9, target_modules=["q_proj", "v_proj"])
    supernet.model.add_adapter("other", config)
    randomise(supernet.model)
    return Supernet(supernet.model)


def test_a_second_adapter_has_choices_of_its_own() -> None:
    supernet = with_two()
    layers = range(3)
    assert set(supernet.space.names) == {f"layers.{i}.r" for i in layers} | {f"other.layers.{i}.r" for i in layers}
    supernet.model.set_adapter("other")
    before = logits(supernet.model)
    with supernet.activate({**supernet.space.largest(), "layers.0.r": 2}):
        assert torch.equal(logits(supernet.model), before)
    with supernet.activate({**supernet.space.largest(), "other.layers.0.r": 3}):
        assert not torch.allclose(logits(supernet.model), before, atol=1e-4)
        seen = supernet.measured(**inputs(supernet.base))
        assert seen == supernet.expected(supernet.active)
        assert seen["other.layers.0.self_attn.q_proj.r"] == 3


def test_a_batch_may_mix_adapters_at_their_ranks() -> None:
    supernet = with_two()
    point = supernet.space.smallest()
    with supernet.activate(point):
        alone = {}
        for name in ("default", "other"):
            supernet.model.set_adapter(name)
            alone[name] = logits(supernet.model)
        with supernet.model.disable_adapter():
            alone["__base__"] = logits(supernet.model)
        rows = len(alone["other"])
        names = ["default", "other", "__base__"][:rows] + ["other"] * (rows - 3)
        mixed = logits(supernet.model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)


def test_a_disabled_adapter_leaves_the_base_and_a_deleted_one_its_choices() -> None:
    supernet = with_two()
    with supernet.activate(supernet.space.smallest()), supernet.model.disable_adapter():
        assert torch.equal(logits(supernet.model), logits(tiny("llama")))
        assert set(supernet.measured(**inputs(supernet.base)).values()) == set()
    supernet.model.delete_adapter("other")
    assert {name.partition(".")[0] for name in Supernet(supernet.model).space.names} == {"layers"}


def test_a_plain_adapter_beside_an_elastic_one_keeps_its_rank() -> None:
    supernet = elastic(tiny("llama"), target_modules=["q_proj"])
    supernet.model.add_adapter("plain", LoraConfig(r=5, target_modules=["q_proj"]))
    both = Supernet(supernet.model)
    assert both.space == supernet.space
    supernet.model.set_adapter("plain")
    with both.activate(both.space.smallest()):
        assert set(both.measured(**inputs(both.base)).values()) == {5}


def test_an_elastic_adapter_on_a_layer_that_a_plain_one_made_is_refused() -> None:
    model = stock(tiny("llama"), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="ranks"):
        model.add_adapter("elastic", ElasticLoraConfig(r=8, ranks=[2], target_modules=["q_proj"]))


def test_modules_to_save_are_trained_and_counted_once() -> None:
    supernet = elastic(tiny("bert", "sequence"), target_modules=["query"], modules_to_save=["classifier"])
    copies = supernet.model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        copies.weight += 1.0
    with supernet.plain() as base:
        assert base.classifier is copies
    point = supernet.space.smallest()
    assert costs.total_parameters(supernet, point) == sum(p.numel() for p in tiny("bert", "sequence").parameters())


def test_a_copy_of_an_elastic_projection_is_refused() -> None:
    model = tiny("bert", "sequence")
    make_elastic(model, ElasticConfig(intermediate_size=[16]))
    config = ElasticLoraConfig(r=8, ranks=[2], target_modules=["query"], modules_to_save=["output.dense"])
    with pytest.raises(UnsupportedModelError, match="modules_to_save copies"):
        Supernet(get_peft_model(model, config))


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_and_a_pickle_are_supernets_of_their_own() -> None:
    supernet = elastic(tiny("llama"))
    for other in (copy.deepcopy(supernet.model), pickle.loads(pickle.dumps(supernet.model))):
        copied = Supernet(other)
        with supernet.activate(supernet.space.smallest()):
            assert copied.active == copied.space.largest()
        with copied.activate(copied.space.smallest()):
            small = logits(copied.model)
        with supernet.activate(supernet.space.smallest()):
            assert torch.equal(logits(supernet.model), small)


def test_torch_compile_follows_the_rank() -> None:
    supernet = elastic(tiny("llama"), target_modules=["q_proj", "down_proj"])
    compiled = torch.compile(supernet.model, backend="eager")
    for point in (supernet.space.largest(), supernet.space.smallest(), supernet.space.largest()):
        with supernet.activate(point):
            assert torch.allclose(logits(compiled, supernet.model), logits(supernet.model), atol=1e-6)


# -- quantised bases --------------------------------------------------------------------------------------------------


def quantised(bits: int) -> tuple[BertForSequenceClassification, dict[str, torch.Tensor]]:
    import bitsandbytes as bnb

    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=61,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    for layer in model.bert.encoder.layer:
        for name in ("query", "value"):
            old = getattr(layer.attention.self, name)
            new = (
                bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
                if bits == 4
                else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            )
            new.load_state_dict(old.state_dict())
            setattr(layer.attention.self, name, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model, {"input_ids": torch.arange(24).view(2, 12) + 3}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_takes_elastic_adapters(bits: int) -> None:
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["query", "value"]}
    model, feed = quantised(bits)
    supernet = Supernet(get_peft_model(model, ElasticLoraConfig(**settings, ranks=[2, 4])).eval())
    plain = get_peft_model(quantised(bits)[0], LoraConfig(**settings)).eval()
    for adapted in (supernet.model, plain):
        randomise(adapted)
    assert all("bit" in type(part.wrapper).__name__ for part in supernet.adapter_parts)
    with torch.no_grad():
        assert torch.allclose(supernet.model(**feed)[0], plain(**feed)[0], atol=1e-6)
        for name, parameter in plain.named_parameters():
            if ".lora_A." in name:
                parameter[2:] = 0
        with supernet.activate(supernet.space.smallest()):
            assert torch.allclose(supernet.model(**feed)[0], plain(**feed)[0], atol=1e-5)
    # bitsandbytes packs 4-bit weights for some CPUs in the first evaluation and cannot train afterwards: a new model.
    supernet = Supernet(get_peft_model(quantised(bits)[0], ElasticLoraConfig(**settings, ranks=[2, 4])))
    with supernet.activate(supernet.space.smallest()):
        supernet.model.train()(**feed)[0].sum().backward()
    for name, parameter in supernet.model.named_parameters():
        if ".lora_A." in name:
            assert parameter.grad is not None and not parameter.grad[2:].any()


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_cannot_be_elastic_itself_and_is_told_why() -> None:
    model, _ = quantised(4)
    with pytest.raises(UnsupportedModelError, match="Linear4bit.*before quantisation"):
        make_elastic(model, ElasticConfig(num_attention_heads=[1]))


# -- names of choices -------------------------------------------------------------------------------------------------


def test_choices_are_named_by_layer_module_and_pattern() -> None:
    name = "model.layers.3.self_attn.q_proj"
    assert split_name(name) == ("layers.3", "self_attn.q_proj")
    assert choice_name(name, "default", group="", share="layer") == "layers.3.r"
    assert choice_name(name, "default", group="q_proj|v_proj", share="layer") == "layers.3.q_proj|v_proj.r"
    assert choice_name(name, "default", group="", share="module") == "layers.3.self_attn.q_proj.r"
    assert choice_name(name, "math", group="", share="layer") == "math.layers.3.r"
    assert choice_name("classifier", "default", group="", share="layer") == "classifier.r"


def test_patterns_make_groups_and_leave_the_rest_fixed() -> None:
    supernet = elastic(
        tiny("llama"), target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
        ranks={"q_proj|k_proj": [2, 4], "up_proj": [5]},
    )  # fmt: skip
    assert [(choice.name, choice.values) for choice in supernet.space][:2] == [
        ("layers.0.q_proj|k_proj.r", (2, 4, 8)),
        ("layers.0.up_proj.r", (5, 8)),
    ]
    assert supernet.space.size == 6**3
    with supernet.activate(supernet.space.smallest()):
        seen = supernet.measured(**inputs(supernet.base))
    assert seen["layers.1.mlp.down_proj.r"] == 8 and seen["layers.1.self_attn.k_proj.r"] == 2


def test_a_rank_depends_on_the_presence_of_its_sublayer() -> None:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(skip={1: ["attention", "mlp"]}, num_hidden_layers=[2, 3]))
    supernet = elastic(model, target_modules=["q_proj", "up_proj"], share="module")
    ranks = {choice.name: choice.when for choice in supernet.space if choice.name.endswith(".r")}
    assert [(c.choice, c.values) for c in ranks["layers.1.self_attn.q_proj.r"]] == [("layers.1.skip", ("none", "mlp"))]
    assert [(c.choice, c.values) for c in ranks["layers.1.mlp.up_proj.r"]] == [("layers.1.skip", ("none", "attention"))]
    assert ranks["layers.0.mlp.up_proj.r"] == ()
    shared = elastic(_skipping(), target_modules=["q_proj", "up_proj"])
    (condition,) = shared.space["layers.1.r"].when
    assert condition.values == ("none", "attention", "mlp")


def _skipping() -> Any:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(skip={1: ["attention", "mlp"]}))
    return model


def test_an_older_handle_sees_the_adapters_that_came_later() -> None:
    model = tiny("llama")
    early = make_elastic(model, ElasticConfig(intermediate_size=[16]))
    late = elastic(model, target_modules=["up_proj"])
    assert early.space == late.space
    with early.activate(early.space.smallest()):
        assert late.active == early.space.smallest()
        assert late.expected(late.active) == late.measured(**inputs(late.base))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"ranks": [2, 16]}, SpaceError, r"\[16\].*from 1 to r=8"),
        ({"ranks": [0, 4]}, SpaceError, r"\[0\]"),
        ({"ranks": [2.0]}, SpaceError, r"\[2.0\]"),
        ({"ranks": [True]}, SpaceError, "True"),
        ({"ranks": [2, 4, 2]}, SpaceError, "repeats"),
        ({"ranks": []}, SpaceError, "non-empty"),
        ({"ranks": {}}, SpaceError, "dict of patterns"),
        ({"ranks": {"q_proj": [2, 2]}}, SpaceError, r"ranks\['q_proj'\].*repeats"),
        ({"ranks": 4}, SpaceError, "non-empty list"),
        ({"share": "model"}, SpaceError, "'layer' nor 'module'"),
        ({"use_dora": True}, UnsupportedModelError, "use_dora.*magnitudes"),
        ({"init_lora_weights": "pissa"}, UnsupportedModelError, "pissa"),
        ({"target_parameters": ["mlp.experts"]}, UnsupportedModelError, "target_parameters"),
        ({"layer_replication": [(0, 2)]}, UnsupportedModelError, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, UnsupportedModelError, "alora"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_that_cannot_be_is_refused(
    settings: dict[str, Any], error: type[ElasticError], says: str
) -> None:
    with pytest.raises(error, match=says):
        ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], **settings})


def test_every_variant_that_peft_has_is_refused() -> None:
    from dataclasses import fields

    variants = [entry.name for entry in fields(LoraConfig) if entry.metadata.get("is_lora_variant")]
    assert "use_dora" in variants
    config = ElasticLoraConfig(ranks=[2, 4])
    for name in variants:
        changed = copy.copy(config)
        setattr(changed, name, True)
        with pytest.raises(UnsupportedModelError, match=name):
            check_variants(changed)


def state_of(model: nn.Module) -> dict[str, tuple[type[nn.Module], int]]:
    return {name: (type(module), len(list(module.parameters()))) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"up_proj": 3}, "ranks": {"layers.2.*": [9]}},
    ],
)
def test_a_module_that_has_no_rank_to_choose_leaves_the_model_as_it_was(settings: dict[str, Any]) -> None:
    model = tiny("llama")
    before, expected = state_of(model), logits(model)
    parameters = dict(model.named_parameters())
    with pytest.raises(ElasticError):
        get_peft_model(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], **settings}))
    assert state_of(model) == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    make_elastic(model, ElasticConfig(intermediate_size=[16]))  # and it is still a plain model


def test_targets_and_patterns_are_checked_against_a_model() -> None:
    model = tiny("llama")
    with pytest.raises(SpaceError, match="query.*q_proj"):
        ElasticLoraConfig(r=8, ranks=[2], target_modules=["query"]).check(model)
    with pytest.raises(SpaceError, match="'up_prj'"):
        ElasticLoraConfig(r=8, ranks={"up_prj": [2]}, target_modules=["up_proj"]).check(model)
    with pytest.raises(SpaceError, match="q_prj"):
        ElasticLoraConfig(r=8, ranks=[2], target_modules=["up_proj", "q_prj"]).check(model)
    ElasticLoraConfig(r=8, ranks={"up_proj": [2]}, target_modules=["up_proj", "q_proj"]).check(model)
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(model, ElasticLoraConfig(r=8, ranks=[2], target_modules=["query"]))
    assert state_of(model) == state_of(tiny("llama"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ranks", "rank_pattern", "alpha_pattern"])
def test_a_pattern_with_a_typo_is_refused_by_the_handle(name: str) -> None:
    value: Any = [2] if name == "ranks" else 4
    config = ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], name: {"up_prj": value}})
    with pytest.raises(SpaceError, match=rf"{name} names 'up_prj'"):
        Supernet(get_peft_model(tiny("llama"), config))


def test_stock_lora_on_an_elastic_base_is_refused_with_the_way_out() -> None:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(intermediate_size=[16]))
    with pytest.raises(UnsupportedModelError, match="ElasticLoraConfig"):
        Supernet(stock(model))
    fixed = tiny("llama")
    make_elastic(fixed, ElasticConfig(intermediate_size=[16]))
    supernet = elastic(fixed, ranks=None)
    assert supernet.space.names == tuple(f"layers.{i}.intermediate_size" for i in range(3))
    with supernet.activate(supernet.space.smallest()):
        assert supernet.expected(supernet.active) == supernet.measured(**inputs(supernet.base))


def test_the_saved_configuration_is_read_back_and_plain_peft_reads_it_too(tmp_path: Path) -> None:
    supernet = elastic(tiny("llama"), ranks={"q_proj": [2, 4]}, target_modules=["q_proj", "v_proj"], share="module")
    supernet.model.save_pretrained(tmp_path)
    config = ElasticLoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.ranks, config.share) == (8, {"q_proj": [2, 4]}, "module")
    with pytest.warns(UserWarning, match="ranks"):
        plain = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(plain), logits(supernet.model))
    assert base_of(plain) is not base_of(supernet.model)


def lora_count(model: nn.Module) -> int:
    return sum(".lora_" in name for name, _ in model.named_parameters())


def test_one_configuration_serves_several_models_and_stays_as_it_was_given() -> None:
    config = ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4]})
    first, second = (Supernet(get_peft_model(tiny("llama", seed=seed), config)) for seed in (0, 1))
    assert first.space == second.space and config.trained_on is None
    notes = [handle.base.peft_config["default"].trained_on for handle in (first, second)]
    assert notes[0] and notes[1] and notes[0] != notes[1]
    Supernet(first.model)


def test_a_refusal_on_one_model_leaves_another_of_the_same_configuration_alone() -> None:
    config = ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4], "target_modules": ["q_proj", "v_proj"]})
    first = get_peft_model(tiny("llama"), config)
    other = tiny("llama", "base")  # whose modules have other names
    other.layers[1].self_attn.v_proj = nn.Embedding(4, 4)
    before = state_of(other)
    with pytest.raises(UnsupportedModelError, match="Embedding"):
        get_peft_model(other, config)
    assert lora_count(first) == 12 and state_of(other) == before


def test_after_a_refusal_an_elastic_base_is_whole(tmp_path: Path) -> None:
    model = tiny("llama")
    base = make_elastic(model, ElasticConfig(intermediate_size=[16], num_key_value_heads=[1]))
    modules = dict(model.named_modules())
    refused = ElasticLoraConfig(**{**SETTINGS, "ranks": [4], "rank_pattern": {r"2\.mlp\.down_proj": 2}})
    for attempt in (lambda: get_peft_model(model, refused), lambda: add_lora(model, refused)):
        with pytest.raises(SpaceError, match="rank_pattern"):
            attempt()
        assert all(module is modules[name] for name, module in model.named_modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    again, clean = elastic(model), elastic(_elastic_base())
    small = again.space.smallest()
    assert costs.adapter_parameters(again, small) == costs.adapter_parameters(clean, small)
    copied = Supernet(copy.deepcopy(again.model))
    with copied.activate(small), again.activate(small):
        assert torch.equal(logits(copied.model), logits(again.model))
    assert base.space == again.space


def _elastic_base() -> Any:
    model = tiny("llama")
    make_elastic(model, ElasticConfig(intermediate_size=[16], num_key_value_heads=[1]))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank_pattern": {"q_proj": 16}}, "share 'layers.0.r'.*share='module'"),
        ({"ranks": {"lm_head": [4]}}, "lm_head"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "modules_to_save copies"),
    ],
)
def test_add_lora_leaves_the_model_as_it_was_whatever_it_refuses(settings: dict[str, Any], says: str) -> None:
    model = _elastic_base()
    before = state_of(model)
    with pytest.raises(ElasticError, match=says):
        add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [4], **settings}))
    assert state_of(model) == before and "peft_config" not in vars(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, ElasticLoraConfig(**{**SETTINGS, "ranks": [4]}))


def test_a_refused_second_adapter_leaves_the_first_as_it_was() -> None:
    supernet = elastic(tiny("llama"))
    before, count = logits(supernet.model), lora_count(supernet.model)
    bad = ElasticLoraConfig(**{**SETTINGS, "ranks": [4], "rank_pattern": {"down_proj": 2}})
    dora = LoraConfig(**{**SETTINGS, "use_dora": True})
    for config, error in ((bad, SpaceError), (dora, UnsupportedModelError)):
        with pytest.raises(error):
            supernet.model.add_adapter("second", config)
        assert lora_count(supernet.model) == count
        assert torch.equal(logits(Supernet(supernet.model).model), before)


def test_a_variant_that_is_set_afterwards_is_refused_too() -> None:
    config = ElasticLoraConfig(**{**SETTINGS, "ranks": [4]})
    config.use_dora = True
    with pytest.raises(UnsupportedModelError, match="use_dora"):
        get_peft_model(tiny("llama"), config)


def test_an_old_handle_says_that_adapters_came_or_went_and_changes_nothing() -> None:
    supernet = with_two()
    supernet.model.delete_adapter("other")
    with pytest.raises(ActivationError, match="make another: Supernet"), supernet.activate(supernet.space.smallest()):
        pass
    again = Supernet(supernet.model)
    assert again.measured(**inputs(again.base)) == again.expected(again.space.largest())
    early = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[16]))
    late = get_peft_model(early.model, ElasticLoraConfig(**{**SETTINGS, "ranks": [4]}))
    with pytest.raises(ActivationError, match="they were none"), early.activate(early.space.smallest()):
        pass
    merged = Supernet(late)
    with merged.activate(merged.space.smallest()):
        late.merge_and_unload()
    with pytest.raises(ActivationError, match="gone now"), merged.activate(merged.space.smallest()):
        pass
    assert Supernet(early.model).active == Supernet(early.model).space.largest()


def test_sorting_and_layerwise_work_are_refused_once_there_are_adapters() -> None:
    model = tiny("llama")
    base = make_elastic(model, ElasticConfig(intermediate_size=[16], num_hidden_layers=[2, 3]))
    supernet = elastic(model)
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    for handle in (supernet, base, Supernet(model)):
        for attempt in (
            lambda handle=handle: sort_by_importance_(handle, [inputs(model)]),
            lambda handle=handle: set_layer_order(handle, [2, 1, 0]),
            lambda handle=handle: refit(handle, handle.space.smallest(), [inputs(model)]),
            lambda handle=handle: measure_latency_table(handle),
        ):
            with pytest.raises(UnsupportedModelError, match="without adapters"):
                attempt()
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.model.state_dict().items())


def test_a_list_of_linears_in_a_head_is_no_list_of_layers() -> None:
    assert split_name("classifier.0") == ("", "classifier.0")
    assert split_name("transformer.h.11.attn.c_attn") == ("layers.11", "attn.c_attn")
    assert split_name("model.layers.3.mlp.experts.5.up_proj") == ("layers.3", "mlp.experts.5.up_proj")


def test_a_copy_keeps_what_was_active() -> None:
    supernet = elastic(tiny("llama"))
    with supernet.activate(supernet.space.smallest()):
        copied = Supernet(copy.deepcopy(supernet.model))
        assert copied.active == supernet.space.smallest()
        assert copied.measured(**inputs(copied.base)) == copied.expected(copied.active)


def test_a_handle_made_while_adapters_are_merged_knows_its_base() -> None:
    supernet = elastic(tiny("llama"))
    supernet.model.merge_adapter()
    assert Supernet(supernet.model).space == supernet.space
    supernet.model.unmerge_adapter()


def test_a_handle_is_told_from_the_model_that_is_meant() -> None:
    supernet = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[0.5]))
    with pytest.raises(UnsupportedModelError, match=r"model is a Supernet, expected a model; pass its \.model"):
        add_lora(supernet, ElasticLoraConfig(ranks=[2, 4], target_modules=["q_proj"]))  # type: ignore[arg-type]
