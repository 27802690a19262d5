"""The KV cache where layers lack attention: step by step gives what the whole sequence gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_static import LANGUAGE_MODELS, LAYERS, build, config_of, mixed_layers, narrow, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
for kind in LANGUAGE_MODELS:
    CASES |= {
        f"{kind} equal": (kind, {}, {}),
        f"{kind} mixed": (kind, mixed_layers(kind), {}),
        f"{kind} narrow": (kind, {i: narrow(kind, width=9, groups=1 + i) for i in range(3)}, {}),
        f"{kind} no attention": (kind, {i: {"skip": ["attention"]} for i in range(LAYERS)}, {}),
    }
CASES["elastic_llama window"] = ("elastic_llama", mixed_layers("elastic_llama"), {"sliding_window": 4})
CASES["elastic_llama half window"] = ("elastic_llama", mixed_layers("elastic_llama"), WINDOW)
CASES["elastic_llama window first skipped"] = ("elastic_llama", {0: {"skip": ["attention"]}}, WINDOW)


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model_type, per_layer, changes = request.param
    config = config_of(model_type, per_layer, **changes)
    return build(model_type, LANGUAGE_MODELS[model_type], config)


def left_padded(length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and position ids; the first sequence has three tokens of padding before it."""
    ids, mask = tokens(length=length), torch.ones(2, length, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def step_by_step(model: PreTrainedModel, cache: Any, *, first: int) -> Tensor:
    """Logits of a prompt of ``first`` tokens at once, then of one token at a time."""
    ids, mask, positions = left_padded()
    pieces, start = [], 0
    with torch.no_grad():
        for end in (first, *range(first + 1, ids.shape[1] + 1)):
            result = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = result.past_key_values, end
            pieces.append(result.logits)
            assert int(cache.get_seq_length()) == end
    return torch.cat(pieces, dim=1)


def at_once(model: PreTrainedModel) -> Tensor:
    ids, mask, positions = left_padded()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def assert_same_where_not_padding(got: Tensor, wanted: Tensor) -> None:
    mask = left_padded()[1].bool()
    assert (got - wanted)[mask].abs().max() <= 1e-5


@pytest.mark.parametrize("first", [1, 5])
def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(model: PreTrainedModel, first: int) -> None:
    assert_same_where_not_padding(step_by_step(model, None, first=first), at_once(model))


def test_steps_with_a_bare_dynamic_cache_give_the_same(model: PreTrainedModel) -> None:
    assert_same_where_not_padding(step_by_step(model, DynamicCache(), first=4), at_once(model))


def test_steps_with_a_static_cache_give_the_same(model: PreTrainedModel) -> None:
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert_same_where_not_padding(step_by_step(model, cache, first=4), at_once(model))


def test_position_ids_are_counted_on_from_a_returned_cache(model: PreTrainedModel) -> None:
    ids = tokens()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        head = model(input_ids=ids[:, :4], use_cache=True)
        middle = model(input_ids=ids[:, 4:6], past_key_values=head.past_key_values, use_cache=True)
        tail = model(input_ids=ids[:, 6:], past_key_values=middle.past_key_values, use_cache=True)
    got = torch.cat([head.logits, middle.logits, tail.logits], dim=1)
    assert (got - wanted).abs().max() <= 1e-5


def greedy_without_cache(model: PreTrainedModel, ids: Tensor, *, mask: Tensor, count: int) -> Tensor:
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
        {"num_beams": 2},
    ],
    ids=["dynamic", "static", "chunked prefill", "beams"],
)
def test_generation_uses_the_cache_without_changing_the_text(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    ids, mask, _ = left_padded()
    model.generation_config.eos_token_id = None
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=mask, **common, **settings)
    if "num_beams" in settings:
        wanted = model.generate(ids, attention_mask=mask, **common, **settings, use_cache=False)
    else:
        wanted = greedy_without_cache(model, ids, mask=mask, count=6)
    assert torch.equal(got, wanted)


def test_a_layer_without_attention_keeps_one_number_per_token() -> None:
    model = build("elastic_llama", "ElasticLlamaForCausalLM")
    with torch.no_grad():
        cache = model(input_ids=tokens(), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 1, 9, 1)
    assert cache.layers[1].keys.shape == (2, 1, 9, 6)
    assert cache.layers[2].keys.shape == (2, 3, 9, 6)
