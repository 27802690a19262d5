"""Run by test_elm_run.py in a process of its own: one run of ELM that is killed again and again, and one that is not.

    python killed_elm.py TEACHER DATA ROWS FOLDER SETTINGS POINT ...

As ``killed_compress.py``; models are timed by their parameters. The last line printed says how each attempt ended and
what was in the output folder then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).parent))

import elm_runs
import transformers
from killed_runs import Point, tell_ends

from hf_elastic.pipeline import ElmOptions, make_elm

POINTS: dict[str, Point] = {
    "latency": ("hf_elastic.tables.block_latencies", "BlockLatencyTable.save", 1),
    "training": ("hf_elastic.training.trainer", "ElasticTrainer.training_step", 9),
    "checkpoint half-written": ("hf_elastic.training.trainer", "ElasticTrainer._save_optimizer_and_scheduler", 1),
    "supernet half-written": ("hf_elastic.supernet_folder", "write_json", 1),
    "search": ("hf_elastic.search.loop", "SearchLoop._step", 3),
    "search over": ("hf_elastic.search.results", "SearchResult.save", 1),
    "fusing": ("hf_elastic.pipeline.elm_run", "save_static", 1),
    "retraining": ("hf_elastic.training.trainer", "ElasticTrainer.training_step", 9),
    "retrained": ("hf_elastic.pipeline.elm_run", "save_static", 1),
    "fine-tuning": ("transformers", "Trainer.training_step", 9),
    "fine-tuned": ("hf_elastic.pipeline.elm_run", "export", 1),
    "comparing": ("hf_elastic.pipeline.elm_run", "compared", 1),
    "export half-written": ("hf_elastic.checkpoint.exporting", "copy_companions", 1),
    "output half-written": ("hf_elastic.pipeline.elm_run", "shutil.copytree", 2),
    "exported": ("hf_elastic.pipeline.elm_run", "write_json", 1),
}


def run(given: ElmOptions) -> None:
    """One attempt."""
    make_elm(given, say=lambda text: None)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    teacher, data, rows, folder, given, *names = sys.argv[1:]
    elm_runs.prepare(setattr)
    settings = {"finetune": (rows,), **json.loads(given)} if rows else json.loads(given)
    both = [
        elm_runs.options(Path(teacher), Path(data), Path(folder) / name, **settings) for name in ("whole", "killed")
    ]
    tell_ends(run, both, points=POINTS, names=names)


if __name__ == "__main__":
    main()
