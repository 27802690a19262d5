"""Times forwards of ordinary models against each other in one setting: prefill, or one step of decoding."""

from __future__ import annotations

import inspect
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_elastic.architecture import is_finite
from hf_elastic.costs import LATENCY_TOKENS, Latency, synchronise
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.kept_memory import keeps_memory, steady_memory
from hf_elastic.supernet import Supernet

Phase = Literal["prefill", "decode"]
Timer = Callable[[Callable[[], object]], float]
"""Runs a call to its end and returns how many seconds that took."""

AnyTimedTable = TypeVar("AnyTimedTable", bound="TimedTable")

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
NOISY = 0.15
"""Differences between rounds from which a latency table is not to be trusted."""
_PATIENCE = 3  # times the seconds that rounds go on for on a noisy machine: it switches between fast and slow
_SHORT = 0.1  # seconds: before a shorter forward the same one runs untimed, so that it finds its own weights in caches


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the model.

    Attributes:
        batch_size: sequences.
        length: tokens of the prompt, or with ``decode`` tokens that the KV cache holds.
        phase: ``prefill`` is one forward over ``(batch_size, length)`` tokens, of a model that generates with the
            logits of the last token only, as ``generate`` asks for them; ``decode`` is one new token per sequence.
        dtype: of the weights.
        device: kind and name of the processor.
        threads: that torch uses on a CPU; 0 on a GPU.
        software: versions.
    """

    batch_size: int
    length: int
    phase: Phase
    dtype: str
    device: str
    threads: int
    software: str

    @classmethod
    def of(
        cls,
        supernet: Supernet,
        *,
        batch_size: int = 1,
        length: int | None = None,
        phase: Phase = "prefill",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Setting:
        """The setting of this process.

        Args:
            supernet: for its positions, and its device and dtype where none are given.
            batch_size: at least 1.
            length: by default 128, or fewer where the model has fewer positions.
            phase: what is timed.
            device: by default the model's.
            dtype: by default the model's.

        Raises:
            DataError: the model cannot run in it.
        """
        if phase not in get_args(Phase):
            raise DataError(f"phase={phase!r} is not one of {', '.join(get_args(Phase))}")
        if phase == "decode" and not supernet.model.can_generate():
            raise DataError(f"a {type(supernet.model).__name__} does not generate, so it has no decode; use prefill")
        if type(batch_size) is not int or batch_size < 1:
            raise DataError(f"batch_size={batch_size!r} must be an integer of at least 1")
        tokens = fitting_length(supernet, length, new=int(phase == "decode"))
        where = torch.device(supernet.model.device if device is None else device)
        kind = str(supernet.model.dtype if dtype is None else dtype).removeprefix("torch.")
        return cls(batch_size, tokens, phase, kind, *_processor(where), _software())

    @property
    def sound(self) -> bool:
        """Whether its fields are what they should be, once it is read from a file."""
        words = (self.phase, self.dtype, self.device, self.software)
        numbers = (self.batch_size, self.length, self.threads)
        return all(isinstance(word, str) for word in words) and all(type(number) is int for number in numbers)

    def difference(self, other: Setting) -> str:
        """Says in words where another setting differs; empty when it does not."""
        pairs = [(name, value, getattr(other, name)) for name, value in asdict(self).items()]
        return ", ".join(f"{name} {mine!r} and not {theirs!r}" for name, mine, theirs in pairs if mine != theirs)

    def __str__(self) -> str:
        what = "prefill" if self.phase == "prefill" else "decode of one token with a cache"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{what} of {self.batch_size}x{self.length} tokens in {self.dtype} on {self.device}{threads}"


def fitting_length(supernet: Supernet, length: int | None, *, new: int = 0) -> int:
    """A length in tokens; ``None`` becomes 128, or fewer where the model has fewer positions.

    Args:
        supernet: for its positions.
        length: as it was asked for.
        new: tokens that need positions behind it.

    Raises:
        DataError: it is no positive integer, or more than the model has positions for.
    """
    config = supernet.model.config
    reserved = int(config.pad_token_id or 0) + 1 if config.model_type == "roberta" else 0
    room = int(getattr(config, "max_position_embeddings", 2**31)) - reserved - new
    tokens = min(LATENCY_TOKENS, room) if length is None else length
    if type(tokens) is not int or tokens < 1:
        raise DataError(f"length={tokens!r} must be an integer of at least 1")
    if tokens > room:
        raise DataError(f"length={tokens} is more than the model has positions for: at most {room}")
    return tokens


def _processor(device: torch.device) -> tuple[str, int]:
    """Kind and name of a processor, and the threads that decide about its speed."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}", 0
    if device.type != "cpu":
        return device.type, 0
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu {names[0] if names else platform.processor() or platform.machine()}", torch.get_num_threads()


