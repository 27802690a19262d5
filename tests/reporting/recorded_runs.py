"""Run folders as commands leave them, written by hand in a moment: what reports are read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_elastic.search import Objective, SearchResult, search_subnets
from hf_elastic.space import Architecture, Choice, SearchSpace

Make = Callable[[str], Path]
"""What the fixture ``made`` is: kind of a run -> its output."""
LAYERS, WIDTH, HEADS = 3, 64, 4
HOSTILE = "<img src=x onerror=alert(1)></script>"
VERSIONS = {"torch": "2.0", "transformers": "5.0"}


def space() -> SearchSpace:
    choices = []
    for layer in range(LAYERS):
        choices.append(Choice(f"layers.{layer}.intermediate_size", (16, 32, 64)))
        choices.append(Choice(f"layers.{layer}.num_attention_heads", (1, 2, 4)))
    return SearchSpace(choices)


def macs(architecture: Architecture) -> int:
    return sum(int(value) for value in architecture.values())


def structure(architecture: Architecture) -> float:
    """A quality that grows with the later layers more than with the first."""
    return sum((1 + int(name[7])) * int(value) ** 0.5 for name, value in architecture.items()) / 100


def searched(*, seed: int = 0, algorithm: str = "nsga2") -> SearchResult:
    goals = [
        Objective("structure", structure, direction="maximize"),
        Objective("macs", macs, cost=True),
    ]
    return search_subnets(
        space(), goals, algorithm=algorithm, evaluations=24, within={"macs": 0.75}, seed=seed, progress=False
    )


def write(folder: Path, options: dict[str, Any], stages: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": 1, "options": options, "versions": VERSIONS, "machine": {"python": "3.11"}, "stages": stages,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record))
    return folder


def row(name: str, point: Architecture, latency: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "parameters": 100 * macs(point), "total_parameters": 100 * macs(point) + 5000,
        "macs": macs(point), "loadability": "stock", "architecture": dict(point), "structure": structure(point),
        "latency": latency, **more,
    }  # fmt: skip


def compress_run(folder: Path, *, name: str = "uniform width, untrained", model: str = "some/model") -> Path:
    """A finished run of recipe best."""
    result, whole = searched(), space().largest()
    found = result.best("structure").architecture
    even = Architecture({choice: value for choice, value in space().midpoint().items()})
    options = {"model": model, "within": {"macs": 0.75}, "recipe": "best", "seed": 7, "lora": None}
    stages = {
        "space": {"layer_order": [0, 1, 2], "finished": True, "seconds": 1.5},
        "tables": {
            "architectures": 3, "rank_correlation": 0.5, "ratio": 1.25, "predicted": [1.0, 2.0, 3.0],
            "measured": [1.5, 1.0, 4.0], "finished": True, "seconds": 2.0,
        },
        "search": {"architecture": dict(found), "evaluations": 24, "finished": True, "seconds": 3.0},
        "compare": {
            "rows": [row("parent", whole, 0.02), row("found", found, 0.01), row(name, even, 0.0125)],
            "setting": "prefill of 1x8", "finished": True, "seconds": 0.5,
        },
        "export": {
            "loadability": "stock", "note": "ordinary checkpoint", "snippet": 'from_pretrained("out")',
            "files": ["tokenizer.json"], "finished": True, "seconds": 0.25,
        },
        "check": {
            "budgets": [{"budget": "macs", "met": True, "sentence": "macs of 0.75: it is 0.7"}],
            "predicted_speedup": 2.2, "measured_speedup": 2.0, "finished": True, "seconds": 0.25,
        },
    }  # fmt: skip
    write(folder, options, stages)
    result.save(folder / "search.json")
    (folder / "sorted").mkdir(exist_ok=True)
    config = {"num_hidden_layers": LAYERS, "intermediate_size": WIDTH, "num_attention_heads": HEADS}
    (folder / "sorted" / "config.json").write_text(json.dumps(config))
    return folder
