"""The device of these tests, and what they share with the tests beside them.

``HF_ELASTIC_TEST_DEVICE`` names the device, by default ``cuda``; with ``cpu`` all of them run without a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

VARIABLE = "HF_ELASTIC_TEST_DEVICE"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for where everything is deterministic
TESTS = Path(__file__).resolve().parents[1]

# Helpers of the tests of each part are imported by their names.
sys.path += [str(TESTS / folder) for folder in ("gpu", "adapters", "compression", "pipeline", "repair", "training")]


@pytest.fixture(scope="session")
def device() -> str:
    """Where everything runs. Without such a device tests are skipped, unless it was asked for by its name."""
    name = os.environ.get(VARIABLE, "cuda")
    try:
        torch.zeros(1, device=name).sum().item()
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts that there is one
        reason = f"torch cannot use {name!r} here ({' '.join(str(error).split())[:80]})"
        if VARIABLE in os.environ:
            pytest.fail(f"{reason}, which {VARIABLE} asks for", pytrace=False)
        pytest.skip(f"{reason}; {VARIABLE}=cpu runs these tests without a GPU")
    return name


@pytest.fixture(autouse=True)
def always_quiet(quiet: None) -> None:
    """All of these tests are."""


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Quiet settings of a training on a device by plain gradient descent, which magnifies no rounding."""
    from tiny_training import settings

    def build(device: str, **changes: Any) -> TrainingArguments:
        where = {"use_cpu": torch.device(device).type == "cpu", "optim": "sgd", "dataloader_pin_memory": False}
        return TrainingArguments(**settings(str(tmp_path / f"run-{device}"), **{**where, **changes}))

    return build
