"""hf-elastic against the comparable steps of Torch-Pruning and whittle, each in a virtual environment of its own.

    python benchmarks/rivals.py --work FOLDER [--rivals torch-pruning whittle] [--pairs 15] [--json FILE]

``FOLDER/<rival>`` is made by pip when it is not there: Torch-Pruning beside the torch and transformers that run here,
whittle with the versions that it asks for. Both processes are up at once with one thread each, and do each step in
turns, on equal weights; what they compute is compared before it is timed (``against_torch_pruning.py``,
``against_whittle.py``). A rival that cannot be installed or fails gives a line that says so.

By default the clock is CPU time, which other work on the machine disturbs least; ``--clock wall`` where it is idle.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import against_torch_pruning
import against_whittle
import torch
import transformers
from comparing import Line, line
from measuring import environment, print_environment, print_table, write_json
from rival_process import HERE, Environment, Rival, RivalError, installed
from rival_serving import CLOCKS
from stories import add_data_argument


class Compare(Protocol):
    """Lines about one rival."""

    def __call__(self, rival: Rival, options: argparse.Namespace, *, against: str, folder: Path) -> Iterator[Line]: ...


def here(package: str) -> str:
    """The version that runs here, as pip is asked for it."""
    return f"{package}=={version(package).partition('+')[0]}"


RIVALS: dict[str, tuple[Environment, Compare]] = {
    "torch-pruning": (
        Environment(
            "torch-pruning", "torch-pruning==1.6.1",
            (("install", here("torch"), here("transformers"), here("numpy")), ("install", "torch-pruning==1.6.1")),
            "rival_torch_pruning.py",
        ),
        against_torch_pruning.compare,
    ),
    "whittle": (
        Environment(
            "whittle", "whittle==0.6.0",
            # whittle does not use torchvision, which torchmetrics imports if it is there, and which fits one build of
            # torch only. torch stands in the same command, since torchvision would replace it.
            (("install", here("torch"), "whittle==0.6.0"), ("uninstall", "-y", "torchvision")),
            "rival_whittle.py",
        ),
        against_whittle.compare,
    ),
}  # fmt: skip


def rows(options: argparse.Namespace) -> list[Line]:
    """Lines of all rivals that were asked for, in the columns of :data:`comparing.COLUMNS`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [found for name in options.rivals for found in rows_of(*RIVALS[name], options=options)]
    finally:
        torch.set_num_threads(threads)


def rows_of(rival: Environment, compare: Compare, *, options: argparse.Namespace) -> Iterator[Line]:
    """Lines of one rival; what stops the comparison is the last of them."""
    try:
        python = installed(rival, options.work)
        log = options.work / f"{rival.name}.log"
        given = ["--threads", "1", "--clock", options.clock]
        with (
            tempfile.TemporaryDirectory() as folder,
            Rival(python, HERE / rival.script, log=log, options=given, patience=options.patience) as process,
        ):
            yield from compare(process, options, against=str(rival), folder=Path(folder))
    except RivalError as error:
        yield line("rivals", "not measured, from here on", str(rival), "", note=str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module."""
    options = parsed(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    machine = environment()
    print_environment(machine)
    found = rows(options)
    print()
    print_table([{name: value for name, value in row.items() if name not in ("part", "note")} for row in found])
    unsaid = ("json", "data", "work")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    write_json(options.json, {"environment": machine, "settings": settings, "rows": found})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--work", type=Path, required=True, help="folder of the environments")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6, help="of random models")
    parser.add_argument("--hidden", type=int, default=768, help="of a LLaMA; BERT has half of it")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--seeds", type=int, default=5, help="calibration texts of the real model")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--stories", type=int, help="how many training stories to read; all by default")
    parser.add_argument("--tokens", type=int, default=512, help="of a training story, at most the model's context")
    parser.add_argument("--pieces", type=int, default=200, help="of the validation text")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for a rival's step")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
