"""Budgets people think in: a speed-up, a latency, memory; the limits they are for a model, and whether they were met.

A budget never rounds a width. Which widths there are to choose from is for the space to say: with
``ElasticConfig(multiple_of=32)`` (or 64 on a GPU with tensor cores) all of them are sizes that the hardware likes, and
a latency table measures those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from hf_elastic import costs
from hf_elastic.blocks import BlockPart
from hf_elastic.errors import CheckpointError, DataError, InfeasibleError, SpaceError
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.search import Objective
from hf_elastic.search.limits import resolve_limits
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.latencies import NANOSECONDS, LatencyTable
from hf_elastic.tables.timing import Phase, fitting_length

LATENCY, MEMORY = "predicted_latency", "memory"
"""Names of the objectives that budgets become limits on."""
MARGIN = 0.03
"""How much faster than asked for a search aims: it goes to the edge of a limit, and a prediction errs both ways."""

_SECONDS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 10**3), "s": Fraction(1)}
_BYTES = {"KB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
_NUMBER = r"(\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})"


@dataclass(frozen=True)
class Workload:
    """What runs at once.

    Attributes:
        batch_size: sequences.
        length: tokens of each; ``None`` is 128, or fewer where the model has fewer positions.
    """

    batch_size: int = 1
    length: int | None = None

    def fitted(self, supernet: Supernet, *, new: int = 0) -> Workload:
        """The same with its length spelled out for a model, which has ``new`` more tokens to come."""
        return Workload(self.batch_size, fitting_length(supernet, self.length, new=new))

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.length or costs.LATENCY_TOKENS}"


@dataclass(frozen=True)
class Verdict:
    """Whether one budget was met.

    Attributes:
        budget: its name as it was asked for.
        met: whether what was measured keeps it.
        sentence: the same in words, with what to do if not.
    """

    budget: str
    met: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Budgets:
    """What a model may cost. All of it has to be kept.

    Attributes:
        speedup: how many times faster than its parent, above 1.
        latency: seconds of a forward.
        memory: bytes of the weights in the dtype they are exported in, and of the KV cache; activations are not in it.
        within: limits by name of a cost; a float up to 1 is a fraction of the parent's.
        phase: of ``speedup`` and ``latency``: ``prefill`` or ``decode``.
        timed: the workload of ``speedup`` and ``latency``.
        held: the workload of ``memory``.

    Raises:
        SpaceError: a number makes no sense.
    """

    speedup: float | None = None
    latency: float | None = None
    memory: int | None = None
    within: Mapping[str, float] = field(default_factory=dict)
    phase: Phase = "prefill"
    timed: Workload = Workload()
    held: Workload = Workload()

    def __post_init__(self) -> None:
        for name, least in (("speedup", 1), ("latency", 0), ("memory", 0)):
            value = getattr(self, name)
            if value is not None and not (least < value < math.inf):
                raise SpaceError(f"{name}={value!r} must be a number above {least}")
        if both := sorted({LATENCY, MEMORY}.intersection(self.within)):
            raise SpaceError(f"within names {', '.join(both)}, which are budgets of their own: --latency and --memory")

    @classmethod
    def parse(
        cls,
        *,
        speedup: str | None = None,
        latency: str | None = None,
        memory: str | None = None,
        within: Mapping[str, float] | None = None,
        phase: Phase = "prefill",
    ) -> Budgets:
        """Reads budgets as they are typed; ``@BATCHxTOKENS`` may stand behind each of the first three.

        Args:
            speedup: ``"1.7"`` or ``"1.7@16x128"``.
            latency: ``"8ms"`` or ``"8ms@16x128"``; in us, ms or s.
            memory: ``"6GB"`` or ``"6GB@8x2048"``; in MB, MiB, GB or GiB.
            within: limits on costs.
            phase: of speed-up and latency.

        Raises:
            SpaceError: one is not of its form, or speed-up and latency are of different workloads.
        """
        times, first = _parsed(speedup, {"": 1}, example="1.7 or 1.7@16x128", name="speedup")
        seconds, second = _parsed(latency, _SECONDS, example="8ms or 8ms@16x128", name="latency")
        size, held = _parsed(memory, _BYTES, example="6GB or 6GB@8x2048", name="memory")
        if first and second and first != second:
            raise SpaceError(f"speedup is for {first} and latency for {second}; one run measures one workload")
        return cls(
            None if times is None else float(times),
            None if seconds is None else float(seconds),
            None if size is None else math.floor(size),  # a part of a byte cannot be used
            dict(within or {}),
            phase,
            first or second or Workload(),
            held or Workload(),
        )

    @property
    def needs_table(self) -> bool:
        """Whether :meth:`limits` needs a latency table, for the workload :attr:`timed` in :attr:`phase`."""
        return self.speedup is not None or self.latency is not None

    def limits(
        self,
        supernet: Supernet,
        table: LatencyTable | None = None,
        *,
        dtype: torch.dtype | None = None,
        margin: float = MARGIN,
    ) -> dict[str, float]:
        """What a search is to keep: ``within=`` by name of a cost (:func:`hf_elastic.objectives.budget_costs`).

        Args:
            supernet: the space to search.
            table: measured for :attr:`timed` and :attr:`phase`; needed where :attr:`needs_table`.
            dtype: of the export; by default the model's.
            margin: how much faster than asked for the search aims.

        Raises:
            InfeasibleError: not even the smallest architecture keeps a budget; the message says what is reachable.
            CheckpointError: the table is of another model or workload, or missing.
        """
        found = dict(self.within)
        if self.needs_table:
            kind = dtype or supernet.model.dtype
            found[LATENCY] = self._nanoseconds(supernet, self._checked(supernet, table, dtype=kind), margin=margin)
        if self.memory is not None:
            low, high = (
                memory_bytes(supernet, point, workload=self.held, dtype=dtype)
                for point in (supernet.space.smallest(), supernet.space.largest())
            )
            if low > self.memory:
                where = self.held.fitted(supernet)
                raise InfeasibleError(
                    f"{_sized(self.memory)} of memory at {where} cannot be reached: the space"
                    f"{_if_without_layers(supernet)} goes from {_sized(low)} to {_sized(high)}; allow more, or widen "
                    "the space"
                )
            found[MEMORY] = self.memory
        return found

    def _checked(self, supernet: Supernet, table: LatencyTable | None, *, dtype: torch.dtype) -> LatencyTable:
        if table is None:
            raise CheckpointError("a speed-up or a latency needs a latency table; call measure_latency_table first")
        table.require(supernet)
        setting = table.setting
        wanted = self.timed.fitted(supernet, new=int(self.phase == "decode"))
        if (setting.batch_size, setting.length, setting.phase) != (wanted.batch_size, wanted.length, self.phase):
            raise CheckpointError(
                f"the latency table is for {setting}, the budget for {self.phase} of {wanted}; measure one for it"
            )
        if setting.dtype != str(dtype).removeprefix("torch."):
            raise CheckpointError(
                f"the latency table is for {setting.dtype}, the export will be in {dtype}; measure one with that dtype"
            )
        return table

    def _nanoseconds(self, supernet: Supernet, table: LatencyTable, *, margin: float) -> int:
        """The latency that a search may use up."""
        parent, targets = table.parent, []
        if self.speedup is not None:
            targets.append(parent / self.speedup)
        if self.latency is not None:
            targets.append(self.latency)
        fastest = table.predict(supernet, supernet.space.smallest())
        aim = min(targets) / (1 + margin)
        if fastest > aim:
            raise InfeasibleError(
                f"{self._timed_words()} cannot be reached (aiming {margin:.0%} faster): the space"
                f"{_if_without_layers(supernet)} goes from {1e3 * fastest:.3g} ms, {parent / fastest:.3g} times "
                f"faster, to the parent's {1e3 * parent:.3g} ms for {table.setting}; ask for less, or widen the space"
            )
        return math.floor(NANOSECONDS * aim)

    def _timed_words(self) -> str:
        asked = [] if self.speedup is None else [f"a speed-up of {self.speedup:g}"]
        asked += [] if self.latency is None else [f"a latency of {1e3 * self.latency:g} ms"]
        return " and ".join(asked)

    def check(
        self,
        supernet: Supernet,
        architecture: Architecture,
        *,
        known: Mapping[str, Objective],
        seconds: float | None = None,
        parent_seconds: float | None = None,
        weight_bytes: int | None = None,
        predicted: tuple[float, float] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Verdict, ...]:
        """Compares what was exported with each budget, without any margin.

        Args:
            supernet: where it was exported from.
            architecture: what was exported.
            known: the costs that ``within`` names.
            seconds, parent_seconds: typical times of the exported model and of its parent, measured against each other
                (:func:`~hf_elastic.tables.timing.measure_models`); needed for a speed-up or a latency.
            weight_bytes: of the exported model; needed for memory.
            predicted: its speed-up and its seconds by the table, from which follows what to ask for after a miss.
            dtype: of its KV cache; by default the supernet's.

        Raises:
            DataError: a measurement is missing.
        """
        found, where = [], f"{self.phase} of {self.timed.fitted(supernet, new=int(self.phase == 'decode'))}"
        if self.speedup is not None:
            ratio = _given(parent_seconds, "parent_seconds") / _given(seconds, "seconds")
            found.append(_speedup_verdict(self.speedup, ratio, where=where, predicted=predicted and predicted[0]))
        if self.latency is not None:
            taken = _given(seconds, "seconds")
            found.append(_latency_verdict(self.latency, taken, where=where, predicted=predicted and predicted[1]))
        if self.memory is not None:
            cache = _cache_bytes(supernet, architecture, workload=self.held, itemsize=_itemsize(supernet, dtype))
            size = int(_given(weight_bytes, "weight_bytes")) + cache
            found.append(_memory_verdict(self.memory, size, where=str(self.held.fitted(supernet))))
        for limit in resolve_limits(self.within, known, supernet.space):
            value = known[limit.name](architecture)
            words = f"{limit.name} <= {costs.count(limit.bound)}: it is {costs.count(value)}"
            if not limit.allows(value):
                words += f", missed by {limit.excess(value):.1%}; search again with this limit"
            found.append(Verdict(limit.name, limit.allows(value), words))
        return tuple(found)


def _if_without_layers(supernet: Supernet) -> str:
    """What has to be said of the reach of a space whose smallest architecture has no layer, which no run takes."""
    shapes = supernet.layer_shapes(supernet.space.smallest())
    return ", with no layer left," if shapes and all(shape.skipped for shape in shapes) else ""


def _speedup_verdict(wanted: float, ratio: float, *, where: str, predicted: float | None) -> Verdict:
    words = f"speed-up {wanted:g} for {where}: measured {ratio:.3g}"
    if ratio >= wanted:
        return Verdict("speedup", True, words)
    again = math.ceil(round(100 * wanted * (predicted or wanted) / ratio, 6)) / 100
    words += f", missed by {1 - ratio / wanted:.1%}; ask for --speedup {again:g}, of this run with hf-elastic family"
    return Verdict("speedup", False, words)


def _latency_verdict(wanted: float, seconds: float, *, where: str, predicted: float | None) -> Verdict:
    words = f"latency {1e3 * wanted:g} ms for {where}: measured {1e3 * seconds:.3g} ms"
    if seconds <= wanted:
        return Verdict("latency", True, words)
    again = f"--latency {1e3 * wanted * (predicted or wanted) / seconds:.3g}ms"
    return Verdict("latency", False, f"{words}, missed by {seconds / wanted - 1:.1%}; ask for {again}")


def _memory_verdict(wanted: int, size: int, *, where: str) -> Verdict:
    words = f"memory {_sized(wanted)} at {where}: weights and cache take {_sized(size)}"
    if size <= wanted:
        return Verdict("memory", True, words)
    words += (
        f", missed by {size / wanted - 1:.1%}; was it exported padded, or in another dtype than it was searched for?"
    )
    return Verdict("memory", False, words)


def _given(value: float | None, name: str) -> float:
    if value is None or not value > 0:
        raise DataError(f"a budget is checked against {name}, got {value!r}; measure the exported model")
    return value


def memory_bytes(
    supernet: Supernet,
    architecture: Architecture,
    *,
    workload: Workload | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes of the exported weights and of the KV cache at a workload; no activations, no buffers.

    The sum over layers that exact search adds up: of an architecture without any layer the cache counts as nothing,
    while its one remaining layer writes two numbers per token (:func:`hf_elastic.costs.kv_cache_bytes`).

    Args:
        supernet: the handle.
        architecture: of its space.
        workload: by default one sequence of 128 tokens.
        dtype: of the export and of the cache; by default the model's.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        DataError: the workload is longer than the model has positions for.
    """
    itemsize = _itemsize(supernet, dtype)
    cache = _cache_bytes(supernet, architecture, workload=workload or Workload(), itemsize=itemsize)
    return itemsize * costs.total_parameters(supernet, architecture) + cache


