"""Latency in a runtime: what is timed is the exported architecture, in turns with the largest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import mixed_folder, stock_folder
from tiny_models import point, supernet_of, tiny

import hf_elastic.runtimes.runtime_latencies as latency
from hf_elastic import (
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    UnsupportedModelError,
    add_lora,
    cost_objectives,
    make_elastic,
)
from hf_elastic.runtimes import export_openvino, measure_folders, runtime_latency

pytest.importorskip("openvino")


def counted(sizes: dict[int, float]) -> Callable[[Callable[[], object]], float]:
    """A clock that says how long a call took by which call it is, in the order in which calls are first seen."""
    seen: list[int] = []

    def timer(call: Callable[[], object]) -> float:
        call()
        if id(call) not in seen:
            seen.append(id(call))
        return sizes[seen.index(id(call))]

    return timer


def test_folders_and_models_are_timed_each_in_its_runtime(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, "bert", "base")
    export_openvino(folder, tmp_path / "graph")
    models: dict[str, Any] = {"graph": tmp_path / "graph", "torch": folder, "memory": tiny("bert", "base")}
    clock = counted({0: 1.0, 1: 2.0, 2: 4.0})
    found = measure_folders(models, batch_size=2, length=8, rounds=3, timer=clock)
    assert {name: time.median for name, time in found.items()} == {"graph": 1.0, "torch": 2.0, "memory": 4.0}
    assert all(len(time.samples) == 3 for time in found.values())


class Fake:
    """Stands for an opened graph; its sizes are those of the model it was made of."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters

    def __call__(self, **arrays: Any) -> int:
        assert arrays["input_ids"].shape == (2, 16)
        return self.parameters


def parameter_clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exports nothing, and lets a call take as many seconds as its model has parameters; lists what was exported."""
    exported: list[int] = []

    def export_graph(writer: Any, model: Any, output: Path, *, options: Any) -> None:
        exported.append(model.num_parameters())

    monkeypatch.setattr(latency, "export_graph", export_graph)
    monkeypatch.setattr(latency, "open_runtime", lambda folder, threads=None: Fake(exported[-1]))
    monkeypatch.setattr(latency, "_call", lambda model, setting: lambda: model(**setting.feed()))
    return exported


def test_an_objective_is_the_ratio_to_the_largest_times_its_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = parameter_clock(monkeypatch)
    drift = iter([1.0] * 100)
    supernet = supernet_of("bert", "base")

    def timer(call: Callable[[], object]) -> float:
        return float(call()) * next(drift)  # type: ignore[arg-type]

    objective = runtime_latency(supernet, runtime="openvino", batch_size=2, seq_len=16, timer=timer)
    largest, small = supernet.space.largest(), point(supernet, ffn0=16, ffn1=16, skip2="attention")
    assert objective(largest) == exported[0]
    assert objective(small) == exported[-1] < exported[0]
    drift = iter([3.0] * 100)  # the machine is slower now
    assert objective(small) == pytest.approx(exported[-1])
    assert objective.name == "openvino_latency" and objective.unit == "s" and "parameters" in objective.related()  # type: ignore[misc]


def test_threads_are_torchs_too_while_it_is_timed() -> None:
    before, seen = torch.get_num_threads(), []

    def timer(call: Callable[[], object]) -> float:
        call()
        seen.append(torch.get_num_threads())
        return 1.0

    measure_folders({"memory": tiny("bert", "base")}, length=8, rounds=3, threads=before + 1, timer=timer)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_values_of_other_processes_count_only_where_the_reference_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = parameter_clock(monkeypatch)
    speed = 1.0
    supernet = supernet_of("bert", "base")
    small = point(supernet, ffn0=16, ffn1=16, skip2="attention")

    def timer(call: Callable[[], object]) -> float:
        return float(call()) * speed  # type: ignore[arg-type]

    def made(**changes: Any) -> Any:
        return runtime_latency(supernet, runtime="openvino", batch_size=2, seq_len=16, timer=timer, **changes)

    here, given = made(), made(reference=2.0)
    assert given(small) == pytest.approx(2.0 * exported[-1] / exported[0])
    assert given.portable and not here.portable  # which a storage, or another process, would mix
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(cost_objectives, "_FIRST_USES", {})
        speed = 3.0  # a slower moment, in which another process begins
        assert made(reference=2.0).fingerprint == given.fingerprint
        assert made(reference=2.0)(small) == pytest.approx(given(small))
    assert made(reference=3.0).fingerprint != given.fingerprint
    for wrong in (0.0, float("nan"), float("inf"), "1 s"):
        with pytest.raises(DataError, match="above 0"):
            made(reference=wrong)


def test_lengths_without_positions_are_refused(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, "bert", "base")
    export_openvino(folder, tmp_path / "graph")
    for model in (folder, tmp_path / "graph", tiny("bert", "base")):
        with pytest.raises(DataError, match="65 tokens are more than the bert has positions for, 64"):
            measure_folders({"a": model}, length=65, rounds=1)


def test_settings_that_differ_have_other_fingerprints() -> None:
    supernet = supernet_of("bert", "base")
    made = [
        runtime_latency(supernet, runtime="openvino", **changes) for changes in ({}, {"batch_size": 4}, {"threads": 7})
    ]
    assert len({objective.fingerprint for objective in made}) == 3
    assert made[0].fingerprint == runtime_latency(supernet_of("bert", "base"), runtime="openvino").fingerprint


def test_what_cannot_be_measured_is_refused() -> None:
    supernet = supernet_of("bert", "base")
    with pytest.raises(DataError, match="runtime='tensorrt' is not one of onnx, openvino"):
        runtime_latency(supernet, runtime="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at most 64"):
        runtime_latency(supernet, runtime="openvino", seq_len=65)
    config = ElasticLoraConfig(r=4, ranks=[2, 4], target_modules=["query"])
    with pytest.raises(UnsupportedModelError, match="runtime_latency is for models without adapters"):
        runtime_latency(add_lora(tiny("bert", "base"), config), runtime="openvino")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_model_of_a_quarter_of_the_width_is_faster_in_the_runtime(runtime: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    wide = tiny(
        "bert", "base", hidden_size=128, intermediate_size=4096, num_hidden_layers=2, max_position_embeddings=512
    )
    supernet = make_elastic(wide, ElasticConfig(intermediate_size=[256, 4096]))
    objective = runtime_latency(supernet, runtime=runtime, batch_size=4, seq_len=256, rounds=5)
    largest, smallest = supernet.space.largest(), supernet.space.smallest()
    assert objective(smallest) < 0.7 * objective(largest)
    assert len(list(tmp_path.iterdir())) == 0


def test_a_stock_folder_needs_no_runtime(tmp_path: Path) -> None:
    found = measure_folders({"a": stock_folder(tmp_path, "gpt2")}, length=8, rounds=1)
    assert found["a"].median > 0
