"""Benchmark files of a few made-up architectures, in the formats that are read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OPERATORS: list[tuple[str, str | int]] = [
    ("SA", "SDP"), ("SA", "WMA"), ("LT", "DFT"), ("LT", "DCT"), ("DSC", 5), ("DSC", 9),
]  # fmt: skip


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def flexibert_layer(
    operator: tuple[str, str | int] = ("SA", "SDP"), *, heads: int = 2, neurons: int = 512, stacked: int = 1
) -> Row:
    return {
        "operation_type": operator[0], "operation_parameter": operator[1], "num_operation_heads": heads,
        "feed_forward_dimension": neurons, "num_feed_forward": stacked,
    }  # fmt: skip


def flexibert_row(layers: list[Row], *, hidden: int = 128, glue: float = 70.0, number: int = 0) -> Row:
    return {
        "id": number, "hidden_size": hidden, "encoder_layers": layers, "scores": {"glue": glue, "cola": glue - 30},
        "train_seconds": 3.0 * number + 1, "published_metrics": {"Head Confidence": glue + number % 7, "Constant": 1.0},
    }  # fmt: skip


def flexibert_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Rows whose truth grows with depth and width, with noise."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        layers = [
            flexibert_layer(
                rng.choice(OPERATORS), heads=rng.choice([2, 4]), neurons=rng.choice([512, 1024]),
                stacked=rng.choice([1, 3]),
            )
            for _ in range(rng.choice([2, 4]))
        ]  # fmt: skip
        hidden = rng.choice([128, 256])
        glue = 60 + 2 * len(layers) + hidden / 64 + rng.gauss(0, 1.5)
        rows.append(flexibert_row(layers, hidden=hidden, glue=glue, number=number))
    return rows


def lts_row(
    *, depth: int = 2, width: int = 128, neurons: int | list[int] = 300, ppl: Any = 40.0, fifth: bool = False
) -> Row:
    widths = neurons if isinstance(neurons, list) else [neurons] * depth
    attention = depth * ((5 if fifth else 4) * width**2 + (2 if fifth else 4) * width)
    ffn = sum(2 * width * n + n + width for n in widths)
    return {
        "space": "random_TransXL_made_up" if fifth else "random_GPT2_made_up", "name": "config", "index": 0,
        "arch": {"n_layer": depth, "d_model": width, "d_head": -1, "d_inner": neurons, "n_head": [2] * depth},
        "params": {
            "AdaEmb": 1000.0, "Attn": float(attention), "FFN": float(ffn), "nonembedding": float(attention + ffn),
            "total": attention + ffn + 1000.0,
        },
        "ppl": ppl,
    }  # fmt: skip
