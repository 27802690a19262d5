"""Operations that are killed at random points end with the bits of those that were not; nothing wrong ever loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from killing import KINDS
from operations import OPERATIONS

WHOLE_RUNS = ("compress", "make_elm")  # of seconds; killed at points of their own in tests/pipeline
Found = Mapping[str, Any]


@pytest.fixture(scope="module")
def killed_once(harness: Callable[..., Any]) -> Found:
    names = [name for name in OPERATIONS if name not in WHOLE_RUNS]
    return harness("killing.py", "--points", "1", "--seed", "2", "--operations", *names)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WHOLE_RUNS])
def test_an_operation_that_was_killed_ends_with_the_same_bits(name: str, killed_once: Found) -> None:
    check(killed_once, name, kills=1)


def test_the_first_kills_of_all_operations_are_of_every_kind(killed_once: Found) -> None:
    assert all(sum(row[kind] for row in killed_once["rows"]) for kind in KINDS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_was_killed_again_and_again_ends_with_the_same_bits(
    name: str, harness: Callable[..., Any]
) -> None:
    check(harness("killing.py", "--points", "9", "--seed", "3", "--operations", name), name, kills=9)


def check(found: Found, name: str, *, kills: int) -> None:
    (row,) = [row for row in found["rows"] if row["operation"] == name]
    assert row["kills"] >= kills, found["short"]
    assert row["equal"] == row["rounds"] and not row["failed"], found["short"]
    assert row["loads_and_wrong"] == row["leftovers"] == 0, found["short"]


def test_the_harness_notices_what_loads_and_is_wrong_what_differs_and_what_is_left(harness: Callable[..., Any]) -> None:
    found = harness("careless.py", "--points", "12", "--operations", "careless", "broken")
    careless, broken = found["rows"]
    assert careless["loads_and_wrong"] > 0 and "'stock out'" in str(found["short"])
    assert careless["equal"] < careless["rounds"] and "attempts.txt differs" in str(found["short"])
    assert careless["leftovers"] == careless["rounds"]
    assert broken["failed"] > 0 and "FileExistsError" in str(found["short"])
