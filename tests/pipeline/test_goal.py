"""Budgets of a run resolved with latency tables made up by a formula, and held against exported models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import supernet_of

from hf_elastic import InfeasibleError, SearchError, Supernet, costs
from hf_elastic.checkpoint import extract
from hf_elastic.pipeline.goal import Goal, Outcome, goal_of, outcome_of
from hf_elastic.space import Architecture
from hf_elastic.tables.budgets import LATENCY, MEMORY, Budgets, Verdict, Workload
from hf_elastic.tables.latencies import LatencyTable, measure_latency_table


def timer(call: Any) -> float:
    """A nanosecond per parameter that is no embedding."""
    names = ("embed", "wte", "wpe", "lm_head")
    return 1e-9 * sum(p.numel() for n, p in call.model.named_parameters() if not any(word in n for word in names))


def table_of(supernet: Supernet, **options: Any) -> LatencyTable:
    return measure_latency_table(supernet, rounds=3, timer=timer, **options)


def resolved(supernet: Supernet, budgets: Budgets, table: LatencyTable | None = None) -> Goal:
    return goal_of(supernet, budgets, dtype=torch.float32, table=table)


def test_without_a_time_in_them_budgets_need_no_table() -> None:
    supernet = supernet_of("bert")
    goal = resolved(supernet, Budgets(within={"parameters": 0.8}, memory=60_000))
    assert goal.table is None and set(goal.within) == {"parameters", MEMORY}
    assert (goal.setting.batch_size, goal.setting.phase, goal.setting.dtype) == (8, "prefill", "float32")
    assert goal.cost.name == "parameters"


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_what_keeps_a_speedup_is_faster_by_its_table_and_everything_else_is_not_feasible(family: str) -> None:
    supernet = supernet_of(family)
    table = table_of(supernet, batch_size=2, length=8)
    goal = resolved(supernet, Budgets(speedup=1.25, timed=Workload(2, 8)), table)
    assert goal.setting == table.setting and goal.cost.name == LATENCY
    points = list(supernet.space.architectures())[::53]
    kept = {point for point in points if goal.feasible.allows(point)}
    assert kept and kept == {point for point in points if table.speedup(supernet, point) >= 1.25 * 1.03}


def test_a_table_that_a_run_has_kept_is_read(tmp_path: Path) -> None:
    supernet, path = supernet_of("bert"), tmp_path / "latency.json"
    table_of(supernet).save(path)
    before = path.read_bytes()
    goal = goal_of(supernet, Budgets(speedup=1.1), dtype=torch.float32, path=path)
    assert goal.table == LatencyTable.load(path) and path.read_bytes() == before


def test_a_table_that_was_measured_beside_other_work_is_said_to_be_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("bert")
    for factors, noisy in (((1.0, 1.05, 1.1), False), ((1.0, 1.4, 2.0), True)):
        table = table_of(supernet)
        rounds = [tuple(factor * seconds for seconds in table.rounds[0]) for factor in factors]
        table = replace(table, rounds=tuple(rounds))
        assert table.noise == pytest.approx(factors[1] - 1)
        monkeypatch.setattr("hf_elastic.pipeline.goal.measure_latency_table", lambda *a, made=table, **k: made)
        said: list[str] = []
        goal_of(supernet, Budgets(speedup=1.1), dtype=torch.float32, say=said.append)
        assert said[0] == "measuring latencies: prefill of 1x64 in float32"
        assert [("differs by 40%" in text) for text in said[1:]] == [True] * noisy


def test_what_cannot_be_reached_is_refused() -> None:
    supernet = supernet_of("bert")
    with pytest.raises(InfeasibleError, match="cannot be reached"):
        resolved(supernet, Budgets(speedup=1e6), table_of(supernet))
    with pytest.raises(InfeasibleError, match="smallest reachable"):
        resolved(supernet, Budgets(within={"parameters": 1e-9}))
    with pytest.raises(SearchError, match="'speed'"):
        resolved(supernet, Budgets(within={"speed": 0.5}))


def _small(supernet: Supernet) -> Architecture:
    """The fewest MACs of some points that keep a layer: without any, one is left that caches two numbers per token."""
    points = list(supernet.space.architectures())[::7]
    kept = [point for point in points if not all(shape.skipped for shape in supernet.layer_shapes(point))]
    return min(kept, key=lambda point: costs.macs(supernet, point, seq_len=8))


def test_an_export_is_held_against_every_budget() -> None:
    supernet = supernet_of("llama", "lm")
    table, point = table_of(supernet, batch_size=2, length=8), _small(supernet)
    budgets = Budgets(speedup=1.05, latency=30.0, memory=10**9, within={"macs": 0.9}, timed=Workload(2, 8))
    goal = resolved(supernet, budgets, table)
    form = None if supernet.loadability(point) == "stock" else "remote-code"
    exported = extract(supernet, point, loadability=form).eval()
    parent = extract(supernet, supernet.space.largest()).eval()
    outcome = outcome_of(goal, supernet, point, parent=parent, exported=exported)
    assert [verdict.budget for verdict in outcome.verdicts] == ["speedup", "latency", "memory", "macs"]
    assert all(verdict.met for verdict in outcome.verdicts[1:])
    assert outcome.verdicts[0].met == (outcome.measured is not None and outcome.measured >= 1.05)
    assert outcome.predicted == pytest.approx(table.speedup(supernet, point))
    weights = 4 * sum(p.numel() for p in exported.parameters())
    assert f"{(weights + costs.kv_cache_bytes(supernet, point, seq_len=64)) / 1e6:.4g}" in str(outcome.verdicts[2])
    assert "memory 1 GB at 1x64: " in str(outcome.verdicts[2])
    assert outcome.lines()[-1].startswith("speed-up predicted ")
    assert outcome.to_dict()["measured_speedup"] == outcome.measured


def test_without_a_table_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("bert")
    goal = resolved(supernet, Budgets(within={"macs": 0.99}))
    monkeypatch.setattr("hf_elastic.pipeline.goal.measure_models", lambda *a, **k: pytest.fail("timed"))
    point = _small(supernet)
    form = None if supernet.loadability(point) == "stock" else "remote-code"
    model = extract(supernet, point, loadability=form)
    outcome = outcome_of(goal, supernet, point, parent=model, exported=model)
    assert (outcome.predicted, outcome.measured) == (None, None) and len(outcome.lines()) == 1


def test_a_budget_that_is_missed_is_said_so() -> None:
    missed = Verdict("speedup", False, "speed-up 1.7 for prefill of 1x128: measured 1.6, missed by 5.9%")
    lines = Outcome((missed,), predicted=1.75, measured=1.6).lines()
    assert lines[0].startswith("MISSED: speed-up 1.7")
    assert lines[1] == "speed-up predicted 1.75x, measured 1.60x (+9.4%)"
