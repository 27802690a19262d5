"""Makes ``tiny_training`` importable, here and in the processes that tests start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))

from tiny_training import settings  # noqa: E402


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Quiet settings on the CPU; keyword arguments replace them."""

    def build(**changes: Any) -> TrainingArguments:
        return TrainingArguments(**settings(str(tmp_path / "run"), **changes))

    return build
