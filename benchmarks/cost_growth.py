"""Part ``growth`` of ``run.py``: how cost grows with layers, width, choices, evaluations, workers, as log-log slopes.

A slope of 1 is linear. Sizes double from one measurement to the next; the slope is of the medians, and its interval
that of the repeats drawn again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comparing import Line, line, slope
from exact_front import decoder
from measuring import Bar, Interval, judged
from transformers import BertConfig, BertModel

import hf_elastic as he
from hf_elastic.search import AdditiveTable
from hf_elastic.space import Choice, SearchSpace

PART = "growth"
WORKER_REPEATS = 3
LINEAR, CUBIC, KEPT = Bar("at most", 1.2), Bar("at most", 3.0), Bar("at least", 0.9)
Made = Callable[[], Callable[[], object]]


def lines(options: argparse.Namespace) -> list[Line]:
    """All slopes."""
    count = options.doublings + 1
    plans: list[tuple[str, str, tuple[int, ...], Callable[[int], Made], Bar | None]] = [
        ("make_elastic", "layers", (6, 12, 24, 48), making, LINEAR),
        ("a switch of all choices", "layers", (6, 12, 24, 48), switching, LINEAR),
        ("refit", "layers", (2, 4, 8), lambda n: repairing(layers=n), LINEAR),
        ("refit", "width", (128, 256, 512), lambda n: repairing(hidden=n), CUBIC),
        ("exact front, 20 shapes a layer", "layers", (8, 16, 32), fronts, None),
        ("exact front of 12 choices", "values of a choice", (4, 8, 16, 32), valued, None),
        ("NSGA-II, evaluations of no time", "evaluations", (200, 400, 800, 1600), searching, LINEAR),
    ]
    found = []
    for what, over, sizes, made, bar in plans:
        calls = {size: made(size) for size in sizes[:count]}
        found.append(grown((what, over), calls, repeats=options.repeats, bar=bar))
    return [*found, *working(options)]


def grown(names: tuple[str, str], calls: Mapping[int, Made], *, repeats: int, bar: Bar | None) -> Line:
    """The slope of one thing; each call is prepared first, and the sizes take turns."""
    ready = {size: make() for size, make in calls.items()}
    spent: dict[int, list[float]] = {size: [] for size in ready}
    for call in ready.values():
        call()
    for _ in range(repeats):
        for size, call in ready.items():
            began = time.perf_counter()
            call()
            spent[size].append(time.perf_counter() - began)
    return sloped(names, spent, bar=bar, measure="slope of seconds")


def sloped(
    names: tuple[str, str], values: Mapping[int, Sequence[float]], *, bar: Bar | None, measure: str
) -> Line:
    """A line with a slope in the place of the ratio, and the values themselves in its note."""
    found, low, high = slope(list(values), list(values.values()))
    middle = {size: sorted(own)[len(own) // 2] for size, own in values.items()}
    note = ", ".join(f"{size}: {value:.3g}" for size, value in middle.items())
    return line(
        PART, names[0], f"number of {names[1]}", measure,
        **judged(Interval(found, low, high, min(map(len, values.values()))), bar), note=note,
    )  # fmt: skip


def encoder(*, layers: int, hidden: int = 64) -> BertModel:
    """A random encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32), max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


SPACE: dict[str, Any] = {"intermediate_size": [0.25, 0.5, 1.0], "skip": ["attention", "mlp"]}


def making(layers: int) -> Made:
    """A conversion of a model that is there."""

    def make() -> Callable[[], object]:
        models = [encoder(layers=layers) for _ in range(32)]
        return lambda: he.make_elastic(models.pop(), he.ElasticConfig(**SPACE))

    return make


def switching(layers: int) -> Made:
    """A hundred switches between random architectures."""

    def make() -> Callable[[], object]:
        supernet = he.make_elastic(encoder(layers=layers), he.ElasticConfig(**SPACE))
        rng = random.Random(0)
        points = [supernet.space.sample(rng) for _ in range(100)]

        def switch() -> None:
            for point in points:
                supernet.set_active(point)

        return switch

    return make


def repairing(*, layers: int = 4, hidden: int = 128) -> Made:
    """A repair of half the width of all layers, on as many tokens per neuron in all sizes of one width."""

    def make() -> Callable[[], object]:
        space = he.ElasticConfig(intermediate_size=[0.5, 1.0])
        supernet = he.make_elastic(encoder(layers=layers, hidden=hidden), space)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(512, (64, 64), generator=generator)
        return lambda: he.refit(supernet, supernet.space.smallest(), [{"input_ids": ids}])

    return make


def fronts(layers: int) -> Made:
    """The whole front of a decoder's space."""

    def make() -> Callable[[], object]:
        problem = decoder(layers=layers, seed=0)
        goals = [problem.damage, problem.costs[0]]
        return lambda: he.search_subnets(problem.space, goals, algorithm="exact", progress=False)

    return make


def valued(count: int) -> Made:
    """The whole front of twelve choices with so many values each."""

    def make() -> Callable[[], object]:
        rng = random.Random(0)
        names = [f"layers.{n}.intermediate_size" for n in range(12)]
        space = SearchSpace(Choice(name, tuple(64 * k for k in range(1, count + 1))) for name in names)
        values = space.choices[0].values
        damage = [{(v,): rng.uniform(0.5, 2.0) * (1 - v / values[-1]) ** 2 for v in values} for _ in names]
        cost = [{(v,): float(v) for v in values} for _ in names]
        tables = [AdditiveTable(tuple((n,) for n in names), tuple(rows)) for rows in (damage, cost)]
        goals = [
            he.Objective(name, table.value, cost=name == "macs", additive=table)
            for name, table in zip(("damage", "macs"), tables, strict=True)
        ]
        return lambda: he.search_subnets(space, goals, algorithm="exact", progress=False)

    return make


def searching(evaluations: int) -> Made:
    """A search whose evaluations take no time."""

    def make() -> Callable[[], object]:
        problem = decoder(layers=8, seed=0)
        goals = [he.Objective(o.name, o, cost=o.cost) for o in (problem.damage, problem.costs[0])]
        return lambda: he.search_subnets(
            problem.space, goals, algorithm="nsga2", evaluations=evaluations, seed=0, progress=False
        )

    return make


def working(options: argparse.Namespace) -> list[Line]:
    """Evaluations a second of workers that share a search in PostgreSQL; each evaluation sleeps."""
    import workers

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.workers.postgres_server import running_server, why_not

    what = "workers that share a search in PostgreSQL (each evaluation sleeps)"
    names = (what, "number of workers", "slope of evaluations a second")
    if reason := why_not():
        return [line(PART, *names, note=f"not run: {reason}")]
    rates: dict[int, list[float]] = {}
    with running_server() as server:
        for count in (1, 2, 4):
            rates[count] = [
                workers.shared(
                    server.new_database(), workers=count, evaluations=20 * count, seconds=options.evaluation_seconds
                )["evaluations_a_second"]
                for _ in range(WORKER_REPEATS)
            ]
    return [sloped((names[0], "workers"), rates, bar=KEPT, measure=names[2])]
