"""Routed models over time: caches, chunks, causality, padding; and as objects: copies, precision, checkpointing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from routed_models import ALL, only, padded_inputs, positions_of, routed, turn
from tiny_models import inputs, tiny
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from hf_elastic import ElasticLoraConfig, RoutingConfig, Supernet, add_routing
from hf_elastic.models.elastic_routed import LAYOUTS
from hf_elastic.models.elastic_routers import Decision, LayerRouters, Router

DECODERS = ["llama", "qwen3", "gpt2", "mistral"]
KINDS = ["attention_tokens", "heads", "mlp_tokens", "experts"]
every_kind = pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids="+".join)


def of(kinds: list[str]) -> dict[str, Any]:
    return {name: value for kind in kinds for name, value in only(kind).items()}


def whole(supernet: Supernet, feed: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = supernet.base(**feed, use_cache=False).logits
    return result


def in_pieces(supernet: Supernet, feed: dict[str, Tensor], ends: list[int], *, cache: Any, begin: int = 0) -> Tensor:
    """Logits of calls that each go on where the last one ended, on the cache that it returned."""
    pieces = []
    for end in ends:
        now = slice(begin, end)
        with torch.no_grad():
            output = supernet.base(
                input_ids=feed["input_ids"][:, now], attention_mask=feed["attention_mask"][:, :end],
                position_ids=feed["position_ids"][:, now], past_key_values=cache, use_cache=True,
            )  # fmt: skip
        pieces.append(output.logits)
        cache, begin = output.past_key_values, end
    return torch.cat(pieces, dim=1)


def assert_same(got: Tensor, wanted: Tensor, mask: Tensor, *, tolerance: float = 1e-5) -> None:
    kept = mask.bool()
    torch.testing.assert_close(got[kept], wanted[kept], rtol=0, atol=tolerance * float(wanted.abs().max()))


def caches(model: PreTrainedModel) -> dict[str, Any]:
    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(config=model.config, max_cache_len=16)}


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("ends", [[*range(1, 10)], [6, 7, 8, 9], [2, 7, 9]], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_decoding_on_a_cache_gives_what_one_forward_gives(
    family: str, ends: list[int], cache: str, implementation: str
) -> None:
    supernet = routed(family)
    supernet.model.set_attn_implementation(implementation)
    feed = padded_inputs(supernet.model)
    got = in_pieces(supernet, feed, ends, cache=caches(supernet.base)[cache])
    assert_same(got, whole(supernet, feed), feed["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_step_in_which_no_token_enters_keeps_its_place(
    family: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = routed(family, attention_tokens=[0.5], mlp_tokens=[0.5])
    feed, calibrated = padded_inputs(supernet.model), Router.threshold
    held, pieces, seen = caches(supernet.base)[cache], [], 0

    def threshold(self: Router, value: int) -> Tensor:
        """Nothing enters at the sixth token, all do after it."""
        by_token = torch.full((9,), -torch.inf)
        by_token[:5], by_token[5] = calibrated(self, value), torch.inf
        return by_token[seen:end]

    monkeypatch.setattr(Router, "threshold", threshold)
    for end in (5, 6, 7, 9):
        pieces.append(in_pieces(supernet, feed, [end], cache=held, begin=seen))
        seen = end
        assert held.get_seq_length() == end
    seen = 0
    assert_same(torch.cat(pieces, dim=1), whole(supernet, feed), feed["attention_mask"])


def by_time(monkeypatch: pytest.MonkeyPatch, turns: list[tuple[int, dict[str, int]]]) -> None:
    """Lets tokens be decided by the capacities that were set when each of them came: ``(first token, capacities)``."""
    decide = LayerRouters.choose_tokens

    def choose(self: LayerRouters, kind: str, states: Tensor) -> Decision:
        keep, weight = [], []
        for place, (begin, capacities) in enumerate(turns):
            end = turns[place + 1][0] if place + 1 < len(turns) else states.shape[1]
            if capacities[kind] == 100:
                found = Decision(torch.ones(states.shape[:2], dtype=torch.bool), torch.ones(states.shape[:2]))
            else:
                self.active[kind] = capacities[kind]
                found = decide(self, kind, states)
            keep.append(found.keep[:, begin:end])
            weight.append(found.weight[:, begin:end])
        return Decision(torch.cat(keep, 1), torch.cat(weight, 1))

    monkeypatch.setattr(LayerRouters, "choose_tokens", choose)
    monkeypatch.setattr(LayerRouters, "routes", lambda self, *kinds: bool({*kinds} & set(self)))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("capacities", [[100, 50], [50, 80, 100]], ids=str)
def test_the_dial_may_be_turned_between_steps(
    family: str, capacities: list[int], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = routed(family, attention_tokens=[0.5, 0.8], mlp_tokens=[0.5, 0.8], share="model")
    feed, pieces = padded_inputs(supernet.model), []
    held, begins = caches(supernet.base)[cache], [0, 4, 6][: len(capacities)]
    for begin, end, capacity in zip(begins, [*begins[1:], 9], capacities, strict=True):
        supernet.set_active({"attention_tokens": capacity, "mlp_tokens": capacity})
        ends = [end] if begin == 0 else [*range(begin + 1, end + 1)]
        pieces.append(in_pieces(supernet, feed, ends, cache=held, begin=begin))
    turns = [(begin, {"attention_tokens": c, "mlp_tokens": c}) for begin, c in zip(begins, capacities, strict=True)]
    by_time(monkeypatch, turns)
    assert_same(torch.cat(pieces, dim=1), whole(supernet, feed), feed["attention_mask"])


@pytest.mark.parametrize("family", DECODERS)
@every_kind
def test_a_later_token_changes_nothing_before_it(family: str, kinds: list[str]) -> None:
    supernet = routed(family, **of(kinds))
    feed = inputs(supernet.model)
    before = whole(supernet, feed)
    for place in (8, 4):
        changed = feed["input_ids"].clone()
        changed[:, place] = (changed[:, place] + 7) % 50 + 3
        after = whole(supernet, {"input_ids": changed})
        assert_same(after[:, :place], before[:, :place], torch.ones(2, place), tolerance=1e-6)
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta"])
@every_kind
def test_what_stands_in_padding_changes_nothing_and_each_row_is_as_it_is_alone(family: str, kinds: list[str]) -> None:
    supernet = routed(family, **of(kinds))
    feed = padded_inputs(supernet.model)
    mask, settings = feed["attention_mask"], {"use_cache": False} if supernet.causal else {}
    with torch.no_grad():
        wanted = supernet.model(**feed, **settings)[0]
        other = torch.where(mask.bool(), feed["input_ids"], 33)
        assert_same(supernet.model(**{**feed, "input_ids": other}, **settings)[0], wanted, mask, tolerance=1e-6)
        for row, kept in enumerate(mask.bool()):
            alone = {name: tensor[row : row + 1, kept] for name, tensor in feed.items()}
            got = supernet.model(**alone, **settings)[0]
            assert_same(got, wanted[row : row + 1, kept], alone["attention_mask"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_beams_are_reordered_with_what_entered(family: str) -> None:
    supernet = routed(family)
    feed = {name: tensor for name, tensor in padded_inputs(supernet.model).items() if name != "position_ids"}
    feed = {name: tensor[:2] for name, tensor in feed.items()}  # as generation wants it: padded on the left
    settings = GenerationConfig(
        max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
    )
    found = supernet.base.generate(**feed, generation_config=settings)
    settings.use_cache = False
    assert torch.equal(found, supernet.base.generate(**feed, generation_config=settings))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_fills_a_cache_of_either_kind(cache: str) -> None:
    supernet = routed("llama")
    feed = inputs(supernet.model)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = supernet.base.generate(**feed, **settings, use_cache=False)
    assert torch.equal(supernet.base.generate(**feed, **settings, cache_implementation=cache), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_all_places_in_a_cache_of_fixed_length_is_read_up_to_now(family: str) -> None:
    supernet = routed(family)
    feed = padded_inputs(supernet.model)
    places = torch.nn.functional.pad(feed["attention_mask"], (0, 16 - feed["attention_mask"].shape[1]))
    cache, pieces = caches(supernet.base)["static"], []
    for now in (slice(0, 6), slice(6, 7), slice(7, 9)):
        with torch.no_grad():
            output = supernet.base(
                input_ids=feed["input_ids"][:, now], attention_mask=places, position_ids=feed["position_ids"][:, now],
                past_key_values=cache,
            )  # fmt: skip
        pieces.append(output.logits)
    assert_same(torch.cat(pieces, dim=1), whole(supernet, feed), feed["attention_mask"])


def test_heads_alone_ask_nothing_of_a_cache() -> None:
    supernet, feed = routed("llama", heads=[1]), inputs(tiny("llama"))
    cache = DynamicCache(config=supernet.base.config)
    cache.layers = [type("RoundedLayer", (type(layer),), {})() for layer in cache.layers]
    with torch.no_grad():
        assert torch.equal(supernet.base(**feed, past_key_values=cache).logits, supernet.base(**feed).logits)


def test_a_cache_that_does_not_keep_keys_is_refused_before_anything_is_written() -> None:
    supernet = routed("llama", attention_tokens=[0.5])
    cache = DynamicCache(config=supernet.base.config)
    cache.layers = [type("RoundedLayer", (type(layer),), {})() for layer in cache.layers]  # as quantised ones are
    with pytest.raises(ValueError, match="a RoundedLayer does not keep them; use a DynamicCache or a StaticCache"):
        supernet.base(**inputs(supernet.model), past_key_values=cache)
    assert not cache.get_seq_length()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_attention_implementation_that_takes_no_mask_of_ours_is_refused(family: str) -> None:
    supernet = routed(family, heads=[1])
    supernet.base.config._attn_implementation = "flex_attention"
    part = supernet.router_parts[0]
    attention = part.layer.layer.get_submodule(LAYOUTS[family].attention)
    with pytest.raises(ValueError, match=r"^routed attention runs with .* this model has 'flex_attention'") as caught:
        attention(torch.zeros(1, 3, 32))
    assert "set_attn_implementation('sdpa')" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_copies_route_alike_and_are_independent(family: str, copied: Any) -> None:
    supernet = routed(family)
    feed = padded_inputs(supernet.model)
    supernet.model.train()(**feed)[0].sum().backward()  # leaves a graph behind
    twin = Supernet(copied(supernet.model.eval()))
    with torch.no_grad():
        wanted = supernet.model(**feed)[0]
        assert torch.equal(twin.model(**feed)[0], wanted)
        turn(twin, -1)
        assert torch.equal(supernet.model(**feed)[0], wanted), "the dial of a copy turns the original"
        assert not torch.equal(twin.model(**feed)[0], wanted)
    ours, theirs = ({id(p) for p in s.model.parameters()} for s in (supernet, twin))
    assert not ours & theirs
    mask = {**feed, "attention_mask": torch.ones_like(feed["attention_mask"])}
    turn(twin, 0)
    with torch.no_grad():
        twin.model(**mask)
        assert torch.equal(supernet.model(**feed)[0], wanted), "the mask of a copy's forward is the original's"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_half_precision_stays_near(family: str, dtype: torch.dtype, implementation: str) -> None:
    supernet = routed(family)
    supernet.model.set_attn_implementation(implementation)
    feed = padded_inputs(supernet.model)
    mask = feed["attention_mask"].bool()
    with torch.no_grad():
        exact = supernet.model(**feed)[0]
        decisions: list[Tensor] = []
        for part in supernet.router_parts:
            part.routers.observers.append(lambda what: decisions.append(what.decision.weight))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = supernet.model(**feed)[0]
        got = supernet.model.to(dtype)(**feed)[0]
        trained = supernet.model.train()(**feed)[0]
    assert got.dtype == trained.dtype == dtype
    assert {weight.dtype for weight in decisions} == {torch.float32}
    for found in (got, mixed, trained):
        assert bool(torch.isfinite(found[mask]).all())
    distance = (got.float() - exact)[mask].norm() / exact[mask].norm()
    assert distance < 0.5, "a token near the border may be decided the other way, not many"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_losses_of_routers_have_the_same_gradient_with_gradient_checkpointing(family: str) -> None:
    def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
        supernet = routed(family)
        model = supernet.model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        feed = padded_inputs(model)
        output = model(**feed)[0].square().mean()
        losses = [loss for found in supernet.router_parts[0].routers.context.losses.values() for loss in found]
        assert len(losses) == 3 * (4 if supernet.causal else 2)
        (output + sum(losses)).backward()
        return {
            name: p.grad.clone() for name, p in model.named_parameters() if "routers" in name and p.grad is not None
        }

    plain, again = gradients(checkpointed=False), gradients(checkpointed=True)
    assert plain.keys() == again.keys() and len(plain) == 3 * 4 * 2
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_routers_are_trained_on_whole_sequences() -> None:
    supernet = routed("llama", attention_tokens=[0.5])
    feed = padded_inputs(supernet.model)
    cache = DynamicCache(config=supernet.base.config)
    in_pieces(supernet, feed, [4], cache=cache)
    supernet.model.train()
    with pytest.raises(ValueError, match="leave past_key_values out of the inputs"):
        in_pieces(supernet, {**feed, "input_ids": feed["input_ids"][:, 4:]}, [5], cache=cache)


def test_an_adapter_on_the_ffn_of_routed_experts_is_refused_in_one_line() -> None:
    model = tiny("llama")
    add_routing(model, RoutingConfig(**ALL))
    wrapped = get_peft_model(model, ElasticLoraConfig(r=4, ranks=[2], target_modules=["up_proj"]))
    supernet = Supernet(wrapped)
    supernet.set_active(supernet.space.smallest())
    for part in supernet.router_parts:
        for kind in ("attention_tokens", "mlp_tokens"):
            part.routers[kind].thresholds.fill_(-torch.inf)
    with pytest.raises(ValueError, match=r"^experts compute rows of a .* put adapters on .* attention, or merge them"):
        wrapped(**inputs(model))


def test_positions_count_what_is_real() -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert positions_of(tiny("llama"), mask).tolist() == [[0, 0, 1]]
    assert positions_of(tiny("roberta"), mask).tolist() == [[2, 2, 3]]
