"""Run by test_elm_run.py in a process of its own: one run of ELM that is killed again and again, and one that is not.

    python killed_elm.py TEACHER DATA ROWS FOLDER SETTINGS POINT ...

As ``killed_compress.py``; models are timed by their parameters. The last line printed says how each attempt ended and
what was in the output folder then.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).parent))

import elm_runs
import torch
import transformers
from killed_compress import kill_at

from hf_elastic.pipeline import ElmOptions, make_elm

# Where an attempt kills itself: module, object in it, and at which call.
POINTS: dict[str, tuple[str, str, int]] = {
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


def attempt(given: ElmOptions, point: str | None) -> str:
    """Runs once in a fork; returns how that ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            elm_runs.prepare(setattr)
            if point is not None:
                kill_at(*POINTS[point])
            make_elm(given, say=lambda text: None)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "finished" if not os.WEXITSTATUS(status) else "failed"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    teacher, data, rows, folder, given, *points = sys.argv[1:]
    elm_runs.prepare(setattr)
    settings = {"finetune": (rows,), **json.loads(given)} if rows else json.loads(given)
    whole, killed = (
        elm_runs.options(Path(teacher), Path(data), Path(folder) / name, **settings) for name in ("whole", "killed")
    )
    ends = [("whole", attempt(whole, None), [])]
    for point in [*points, None]:
        end = attempt(killed, point)
        output = killed.output_folder
        ends.append((point or "last", end, sorted(file.name for file in output.iterdir()) if output.exists() else []))
    print("\n" + json.dumps(ends))


if __name__ == "__main__":
    main()
