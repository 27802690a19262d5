"""Which points no other one dominates, against comparing each with each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.search.front import nondominated


def compared_with_each_other(columns, keys):
    """Positions that no point of the same key dominates; of equal ones the first."""
    points, places = np.stack(columns, axis=1), np.arange(len(keys))
    below = (points[None] <= points[:, None]).all(axis=2) & (keys[None] == keys[:, None])  # (point, other)
    equal = below & below.T
    beaten = (below & ~equal) | (equal & (places[None] < places[:, None]))
    return [place for place in places if not beaten[place].any()]


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 400), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_it_is_what_comparing_each_with_each_leaves(seed, width, count, kinds):
    rng = np.random.default_rng(seed)
    few = int(rng.integers(2, 60))  # few values: many ties
    columns = [
        rng.integers(-few, few, count) if rng.random() < 0.5 else rng.standard_normal(count) for _ in range(width)
    ]
    keys = rng.integers(0, kinds, count)
    found = nondominated(columns, keys=keys)
    assert sorted(found) == compared_with_each_other(columns, keys)
    rows = [(keys[place], *(column[place] for column in columns)) for place in found]
    assert rows == sorted(rows)
    assert sorted(nondominated(columns)) == compared_with_each_other(columns, np.zeros(count))


@pytest.mark.parametrize("width", [3, 4, 5])
def test_points_none_of_which_dominates_another_are_all_kept(width):
    rng = np.random.default_rng(0)
    free = [rng.permutation(1000) for _ in range(width - 1)]
    columns = [*free, -sum(free)]
    assert sorted(nondominated(columns)) == list(range(1000))
    worse = [np.concatenate((column, column + 1)) for column in columns]
    assert sorted(nondominated(worse)) == list(range(1000))


def test_no_points_have_no_front():
    assert not len(nondominated([np.zeros(0), np.zeros(0)]))
