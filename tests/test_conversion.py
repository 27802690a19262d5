"""make_elastic: the spaces it declares, what it refuses, and that a model it refuses is as it was before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, DECODERS, GROUPED, inputs, outputs, space, supernet_of, tiny
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_elastic import (
    FAMILIES,
    Condition,
    ElasticConfig,
    ElasticError,
    Family,
    Skip,
    SpaceError,
    Supernet,
    UnsupportedModelError,
    export,
    make_elastic,
    set_layer_order,
)
from hf_elastic.conversion import replan

ROWS = {row.model_type: row for row in FAMILIES}
WIDTHS = ElasticConfig(intermediate_size=[16])
LOADABILITIES = ("any", "stock-padded", "stock")


def names(supernet: Supernet) -> dict[str, tuple[Any, ...]]:
    return {choice.name: choice.values for choice in supernet.space.choices}


# -- what is declared ---------------------------------------------------------------------------------------------


def test_a_list_holds_for_all_layers_and_a_dict_for_the_layers_it_names() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(intermediate_size=[16, 0.5], num_attention_heads={2: [1, 3]}))
    assert names(supernet) == {
        "layers.0.intermediate_size": (16, 24, 48),
        "layers.1.intermediate_size": (16, 24, 48),
        "layers.2.num_attention_heads": (1, 3, 4),
        "layers.2.intermediate_size": (16, 24, 48),
    }


def test_five_lines_declare_every_kind_of_choice_with_its_conditions() -> None:
    supernet = supernet_of("llama")
    assert names(supernet) == {
        "num_hidden_layers": (2, 3),
        **{
            f"layers.{i}.{name}": values
            for i in range(3)
            for name, values in (
                # depth leaves layer 1 out, so its skip does not
                ("skip", ("none", "attention", "mlp") + (() if i == 1 else ("layer",))),
                ("num_key_value_heads", (1, 2)),
                ("intermediate_size", (16, 24, 48)),
            )
        },
    }
    by_name = {choice.name: choice for choice in supernet.space.choices}
    # by default first, last, then the rest: layer 1 goes first
    assert by_name["layers.0.skip"].when == by_name["layers.2.skip"].when == ()
    assert by_name["layers.1.skip"].when == (Condition("num_hidden_layers", (3,)),)
    assert by_name["layers.1.intermediate_size"].when == (Condition("layers.1.skip", ("none", "attention")),)
    assert by_name["layers.1.num_key_value_heads"].when == (Condition("layers.1.skip", ("none", "mlp")),)


def test_a_width_of_a_layer_that_is_absent_has_no_effect() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(intermediate_size=[16], num_hidden_layers=[2]))
    assert supernet.space.size == 2**3 + 2**2
    assert supernet.space["layers.1.intermediate_size"].when == (Condition("num_hidden_layers", (3,)),)


@pytest.mark.parametrize(
    "kinds", [k for n in (1, 2, 3) for k in itertools.combinations(("attention", "mlp", "layer"), n)]
)
def test_leaving_out_both_sublayers_is_leaving_out_the_layer(kinds: tuple[str, ...]) -> None:
    supernet = make_elastic(tiny("gpt2"), ElasticConfig(skip={1: kinds}))
    wanted = {"none", *kinds} | ({"layer"} if {"attention", "mlp"} <= set(kinds) else set())
    assert set(names(supernet)["layers.1.skip"]) == wanted


@pytest.mark.parametrize("family", CONFIGS)
def test_a_skip_counts_the_parameters_that_stay(family: str) -> None:
    supernet = supernet_of(family)
    layer, row = supernet.layer_parts[0].layer, supernet.family
    choice = supernet.space["layers.0.skip"]
    parts = {
        kind: sum(p.numel() for rule in rules for p in layer.get_submodule(rule.module).parameters())
        for kind, rules in (("attention", row.skip_attention), ("mlp", row.skip_mlp))
    }
    total = sum(p.numel() for p in layer.parameters())
    wanted = {"none": total, "attention": total - parts["attention"], "mlp": total - parts["mlp"], "layer": 0}
    assert dict(zip(choice.values, choice.parameters or (), strict=True)) == wanted
    assert choice.largest == "none" and choice.smallest == "layer"


def test_layer_order_decides_which_layers_a_depth_keeps() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(num_hidden_layers=[1, 2], layer_order=[1, 2, 0]))
    assert supernet.layer_order == (1, 2, 0)
    kept = {
        depth: [i for i, shape in enumerate(supernet.layer_shapes(arch)) if not shape.skipped]
        for depth in (1, 2, 3)
        for arch in [supernet.space.canonical({"num_hidden_layers": depth})]
    }
    assert kept == {1: [1], 2: [1, 2], 3: [0, 1, 2]}


def test_multiples_round_widths_but_not_heads_and_depths() -> None:
    config = ElasticConfig(intermediate_size=[20], num_attention_heads=[1], num_hidden_layers=[1], multiple_of=16)
    found = names(make_elastic(tiny("bert"), config))
    assert found["layers.0.intermediate_size"] == (16, 48)
    assert found["layers.0.num_attention_heads"] == (1, 4) and found["num_hidden_layers"] == (1, 3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stock_space_has_one_width_for_all_layers(family: str) -> None:
    heads = {"num_key_value_heads": [1]} if family in GROUPED else {}
    config = ElasticConfig(intermediate_size=[16], skip=["layer"], num_hidden_layers=[2], loadability="stock", **heads)
    found = names(make_elastic(tiny(family), config))
    uniform = {"intermediate_size", "num_hidden_layers"} | ({"num_key_value_heads"} if heads else set())
    assert {name for name in found if not name.startswith("layers.")} == uniform
    assert {name.split(".")[-1] for name in found if name.startswith("layers.")} == {"skip"}


@pytest.mark.parametrize("loadability", LOADABILITIES)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_architecture_of_a_restricted_space_loads_as_promised(family: str, loadability: str) -> None:
    partial = loadability == "any" or (loadability == "stock-padded" and family in DECODERS)
    heads = {"num_key_value_heads" if family in GROUPED else "num_attention_heads": [1]}
    heads = {} if loadability == "stock" and family not in GROUPED else heads
    config = ElasticConfig(
        intermediate_size=[16], skip=["attention", "mlp"] if partial else ["layer"], num_hidden_layers=[2],
        loadability=loadability, **heads,
    )  # fmt: skip
    supernet = make_elastic(tiny(family), config)
    points = [*itertools.islice(supernet.space.architectures(), 400), supernet.space.smallest()]
    allowed = {"stock": {"stock"}, "stock-padded": {"stock", "stock-padded"}}.get(loadability)
    found = {supernet.loadability(point) for point in points}
    assert allowed is None or found <= allowed
    if allowed is not None:  # a stock model keeps at least one layer
        assert all(any(not s.skipped for s in supernet.layer_shapes(point)) for point in points)


def test_a_restricted_space_may_drop_any_layer_if_another_one_stays_for_sure() -> None:
    config = ElasticConfig(skip={0: ["layer"], 1: ["layer"]}, loadability="stock")
    found = names(make_elastic(tiny("bert"), config))
    assert found == {"layers.0.skip": ("none", "layer"), "layers.1.skip": ("none", "layer")}


def test_the_layer_that_stays_is_the_most_important_one() -> None:
    config = ElasticConfig(skip=["layer"], layer_order=[2, 0, 1], loadability="stock")
    assert set(names(make_elastic(tiny("bert"), config))) == {"layers.0.skip", "layers.1.skip"}
    padded = ElasticConfig(skip=["attention", "mlp"], layer_order=[2, 0, 1], loadability="stock-padded")
    assert names(make_elastic(tiny("gpt2"), padded))["layers.2.skip"] == ("none", "attention", "mlp")


def test_layers_of_different_shapes_are_measured_one_by_one() -> None:
    model = tiny("bert", "base")
    layer = model.encoder.layer[1]
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 40), nn.Linear(40, 32)
    supernet = make_elastic(model, ElasticConfig(intermediate_size=[0.5]))
    assert names(supernet)["layers.1.intermediate_size"] == (20, 40)
    feed = inputs(model)
    assert supernet.measured(**feed) == supernet.expected(supernet.space.largest())
    with supernet.activate(supernet.space.smallest()):
        assert supernet.measured(**feed)["layers.1.intermediate_size"] == 20


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_active_prefix_equals_a_model_with_all_else_zeroed(family: str) -> None:
    """Zeroing the inputs of the output projections that are not active is a cut that needs none of our code."""
    supernet, oracle = supernet_of(family, skip=None, num_hidden_layers=None), tiny(family)
    small, row = supernet.space.smallest(), supernet.family
    with torch.no_grad():
        for part, layer in zip(supernet.layer_parts, oracle.base_model.get_submodule(row.layers), strict=True):
            shape = part.shape(small)
            for path, size in ((row.ffn_out, 16), (row.attention_out, shape.num_attention_heads * part.head_dim)):
                projection = layer.get_submodule(path)
                (projection.weight[size:] if family == "gpt2" else projection.weight[:, size:]).zero_()
        wanted = oracle(**inputs(oracle))[0]
    torch.testing.assert_close(outputs(supernet, small), wanted, rtol=1e-4, atol=1e-5)


def test_gpt2_that_scales_attention_by_layer_keeps_widths_but_not_skips() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    for config in (replace(WIDTHS, skip=["attention"]), replace(WIDTHS, num_hidden_layers=[2])):
        with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx=True ties.*drop skip="):
            make_elastic(model, config)
    assert make_elastic(model, replace(WIDTHS, num_attention_heads=[1], skip=[])).space.size == 4**3


# -- what is refused, and left untouched ------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> Any:
    """Class and attributes of every module, and the bits of every tensor: what a refusal must not change."""
    modules = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    tensors = {name: (id(t), t.clone()) for name, t in model.named_parameters()}
    return (
        modules,
        {name: key for name, (key, _) in tensors.items()},
        {n: t.sum().item() for n, (_, t) in tensors.items()},
    )


def hooked(model: PreTrainedModel, path: str) -> PreTrainedModel:
    add_hook_to_module(model.get_submodule(path), ModelHook())
    return model


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    model.add_adapter(LoraConfig(r=2, target_modules=["value"]))
    return model


def with_config(model: PreTrainedModel, **values: Any) -> PreTrainedModel:
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


class Int8Linear(nn.Linear):
    """Stands for a quantised linear of a library that leaves no quantization_config."""


def last_linear_replaced(model: PreTrainedModel) -> PreTrainedModel:
    model.bert.encoder.layer[2].output.dense.__class__ = Int8Linear
    return model


def shared_layers(model: PreTrainedModel) -> PreTrainedModel:
    layers = model.bert.encoder.layer
    layers[1] = layers[0]
    return model


def compiled_layer(model: PreTrainedModel) -> PreTrainedModel:
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    return model


BNB = BitsAndBytesConfig(load_in_8bit=True)
UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no transformers model": (lambda: nn.Linear(2, 2), "takes a transformers PreTrainedModel, got Linear"),
    "peft": (
        lambda: get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"])),
        "PeftModel; convert the model before",
    ),
    "compiled": (
        lambda: torch.compile(tiny("bert"), backend="eager"),
        "OptimizedModule.*before get_peft_model, torch.compile",
    ),
    "data parallel": (lambda: nn.DataParallel(tiny("bert")), "got DataParallel"),
    "compiled layer": (
        lambda: compiled_layer(tiny("bert")),
        r"layer.1._orig_mod is compiled; call torch.compile after",
    ),
    "injected adapter": (lambda: with_adapter(tiny("bert")), r"encoder.layer.0.attention.self.value is a peft"),
    "quantised": (
        lambda: with_config(tiny("bert"), quantization_config=BNB),
        r"quantised \(bitsandbytes\); load it in a float",
    ),
    "quantised, loaded": (
        lambda: with_config(tiny("bert"), quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq\)",
    ),
    "quantised without config": (lambda: last_linear_replaced(tiny("bert")), r"layer.2.output.dense is a .*Int8Linear"),
    "hook on a linear": (
        lambda: hooked(tiny("bert"), "bert.encoder.layer.2.attention.self.value"),
        "2.attention.self.value has a forward",
    ),
    "hook on a sublayer": (
        lambda: hooked(tiny("bert"), "bert.encoder.layer.2.attention"),
        "layer.2.attention has a forward",
    ),
    "elastic": (lambda: supernet_of("bert").model, r"elastic already; use hf_elastic.Supernet\(model\)"),
    "unknown type": (
        lambda: OPTForCausalLM(
            OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        ),
        "'opt' has no family row; known: bert.*; pass family=",
    ),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
        ),
        "config.is_encoder_decoder=True is not supported",
    ),
    "decoder": (lambda: tiny("bert", is_decoder=True), "config.is_decoder=True is not supported"),
    "cross attention": (lambda: tiny("gpt2", add_cross_attention=True), "add_cross_attention=True"),
    "shared layers": (lambda: shared_layers(tiny("bert")), "share one module"),
}


@pytest.mark.parametrize(("make", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_model_that_cannot_be_made_elastic_is_refused_and_untouched(make: Callable[[], Any], message: str) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        make_elastic(model, ElasticConfig(intermediate_size=[16], skip=["attention", "mlp"]))
    assert isinstance(caught.value, TypeError) and "\n" not in str(caught.value)
    assert fingerprint(model) == before


BAD_SPACES: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty": ("bert", {}, "leaves nothing to choose: declare"),
    "own size only": ("bert", {"intermediate_size": [48, 1.0], "num_hidden_layers": [3]}, "nothing to choose"),
    "no skip": ("bert", {"skip": []}, "nothing to choose"),
    "larger": ("bert", {"intermediate_size": [64]}, "intermediate_size=64 is not between 1 and the model's own 48"),
    "larger in one layer": ("bert", {"intermediate_size": {0: [16], 2: [49]}}, "intermediate_size=49"),
    "more heads": (
        "bert",
        {"num_attention_heads": [8]},
        "num_attention_heads=8 is not between 1 and the model's own 4",
    ),
    "more groups": (
        "llama",
        {"num_key_value_heads": [4]},
        "num_key_value_heads=4 is not between 1 and the model's own 2",
    ),
    "more layers": ("bert", {"num_hidden_layers": [4]}, "num_hidden_layers=4 is not between 1 and the model's own 3"),
    "no layers": ("bert", {"num_hidden_layers": [0]}, "num_hidden_layers=0"),
    "depth by layer": ("bert", {"num_hidden_layers": {0: [1]}}, "num_hidden_layers.*must be a non-empty list"),
    "no list": ("bert", {"intermediate_size": 16}, "intermediate_size=16 must be a non-empty list"),
    "bool": ("bert", {"intermediate_size": [True]}, "True is neither a fraction nor a size"),
    "empty list": ("bert", {"intermediate_size": []}, "must be a non-empty list"),
    "empty list of a layer": ("bert", {"intermediate_size": {1: []}}, "must be a non-empty list"),
    "heads of a grouped model": (
        "llama",
        {"num_attention_heads": [1]},
        "llama models choose num_key_value_heads, not num_attention_heads; set num_key_value_heads=",
    ),
    "groups of BERT": ("bert", {"num_key_value_heads": [1]}, "bert models choose num_attention_heads"),
    "unknown skip": ("bert", {"skip": ["ffn"]}, r"skip=\['ffn'\] is unknown"),
    "skip as text": ("bert", {"skip": "mlp"}, "skip='mlp' must be a list"),
    "unknown layer": (
        "bert",
        {"intermediate_size": {3: [16]}},
        r"intermediate_size names layers \[3\], the model has layers 0 to 2",
    ),
    "negative layer": ("bert", {"skip": {-1: ["mlp"]}}, r"skip names layers \[-1\]"),
    "layer as text": ("bert", {"num_attention_heads": {"0": [1]}}, r"names layers \['0'\]"),
    "layer as bool": ("bert", {"num_attention_heads": {True: [1]}}, r"names layers \[True\]"),
    "order too short": (
        "bert",
        {"num_hidden_layers": [2], "layer_order": [0, 1]},
        r"layer_order=\[0, 1\] must name each of the layers 0 to 2 once",
    ),
    "order repeats": ("bert", {"num_hidden_layers": [2], "layer_order": [0, 1, 1]}, r"layer_order=\[0, 1, 1\]"),
    "order of text": ("bert", {"num_hidden_layers": [2], "layer_order": [0, "1", 2]}, "layer_order="),
    "order no list": ("bert", {"num_hidden_layers": [2], "layer_order": 1}, "layer_order=1 must name"),
    "stock, sublayer": (
        "gpt2",
        {"skip": ["mlp"], "loadability": "stock"},
        r"skip=\['mlp'\] needs per-layer shapes.*only skip=\['layer'\]",
    ),
    "stock, by layer": (
        "bert",
        {"intermediate_size": {0: [16]}, "loadability": "stock"},
        "intermediate_size by layer cannot be held by a stock config",
    ),
    "stock, BERT heads": (
        "bert",
        {"num_attention_heads": [2], "loadability": "stock"},
        "derives the size of a head.*drop num_attention_heads=",
    ),
    "stock, heads do not divide": (
        "llama",
        {"num_key_value_heads": [3], "loadability": "stock"},
        r"num_key_value_heads=\[3\] gives \[3\] heads, which do not divide hidden_size=32",
    ),
    "padded, post-norm sublayer": (
        "bert",
        {"skip": ["mlp"], "loadability": "stock-padded"},
        r"post-norm\); use skip=\['layer'\]",
    ),
}


@pytest.mark.parametrize(("family", "settings", "message"), BAD_SPACES.values(), ids=BAD_SPACES)
def test_a_space_that_cannot_be_is_refused_and_the_model_untouched(
    family: str, settings: dict[str, Any], message: str
) -> None:
    changes = {"num_key_value_heads": 4} if settings.get("num_key_value_heads") == [3] else {}
    model = tiny(family, **changes)
    before = fingerprint(model)
    with pytest.raises(SpaceError, match=message) as caught:
        make_elastic(model, ElasticConfig(**settings))
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert fingerprint(model) == before
    make_elastic(model, WIDTHS)  # and it can still be converted


def test_a_dict_is_no_config() -> None:
    with pytest.raises(SpaceError, match=r"config is a dict; a \w+ model needs ElasticConfig\("):
        make_elastic(tiny("bert"), {"intermediate_size": [16]})  # type: ignore[arg-type]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "input projection": ({"ffn_in": ("intermediate.up",)}, "BertLayer has no 'intermediate.up', which the family row"),
    "query": ({"query": "attention.self.q"}, "no 'attention.self.q'"),
    "skip": ({"skip_mlp": (Skip("intermediate", "input"), Skip("outputs", "residual"))}, "no 'outputs'"),
    "no linear": ({"ffn_out": "output.LayerNorm"}, "LayerNorm is neither nn.Linear nor Conv1D"),
    "head size": ({"head_size": "head_dim"}, "attention.self.head_dim is None.*holds the size of a head"),
    "head size is no size": ({"head_size": "is_causal"}, "attention.self.is_causal is False"),
    "attribute": (
        {"attributes": {"num_heads": "heads"}},
        "attention.self.num_heads is None.*the heads of the active heads, 4 here",
    ),
    "attribute's meaning": ({"attributes": {"all_head_size": "heads"}}, "all_head_size is 32"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_does_not_fit_its_model_is_refused_and_the_model_untouched(
    changes: dict[str, Any], message: str
) -> None:
    model = tiny("bert")
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=message):
        make_elastic(model, space("bert"), family=replace(ROWS["bert"], **changes))
    assert fingerprint(model) == before


def test_heads_that_do_not_divide_the_projections_are_named() -> None:
    model = tiny("bert", "base")
    model.encoder.layer[1].attention.output.dense = nn.Linear(30, 32)
    with pytest.raises(SpaceError, match=r"layer 1 has projections of 30 \(queries\).*heads of 8"):
        make_elastic(model, WIDTHS)


def test_a_family_without_static_class_refuses_what_only_that_could_hold() -> None:
    row: Family = replace(ROWS["bert"], static_type=None)
    with pytest.raises(SpaceError, match=r"skip=\['mlp'\]: BertForMaskedLM has no static class"):
        make_elastic(tiny("bert"), ElasticConfig(skip=["mlp"]), family=row)
    supernet = make_elastic(tiny("bert"), ElasticConfig(skip=["layer"], intermediate_size=[16]), family=row)
    assert {supernet.loadability(a) for a in supernet.space.architectures()} == {"stock", "stock-padded"}


WITHOUT_STATIC_CLASS = [
    ("BertForPreTraining", "bert"), ("BertForMultipleChoice", "bert"), ("LlamaForTokenClassification", "llama"),
    ("GPT2ForTokenClassification", "gpt2"), ("DistilBertForMultipleChoice", "distilbert"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), WITHOUT_STATIC_CLASS)
def test_a_head_without_static_class_has_only_forms_that_can_be_written(name: str, family: str, tmp_path: Path) -> None:
    model = getattr(transformers, name)(tiny(family).config).eval()
    config = ElasticConfig(intermediate_size=[16], skip=["layer"], num_hidden_layers=[1])
    supernet = make_elastic(model, config)
    assert supernet.family.static_type is None and "layers.0.skip" not in supernet.space.names
    for arch in (supernet.space.smallest(), supernet.space.midpoint(), supernet.space.largest()):
        form = supernet.loadability(arch)
        assert form in ("stock", "stock-padded")
        export(supernet, arch, tmp_path / "out", overwrite=True)
    set_layer_order(supernet, [2, 1, 0])
    assert {supernet.loadability(a) for a in supernet.space.architectures()} == {"stock", "stock-padded"}
    supernet.save_pretrained(tmp_path / "saved")
    assert Supernet.from_pretrained(tmp_path / "saved").space == supernet.space


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMultipleChoice"])
def test_a_head_without_static_class_refuses_partial_skips_before_anything_is_done(name: str) -> None:
    model = getattr(transformers, name)(tiny("bert").config)
    before = fingerprint(model)
    with pytest.raises(SpaceError, match=rf"skip=\['attention'\]: {name} has no static class.*use skip=\['layer'\]"):
        make_elastic(model, ElasticConfig(skip=["attention"]))
    assert fingerprint(model) == before


@pytest.mark.parametrize("config", [WIDTHS, ElasticConfig(skip=["layer"])])
def test_a_hook_that_is_taken_off_no_longer_stands_in_the_way(config: ElasticConfig) -> None:
    model = tiny("bert")
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ElasticError, match="remove_hook_from_module"):
        make_elastic(model, config)
    remove_hook_from_module(model, recurse=True)
    supernet = make_elastic(model, config)
    with supernet.activate(supernet.space.smallest()):
        assert supernet.measured(**inputs(model)) == supernet.expected(supernet.space.smallest())


def test_a_hook_on_the_whole_model_does_no_harm() -> None:
    model = tiny("bert")
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    supernet = make_elastic(model, space("bert"))
    with supernet.activate(supernet.space.smallest()):
        assert supernet.measured(**inputs(model)) == supernet.expected(supernet.space.smallest())


def test_a_model_compiled_in_place_is_converted_and_follows_what_is_active() -> None:
    model = tiny("bert")
    model.compile(backend="eager")
    feed = inputs(model)
    with torch.no_grad():
        model(**feed)
    supernet = make_elastic(model, WIDTHS)
    plain = make_elastic(tiny("bert"), WIDTHS)
    for point in (supernet.space.smallest(), supernet.space.largest(), supernet.space.midpoint()):
        torch.testing.assert_close(outputs(supernet, point), outputs(plain, point))


def test_conversion_keeps_mode_dtype_gradients_and_tied_weights() -> None:
    model = tiny("gpt2").to(torch.bfloat16).train()
    model.transformer.wte.weight.requires_grad_(False)
    supernet = make_elastic(model, space("gpt2"))
    assert model.training and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight and not model.lm_head.weight.requires_grad
    assert supernet.model is model and supernet.active == supernet.space.largest()


# -- another order of layers ----------------------------------------------------------------------------------------


def test_replanning_for_another_order_changes_conditions_and_no_weight() -> None:
    supernet = supernet_of("llama")
    state = {name: t.clone() for name, t in supernet.model.state_dict().items()}
    replan(supernet, [1, 2, 0])
    assert supernet.layer_order == (1, 2, 0) and supernet.active == supernet.space.largest()
    assert supernet.space["layers.0.skip"].when and not supernet.space["layers.1.skip"].when
    shallow = supernet.space.canonical({**supernet.space.largest(), "num_hidden_layers": 2})
    assert [shape.skipped for shape in supernet.layer_shapes(shallow)] == [True, False, False]
    with supernet.activate(shallow):
        assert supernet.measured(**inputs(supernet.model)) == supernet.expected(shallow)
    assert all(torch.equal(t, state[name]) for name, t in supernet.model.state_dict().items())


def test_replanning_makes_a_layer_skippable_that_was_not() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(num_hidden_layers=[2]))
    replan(supernet, [2, 1, 0])
    small = supernet.space.smallest()
    with supernet.activate(small):
        assert supernet.measured(**inputs(supernet.model)) == supernet.expected(small)
    assert [shape.skipped for shape in supernet.layer_shapes(small)] == [True, False, False]


def test_replanning_keeps_what_was_active_in_its_new_form() -> None:
    supernet = supernet_of("llama")
    supernet.set_active({**supernet.space.largest(), "layers.0.intermediate_size": 16, "layers.2.skip": "mlp"})
    replan(supernet, [1, 2, 0])
    assert supernet.active in supernet.space
    assert supernet.active["layers.0.intermediate_size"] == 16 and supernet.active["layers.2.skip"] == "mlp"
    assert supernet.measured(**inputs(supernet.model)) == supernet.expected(supernet.active)


def test_replanning_survives_that_another_layer_is_the_one_that_stays() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(skip=["layer"], loadability="stock"))
    assert "layers.0.skip" not in supernet.space.names
    with supernet.activate(supernet.space.smallest()):
        replan(supernet, [1, 2, 0])
        assert "layers.1.skip" not in supernet.space.names and supernet.active["layers.2.skip"] == "layer"
        assert supernet.measured(**inputs(supernet.model)) == supernet.expected(supernet.active)
    assert supernet.active == supernet.space.largest()


def test_a_wrong_order_is_refused_before_anything_changes() -> None:
    supernet = supernet_of("bert")
    before = supernet.space
    with pytest.raises(SpaceError, match=r"layer_order=\[0, 0, 1\]"):
        replan(supernet, [0, 0, 1])
    assert supernet.space is before and supernet.layer_order == (0, 2, 1)


def test_bert_built_from_config_alone_is_converted_in_five_lines() -> None:
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    )
    supernet = make_elastic(
        model, ElasticConfig(intermediate_size=[0.25, 0.5], num_attention_heads=[1, 2], skip=["layer"])
    )
    assert supernet.space.size == (3 * 3 + 1) ** 2
