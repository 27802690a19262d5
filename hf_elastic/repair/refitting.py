"""``refit``: the output projections of a cut subnet, solved by least squares so that it follows its parent again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic.checkpoint import extract
from hf_elastic.errors import DataError
from hf_elastic.layers import ElasticProjection, evaluating
from hf_elastic.least_squares import NormalEquations, Solution
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.repair.parent_streams import ParentStreams, ParentWalk, streams_of
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import (
    MEMORY_LIMIT,
    Batch,
    HiddenStates,
    LayerCalls,
    Sublayer,
    Sublayers,
    kept_weight,
    output_projection,
    shaped,
)
from hf_elastic.supernet import Loadability, Supernet

RIDGE = 1e-3
CARRY = 0.5


@dataclass(frozen=True)
class SublayerFit:
    """What solving one output projection gave.

    Attributes:
        layer: number of the layer in the parent.
        sublayer: ``"attention"`` or ``"mlp"``.
        inputs: how many inputs are kept.
        rows: calibration tokens.
        rank: how many of the inputs they determine; ``None`` where there are at least twice as many tokens.
        ridge: the absolute ridge.
        error_before, error_after: root mean squared error per token, against what the projection was to give.
    """

    layer: int
    sublayer: str
    inputs: int
    rows: int
    rank: int | None
    ridge: float
    error_before: float
    error_after: float


@dataclass
class RefitReport:
    """What a refit did.

    Attributes:
        sublayers: every projection that was solved, in order.
        error_cut: relative error of the last hidden state on the calibration data, of the cut without repair; NaN
            where it was not run.
        error: the same after the repair; NaN where it was not judged.
        repaired: whether the repair is in effect; a repair that would end farther from the parent is dropped.
    """

    sublayers: list[SublayerFit] = field(default_factory=list)
    error_cut: float = math.nan
    error: float = math.nan
    repaired: bool = True


def refit(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    batches: Iterable[Batch],
    *,
    ridge: float = RIDGE,
    carry: float = CARRY,
    loadability: Loadability | None = None,
    memory: int = MEMORY_LIMIT,
    on_report: Callable[[RefitReport], object] | None = None,
) -> PreTrainedModel:
    """Extracts a subnet and repairs it in closed form, without training and without labels.

    See :func:`refitted`, which does the same inside the supernet. Sort by importance first; the result has the shapes
    and the loadability of ``extract(supernet, architecture)``.

    Args:
        supernet: where from; unchanged.
        architecture: what.
        batches: calibration inputs, ``input_ids`` of ``(B, T)`` and what else the model takes; some ten times as many
            tokens as FFN neurons are kept are enough.
        ridge: strength of the pull to the weights as they were, relative to the mean square of the inputs.
        carry: how much of the error made so far each projection is to make up for, from 0 to 1; see :func:`refitted`.
        loadability: form of the result, as for :func:`hf_elastic.extract`.
        memory: bytes of hidden states kept in memory; the rest waits on disk.
        on_report: called with what was solved.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        DataError: there are fewer tokens than kept neurons, the activations are not finite, or the repaired weights are
            beyond the dtype of the model.
        ExportError: as :func:`hf_elastic.extract`.
    """
    with refitted(supernet, architecture, batches, ridge=ridge, carry=carry, memory=memory) as report:
        if on_report is not None:
            on_report(report)
        return extract(supernet, architecture, loadability=loadability)


@contextmanager
def refitted(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    batches: Iterable[Batch],
    *,
    ridge: float = RIDGE,
    carry: float = CARRY,
    memory: int = MEMORY_LIMIT,
) -> Iterator[RefitReport]:
    r"""Repairs a subnet inside the supernet for the length of a ``with`` block, to export or to evaluate it there.

    Layer by layer, first attention and then the FFN, the output projection of the kept heads or neurons is solved for

    .. math:: \min_{W,b} \sum_t \|x_t W + b - y_t - c\,(h'_t - h_t)\|^2 + \lambda \|W - W_K\|^2

    over the calibration tokens. :math:`x_t` is what enters the kept part in the *subnet as repaired so far*,
    :math:`y_t` what the whole sublayer of the parent makes of the same stream, :math:`h_t` the residual stream that
    this leads to and :math:`h'_t` the parent's at that place; :math:`W_K` are the kept rows of the parent's weight.
    With :math:`c = 1` (``carry``) each projection has to make up for all the error so far, as in "A Free Lunch in LLM
    Compression" (arXiv 2510.14444) and OSSCAR (arXiv 2403.12983); with 0 for that of its own cut. Part of it is best:
    on a sentence encoder that lost a layer, 1 brings the hidden states nearest but shrinks what it cannot predict. Kwon
    et al. 2022 (arXiv 2204.09656, section 4.3) solve for one factor per unit instead. What stands before the first cut
    stays as it is, bit for bit.

    Args:
        supernet: its weights are the parent's; inside the block the kept part of its output projections is the
            repaired one. Give the weights back by leaving the block before the supernet is used for anything else.
        architecture, batches, ridge, carry, memory: as :func:`refit`.

    Yields:
        The report. The architecture is not active; activate or extract it inside.

    Raises:
        ArchitectureError, DataError: as :func:`refit`.
    """
    shapes = supernet.layer_shapes(supernet.point(architecture))
    with repaired_shapes(supernet, shapes, batches, ridge=ridge, carry=carry, memory=memory) as report:
        yield report


@contextmanager
def repaired_shapes(
    supernet: Supernet,
    shapes: Sequence[LayerShape],
    batches: Iterable[Batch] | ParentStreams,
    *,
    ridge: float = RIDGE,
    carry: float = CARRY,
    memory: int = MEMORY_LIMIT,
    judged: bool = True,
    reach: int | None = None,
) -> Iterator[RefitReport]:
    """As :func:`refitted`, for any shape of each layer, in the space or not.

    Args:
        supernet, ridge, carry, memory: as :func:`refitted`.
        batches: as :func:`refitted`; for many repairs on the same ones, what the parent makes of them.
        shapes: one per layer.
        judged: whether to compare with the mere cut; without, a third of the time is saved, the errors of the report
            are NaN, and the repair stays whatever it ends at.
        reach: how many layers behind the first cut are repaired, without being judged; by default all.
    """
    parent = streams_of(supernet, batches)
    if not 0 < ridge < float("inf"):
        raise DataError(f"ridge={ridge!r} must be a number above 0")
    if not 0 <= carry <= 1:
        raise DataError(f"carry={carry!r} must be a number from 0 to 1")
    with ExitStack() as stack:
        stack.enter_context(evaluating(supernet.model))
        work = _Refit(supernet, shapes, parent, ridge=ridge, carry=carry, memory=memory, judged=judged, reach=reach)
        stack.callback(work.restore)
        with torch.no_grad(), supernet.activate(supernet.space.largest()):
            work.run()
        yield work.report


class _Refit:
    """One repair: the parent's stream, the subnet's as repaired, and the subnet's as only cut."""

    def __init__(
        self,
        supernet: Supernet,
        shapes: Sequence[LayerShape],
        parent: ParentStreams,
        *,
        ridge: float,
        carry: float,
        memory: int,
        judged: bool,
        reach: int | None,
    ) -> None:
        self.supernet, self.parent, self.ridge, self.carry = supernet, parent, ridge, carry
        self.runner, self.batches, self.memory = parent.runner, range(len(parent.batches)), memory // 4
        self.shapes, self.judged = shapes, judged and reach is None
        cuts = (part.index for part, shape in zip(supernet.layer_parts, shapes, strict=True) if shape != part.full)
        self.first_cut = next(cuts, len(shapes))
        self.end = len(shapes) if reach is None else min(len(shapes), self.first_cut + reach + 1)
        self.student, self.cut, self.targets = (HiddenStates(memory=self.memory) for _ in range(3))
        self.report = RefitReport()
        self._originals: list[tuple[Tensor, Tensor]] = []

    def restore(self) -> None:
        """Gives the supernet its weights back."""
        with torch.no_grad():
            for place, values in reversed(self._originals):
                place.copy_(values)
        self._originals.clear()

    def run(self) -> None:
        with ExitStack() as stack:
            for states in (self.student, self.cut, self.targets):
                stack.callback(states.close)
            walk = stack.enter_context(self.parent.walk(memory=self.memory))
            for part, shape in zip(self.supernet.layer_parts[: self.end], self.shapes, strict=False):
                touched = part.index >= self.first_cut
                self._start(part, shape, walk=walk, touched=touched)
                if touched:
                    self._finish(part, shape)
            if self.judged:
                self._judge(walk)

    def _start(self, part: LayerPart, shape: LayerShape, *, walk: ParentWalk, touched: bool) -> None:
        """Advances the parent and the mere cut through a layer, and solves the subnet's attention on the way."""
        behind = touched and part.index != self.first_cut
        follows = behind or shape.num_attention_heads != part.full.num_attention_heads
        sums = None
        if shape.attention and follows:
            sums = self._sums(part, shape.num_attention_heads * part.head_dim)
        for index in self.batches:
            whole = walk.through(part, index)
            if not touched:
                self.student[index] = self.cut[index] = whole.after
                continue
            self.targets[index] = whole.mlp
            calls = self.parent.calls(index)
            if sums is not None:
                student = self._entering(self.student, part, index, calls=calls)
                self._add(sums, part, "attention", student=student, calls=calls, wanted=whole.attention)
            if self.judged:
                cut = self._entering(self.cut, part, index, calls=calls)
                with shaped(part, shape):
                    self.cut[index] = self.runner.run(part.index, cut, calls)
        if sums is not None:
            self._solve(part, "attention", sums)

    def _finish(self, part: LayerPart, shape: LayerShape) -> None:
        """Solves the subnet's FFN, behind its solved attention, and advances the subnet."""
        if shape.mlp:
            sums = self._sums(part, shape.intermediate_size)
            with shaped(part, replace(shape, intermediate_size=part.full.intermediate_size)):
                for index in self.batches:
                    calls = self.parent.calls(index)
                    student = self._entering(self.student, part, index, calls=calls)
                    self._add(sums, part, "mlp", student=student, calls=calls, wanted=self.targets[index])
            self._solve(part, "mlp", sums)
            del sums  # what comes next needs the memory
        if part.index + 1 == self.end and not self.judged:
            return  # nobody looks at what comes out
        with shaped(part, shape):
            for index in self.batches:
                calls = self.parent.calls(index)
                student = self._entering(self.student, part, index, calls=calls)
                self.student[index] = self.runner.run(part.index, student, calls)

    def _add(
        self,
        sums: NormalEquations,
        part: LayerPart,
        sublayer: Sublayer,
        *,
        student: Tensor,
        calls: LayerCalls,
        wanted: Tensor,
    ) -> None:
        """Adds a batch: the subnet's stream through the whole sublayer, of whose inputs the first are kept."""
        with Sublayers(part, until=sublayer) as own:
            self.runner.run(part.index, student, calls)
        alone = own.outputs[sublayer].reshape(student.shape)  # (B, T, D)
        carried = wanted - own.residual(sublayer, student)
        target = alone + self.carry * (carried - alone)
        sums.add(calls.rows(own.inputs[sublayer])[:, : len(sums.gram)], calls.rows(target))

    def _entering(self, states: HiddenStates, part: LayerPart, index: int, *, calls: LayerCalls) -> Tensor:
        return calls.hidden if part.index == 0 else states[index]

    def _sums(self, part: LayerPart, inputs: int) -> NormalEquations:
        return NormalEquations(inputs, part.hidden_size, device=self.supernet.model.device)

    def _solve(self, part: LayerPart, sublayer: Sublayer, sums: NormalEquations) -> None:
        projection = output_projection(part, sublayer)
        weight, bias = kept_weight(projection, len(sums.gram))
        try:
            solved = sums.solve(weight, bias, ridge=self.ridge)
        except DataError as error:
            raise DataError(f"layer {part.index}, {sublayer}: {error}") from None
        for place, values in solved_places(projection, solved):
            self._originals.append((place, place.clone()))
            place.copy_(within_dtype(values, place.dtype, layer=part.index, sublayer=sublayer))
        self.report.sublayers.append(
            SublayerFit(
                part.index, sublayer, len(sums.gram), solved.rows, solved.rank, solved.ridge,
                solved.error_before**0.5, solved.error_after**0.5,
            )
        )  # fmt: skip

    def _judge(self, walk: ParentWalk) -> None:
        """Measures cut and repair at the last hidden state, and drops a repair that ended farther away."""
        size, errors = 0.0, [0.0, 0.0]
        for index in self.batches:
            calls = self.parent.calls(index)
            wanted = calls.rows(walk.last(index)).double()
            size += float(wanted.square().sum())
            for number, states in enumerate((self.cut, self.student)):
                errors[number] += float((calls.rows(states[index]).double() - wanted).square().sum())
        self.report.error_cut, self.report.error = (_share(error, size) ** 0.5 for error in errors)
        if self.report.error > self.report.error_cut:
            self.restore()
            self.report.repaired, self.report.error = False, self.report.error_cut


def _share(error: float, size: float) -> float:
    """``error / size``; of a parent that gives zeros alone, 0 where it is met and infinity where it is not."""
    return error / size if size else math.inf if error else 0.0


def within_dtype(values: Tensor, dtype: torch.dtype, *, layer: int, sublayer: str) -> Tensor:
    """Solved weights in the dtype of the model.

    Raises:
        DataError: they are beyond it.
    """
    narrow = values.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        kind, largest = str(dtype).removeprefix("torch."), float(values.abs().max())
        raise DataError(
            f"layer {layer}, {sublayer}: the repaired weights are beyond {kind} (up to {largest:.3g}); "
            "repair the model in float32 (model.float()), or with a larger ridge="
        )
    return narrow


def solved_places(projection: ElasticProjection, solved: Solution) -> list[tuple[Tensor, Tensor]]:
    """Where a solution belongs in a projection: pairs of a view on its parameters and the values."""
    weight, bias = kept_weight(projection, len(solved.weight))
    places = [(weight, solved.weight)]
    if bias is not None:
        assert solved.bias is not None
        places.append((bias, solved.bias))
    return places
