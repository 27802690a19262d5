"""Measured latency of candidate blocks: seconds of each block at each width on one device; a path is their sum.

What is timed are static models of the true depth in which all layers are one block at one width. As every path of a
space has that depth, too, a prediction is a mean of whole models: a constant that is measured badly hardly shifts one.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_elastic.blocks import BlockPart, BlockShape
from hf_elastic.checkpoint.block_extraction import path_config
from hf_elastic.checkpoint.extraction import build_model, extract
from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.kept_memory import steady_memory
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.latencies import NANOSECONDS, LatencyTable, interpolated, moved_weights, shape_digest, spread
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
    measure_models,
    noise_of,
    require_finished,
    require_measured_here,
    sound_rounds,
    timed_in_rounds,
    typical,
    wall_clock,
)


class BlockKind(NamedTuple):
    """Blocks that differ in width only; one whose heads were merged is of another kind than it was."""

    block: str
    num_attention_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.block} of {self.num_attention_heads} x {self.head_dim}"


class BlockFit(NamedTuple):
    """What the measured times say of each block.

    Attributes:
        constant: seconds of what is no layer: embeddings, output head, calling the model.
        blocks: seconds of one layer by kind and width.
        misfit: largest relative difference between a measured time and its sum.
    """

    constant: float
    blocks: Mapping[BlockKind, Mapping[int, float]]
    misfit: float


@dataclass(frozen=True)
class BlockLatencyTable:
    """Times of a forward by the blocks of its layers, on one device in one setting.

    It holds for the widths and heads that blocks had when it was measured, and for widths between those: a supernet
    that grew needs another.

    Attributes:
        setting: where and how it was measured.
        model: digest of the names and shapes of the supernet's tensors; neither weights nor what of them is in use.
        shapes: blocks in the sizes that are measured.
        variants: models that were timed: for each of its layers a place in ``shapes``.
        rounds: seconds of each variant, in their order, by round.
        spent: seconds spent in forwards.
        finished: whether all rounds are done.
    """

    setting: Setting
    model: str
    shapes: tuple[BlockShape, ...]
    variants: tuple[tuple[int, ...], ...]
    rounds: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    spent: float = 0.0
    finished: bool = False

    @cached_property
    def fit(self) -> BlockFit:
        """Least squares of relative errors over all variants, each at :func:`typical` of its rounds."""
        times = np.array([typical(seconds) for seconds in zip(*self.rounds, strict=True)])
        rows = np.zeros((len(times), 1 + len(self.shapes)))  # column 0 is the constant
        rows[:, 0] = 1.0
        for row, places in zip(rows, self.variants, strict=True):
            for place in places:
                row[1 + place] += 1.0
        rows /= times[:, None]
        found = nnls(rows, np.ones(len(times)))[0]  # no part of a model takes less than no time
        blocks: dict[BlockKind, dict[int, float]] = {}
        for shape, seconds in zip(self.shapes, found[1:], strict=True):
            blocks.setdefault(kind_of(shape), {})[shape.intermediate_size] = float(seconds)
        return BlockFit(float(found[0]), blocks, float(np.abs(rows @ found - 1.0).max()))

    @cached_property
    def noise(self) -> float:
        """How far the rounds of one model differ: by how much the median is above the fastest, typically.

        On a quiet machine a few per cent; where it is much more, the machine had other work and predictions may miss.
        """
        return noise_of(self.rounds)

    def seconds(self, shape: BlockShape) -> float:
        """Seconds that a layer takes; between measured widths by linear interpolation.

        Raises:
            DataError: the table does not reach the shape.
        """
        kind = kind_of(shape)
        if kind not in self.fit.blocks:
            raise DataError(
                f"the latency table has no {kind}, only {', '.join(map(str, self.fit.blocks))} (heads x their size); "
                "measure it again"
            )
        return interpolated(self.fit.blocks[kind], shape.intermediate_size, name=f"FFN in {kind.block}")

    def nanoseconds(self, part: BlockPart, block: str) -> int:
        """:meth:`seconds` of a candidate as it is now, in whole nanoseconds: sums of these are exact."""
        return round(NANOSECONDS * self.seconds(part.shape_of(block)))

    def predict(self, supernet: Supernet, architecture: Architecture) -> float:
        """Seconds of a forward of an exported path: one that is compact, so not of a ``stock-padded`` one.

        Raises:
            ArchitectureError: the architecture is not a point of the space.
            CheckpointError: the table is of another model, or not finished.
            DataError: the table does not reach the architecture.
        """
        self.require(supernet)
        return math.fsum([self.fit.constant, *map(self.seconds, supernet.block_shapes(architecture))])

    def speedup(self, supernet: Supernet, architecture: Architecture) -> float:
        """How many times faster an exported path is than the largest one, ``supernet.space.largest()``.

        Raises:
            ArchitectureError, CheckpointError, DataError: as :meth:`predict`.
        """
        return self.predict(supernet, supernet.space.largest()) / self.predict(supernet, architecture)

    def require(self, supernet: Supernet) -> None:
        """Checks that the table is usable for a model. Where it was measured is not checked: tables may travel.

        Raises:
            CheckpointError: it is of another model, or not finished.
        """
        if self.model != _model_digest(supernet):
            raise CheckpointError(
                f"the latency table was measured on another model than this {type(supernet.model).__name__}, or one "
                "with other candidate blocks; measure one for it"
            )
        require_finished(self, measured_by="measure_block_latency_table")

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_table(self, path)

    @classmethod
    def load(cls, path: str | Path) -> BlockLatencyTable:
        """Reads a table, also one that was interrupted.

        Raises:
            CheckpointError: the file holds none.
        """
        readers = {
            **TIMED_READERS,
            "shapes": lambda shapes: tuple(BlockShape(**shape) for shape in shapes),
            "variants": lambda variants: tuple(map(tuple, variants)),
        }
        return read_table(cls, path, name="block latency table", readers=readers, sound=cls._sound)

    def _sound(self) -> bool:
        places = [place for variant in self.variants for place in variant]
        sizes = [size for shape in self.shapes for size in list(asdict(shape).values())[1:]]
        return (
            sound_rounds(self, models=len(self.variants))
            and all(type(number) is int for number in (*places, *sizes))
            and all(isinstance(shape.block, str) for shape in self.shapes)
            and len(set(self.shapes)) == len(self.shapes)
            and set(places) == set(range(len(self.shapes)))
        )

    def __str__(self) -> str:
        if not self.rounds:
            return f"block latency table without a round, {self.setting}"
        lines = [f"{'outside the layers':<26} {1e3 * self.fit.constant:.3f} ms"]
        for kind, known in self.fit.blocks.items():
            times = (f"{1e3 * seconds:.3f} ms at {width}" for width, seconds in sorted(known.items()))
            lines.append(f"{kind!s:<26} {', '.join(times)}")
        lines.append(
            f"{len(self.variants)} models timed in {len(self.rounds)} rounds, {self.spent:.1f} s, which sums fit "
            f"within {self.fit.misfit:.1%} and whose noise is {self.noise:.1%}; {self.setting}"
        )
        return "\n".join(lines)


def kind_of(shape: BlockShape) -> BlockKind:
    """The kind of a block."""
    return BlockKind(shape.block, shape.num_attention_heads, shape.head_dim)


@steady_memory()
def measure_block_latency_table(
    supernet: Supernet,
    *,
    batch_size: int = 1,
    length: int | None = None,
    phase: Phase = "prefill",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    widths: int = 3,
    rounds: int = MOST_ROUNDS,
    seconds: float = 12.0,
    path: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    timer: Timer = wall_clock,
) -> BlockLatencyTable:
    """Measures what every candidate block of a space takes, on static models that are timed in turns.

    Timed are a model for every block at some of the widths that it has in the layers, in all layers at once; two whose
    layers are of all these kinds, so that the sum is fitted to mixtures, too; and the cheapest and the dearest block in
    half the layers, which tell layers from what is around them. In rounds each has its turn, in alternating order.

    Args:
        supernet: of candidate blocks; unchanged. The models that are timed share memory.
        batch_size, length, phase, device, dtype: the setting, see :meth:`Setting.of`; ``dtype`` is that of the export.
        widths: at most so many of a block are measured, smallest and largest among them; the others are interpolated.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three, and on a noisy machine up to
            three times as long.
        path: keeps each round; an interrupted measurement goes on, a finished one is read.
        progress: called with the rounds done and to be done, as it looks now.
        timer: runs a call and returns its seconds.

    Raises:
        DataError: the model cannot run in the setting, or ``widths`` is below 2.
        CheckpointError: ``path`` holds a table of another device, thread count, setting or model, or of other widths
            or heads.
        UnsupportedModelError: the model has no candidate blocks, or has adapters.
    """
    supernet.require_plain("a latency table")
    if not supernet.block_parts or supernet.base.config.candidate_blocks is None:
        raise UnsupportedModelError(
            f"the layers of this {type(supernet.model).__name__} hold no candidate blocks to choose from; "
            "measure_latency_table is for widths, heads and layers"
        )
    if type(widths) is not int or widths < 2:
        raise DataError(f"widths={widths!r} must be an integer of at least 2, the smallest and the largest")
    setting = Setting.of(supernet, batch_size=batch_size, length=length, phase=phase, device=device, dtype=dtype)
    table = _empty(supernet, setting, widths=widths)
    if path is not None and Path(path).is_file():
        table = _continued(BlockLatencyTable.load(path), table, path)
    if table.finished:
        return table
    timed = Rounds(_forwards(supernet, table, device=device, dtype=dtype), timer=timer)
    return timed_in_rounds(table, timed, rounds=rounds, seconds=seconds, path=path, progress=progress)


def _empty(supernet: Supernet, setting: Setting, *, widths: int) -> BlockLatencyTable:
    """What is to be measured."""
    members: dict[BlockKind, list[BlockPart]] = {}
    for part in supernet.block_parts:
        for block in part.blocks:
            members.setdefault(kind_of(part.shape_of(block)), []).append(part)
    parameters: dict[BlockShape, int] = {}
    for kind, parts in members.items():
        for width in spread({part.width(kind.block) for part in parts}, widths):
            shape = BlockShape(kind.block, width, kind.num_attention_heads, kind.head_dim)
            parameters[shape] = parts[0].parameters_at(kind.block, width)
    ordered = sorted(range(len(parameters)), key=list(parameters.values()).__getitem__)
    variants = _variants(ordered, depth=len(supernet.block_parts))
    return BlockLatencyTable(setting, _model_digest(supernet), tuple(parameters), variants)


def _variants(ordered: Sequence[int], *, depth: int) -> tuple[tuple[int, ...], ...]:
    """Models to time, as places of shapes; these come from the cheapest to the dearest."""
    count = len(ordered)
    pure = [(place,) * depth for place in range(count)]
    # Evenly from the cheapest to the dearest, and halfway between these.
    mixed = [tuple(ordered[(2 * n + odd) * count // (2 * depth)] for n in range(depth)) for odd in (0, 1)]
    half = depth // 2 or 2  # of a single layer twice as many
    return tuple(dict.fromkeys([*pure, *mixed, *((place,) * half for place in (ordered[0], ordered[-1]))]))


def _model_digest(supernet: Supernet) -> str:
    """Digest of everything about a model that its latency depends on besides setting, widths and heads."""
    names = ("bottleneck_size", "bottleneck_act", "mlm_activation", "chunk_size_feed_forward", "trigram_input")
    rest = [(name, repr(getattr(supernet.model.config, name, None))) for name in names]
    return hashlib.sha256(repr((shape_digest(supernet), rest)).encode()).hexdigest()


def _continued(found: BlockLatencyTable, wanted: BlockLatencyTable, path: str | Path) -> BlockLatencyTable:
    """A table that was read, if it is of what is to be measured."""
    require_measured_here(found.setting, wanted.setting, path=path)
    if found.model != wanted.model:
        raise CheckpointError(f"{path} was measured on another model; delete it or choose another file")
    if (found.shapes, found.variants) != (wanted.shapes, wanted.variants):
        raise CheckpointError(
            f"{path} was measured for blocks of other widths or heads than they have now; delete it or choose another "
            "file"
        )
    return found


def _forwards(
    supernet: Supernet, table: BlockLatencyTable, *, device: str | torch.device | None, dtype: torch.dtype | None
) -> list[Forward]:
    """The models to time, one per variant."""
    weights, pool = moved_weights(supernet, device=device, dtype=dtype), CachePool()
    paths = ([table.shapes[place] for place in variant] for variant in table.variants)
    return [Forward(timed_path(supernet, path, weights=weights), table.setting, pool=pool) for path in paths]


def timed_path(
    supernet: Supernet, shapes: Sequence[BlockShape], *, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Makes a static model of the config and memory layout that :func:`hf_elastic.extract` gives, to be timed only.

    Its parameters are compact, and views of the supernet's: any number of such models needs no memory. What they hold
    means nothing, which does not change how long a forward takes.

    Args:
        supernet: of candidate blocks; unchanged.
        shapes: one per layer, also such as no architecture of the space has, and of any number of layers.
        weights: the supernet's ``state_dict()``, where it is to be in another dtype or on another device.
    """
    base, first, depth = supernet.base, supernet.block_parts[0].layer, len(supernet.block_parts)
    prefix = next(name for name, module in base.named_modules() if module is first).removesuffix("0")
    held: Mapping[str, Tensor] = weights or base.state_dict()
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(shapes)
    config = path_config(config, tuple(shapes))
    if "add_pooling_layer" in config.to_dict():
        config.add_pooling_layer = "pooler" in dict(base.base_model.named_children())
    with no_init_weights(), torch.device("meta"):
        wanted: dict[str, Tensor] = type(base)(config).state_dict()
    state = {name: held[name] for name in wanted if not name.startswith(prefix)}
    for name in [name for name in wanted if name.startswith(prefix)]:
        number, rest = name.removeprefix(prefix).split(".", 1)
        own = held[f"{prefix}{int(number) % depth}.candidates.{shapes[int(number)].block}.{rest}"]
        state[name] = own.flatten()[: wanted[name].numel()].view(wanted[name].shape)
    return build_model(type(base), config, state=state, parent=base)