def _software() -> str:
    """What decides about times besides the device; tables that were timed with memory given back are other ones."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return ", ".join([*versions, *(["memory kept"] if keeps_memory() else [])])


class CachePool:
    """Memory that the KV caches of several models share; their contents do not matter, and no forward changes them."""

    def __init__(self) -> None:
        self._flat: dict[tuple[int, str], Tensor] = {}

    def view(self, place: tuple[int, str], shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        """Memory of one layer's keys or values, ``(B, K, T, head_dim)``."""
        size = torch.Size(shape).numel()
        flat = self._flat.get(place)
        if flat is None or len(flat) < size:
            flat = self._flat[place] = torch.full((size,), 0.1, dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)


class Forward:
    """One forward of a model in a setting; calling it runs it.

    Args:
        model: compact, in evaluation mode.
        setting: what to run; its device is where the model is.
        pool: memory for the KV cache.
    """

    def __init__(self, model: PreTrainedModel, setting: Setting, *, pool: CachePool | None = None) -> None:
        self.model, self.setting = model, setting
        self._options: dict[str, Any] = {}
        self._caches: list[tuple[Any, dict[str, Any]]] = []
        tokens = setting.length if setting.phase == "prefill" else 1
        # (B, T); for multiple choice (B, 1, T)
        ids = torch.arange(tokens).remainder(min(int(model.config.vocab_size), 100) - 3).add(3)
        choices = (1,) if type(model).__name__.endswith("MultipleChoice") else ()
        self._ids = ids.expand(setting.batch_size, *choices, tokens).contiguous().to(model.device)
        if model.can_generate() and "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1
        if setting.phase == "decode":
            self._fill(pool or CachePool())

    def _fill(self, pool: CachePool) -> None:
        """Makes a cache of ``length`` tokens out of that of one token: what it holds does not decide about time."""
        cache, length = DynamicCache(config=self.model.config), self.setting.length
        with torch.inference_mode():
            self.model(input_ids=self._ids, past_key_values=cache, use_cache=True, **self._options)
            layers: list[Any] = cache.layers
            for number, layer in enumerate(layers):
                for name in ("keys", "values"):
                    one = getattr(layer, name)  # (B, K, 1, head_dim)
                    kept = min(length, layer.sliding_window - 1) if layer.is_sliding else length
                    shape = (*one.shape[:2], kept, one.shape[3])
                    setattr(layer, name, pool.view((number, name), shape, like=one))
                if layer.is_sliding:
                    layer.cumulative_length = length
                self._caches.append((layer, dict(vars(layer))))
        self._options |= {"past_key_values": cache, "use_cache": True}

    def __call__(self) -> object:
        for layer, before in self._caches:  # a layer's update makes new tensors and leaves these alone
            vars(layer).update(before)
        with torch.inference_mode():
            return self.model(input_ids=self._ids, **self._options)


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's part included."""
    device = call.model.device if isinstance(call, Forward) else None
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


class Rounds:
    """Times forwards in rounds, each once a round and in alternating order, so that drift hits all alike.

    Args:
        forwards: what to time.
        timer: how.

    Attributes:
        spent: seconds in forwards so far, those not counted included.
    """

    def __init__(self, forwards: Sequence[Forward], *, timer: Timer) -> None:
        self._forwards, self._timer = forwards, timer
        self.spent = 0.0
        self._twice = [self._timed(forward) < _SHORT for forward in forwards]  # warms up, too
        self._backwards = False

    def round(self) -> list[float]:
        """Seconds of every forward, in their order."""
        found = [0.0] * len(self._forwards)
        places = range(len(found))
        for place in reversed(places) if self._backwards else places:
            if self._twice[place]:
                self._timed(self._forwards[place])
            found[place] = self._timed(self._forwards[place])
        self._backwards = not self._backwards
        return found

    def _timed(self, forward: Forward) -> float:
        seconds = self._timer(forward)
        self.spent += seconds
        return seconds


