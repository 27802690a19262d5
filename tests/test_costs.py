"""Costs in closed form against FlopCounterMode, against models really extracted, and against real KV caches."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, DECODERS, GROUPED, inputs, space, supernet_of, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from hf_elastic import Architecture, ElasticConfig, Supernet, costs, extract, make_elastic

ENCODERS = ("bert", "roberta", "distilbert")
HEADS = [
    *[(family, head) for family in ENCODERS for head in ("base", "lm", "sequence", "token", "qa")],
    *[(family, head) for family in GROUPED for head in ("base", "lm", "sequence", "token", "qa")],
    *[("gpt2", head) for head in ("base", "lm", "sequence", "token", "qa")],
]


def points(supernet: Supernet, *, count: int = 3) -> list[Architecture]:
    rng, found = random.Random(0), supernet.space
    return [found.largest(), found.midpoint(), found.smallest(), *(found.sample(rng) for _ in range(count))]


def counted(model: PreTrainedModel, **feed: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**feed)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_macs_equal_half_the_counted_flops_of_an_eager_forward_of_any_subnet(family: str, head: str) -> None:
    supernet = make_elastic(tiny(family, head, attn_implementation="eager"), space(family))
    for point in points(supernet):
        for batch_size, tokens in ((1, 7), (3, 4)):
            feed = inputs(supernet.model, batch_size=batch_size, tokens=tokens)
            with supernet.activate(point):
                assert costs.macs(supernet, point, seq_len=tokens, batch_size=batch_size) == counted(
                    supernet.model, **feed
                )


def test_macs_of_multiple_choice_count_every_choice_as_a_sequence() -> None:
    supernet = make_elastic(tiny("bert", "choice", attn_implementation="eager"), space("bert", skip=["layer"]))
    ids = torch.randint(3, 61, (2, 3, 5))
    wanted = counted(supernet.model, input_ids=ids)
    assert costs.macs(supernet, supernet.space.largest(), seq_len=5, batch_size=6) == wanted


@pytest.mark.parametrize("family", CONFIGS)
def test_macs_equal_the_counted_flops_of_the_extracted_model(family: str) -> None:
    supernet = make_elastic(tiny(family, attn_implementation="eager"), space(family))
    for point in points(supernet, count=2):
        model = extract(supernet, point)
        assert costs.macs(supernet, point, seq_len=6, batch_size=2) == counted(model, **inputs(model, tokens=6))


def without_embeddings(model: PreTrainedModel) -> int:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


EXTRACTABLE = [
    *[(family, head) for family in ENCODERS for head in ("base", "lm", "sequence", "token", "qa")],
    *[(family, head) for family in DECODERS for head in ("base", "lm", "sequence")],
]


@pytest.mark.parametrize(("family", "head"), EXTRACTABLE)
def test_parameters_equal_those_of_the_extracted_model(family: str, head: str) -> None:
    supernet = supernet_of(family, head)
    for point in points(supernet, count=8):
        model = extract(supernet, point)
        assert costs.total_parameters(supernet, point) == sum(p.numel() for p in model.parameters())
        assert costs.parameters(supernet, point) == without_embeddings(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_head_counts_as_embedding_and_an_untied_one_does_not(family: str, tied: bool) -> None:
    supernet = make_elastic(tiny(family, tie_word_embeddings=tied), space(family))
    largest = supernet.space.largest()
    assert costs.total_parameters(supernet, largest) == sum(p.numel() for p in supernet.model.parameters())
    embeddings = costs.embedding_parameters(supernet)
    positions = 64 * 32 if family != "llama" else 0
    assert embeddings == 61 * 32 + positions + (2 * 32 if family == "bert" else 0)
    assert costs.parameters(supernet, largest) == without_embeddings(supernet.model)
    assert (costs.parameters(supernet, supernet.space.smallest()) >= 61 * 32) == (not tied)


def cached_bytes(cache: DynamicCache) -> int:
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DECODERS)
def test_kv_cache_bytes_equal_the_contents_of_the_extracted_models_cache(family: str, dtype: torch.dtype) -> None:
    supernet = make_elastic(tiny(family).to(dtype), space(family))
    for point in points(supernet, count=6):
        model = extract(supernet, point)
        for tokens in (3, 9):  # below and above the window of Mistral
            with torch.no_grad():
                cache = model(**inputs(model, tokens=tokens), use_cache=True).past_key_values
            assert costs.kv_cache_bytes(supernet, point, seq_len=tokens, batch_size=2) == cached_bytes(cache)


def test_kv_cache_bytes_of_another_dtype_and_of_an_encoder() -> None:
    supernet = supernet_of("llama")
    largest = supernet.space.largest()
    assert costs.kv_cache_bytes(supernet, largest, seq_len=5) == 3 * 2 * 2 * 8 * 5 * 4
    assert costs.kv_cache_bytes(supernet, largest, seq_len=5, dtype=torch.float16) == 3 * 2 * 2 * 8 * 5 * 2
    encoder = supernet_of("bert")
    assert costs.kv_cache_bytes(encoder, encoder.space.largest(), seq_len=5) == 0


@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention", "full_attention"]])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_only_layers_that_slide_hold_a_window(family: str, layer_types: list[str] | None) -> None:
    sliding = {"sliding_window": 4, "use_sliding_window": True} if family != "mistral" else {"sliding_window": 4}
    model = tiny(family, **sliding, **({"layer_types": layer_types} if layer_types else {}))
    supernet = make_elastic(model, ElasticConfig(intermediate_size=[16], num_hidden_layers=[2]))
    for point in supernet.space.largest(), supernet.space.smallest():
        model = extract(supernet, point)
        with torch.no_grad():
            cache = model(**inputs(model, tokens=9), use_cache=True).past_key_values
        assert costs.kv_cache_bytes(supernet, point, seq_len=9, batch_size=2) == cached_bytes(cache)


def test_costs_ask_nothing_of_the_model_and_change_nothing() -> None:
    supernet = supernet_of("gpt2")
    middle = supernet.space.midpoint()
    calls: list[str] = []
    supernet.model.register_forward_pre_hook(lambda *args: calls.append("ran"))
    with supernet.activate(middle):
        for point in points(supernet):
            costs.parameters(supernet, point)
            costs.macs(supernet, point, seq_len=8)
            costs.kv_cache_bytes(supernet, point, seq_len=8)
        assert supernet.active == middle
        assert supernet.measured(**inputs(supernet.model)) == supernet.expected(middle)
    assert len(calls) == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_a_smaller_choice_never_costs_more(family: str) -> None:
    supernet = supernet_of(family)
    ordered = [supernet.space.smallest(), supernet.space.midpoint(), supernet.space.largest()]
    for cost in (
        lambda a: costs.parameters(supernet, a),
        lambda a: costs.macs(supernet, a, seq_len=16),
        lambda a: costs.kv_cache_bytes(supernet, a, seq_len=16),
    ):
        values = [cost(point) for point in ordered]
        assert values == sorted(values)


# -- latency ----------------------------------------------------------------------------------------------------------


def test_calls_are_timed_in_interleaved_rounds_after_a_warm_up() -> None:
    order: list[str] = []
    found = costs.measure_latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=4, warmup=2)
    assert order == ["a", "b"] * 6
    assert {name: len(latency.samples) for name, latency in found.items()} == {"a": 4, "b": 4}


def test_the_median_and_the_spread_are_those_of_the_samples() -> None:
    found = costs.measure_latency({"slow": lambda: time.sleep(0.004), "fast": lambda: None}, repeats=5, warmup=0)
    assert found["slow"].median == sorted(found["slow"].samples)[2] >= 0.004 > found["fast"].median
    assert costs.Latency(1.0, (1.0, 2.0, 3.0)).spread == 2.0 and costs.Latency(1.0, (1.0,)).spread == 0.0


def test_measuring_stops_early_but_not_before_three_rounds() -> None:
    found = costs.measure_latency({"a": lambda: time.sleep(0.002)}, repeats=50, warmup=1, seconds=0.0)
    assert len(found["a"].samples) == 3


@pytest.mark.parametrize(
    ("device", "waited"),
    [("cuda:1", [torch.device("cuda:1")] * 2), ("cpu", []), (None, [None] * 2)],
)
def test_measuring_waits_for_the_gpu_of_the_model_and_not_for_the_current_one(
    device: str | None, waited: list[torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place=None: found.append(place))
    place = None if device is None else torch.device(device)
    costs.measure_latency({"a": lambda: None}, repeats=1, warmup=0, device=place)
    assert found == waited


def test_architectures_are_measured_by_the_clock_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, asked = supernet_of("bert"), []
    monkeypatch.setattr(costs, "synchronise", asked.append)
    costs.architecture_latency(supernet, {"a": supernet.space.smallest()}, repeats=3)
    assert set(asked) == {supernet.base.device}


def test_latency_of_architectures_is_measured_in_evaluation_mode_and_restores_everything() -> None:
    supernet = supernet_of("bert")
    supernet.model.train()
    seen: list[tuple[bool, Architecture]] = []
    supernet.model.register_forward_pre_hook(lambda module, _: seen.append((module.training, supernet.active)))
    high, low = supernet.space.largest(), supernet.space.smallest()
    with supernet.activate(supernet.space.midpoint()):
        found = costs.architecture_latency(supernet, {"low": low, "high": high}, repeats=3)
        assert supernet.active == supernet.space.midpoint()
    assert set(found) == {"low", "high"} and supernet.model.training
    assert set(seen) == {(False, low), (False, high)}


def test_printing_states_macs_at_the_tokens_of_the_limits_and_keeps_every_modules_mode() -> None:
    supernet = supernet_of("bert")  # of 64 positions
    supernet.model.train()
    supernet.model.bert.embeddings.eval()
    modes = [module.training for module in supernet.model.modules()]
    lines = {line.split()[0]: line for line in str(supernet).splitlines()[1:]}
    low, high = (costs.count(costs.macs(supernet, a, seq_len=128))
                 for a in (supernet.space.smallest(), supernet.space.largest()))  # fmt: skip
    assert f"{low} to {high} at 1 x 128 tokens" in lines["MACs"] and "at 1 x 62 tokens" in lines["latency"]
    assert [module.training for module in supernet.model.modules()] == modes


def test_mode_is_restored_when_a_measured_call_fails() -> None:
    supernet = supernet_of("bert")
    supernet.model.train()
    with pytest.raises(ValueError, match="input_ids"):
        costs.architecture_latency(supernet, {"x": supernet.space.smallest()}, inputs={"nonsense": torch.ones(1)})
    assert supernet.model.training and supernet.active == supernet.space.largest()


@pytest.mark.parametrize("family", CONFIGS)
def test_default_inputs_fit_the_positions_and_the_vocabulary(family: str) -> None:
    supernet = supernet_of(family)
    ids = costs.default_inputs(supernet, seq_len=1000)["input_ids"]
    assert ids.shape == (1, 62) and ids.min() == 3 and ids.max() == 60
    with torch.no_grad():
        supernet.model(input_ids=ids)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (22_713_216, "22.71 M"), (5 * 10**9, "5.00 G"), (10**15, "1.00e+15"),
     (3**25 * 2**11, "1.73e+15"), (12345 * 10**500, "1.23e+504")],
)  # fmt: skip
def test_counts_are_readable_however_large(number: int, text: str) -> None:
    assert costs.count(number) == text
