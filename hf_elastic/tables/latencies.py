"""Measured latency: seconds of each sublayer in each size on one device; a whole model's is predicted as a sum.

Latency is measured on compact models of the true depth: each size is put into every layer at once. That averages the
error over the layers, and weights come from caches or from memory as in a whole model; in a model of two layers they
would all stay in caches. A least-squares fit then splits what was measured into sublayers and a constant: a sum of
differences to the whole parent would carry the error of the parent's time once per sublayer.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_elastic.checkpoint.extraction import extract_shapes
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.kept_memory import steady_memory
from hf_elastic.models import static_class_name
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.routers import require_unrouted
from hf_elastic.space import Architecture, SearchSpace
from hf_elastic.supernet import Supernet
from hf_elastic.tables.stored import read_table, write_table
from hf_elastic.tables.timing import (
    MOST_ROUNDS,
    TIMED_READERS,
    CachePool,
    Forward,
    Phase,
    Rounds,
    Setting,
    Timer,
    noise_of,
    require_finished,
    require_measured_here,
    sound_rounds,
    timed_in_rounds,
    typical,
    wall_clock,
)

NANOSECONDS = 1_000_000_000


class Sizes(NamedTuple):
    """Sizes of a layer: key/value groups (heads without grouping) and FFN neurons, 0 where the sublayer is left out."""

    attention: int
    mlp: int


class Variant(NamedTuple):
    """A model to time: all layers of one kind in some sizes, the others whole.

    Of kind -1 is the model with the fewest layers: with none, or, where no class holds that, with a whole first one.
    """

    kind: int
    attention: int
    mlp: int

    def __str__(self) -> str:
        sizes = f"{self.attention} heads, width {self.mlp}"
        return f"kind {self.kind}: {sizes}" if self.kind >= 0 else "fewest layers"


class Fit(NamedTuple):
    """What the measured times say of each sublayer.

    Attributes:
        constant: seconds of what is no layer: embeddings, output head, calling the model.
        attention, mlp: per kind, seconds by size; 0 (left out) is there where it was measured.
        misfit: largest relative difference between a measured time and its sum.
    """

    constant: float
    attention: tuple[Mapping[int, float], ...]
    mlp: tuple[Mapping[int, float], ...]
    misfit: float


@dataclass(frozen=True)
class LatencyTable:
    """Times of a forward by sizes, on one device in one setting.

    Layers that are equal in the parent (sizes and kind of attention) share one *kind* and its measurements.

    Attributes:
        setting: where and how it was measured.
        model: digest of the names and shapes of the parent's tensors; weights do not matter.
        kinds: the kind of each layer.
        whole: sizes of each kind in the parent.
        variants: what was timed.
        rounds: seconds of each variant, in their order, by round.
        spent: seconds spent in forwards.
        finished: whether all rounds are done.
    """

    setting: Setting
    model: str
    kinds: tuple[int, ...]
    whole: tuple[Sizes, ...]
    variants: tuple[Variant, ...]
    rounds: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    spent: float = 0.0
    finished: bool = False

    @cached_property
    def fit(self) -> Fit:
        """Least squares of relative errors over all variants, each at :func:`typical` of its rounds."""
        times = [typical(seconds) for seconds in zip(*self.rounds, strict=True)]
        there = [list(self._sublayers(variant)) for variant in self.variants]
        columns = {place: number for number, place in enumerate(dict.fromkeys(itertools.chain(*there)), 1)}
        rows = np.zeros((len(times), 1 + len(columns)))  # column 0 is the constant
        rows[:, 0] = 1.0
        for row, places in zip(rows, there, strict=True):
            for place in places:
                row[columns[place]] += 1.0
        rows /= np.array(times)[:, None]
        found = np.linalg.lstsq(rows, np.ones(len(times)), rcond=None)[0]
        tables: list[list[dict[int, float]]] = [[{} for _ in self.whole] for _ in Sizes._fields]
        for (kind, sublayer, size), column in columns.items():
            tables[sublayer][kind][size] = float(found[column])
        for variant in self.variants:
            if variant.kind >= 0 and bool(variant.attention) != bool(variant.mlp):
                tables[0 if variant.mlp else 1][variant.kind][0] = 0.0
        return Fit(float(found[0]), tuple(tables[0]), tuple(tables[1]), float(np.abs(rows @ found - 1.0).max()))

    def _sublayers(self, variant: Variant) -> Iterator[tuple[int, int, int]]:
        """Kind, sublayer (0 is attention, 1 the FFN) and size of every sublayer that is there in a variant."""
        for kind in self.kinds if variant.kind >= 0 else self.kinds[:1]:
            sizes = variant[1:] if variant.kind in (-1, kind) else self.whole[kind]
            yield from ((kind, sublayer, size) for sublayer, size in enumerate(sizes) if size)

    @cached_property
    def noise(self) -> float:
        """How far the rounds of one model differ: by how much the median is above the fastest, typically.

        On a quiet machine a few per cent; where it is much more, the machine had other work and predictions may miss.
        """
        return noise_of(self.rounds)

    @cached_property
    def parent(self) -> float:
        """Seconds of a forward of the whole model, as the sum says."""
        attention = [self.fit.attention[kind][self.whole[kind].attention] for kind in self.kinds]
        mlp = [self.fit.mlp[kind][self.whole[kind].mlp] for kind in self.kinds]
        return math.fsum([self.fit.constant, *attention, *mlp])

    def seconds(self, part: LayerPart, shape: LayerShape) -> float:
        """Seconds that one layer in a shape takes; between measured sizes by linear interpolation.

        Raises:
            DataError: the table does not reach the shape.
        """
        if shape.skipped:
            return 0.0
        kind, sizes = self.kinds[part.index], sizes_of(shape)
        attention = interpolated(self.fit.attention[kind], sizes.attention, name="attention")
        return attention + interpolated(self.fit.mlp[kind], sizes.mlp, name="FFN")

    def nanoseconds(self, part: LayerPart, shape: LayerShape) -> int:
        """:meth:`seconds` as a whole number of nanoseconds: sums of these are exact."""
        return round(NANOSECONDS * self.seconds(part, shape))

    def predict(self, supernet: Supernet, architecture: Architecture) -> float:
        """Seconds of a forward of an exported subnet: one that is compact, so not of a ``stock-padded`` one.

        Raises:
            ArchitectureError: the architecture is not a point of the space.
            CheckpointError: the table is of another model, or not finished.
            DataError: the table does not reach the architecture.
        """
        self.require(supernet)
        pairs = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
        return math.fsum([self.fit.constant, *(self.seconds(part, shape) for part, shape in pairs)])

    def speedup(self, supernet: Supernet, architecture: Architecture) -> float:
        """How many times faster than its parent an exported subnet is; raises as :meth:`predict`."""
        return self.parent / self.predict(supernet, architecture)

    def require(self, supernet: Supernet) -> None:
        """Checks that the table is usable for a model. Where it was measured is not checked: tables may travel.

        Raises:
            CheckpointError: it is of another model, or not finished.
            UnsupportedModelError: the model has routers.
        """
        require_unrouted(supernet.base, "a latency table")
        if self.model != shape_digest(supernet):
            raise CheckpointError(
                f"the latency table was measured on another model than this {type(supernet.model).__name__}; "
                "measure one for it"
            )
        require_finished(self, measured_by="measure_latency_table")

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_table(self, path)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads a table, also one that was interrupted.

        Raises:
            CheckpointError: the file holds none.
        """
        readers = {
            **TIMED_READERS,
            "kinds": tuple,
            "whole": lambda whole: tuple(Sizes(*sizes) for sizes in whole),
            "variants": lambda variants: tuple(Variant(*variant) for variant in variants),
        }
        return read_table(cls, path, name="latency table", readers=readers, sound=cls._sound)

    def _sound(self) -> bool:
        counts = [*self.kinds, *(number for sizes in (*self.whole, *self.variants) for number in sizes)]
        return (
            sound_rounds(self, models=len(self.variants))
            and all(type(number) is int for number in counts)
            and set(self.kinds) == set(range(len(self.whole)))
            and all(-1 <= variant.kind < len(self.whole) for variant in self.variants)
            and any(variant.kind < 0 for variant in self.variants)
            and all(Variant(kind, *sizes) in self.variants for kind, sizes in enumerate(self.whole))
        )

    def __str__(self) -> str:
        if not self.rounds:
            return f"latency table without a round, {self.setting}"
        share = 1 - self.fit.constant / self.parent
        return (
            f"{1e3 * self.parent:.2f} ms for {self.setting}, {share:.0%} of it in layers; {len(self.variants)} models "
            f"timed in {len(self.rounds)} rounds, {self.spent:.1f} s, which a sum fits within {self.fit.misfit:.1%}"
        )


