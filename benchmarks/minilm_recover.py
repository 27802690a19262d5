"""What minutes of ``recover()`` make of the answer without training, on a real sentence encoder: STS-B and speed.

    python benchmarks/minilm_recover.py OUTPUT --parent FOLDER [--minutes 10] [--bar 0.98] [--json FILE]

``OUTPUT`` is what ``compress --recipe fast`` wrote, with its run beside it, whose text it is distilled on. STS-B pairs
are for judging only, as in ``minilm.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilm
from measuring import environment, print_environment, print_table, write_json
from transformers import AutoModel

from hf_elastic.pipeline.kept import SORTED, FinishedRun
from hf_elastic.repair.recovery import recover
from hf_elastic.tables.timing import Setting, measure_models, speedup

SPEEDUP_BAR = 1.6
TIMED_SEQUENCES, TIMED_SECONDS = 8, 20.0


def recovered(run: FinishedRun, options: argparse.Namespace, *, folder: Path) -> dict[str, Any]:
    """Distils the output of a run from its parent, and writes it to a folder with everything that lies beside it."""
    shutil.copytree(options.output, folder)
    small, parent = (AutoModel.from_pretrained(place) for place in (options.output, options.parent))
    began, steps = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as work:
        recover(
            small, parent, run.data.train, output=Path(work) / "run", target="last_hidden_state",
            minutes=options.minutes, batch_size=options.batch_size, arguments={"use_cpu": True, "disable_tqdm": True},
            on_report=lambda report: steps.append(report.steps),
        )  # fmt: skip
    spent = time.perf_counter() - began
    small.save_pretrained(folder)
    return {"seconds": spent, "steps": steps[0]}


def measured_speedup(run: FinishedRun, parent: str, small: Path) -> float:
    """How many times faster it is than its parent, by forwards in turns."""
    setting = Setting.of(run.supernet(SORTED), batch_size=TIMED_SEQUENCES)
    models = {name: AutoModel.from_pretrained(place) for name, place in (("parent", parent), ("small", small))}
    timed = measure_models(models, setting, seconds=TIMED_SECONDS)
    return float(speedup(timed["parent"], timed["small"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    pairs = Path(options.data) / "glue" / "stsb_dev.jsonl"
    if not pairs.is_file():
        sys.exit(f"no {pairs}: set HF_ELASTIC_DATA to the folder of data")
    run, machine = FinishedRun(Path(options.output + ".run")), environment()
    print_environment(machine)
    sentences = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    rows = [("parent", minilm.sts(options.parent, sentences)), ("fast answer", minilm.sts(options.output, sentences))]
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "recovered"
        training = recovered(run, options, folder=small)
        rows.append((f"{options.minutes:g} min of recover()", minilm.sts(str(small), sentences)))
        faster = measured_speedup(run, options.parent, small)
    parent, kept = rows[0][1], rows[-1][1] / rows[0][1]
    shown = [{"model": name, "spearman": value, "kept": value / parent} for name, value in rows]
    print_table(shown)
    print(f"kept {kept:.2%}, {faster:.2f}x, {training['steps']} steps in {training['seconds']:.0f} s")
    bars = {
        f"STS-B >= {options.bar:g} of the parent's": kept >= options.bar,
        f"speed-up >= {SPEEDUP_BAR:g}": faster >= SPEEDUP_BAR,
    }
    write_json(
        options.json,
        {"environment": machine, "stsb": shown, "speedup": faster, "bars": bars, **training},
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder that compress --recipe fast wrote, its run beside it")
    parser.add_argument("--parent", required=True, help="folder of the parent")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bar", type=float, default=0.98, help="share of the parent's STS-B to be kept")
    parser.add_argument("--data", default=os.environ.get("HF_ELASTIC_DATA", str(minilm._BESIDE)))
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
