"""Unions of boxes against a boolean mask of the parameter."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.training.regions import ActiveUnion, Boxes

SHAPE = (5, 7)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[slice, ...]:
    bounds = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in SHAPE]
    return tuple(slice(low, high) for low, high in bounds)


regions = st.lists(boxes(), max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.lists(regions, min_size=1, max_size=5))
def test_the_union_covers_exactly_what_any_region_covers_and_each_entry_once(drawn: list[Boxes]) -> None:
    parameter, expected = torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.bool)
    union = ActiveUnion()
    for region in drawn:
        union.add({"w": region}, {"w": parameter})
        for box in region:
            expected[box] = True
    touched = torch.zeros(SHAPE)
    found = union.boxes("w", parameter)
    for box in [(...,)] if found is None else found:
        touched[box] += 1
    assert torch.equal(touched, expected.float())
    assert (found is None) == bool(expected.all())


def test_a_parameter_that_one_architecture_does_not_name_is_wholly_active() -> None:
    parameters = {"norm": torch.zeros(3), "weight": torch.zeros(4, 4)}
    skipped = {"norm": (), "weight": ()}
    there = {"weight": ((slice(0, 2), slice(0, 4)),)}
    for order in ([skipped, there], [there, skipped], [skipped, there, skipped]):
        union = ActiveUnion()
        for named in order:
            union.add(named, parameters)
        assert union.boxes("norm", parameters["norm"]) is None
        assert union.boxes("weight", parameters["weight"]) == ((slice(0, 2), slice(0, 4)),)
    union = ActiveUnion()
    union.add(skipped, parameters)
    assert union.boxes("norm", parameters["norm"]) == ()


def test_a_box_may_leave_out_trailing_dimensions_and_bounds() -> None:
    parameter = torch.zeros(4, 6)
    union = ActiveUnion()
    union.add({"w": ((slice(None, 3),),)}, {"w": parameter})
    assert union.boxes("w", parameter) == ((slice(0, 3), slice(0, 6)),)


def test_a_cleared_union_is_empty_and_starts_anew() -> None:
    parameter, union = torch.zeros(4), ActiveUnion()
    assert not union
    union.add({"w": ((slice(0, 3),),)}, {"w": parameter})
    assert union
    union.clear()
    assert not union
    union.add({"w": ((slice(0, 1),),)}, {"w": parameter})
    assert union.boxes("w", parameter) == ((slice(0, 1),),)
