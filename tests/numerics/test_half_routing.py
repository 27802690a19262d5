"""Routers on models in half precision: fitted, calibrated and counted as on float32 copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from half_models import CASES, HALVES, batches, distance, output, pair, refused, tolerance
from routed_models import ALL, only

from hf_elastic import (
    RoutingConfig,
    Supernet,
    add_routing,
    calibrate_routing,
    fit_routers,
    load_routers,
    routing_statistics,
    save_routers,
    set_capacity,
)
from hf_elastic.least_squares import NormalEquations
from hf_elastic.routing import fitting

EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


def routed(model: Any, **kinds: Any) -> Supernet:
    return add_routing(model, RoutingConfig(**(kinds or ALL)))


def scores(supernet: Supernet, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What all routers say about some states ``(N, D)``."""
    with torch.no_grad():
        return {
            f"{part.layer.index}.{kind}": part.routers[kind](states)
            for part in supernet.router_parts
            for kind in part.routers
        }


@EVERY
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_routers_are_float32_and_leave_the_model_as_it_was(family: str, dtype: torch.dtype) -> None:
    model, _ = pair(family, dtype)
    (feed, *_) = batches(model)
    before = output(model, feed)
    supernet = routed(model)
    assert torch.equal(output(supernet.model, feed), before)
    assert {p.dtype for part in supernet.router_parts for p in part.routers.parameters()} == {torch.float32}
    assert model.dtype == dtype


@CASES
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_routers_fitted_in_half_precision_explain_what_those_of_float32_do(
    family: str, dtype: torch.dtype, loud: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[NormalEquations] = []

    def noted(*sizes: int, **where: Any) -> NormalEquations:
        sums.append(NormalEquations(*sizes, **where))
        return sums[-1]

    made = [routed(model) for model in pair(family, dtype, loud=loud)]
    data = batches(made[0].model, count=8, rows=6, tokens=16)
    if (family, dtype, loud) == ("gpt2", torch.float16, True):
        with refused("NaN or infinity", "float32"):  # the slope of transformers' gelu_new is inf * 0 there
            fit_routers(made[0], data)
        return
    half = fit_routers(made[0], data)
    monkeypatch.setattr(fitting, "NormalEquations", noted)
    exact = fit_routers(made[1], data)
    assert half.distance == pytest.approx(exact.distance, rel=tolerance(dtype))
    for mine, other in zip(half.routers, exact.routers, strict=True):
        assert mine.explained == pytest.approx(other.explained, abs=2 * tolerance(dtype))
    places = [(part, kind) for part in made[0].router_parts for kind in ("attention_tokens", "mlp_tokens")]
    regressions = [one for one in sums if one.cross.shape[1] == 1]  # of tokens: ranks, which nothing scales
    assert len(places) == len(regressions)
    for part, kind in places:
        scores = part.routers[kind].scores
        weight, bias = scores.weight.detach().t(), scores.bias.detach()
        errors = [one.error(weight, bias) for one in regressions]
        # A twelfth is the variance of ranks. The router of half precision is as good on the regression of float32.
        best = min(zip(errors, regressions, strict=True), key=lambda pair: pair[0])
        solved = best[1].solve(torch.zeros_like(weight), torch.zeros_like(bias), ridge=1e-4)
        assert best[0] <= solved.error_after + 2 * tolerance(dtype) / 12


@CASES
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_calibrated_shares_are_kept_in_the_precision_they_were_found_in(
    family: str, dtype: torch.dtype, loud: bool
) -> None:
    supernet = routed(pair(family, dtype, loud=loud)[0], **only("mlp_tokens"))
    random_scores_(supernet)
    data = batches(supernet.model, count=8, rows=6, tokens=16)
    report = calibrate_routing(supernet, data)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert report.tokens == tokens
    set_capacity(supernet, mlp_tokens=0.6)
    counted = routing_statistics(supernet, data)
    for each in counted.routers:
        measured = next(s.measured for s in report.shares if (s.layer, s.kind) == (each.layer, each.kind))
        assert each.share == pytest.approx(measured, abs=1e-9)
        assert each.share == pytest.approx(0.6, abs=0.1)  # words of one state enter together


def random_scores_(supernet: Supernet) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in supernet.router_parts:
        for router in part.routers.values():
            weight: Any = router.scores.weight  # type: ignore[union-attr]
            weight.data = torch.randn(weight.shape, generator=generator)


@CASES
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_statistics_and_outputs_are_those_of_float32(family: str, dtype: torch.dtype, loud: bool) -> None:
    found, shares = [], []
    for model in pair(family, dtype, loud=loud):
        supernet = routed(model, **only("heads"))
        data = batches(model)
        random_scores_(supernet)
        lowest = supernet.space.smallest()
        statistics = routing_statistics(supernet, data, lowest)
        shares.append(torch.tensor([unit for each in statistics.routers for unit in each.units]))
        assert statistics.tokens == 3 * 42
        with supernet.activate(lowest):
            found.append(output(supernet.model, data[0])[data[0]["attention_mask"].bool()])
    assert (shares[0] - shares[1]).abs().max() <= 0.05  # a token of two nearly equal scores may change its head
    assert distance(*found) <= 0.2


@EVERY
def test_routers_are_saved_and_loaded_with_every_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    supernet = routed(pair("bert", dtype)[0])
    fit_routers(supernet, batches(supernet.model, count=6))
    save_routers(supernet, tmp_path / "routers")
    again = load_routers(pair("bert", dtype)[0], tmp_path / "routers")
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = scores(supernet, states), scores(again, states)
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
