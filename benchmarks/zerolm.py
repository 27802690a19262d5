"""ZeroLM's cost: its closed form beside singular values, scores from shapes, a streamed checkpoint, an exact front.

    python benchmarks/zerolm.py [--parts svd shapes stream front search] [--json FILE] [--figure FILE.html]

* ``svd``: the score of one 768 x 3072 matrix by its squared norm and by its singular values (Eq. 3 and 4 of the paper);
* ``shapes``: closed-form scores of architectures of LiteTransformerSearch's GPT-2 space, a second;
* ``stream``: the table of every width and head count of a random LLaMA of a billion parameters in bf16, from shards of
  safetensors, beside reading the same bytes and doing nothing; the files out of the page cache and in it. Memory is the
  peak of the process beyond what its imports hold;
* ``front``: the whole Pareto front of score and parameters of LoNAS' widths of LLaMA-7B, whose table is the closed form
  under its initialisation, each neuron's energy drawn;
* ``search``: NSGA-II on the same problem: hypervolume after N evaluations, as a share of the exact front's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import (
    Bar,
    environment,
    interval,
    judged,
    paired_seconds,
    print_environment,
    print_table,
    row,
    seconds,
    write_json,
)
from refit_memory import Peak, resident
from transformers import LlamaConfig, LlamaForCausalLM

import hf_elastic as he
from hf_elastic.proxies import ShapeBatch, ZeroLMTable, checkpoint_table, matrix_score

PARTS = ("svd", "shapes", "stream", "front", "search")
FASTER, RATE, MEMORY, FRONT = Bar("at least", 100), Bar("at least", 1e5), Bar("at most", 1.0), Bar("at most", 10.0)
GIB = 2**30
Rows = list[dict[str, Any]]


def svd(options: argparse.Namespace) -> Rows:
    """How much faster the squared norm is, and how far from the singular values."""
    weight = torch.randn(768, 3072, generator=torch.Generator().manual_seed(0))

    def by_singular_values() -> float:
        return float(torch.linalg.svdvals(weight).square().sum()) / min(weight.shape)

    off = abs(matrix_score(weight) / by_singular_values() - 1)
    pairs = paired_seconds(by_singular_values, lambda: matrix_score(weight), pairs=options.repeats)
    name = {"what": "singular values / squared norm, 768 x 3072"}
    return [{**row(name, pairs, bar=FASTER), "relative difference": f"{off:.1e}"}]


def shapes(options: argparse.Namespace) -> Rows:
    """Scores a second from sizes that are there as arrays."""
    rng, count = np.random.default_rng(0), 20_000
    depth, width = rng.integers(2, 17, size=count), 64 * rng.integers(2, 17, size=count)
    there = np.arange(16)[None, :] < depth[:, None]  # (N, L)
    inner = np.maximum(2 * width[:, None], 64 * rng.integers(4, 65, size=(count, 16))) * there
    stream = width[:, None] * there
    attention = np.repeat(np.stack([stream, stream], -1), 4, axis=1)  # (N, 4 L, 2)
    ffn = np.concatenate([np.stack([stream, inner], -1), np.stack([inner, stream], -1)], axis=1)
    parameters = (attention.prod(-1).sum(1) + ffn.prod(-1).sum(1)).astype(float)
    batch = ShapeBatch(attention, ffn, depth, width, parameters, parameters)
    rates = [count / seconds(lambda: batch.zerolm(0.7)) for _ in range(options.repeats)]
    return [{"what": "closed-form scores a second", **judged(interval(rates), RATE)}]


def stream(options: argparse.Namespace) -> Rows:
    """The table of a stored checkpoint beside reading its bytes."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        count = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size="500MB")
        del model
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        checkpoint_table(folder)  # imports
        before = resident()
        with Peak("cpu") as peak:
            checkpoint_table(folder)
        found = []
        for state, prepare in (("warm", lambda: None), ("cold", lambda: forget(files))):
            found += _streamed(folder, files, state=state, prepare=prepare, repeats=options.repeats)
    memory = (peak.value - before) / GIB
    about = {"parameters": count, "file_gib": size / GIB, "peak_gib": memory, "bar": str(MEMORY)}
    return [{**about, "met": "yes" if memory <= MEMORY.value else "NO", **line} for line in found]


def _streamed(
    folder: Path, files: Sequence[Path], *, state: str, prepare: Callable[[], None], repeats: int
) -> Rows:
    size = sum(file.stat().st_size for file in files)
    tables, reads = [], []
    for _ in range(repeats):
        prepare()
        tables.append(size / GIB / seconds(lambda: checkpoint_table(folder)))
        prepare()
        reads.append(size / GIB / seconds(lambda: _read(files)))
    return [{
        "page cache": state, "table, GiB/s": float(np.median(tables)), "reading alone, GiB/s": float(np.median(reads)),
        "repeats": repeats,
    }]  # fmt: skip


