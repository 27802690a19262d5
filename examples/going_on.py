"""What the examples share: a folder of work, so that a run goes on where it was, and data by file or by name."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_elastic import last_complete_checkpoint
from hf_elastic.errors import ElasticError
from hf_elastic.pipeline.texts import read_rows

Batch = dict[str, torch.Tensor]


def work_folder(arguments: argparse.Namespace) -> Path:
    """``OUTPUT.work``, where a run that was killed and is started again with the same options goes on."""
    folder = Path(f"{arguments.output}.work")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    file = folder / "options.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{folder} is of a run with other options; give another --output, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return folder


def training_arguments(folder: Path, *, steps: int, **settings: Any) -> TrainingArguments:
    """Arguments of a training that keeps its last two checkpoints, of five; resume from :func:`checkpoint_before`."""
    return TrainingArguments(
        str(folder), max_steps=steps, save_strategy="steps", save_steps=max(1, steps // 5), save_total_limit=2,
        logging_steps=max(1, steps // 10), report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
        **settings,
    )  # fmt: skip


def checkpoint_before(folder: Path, *, steps: int) -> str | None:
    """The newest whole checkpoint before the last step, where a training goes on; the last one is removed.

    From that one the Trainer would take a step too many. What is repeated ends with the same bits on a CPU.
    """
    found = last_complete_checkpoint(folder)
    if found and Path(found).name == f"checkpoint-{steps}":
        shutil.rmtree(found)
        found = last_complete_checkpoint(folder)
    return found


def search_storage(folder: Path) -> str:
    """Where a search keeps what it evaluated."""
    return f"sqlite:///{folder.resolve() / 'search.db'}"


def texts(sources: list[str], *, column: str = "text") -> list[str]:
    """Texts of ``.txt``, ``.jsonl`` and ``.csv`` files, and of data sets on the Hub (NAME or NAME:SPLIT)."""
    try:
        return [row[column] for row in read_rows(sources, text_column=column)]
    except ElasticError as error:
        sys.exit(str(error))


def text_batches(tokenizer: Any, sources: list[str], *, length: int, count: int) -> list[Batch]:
    """The first ``count`` rows of ``length`` tokens of some texts, in batches of 8 with labels.

    Data that gives fewer rows gives those; one that gives none ends the program.
    """
    ids: list[int] = []
    for text in texts(sources):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length * count:
            break
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:count]  # (N, T)
    if not len(rows):
        sys.exit(f"{', '.join(sources)} gives fewer than {length} tokens; give more text or a smaller --length")
    return [{"input_ids": b, "attention_mask": torch.ones_like(b), "labels": b.clone()} for b in rows.split(8)]
