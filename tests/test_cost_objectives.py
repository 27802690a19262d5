"""A measured latency is a share of that of the largest architecture, on a scale that no two processes confuse."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import supernet_of

from hf_elastic import Architecture, DataError, Supernet, costs, objectives
from hf_elastic.errors import SearchError, StorageError
from hf_elastic.search import search_subnets
from hf_elastic.search.processes import ProcessExecutor


class FakeTimes:
    """Stands in for the timing of one process: the largest takes ``largest`` seconds, whatever else a share of it."""

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def __call__(self, supernet: Supernet, named: dict[str, Architecture], **_: object) -> dict[str, costs.Latency]:
        whole = costs.total_parameters(supernet, supernet.space.largest())
        taken = {name: self.largest * costs.total_parameters(supernet, a) / whole for name, a in named.items()}
        return {name: costs.Latency(seconds, (seconds,)) for name, seconds in taken.items()}


def latency_here(monkeypatch: pytest.MonkeyPatch, *, takes: float, **given: float) -> tuple[float, str]:
    """Value and fingerprint of a subnet's latency in a process where the largest takes so many seconds."""
    monkeypatch.setattr(costs, "architecture_latency", FakeTimes(takes))
    measure = objectives.latency(supernet_of("bert", "base"), **given)
    return measure(supernet_of("bert", "base").space.smallest()), measure.fingerprint


def test_a_latency_with_a_reference_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("bert", "base")
    share = costs.total_parameters(supernet, supernet.space.smallest()) / costs.total_parameters(
        supernet, supernet.space.largest()
    )
    found = [latency_here(monkeypatch, takes=seconds, reference=0.5) for seconds in (0.01, 0.03)]
    code = (
        "from tiny_models import supernet_of; from hf_elastic import objectives\n"
        "print(objectives.latency(supernet_of('bert', 'base'), reference=0.5).fingerprint)"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ | path
    )
    there = told.stdout.strip()
    assert [value for value, _ in found] == pytest.approx([0.5 * share] * 2)
    assert {identity for _, identity in found} == {there}
    assert latency_here(monkeypatch, takes=0.01, reference=0.4)[1] != there


def test_latencies_of_one_process_are_scaled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (latency_here(monkeypatch, takes=seconds) for seconds in (0.01, 0.03))
    assert second[0] == pytest.approx(first[0]) and second[1] == first[1]


@pytest.mark.parametrize("reference", [0, -1.0, math.nan, math.inf, "1"])
def test_a_reference_that_is_no_time_is_refused(reference: float) -> None:
    with pytest.raises(DataError, match=r"reference=.* must be the seconds of the largest architecture"):
        objectives.latency(supernet_of("bert", "base"), reference=reference)


def test_a_storage_mixes_no_latencies_of_another_scale(tmp_path: Path) -> None:
    supernet = supernet_of("bert", "base")
    options = {"evaluations": 4, "storage": f"sqlite:///{tmp_path / 's.db'}", "progress": False}
    for reference in (0.5, 0.5):
        search_subnets(supernet.space, [objectives.latency(supernet, repeats=3, reference=reference)], **options)
    with pytest.raises(StorageError, match=r"objectives \(minimize latency \[.{8}\]\) instead of"):
        search_subnets(supernet.space, [objectives.latency(supernet, repeats=3, reference=0.4)], **options)
    unscaled = [objectives.latency(supernet, repeats=3)]
    executor = ProcessExecutor(list, workers=1)
    for given in (options, {**options, "storage": None, "executor": executor}):
        with pytest.raises(SearchError, match=r"'latency' has a scale of its own .* give it one by reference="):
            search_subnets(supernet.space, unscaled, **given)
    assert search_subnets(supernet.space, unscaled, **{**options, "storage": None}).front