def sizes_of(shape: LayerShape) -> Sizes:
    """Sizes of a layer's shape."""
    return Sizes(shape.num_key_value_heads if shape.attention else 0, shape.intermediate_size if shape.mlp else 0)


def interpolated(known: Mapping[int, float], size: int, *, name: str, table: str = "latency") -> float:
    """What is known of a size; between known ones by linear interpolation.

    Raises:
        DataError: the table does not reach the size.
    """
    if size in known:
        return known[size]
    below, above = [s for s in known if 0 < s < size], [s for s in known if s > size]
    if not size or not below or not above:
        raise DataError(
            f"the {table} table has no {name} of size {size}, only {sorted(known)}; measure it for this space"
        )
    low, high = max(below), min(above)
    share = (size - low) / (high - low)
    return (1 - share) * known[low] + share * known[high]


@steady_memory()
def measure_latency_table(
    supernet: Supernet,
    *,
    batch_size: int = 1,
    length: int | None = None,
    phase: Phase = "prefill",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    sizes: int = 6,
    rounds: int = MOST_ROUNDS,
    seconds: float = 12.0,
    path: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    timer: Timer = wall_clock,
) -> LatencyTable:
    """Measures what every size of the space takes, on compact models that are timed in turns.

    Timed are the parent, the model without layers, a model for every size in every layer, and two in which both
    sublayers are small: of these the sum is least sure, and a search goes there. In rounds each has its turn, in
    alternating order, so that a machine that slows down does not tilt the table.

    Args:
        supernet: unchanged; the models that are timed share its memory (where device and dtype are the model's).
        batch_size, length, phase, device, dtype: the setting, see :meth:`Setting.of`; ``dtype`` is that of the export.
        sizes: at most so many widths, and so many head counts, are measured, the whole model's among them; the others
            are interpolated.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three, and on a noisy machine up to
            three times as long.
        path: keeps each round; an interrupted measurement goes on, a finished one is read.
        progress: called with the rounds done and to be done, as it looks now.
        timer: runs a call and returns its seconds.

    Raises:
        DataError: the model cannot run in the setting, or ``sizes`` is below 2.
        CheckpointError: ``path`` holds a table of another device, thread count, setting or model.
        ExportError: the model has no static class, which an option would be exported as.
    """
    supernet.require_plain("a latency table")
    supernet.require_layers("measure_latency_table", instead="measure_block_latency_table")
    if type(sizes) is not int or sizes < 2:
        raise DataError(f"sizes={sizes!r} must be an integer of at least 2, the smallest and the whole")
    setting = Setting.of(supernet, batch_size=batch_size, length=length, phase=phase, device=device, dtype=dtype)
    table = _empty(supernet, setting, sizes=sizes)
    if path is not None and Path(path).is_file():
        table = _continued(LatencyTable.load(path), table, path)
    if table.finished:
        return table
    timed = Rounds(_forwards(supernet, table, device=device, dtype=dtype), timer=timer)
    return timed_in_rounds(table, timed, rounds=rounds, seconds=seconds, path=path, progress=progress)


