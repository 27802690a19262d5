"""Ten thousand activations and two thousand evaluations leave nothing behind; the fast tier does fewer evaluations."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growth import Growth, growth_of
from lora_models import elastic
from optuna.storages._rdb.models import BaseModel
from routed_models import routed
from tiny_models import inputs, supernet_of, tiny

from hf_elastic import Architecture, SearchResult, Supernet, costs, objectives, search_subnets
from hf_elastic.proxies import score

AMOUNTS = pytest.mark.parametrize("activations", [10_000])
EVALUATIONS = pytest.mark.parametrize(
    "evaluations", [200, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
SEARCHES = pytest.mark.parametrize(
    ("where", "evaluations"),
    [
        ("memory", 200),
        ("storage", 40),
        *(pytest.param(w, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]) for w in ("memory", "storage")),
    ],
)
SEARCHES_AGAIN = pytest.mark.parametrize(
    ("where", "evaluations"),
    [
        ("memory", 200),
        pytest.param("storage", 100, marks=pytest.mark.slow),
        *(pytest.param(w, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]) for w in ("memory", "storage")),
    ],
)
SUPERNETS: dict[str, Callable[[], Supernet]] = {
    "bert": lambda: supernet_of("bert"),
    "llama": lambda: supernet_of("llama"),
    "gpt2": lambda: supernet_of("gpt2"),
    "adapters": lambda: elastic(tiny("llama")),
    "routers": lambda: routed("bert", low=False),
}


def held(growth: Growth, *, rounds: int) -> Any:
    """What to print where there is growth."""
    return growth.none or f"{growth} after {rounds} rounds"


@AMOUNTS
@pytest.mark.parametrize("kind", sorted(SUPERNETS))
def test_activations_leave_nothing_behind(kind: str, activations: int) -> None:
    supernet = SUPERNETS[kind]()
    drawn = [supernet.space.sample(random.Random(number)) for number in range(50)]

    def activate(number: int) -> None:
        with supernet.activate(drawn[number % len(drawn)]):
            assert supernet.active == drawn[number % len(drawn)]

    assert held(growth_of(activate, rounds=activations, warm=200), rounds=activations) is True
    assert supernet.active == supernet.space.largest()


@AMOUNTS
def test_new_architectures_left_by_errors_leave_nothing_behind(activations: int) -> None:
    supernet = supernet_of("bert")

    def fail(number: int) -> None:
        with pytest.raises(KeyError), supernet.activate(supernet.space.sample(random.Random(number))):
            raise KeyError(number)

    assert held(growth_of(fail, rounds=activations // 2, warm=200), rounds=activations // 2) is True


@pytest.mark.parametrize("kind", ["llama", "adapters", "routers"])
def test_forwards_of_changing_subnets_leave_nothing_behind(kind: str) -> None:
    supernet = SUPERNETS[kind]()
    feed = inputs(supernet.base, tokens=4)
    drawn = [supernet.space.sample(random.Random(number)) for number in range(20)]

    def run(number: int) -> None:
        with supernet.activate(drawn[number % len(drawn)]), torch.no_grad():
            supernet.model(**feed)

    assert held(growth_of(run, rounds=160, warm=20), rounds=160) is True


def labelled(supernet: Supernet) -> list[dict[str, torch.Tensor]]:
    feed = inputs(supernet.base, tokens=4)
    return [{**feed, "labels": feed["input_ids"]}]


@EVALUATIONS
@pytest.mark.parametrize(
    "name", ["loss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("embedding_cosine", "proxy"))]
)
def test_evaluations_leave_nothing_behind(name: str, evaluations: int) -> None:
    supernet = supernet_of("llama")
    data = labelled(supernet)
    made: dict[str, Callable[[], Any]] = {
        "loss": lambda: objectives.loss(supernet, data),
        "embedding_cosine": lambda: objectives.embedding_cosine(supernet, data),
        "proxy": lambda: objectives.proxy(supernet, "zerolm"),
    }
    objective = made[name]()
    drawn = [supernet.space.sample(random.Random(number)) for number in range(50)]
    found = growth_of(lambda number: objective(drawn[number % 50]), rounds=evaluations, warm=100)
    assert held(found, rounds=evaluations) is True


def forget_statements() -> None:
    """Empties what SQLAlchemy keeps of the last hundred databases: their compiled statements, by mapper."""
    for mapper in BaseModel.registry.mappers:
        mapper._compiled_cache.clear()


@SEARCHES_AGAIN
def test_searches_leave_nothing_behind(where: str, evaluations: int, tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    goals = [objectives.loss(supernet, labelled(supernet)), objectives.parameters(supernet)]
    each = 10

    def search(number: int) -> None:
        storage = f"sqlite:///{tmp_path}/{number}.db" if where == "storage" else None
        result = search_subnets(
            supernet.space, goals, algorithm="random", evaluations=each, seed=number, storage=storage, progress=False
        )
        assert len(result.evaluations) == each

    rounds = evaluations // each
    found = growth_of(search, rounds=rounds, warm=2, settle=forget_statements)
    # All of one search may stay, such as the last result of a library, but no object of each of them.
    assert found.objects < 200 + rounds // 2 and found.blocks < 1000 + 10 * rounds, found
    assert found.resident < 48 * 2**20, found


@SEARCHES
def test_one_long_search_holds_what_it_found(where: str, evaluations: int, tmp_path: Path) -> None:
    supernet = supernet_of("llama", intermediate_size=[8, 16, 24, 32, 40, 48])  # of more than 2,000 architectures
    goals = [objectives.loss(supernet, labelled(supernet)), objectives.parameters(supernet)]
    held: list[SearchResult] = []

    def search(number: int) -> None:
        storage = f"sqlite:///{tmp_path}/{number}.db" if where == "storage" else None
        held.append(
            search_subnets(
                supernet.space, goals, algorithm="random", evaluations=evaluations if number else 10, seed=0,
                storage=storage, progress=False,
            )  # fmt: skip
        )

    found = growth_of(search, rounds=1, warm=1, settle=forget_statements)
    assert len(held[1].evaluations) == evaluations
    # An architecture, its values and its numbers; nothing of a trial, a session or a tensor.
    assert found.objects < 12 * evaluations + 1000 and found.blocks < 60 * evaluations + 4000, found
    assert found.resident < 24 * 2**10 * evaluations + 48 * 2**20, found


def test_scores_leave_nothing_behind() -> None:
    model = tiny("bert")
    data = [{**inputs(model, tokens=4), "labels": inputs(model, tokens=4)["input_ids"]}]
    found = growth_of(lambda number: score(model, ("snip", "synflow", "lpzero")[number % 3], data), rounds=90, warm=15)
    assert held(found, rounds=90) is True


def test_costs_of_many_architectures_leave_nothing_behind() -> None:
    supernet = supernet_of("bert")

    def count(number: int) -> float:
        architecture: Architecture = supernet.space.sample(random.Random(number % 60))
        return costs.macs(supernet, architecture, seq_len=8) + costs.parameters(supernet, architecture)

    assert held(growth_of(count, rounds=1000, warm=120), rounds=1000) is True


LEAKS: dict[str, Callable[[list[Any], int], object]] = {
    "an object": lambda kept, number: kept.append([number]),
    "a number": lambda kept, number: kept.append(number * 1.5),
    "a string": lambda kept, number: kept.append(f"{number} " * 20),
    "a tensor": lambda kept, number: kept.append(torch.ones(2**14) * number),
    "a closure": lambda kept, number: kept.append(lambda: number),
}


@pytest.mark.parametrize("what", sorted(LEAKS))
def test_the_check_sees_what_is_held_on_to(what: str) -> None:
    kept: list[Any] = []
    rounds = 3000
    assert not growth_of(lambda number: LEAKS[what](kept, number), rounds=rounds, warm=100).none


def test_the_check_is_silent_where_nothing_is_held() -> None:
    assert growth_of(lambda number: [torch.ones(100) * number, f"{number}"], rounds=3000, warm=100).none