def layer_memory(
    supernet: Supernet, part: LayerPart, shape: LayerShape, *, workload: Workload, dtype: torch.dtype | None = None
) -> int:
    """What a layer in a shape adds to :func:`memory_bytes`, up to a constant: less than the whole layer, its cache."""
    itemsize = _itemsize(supernet, dtype)
    cache = _layer_cache(supernet, part, shape, workload=workload)
    return itemsize * (cache - costs.removed_parameters(part, shape))


def block_memory(
    supernet: Supernet, part: BlockPart, block: str, *, workload: Workload, dtype: torch.dtype | None = None
) -> int:
    """What a candidate block adds to :func:`memory_bytes`, its cache included."""
    cache = 0
    if part.roles.causal:
        shape, length = part.shape_of(block), fitting_length(supernet, workload.length)
        cache = workload.batch_size * 2 * shape.num_attention_heads * shape.head_dim * length
    return _itemsize(supernet, dtype) * (part.parameters(block) + cache)


def _cache_bytes(supernet: Supernet, architecture: Architecture, *, workload: Workload, itemsize: int) -> int:
    if supernet.block_parts:
        length, batch = fitting_length(supernet, workload.length), workload.batch_size
        cached = costs.kv_cache_bytes(supernet, architecture, seq_len=length, batch_size=batch)
        return cached // _itemsize(supernet, None) * itemsize
    pairs = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
    return itemsize * sum(_layer_cache(supernet, part, shape, workload=workload) for part, shape in pairs)


