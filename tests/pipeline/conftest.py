"""Makes the helpers of this folder importable; runs of ELM have the size ``nano``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def always_quiet(quiet: None) -> None:
    """All of these tests are."""


@pytest.fixture(scope="module")
def nano() -> Iterator[None]:
    """Adds the size ``nano``, and times models by their parameters."""
    import elm_runs  # found by its name only behind the line above

    with pytest.MonkeyPatch.context() as patch:
        elm_runs.prepare(patch.setattr)
        yield
    del elm_runs.ELM_SIZES["nano"]  # type: ignore[attr-defined]
