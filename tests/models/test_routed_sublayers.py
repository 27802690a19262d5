"""Routed attention and FFNs against the same in NumPy, token by token, head by head and expert by expert."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_models import (
    ALL,
    Array,
    Decided,
    array,
    attended_by_hand,
    layer_norm,
    neurons_by_hand,
    only,
    padded_inputs,
    positions_of,
    projected,
    routed,
    turn,
)
from tiny_models import GROUPED, inputs, space, tiny
from torch import nn

from hf_elastic import ElasticConfig, RoutingConfig, Supernet, add_routing
from hf_elastic.models import elastic_routed_attention
from hf_elastic.models.elastic_routed import LAYOUTS

LAYER = 1
ATTENTION, MLP = ("attention_tokens", "heads"), ("mlp_tokens", "experts")
FAMILIES = ["llama", "qwen3", "mistral", "gpt2", "bert", "roberta"]
WAYS = {"eager": ("eager", False), "sdpa": ("sdpa", False), "learning": ("sdpa", True)}


@contextmanager
def seen_at(module: nn.Module) -> Any:
    """What a module is given and what it returns."""
    found: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found["in"] = args[0] if args else kwargs["hidden_states"]
        found["out"] = output[0] if isinstance(output, tuple) else output

    hook = module.register_forward_hook(note, with_kwargs=True)
    yield found
    hook.remove()


def learning(supernet: Supernet, training: bool) -> None:
    supernet.model.train(training)  # the tiny models have no dropout


def decided(supernet: Supernet, states: Any, row: int, *, real: Any, sublayer: tuple[str, str]) -> Decided:
    part = supernet.router_parts[LAYER]
    shape = part.layer.current
    units = shape.num_key_value_heads
    if sublayer == MLP:
        units = shape.intermediate_size * 3 // part.layer.full.intermediate_size
    by_rank = supernet.model.training or not supernet.causal
    return Decided(part.routers, array(states[row]), real[row].bool().numpy(), by_rank, sublayer, units)


def attention_by_hand(supernet: Supernet, decided: Decided, positions: Any) -> Array:
    part = supernet.router_parts[LAYER]
    shape, layer, x = part.layer.current, part.layer.layer, decided.states
    attention = layer.get_submodule(LAYOUTS[part.layer.family.model_type].attention)
    core = dict(attention.named_children()).get("self", attention)
    sizes = {"heads": shape.num_attention_heads, "groups": shape.num_key_value_heads, "size": part.layer.head_dim}
    mixed = attended_by_hand(core, x, decided, positions=positions.tolist(), sizes=sizes)
    gain = (decided.gain * decided.enter)[:, None]
    if attention is not core:  # post-norm
        update = projected(attention.output.dense, mixed, rows=x.shape[1], columns=mixed.shape[1])
        return layer_norm(attention.output.LayerNorm, x + gain * update)
    children = dict(attention.named_children())
    out = children.get("o_proj", children.get("c_proj"))
    return gain * projected(out, mixed, rows=x.shape[1], columns=mixed.shape[1])


def ffn_by_hand(supernet: Supernet, decided: Decided) -> Array:
    part = supernet.router_parts[LAYER]
    layer, x, width = part.layer.layer, decided.states, part.layer.current.intermediate_size
    row, config = part.layer.family, supernet.base.config
    act = getattr(config, "hidden_act", None) or config.activation_function
    neurons = [layer.get_submodule(path) for path in row.ffn_in]
    hidden = neurons_by_hand(neurons, x, decided, act=act, width=width)
    result = projected(layer.get_submodule(row.ffn_out), hidden, rows=x.shape[1], columns=width)
    gain = (decided.gain * decided.enter)[:, None]
    if not row.pre_norm:
        return layer_norm(layer.output.LayerNorm, x + gain * result)
    return gain * result


def compare(supernet: Supernet, *, sublayer: tuple[str, str]) -> int:
    """Compares a sublayer with the one by hand in every row; returns how many tokens did not enter."""
    padded = padded_inputs(supernet.model)
    whole = {"input_ids": padded["input_ids"], "attention_mask": torch.ones_like(padded["attention_mask"])}
    whole["position_ids"] = positions_of(supernet.model, whole["attention_mask"])  # attention is given no mask then
    return sum(_compare(supernet, feed, sublayer=sublayer) for feed in (padded, whole))


def _compare(supernet: Supernet, feed: dict[str, Any], *, sublayer: tuple[str, str]) -> int:
    part = supernet.router_parts[LAYER]
    layout = LAYOUTS[part.layer.family.model_type]
    enters = part.layer.layer.get_submodule(layout.attention if sublayer == ATTENTION else layout.mlp_in)
    leaves = enters if sublayer == ATTENTION else part.layer.layer.get_submodule(layout.mlp_out)
    with torch.no_grad(), seen_at(enters) as given, seen_at(leaves) as given_back:
        supernet.model(**feed)
    kept_out = 0
    for row, mask in enumerate(feed["attention_mask"]):
        mine = decided(supernet, given["in"], row, real=feed["attention_mask"], sublayer=sublayer)
        if sublayer == ATTENTION:
            wanted = attention_by_hand(supernet, mine, feed["position_ids"][row])
        else:
            wanted = ffn_by_hand(supernet, mine)
        real = mask.bool().numpy()
        got = array(given_back["out"][row])
        np.testing.assert_allclose(got[real], wanted[real], atol=1e-5 * np.abs(wanted).max(), rtol=0)
        kept_out += int((real & ~mine.enter).sum())
    return kept_out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kinds", [("attention_tokens",), ("heads",), ATTENTION], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_the_tokens_that_enter_and_of_the_heads_that_serve(
    family: str, kinds: tuple[str, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic_routed_attention, "BLOCK", 3)  # queries of a head in several blocks
    implementation, training = WAYS[way]
    supernet = routed(family, **{kind: ALL[kind] for kind in kinds})
    supernet.model.set_attn_implementation(implementation)
    learning(supernet, training)
    assert (compare(supernet, sublayer=ATTENTION) > 0) == ("attention_tokens" in kinds)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kinds", [("mlp_tokens",), ("experts",), MLP], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_ffn_is_that_of_the_tokens_that_enter_and_of_the_experts_that_serve(
    family: str, kinds: tuple[str, ...], training: bool
) -> None:
    supernet = routed(family, **{key: value for kind in kinds for key, value in only(kind).items()})
    learning(supernet, training)
    assert (compare(supernet, sublayer=MLP) > 0) == ("mlp_tokens" in kinds)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])
def test_a_narrower_layer_has_fewer_heads_and_experts_to_choose_from(family: str, training: bool) -> None:
    heads = "num_key_value_heads" if family in GROUPED else "num_attention_heads"
    config = space(family, skip=None, num_hidden_layers=None, **{heads: [1] if family in GROUPED else [3]})
    config = ElasticConfig(**{**config.to_dict(), "intermediate_size": [32]})
    supernet = routed(family, config=config, low=False, **{**ALL, "heads": [1] if family in GROUPED else [2]})
    supernet.set_active(supernet.space.smallest())
    learning(supernet, training)
    shape = supernet.layer_parts[LAYER].current
    assert (shape.intermediate_size, shape.num_attention_heads) == (32, 2 if family in GROUPED else 3)
    assert compare(supernet, sublayer=ATTENTION) and compare(supernet, sublayer=MLP)


@pytest.mark.parametrize("kind", [*ATTENTION, *MLP])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert"])
def test_learning_and_skipping_give_the_same(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = routed(family, **only(kind))
    feed, mask = padded_inputs(supernet.model), padded_inputs(supernet.model)["attention_mask"].bool()
    for part in supernet.router_parts:
        part.routers.__dict__["causal"] = False  # both choose by rank
    monkeypatch.setattr("hf_elastic.models.elastic_routed_attention._learning_mask", _causal_learning_mask(supernet))
    with torch.no_grad():
        skipping = supernet.model(**feed)[0][mask]
        learned = supernet.model.train()(**feed)[0][mask]
    torch.testing.assert_close(skipping, learned, rtol=0, atol=1e-5 * float(skipping.abs().max()))


def _causal_learning_mask(supernet: Supernet) -> Any:
    from hf_elastic.models import elastic_routed_attention as module

    original = module._learning_mask
    return lambda call, keep, *, causal: original(call, keep, causal=supernet.causal)


sizes = st.integers(1, 6).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, 5)))


@settings(max_examples=12, deadline=None, database=None)
@given(sizes, st.sampled_from(["llama", "qwen2", "gpt2", "bert"]), st.booleans())
def test_all_experts_together_are_the_ffn_however_many_there_are(
    drawn: tuple[int, int], family: str, biased: bool
) -> None:
    experts, each = drawn
    width = experts * each
    changes = {"n_inner": width} if family == "gpt2" else {"intermediate_size": width}
    changes |= {"mlp_bias": biased} if family == "llama" else {}
    model = tiny(family, **changes)
    feed = inputs(model)
    with torch.no_grad():
        dense = model(**feed)[0]
        supernet = add_routing(model, RoutingConfig(experts=[1] if experts > 1 else [0.5], mlp_tokens=[0.5],
                                                    num_experts=max(2, experts) if experts > 1 else None)
                               if experts > 1 else RoutingConfig(mlp_tokens=[0.5]))  # fmt: skip
        for part in supernet.router_parts:
            part.routers.__dict__["routes"] = lambda *kinds, known=frozenset(part.routers): bool(known & set(kinds))
            if supernet.causal:
                part.routers["mlp_tokens"].thresholds.fill_(-torch.inf)
        for training in (False, True):
            got = supernet.model.train(training)(**feed)[0]
            torch.testing.assert_close(got, dense, rtol=0, atol=1e-6 * max(1.0, float(dense.abs().max())))


def rows_of(module: nn.Module, calls: list[int]) -> Any:
    return module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[:-1].numel()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_only_tokens_that_enter_reach_the_linears(family: str) -> None:
    supernet = routed(family, mlp_tokens=[0.5], attention_tokens=[0.4])
    feed = inputs(supernet.model, batch_size=1, tokens=20)
    decisions: list[Any] = []
    calls: dict[str, list[int]] = {"attention_tokens": [], "mlp_tokens": []}
    for part in supernet.router_parts:
        part.routers.observers.append(decisions.append)
        row, layer = part.layer.family, part.layer.layer
        for kind, paths in (
            ("attention_tokens", part.layer.attention_paths()),
            ("mlp_tokens", (*row.ffn_in, row.ffn_out)),
        ):
            for path in dict.fromkeys(paths):
                rows_of(layer.get_submodule(path), calls[kind])
    with torch.no_grad():
        supernet.model(**feed)
    for kind, share in (("attention_tokens", 8), ("mlp_tokens", 10)):
        entered = [int(what.decision.keep.sum()) for what in decisions if what.kind == kind]
        assert len(entered) == 3 and 0 < sum(entered) < 60
        assert sum(calls[kind]) == sum(entered) * (len(calls[kind]) // 3)
        if family == "bert":
            assert set(calls[kind]) == {share}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_of_different_lengths_are_filled_up_only_to_the_longest(family: str) -> None:
    supernet = routed(family, attention_tokens=[0.5])
    counts: list[tuple[int, int]] = []
    for part in supernet.router_parts:
        part.routers.observers.append(
            lambda what: counts.append((what.rows, 3 * int(what.decision.keep.sum(-1).max())))
        )
    with torch.no_grad():
        supernet.model(**padded_inputs(supernet.model))
    assert counts and all(rows == longest < 27 for rows, longest in counts)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_row_of_padding_changes_no_other_row(family: str, implementation: str) -> None:
    supernet = routed(family)
    supernet.model.set_attn_implementation(implementation)
    feed = padded_inputs(supernet.model)
    for training in (False, True):
        with torch.no_grad():
            wanted = supernet.model.train(training)(**feed)[0]
            none = torch.where(torch.tensor([[1], [0], [1]]) == 1, feed["attention_mask"], 0)
            got = supernet.model(**{**feed, "attention_mask": none})[0]
        mask = none.bool()
        torch.testing.assert_close(got[mask], wanted[mask], rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [(0, 4, 32), (2, 0, 32)])
def test_an_ffn_of_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    supernet = routed("llama")
    assert supernet.router_parts[0].layer.layer.get_submodule("mlp")(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_row_of_one_token_enters_or_does_not(family: str) -> None:
    supernet = routed(family)
    feed = inputs(supernet.model, batch_size=2, tokens=1)
    with torch.no_grad():
        assert bool(torch.isfinite(supernet.model(**feed)[0]).all())
        for part in supernet.router_parts if supernet.causal else ():
            for kind in ("mlp_tokens", "attention_tokens"):
                part.routers[kind].thresholds.fill_(torch.inf)
        got = supernet.model(**feed)[0]
    if supernet.causal:  # nothing enters any sublayer, so only the embedding reaches the head
        base = supernet.base.base_model
        norm = base.norm if family == "llama" else base.ln_f
        embedded = supernet.base.get_input_embeddings()(feed["input_ids"])
        embedded = embedded if family == "llama" else embedded + base.wpe.weight[0]
        torch.testing.assert_close(got, supernet.base.lm_head(norm(embedded)), rtol=0, atol=1e-5)


def test_turning_everything_up_again_gives_the_parent_bit_by_bit() -> None:
    plain = tiny("llama")
    supernet = routed("llama")
    feed = padded_inputs(plain)
    with torch.no_grad():
        assert not torch.equal(supernet.model(**feed)[0], plain(**feed)[0])
        turn(supernet, -1)
        assert torch.equal(supernet.model(**feed)[0], plain(**feed)[0])
