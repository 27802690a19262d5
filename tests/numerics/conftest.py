"""Makes modules importable by their names, and leaves a fixed part of the many cases of a test to the fast tier."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "adapters", HERE.parent / "training"):
    sys.path.append(str(folder))

_ONE_IN = 12


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases as slow that are not in the fast tier: a twelfth of each test is, at least one."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_soak.py" and item.get_closest_marker("slow") is None:
            cases.setdefault((item.path.name, item.originalname), []).append(item)  # type: ignore[attr-defined]
    for found in cases.values():
        ranked = sorted(found, key=lambda item: zlib.crc32(item.name.encode()))  # the same in every run
        for item in ranked[max(1, len(ranked) // _ONE_IN) :]:
            item.add_marker(pytest.mark.slow)
