"""Run by test_run.py in a process of its own: one run that is killed again and again, beside one that is not.

    python killed_compress.py MODEL DATA FOLDER SETTINGS STAGE ...

Every attempt is a fork of this process, which itself only imports. A ``STAGE`` is a point of :data:`POINTS` at which
an attempt kills itself. ``SETTINGS`` are options as JSON; models are timed by their parameters. The last line printed
says how each attempt ended and what was in the output folder then.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tiny_checkpoints import options, parameter_seconds

from hf_elastic.checkpoint.run_record import RunRecord
from hf_elastic.pipeline import CompressRun, goal
from hf_elastic.pipeline.options import CompressOptions

PLAN = {"bf16": False, "seconds_per_step": 0.1, "supernet_steps": 20, "found_steps": 10}
# Where an attempt kills itself: module, object in it, and at which call.
POINTS: dict[str, tuple[str, str, int]] = {
    "sorted half-written": ("hf_elastic.supernet_folder", "write_json", 1),
    "teacher": ("hf_elastic.pipeline.run", "save_file", 1),
    "tables": ("hf_elastic.tables.quality", "write_json", 2),
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


def kill_at(module: str, name: str, calls: int) -> None:
    """Makes the named function kill this process at its ``calls``-th call."""
    *owners, last = name.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    function, left = getattr(owner, last), [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, last, counted)


def attempt(given: CompressOptions, point: str | None) -> str:
    """Runs once in a fork; returns how that ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            for name in ("measure_latency_table", "measure_models"):
                setattr(goal, name, functools.partial(getattr(goal, name), timer=parameter_seconds, rounds=3))
            if point is not None:
                kill_at(*POINTS[point])
            run = CompressRun(given, say=lambda text: None)
            if not (run.folder / "result.json").exists():  # the number of steps must not depend on the time they take
                record = RunRecord(run.folder, {**given.to_dict(), "text": run.text_digest})
                record.note("plan", **PLAN)
            run.run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "finished" if not os.WEXITSTATUS(status) else "failed"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, data, folder, given, *points = sys.argv[1:]
    settings = {"minutes": 1.0, "sequence_length": 12, **json.loads(given)}
    whole, killed = (options(Path(model), Path(data), Path(folder) / name, **settings) for name in ("whole", "killed"))
    ends = [("whole", attempt(whole, None), [])]
    for point in [*points, None]:
        end = attempt(killed, point)
        output = killed.output_folder
        ends.append((point or "last", end, sorted(file.name for file in output.iterdir()) if output.exists() else []))
    print("\n" + json.dumps(ends))


if __name__ == "__main__":
    main()
