"""What cuts, measures or trains layers and knows nothing of routers refuses them; what goes with them works."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import only, padded_inputs, routed
from tiny_models import inputs, space, tiny

from hf_elastic import (
    Budgets,
    ElasticConfig,
    InfeasibleError,
    LatencyTable,
    QualityTable,
    RoutingConfig,
    Supernet,
    UnsupportedModelError,
    Workload,
    add_routing,
    additivity,
    calibrate_routing,
    costs,
    extract,
    fit_routers,
    make_elastic,
    measure_latency_table,
    measure_quality_table,
    objectives,
    quantize_,
    recover,
    refit,
    refitted,
    routing_statistics,
    score,
    search_subnets,
    set_capacity,
    set_layer_order,
    sort_by_importance_,
    sparsify_,
    sparsity_of,
)
from hf_elastic.families import family_of
from hf_elastic.routers import require_unrouted


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return routed("llama", low=False, config=ElasticConfig(intermediate_size=[16, 32]))


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    """Of the same model before it was routed."""
    plain = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[16, 32]))
    return measure_latency_table(plain, length=8, rounds=3, sizes=2, seconds=0.1)


def batches(supernet: Supernet) -> list[dict[str, torch.Tensor]]:
    return [inputs(supernet.model, batch_size=4, tokens=16)]


QUALITY = QualityTable("hidden", "", ({"layer": 0.0},) * 3)
REFUSED: dict[str, Callable[[Supernet, Path], Any]] = {
    "sort_by_importance_": lambda s, _: sort_by_importance_(s),
    "set_layer_order": lambda s, _: set_layer_order(s, [0, 1, 2]),
    "a latency table": lambda s, _: measure_latency_table(s),
    "running single layers": lambda s, _: measure_quality_table(s, batches(s), batches(s), measure="hidden"),
    "running single layers (refit": lambda s, _: refit(s, s.space.smallest(), batches(s)),
    "running single layers (refit, ": lambda s, _: refitted(s, s.space.smallest(), batches(s)).__enter__(),
    "running single layers (refit, quality": lambda s, _: additivity(
        s, QUALITY, [s.space.smallest()] * 3, calibration=batches(s), validation=batches(s), measure="hidden"
    ),
    "a quality table": lambda s, _: objectives.damage(s, QUALITY),
    "a proxy": lambda s, _: objectives.proxy(s, "zerolm"),
    "a proxy is": lambda s, _: objectives.proxy(s, "params"),
    "a proxy is for": lambda s, _: score(s.model, "synflow"),
    "sparsify_": lambda s, _: sparsify_(s.model, method="magnitude"),
    "quantize_": lambda s, _: quantize_(s.model, method="rtn", group_size=16),
    "recover()": lambda s, folder: recover(s.model, tiny("llama"), [{"input_ids": [3, 4]}], output=folder, steps=1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_knows_nothing_of_routers_refuses_them_and_changes_nothing(
    supernet: Supernet, what: str, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        REFUSED[what](supernet, tmp_path)
    message = str(caught.value)
    assert message.startswith(what) and message.endswith("is for models without routers; do it before add_routing")
    assert "\n" not in message
    after = supernet.model.state_dict()
    assert all(torch.equal(before[name], after[name]) or name.endswith("thresholds") for name in before)


def test_a_latency_table_is_refused_wherever_it_is_read(supernet: Supernet, table: LatencyTable) -> None:
    for ask in (
        lambda: table.predict(supernet, supernet.space.smallest()),
        lambda: objectives.predicted_latency(supernet, table),
        lambda: Budgets(speedup=1.5, timed=Workload(1, 8)).limits(supernet, table),
    ):
        with pytest.raises(UnsupportedModelError, match="^a latency table is for models without routers"):
            ask()


def test_plain_models_pass() -> None:
    require_unrouted(tiny("llama"), "anything")


def test_memory_is_a_budget_of_routed_models_too(supernet: Supernet) -> None:
    cost = objectives.memory(supernet, seq_len=8)
    high, low = (int(cost(point)) for point in (supernet.space.largest(), supernet.space.smallest()))
    assert low < high
    budgets = Budgets(memory=(low + high) // 2, held=Workload(1, 8))
    known = objectives.budget_costs(supernet, budgets)
    goal = replace(objectives.macs(supernet), direction="maximize", related=lambda: known)
    limits = budgets.limits(supernet)
    found = search_subnets(supernet.space, [goal], algorithm="exact", within=limits, progress=False).front[0]
    assert low < cost(found.architecture) <= (low + high) // 2
    with pytest.raises(InfeasibleError, match="of memory at 1x8"):
        Budgets(memory=low - 1, held=Workload(1, 8)).limits(supernet)


def test_routers_are_none_of_the_layers_whose_zeros_are_counted() -> None:
    plain = sparsity_of(tiny("llama"))
    assert sparsity_of(routed("llama", low=False).model) == plain


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_measured_objectives_run_the_routed_model(family: str) -> None:
    supernet = routed(family, low=False, **only("mlp_tokens"))
    feed = padded_inputs(supernet.model)
    held = [{**feed, "labels": feed["input_ids"]}]
    loss = objectives.loss(supernet, held)
    high, low = supernet.space.largest(), supernet.space.smallest()
    values = []
    for point in (high, low):
        with torch.no_grad(), supernet.activate(point):
            values.append(float(supernet.model(**held[0]).loss))
    assert [loss(high), loss(low)] == pytest.approx(values, rel=1e-5)
    assert values[0] != values[1]
    assert math.isfinite(objectives.latency(supernet, inputs=feed, repeats=3)(low))


def test_a_search_that_measures_turns_the_dial() -> None:
    supernet = routed("llama", low=False, **only("mlp_tokens"))
    feed = padded_inputs(supernet.model)
    goals = [objectives.loss(supernet, [{**feed, "labels": feed["input_ids"]}]), objectives.macs(supernet)]
    result = search_subnets(supernet.space, goals, algorithm="exhaustive", progress=False)
    cheapest = min(result.front, key=lambda found: found.values["macs"])
    assert cheapest.values["macs"] == costs.macs(supernet, supernet.space.smallest(), seq_len=128)
    assert supernet.active == supernet.space.largest()


def test_routing_is_added_after_sorting_and_pruning_and_in_narrow_spaces() -> None:
    model = tiny("llama")
    sparsify_(model, method="magnitude")
    supernet = make_elastic(model, space("llama", intermediate_size=[16, 32]))
    sort_by_importance_(supernet)
    both = add_routing(model, RoutingConfig(experts=[1], num_experts=3, mlp_tokens=[0.5]))
    for part in both.router_parts:
        part.routers["mlp_tokens"].thresholds.fill_(-1.0)
    rng, feed = random.Random(0), inputs(model)
    for _ in range(5):
        point = both.space.sample(rng)
        with both.activate(point):
            assert both.measured(**feed) == both.expected(point)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_with_routers_is_not_made_elastic(family: str, tmp_path: Path) -> None:
    supernet = routed(family, mlp_tokens=[0.5])
    static = extract(supernet, supernet.active)
    row = replace(family_of(tiny(family)), model_type=static.config.model_type)
    for model, given in ((supernet.model, None), (static, None), (static, row)):
        with pytest.raises(UnsupportedModelError, match="make_elastic comes before add_routing"):
            make_elastic(model, ElasticConfig(intermediate_size=[16, 32]), family=given)


@pytest.mark.parametrize("call", [
    lambda model: set_capacity(model, mlp_tokens=0.5), lambda model: fit_routers(model, []),
    lambda model: calibrate_routing(model, []), lambda model: routing_statistics(model, []),
])  # fmt: skip
def test_a_model_in_the_place_of_its_handle_is_refused(call: Callable[[Any], Any]) -> None:
    model = routed("bert", mlp_tokens=[0.5]).model
    with pytest.raises(UnsupportedModelError, match=r"takes the handle .* got a Bert\w+; .*model.set_capacity"):
        call(model)
