"""Latency in the runtime that a model is deployed in: measured on what was exported, in turns, the median stated.

A supernet is timed in torch, and torch's order of architectures need not be a runtime's. Here an architecture is
extracted, exported to a temporary folder and timed in its runtime, in rounds with the largest one.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_elastic.checkpoint.extraction import extract
from hf_elastic.cost_objectives import first_use, related_costs
from hf_elastic.costs import Latency
from hf_elastic.errors import DataError
from hf_elastic.kept_memory import steady_memory
from hf_elastic.runtimes.graph_folder import RUNTIME_FILE, Batch, GraphOptions, export_graph
from hf_elastic.runtimes.graphs import Int8
from hf_elastic.runtimes.opening import open_config, open_model, require_package, require_positions
from hf_elastic.runtimes.runtime_model import WRITERS, RuntimeModel, open_runtime
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.latencies import shape_digest
from hf_elastic.tables.timing import MOST_ROUNDS, Rounds, Setting, Timer, enough_rounds, typical, wall_clock

Runtime = Literal["onnx", "openvino"]
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",),
}  # fmt: skip
_SHORTER = "pass a shorter length="


@dataclass(frozen=True)
class RuntimeSetting:
    """What a latency in a runtime depends on besides the model.

    Attributes:
        batch_size: sequences.
        length: tokens of each.
        threads: that the runtime uses.
        software: runtimes with their versions.
        device: kind and name of the processor.
    """

    batch_size: int
    length: int
    threads: int
    software: str
    device: str = "cpu"

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"prefill of {self.batch_size}x{self.length} tokens, {threads}, {self.software}"

    def feed(self) -> dict[str, np.ndarray]:
        """Token ids without padding, ``(B, T)``."""
        ids = np.arange(self.length, dtype=np.int64) % 20 + 3
        return {"input_ids": np.broadcast_to(ids, (self.batch_size, self.length)).copy()}


def measure_folders(
    folders: Mapping[str, str | Path | PreTrainedModel | RuntimeModel],
    *,
    batch_size: int = 1,
    length: int = 128,
    threads: int | None = None,
    rounds: int = MOST_ROUNDS,
    seconds: float = 20.0,
    timer: Timer = wall_clock,
) -> dict[str, Latency]:
    """Times models against each other, each in its runtime: in rounds, in alternating order, so that drift hits all.

    Args:
        folders: by name. What was exported for a runtime is timed there, any other checkpoint in torch.
        batch_size: sequences.
        length: tokens of each.
        threads: of torch and of each runtime that is opened here; by default those that torch has now. An opened
            :class:`RuntimeModel` keeps its own.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three.
        timer: runs a call and returns its seconds.

    Raises:
        CheckpointError: a folder cannot be loaded.
        ExportError: a runtime is not installed, or a folder holds no model that stands for itself.
        DataError: a model has no positions for so many tokens.
    """
    setting = RuntimeSetting(batch_size, length, threads or torch.get_num_threads(), "")
    calls = [_call(model, setting) for model in folders.values()]
    with _torch_threads(setting.threads):
        times = _timed(calls, rounds=rounds, seconds=seconds, timer=timer)
    return {name: Latency(statistics.median(column), column) for name, column in zip(folders, times, strict=True)}


def _call(model: str | Path | PreTrainedModel | RuntimeModel, setting: RuntimeSetting) -> Callable[[], object]:
    """A forward in the setting."""
    feed = setting.feed()
    if isinstance(model, str | Path) and (Path(model) / RUNTIME_FILE).is_file():
        require_positions(open_config(Path(model)), setting.length, cure=_SHORTER)
        model = open_runtime(model, threads=setting.threads)
    if isinstance(model, RuntimeModel):
        opened = model
        return lambda: opened(**feed)
    plain = open_model(model)
    require_positions(plain.config, setting.length, cure=_SHORTER)
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])  # as a runtime gets one, too

    def forward() -> object:
        with torch.inference_mode():
            return plain(**tensors)

    return forward


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Lets torch use so many threads on the CPU, as a runtime is told to; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@steady_memory()
def _timed(
    calls: Sequence[Callable[[], object]], *, rounds: int, seconds: float, timer: Timer
) -> list[tuple[float, ...]]:
    """Seconds of each call in each round."""
    forwards: Any = calls
    turns = Rounds(forwards, timer=timer)
    found: list[list[float]] = []
    while not enough_rounds(len(found), spent=turns.spent, seconds=seconds, rounds=rounds):
        found.append(turns.round())
    return list(zip(*found, strict=True))


def runtime_latency(
    supernet: Supernet,
    *,
    runtime: Runtime = "onnx",
    batch_size: int = 1,
    seq_len: int | None = None,
    int8: Int8 | None = None,
    calibration: Iterable[Batch] | None = None,
    threads: int | None = None,
    rounds: int = 5,
    reference: float | None = None,
    timer: Timer = wall_clock,
) -> Objective:
    """Seconds of a forward of the exported architecture in its runtime; smaller is better.

    Each evaluation extracts and exports (seconds for a small model), then times the graph in turns with that of the
    largest architecture. The value is the ratio of the two, times ``reference``: a machine that slows down between two
    evaluations does not change their order.

    Args:
        supernet: unchanged.
        runtime: where it is measured, on the CPU.
        batch_size: sequences.
        seq_len: tokens of each; by default 128, or fewer where the model has fewer positions.
        int8: as in :func:`export_onnx`.
        calibration: batches for ``int8="static"``.
        threads: of the runtime; by default torch's.
        rounds: that are timed.
        reference: seconds that the largest architecture counts for. By default what it takes at first use in this
            process, which is another number in every other one: a search in a storage, or with an executor, then
            refuses the objective. Give it one number everywhere, such as the value that this objective has of
            ``supernet.space.largest()``, measured once.
        timer: runs a call and returns its seconds.

    Raises:
        ExportError: the runtime is not installed.
        DataError: the runtime is unknown, the model has no positions for so many tokens, or ``reference`` is no
            positive number.
        UnsupportedModelError: the model has adapters or routers, whose architectures are no graphs of their own.
    """
    if runtime not in get_args(Runtime):
        raise DataError(f"runtime={runtime!r} is not one of {', '.join(get_args(Runtime))}")
    require_package(*_PACKAGES[runtime], extra=runtime)
    supernet.require_plain("runtime_latency")
    if reference is not None and not (isinstance(reference, int | float) and 0 < reference < math.inf):
        raise DataError(f"reference={reference!r} must be the seconds of the largest architecture, above 0")
    software = ", ".join(f"{name} {version(name)}" for name in _PACKAGES[runtime])
    here = Setting.of(supernet, batch_size=batch_size, length=seq_len, device="cpu")
    setting = RuntimeSetting(
        here.batch_size, here.length, threads or torch.get_num_threads(), software, device=here.device
    )
    options = GraphOptions(int8, None if calibration is None else list(calibration))
    scaled_by = None if reference is None else float(reference)
    said = repr((runtime, asdict(setting), int8, shape_digest(supernet), scaled_by))
    identity = hashlib.sha256(said.encode()).hexdigest()
    pair = _Pair(supernet, runtime, setting, options=options, rounds=rounds, timer=timer)

    def measured(architecture: Architecture) -> float:
        own, whole = pair(architecture)
        return own / whole * (first_use(identity, whole) if reference is None else reference)

    return Objective(
        f"{runtime}_latency",
        measured,
        unit="s",
        related=lambda: related_costs(supernet),
        fingerprint=identity,
        portable=reference is not None,
    )


class _Pair:
    """Seconds of architectures, each beside those of the largest one that was timed in turns with it."""

    def __init__(
        self,
        supernet: Supernet,
        runtime: Runtime,
        setting: RuntimeSetting,
        *,
        options: GraphOptions,
        rounds: int,
        timer: Timer,
    ) -> None:
        self._supernet, self._runtime, self._setting = supernet, runtime, setting
        self._options, self._rounds, self._timer = options, rounds, timer
        self._largest: RuntimeModel | None = None

    def __call__(self, architecture: Architecture) -> tuple[float, float]:
        """Seconds of the architecture, and of the largest."""
        if self._largest is None:
            self._largest = self._opened(self._supernet.space.largest())
        calls = [_call(model, self._setting) for model in (self._largest, self._opened(architecture))]
        whole, own = _timed(calls, rounds=self._rounds, seconds=float("inf"), timer=self._timer)
        return typical(own), typical(whole)

    def _opened(self, architecture: Architecture) -> RuntimeModel:
        model = extract(self._supernet, architecture)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            export_graph(WRITERS[self._runtime], model, Path(folder) / "graph", options=self._options)
            return open_runtime(Path(folder) / "graph", threads=self._setting.threads)
