"""Part ``gpu`` of ``run.py``: models of one and of seven billion random bf16 weights on one GPU (see ``gpu.py``).

Absolute figures: how much faster subnets are than their parent, what an active subnet costs beside the same one
extracted, and seconds and peak memory of every command. Each size is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from against_cuts import Missing
from comparing import Line, line

PART = "gpu"
MEASURED = ("subnets", "active", "commands")
SIZES: dict[str, list[str]] = {
    "1B": ["--batch", "4"],
    "7B": [
        "--layers", "32", "--hidden", "4096", "--intermediate", "11008", "--heads", "32", "--kv-heads", "32",
        "--batch", "1", "--pairs", "9",
    ],
}  # fmt: skip
"""Options of ``gpu.py`` for each size."""
_RATIO = ("ratio", "low", "high", "pairs")


def lines(options: argparse.Namespace) -> list[Line]:
    """Lines of both sizes.

    Raises:
        Missing: there is no GPU.
    """
    del options
    if not torch.cuda.is_available():
        raise Missing("needs a GPU: torch sees none")
    return [found for size, given in SIZES.items() for found in measured(size, given)]


def measured(size: str, given: Sequence[str]) -> list[Line]:
    """Lines of one size, from a run of ``gpu.py``.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpu.json"
        script = str(Path(__file__).with_name("gpu.py"))
        subprocess.run([sys.executable, script, *given, "--parts", *MEASURED, "--json", str(file)], check=True)
        rows: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    found = []
    for row in rows["subnets"]:
        ratio = {name: row[name] for name in _RATIO}
        note = f"{row['MACs left']:.0%} of the MACs; {row['ms']:.3g} ms, the parent {row['parent ms']:.3g} ms"
        what = f"{size}: {row['subnet']}, {row['workload']}"
        found.append(line(PART, what, "the parent", "speed-up", **ratio, note=note))
    for row in rows["active"]:
        ratio = {name: row[name] for name in (*_RATIO, "bar", "met")}
        what = f"{size}: {row['subnet']}, active, {row['what']}"
        found.append(line(PART, what, "the same subnet as a stock model", "seconds", **ratio))
    for row in rows["commands"]:
        note = f"peak memory {row['peak GiB']:.2f} GiB, weights of the model included"
        found.append(line(PART, f"{size}: {row['command']}", "nothing", "seconds", ours=row["seconds"], note=note))
    return found