@dataclass(frozen=True)
class CheckedLatency:
    """A prediction and what was measured, both in seconds."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """``predicted / measured - 1``."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class LatencyCheck:
    """Predictions of a latency table beside measurements of whole exported models; ``rows`` has one of each."""

    setting: Setting
    rows: tuple[CheckedLatency, ...]

    @property
    def median_error(self) -> float:
        """Median of the sizes of the relative errors."""
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def worst_error(self) -> float:
        """Largest size of a relative error."""
        return max(abs(row.error) for row in self.rows)

    @property
    def shift(self) -> float:
        """Median of the relative errors with their signs.

        Much of an error that is common to all models says that the machine is slower or faster than when the table was
        measured; which model is faster it does not change.
        """
        return statistics.median(row.error for row in self.rows)

    def __str__(self) -> str:
        width = max(len("architecture"), *(len(row.name) for row in self.rows))
        lines = [f"{'architecture':<{width}}  predicted    measured    error"]
        for row in self.rows:
            times = f"{1e3 * row.predicted:>6.2f} ms   {1e3 * row.measured:>6.2f} ms"
            lines.append(f"{row.name:<{width}}  {times}  {row.error:>+7.1%}")
        lines.append(
            f"relative error: median {self.median_error:.1%}, worst {self.worst_error:.1%}, common to all "
            f"{self.shift:+.1%}; {self.setting}"
        )
        return "\n".join(lines)


