"""Measured quality: the damage of cutting one sublayer of an otherwise whole parent, after its closed-form repair.

The damage of an architecture is predicted as the sum over its layers, an additive objective: exact search
answers in seconds. How far the sum is from the truth is measured too (:func:`additivity`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hf_elastic.architecture import is_finite
from hf_elastic.errors import CheckpointError, DataError
from hf_elastic.fingerprints import fingerprint
from hf_elastic.layers import evaluating
from hf_elastic.least_squares import NormalEquations
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.repair.parent_streams import LayerStreams, ParentStreams, streams_of
from hf_elastic.repair.refitting import RIDGE, repaired_shapes, solved_places, within_dtype
from hf_elastic.space import Architecture, SearchSpace
from hf_elastic.streams import (
    MEMORY_LIMIT,
    SUBLAYERS,
    Batch,
    HiddenStates,
    LayerRunner,
    Sublayer,
    Sublayers,
    checked_batches,
    kept_weight,
    output_projection,
    shaped,
)
from hf_elastic.supernet import Supernet
from hf_elastic.tables.latencies import interpolated
from hf_elastic.tables.measures import Measure, layer_outputs, measure_named
from hf_elastic.tables.stored import read_table, write_table

_GUIDE = 0.5  # rank correlation below which sums over layers say little
_REACH = 3  # layers repaired behind one that is left out
WHOLE = "layer"
"""Entry for leaving out a layer as a whole."""
SIZES = 6
"""Widths per layer that are measured, by default."""
LEAST_ORDERED = 3
"""Architectures that an order takes to be compared with another."""


@dataclass(frozen=True)
class QualityTable:
    """Damages by layer and option; 0 where a layer is whole.

    Attributes:
        measure: what is measured.
        fingerprint: of the weights, the data and the settings.
        damages: per layer, by ``"mlp/WIDTH"``, ``"attention/HEADS"`` (0: left out) and ``"layer"``.
    """

    measure: str
    fingerprint: str
    damages: tuple[Mapping[str, float], ...]

    def damage(self, part: LayerPart, shape: LayerShape) -> float:
        """Damage of one layer in a shape; between measured sizes by linear interpolation.

        Raises:
            DataError: the table does not reach the shape.
        """
        entries = self.damages[part.index]
        if shape.skipped:
            return entries[WHOLE]
        heads = shape.num_key_value_heads if shape.attention else 0
        width = shape.intermediate_size if shape.mlp else 0
        return _interpolated(entries, "attention", heads) + _interpolated(entries, "mlp", width)

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_table(self, path)

    @classmethod
    def load(cls, path: str | Path) -> QualityTable:
        """Reads a table.

        Raises:
            CheckpointError: the file holds none.
        """
        return read_table(cls, path, name="quality table", readers={"damages": _rows}, sound=cls._sound)

    def _sound(self) -> bool:
        return isinstance(self.measure, str) and isinstance(self.fingerprint, str)


_OPTION = re.compile(rf"(?:{'|'.join(SUBLAYERS)})/[0-9]{{1,9}}|{WHOLE}")


def _rows(entries: Any) -> tuple[Mapping[str, float], ...]:
    if not isinstance(entries, list):
        raise TypeError
    if not all(isinstance(row, dict) and all(map(is_finite, row.values())) for row in entries):
        raise ValueError
    if not all(_OPTION.fullmatch(name) for row in entries for name in row):
        raise ValueError
    return tuple(entries)


def _interpolated(entries: Mapping[str, float], sublayer: str, size: int) -> float:
    exact = entries.get(f"{sublayer}/{size}")
    if exact is not None:
        return exact
    known = {int(name.partition("/")[2]): value for name, value in entries.items() if name.startswith(f"{sublayer}/")}
    return interpolated(known, size, name=sublayer, table="quality")


def measure_quality_table(
    supernet: Supernet,
    calibration: Iterable[Batch] | ParentStreams,
    validation: Iterable[Batch],
    *,
    measure: str | Callable[[nn.Module], float],
    sizes: int = SIZES,
    ridge: float = RIDGE,
    path: str | Path | None = None,
    memory: int = MEMORY_LIMIT,
    progress: Callable[[int, int], object] | None = None,
) -> QualityTable:
    """Measures the damage of every option of every layer, each alone in the otherwise whole parent.

    The cut sublayer is repaired first: as everything before it is exact, one set of normal equations per layer gives
    the least-squares solution of every size without further data. Of a layer that is left out nothing is left to
    repair, so the three layers behind it are (:func:`hf_elastic.repair.refitting.refitted`).

    Args:
        supernet: sorted by importance; unchanged afterwards.
        calibration: batches to repair on, or what the parent makes of them.
        validation: batches to measure on.
        measure: ``"hidden"``, ``"kl"``, ``"similarity"`` (see :mod:`hf_elastic.tables.measures`), or a function of the
            model whose value grows with the damage.
        sizes: at most so many widths per layer are measured, at least 2, spread evenly; the others are interpolated.
        ridge: as for :func:`hf_elastic.refit`.
        path: keeps what is measured; an interrupted measurement goes on, a finished one is read. A function that
            measures is then known by its name and its code: it must be one made with ``def``.
        memory: bytes of hidden states kept in memory; the rest waits on disk.
        progress: called with the measurements done and to be done.

    Raises:
        DataError: a batch is unusable, or the measure does not fit the model.
        CheckpointError: ``path`` holds a table of another model, other data or other settings.
    """
    if type(sizes) is not int or sizes < 2:
        raise DataError(f"sizes={sizes!r} must be an integer of at least 2, the smallest and the whole")
    parent, held = streams_of(supernet, calibration), checked_batches(validation)
    name, code = _identified(measure, kept=path is not None)
    options = [sublayer_options(part, sizes=sizes) for part in supernet.layer_parts]
    settings = (name, ridge, options, supernet.layer_order, *code)
    table = QualityTable(
        name, fingerprint(supernet.model, [*parent.batches, *held], rest=settings), tuple({} for _ in options)
    )
    if path is not None and Path(path).is_file():
        table = _continued(QualityTable.load(path), table.fingerprint, path)
    if any(set(wanted) - set(row) for wanted, row in zip(options, table.damages, strict=True)):
        with evaluating(supernet.model), torch.no_grad(), supernet.activate(supernet.space.largest()):
            judge = measure_named(measure, supernet, memory=memory // 2)
            work = _Measurement(supernet, parent, held, measure=judge, ridge=ridge, memory=memory // 4)
            with closing(work):
                table = work.run(table, options, save=path, progress=progress)
    return table


def _identified(measure: str | Callable[[nn.Module], float], *, kept: bool) -> tuple[str, tuple[object, ...]]:
    """Name of a measure, and what tells it apart from another of that name.

    Raises:
        DataError: a table that is to be kept could not be told apart from another's.
    """
    if isinstance(measure, str):
        return measure, ()
    name, code = getattr(measure, "__qualname__", type(measure).__name__), getattr(measure, "__code__", None)
    if kept and (code is None or "<lambda>" in name):
        raise DataError(
            f"a table of the measure {name} cannot be kept in a file, since nothing tells it from another; make it a "
            "function with def, or leave path out"
        )
    if code is None:
        return name, ()
    constants = [
        sorted(map(repr, value)) if isinstance(value, frozenset) else value  # whose order differs by process
        for value in code.co_consts
        if not isinstance(value, CodeType)
    ]
    return name, (code.co_code.hex(), code.co_names, repr(constants))


def _continued(found: QualityTable, wanted: str, path: str | Path) -> QualityTable:
    if found.fingerprint != wanted:
        raise CheckpointError(
            f"{path} was measured on another model, other data or other settings; delete it or choose another file"
        )
    return found


def sublayer_options(part: LayerPart, *, sizes: int) -> list[str]:
    """Names of the entries a layer needs for the space it is in, the largest sizes first."""
    points = SearchSpace(part.choices).architectures() if part.choices else ()
    shapes = {part.full, *(part.shape(point) for point in points)}
    widths = sorted({s.intermediate_size if s.mlp else 0 for s in shapes if not s.skipped}, reverse=True)
    heads = sorted({s.num_key_value_heads if s.attention else 0 for s in shapes if not s.skipped}, reverse=True)
    chosen = [f"mlp/{width}" for width in _spread(widths, sizes)] + [f"attention/{count}" for count in heads]
    return chosen + ([WHOLE] if any(s.skipped for s in shapes) else [])


def _spread(sizes: list[int], count: int) -> list[int]:
    """At most ``count`` of the positive sizes, first and last among them, and 0 where it is."""
    positive = [size for size in sizes if size]
    if len(positive) > count:
        last = len(positive) - 1
        positive = [positive[round(i * last / (count - 1))] for i in range(count)] if count > 1 else positive[:1]
    return positive + [size for size in sizes if not size]


class _Measurement:
    """Walks through the parent once; at each layer, tries every option and runs what is behind it."""

    def __init__(
        self,
        supernet: Supernet,
        parent: ParentStreams,
        held: list[Batch],
        *,
        measure: Measure,
        ridge: float,
        memory: int,
    ) -> None:
        self.supernet, self.parent, self.held, self.measure, self.ridge = supernet, parent, held, measure, ridge
        self.runner, self.held_calls = parent.runner, ParentStreams(supernet, held).calls
        self.states, self.entering = (HiddenStates(memory=memory) for _ in range(2))

    def run(
        self,
        table: QualityTable,
        options: Sequence[Sequence[str]],
        *,
        save: str | Path | None,
        progress: Callable[[int, int], object] | None,
    ) -> QualityTable:
        total = sum(len(wanted) for wanted in options)
        rows, tell = [dict(entries) for entries in table.damages], progress or (lambda done, total: None)
        self.measure.start(self.runner, self.held)
        for part, wanted, row in zip(self.supernet.layer_parts, options, rows, strict=True):
            missing = [option for option in wanted if option not in row]
            table = replace(table, damages=tuple(rows))
            with _saved(table, save):
                for option, damage in self._layer(part, missing):
                    row[option] = damage
                    tell(sum(map(len, rows)), total)
            self._leave(part)
        return table

    def close(self) -> None:
        """Frees memory and files."""
        for kept in (self.states, self.entering, self.measure):
            kept.close()

    def _layer(self, part: LayerPart, options: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Measures options of the layer that the parent comes to next."""
        sums = self._enter(part, options)
        for option in options:
            yield option, _finite(self._damage(part, option, sums), part, option)

    def _enter(self, part: LayerPart, options: Sequence[str]) -> dict[Sublayer, NormalEquations]:
        """Normal equations of the sublayers that the options cut; the parent moves on through the layer."""
        device = self.supernet.model.device
        cut = {option.partition("/")[0] for option in options if _is_cut(part, option)}
        weights = {s: kept_weight(output_projection(part, s)) for s in SUBLAYERS if s in cut}
        sums = {s: NormalEquations(len(weight), device=device) for s, (weight, _) in weights.items()}
        for index in range(len(self.parent.batches)):
            calls = self.parent.calls(index)
            hidden = calls.hidden if part.index == 0 else self.states[index]
            with Sublayers(part) as seen:
                self.states[index] = after = self.runner.run(part.index, hidden, calls)
            self.parent.remember(part, index, LayerStreams.seen(seen, hidden, after))
            for sublayer, total in sums.items():
                total.add(calls.rows(seen.inputs[sublayer]))
        return {sublayer: total.toward(*weights[sublayer]) for sublayer, total in sums.items()}

    def _leave(self, part: LayerPart) -> None:
        """Moves the held-out batches of the parent through a layer."""
        for index in range(len(self.held)):
            calls = self.held_calls(index)
            hidden = calls.hidden if part.index == 0 else self.entering[index]
            self.entering[index] = self.runner.run(part.index, hidden, calls)

    def _damage(self, part: LayerPart, option: str, sums: dict[Sublayer, NormalEquations]) -> float:
        shape = shape_of_option(part, option)
        if shape == part.full:
            return 0.0
        if option == WHOLE:
            sums.clear()  # it is a layer's last option, and the repair behind the layer makes sums of its own
            return self._damage_without(part, shape)
        with self._cut(part, shape, option, sums=sums):
            return self.measure.damage(self.runner, self._last(part))

    def _damage_without(self, part: LayerPart, shape: LayerShape) -> float:
        """Damage of leaving a layer out: what stands behind it is what can be repaired."""
        shapes = [shape if other is part else other.full for other in self.supernet.layer_parts]
        with (
            repaired_shapes(self.supernet, shapes, self.parent, ridge=self.ridge, judged=False, reach=_REACH),
            shaped(part, shape),
        ):
            return self.measure.damage(self.runner, self._last(part))

    def _last(self, part: LayerPart) -> Iterator[tuple[Batch, Tensor]]:
        """Each held-out batch with what leaves the last layer, ``(B, T, D)``."""
        for index, batch in enumerate(self.held):
            calls = self.held_calls(index)
            hidden = calls.hidden if part.index == 0 else self.entering[index]
            for number in range(part.index, len(self.runner.layers)):
                hidden = self.runner.run(number, hidden, calls)
            yield batch, hidden

    @contextmanager
    def _cut(
        self, part: LayerPart, shape: LayerShape, option: str, *, sums: Mapping[Sublayer, NormalEquations]
    ) -> Iterator[None]:
        """Cuts and repairs a layer inside the block."""
        originals: list[tuple[Tensor, Tensor]] = []
        sublayer, _, size = option.partition("/")
        if _is_cut(part, option):
            kind: Sublayer = "attention" if sublayer == "attention" else "mlp"
            projection = output_projection(part, kind)
            weight, bias = kept_weight(projection)
            kept = shape.num_attention_heads * part.head_dim if kind == "attention" else shape.intermediate_size
            solved = sums[kind].prefix(kept).solve(weight[:kept], bias, ridge=self.ridge)
            pairs = [
                (place, within_dtype(values, place.dtype, layer=part.index, sublayer=kind))
                for place, values in solved_places(projection, solved)
            ]
            for place, values in pairs:
                originals.append((place, place.clone()))
                place.copy_(values)
        try:
            with shaped(part, shape):
                yield
        finally:
            for place, values in originals:
                place.copy_(values)


