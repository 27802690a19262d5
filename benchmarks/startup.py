"""How long a user waits before anything happens: ``hf-elastic --help``, and ``import hf_elastic`` beyond transformers.

    python benchmarks/startup.py [--pairs 15] [--json benchmarks/results/startup.json]

Each import is timed inside a fresh process: transformers with the stock modeling modules of BERT, LLaMA and GPT-2, and
the same with ``hf_elastic`` behind it, in turns. ``--help`` is timed as a user sees it: the whole process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from measuring import Bar, environment, interval, judged, print_environment, print_table, write_json

HELP, IMPORT = Bar("at most", 1.0), Bar("at most", 0.3)
STOCK = (
    "import transformers, transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama, "
    "transformers.models.gpt2.modeling_gpt2"
)
TIMED = "import time; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"


def import_seconds(code: str) -> float:
    """Seconds of a statement in a process of its own."""
    command = [sys.executable, "-c", TIMED.format(code=code)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def help_seconds() -> float:
    """Seconds of ``hf-elastic --help``."""
    script = Path(sys.executable).with_name("hf-elastic")
    began = time.perf_counter()
    subprocess.run([str(script), "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    machine = environment()
    print_environment(machine)
    import_seconds(f"{STOCK}, hf_elastic")  # fills the disk's cache
    pairs = [(import_seconds(f"{STOCK}, hf_elastic"), import_seconds(STOCK)) for _ in range(options.pairs)]
    more = interval([ours - stock for ours, stock in pairs])
    shown = interval([help_seconds() for _ in range(options.pairs)])
    rows = [
        {"what": "hf-elastic --help", "seconds": str(shown), **judged(shown, HELP)},
        {"what": "import hf_elastic, beyond transformers", "seconds": str(more), **judged(more, IMPORT)},
        {"what": "import transformers, three modeling modules", "seconds": str(interval([s for _, s in pairs])),
         **judged(interval([s for _, s in pairs]), None)},
    ]  # fmt: skip
    print_table(rows)
    write_json(options.json, {"environment": machine, "rows": rows})


if __name__ == "__main__":
    main()
