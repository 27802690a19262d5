"""Part ``rivals`` of ``run.py``: the comparable steps of whittle and Torch-Pruning (see ``rivals.py``)."""

from __future__ import annotations

import argparse
from pathlib import Path

import rivals
from comparing import Line

PART = "rivals"


def lines(options: argparse.Namespace) -> list[Line]:
    """Lines of both, each in an environment of its own below ``--work``."""
    given = ["--work", str(Path(options.work) / PART), "--data", str(options.data)]
    for name in ("pairs", "layers", "batch", "length"):
        given += [f"--{name}", str(getattr(options, name))]
    return rivals.rows(rivals.parsed(given))