def _read(files: Sequence[Path]) -> None:
    block = bytearray(16 * 2**20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def forget(files: Sequence[Path]) -> None:
    """Drops files from the page cache (posix_fadvise; pages that are not written yet stay)."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lonas_llama() -> tuple[he.Supernet, ZeroLMTable]:
    """LLaMA-7B with LoNAS' widths on the meta device, and a table in which no two neurons are alike."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    elastic = he.spaces.lonas_llama(model.config).elastic
    assert elastic is not None
    supernet = he.make_elastic(model, elastic)
    rng = np.random.default_rng(0)

    def drawn(prefix: Any) -> Any:
        steps = np.diff(prefix.energy)
        moved = steps * rng.uniform(0.5, 1.5) * rng.chisquare(20, size=len(steps)) / 20
        return dataclasses.replace(prefix, energy=np.concatenate([[0.0], np.cumsum(moved)]))

    layers = ZeroLMTable.expected(model).layers
    return supernet, ZeroLMTable(
        tuple(dataclasses.replace(layer, ffn=tuple(map(drawn, layer.ffn))) for layer in layers)
    )


def goals_of(supernet: he.Supernet, table: ZeroLMTable) -> list[he.Objective]:
    return [he.objectives.proxy(supernet, "zerolm", table=table), he.objectives.parameters(supernet)]


def front(options: argparse.Namespace) -> Rows:
    """Seconds for all of it: objectives made from the table, and the search."""
    supernet, table = lonas_llama()
    points: list[int] = []

    def search() -> None:
        found = he.search_subnets(supernet.space, goals_of(supernet, table), algorithm="exact", progress=False)
        points[:] = [len(found.front)]

    found = interval([seconds(search) for _ in range(options.repeats)])
    return [{
        "what": "exact front, zerolm x parameters", "space": float(supernet.space.size), "points": points[0],
        "seconds": found.median, "low": found.low, "high": found.high, "bar": str(FRONT),
        "met": "yes" if FRONT.met(found) else "NO",
    }]  # fmt: skip


def search(options: argparse.Namespace) -> Rows:
    """Hypervolume of NSGA-II after N evaluations, three seeds, beside that of the exact front."""
    supernet, table = lonas_llama()
    goals = goals_of(supernet, table)
    whole = he.search_subnets(supernet.space, goals, algorithm="exact", progress=False).front
    corners = [supernet.space.smallest(), supernet.space.largest()]
    reference = (goals[0](corners[0]), goals[1](corners[1]))
    scale = _volume([_point(e) for e in whole], reference)
    found = []
    for seed in range(3):
        began = time.perf_counter()
        result = he.search_subnets(
            supernet.space, goals, algorithm="nsga2", evaluations=max(options.evaluations), seed=seed, progress=False
        )
        spent = time.perf_counter() - began
        points = [_point(e) for e in result.evaluations]
        found += [
            {"seed": seed, "evaluations": n, "hypervolume": _volume(points[:n], reference) / scale, "seconds": spent}
            for n in options.evaluations
        ]
    if options.figure:
        _figure(found, options.figure)
    return found


def _point(evaluation: he.Evaluation) -> tuple[float, float]:
    return evaluation.values["zerolm"], evaluation.values["parameters"]


def _volume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area of what the points dominate: scores above and parameters below the reference."""
    area, best = 0.0, reference[0]
    for score, parameters in sorted(points, key=lambda point: point[1]):
        if score > best:
            area += (score - best) * (reference[1] - parameters)
            best = score
    return area


def _figure(rows: Rows, file: str) -> None:
    """Hypervolume over evaluations, one line a seed, beside the exact front's."""
    import plotly.graph_objects as go

    lines = [
        go.Scatter(
            x=[line["evaluations"] for line in rows if line["seed"] == seed],
            y=[line["hypervolume"] for line in rows if line["seed"] == seed], name=f"NSGA-II, seed {seed}",
        )
        for seed in sorted({line["seed"] for line in rows})
    ]  # fmt: skip
    figure = go.Figure(lines)
    figure.add_hline(y=1, annotation_text="exact front")
    figure.update_layout(xaxis_type="log", xaxis_title="evaluations", yaxis_title="hypervolume")
    figure.write_html(file)


MEASURES = {"svd": svd, "shapes": shapes, "stream": stream, "front": front, "search": search}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=22, help="of the streamed model; 22 are a billion parameters")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[50, 100, 200, 400, 800, 1600])
    parser.add_argument("--folder", help="where the streamed checkpoint is written")
    parser.add_argument("--figure", help="HTML page of the hypervolume")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = environment()
    print_environment(machine)
    found: dict[str, Rows] = {}
    for part in options.parts:
        found[part] = MEASURES[part](options)
        print_table(found[part])
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "folder", "figure")}
    write_json(options.json, {"environment": machine, "settings": settings, **found})


if __name__ == "__main__":
    main()
