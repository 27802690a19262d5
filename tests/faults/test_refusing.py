"""Operations that cannot write end with one line and leave what was there, and go on once they can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from operations import OPERATIONS
from refusing import REFUSALS, why_no_mounts

# Saved by the stock Trainer, whose words on a full disk are its own.
STOCK = ("growth", "adapter training")
NO_MOUNTS = why_no_mounts()


@pytest.fixture(scope="module")
def refused_once(harness: Callable[..., Any]) -> Mapping[str, Any]:
    kinds = ["limit"] if NO_MOUNTS else list(REFUSALS)
    return harness("refusing.py", "--kinds", *kinds, "--operations", "search", "export")  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_written_is_said_in_one_line_and_leaves_what_was_there(
    kind: str, refused_once: Mapping[str, Any]
) -> None:
    check(refused_once, kind)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_that_cannot_write_leaves_what_was_there(
    kind: str, name: str, harness: Callable[..., Any]
) -> None:
    if kind != "limit" and NO_MOUNTS:
        pytest.skip(NO_MOUNTS)
    number = "1" if kind == "read-only" else "4"
    check(harness("refusing.py", "--kinds", kind, "--refusals", number, "--operations", name), kind)


def check(found: Mapping[str, Any], kind: str) -> None:
    if kind != "limit" and NO_MOUNTS:
        pytest.skip(NO_MOUNTS)
    for row in found["rows"]:
        met = sum(row[kind] for kind in REFUSALS)
        assert row[kind], found["short"]
        assert row["wrong"] == row["leftovers"] == 0 and row["equal"] == met, found["short"]
        if row["operation"] not in STOCK:
            assert row["one_line"] == met, found["short"]