def _layer_cache(supernet: Supernet, part: LayerPart, shape: LayerShape, *, workload: Workload) -> int:
    """Numbers that a layer keeps of a workload; of one without attention a zero per token as key and as value."""
    if not supernet.family.causal or shape.skipped:
        return 0
    length = fitting_length(supernet, workload.length)
    values = 2 * shape.num_key_value_heads * part.head_dim if shape.attention else 2
    return workload.batch_size * values * costs._cached_tokens(supernet, part, length)


def _itemsize(supernet: Supernet, dtype: torch.dtype | None) -> int:
    return (dtype or supernet.model.dtype).itemsize


def _parsed(
    text: str | None, units: Mapping[str, Fraction | int], *, example: str, name: str
) -> tuple[Fraction | None, Workload | None]:
    """Reads ``NUMBER UNIT [@BATCHxTOKENS]``."""
    if text is None:
        return None, None
    pattern = rf"{_NUMBER}\s*({'|'.join(sorted(units, key=len, reverse=True))})(?:@(\d{{1,9}})x(\d{{1,9}}))?"
    found = re.fullmatch(pattern, text.strip(), re.ASCII)
    if not found or any(count is not None and not int(count) for count in found.groups()[2:]):
        listed = ", ".join(unit for unit in units if unit)
        of_them = f", with a unit out of {listed}" if listed else ""
        raise SpaceError(f"{name} {text!r} is not of the form {example}{of_them}")
    number, unit, batch, tokens = found.groups()
    workload = None if batch is None else Workload(int(batch), int(tokens))
    return Fraction(number) * units[unit], workload


def _sized(size: float) -> str:
    unit = "GB" if size >= _BYTES["GB"] else "MB"
    return f"{size / _BYTES[unit]:.4g} {unit}"
