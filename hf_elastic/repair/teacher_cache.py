"""What a teacher says about every example, computed once and kept on disk, so that training runs without it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.distillation import TopK, top_k_distribution
from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.families import shifts_labels
from hf_elastic.files import read_json, write_json
from hf_elastic.fingerprints import fingerprint
from hf_elastic.layers import evaluating
from hf_elastic.repair.features import (
    Batch,
    Feature,
    Padder,
    Rows,
    check_features,
    data_digest,
    read_features,
    vocabulary_size,
)
from hf_elastic.training.resume import is_whole_safetensors
from hf_elastic.training.targets import Distillation, LossContext, Signal, Target, scored_positions

DEFAULT_TOP_K = 64
CACHE_FILE = "cache.json"

_FORMAT = 1
_SHARD = 256  # examples in a file: what is lost when the process is killed
_POSITIONS = 1024  # whose logits are in memory in single precision at a time
_FIELDS: Mapping[Target, tuple[str, ...]] = {
    "logits": ("temperature",), "embeddings": ("pooling",), "last_hidden_state": (), "hidden_states": (),
}  # fmt: skip


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache depends on.

    Attributes:
        teacher: fingerprint of its weights.
        data: fingerprint of the examples.
        settings: what is kept of the teacher's output.
    """

    teacher: str
    data: str
    settings: Mapping[str, Any]

    def difference(self, other: CacheIdentity) -> str | None:
        """Says in what another cache differs, ``None`` where in nothing."""
        for name in ("teacher", "data"):
            if getattr(self, name) != getattr(other, name):
                return f"other {name}" if name == "data" else f"another {name}"
        for name in sorted({*self.settings, *other.settings}):
            if self.settings.get(name) != other.settings.get(name):
                return f"{name}={self.settings.get(name)!r} instead of {other.settings.get(name)!r}"
        return None


