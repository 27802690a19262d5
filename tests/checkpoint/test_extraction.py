"""Extracted models: class, shapes, dtypes, ties, and what forms refuse; that they equal the subnet is promise 4."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, DECODERS, GROUPED, class_of, inputs, outputs, point, space, supernet_of, tiny
from transformers import BertForPreTraining, OPTConfig, OPTForCausalLM, PreTrainedModel

from hf_elastic import FAMILIES, ArchitectureError, ElasticConfig, ExportError, extract, make_elastic

ROWS = {row.model_type: row for row in FAMILIES}


def logits(model: PreTrainedModel, **feed: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(feed or inputs(model)))[0]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_uniform_subnet_is_a_smaller_model_of_the_stock_class(family: str) -> None:
    supernet = supernet_of(family)
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16, num_hidden_layers=2)
    model = extract(supernet, arch)
    assert type(model) is class_of(family, "lm")
    row = ROWS[family]
    config = model.config.to_dict()
    assert (config[row.config_name("intermediate_size")], config[row.config_name("num_hidden_layers")]) == (16, 2)
    assert same(logits(model), outputs(supernet, arch))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_subnet_with_different_layers_is_a_model_of_the_static_class(family: str) -> None:
    supernet = supernet_of(family)
    arch = point(supernet, ffn0=16, skip1="attention", heads2=1)
    model = extract(supernet, arch)
    assert model.config.model_type == ROWS[family].static_type
    assert same(logits(model), outputs(supernet, arch))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_padded_subnet_is_a_stock_model_with_the_same_outputs(family: str) -> None:
    supernet = supernet_of(
        family, skip=["attention", "mlp"] if family in DECODERS else ["layer"], num_hidden_layers=None
    )
    changes = {
        "ffn0": 16,
        "ffn1": 24,
        "heads2": 1,
        **({"skip1": "attention", "skip2": "mlp"} if family in DECODERS else {"skip1": "layer"}),
    }
    arch = point(supernet, **changes)
    assert supernet.loadability(arch) == "stock-padded"
    model = extract(supernet, arch, loadability="stock-padded")
    assert type(model) is class_of(family, "lm") and same(logits(model), outputs(supernet, arch))
    # padded to the widest layer that has an FFN, not to the parent
    widest = max(s.intermediate_size for s in supernet.layer_shapes(arch) if s.mlp)
    assert model.config.to_dict()[ROWS[family].config_name("intermediate_size")] == widest


@pytest.mark.parametrize("family", GROUPED)
def test_groups_are_padded_to_the_next_count_a_stock_config_holds(family: str) -> None:
    supernet = make_elastic(
        tiny(family, num_key_value_heads=4), ElasticConfig(num_key_value_heads={0: [3], 1: [1], 2: [2]})
    )
    arch = supernet.space.smallest()
    model = extract(supernet, arch, loadability="stock-padded")
    # 32 hidden values: 3 heads do not divide them (Qwen3 does not ask for that)
    assert model.config.num_key_value_heads == (3 if family == "qwen3" else 4)
    assert same(logits(model), outputs(supernet, arch))


def test_a_padded_subnet_may_be_asked_for_where_stock_would_do() -> None:
    supernet = supernet_of("llama")
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16)
    for form in ("stock", "stock-padded", "remote-code"):
        assert same(logits(extract(supernet, arch, loadability=form)), outputs(supernet, arch))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", CONFIGS)
def test_of_a_model_without_any_layer_the_rest_stays(family: str) -> None:
    supernet = supernet_of(family, skip=["layer"], num_hidden_layers=None)
    arch = point(supernet, skip0="layer", skip1="layer", skip2="layer")
    model = extract(supernet, arch)
    assert same(logits(model), outputs(supernet, arch))


@pytest.mark.parametrize("head", ["base", "sequence", "token", "qa"])
@pytest.mark.parametrize("form", ["stock-padded", "remote-code"])
def test_every_head_of_an_encoder_is_extracted(head: str, form: Any) -> None:
    supernet = supernet_of("bert", head, skip=["layer"])
    arch = point(supernet, ffn0=16, heads1=2, skip2="layer")
    assert same(logits(extract(supernet, arch, loadability=form)), outputs(supernet, arch))


def test_a_gpt2_that_scales_attention_by_layer_keeps_its_scales() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=False)
    supernet = make_elastic(model, ElasticConfig(intermediate_size=[16], num_attention_heads=[1]))
    for arch in (supernet.space.smallest(), point(supernet, heads0=1, ffn2=16), supernet.space.largest()):
        form = supernet.loadability(arch)
        assert same(logits(extract(supernet, arch, loadability=form)), outputs(supernet, arch))
        assert same(logits(extract(supernet, arch, loadability="remote-code")), outputs(supernet, arch))


@pytest.mark.parametrize("options", [
    {"mlp_bias": True, "attention_bias": True}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
], ids=str)  # fmt: skip
def test_options_of_llama_survive_every_form(options: dict[str, Any]) -> None:
    supernet = make_elastic(tiny("llama", **options), space("llama"))
    arch = point(supernet, ffn0=16, heads1=1, skip2="mlp")
    for form in ("stock-padded", "remote-code"):
        assert same(logits(extract(supernet, arch, loadability=form)), outputs(supernet, arch))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "form", "message"),
    [
        ({"ffn0": 16}, "stock", "it needs 'stock-padded'; export with loadability='stock-padded', or search"),
        ({"skip0": "mlp"}, "stock", "it needs 'remote-code'"),
        ({"skip0": "mlp"}, "stock-padded", "it needs 'remote-code'"),
        ({}, "padded", "loadability='padded' is not one of stock, stock-padded, remote-code"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_hold_the_subnet_is_refused(changes: dict[str, Any], form: Any, message: str) -> None:
    supernet = supernet_of("bert")
    with pytest.raises(ExportError, match=message) as caught:
        extract(supernet, point(supernet, **changes), loadability=form)
    assert "\n" not in str(caught.value)


def test_an_architecture_of_another_space_is_refused() -> None:
    supernet = supernet_of("bert")
    for foreign in (supernet_of("llama").space.smallest(), {"layers.0.skip": "all"}, None):
        with pytest.raises(ArchitectureError):
            extract(supernet, foreign)  # type: ignore[arg-type]


def test_a_row_without_static_class_refuses_remote_code() -> None:
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
                       max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    row = replace(
        ROWS["llama"], model_type="opt", layers="decoder.layers", ffn_in=("fc1",), ffn_out="fc2", grouped=False,
        attention_out="self_attn.out_proj", attributes={"num_heads": "heads"}, stock_heads="parent", static_type=None,
        skip_attention=(), skip_mlp=(), config_names={"intermediate_size": "ffn_dim"},
    )  # fmt: skip
    supernet = make_elastic(OPTForCausalLM(config).eval(), ElasticConfig(intermediate_size=[16]), family=row)
    with pytest.raises(ExportError, match="OPTForCausalLM has no static class.*loadability='stock-padded'"):
        extract(supernet, point(supernet, ffn0=16))
    assert same(
        logits(extract(supernet, point(supernet, ffn0=16), loadability="stock-padded")),
        outputs(supernet, point(supernet, ffn0=16)),
    )


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose output head is not its embedding, though its config says so, as a checkpoint may store it."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    model.config.tie_word_embeddings = True
    return model


def same_memory(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("form", ["stock", "stock-padded", "remote-code"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama", "gpt2"])
def test_a_head_that_is_not_the_embedding_stays_its_own(family: str, form: Any, tmp_path: Path) -> None:
    stored = tmp_path / "parent"
    untied(tiny(family)).save_pretrained(stored)
    model = class_of(family, "lm").from_pretrained(stored).eval()
    assert model.config.tie_word_embeddings and not same_memory(model)
    supernet = make_elastic(model, space(family))
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16)
    wanted = outputs(supernet, arch)
    cut = extract(supernet, arch, loadability=form)
    assert not cut.config.tie_word_embeddings and same(logits(cut), wanted)
    cut.save_pretrained(tmp_path / "cut")
    again = type(cut).from_pretrained(tmp_path / "cut").eval()
    assert same(logits(again), wanted) and supernet.model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama", "gpt2"])
def test_a_head_that_is_the_embedding_stays_it(family: str) -> None:
    supernet = make_elastic(tiny(family, tie_word_embeddings=True), space(family))
    cut = extract(supernet, supernet.space.midpoint())
    assert cut.config.tie_word_embeddings and same_memory(cut)


def test_a_head_without_static_class_is_refused_in_that_form_only() -> None:
    model = BertForPreTraining(tiny("bert").config).eval()
    supernet = make_elastic(model, space("bert", skip=["layer"]))
    arch = point(supernet, ffn0=16)
    with pytest.raises(ExportError, match="BertForPreTraining has no static class"):
        extract(supernet, arch)
    assert same(logits(extract(supernet, arch, loadability="stock-padded")), outputs(supernet, arch))


# -- what an extracted model is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_the_largest_subnet_is_bit_equal_to_the_parent_in_every_dtype(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny(family)
        for parameter in model.parameters():  # as from_pretrained(dtype=...) does, which leaves buffers alone
            parameter.data = parameter.data.to(dtype)
        supernet = make_elastic(model, space(family))
        largest = extract(supernet, supernet.space.largest(), loadability="stock")
        assert {p.dtype for p in largest.parameters()} == {dtype}
        assert torch.equal(logits(largest), outputs(supernet, supernet.space.largest()))


@pytest.mark.parametrize("form", ["stock", "remote-code"])
def test_rotary_frequencies_stay_in_float32(form: Any) -> None:
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    supernet = make_elastic(model, space("llama"))
    buffers = dict(extract(supernet, supernet.space.largest(), loadability=form).named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_tensors_of_different_dtypes_keep_them() -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.model.norm.float()
    supernet = make_elastic(model, space("llama"))
    extracted = extract(supernet, supernet.space.midpoint())
    dtypes = {name: p.dtype for name, p in extracted.named_parameters()}
    assert dtypes.pop("model.norm.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize("form", ["stock", "stock-padded", "remote-code"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_nothing_is_shared_with_the_supernet_and_nothing_is_larger_than_the_subnet(family: str, form: Any) -> None:
    supernet = supernet_of(family)
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16)
    before = copy.deepcopy(supernet.model.state_dict())
    model = extract(supernet, arch, loadability=form)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
            assert parameter.is_contiguous() and parameter.requires_grad and parameter.is_leaf
            parameter.zero_()
    assert all(torch.equal(t, before[n]) for n, t in supernet.model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_tied_weights_stay_tied_and_untied_ones_apart(family: str, tied: bool) -> None:
    supernet = make_elastic(tiny(family, tie_word_embeddings=tied), space(family))
    for form in ("stock", "remote-code"):
        model = extract(supernet, supernet.space.largest(), loadability=form)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_mode_gradients_and_activity_of_the_supernet_do_not_matter_and_stay() -> None:
    supernet = supernet_of("llama")
    supernet.model.train().requires_grad_(False)
    arch = point(supernet, ffn0=16)
    with supernet.activate(supernet.space.smallest()):
        model = extract(supernet, arch)
        assert supernet.active == supernet.space.smallest()
    assert not model.training and all(p.requires_grad for p in model.parameters()) and supernet.model.training
    supernet.model.eval()
    assert same(logits(model), outputs(supernet, arch))


def test_the_attention_implementation_and_the_generation_config_come_along() -> None:
    supernet = make_elastic(tiny("llama", attn_implementation="eager"), space("llama"))
    supernet.model.generation_config.max_new_tokens = 7
    for form in ("stock", "remote-code"):
        model = extract(supernet, supernet.space.largest(), loadability=form)
        assert model.config._attn_implementation == "eager" and model.generation_config.max_new_tokens == 7
        assert model.generation_config is not supernet.model.generation_config


@pytest.mark.parametrize("family", DECODERS)
def test_an_extracted_decoder_generates_what_the_subnet_generates(family: str) -> None:
    supernet = supernet_of(family)
    ids = inputs(supernet.model, tokens=4)["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    arch = point(supernet, skip0="attention", ffn1=16, heads2=1)
    with supernet.activate(arch):
        wanted = supernet.model.generate(ids, **options)
    assert torch.equal(extract(supernet, arch).generate(ids, **options), wanted)


def test_kinds_of_layers_follow_the_layers_that_stay() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen2", sliding_window=3, use_sliding_window=True, layer_types=types)
    supernet = make_elastic(model, ElasticConfig(skip={0: ["layer"], 1: ["attention"]}, intermediate_size=[16]))
    for arch in (
        point(supernet, skip0="layer"),
        point(supernet, skip0="layer", ffn1=16),
        point(supernet, skip1="attention"),
    ):
        model = extract(supernet, arch)
        assert same(logits(model), outputs(supernet, arch))
    assert extract(supernet, point(supernet, skip0="layer")).config.layer_types == types[1:]


def test_extraction_leaves_the_config_of_the_parent() -> None:
    supernet = supernet_of("llama")
    before = copy.deepcopy(supernet.model.config.to_dict())
    for arch in (supernet.space.smallest(), supernet.space.midpoint()):
        extract(supernet, arch)
    assert supernet.model.config.to_dict() == before


def test_a_dict_of_choices_is_an_architecture() -> None:
    supernet = make_elastic(tiny("bert"), ElasticConfig(intermediate_size=[16], loadability="stock"))
    assert extract(supernet, {"intermediate_size": 16}).config.intermediate_size == 16


def test_a_subnet_of_a_compiled_supernet_is_extracted() -> None:
    supernet = supernet_of("gpt2")
    supernet.model.compile(backend="eager")
    arch = point(supernet, ffn0=16, skip1="mlp")
    wanted = outputs(supernet_of("gpt2"), arch)
    assert same(logits(extract(supernet, arch)), wanted)
