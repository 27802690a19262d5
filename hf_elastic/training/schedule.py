"""When which block of a supernet gets wider: the growth schedule of ELM, as a pure function of widths and scores.

ELM (Wang 2025, arXiv 2510.27037) starts every candidate block of every layer narrow and after each epoch widens those
whose PCA score is highest, until the mean path has as many parameters as the budget allows. The schedule is that of
its author's code; where we differ from it, a docstring says so.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_elastic.architecture import shown
from hf_elastic.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Block = tuple[int, str]  # layer, name of the block
Check = Literal["block", "epoch"]
Reason = Literal["budget", "count", "all at their largest", "no measured block is left"]

_FORMAT = "hf_elastic.growth_history"
_FLAT = 1e-3


def growths_per_epoch(layers: int, blocks: int, epochs: int, *, average_growths: float = 3) -> int:
    r"""Return how many blocks grow after an epoch, :math:`K = \lfloor L \cdot a \cdot B / E \rfloor`.

    ELM has 12 layers of 6 blocks, 10 epochs and :math:`a = 3`: 21.

    Args:
        layers: ``L``.
        blocks: ``B``, candidate blocks of a layer.
        epochs: ``E``, epochs with growth after them.
        average_growths: :math:`a`, how often a block grows on average.

    Raises:
        TrainingError: No block would ever grow, or an argument is not positive.
    """
    if min(layers, blocks, epochs, average_growths) <= 0:
        raise TrainingError(
            f"{layers} layers of {blocks} blocks, {epochs} epochs and {average_growths:g} growths of a block: "
            "all have to be positive"
        )
    count = int(layers * average_growths * blocks // epochs)
    if not count:
        raise TrainingError(
            f"{layers} layers of {blocks} blocks that grow {average_growths:g} times in {epochs} epochs: less than one "
            f"growth in an epoch; take at least {math.ceil(epochs / (layers * blocks))} growths or fewer epochs"
        )
    return count


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """Hold what one decision about growth depends on.

    A block is named by its layer and its name; blocks of a layer have the order of ``widths``.

    Args:
        widths: FFN width of every block now.
        scores: Mean PCA score of every block that was measured in the epoch.
        epoch: Epochs finished, from 1.
        step: By how much a width grows; the last step up to the largest width may be shorter.
        largest: Largest width, of all blocks or of each.
        count: ``K``, how many blocks may grow.
        budget: Parameters that the mean path is to have.
        parameters: Parameters of a block as a function of layer, name and width.
        constant: Parameters outside the blocks.
        check: ``"block"`` to hold the mean against the budget before each block, ``"epoch"`` to do so once before all
            of them, as the author's code does; :func:`grown` says what follows.

    Raises:
        TrainingError: A value is not what is allowed.
    """

    widths: Mapping[Block, int]
    scores: Mapping[Block, float]
    epoch: int
    step: int
    largest: Mapping[Block, int] | int
    count: int
    budget: float
    parameters: Callable[[int, str, int], int]
    constant: int
    check: Check = "block"

    def __post_init__(self) -> None:
        if not self.widths:
            raise TrainingError("widths= is empty: no block could grow")
        for name, value in (("step", self.step), ("count", self.count)):
            if value < 1:
                raise TrainingError(f"{name}={value!r} has to be at least 1")
        if self.check not in get_args(Check):
            raise TrainingError(f"check={self.check!r} is not one of {', '.join(map(repr, get_args(Check)))}")
        if not math.isfinite(self.budget):
            raise TrainingError(f"budget={self.budget!r} has to be a number of parameters")
        for block, width in self.widths.items():
            if isinstance(self.largest, Mapping) and block not in self.largest:
                raise TrainingError(f"largest= says nothing about {_named(block)}")
            if width > (largest := self.largest_of(block)):
                raise TrainingError(f"{_named(block)} is {width} wide, above its largest width {largest}")
        if unknown := [block for block in self.scores if block not in self.widths]:
            raise TrainingError(f"scores= holds blocks that widths= does not: {shown(unknown)}")

    def largest_of(self, block: Block) -> int:
        """Return the largest width of a block."""
        return self.largest[block] if isinstance(self.largest, Mapping) else self.largest

    def mean_parameters(self, widths: Mapping[Block, int] | None = None) -> float:
        r"""Return the mean number of parameters of subnets that take one block of each layer, drawn uniformly:
        :math:`c + \sum_l \frac{1}{B_l} \sum_b p_{l,b}(w_{l,b})`.

        The author's code draws 1,000 subnets and averages; ours is what that average tends to.

        Args:
            widths: Of every block; by default those of the plan.
        """
        return float(_mean(self, self.widths if widths is None else widths))


@dataclass(frozen=True)
class Growth:
    """One block that grew.

    Attributes:
        layer: its layer.
        block: its name.
        before: its width before.
        after: its width afterwards.
    """

    layer: int
    block: str
    before: int
    after: int


@dataclass(frozen=True)
class GrowthStep:
    """What one decision about growth came to.

    Attributes:
        grown: the blocks that grow, the highest score first.
        widths: FFN width of every block afterwards.
        parameters_before, parameters_after: parameters of the mean path.
        reason: why no further block grew. ``"budget"``: the mean path has reached it; ``"count"``: as many blocks
            grew as may; ``"all at their largest"``; ``"no measured block is left"``: all that were measured grew or are
            at their largest.
    """

    grown: tuple[Growth, ...]
    widths: Mapping[Block, int]
    parameters_before: float
    parameters_after: float
    reason: Reason


def grown(plan: GrowthPlan) -> GrowthStep:
    """Decide which blocks grow.

    Blocks are taken from the highest score down, of equal scores the lower layer and then the earlier block first. Each
    grows by one step until ``count`` of them grew; one at its largest width is passed over, and so is one that was not
    measured.

    With ``check="epoch"``, the rule of the author's code, nothing grows when the mean path is above the budget before
    the first block; otherwise the budget may be overshot by the growth of a whole epoch. With ``check="block"``, ours,
    no block grows once the mean path has reached the budget; it is overshot by less than one growth.

    Raises:
        TrainingError: A score is not finite, or blocks could grow but none was measured.

    Warns:
        UserWarning: The scores differ by less than 0.001: they hardly say which blocks to widen.
    """
    _require_finite(plan)
    widths = dict(plan.widths)
    sizes = Counter(layer for layer, _ in widths)
    before = mean = _mean(plan, widths)
    made: list[Growth] = []
    reason = _stopped(plan, mean, made)
    if reason is None and not plan.scores and not _all_largest(plan, widths):
        raise TrainingError(f"no block was measured in epoch {plan.epoch}, so none can grow; measure more often")
    for layer, name in _walk(plan):
        if reason is not None:
            break
        old = widths[layer, name]
        new = min(old + plan.step, plan.largest_of((layer, name)))
        mean += Fraction(plan.parameters(layer, name, new) - plan.parameters(layer, name, old), sizes[layer])
        widths[layer, name] = new
        made.append(Growth(layer, name, old, new))
        reason = _stopped(plan, mean, made)
    if made:
        _warn_if_flat(plan)
    if reason is None:
        reason = "all at their largest" if _all_largest(plan, widths) else "no measured block is left"
    return GrowthStep(tuple(made), widths, float(before), float(mean), reason)


def check_budget(plan: GrowthPlan) -> None:
    """Check before training that growth can reach the budget.

    Args:
        plan: With the widths of the start; its scores do not matter.

    Raises:
        TrainingError: The budget is below the mean path of these widths, or above that of the largest widths.
    """
    start = plan.mean_parameters()
    end = plan.mean_parameters({block: plan.largest_of(block) for block in plan.widths})
    if plan.budget < start:
        raise TrainingError(
            f"total_parameters={plan.budget:,.0f} is below the {start:,.0f} of the mean path before any growth, so "
            "that no block would grow; raise it or start with narrower blocks"
        )
    if plan.budget > end:
        raise TrainingError(
            f"total_parameters={plan.budget:,.0f} is above the {end:,.0f} of the mean path with all blocks at their "
            "largest, so that it would never be reached; lower it or allow wider blocks"
        )


def _mean(plan: GrowthPlan, widths: Mapping[Block, int]) -> Fraction:
    sizes = Counter(layer for layer, _ in widths)
    shares = (Fraction(plan.parameters(layer, name, w), sizes[layer]) for (layer, name), w in widths.items())
    return plan.constant + sum(shares, Fraction(0))


def _walk(plan: GrowthPlan) -> list[Block]:
    """Return the blocks that may grow, in the order in which they do."""
    places = {block: place for place, block in enumerate(plan.widths)}
    waiting = [block for block in plan.scores if plan.widths[block] < plan.largest_of(block)]
    return sorted(waiting, key=lambda block: (-plan.scores[block], block[0], places[block]))


def _stopped(plan: GrowthPlan, mean: Fraction, made: list[Growth]) -> Reason | None:
    if plan.check == "block":
        full = mean >= plan.budget
    else:
        full = not made and mean > plan.budget
    if full:
        return "budget"
    return "count" if len(made) == plan.count else None


def _all_largest(plan: GrowthPlan, widths: Mapping[Block, int]) -> bool:
    return all(width == plan.largest_of(block) for block, width in widths.items())


def _require_finite(plan: GrowthPlan) -> None:
    broken = [block for block, score in plan.scores.items() if not math.isfinite(score)]
    if broken:
        rest = f" (and those of {len(broken) - 1} more blocks)" if len(broken) > 1 else ""
        raise TrainingError(
            f"training has diverged: the PCA score of {_named(broken[0])} in epoch {plan.epoch} is "
            f"{plan.scores[broken[0]]}{rest}; lower the learning rate, or train in bf16 or float32 instead of fp16"
        )


def _warn_if_flat(plan: GrowthPlan) -> None:
    lowest, highest = min(plan.scores.values()), max(plan.scores.values())
    if len(plan.scores) > 1 and highest - lowest < _FLAT:
        warnings.warn(
            f"PCA scores are flat: those of {len(plan.scores)} blocks in epoch {plan.epoch} lie between {lowest:.6g} "
            f"and {highest:.6g}; growth goes on, where they are equal in the order of layers and blocks",
            UserWarning,
            stacklevel=3,
        )


def _named(block: Block) -> str:
    return f"block {block[1]!r} of layer {block[0]}"


@dataclass(frozen=True)
class GrowthEntry:
    """One decision of a run.

    Attributes:
        epoch: epochs finished, from 1.
        step: optimizer steps finished.
        scores: mean PCA score of every block that was measured.
        grown: the blocks that grew, the highest score first.
        parameters_before, parameters_after: parameters of the mean path.
        reason: why no further block grew, as :class:`GrowthStep` has it.
    """

    epoch: int
    step: int
    scores: Mapping[Block, float]
    grown: tuple[Growth, ...]
    parameters_before: float
    parameters_after: float
    reason: Reason


@dataclass
class GrowthHistory:
    """Hold how the blocks of a supernet grew during a run.

    Args:
        start: FFN width of every block before training.
        budget: Parameters that the mean path is to have.
        entries: One for each decision, in order.
    """

    start: Mapping[Block, int]
    budget: float
    entries: list[GrowthEntry] = field(default_factory=list)

    def record(self, plan: GrowthPlan, made: GrowthStep, *, step: int) -> GrowthEntry:
        """Append a decision.

        Args:
            plan: What it was made from.
            made: What :func:`grown` returned.
            step: Optimizer steps finished.

        Raises:
            TrainingError: The decision does not go on from the last one.
        """
        if dict(plan.widths) != self.widths():
            raise TrainingError(f"widths before the growth of epoch {plan.epoch} are not those the history ends with")
        entry = GrowthEntry(
            epoch=plan.epoch,
            step=step,
            scores={block: float(score) for block, score in plan.scores.items()},
            grown=made.grown,
            parameters_before=made.parameters_before,
            parameters_after=made.parameters_after,
            reason=made.reason,
        )
        self.entries.append(entry)
        return entry

    def widths(self, entries: int | None = None) -> dict[Block, int]:
        """Return the width of every block after the first ``entries`` decisions, by default after all.

        Raises:
            TrainingError: A block grew from another width than it had.
        """
        found = dict(self.start)
        for growth in (growth for entry in self.entries[:entries] for growth in entry.grown):
            block = growth.layer, growth.block
            if found.get(block) != growth.before:
                raise TrainingError(f"{_named(block)} is {found.get(block)} wide, but grew from {growth.before}")
            found[block] = growth.after
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the history in lists, strings and numbers that JSON can hold; :meth:`from_dict` reads them back."""
        return {
            "format": _FORMAT,
            "version": 1,
            "budget": float(self.budget),
            "start": [[layer, block, width] for (layer, block), width in self.start.items()],
            "entries": [
                {
                    **asdict(entry),
                    "scores": [[layer, block, score] for (layer, block), score in entry.scores.items()],
                    "grown": [[growth.layer, growth.block, growth.before, growth.after] for growth in entry.grown],
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthHistory:
        """Read what :meth:`to_dict` returned.

        Raises:
            CheckpointError: The data are no such history.
        """
        try:
            if data["format"] != _FORMAT or data["version"] != 1:
                raise ValueError(f"its format is {data['format']!r} {data['version']!r}, not {_FORMAT!r} 1")
            start = {(_whole(layer), str(block)): _whole(width) for layer, block, width in data["start"]}
            history = cls(start, float(data["budget"]), [_entry(entry) for entry in data["entries"]])
            history.widths()
        except (KeyError, TypeError, ValueError, AttributeError, TrainingError) as error:
            raise CheckpointError(f"not a history of growth: {type(error).__name__} {str(error)[:120]}") from error
        return history

    def figure(self) -> go.Figure:
        """Return a plotly figure: for each name of a block the widths by layer and epoch, and the mean parameters.

        Epoch 0 is the start. The last row holds the parameters of the mean path and the budget.
        """
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        names = list(dict.fromkeys(name for _, name in self.start))
        layers = sorted({layer for layer, _ in self.start})
        epochs = [0, *(entry.epoch for entry in self.entries)]
        over_time = [self.widths(number) for number in range(len(epochs))]
        columns = min(3, len(names))
        rows = math.ceil(len(names) / columns)
        free = rows * columns - len(names)
        cells: list[dict[str, int] | None] = [*({} for _ in names), *[None] * free]
        bottom: list[dict[str, int] | None] = [{"colspan": columns}, *[None] * (columns - 1)]
        figure = make_subplots(
            rows=rows + 1,
            cols=columns,
            specs=[*(cells[row * columns : (row + 1) * columns] for row in range(rows)), bottom],
            subplot_titles=[*names, "parameters of the mean path"],
        )
        for place, name in enumerate(names):
            widths = [[held.get((layer, name)) for held in over_time] for layer in layers]
            heatmap = go.Heatmap(x=epochs, y=layers, z=widths, name=name, coloraxis="coloraxis")
            figure.add_trace(heatmap, row=place // columns + 1, col=place % columns + 1)
        means = [*(entry.parameters_before for entry in self.entries[:1]), *(e.parameters_after for e in self.entries)]
        mean = go.Scatter(x=epochs[: len(means)], y=means, name="mean", mode="lines+markers")
        line = go.Scatter(x=epochs, y=[self.budget] * len(epochs), name="budget", mode="lines", line_dash="dash")
        figure.add_trace(mean, row=rows + 1, col=1)
        figure.add_trace(line, row=rows + 1, col=1)
        figure.update_yaxes(title_text="layer", col=1)
        figure.update_yaxes(title_text="parameters", row=rows + 1, col=1)
        figure.update_xaxes(title_text="epochs finished", row=rows + 1, col=1)
        figure.update_layout(
            coloraxis={"colorbar": {"title": "FFN width", "len": rows / (rows + 1), "y": 1, "yanchor": "top"}},
            legend={"x": 1.02, "y": 0, "yanchor": "bottom"},
            height=260 * (rows + 1),
        )
        return figure


def _entry(data: Mapping[str, Any]) -> GrowthEntry:
    if data["reason"] not in get_args(Reason):
        raise ValueError(f"reason {data['reason']!r} is not one of {', '.join(map(repr, get_args(Reason)))}")
    return GrowthEntry(
        epoch=_whole(data["epoch"]),
        step=_whole(data["step"]),
        scores={(_whole(layer), str(block)): float(score) for layer, block, score in data["scores"]},
        grown=tuple(
            Growth(_whole(layer), str(block), _whole(before), _whole(after))
            for layer, block, before, after in data["grown"]
        ),
        parameters_before=float(data["parameters_before"]),
        parameters_after=float(data["parameters_after"]),
        reason=data["reason"],
    )


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value