class TeacherCache:
    """What a teacher says about each example, read from disk when it is asked for.

    Of logits: per scored position the ``top_k`` largest log-probabilities (float16), which classes they are (int32) and
    the log-probability of all other classes together (float32), see :func:`hf_elastic.distillation.top_k_loss`. Of
    embeddings ``(D,)`` in float32; of hidden states ``(T, D)`` per layer in float16. The files are
    ``shard-00000.safetensors``, ... beside ``cache.json``.

    Args:
        folder: written by :func:`cache_teacher`.

    Raises:
        CheckpointError: the folder holds no cache, or not all of it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        found = read_json(self.folder / CACHE_FILE)
        try:
            self.identity = CacheIdentity(found["teacher"], found["data"], found["settings"])
            self.classes: int | None = found["classes"]
            self.vocabulary = int(found["vocabulary"])
            total, size = int(found["examples"]), int(found["shard_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / CACHE_FILE} describes no teacher cache: {error!r}") from error
        self._files = [shard_file(self.folder, number) for number in range(-(-total // size))]
        if broken := next((file for file in self._files if not is_whole_safetensors(file)), None):
            raise CheckpointError(f"{broken} of the teacher cache is missing or truncated; call cache_teacher() again")
        self._size = size
        self._bounds = [_bounds(file) for file in self._files]
        if sum(len(bounds) - 1 for bounds in self._bounds) != total:
            raise CheckpointError(f"the shards of {self.folder} do not hold {total} examples; delete it")

    def __len__(self) -> int:
        return sum(len(bounds) - 1 for bounds in self._bounds)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Rows of one example by name, ``(rows, ...)``."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard, place = divmod(index, self._size)
        start, stop = self._bounds[shard][place : place + 2]
        with safe_open(self._files[shard], framework="pt") as opened:
            names = sorted({*opened.keys()} - {"counts"})
            return {name: opened.get_slice(name)[start:stop] for name in names}


def _bounds(file: Path) -> list[int]:
    with safe_open(file, framework="pt") as opened:
        counts = opened.get_tensor("counts")  # (examples,)
    return [0, *counts.cumsum(0).tolist()]


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def cache_teacher(
    teacher: PreTrainedModel,
    data: Rows,
    folder: str | Path,
    *,
    target: Target | Distillation = "logits",
    top_k: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 1024,
    batch_size: int = 16,
) -> TeacherCache:
    """Runs a teacher once over the examples and keeps what it says; afterwards it can be deleted.

    Killed and called again, it goes on behind the last whole file of 256 examples.

    Args:
        teacher: on the device where it is to run; unchanged.
        data: as for :func:`recover`, to which the same data must be given.
        folder: of the cache.
        target: as for :func:`recover`.
        top_k: how many classes per position are kept of logits; by default 64, or all where there are fewer.
        tokenizer: whose chat template renders conversations.
        max_length: longest conversation in tokens.
        batch_size: examples that the teacher sees at once.

    Raises:
        DataError: the data cannot be read, or not by this teacher.
        TrainingError: the teacher does not give the target, or gives NaN, or ``top_k`` is more than its classes.
        CheckpointError: the folder holds a cache of another teacher, of other data or settings, or cannot be written.
    """
    plan = planned(target)
    features = read_features(data, tokenizer=tokenizer, max_length=max_length)
    check_features(features, teacher)
    return filled_cache(teacher, features, Path(folder).expanduser(), plan=plan, top_k=top_k, batch_size=batch_size)


def planned(target: Target | Distillation) -> Distillation:
    """Returns what is compared; a name alone compares relative distances of states, without the loss of labels.

    Raises:
        TrainingError: the target is unknown, or a ``Distillation`` names a teacher of its own.
    """
    if not isinstance(target, Distillation):
        return Distillation(target=target, state_distance="relative", label_weight=0.0)
    if target.teacher is not None:
        raise TrainingError("the teacher is given to recover(); leave Distillation(teacher=...) out")
    return target


def filled_cache(
    teacher: PreTrainedModel,
    features: Sequence[Feature],
    folder: Path,
    *,
    plan: Distillation,
    top_k: int | None,
    batch_size: int,
) -> TeacherCache:
    """Completes the cache of checked examples; see :func:`cache_teacher`."""
    pad = Padder(teacher)
    reader = SignalReader(teacher, plan, top_k=top_k)
    classes = reader.start(pad(features[:1]))
    identity = CacheIdentity(
        fingerprint(teacher), data_digest(features), cache_settings(plan, top_k=top_k, classes=classes)
    )
    _claim(
        folder,
        identity,
        sizes={
            "classes": classes, "vocabulary": vocabulary_size(teacher), "examples": len(features), "shard_size": _SHARD,
        },
    )  # fmt: skip
    missing = [n for n in range(-(-len(features) // _SHARD)) if not is_whole_safetensors(shard_file(folder, n))]
    with evaluating(teacher):
        for number in tqdm(missing, desc="teacher", unit="shard", disable=None, dynamic_ncols=True):
            chosen = features[number * _SHARD : (number + 1) * _SHARD]
            _write_shard(shard_file(folder, number), _shard(reader, chosen, pad=pad, batch_size=batch_size))
    return TeacherCache(folder)


def cache_settings(plan: Distillation, *, top_k: int | None, classes: int | None) -> dict[str, Any]:
    """What is kept of the teacher's output.

    Raises:
        TrainingError: ``top_k`` is out of range, or the target cannot be kept.
    """
    settings: dict[str, Any] = {"target": plan.target, **{name: getattr(plan, name) for name in _FIELDS[plan.target]}}
    if plan.target != "logits":
        return settings
    if plan.divergence == "mse":
        raise TrainingError("divergence='mse' compares all logits, which are not kept; pass cache=False")
    assert classes is not None
    return {**settings, "top_k": min(DEFAULT_TOP_K, classes) if top_k is None else top_k}


class SignalReader:
    """Runs a teacher on batches and takes from its output what a distillation compares.

    Args:
        teacher: in whatever mode it is to run in.
        plan: what is compared.
        top_k: how many classes of logits are kept; by default 64, or all where there are fewer.
    """

    def __init__(self, teacher: PreTrainedModel, plan: Distillation, *, top_k: int | None = None) -> None:
        self.teacher, self.plan, self.top_k = teacher, plan, top_k
        self.shifted = shifts_labels(teacher)

    def start(self, batch: Batch) -> int | None:
        """Tries the teacher on a batch; returns the number of classes, ``None`` where no logits are compared.

        Raises:
            TrainingError: the output cannot be kept, or ``top_k`` is out of range.
        """
        with evaluating(self.teacher):
            signal = self.signal(batch)
        if self.plan.target != "logits":
            return None
        if not isinstance(signal, Tensor):
            raise TrainingError("a span model has two tensors of logits, which are not kept; pass cache=False")
        classes = signal.shape[-1]
        if self.top_k is not None and not 1 <= self.top_k <= classes:
            raise TrainingError(f"top_k={self.top_k} is not within 1..{classes}, the classes of the teacher's logits")
        return classes

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about a batch, in whole tensors.

        Raises:
            TrainingError: the output lacks the target.
        """
        inputs = {name: values.to(self.teacher.device) for name, values in batch.items() if name != "labels"}
        return self.plan.signal(self.teacher(**inputs, **self.plan.forward_arguments), inputs)

    def rows(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept of a batch: rows of all examples behind one another, and how many each has, ``(B,)``.

        Raises:
            TrainingError: the teacher gives what is not finite.
        """
        signal = self.signal(batch)
        if self.plan.target == "embeddings":
            assert isinstance(signal, Tensor)
            found, counts = {"embeddings": signal.float()}, torch.ones(len(signal), dtype=torch.long)
        elif self.plan.target == "logits":
            assert isinstance(signal, Tensor)
            mask, _ = scored_positions(signal, LossContext(_on(batch, signal.device), shifted=self.shifted))
            mask = signal.new_ones(signal.shape[:-1]) if mask is None else mask
            found, counts = self._top(signal[mask.bool()]), mask.bool().reshape(len(mask), -1).sum(1)
        else:
            kept = batch["attention_mask"].bool()  # (B, T)
            states = enumerate(signal)
            found = {f"states.{n}": state[kept.to(state.device)].half() for n, state in states}  # (tokens, D)
            counts = kept.sum(1)
        if bad := next((name for name, values in found.items() if not bool(torch.isfinite(values).all())), None):
            raise TrainingError(
                f"the teacher gives {bad} that are not finite (or too large for float16): load it in float32 or "
                "bfloat16, look at the data, or pass cache=False"
            )
        return {name: values.cpu() for name, values in found.items()}, counts.cpu()

    def _top(self, logits: Tensor) -> dict[str, Tensor]:
        """Keeps the top of ``(P, C)`` in half precision: of a log-probability, the likely ones keep most digits."""
        k = min(DEFAULT_TOP_K, logits.shape[-1]) if self.top_k is None else self.top_k
        parts = [top_k_distribution(p, k, temperature=self.plan.temperature) for p in logits.split(_POSITIONS)]
        return {
            "log_probabilities": torch.cat([part.log_probabilities.half() for part in parts]),  # (P, k)
            "indices": torch.cat([part.indices.int() for part in parts]),  # (P, k)
            "log_tail": torch.cat([part.log_tail for part in parts]),  # (P,)
        }


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}


def restored_signal(rows: Mapping[str, Tensor], attention_mask: Tensor) -> Signal | TopK:
    """Makes what a distillation compares out of the rows of a batch.

    Args:
        rows: of all examples behind one another.
        attention_mask: ``(B, T)``.

    Returns:
        The kept top of logits ``(P, k)`` of the scored positions, embeddings ``(B, D)``, or states ``(B, T, D)`` that
        are 0 at padding.
    """
    if "indices" in rows:
        return TopK(rows["log_probabilities"], rows["indices"], rows["log_tail"])
    if "embeddings" in rows:
        return rows["embeddings"]
    states = []
    for number in range(len(rows)):
        values = rows[f"states.{number}"].float()  # (tokens, D)
        state = values.new_zeros(*attention_mask.shape, values.shape[-1])  # (B, T, D)
        state[attention_mask.bool()] = values
        states.append(state)
    return tuple(states)


def _claim(folder: Path, identity: CacheIdentity, *, sizes: Mapping[str, int | None]) -> None:
    """Notes in an empty folder what the cache is of, or refuses one of something else."""
    file = folder / CACHE_FILE
    if not file.is_file():
        described = {"teacher": identity.teacher, "data": identity.data, "settings": dict(identity.settings)}
        write_json(file, {"format": _FORMAT, **described, **sizes})
        return
    found = read_json(file)
    try:
        other = CacheIdentity(found["teacher"], found["data"], found["settings"])
    except KeyError as error:
        raise CheckpointError(f"{file} describes no teacher cache: {error!r} is missing") from error
    if difference := other.difference(identity):
        raise CheckpointError(f"{folder} holds a teacher cache of {difference}; give another folder, or delete it")


def _shard(reader: SignalReader, features: Sequence[Feature], *, pad: Padder, batch_size: int) -> dict[str, Tensor]:
    """Rows of some examples in their order, though examples of similar length share a batch."""
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    parts: list[dict[str, Tensor]] = [{} for _ in features]
    counts = torch.zeros(len(features), dtype=torch.long)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows, sizes = reader.rows(pad([features[index] for index in chosen]))
        split = {name: values.split(sizes.tolist()) for name, values in rows.items()}
        for place, index in enumerate(chosen):
            parts[index] = {name: pieces[place] for name, pieces in split.items()}
            counts[index] = sizes[place]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**found, "counts": counts}


def _write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), aside)
        os.replace(aside, file)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot write {file}: {reason}; free space or give another folder") from error
    finally:
        with suppress(OSError):
            aside.unlink()
