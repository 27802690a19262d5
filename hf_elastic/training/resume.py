"""Which checkpoint of a Trainer is whole, and can be resumed.

A Trainer that is killed while it saves leaves a ``checkpoint-N`` folder that its own
``train(resume_from_checkpoint=True)`` picks, and fails on, although an older one is whole.
"""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json, write_json
from hf_elastic.supernet import Supernet
from hf_elastic.training.fit_layers import FIT_FILE
from hf_elastic.training.overrun import Overrun

MARKER = "elastic_complete.json"

_FOLDER = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
_NO_WEIGHTS = ("training_args.bin", FIT_FILE)  # of the model
_ASIDE = ".tmp*"  # what safetensors is writing, before it has its name
_TORCH_WRITES = ("inline_container", "iostream", "PytorchStreamWriter")  # in what torch.save says on a full disk
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_MAX_HEADER = 100_000_000  # the limit of the safetensors format, in bytes


class CompleteCheckpointCallback(TrainerCallback):
    """Write a marker into every checkpoint once all its files are there.

    The marker lists the files with their sizes. :func:`last_complete_checkpoint` also knows checkpoints
    without one, by reading their files' headers; the marker adds that no file is missing or shorter than it
    was. A run that was over when it was resumed does not move a weight. ``ElasticTrainer`` has this callback built in;
    add it to a stock Trainer.
    """

    def __init__(self) -> None:
        self._overrun = Overrun()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the whole checkpoint that the run goes on from, had the marker not been written yet."""
        self._overrun = Overrun()
        folder = _folder(args, state)
        if state.is_world_process_zero and not (folder / MARKER).is_file() and incompleteness(folder) is None:
            _mark(folder, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let nothing move in a step behind the last one."""
        self._overrun.before_step(state, kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove from a folder that is about to be written again the marker, and what a killed run was writing."""
        self._overrun.after_step(state, control)
        if control.should_save and state.is_world_process_zero:
            (_folder(args, state) / MARKER).unlink(missing_ok=True)
            for aside in _folder(args, state).glob(_ASIDE):
                aside.unlink()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written."""
        if args.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank writes a file of random states
        if state.is_world_process_zero and _folder(args, state).is_dir():
            _mark(_folder(args, state), state)


@contextmanager
def checkpoint_errors(checkpoint: Path | None = None) -> Iterator[None]:
    """Raise in one line what keeps the block from writing.

    Args:
        checkpoint: What it writes; by default what the error names.

    Raises:
        CheckpointError: A full disk, a folder that may not be written.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        what = checkpoint or getattr(error, "filename", None)
        other = isinstance(error, OSError) and error.errno not in _CANNOT_WRITE  # a server that is away, say
        torch_reads = isinstance(error, RuntimeError) and not any(word in reason for word in _TORCH_WRITES)
        if what is None or other or torch_reads:
            raise
        raise CheckpointError(
            f"cannot write {what}: {reason}; free space or give another output_dir, then resume: earlier "
            "checkpoints are whole"
        ) from error


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest whole ``checkpoint-N`` folder of a Trainer's output folder, or ``None``.

    Half-written checkpoints are passed over, see :func:`incompleteness`. Nothing is changed or deleted.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        if path.is_dir() and incompleteness(path) is None:
            return str(path)
    return None


def checked_checkpoint(checkpoint: str | Path) -> str:
    """Return the path of a whole checkpoint.

    Raises:
        CheckpointError: It is not whole; the message says what is missing and which one is whole.
    """
    reason = incompleteness(checkpoint)
    if reason is None:
        return str(checkpoint)
    other = last_complete_checkpoint(Path(checkpoint).parent)
    cure = f"resume from {other}" if other else "there is no whole checkpoint beside it; start again"
    raise CheckpointError(f"checkpoint {checkpoint} cannot be resumed: {reason}; {cure}")


def checked_blocks(checkpoint: str | Path, supernet: Supernet) -> str:
    """Return the path of a checkpoint whose config names the candidate blocks of the supernet, or names none at all.

    Otherwise torch would list every weight that is missing.

    Raises:
        CheckpointError: It was written with other candidate blocks.
    """
    file = Path(checkpoint) / "config.json"
    if supernet.block_parts and file.is_file():
        theirs, ours = (one.get("candidate_blocks") for one in (read_json(file), supernet.base.config.to_dict()))
        if theirs != ours:
            words = [", ".join(blocks) if blocks else "one block per layer" for blocks in (theirs, ours)]
            raise CheckpointError(
                f"{checkpoint} holds layers of {words[0]}, this supernet of {words[1]}; resume with the supernet of "
                "the first run"
            )
    return str(checkpoint)


def incompleteness(checkpoint: str | Path) -> str | None:
    """Return why a checkpoint is not whole, or ``None`` if it is.

    It is whole if ``trainer_state.json`` (which the Trainer writes last) can be read, it has weights, all
    safetensors files are as long as their headers say, all ``torch.save`` files have their directory at the
    end, all shards of an index are there, and every file that the marker lists, if there is one, still has
    its size. Without a marker, no later marker beside it may say that it had one: the Trainer removes the files
    of old checkpoints in any order, and a run may be killed meanwhile.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is not a folder"
    try:
        read_json(folder / _STATE)
        sizes = read_json(folder / MARKER)["files"] if (folder / MARKER).is_file() else {}
        files = sorted(file for file in folder.iterdir() if file.is_file())
        needed = set(sizes).union(*(_shards(file) for file in files if file.name.endswith(".index.json")))
    except (CheckpointError, AttributeError, KeyError, TypeError) as error:
        return str(error)
    if not sizes and _was_marked(folder):
        return f"its {MARKER} is gone, so that it was being removed"
    if missing := sorted(needed - {file.name for file in files}):
        return f"{missing[0]} is missing"
    if not any(file.suffix in (".safetensors", ".bin") and file.name not in _NO_WEIGHTS for file in files):
        return "it has no weights"
    for file in files:
        wrong_size = file.name in sizes and file.stat().st_size != sizes[file.name]
        if wrong_size or not _is_whole(file):
            return f"{file.name} is truncated"
    return None


def _is_whole(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return is_whole_safetensors(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    return True


def is_whole_safetensors(file: Path) -> bool:
    """Return whether a safetensors file has a readable header and the length that the header asks for."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                return False
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return size == 8 + length + int(max(ends, default=0))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False


def _shards(index: Path) -> set[str]:
    return set(read_json(index)["weight_map"].values())


def _was_marked(folder: Path) -> bool:
    """Whether the marker of another checkpoint beside this one names it among those that had theirs."""
    for marker in folder.absolute().parent.glob(f"checkpoint-*/{MARKER}"):
        with suppress(CheckpointError):  # a broken one tells of its own checkpoint
            if folder.absolute().name in list(read_json(marker).get("marked") or ()):
                return True
    return False


def _mark(folder: Path, state: TrainerState) -> None:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    sizes = {file.name: file.stat().st_size for file in files if file.name != MARKER}
    beside = {int(match[1]): path for path in folder.parent.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    marked = [path.name for step, path in beside.items() if step < state.global_step and (path / MARKER).is_file()]
    data = {"format": 1, "step": state.global_step, "files": sizes, "marked": sorted(marked)}
    write_json(folder / MARKER, data)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