def _empty(supernet: Supernet, setting: Setting, *, sizes: int) -> LatencyTable:
    """What is to be measured: kinds of layers and variants of each."""
    members: dict[object, list[LayerPart]] = {}
    for part in supernet.layer_parts:
        members.setdefault((part.full, part.head_dim, _attention_type(supernet, part)), []).append(part)
    kinds = {part.index: kind for kind, parts in enumerate(members.values()) for part in parts}
    holds_nothing = static_class_name(type(supernet.model)) is not None
    variants = [Variant(-1, *(Sizes(0, 0) if holds_nothing else sizes_of(supernet.layer_parts[0].full)))]
    for kind, parts in enumerate(members.values()):
        variants += [Variant(kind, *pair) for pair in _sizes(parts, count=sizes)]
        variants += [Variant(kind, 0, 0)] if len(members) > 1 else []
    return LatencyTable(
        setting,
        shape_digest(supernet),
        tuple(kinds[part.index] for part in supernet.layer_parts),
        tuple(sizes_of(parts[0].full) for parts in members.values()),
        tuple(variants),
    )


def _attention_type(supernet: Supernet, part: LayerPart) -> str:
    types = getattr(supernet.model.config, "layer_types", None)
    return "" if types is None else str(types[part.index])


def shape_digest(supernet: Supernet) -> str:
    """Digest of everything about a model that its latency depends on besides the setting."""
    model = supernet.model
    names = ("model_type", "hidden_act", "activation_function", "sliding_window", "layer_types", "rope_parameters")
    rest = [(name, repr(getattr(model.config, name, None))) for name in names]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    text = repr((type(model).__name__, model.config._attn_implementation, rest, shapes))
    return hashlib.sha256(text.encode()).hexdigest()


