"""Run by test_run.py in a process of its own: one run that is killed again and again, beside one that is not.

    python killed_compress.py MODEL DATA FOLDER SETTINGS STAGE ...

A ``STAGE`` is a point of :data:`POINTS` at which an attempt kills itself. ``SETTINGS`` are options as JSON; models are
timed by their parameters. The last line printed says how each attempt ended and what was in the output folder then.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).parent))

import transformers
from killed_runs import Point, tell_ends
from tiny_checkpoints import options, parameter_seconds

from hf_elastic.checkpoint.run_record import RunRecord
from hf_elastic.pipeline import CompressRun, goal
from hf_elastic.pipeline.options import CompressOptions

PLAN = {"bf16": False, "seconds_per_step": 0.1, "supernet_steps": 20, "found_steps": 10}
POINTS: dict[str, Point] = {
    "sorted half-written": ("hf_elastic.supernet_folder", "write_json", 1),
    "teacher": ("hf_elastic.pipeline.run", "save_file", 1),
    "tables": ("hf_elastic.tables.quality", "write_table", 2),
    "repair": ("hf_elastic.pipeline.run", "refitted", 1),
    "repaired half-written": ("hf_elastic.supernet_folder", "write_json", 1),
    "training": ("hf_elastic.training.trainer", "ElasticTrainer.training_step", 19),
    "checkpoint half-written": ("hf_elastic.training.trainer", "ElasticTrainer._save_optimizer_and_scheduler", 1),
    "supernet half-written": ("hf_elastic.supernet_folder", "write_json", 1),
    "search": ("hf_elastic.search.loop", "SearchLoop._step", 3),
    "search over": ("hf_elastic.search.results", "SearchResult.save", 1),
    "specialising": ("hf_elastic.training.trainer", "ElasticTrainer.training_step", 6),
    "comparing": ("hf_elastic.pipeline.run", "plain_alternatives", 1),
    "export half-written": ("hf_elastic.checkpoint.exporting", "copy_companions", 1),
    "exported": ("hf_elastic.pipeline.run", "write_json", 1),
}


def run(given: CompressOptions) -> None:
    """One attempt."""
    opened = CompressRun(given, say=lambda text: None)
    if not (opened.folder / "result.json").exists():  # the number of steps must not depend on the time they take
        record = RunRecord(opened.folder, opened._identity)
        record.note("plan", **PLAN)
    opened.run()


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, data, folder, given, *names = sys.argv[1:]
    for name in ("measure_latency_table", "measure_models"):
        setattr(goal, name, functools.partial(getattr(goal, name), timer=parameter_seconds, rounds=3))
    settings = {"minutes": 1.0, "sequence_length": 12, **json.loads(given)}
    both = [options(Path(model), Path(data), Path(folder) / name, **settings) for name in ("whole", "killed")]
    tell_ends(run, both, points=POINTS, names=names)


if __name__ == "__main__":
    main()
