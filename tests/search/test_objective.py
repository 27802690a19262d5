"""Objectives and their tables."""

import pytest

from hf_elastic.errors import SearchError
from hf_elastic.search import AdditiveTable, Objective
from hf_elastic.search.objective import known_objectives
from hf_elastic.space import Choice, SearchSpace


def test_an_additive_table_sums_its_groups():
    space = SearchSpace([Choice(f"layers.{i}.{n}", (1, 2)) for i in range(2) for n in ("a", "b")])
    groups = tuple((f"layers.{i}.a", f"layers.{i}.b") for i in range(2))
    tables = tuple({(a, b): 10.0**i * a * b for a in (1, 2) for b in (1, 2)} for i in range(2))
    table = AdditiveTable(groups, tables, constant=5.0)
    for architecture in space.architectures():
        a, b, c, d = architecture.values()
        assert table.value(architecture) == 5 + a * b + 10 * c * d


def test_related_costs_are_known_but_never_replace_an_objective():
    macs = Objective("macs", lambda a: 1.0, cost=True)
    loss = Objective("loss", lambda a: 2.0, related=lambda: {"macs": Objective("macs", lambda a: 3.0), "x": macs})
    assert known_objectives([loss, macs]) == {"loss": loss, "macs": macs, "x": macs}


def test_values_become_floats():
    value = Objective("loss", lambda a: 3)(SearchSpace([Choice("a", (1,))]).largest())
    assert (value, type(value)) == (3.0, float)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Objective("", lambda a: 1.0), "non-empty name"),
        (lambda: Objective("loss", lambda a: 1.0, direction="down"), "'minimize', 'maximize'"),
    ],
)
def test_malformed_objectives_are_named(make, words):
    with pytest.raises(SearchError, match=words):
        make()
