"""The published spaces: their sizes, their values, and what they become at another size."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_models import tiny
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, LlamaConfig, LlamaForCausalLM

from hf_elastic import SpaceError, Supernet, costs, make_elastic, objectives, search_subnets, spaces
from hf_elastic.models.elastic_blocks import BLOCKS
from hf_elastic.spaces import ELM_SIZES, ElmSize, elm_budget, elm_config, elm_model_class, mean_path_parameters


@pytest.fixture(scope="module")
def lonas_llama() -> Supernet:
    config = LlamaConfig()  # of 7B: 32 layers, 4096 wide, 11008 neurons
    with torch.device("meta"):
        return spaces.lonas_llama(config).make(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def lonas_bert() -> Supernet:
    config = BertConfig()
    with torch.device("meta"):
        return spaces.lonas_bert(config).make(BertForSequenceClassification(config))


def test_lonas_bert_has_the_published_size_and_widths(lonas_bert: Supernet) -> None:
    space = lonas_bert.space
    assert space.size == 3**25 * 2**11
    assert space["layers.0.num_attention_heads"].values == (6, 12)
    assert space["layers.10.num_attention_heads"].values == (3, 11, 12)
    assert space["layers.10.intermediate_size"].values == (163, 2198, 3072)
    assert [space[f"layers.{i}.num_attention_heads"].values[0] * 64 for i in range(12)] == [
        384, 320, 256, 512, 512, 704, 576, 576, 640, 192, 192, 320,
    ]  # fmt: skip
    assert space["layers.5.r"].values == (2, 4, 8)
    assert space.midpoint()["layers.0.intermediate_size"] == 2634
    assert space.midpoint()["layers.0.num_attention_heads"] == 12  # of two values the larger, as the official code


def test_lonas_llama_has_the_published_size_and_its_midpoint_the_published_parameters(lonas_llama: Supernet) -> None:
    space = lonas_llama.space
    assert space.size == 2**64 * 5**32
    assert space["layers.31.intermediate_size"].values == (5504, 6880, 8256, 9632, 11008)
    assert space["layers.0.q_proj|k_proj|v_proj.r"].values == (28, 32)
    midpoint = space.midpoint()
    assert midpoint["layers.3.intermediate_size"] == 8256 and midpoint["layers.3.up_proj|gate_proj.r"] == 32
    billions = objectives.total_parameters(lonas_llama)(midpoint) / 1e9
    assert billions == pytest.approx(5.66, abs=0.01)  # the paper says 5.6 B
    downs = [part for part in lonas_llama.adapter_parts if part.module_name.endswith("down_proj")]  # type: ignore[attr-defined]
    assert len(downs) == 32 and all(part.rank(midpoint) == 32 for part in downs)  # type: ignore[attr-defined]


def test_the_exact_front_of_the_space_of_llama_needs_no_weights(lonas_llama: Supernet) -> None:
    result = search_subnets(
        lonas_llama.space,
        [objectives.adapter_parameters(lonas_llama), objectives.parameters(lonas_llama)],
        algorithm="exact",
    )
    smallest = lonas_llama.space.smallest()
    assert [dict(e.architecture) for e in result.front] == [dict(smallest)]


def test_shears_and_sqft_have_the_published_groups() -> None:
    config = tiny("llama", hidden_size=64).config
    shears = spaces.shears_llama(config).make(tiny("llama", hidden_size=64))
    assert shears.space.size == 3 ** (3 * 3)
    assert {choice.midpoint for choice in shears.space} == {24}
    sqft = spaces.sqft_llama(config).make(tiny("llama", hidden_size=64))
    assert sqft.space.size == 5**3 and {choice.midpoint for choice in sqft.space} == {24}


def test_another_size_gets_the_same_fractions() -> None:
    config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    space = spaces.lonas_bert(config)
    assert space.elastic is not None and space.elastic.intermediate_size is not None
    assert space.elastic.intermediate_size[0] == (108, 1317) and space.elastic.intermediate_size[5] == (75, 970)  # type: ignore[index]
    assert spaces.lonas_bert(tiny("distilbert").config).make(tiny("distilbert")).space.size > 1
    with pytest.raises(SpaceError, match="lonas_bert is a space of bert"):
        spaces.lonas_bert(tiny("llama").config)


def test_a_space_may_be_made_twice_and_its_adapters_from_a_seed() -> None:
    models = [tiny("llama", hidden_size=64, intermediate_size=96) for _ in range(2)]
    space = spaces.lonas_llama(models[0].config)
    first, second = (copy.deepcopy(space).make(model, seed=4) for model in models)
    assert first.space == second.space
    weights = dict(second.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in first.model.named_parameters())


def test_flexibert_has_the_published_size() -> None:
    space = spaces.flexibert()
    assert space.size == 2 * (48**2 + 48**4) == 10_621_440
    shallow = space.canonical({**space.largest(), "num_hidden_layers": 2})
    assert shallow == space.canonical({**shallow, "layers.3.intermediate_size": 512})  # a layer that is not there


def test_litetransformersearch_has_the_published_size_where_the_width_counts_for_each_layer() -> None:
    ffns = {width: sum(1 for inner in range(256, 4097, 64) if inner >= 2 * width) for width in range(128, 1025, 64)}
    one, each = spaces.lts_gpt2(), spaces.lts_gpt2(width_per_layer=True)
    assert one.size == 9 * sum((3 * count) ** depth for count in ffns.values() for depth in range(2, 17))
    assert each.size == 9 * sum((3 * sum(ffns.values())) ** depth for depth in range(2, 17))
    assert each.size > 10**54 > one.size
    rng = random.Random(0)
    for _ in range(50):
        point = one.sample(rng)
        width = point["hidden_size"]
        assert all(point[f"layers.{i}.intermediate_size.{width}"] >= 2 * int(width) for i in range(16))


def test_benchmarked_spaces_have_names() -> None:
    assert {name: make().size for name, make in spaces.BENCHMARKED.items()}.keys() == {"flexibert", "lts-gpt2"}


def elm_skeleton(size: str | ElmSize, **changes: object) -> Supernet:
    config = elm_config(size, **changes)  # type: ignore[arg-type]
    with torch.device("meta"):
        return make_elastic(elm_model_class(config)(config))


@pytest.mark.parametrize(
    ("size", "embedding", "standard", "bottleneck"),
    [("small", 4.383e6, 1.259e6, 0.404e6), ("tiny", 4.383e6, 1.259e6, 0.404e6)],
)
def test_elm_has_the_published_sizes(size: str, embedding: float, standard: float, bottleneck: float) -> None:
    supernet = elm_skeleton(size)
    config = supernet.base.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (528, 12, 792)
    assert supernet.space.size == 6 ** {"small": 12, "tiny": 6}[size]
    part = supernet.block_parts[0]
    assert part.parameters("standard") == pytest.approx(standard, rel=1e-3)
    assert part.parameters("bottleneck") == pytest.approx(bottleneck, rel=2e-3)
    assert part.parameters("standard") - part.parameters("standard-qv") == 528 * 528 + 528
    assert part.parameters_at("standard", 264) - part.parameters("standard") == pytest.approx(0.1396e6, rel=1e-3)
    embeddings = sum(p.numel() for p in supernet.base.base_model.embeddings.parameters())
    assert embeddings == pytest.approx(embedding, rel=1e-3)


def test_the_smallest_elm_grows_from_48_to_384_neurons() -> None:
    supernet = elm_skeleton("micro")
    part = supernet.block_parts[5]
    assert [part.width(block) for block in part.blocks] == [48] * 6
    assert [part.allocated(block) for block in part.blocks] == [384] * 6
    assert supernet.base.config.bottleneck_head_dim == 4


@pytest.mark.parametrize("size", ELM_SIZES)
def test_the_published_budget_lies_half_way_between_narrow_and_wide_paths(size: str) -> None:
    config = elm_config(size)
    assert elm_budget(size, config) == ELM_SIZES[size].total_parameters
    supernet = elm_skeleton(size)
    low, high = mean_path_parameters(supernet), mean_path_parameters(supernet, width=ELM_SIZES[size].largest)
    assert 0.45 < (ELM_SIZES[size].total_parameters - low) / (high - low) < 0.61


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 512}, {"layers": 3}, {"task": "causal-lm"}, {"positions": 64}, {"blocks": BLOCKS[:2]}],
    ids=str,
)
def test_another_model_gets_a_budget_half_way(changes: dict[str, object]) -> None:
    config, supernet = elm_config("micro", **changes), elm_skeleton("micro", **changes)  # type: ignore[arg-type]
    ends = mean_path_parameters(supernet), mean_path_parameters(supernet, width=384)
    assert elm_budget("micro", config) == pytest.approx(sum(ends) / 2, abs=1)


def test_the_mean_path_is_the_mean_over_all_paths() -> None:
    supernet = elm_skeleton(ElmSize(2, 24, 4, 12, 4, 2, 1e4), vocab_size=40, positions=16, blocks=BLOCKS[1:5])
    supernet.block_parts[0].set_width("bottleneck", 8)
    supernet.resized()
    paths = [costs.total_parameters(supernet, path) for path in supernet.space.architectures()]
    assert len(paths) == 16 and mean_path_parameters(supernet) == pytest.approx(sum(paths) / 16)


def test_a_decoder_has_no_small_embedding_and_its_ends_are_the_callers() -> None:
    config = elm_config("tiny", task="causal-lm", vocab_size=99, bos_token_id=3, eos_token_id=4, resid_pdrop=0.0)
    assert config.model_type == "elastic_gpt2" and (config.n_embd, config.n_layer, config.n_inner) == (528, 6, 792)
    assert (config.bos_token_id, config.eos_token_id, config.resid_pdrop, config.attn_pdrop) == (3, 4, 0.0, 0.1)
    assert elm_config("tiny", task="causal-lm", vocab_size=99).eos_token_id is None


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        ("large", {}, "size='large' is not one of small, tiny, micro"),
        ("micro", {"task": "embedding"}, "task='embedding' is not one of masked-lm, causal-lm"),
        ("micro", {"blocks": ["wide"]}, "block 'wide' is unknown"),
        ("micro", {"candidate_widths": [[500] * 6] * 6}, "lie between 1 and"),
        ("micro", {"layers": 0}, "layers=0 must be"),
        ("micro", {"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
        ("micro", {"positions": 1.5}, "positions=1.5 must be an integer"),
        (
            "micro",
            {"task": "causal-lm", "n_heads": 4},
            r"elastic_gpt2 \(causal-lm\) has no n_heads; did you mean n_head",
        ),
        ("micro", {"family": "gpt2"}, r"elastic_bert \(masked-lm\) has no family; leave it out"),
        ("micro", {"task": "causal-lm", "trigram_input": True}, "has no trigram_input"),
    ],
)
def test_what_no_elm_can_be_is_said(size: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        elm_config(size, **changes)  # type: ignore[arg-type]


def test_what_a_config_class_knows_is_passed_on() -> None:
    changed = elm_config("micro", num_attention_heads=4, num_labels=5, hidden_dropout_prob=0.3)
    assert (changed.num_attention_heads, changed.num_labels, changed.hidden_dropout_prob) == (4, 5, 0.3)
    assert elm_config("micro", task="causal-lm", num_attention_heads=4).n_head == 4


def test_a_budget_is_that_of_a_config_of_candidate_blocks() -> None:
    for wrong in (elm_skeleton("micro"), GPT2Config(), None):
        with pytest.raises(SpaceError, match=f"got a {type(wrong).__name__}; give what elm_config returned"):
            elm_budget("micro", wrong)  # type: ignore[arg-type]