def typical(times: Sequence[float]) -> float:
    """Mean of the faster half of the times: what interrupts a forward only ever adds to it.

    On a machine that did other work as well, two copies of one model, timed in turns, differed by 2 % in it after
    eight rounds, by 4 % in their medians.
    """
    return statistics.fmean(sorted(times)[: (len(times) + 1) // 2])


def enough_rounds(done: int, *, spent: float, seconds: float, rounds: int = MOST_ROUNDS) -> bool:
    """Whether to stop: all rounds done, or the time spent, but never before three rounds."""
    return done >= max(rounds, LEAST_ROUNDS) or (done >= LEAST_ROUNDS and spent >= seconds)


def noise_of(rounds: Sequence[Sequence[float]]) -> float:
    """By how much the median of a model's rounds is above the fastest, typically."""
    columns = [sorted(seconds) for seconds in zip(*rounds, strict=True)]
    return statistics.median(statistics.median(column) / column[0] - 1 for column in columns)


class TimedTable(Protocol):
    """A table that keeps rounds: a frozen dataclass.

    Attributes:
        setting: where and how it was measured.
        model: digest of what was measured.
        rounds: seconds of each model, by round.
        spent: seconds spent in forwards.
        finished: whether all rounds are done.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def setting(self) -> Setting: ...

    @property
    def model(self) -> str: ...

    @property
    def rounds(self) -> tuple[tuple[float, ...], ...]: ...

    @property
    def spent(self) -> float: ...

    @property
    def finished(self) -> bool: ...

    def save(self, path: str | Path) -> None: ...


TIMED_READERS: Mapping[str, Callable[[Any], object]] = {
    "setting": lambda setting: Setting(**setting),
    "rounds": lambda rounds: tuple(map(tuple, rounds)),
}
"""How :func:`hf_elastic.tables.stored.read_table` makes the fields of any such table."""


def sound_rounds(table: TimedTable, *, models: int) -> bool:
    """Whether a table that was read holds what it should of so many models."""
    times = [seconds for found in table.rounds for seconds in found]
    return (
        all(len(found) == models for found in table.rounds)
        and all(type(seconds) is float and 0 < seconds < math.inf for seconds in times)
        and type(table.finished) is bool
        and is_finite(table.spent)
        and table.setting.sound
        and isinstance(table.model, str)
        and (bool(table.rounds) or not table.finished)
    )


def require_finished(table: TimedTable, *, measured_by: str) -> None:
    """Checks that all rounds are done.

    Raises:
        CheckpointError: they are not; it says what to call.
    """
    if not table.finished:
        raise CheckpointError(
            f"the latency table was interrupted after {len(table.rounds)} rounds; call {measured_by} with its path to "
            "go on"
        )


def timed_in_rounds(
    table: AnyTimedTable,
    timed: Rounds,
    *,
    rounds: int,
    seconds: float,
    path: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> AnyTimedTable:
    """Adds rounds to a table until there are enough of them.

    Args:
        table: with the rounds that there are.
        timed: what gives further ones.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three. Where rounds differ by more
            than :data:`NOISY`, up to three times as long: of a model that met the machine at its best more often than
            another one did, the time would be too good.
        path: keeps each round.
        progress: called with the rounds done and to be done, as it looks now.
    """
    tell, most, before = progress or (lambda done, total: None), max(rounds, 1), table.spent
    while not table.finished:
        found = (*table.rounds, tuple(timed.round()))
        spent = before + timed.spent
        allowed = seconds * (_PATIENCE if len(found) >= LEAST_ROUNDS and noise_of(found) > NOISY else 1)
        done = enough_rounds(len(found), spent=spent, seconds=allowed, rounds=most)
        table = replace(table, rounds=found, spent=spent, finished=done)
        if path is not None:
            table.save(path)
        likely = min(most, max(LEAST_ROUNDS, math.ceil(allowed * len(found) / spent)))
        tell(len(found), len(found) if done else max(likely, len(found) + 1))
    return table


@steady_memory()
def measure_models(
    models: Mapping[str, PreTrainedModel],
    setting: Setting,
    *,
    rounds: int = MOST_ROUNDS,
    seconds: float = 20.0,
    timer: Timer = wall_clock,
) -> dict[str, Latency]:
    """Measures ordinary models against each other, as a latency table does; what a prediction is held against.

    Args:
        models: by name, in evaluation mode: a parent and what was exported, for instance.
        setting: of a table, or :meth:`Setting.of`.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three.
        timer: runs a call and returns its seconds.

    Raises:
        CheckpointError: the setting is not that of this process, or of a model.
    """
    for name, model in models.items():
        require_setting(setting, model, name=name)
    timed = Rounds([Forward(model, setting) for model in models.values()], timer=timer)
    found: list[list[float]] = []
    while not enough_rounds(len(found), spent=timed.spent, seconds=seconds, rounds=rounds):
        found.append(timed.round())
    return {
        name: Latency(statistics.median(times), times)
        for name, times in zip(models, zip(*found, strict=True), strict=True)
    }


def require_setting(setting: Setting, model: PreTrainedModel, *, name: str) -> None:
    """Checks that a model here and now runs in a setting.

    Raises:
        CheckpointError: it does not.
    """
    device, threads = _processor(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    here = Setting(setting.batch_size, setting.length, setting.phase, dtype, device, threads, _software())
    if difference := setting.difference(here):
        raise CheckpointError(f"the setting does not fit {name}: it says {difference}; measure a table here")


def require_measured_here(found: Setting, wanted: Setting, *, path: str | Path) -> None:
    """Checks that a table that was read goes on in the setting that is asked for.

    Raises:
        CheckpointError: it was measured in another one.
    """
    if difference := found.difference(wanted):
        raise CheckpointError(
            f"{path} was measured with {difference}; use it where it was made, delete it, or choose another file"
        )


def speedup(parent: Latency, other: Latency) -> float:
    """How many times faster another model is than its parent, measured with it: ratio of their typical times."""
    return typical(parent.samples) / typical(other.samples)