@contextmanager
def _saved(table: QualityTable, path: str | Path | None) -> Iterator[None]:
    """Saves a table behind the block, with what was added to its rows, also when the block fails."""
    try:
        yield
    finally:
        if path is not None:
            table.save(path)


def _finite(damage: float, part: LayerPart, option: str) -> float:
    if not math.isfinite(damage):
        raise DataError(
            f"layer {part.index}, {option}: the damage is {damage}; look for NaN in the weights, and let a measure of "
            "your own return a number for every model"
        )
    return damage


def _is_cut(part: LayerPart, option: str) -> bool:
    """Whether an option leaves part of a sublayer, which can be repaired."""
    return option != WHOLE and not option.endswith("/0") and shape_of_option(part, option) != part.full


def shape_of_option(part: LayerPart, option: str) -> LayerShape:
    """The shape of an otherwise whole layer with one of its options."""
    full = part.full
    if option == WHOLE:
        return LayerShape(full.intermediate_size, full.num_attention_heads, full.num_key_value_heads, False, False)
    sublayer, _, text = option.partition("/")
    size = int(text)
    if sublayer == "mlp":
        width = size or full.intermediate_size
        return LayerShape(width, full.num_attention_heads, full.num_key_value_heads, mlp=bool(size))
    groups = size or full.num_key_value_heads
    heads = groups * (full.num_attention_heads // full.num_key_value_heads)
    return LayerShape(full.intermediate_size, heads, groups, attention=bool(size))


@dataclass(frozen=True)
class Additivity:
    """How well the sum over layers predicts the damage of whole architectures.

    Attributes:
        predicted, measured: damages of random architectures, each repaired as a whole.
        rank_correlation: Spearman's, between the two.
        mean_ratio: geometric mean of measured over predicted.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    rank_correlation: float = field(init=False)
    mean_ratio: float = field(init=False)

    def __post_init__(self) -> None:
        pairs = [(p, m) for p, m in zip(self.predicted, self.measured, strict=True) if p > 0 and m > 0]
        logs = [math.log(m / p) for p, m in pairs]
        object.__setattr__(self, "rank_correlation", float(spearmanr(self.predicted, self.measured).statistic))
        object.__setattr__(self, "mean_ratio", math.exp(sum(logs) / len(logs)) if logs else math.nan)

    def __str__(self) -> str:
        weak = "" if self.rank_correlation >= _GUIDE else "; a weak guide, so go by what is measured as a whole"
        return (
            f"the sum over layers ranks {len(self.predicted)} random architectures with a correlation of "
            f"{self.rank_correlation:.2f} to their true damage, which is {self.mean_ratio:.2f} times the sum{weak}"
        )


def predicted_damage(supernet: Supernet, table: QualityTable, architecture: Architecture) -> float:
    """Damage of an architecture as the sum over its layers."""
    pairs = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
    return math.fsum(table.damage(part, shape) for part, shape in pairs)


def true_damage(
    supernet: Supernet,
    architecture: Architecture,
    *,
    calibration: Iterable[Batch] | ParentStreams,
    validation: Iterable[Batch],
    measure: str | Callable[[nn.Module], float],
) -> float:
    """Damage of an architecture that was repaired as a whole, whether or not that brought it nearer to its parent."""
    held = checked_batches(validation)
    judge, runner = measure_named(measure, supernet), LayerRunner(supernet)
    with evaluating(supernet.model), torch.no_grad(), supernet.activate(supernet.space.largest()):
        judge.start(runner, held)
    try:
        with (
            repaired_shapes(supernet, supernet.layer_shapes(architecture), calibration, judged=False),
            evaluating(supernet.model),
            torch.no_grad(),
            supernet.activate(architecture),
        ):
            return judge.damage(runner, layer_outputs(runner, held))
    finally:
        judge.close()


def additivity(
    supernet: Supernet,
    table: QualityTable,
    architectures: Sequence[Architecture],
    *,
    calibration: Iterable[Batch] | ParentStreams,
    validation: Iterable[Batch],
    measure: str | Callable[[nn.Module], float],
) -> Additivity:
    """Measures the additivity error of a table on architectures, each cut and repaired as a whole.

    Raises:
        DataError: there are fewer than three architectures.
    """
    if len(architectures) < LEAST_ORDERED:
        raise DataError(f"additivity needs at least {LEAST_ORDERED} architectures to order, got {len(architectures)}")
    parent, held = streams_of(supernet, calibration), checked_batches(validation)
    return Additivity(
        tuple(predicted_damage(supernet, table, point) for point in architectures),
        tuple(
            true_damage(supernet, point, calibration=parent, validation=held, measure=measure)
            for point in architectures
        ),
    )  # fmt: skip
