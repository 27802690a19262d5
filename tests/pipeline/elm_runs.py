"""Runs of ELM that take seconds: a size of a few dimensions a head, and models that are timed by their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_checkpoints import parameter_seconds

from hf_elastic.pipeline import ElmOptions, elm_steps, elm_table
from hf_elastic.spaces import ELM_SIZES, ElmSize

NANO = ElmSize(layers=3, hidden_size=24, start=8, largest=32, step=8, heads=3, total_parameters=1e4)


def prepare(put: Callable[[Any, str, Any], None]) -> None:
    """Adds the size ``nano``, and times everything by its parameters.

    Args:
        put: sets an attribute of a module: ``setattr``, or that of a MonkeyPatch.
    """
    ELM_SIZES["nano"] = NANO  # type: ignore[index]
    for module, name in (
        (elm_steps, "measure_block_latency_table"),
        (elm_steps, "measure_models"),
        (elm_table, "measure_models"),
        (elm_table, "check_latency"),
    ):
        put(module, name, functools.partial(getattr(module, name), timer=parameter_seconds, rounds=3))


def options(teacher: Path, data: Path, output: Path, **changes: Any) -> ElmOptions:
    """Options of a run of seconds with every stage."""
    settings: dict[str, Any] = {
        "size": "nano", "steps": 12, "batch_size": 4, "sequence_length": 16, "evaluations": 6, "device": "cpu",
        "learning_rate": 5e-3, "finetune_epochs": 0.5,
    }  # fmt: skip
    return ElmOptions(str(teacher), (str(data),), str(output), **{**settings, **changes})
