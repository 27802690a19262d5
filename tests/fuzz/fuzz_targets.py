"""All targets, with the valid inputs that their hostile ones are made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from fuzz_folders import folder_targets
from fuzz_running import Target
from fuzz_seeds import Seeds
from fuzz_texts import text_targets


@contextmanager
def prepared(root: Path) -> Iterator[list[Target]]:
    """Targets whose seeds are in a folder; libraries are quiet and use one thread meanwhile, as children are forked.

    Args:
        root: an empty folder.
    """
    for name in ("seeds", "work"):
        (root / name).mkdir(parents=True)
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    before = os.environ.get("MPLCONFIGDIR")
    os.environ["MPLCONFIGDIR"] = str(root / "seeds" / "matplotlib")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        seeds = Seeds(root / "seeds")
        seeds.make_all()
        yield [*text_targets(seeds), *folder_targets(seeds)]
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        os.environ.pop("MPLCONFIGDIR")
        if before is not None:
            os.environ["MPLCONFIGDIR"] = before
