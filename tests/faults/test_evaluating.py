"""One evaluation of a search runs out of memory, hangs or dies: it fails alone, and its cause is in the result."""

from __future__ import annotations

import pytest
from evaluating import FAULTS, evaluated


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if fault.workers else ()) for name, fault in FAULTS.items()]
)
def test_an_evaluation_that_meets_a_fault_fails_alone_and_says_why(name: str) -> None:
    found = evaluated(name)
    assert found["that_one_alone"] and found["others_equal"] and found["cause_is_right"], found
