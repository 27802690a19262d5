"""What routers decide, compared with decisions that are made token by token in plain Python."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_models import blended
from torch import Tensor, nn

from hf_elastic.models.elastic_routers import LayerRouters, Router, RoutingContext

Mask = list[list[int]]
quick = settings(max_examples=80, deadline=None, database=None)


def forward_of_a_base_model(input_ids: Any = None, attention_mask: Any = None) -> None:
    """Stands for the forward whose arguments say what is padding."""


def routers_of(*, causal: bool, mask: Any = None, hidden: int | None = None, **kinds: dict[str, Any]) -> LayerRouters:
    """Routers that score by the state itself: tokens by its first number, units by its first numbers."""
    context = RoutingContext(forward_of_a_base_model)
    context.begin(nn.Module(), (), {"attention_mask": None if mask is None else torch.tensor(mask)})
    widest = max([spec["of"] for kind, spec in kinds.items() if kind in ("heads", "experts")], default=1)
    made = LayerRouters(widest, spec={"hidden": hidden, **kinds}, context=context, causal=causal)
    for router in made.values():
        with torch.no_grad():
            router.scores.weight.copy_(torch.eye(*router.scores.weight.shape))
    return made


def tokens(active: int) -> dict[str, Any]:
    return {"of": 100, "values": sorted({active, 100}), "active": active}


def kept_tokens(scores: list[float], real: list[int], percent: int) -> list[bool]:
    """The tokens of one row that enter: a share of those that are real, rounded half up, the best first."""
    places = [place for place in range(len(scores)) if real[place]]
    count = max(1, math.floor(Fraction(len(places) * percent, 100) + Fraction(1, 2)))
    best = sorted(places, key=lambda place: (-scores[place], place))[:count]
    return [place in best for place in range(len(scores))]


rows = st.integers(1, 4).flatmap(
    lambda count: st.integers(1, 9).flatmap(
        lambda length: st.tuples(
            st.lists(
                st.lists(st.integers(-2, 2), min_size=length, max_size=length), min_size=count, max_size=count
            ),  # few scores, so that many are equal
            st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=count, max_size=count),
        )
    )
)


@quick
@given(rows, st.integers(1, 99), st.booleans())
def test_the_best_tokens_of_each_row_enter_and_padding_never_does(
    drawn: tuple[Mask, Mask], percent: int, padded: bool
) -> None:
    scores, mask = drawn
    routers = routers_of(causal=False, mask=mask if padded else None, mlp_tokens=tokens(percent)).eval()
    states = torch.tensor(scores, dtype=torch.float32).unsqueeze(-1)
    real = mask if padded else [[1] * len(row) for row in scores]
    wanted = [kept_tokens(row, kept, percent) for row, kept in zip(scores, real, strict=True)]
    assert routers.choose_tokens("mlp_tokens", states).keep.tolist() == wanted


@pytest.mark.parametrize("mask", [[[1] * 6], [[0, 0, 1, 1, 1, 1]], [[1, 1, 1, 1, 0, 0]], [[0] * 6]])
@pytest.mark.parametrize("percent", [1, 50, 75, 99])
def test_padding_on_either_side_or_everywhere_leaves_the_share_of_what_is_real(mask: Mask, percent: int) -> None:
    scores = [0.3, 2.0, -1.0, 0.3, 0.9, 0.3]
    routers = routers_of(causal=True, mask=mask, attention_tokens=tokens(percent)).train()
    keep = routers.choose_tokens("attention_tokens", torch.tensor([scores]).unsqueeze(-1)).keep
    assert keep.tolist() == [kept_tokens(scores, mask[0], percent)]


def test_one_token_enters_however_low_the_capacity() -> None:
    routers = routers_of(causal=False, mlp_tokens=tokens(1)).eval()
    assert routers.choose_tokens("mlp_tokens", torch.zeros(3, 1, 1)).keep.tolist() == [[True]] * 3


def test_a_causal_model_lets_tokens_in_one_by_one_above_the_threshold() -> None:
    routers = routers_of(causal=True, mask=[[0, 1, 1, 1]], mlp_tokens=tokens(60)).eval()
    thresholds = routers["mlp_tokens"].thresholds
    thresholds.copy_(torch.tensor([0.5, torch.nan]))
    states = torch.tensor([[9.0, 0.5, 0.6, -3.0]]).unsqueeze(-1)
    assert routers.choose_tokens("mlp_tokens", states).keep.tolist() == [[False, False, True, False]]
    for place in range(1, 4):  # also where a cache holds what came before
        alone = routers.choose_tokens("mlp_tokens", states[:, place : place + 1]).keep
        assert alone.tolist() == [[place == 2]]


def test_a_router_that_was_not_calibrated_says_what_to_call() -> None:
    routers = routers_of(causal=True, mlp_tokens=tokens(60)).eval()
    with pytest.raises(RuntimeError, match=r"^a router of tokens has no threshold for .* 60 %.*calibrate_routing") as e:
        routers.choose_tokens("mlp_tokens", torch.zeros(1, 2, 1))
    assert "\n" not in str(e.value)
    routers.train()
    assert routers.choose_tokens("mlp_tokens", torch.zeros(1, 2, 1)).keep.any(), "training needs no threshold"


@pytest.mark.parametrize("percent", [10, 50, 99])
def test_a_token_weighs_twice_the_sigmoid_of_its_score_or_nearer_to_one_as_more_enter(percent: int) -> None:
    routers = routers_of(causal=False, mlp_tokens=tokens(percent)).eval()
    scores = [0.0, 1.0, -2.5]
    weight = routers.choose_tokens("mlp_tokens", torch.tensor([scores]).unsqueeze(-1)).weight[0].tolist()
    wanted = [blended(2 / (1 + math.exp(-score)), share=percent / 100) for score in scores]
    assert weight == pytest.approx(wanted, rel=1e-6)
    assert weight[0] == 1.0


@quick
@given(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 4))
def test_the_best_units_serve_each_token_with_their_share_of_a_softmax(scores: Mask, count: int) -> None:
    routers = routers_of(causal=True, experts={"of": 4, "values": [count, 4], "active": count}).eval()
    decision = routers.choose_units("experts", torch.tensor(scores, dtype=torch.float32))
    for row, keep, weight in zip(scores, decision.keep.tolist(), decision.weight.tolist(), strict=True):
        best = sorted(range(4), key=lambda unit: (-row[unit], unit))[:count]
        assert keep == [unit in best for unit in range(4)]
        total = sum(math.exp(score) for score in row)
        shares = [4 * math.exp(score) / total for score in row]
        assert weight == pytest.approx([blended(share, share=count / 4) for share in shares], rel=1e-5)


@given(
    st.integers(1, 64).flatmap(lambda whole: st.tuples(st.just(whole), st.integers(1, whole), st.integers(1, whole)))
)
@quick
def test_a_narrower_layer_keeps_the_share_of_units_that_serve(sizes: tuple[int, int, int]) -> None:
    whole, active, there = sizes
    routers = routers_of(causal=True, experts={"of": whole, "values": [active, whole], "active": active})
    routers.available["experts"] = there
    wanted = max(1, math.floor(Fraction(active * there, whole) + Fraction(1, 2)))
    assert routers.units("experts") == wanted
    assert routers.routes("experts") == (wanted < there), "where all units serve, the router is bypassed"


def test_units_that_a_narrower_layer_has_not_take_no_share() -> None:
    routers = routers_of(causal=True, experts={"of": 4, "values": [2, 4], "active": 2}).eval()
    routers.available["experts"] = 2
    decision = routers.choose_units("experts", torch.tensor([[1.0, 0.0, 9.0, 9.0]]))
    assert decision.keep.tolist() == [[True, False]]
    assert decision.weight.sum().item() == pytest.approx(2)


@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float32_as_the_formula_says(hidden: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = Router(5, of=3, values=[1, 3], tokens=False, hidden=hidden)
    assert not router.scores.weight.any() and not router.scores.bias.any()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    router, states = router.to(dtype), torch.randn(2, 4, 5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(states)
    x: Any = states.double().numpy()
    w = {name: value.detach().double().numpy() for name, value in router.named_parameters()}
    if hidden is not None:
        x = x @ w["hidden.weight"].T + w["hidden.bias"]
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.detach().numpy(), x @ w["scores.weight"].T + w["scores.bias"], rtol=1e-5, atol=1e-5)


def test_scores_of_tokens_learn_to_tell_apart_those_that_were_kept() -> None:
    mask = [[0, 1, 1, 1], [1, 1, 1, 1]]
    routers = routers_of(causal=True, mask=mask, mlp_tokens=tokens(50)).train()
    scores = torch.tensor([[5.0, 0.4, -1.0, 2.0], [0.0, 0.1, 3.0, -0.5]])
    routers.choose_tokens("mlp_tokens", scores.unsqueeze(-1))
    kept = {2.0: 1, 0.4: 1, -1.0: 0, 3.0: 1, 0.1: 1, 0.0: 0, -0.5: 0}  # 3 and 4 tokens: 2 of each enter
    border = (0.1 + 0.0) / 2  # as many scores are above as were kept: four
    losses = [math.log1p(math.exp(-(z - border) if k else z - border)) for z, k in kept.items()]
    [loss] = routers.context.losses["tokens"]
    assert loss.item() == pytest.approx(sum(losses) / 7, rel=1e-5)
    loss.backward()
    gradient = routers["mlp_tokens"].scores.bias.grad
    assert gradient is not None and gradient.abs() > 0


def test_encoders_and_evaluation_have_no_loss_of_tokens() -> None:
    encoder, decoder = (routers_of(causal=causal, mlp_tokens=tokens(50)) for causal in (False, True))
    encoder.train().choose_tokens("mlp_tokens", torch.randn(1, 4, 1))
    with torch.no_grad():
        decoder.train().choose_tokens("mlp_tokens", torch.randn(1, 4, 1))
    assert not encoder.context.losses and not decoder.context.losses


def test_the_load_is_balanced_by_the_loss_of_switch_transformers() -> None:
    mask = [[0, 1, 1], [1, 1, 0]]
    routers = routers_of(causal=False, mask=mask, experts={"of": 3, "values": [2, 3], "active": 2}).train()
    states = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    routers.choose_units("experts", states)
    real = [states[0, 1], states[0, 2], states[1, 0], states[1, 1]]
    decided, shares = np.zeros(3), np.zeros(3)
    for row in (state.double().numpy() for state in real):
        decided[np.argsort(-row)[:2]] += 1
        shares += np.exp(row) / np.exp(row).sum() / len(real)
    wanted = 3 * (decided / decided.sum() * shares).sum()
    [loss] = routers.context.losses["balance"]
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_an_even_load_costs_one_and_a_lopsided_one_more() -> None:
    def loss(states: Tensor) -> float:
        routers = routers_of(causal=False, experts={"of": 2, "values": [1, 2], "active": 1}).train()
        routers.choose_units("experts", states)
        return float(routers.context.losses["balance"][0])

    assert loss(torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])) == pytest.approx(1)
    assert loss(torch.tensor([[[4.0, 0.0], [4.0, 0.0]]])) > 1.9


def test_a_batch_of_nothing_but_padding_has_finite_losses() -> None:
    kinds = {"mlp_tokens": tokens(50), "experts": {"of": 2, "values": [1, 2], "active": 1}}
    routers = routers_of(causal=True, mask=[[0, 0], [0, 0]], **kinds).train()
    states = torch.randn(2, 2, 2)
    assert not routers.choose_tokens("mlp_tokens", states).keep.any()
    routers.choose_units("experts", states)
    losses = [loss for found in routers.context.losses.values() for loss in found]
    assert len(losses) == 2 and not any(losses), "nothing was decided, so nothing is learned"
    sum(losses, torch.zeros(())).backward()


def test_the_mask_is_found_by_name_or_by_place_and_its_end_belongs_to_the_tokens_at_hand() -> None:
    context = RoutingContext(forward_of_a_base_model)
    mask = torch.tensor([[0, 1, 1, 0]])
    assert list(inspect.signature(forward_of_a_base_model).parameters)[1] == "attention_mask"
    for args, kwargs in (((None, mask), {}), ((), {"attention_mask": mask})):
        context.begin(nn.Module(), args, kwargs)
        real = context.real(torch.zeros(1, 2, 3), needed=True)
        assert real is not None and real.tolist() == [[True, False]]
    context.begin(nn.Module(), (None,), {})
    assert context.real(torch.zeros(1, 2, 3), needed=True) is None, "one call's mask does not outlive it"


def test_a_mask_that_does_not_say_what_is_padding_is_refused_where_rows_are_counted() -> None:
    context = RoutingContext(forward_of_a_base_model)
    context.begin(nn.Module(), (), {"attention_mask": torch.zeros(1, 1, 4, 4)})
    assert context.real(torch.zeros(1, 4, 3), needed=False) is None
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, tokens\)"):
        context.real(torch.zeros(1, 4, 3), needed=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda routers: pickle.loads(pickle.dumps(routers))])
def test_routers_are_copied_without_the_graph_of_the_last_forward(copied: Any) -> None:
    routers = routers_of(causal=True, mask=[[1, 1, 1]], mlp_tokens=tokens(50)).train()
    routers.choose_tokens("mlp_tokens", torch.randn(1, 3, 1))
    assert routers.context.losses
    twin = copied(routers)
    assert not twin.context.losses and routers.context.losses
    assert twin.active == routers.active and twin.active is not routers.active