def check_latency(
    supernet: Supernet,
    table: BlockLatencyTable | LatencyTable,
    architectures: Mapping[str, Architecture],
    *,
    device: str | torch.device | None = None,
    rounds: int = MOST_ROUNDS,
    seconds: float = 20.0,
    timer: Timer = wall_clock,
) -> LatencyCheck:
    """Holds predictions of a table against whole exported models, measured in turns in the setting of the table.

    Args:
        supernet: the table's; unchanged.
        table: of candidate blocks, or of widths, heads and layers.
        architectures: by a name to show; each is extracted, compact.
        device: by default the supernet's.
        rounds: at most so many.
        seconds: in forwards, after which no new round begins; there are at least three.
        timer: runs a call and returns its seconds.

    Raises:
        ArchitectureError: an architecture is not a point of the space.
        CheckpointError: the table is of another model, not finished, or was not measured in this setting.
        DataError: the table does not reach an architecture, or there is none.
    """
    if not architectures:
        raise DataError("a latency table is checked on at least one architecture, got none")
    predicted = {name: table.predict(supernet, point) for name, point in architectures.items()}
    dtype, models = getattr(torch, table.setting.dtype), {}
    for name, point in architectures.items():
        module: Any = extract(supernet, point)  # transformers types `to` so that mypy cannot read it
        models[name] = module.to(device=device, dtype=dtype)
    measured = measure_models(models, table.setting, rounds=rounds, seconds=seconds, timer=timer)
    rows = (CheckedLatency(name, predicted[name], typical(measured[name].samples)) for name in models)
    return LatencyCheck(table.setting, tuple(rows))
