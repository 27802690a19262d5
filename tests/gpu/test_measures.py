"""Proxies, objectives, searches and measured tables of models on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_run import candidates, causal_candidates
from on_device import close, feed, numbers_close, placed, stays, token_batches
from routed_models import routed
from tiny_models import supernet_of, tiny
from torch import Tensor

import hf_elastic as he
from hf_elastic import BlockLatencyTable, Budgets, LatencyTable, Supernet, costs, objectives, search_subnets
from hf_elastic.proxies import ON_DATA, PROXIES, score
from hf_elastic.search import Objective

NEEDS_POSITIONS = "jacobian_cosine"  # which LLaMA has not as a table
# The 20th root of a cosine near zero, and the logarithm of a small gradient, magnify rounding.
ROUGH = {"jacobian_cosine": 0.02, "log_synflow": 0.01, "eznas": 0.01, "grasp": 0.01}
SECONDS: dict[str, Any] = {"rounds": 3, "seconds": 0.5}


def double(batches: list[dict[str, Tensor]], device: str) -> list[dict[str, Tensor]]:
    return [feed(batch, device) for batch in batches]


# -- proxies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_scores_as_on_the_cpu(name: str, family: str, device: str) -> None:
    if (name, family) == (NEEDS_POSITIONS, "llama"):
        pytest.skip("LLaMA has no table of positions")
    there, here = tiny(family), placed(tiny(family), device)
    batches = token_batches(there, rows=4, labels=True) if name in ON_DATA else []
    wanted, got = score(there, name, batches), score(here, name, double(batches, device))
    stays(here, device)
    assert got == pytest.approx(wanted, rel=ROUGH.get(name, 1e-3)), name


@pytest.mark.parametrize("target", ["signs", "sum"])
def test_proxies_of_outputs_score_as_on_the_cpu(target: Any, device: str) -> None:
    there, here = tiny("gpt2"), placed(tiny("gpt2"), device)
    batches = token_batches(there, rows=4)
    for name in ("snip", "grasp", "fisher"):
        wanted = score(there, name, batches, target=target)
        assert score(here, name, double(batches, device), target=target) == pytest.approx(wanted, rel=1e-3), name


# -- objectives and searches ------------------------------------------------------------------------------------------


def labelled(made: Supernet, *, head: str) -> list[dict[str, Tensor]]:
    batches = token_batches(made.model, labels=head == "lm")
    if head == "sequence":
        for batch in batches:
            batch["labels"] = torch.arange(len(batch["input_ids"])) % 3
    return batches


OBJECTIVES: dict[str, tuple[str, str, Callable[[Supernet, Any], Objective]]] = {
    "loss": ("llama", "lm", objectives.loss),
    "perplexity": ("gpt2", "lm", objectives.perplexity),
    "accuracy": ("bert", "sequence", objectives.accuracy),
    "cosine": ("bert", "base", objectives.embedding_cosine),
    "structure": ("bert", "base", objectives.similarity_structure),
    "snip": ("llama", "lm", lambda made, batches: objectives.proxy(made, "snip", batches=batches)),
    "zerolm": ("llama", "lm", lambda made, batches: objectives.proxy(made, "zerolm")),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_what_it_is_on_the_cpu(name: str, device: str) -> None:
    family, head, make = OBJECTIVES[name]
    there, here = supernet_of(family, head), placed(supernet_of(family, head), device)
    batches = labelled(there, head=head)
    one, other = make(here, double(batches, device)), make(there, batches)
    points = [there.space.largest(), there.space.midpoint()]
    if name != "snip":
        points.append(there.space.smallest())
    numbers_close([one(point) for point in points], [other(point) for point in points], tolerance=1e-3, what=name)
    stays(here.model, device)
    assert here.active == here.space.largest()


def test_a_search_on_the_device_finds_what_it_finds_on_the_cpu(device: str, tmp_path: Path) -> None:
    found = []
    for where in ("cpu", device):
        made = placed(supernet_of("llama"), where)
        batches = double(labelled(made, head="lm"), where)
        result = search_subnets(
            made.space, [objectives.loss(made, batches), objectives.parameters(made)], evaluations=8,
            within={"parameters": 0.9}, seed=0, storage=f"sqlite:///{tmp_path / where.replace(':', '-')}.db",
        )  # fmt: skip
        found.append({one.architecture: one.values["loss"] for one in result.evaluations})
    there, here = found
    assert here.keys() == there.keys()
    numbers_close([here[point] for point in there], list(there.values()), tolerance=1e-3, what="losses")


# -- tables -----------------------------------------------------------------------------------------------------------


def names_the_device(told: str, device: str) -> None:
    """Asserts that a table says on which processor it was measured."""
    kind = torch.device(device).type
    assert told.startswith(f"{kind} "), told
    if kind == "cuda":
        assert torch.cuda.get_device_name(device) in told


def sound(seconds: Any) -> None:
    assert all(math.isfinite(one) and one > 0 for row in seconds for one in row)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_latencies_are_measured_on_the_device(family: str, phase: Any, device: str, tmp_path: Path) -> None:
    made = placed(supernet_of(family), device)
    path = tmp_path / "latency.json"
    table = he.measure_latency_table(made, batch_size=2, length=16, phase=phase, path=path, **SECONDS)
    names_the_device(table.setting.device, device)
    assert table.setting.dtype == "float32" and LatencyTable.load(path).rounds == table.rounds
    sound(table.rounds)
    point = made.space.midpoint()
    assert math.isfinite(table.predict(made, point))  # not of which sign: tiny layers take less than the noise
    predicted = objectives.predicted_latency(made, table)
    assert predicted(point) == pytest.approx(1e9 * table.predict(made, point), rel=1e-3, abs=10)
    check = he.check_latency(made, table, {"midpoint": point, "largest": made.space.largest()}, **SECONDS)
    assert all(row.measured > 0 for row in check.rows)
    stays(made.model, device)


def test_a_model_on_the_cpu_is_timed_on_the_device_in_half_precision(device: str) -> None:
    made = supernet_of("llama")
    table = he.measure_latency_table(made, length=16, device=device, dtype=torch.bfloat16, **SECONDS)
    names_the_device(table.setting.device, device)
    assert table.setting.dtype == "bfloat16"
    sound(table.rounds)
    stays(made.model, "cpu")
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [candidates, causal_candidates], ids=["bert", "gpt2"])
def test_latencies_of_blocks_are_measured_and_checked_on_the_device(
    make: Callable[[], Supernet], device: str, tmp_path: Path
) -> None:
    made = placed(make(), device)
    path = tmp_path / "latency.json"
    table = he.measure_block_latency_table(made, length=8, path=path, **SECONDS)
    names_the_device(table.setting.device, device)
    sound(table.rounds)
    assert BlockLatencyTable.load(path).rounds == table.rounds
    check = he.check_latency(made, table, {"midpoint": made.space.midpoint()}, **SECONDS)
    assert check.rows[0].measured > 0 and math.isfinite(check.rows[0].predicted)
    stays(made.model, device)


def test_budgets_are_held_against_what_is_measured_on_the_device(device: str) -> None:
    made = placed(supernet_of("llama"), device)
    table = he.measure_latency_table(made, **SECONDS)
    budgets = Budgets.parse(latency="1s", memory="1GB")
    known, within = objectives.budget_costs(made, budgets, table), budgets.limits(made, table)
    assert within.keys() <= known.keys()
    assert all(known[name](made.space.smallest()) <= limit for name, limit in within.items())


@pytest.mark.parametrize(("family", "head", "measure"), [
    ("llama", "lm", "kl"), ("bert", "base", "similarity"), ("gpt2", "lm", "hidden"),
])  # fmt: skip
def test_damages_are_those_of_the_cpu(family: str, head: str, measure: str, device: str) -> None:
    found = []
    for where in ("cpu", device):
        made = placed(supernet_of(family, head, num_hidden_layers=None), where)
        batches = double(token_batches(made.model, rows=10), where)
        table = he.measure_quality_table(made, batches, batches[:1], measure=measure)
        points = [made.space.midpoint(), made.space.smallest(), made.space.largest()]
        trusted = he.additivity(made, table, points, calibration=batches, validation=batches[:1], measure=measure)
        stays(made.model, where)
        found.append(([row for row in table.damages], trusted.measured))
    (there, measured_there), (here, measured_here) = found
    for number, (one, other) in enumerate(zip(here, there, strict=True)):
        assert one.keys() == other.keys()
        for name, damage in other.items():
            assert one[name] == pytest.approx(damage, rel=2e-2, abs=1e-6), f"layer {number}, {name}"
    numbers_close(measured_here[:2], measured_there[:2], tolerance=5e-2, what="damages of whole architectures")


def test_a_supernet_says_where_it_was_timed(device: str) -> None:
    made = placed(supernet_of("llama"), device)
    assert f"measured on {made.base.device} at 1 x" in str(made)
    timed = costs.architecture_latency(made, {"small": made.space.smallest()}, repeats=3)
    assert timed["small"].median > 0
    latency = objectives.latency(made, repeats=3)
    assert latency(made.space.midpoint()) > 0
    routers = placed(routed("llama"), device)
    assert "architectures" in str(routers)
    close(torch.tensor(costs.parameters(made, made.space.largest())), costs.parameters(
        supernet_of("llama"), made.space.largest()
    ), what="parameters")  # fmt: skip
