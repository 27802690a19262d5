"""Sampling rules: what they draw, and that it depends on nothing but (seed, step, micro-step, draw)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.errors import ArchitectureError, TrainingError
from hf_elastic.space import Choice, Condition, SearchSpace
from hf_elastic.training.sampling import (
    FixedSubnet,
    ProgressiveShrinking,
    RandomSubnet,
    SamplingRule,
    SandwichRule,
)


def space() -> SearchSpace:
    layers = []
    for n in range(4):
        skip = Choice(f"layers.{n}.skip", ("none", "mlp", "layer"), kind="categorical", parameters=(9, 4, 0))
        there = (Condition(skip.name, ("none",)),)
        layers += [skip, Choice(f"layers.{n}.intermediate_size", (8, 16, 24, 32), when=there)]
    return SearchSpace(layers)


RULES: list[SamplingRule] = [
    RandomSubnet(seed=3),
    SandwichRule(seed=3, random=3, midpoint=True),
    ProgressiveShrinking(seed=3, steps_per_stage=2, subnets=2),
    FixedSubnet(space().midpoint()),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 10**6), micro_step=st.integers(0, 64))
def test_a_rule_draws_the_same_points_of_the_space_whatever_was_drawn_before(
    rule: SamplingRule, step: int, micro_step: int
) -> None:
    where = space()
    random.seed(step)
    first = rule.draw(where, step, micro_step)
    rule.draw(where, step + 1, micro_step)
    random.seed(micro_step)
    assert rule.draw(space(), step, micro_step) == first
    assert len(first) == rule.subnets
    assert all(architecture in where for architecture in first)


def test_what_a_seed_draws_is_pinned_for_other_processes_and_later_versions() -> None:
    where = SearchSpace([Choice(f"layers.{n}.intermediate_size", (0, 1, 2, 3)) for n in range(12)])
    (drawn,) = RandomSubnet(seed=0).draw(where, 0, 0)
    assert list(drawn.values()) == PINNED


PINNED = [0, 0, 3, 3, 3, 1, 2, 3, 2, 0, 0, 2]


def test_seed_step_micro_step_and_draw_each_change_what_is_drawn() -> None:
    where = SearchSpace([Choice(f"layers.{n}.intermediate_size", tuple(range(1, 9))) for n in range(12)])
    rule = SandwichRule(seed=0, random=2)
    drawn = [*rule.draw(where, 0, 0)[1:3], rule.draw(where, 1, 0)[1], rule.draw(where, 0, 1)[1]]
    drawn.append(SandwichRule(seed=1).draw(where, 0, 0)[1])
    drawn.append(rule.draw(where, 1, 1)[1])
    assert len(set(drawn)) == len(drawn)


def test_each_value_is_drawn_about_equally_often() -> None:
    where = SearchSpace([Choice("intermediate_size", (1, 2, 3))])
    counts = dict.fromkeys((1, 2, 3), 0)
    for step in range(1500):
        (drawn,) = RandomSubnet(seed=0).draw(where, step, 0)
        counts[int(drawn["intermediate_size"])] += 1
    assert all(420 < count < 580 for count in counts.values())  # 500 ± 4 standard deviations


def test_the_sandwich_has_the_largest_first_and_the_smallest_last() -> None:
    where = space()
    drawn = SandwichRule(seed=0, random=3).draw(where, 4, 0)
    assert (drawn[0], drawn[-1], len(drawn)) == (where.largest(), where.smallest(), 5)
    assert SandwichRule(seed=0, random=0, midpoint=True).draw(where, 0, 0)[1] == where.midpoint()


def test_progressive_shrinking_opens_one_value_per_stage_from_the_largest_down() -> None:
    where = SearchSpace([Choice("intermediate_size", (8, 16, 24)), Choice("num_attention_heads", (1, 2))])
    rule = ProgressiveShrinking(seed=0, steps_per_stage=10)
    seen = [rule.opened(where, step) for step in (0, 9, 10, 20, 10**6)]
    assert seen[0] == seen[1] == {"intermediate_size": (24,), "num_attention_heads": (2,)}
    assert seen[2] == {"intermediate_size": (24, 16), "num_attention_heads": (2, 1)}
    assert seen[3] == seen[4] == {"intermediate_size": (24, 16, 8), "num_attention_heads": (2, 1)}
    assert rule.stages(where) == 3
    assert rule.draw(where, 5, 0) == (where.largest(),)
    for step in range(10, 20):
        (drawn,) = rule.draw(where, step, 0)
        assert drawn["intermediate_size"] != 8


def test_progressive_shrinking_opens_one_kind_after_another() -> None:
    where = SearchSpace([Choice("intermediate_size", (8, 16, 24)), Choice("num_attention_heads", (1, 2))])
    rule = ProgressiveShrinking(seed=0, steps_per_stage=1, order=("num_attention_heads", "intermediate_size"))
    sizes = [{name: len(values) for name, values in rule.opened(where, step).items()} for step in range(5)]
    assert [(s["num_attention_heads"], s["intermediate_size"]) for s in sizes] == [
        (1, 1), (2, 1), (2, 2), (2, 3), (2, 3),
    ]  # fmt: skip
    assert rule.stages(where) == 4


def test_progressive_shrinking_orders_categories_by_their_parameters_and_stays_canonical() -> None:
    where = space()
    rule = ProgressiveShrinking(seed=0, steps_per_stage=1)
    for step in range(30):
        (drawn,) = rule.draw(where, step, 0)
        where.validate(drawn)
        assert step >= 2 or all(drawn[f"layers.{n}.skip"] != "layer" for n in range(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SandwichRule(seed=0, random=-1),
        lambda: ProgressiveShrinking(seed=0, steps_per_stage=0),
        lambda: ProgressiveShrinking(seed=0, steps_per_stage=1, subnets=0),
        lambda: ProgressiveShrinking(seed=0, steps_per_stage=1, order=("skip", "skip")),
        lambda: ProgressiveShrinking(seed=0, steps_per_stage=1, order=("skip",)).draw(space(), 0, 0),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrainingError):
        make()


def test_a_fixed_subnet_of_another_space_is_refused() -> None:
    other = SearchSpace([Choice("intermediate_size", (1, 2))])
    with pytest.raises(ArchitectureError):
        FixedSubnet(space().largest()).draw(other, 0, 0)