def _sizes(parts: Sequence[LayerPart], *, count: int) -> list[Sizes]:
    """Sizes that are measured for layers of one kind, the whole ones first."""
    chooses = [part for part in parts if part.choices]
    points = [(part, point) for part in chooses for point in SearchSpace(part.choices).architectures()]
    whole = sizes_of(parts[0].full)
    there = {sizes_of(part.shape(point)) for part, point in points if not part.shape(point).skipped} | {whole}
    heads = spread({sizes.attention for sizes in there} - {0}, count)
    widths = spread({sizes.mlp for sizes in there} - {0}, count)
    chosen = [Sizes(whole.attention, width) for width in widths] + [Sizes(number, whole.mlp) for number in heads]
    chosen += [Sizes(number, width) for number, width in ((heads[len(heads) // 2], widths[len(widths) // 2]),)]
    chosen.append(Sizes(heads[-1], widths[-1]))
    chosen += [Sizes(0, whole.mlp)] * any(not sizes.attention for sizes in there)
    chosen += [Sizes(whole.attention, 0)] * any(not sizes.mlp for sizes in there)
    return list(dict.fromkeys(chosen))


def spread(sizes: Iterable[int], count: int) -> list[int]:
    """At most ``count`` of the sizes, the largest first: smallest and largest, and those nearest to even steps."""
    ordered = sorted(sizes)
    low, high = ordered[0], ordered[-1]
    marks = [low + (high - low) * step / (count - 1) for step in range(count)]
    nearest = {min((abs(size - mark), size) for size in ordered)[1] for mark in marks}
    return sorted(nearest, reverse=True)


def _continued(found: LatencyTable, wanted: LatencyTable, path: str | Path) -> LatencyTable:
    """A table that was read, if it is of what is to be measured."""
    require_measured_here(found.setting, wanted.setting, path=path)
    names = ("model", "kinds", "whole", "variants")
    if any(getattr(found, name) != getattr(wanted, name) for name in names):
        raise CheckpointError(f"{path} was measured on another model or space; delete it or choose another file")
    return found


def _forwards(
    supernet: Supernet, table: LatencyTable, *, device: str | torch.device | None, dtype: torch.dtype | None
) -> list[Forward]:
    """The models to time, one per variant."""
    weights, pool = moved_weights(supernet, device=device, dtype=dtype), CachePool()
    found = []
    for variant in table.variants:
        shapes = []
        for part, kind in zip(supernet.layer_parts, table.kinds, strict=True):
            dropped = variant.kind < 0 and part.index > 0
            own = shape_in(part, Sizes(0, 0) if dropped else Sizes(*variant[1:]))
            shapes.append(own if variant.kind in (-1, kind) else part.full)
        found.append(Forward(extract_shapes(supernet, shapes, weights=weights), table.setting, pool=pool))
    return found


def shape_in(part: LayerPart, sizes: Sizes) -> LayerShape:
    """The shape of a layer in some sizes, the inverse of :func:`sizes_of`."""
    full = part.full
    groups, width = sizes.attention or full.num_key_value_heads, sizes.mlp or full.intermediate_size
    heads = groups * (full.num_attention_heads // full.num_key_value_heads)
    return LayerShape(width, heads, groups, attention=bool(sizes.attention), mlp=bool(sizes.mlp))


def moved_weights(
    supernet: Supernet, *, device: str | torch.device | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The model's ``state_dict()`` on a device, its floating-point tensors in a dtype; tied tensors stay one."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    found: dict[str, Any] = {}
    for name, tensor in supernet.model.state_dict().items():
        kind = dtype if tensor.is_floating_point() else None
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.to(device=device, dtype=kind)
        found[name] = done[key]
    return found
