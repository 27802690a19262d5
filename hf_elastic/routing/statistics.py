"""``routing_statistics``: what routers choose on real inputs, and how much that depends on the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_elastic import costs
from hf_elastic.errors import DataError
from hf_elastic.files import whole_files
from hf_elastic.layers import evaluating
from hf_elastic.models.elastic_routed_cache import Gathered
from hf_elastic.models.elastic_routers import KINDS, PERCENT, TOKENS, Observation
from hf_elastic.routers import RouterPart
from hf_elastic.routing.handles import check_mask, require_routers
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import Batch, checked_batches, on_device
from hf_elastic.supernet import Supernet

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SAME = 0.01  # a dependence on the input below this is none
_BEFORE = {"heads": "attention_tokens", "experts": "mlp_tokens"}  # who lets in the tokens that units serve


@dataclass(frozen=True)
class RouterStatistics:
    r"""What one router chose.

    Attributes:
        layer: number of the layer.
        kind: what is routed.
        capacity: nominal share of the tokens that enter, or of the units that serve a token.
        share: the measured one; of units, for tokens that entered the sublayer.
        units: share of these tokens that each head or expert served; of tokens, ``share`` alone.
        entropy: of the use of units, :math:`-\sum_u p_u \log_2 p_u` bits with :math:`p_u` the share of all decisions
            that chose unit :math:`u`; ``None`` of tokens.
        evenness: the entropy divided by :math:`\log_2 U`, which it has where all are used alike; ``None`` of tokens.
        dependence: how much decisions depend on the input, from 0 (at a position always the same) to 1 (as much as they
            can): the variance of each decision over the texts at a position, averaged over positions and units, divided
            by :math:`c (1 - c)` for the share :math:`c`. Positions count from the first token that is not padding, each
            by its texts less one. ``None`` where no position has two texts.
    """

    layer: int
    kind: str
    capacity: float
    share: float
    units: tuple[float, ...]
    entropy: float | None = None
    evenness: float | None = None
    dependence: float | None = None

    @property
    def warning(self) -> str:
        """What is wrong with the router, if anything is: no choice that depends on the input, or units never used."""
        found = []
        if self.dependence is not None and self.dependence < _SAME:
            found.append("always chooses the same" if 0 < self.share < 1 else f"lets in {self.share:.0%} of the tokens")
        if unused := sum(share == 0 for share in self.units if self.kind not in TOKENS):
            found.append(f"never uses {unused} of {len(self.units)}")
        return ", ".join(found)


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routers of a model chose on some inputs, in one architecture.

    Attributes:
        architecture: the one that was active.
        routers: one for each router that is not bypassed.
        tokens: tokens that were run, without padding.
        seq_len: for which MACs are counted: the longest row.
        nominal_macs: MACs as a share of those with all routers bypassed, if exactly the capacities were used.
        measured_macs: likewise, by the same formulas with the measured shares.
    """

    architecture: dict[str, Value]
    routers: tuple[RouterStatistics, ...]
    tokens: int
    seq_len: int
    nominal_macs: float
    measured_macs: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of all routers, with their places."""
        return tuple(f"layer {each.layer} {each.kind}: {each.warning}" for each in self.routers if each.warning)

    def to_dict(self) -> dict[str, Any]:
        """Returns the statistics in lists, strings and numbers that JSON can hold."""
        return asdict(self) | {"routers": [asdict(each) | {"units": list(each.units)} for each in self.routers]}

    def __str__(self) -> str:
        """A table with a row for each router."""
        if not self.routers:
            return "all routers are bypassed in this architecture; give one with capacities below 1"
        lines = [
            f"{'layer':>5}  {'kind':<16} {'capacity':>9} {'measured':>9} {'entropy':>9} {'even':>6} {'depends':>8}"
        ]
        for each in self.routers:
            bits = "-" if each.entropy is None else f"{each.entropy:.2f} bit"
            even, depends = ("-" if x is None else f"{x:.2f}" for x in (each.evenness, each.dependence))
            line = f"{each.layer:>5}  {each.kind:<16} {each.capacity:>9.1%} {each.share:>9.1%} {bits:>9} {even:>6}"
            lines.append(f"{line} {depends:>8}  {each.warning}".rstrip())
        lines.append(
            f"MACs at {self.seq_len} tokens: {self.nominal_macs:.1%} of the whole nominally, {self.measured_macs:.1%} "
            f"by the measured shares ({self.tokens} tokens)"
        )
        lines.append("depends: 0 where the same is chosen whatever the input, 1 where it decides all")
        return "\n".join(lines)

    def figure(self) -> go.Figure:
        """Returns a plotly figure: a row for each kind, with its use by layer, and how much that depends on the input.

        Raises:
            DataError: all routers are bypassed.
        """
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        kinds = [kind for kind in KINDS if any(each.kind == kind for each in self.routers)]
        if not kinds:
            raise DataError("all routers are bypassed in this architecture, so there is nothing to draw")
        titles = [title for kind in kinds for title in (f"{kind}: share", f"{kind}: dependence on the input")]
        figure = make_subplots(rows=len(kinds), cols=2, subplot_titles=titles)
        for row, kind in enumerate(kinds, start=1):
            mine = [each for each in self.routers if each.kind == kind]
            layers = [each.layer for each in mine]
            if kind in TOKENS:
                figure.add_trace(go.Bar(x=layers, y=[each.share for each in mine], name="measured"), row=row, col=1)
                nominal = go.Scatter(x=layers, y=[each.capacity for each in mine], name="capacity", mode="markers")
                figure.add_trace(nominal, row=row, col=1)
            else:
                most = max(len(each.units) for each in mine)
                cells = [
                    [each.units[unit] if unit < len(each.units) else None for each in mine] for unit in range(most)
                ]
                heatmap = go.Heatmap(x=layers, y=list(range(most)), z=cells, coloraxis="coloraxis", name=kind)
                figure.add_trace(heatmap, row=row, col=1)
            depends = go.Bar(x=layers, y=[each.dependence for each in mine], name="dependence")
            figure.add_trace(depends, row=row, col=2)
            figure.update_yaxes(range=[0, 1], row=row, col=2)
        figure.update_xaxes(title_text="layer", row=len(kinds))
        figure.update_layout(coloraxis={"cmin": 0, "cmax": 1}, showlegend=False, height=260 * len(kinds) + 80)
        return figure

    def plot(self, path: str | Path) -> Path:
        """Writes :meth:`figure` as a page, with the script of plotly beside it, and returns its path."""
        with whole_files(Path(path).parent) as aside:
            self.figure().write_html(aside / Path(path).name, include_plotlyjs="directory")
        return Path(path)


def routing_statistics(
    supernet: Supernet,
    batches: Iterable[Batch] | Batch,
    architecture: Architecture | Mapping[str, Value] | None = None,
) -> RoutingStatistics:
    """Runs inputs and counts what the routers choose; modes and what is active stay as they were.

    Args:
        supernet: a model with routers; of a causal one, calibrated if tokens are routed.
        batches: inputs of the model, with an ``attention_mask`` ``(B, T)`` where there is padding; with several rows,
            without which it cannot be told what depends on the input.
        architecture: a point of the space; by default what is active.

    Raises:
        UnsupportedModelError: the model has no routers.
        DataError: there is no batch, or a mask is not of shape ``(B, T)``.
        ArchitectureError: the architecture is not a point of the space.
    """
    require_routers(supernet, "routing_statistics")
    data = checked_batches(batches)
    point = supernet.active if architecture is None else supernet.point(architecture)
    masks = [_real(batch) for batch in data]
    longest = max(mask.shape[1] for mask in masks)
    options = {"use_cache": False} if supernet.causal else {}
    with torch.no_grad(), evaluating(supernet.model), supernet.activate(point), ExitStack() as stack:
        counters = [_Counter(part, longest) for part in supernet.router_parts]
        for counter in counters:
            observers = counter.part.routers.observers
            observers.append(counter.see)
            stack.callback(observers.remove, counter.see)
        for batch, real in zip(data, masks, strict=True):
            for counter in counters:
                counter.begin(real)
            supernet.model(**{**on_device(batch, supernet.base), **options})
        found = tuple(one for counter in counters for one in counter.statistics())
    nominal, measured = _mac_shares(supernet, point, found, seq_len=longest)
    return RoutingStatistics(
        architecture=dict(point),
        routers=found,
        tokens=int(sum(int(mask.sum()) for mask in masks)),
        seq_len=longest,
        nominal_macs=nominal,
        measured_macs=measured,
    )


def _real(batch: Batch) -> Tensor:
    """Which tokens ``(B, T)`` of a batch are not padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        given = (("input_ids", None), ("inputs_embeds", -1))
        shapes = [batch[name].shape[:end] for name, end in given if name in batch]
        if not shapes:
            raise DataError(
                f"a batch has {', '.join(batch)}; give input_ids, and an attention_mask where there is padding"
            )
        if len(shapes[0]) != 2:
            raise DataError(f"input_ids are {tuple(shapes[0])}; give some of shape (batch, tokens)")
        return torch.ones(shapes[0], dtype=torch.bool)
    check_mask(batch)
    return mask.cpu().bool()


def _mac_shares(
    supernet: Supernet, point: Architecture, found: Iterable[RouterStatistics], *, seq_len: int
) -> tuple[float, float]:
    """Nominal and measured MACs, as shares of those with all routers bypassed."""
    measured: dict[int, dict[str, float]] = {}
    for each in found:
        measured.setdefault(each.layer, {})[each.kind] = each.share
    saved = really = 0
    for part in supernet.router_parts:
        saved += part.saved_macs(point, seq_len=seq_len)
        really += part.saved_macs(point, seq_len=seq_len, measured=measured.get(part.layer.index))
    whole = costs.macs(supernet, point, seq_len=seq_len) + saved
    return 1 - saved / whole, 1 - really / whole


class _Counter:
    """Counts what the routers of one layer choose, by position.

    Args:
        part: the routers.
        longest: positions.
    """

    def __init__(self, part: RouterPart, longest: int) -> None:
        self.part, self._longest = part, longest
        self._seen: dict[str, Tensor] = {}  # (P,) tokens that were decided about
        self._chosen: dict[str, Tensor] = {}  # (P, U)
        self._real = torch.empty(0)
        self._entered: dict[str, Tensor] = {}

    def begin(self, real: Tensor) -> None:
        """Starts a batch whose tokens ``(B, T)`` are padding where ``real`` is not."""
        self._real, self._entered = real, {}

    def see(self, what: Observation) -> None:
        """Counts the decisions of a router; an observer of the routers."""
        keep = what.decision.keep.cpu()
        if what.kind in TOKENS:
            self._entered[what.kind] = keep
            self._add(what.kind, keep.unsqueeze(-1), self._real)
            return
        entered = self._entered.get(_BEFORE[what.kind])
        if entered is None:
            self._add(what.kind, keep.view(*self._real.shape, -1), self._real)
        elif what.kind == "heads":  # of tokens that were gathered row by row
            self._add(what.kind, Gathered(entered).put(keep), entered & self._real)
        else:  # of all that entered, one after another
            whole = keep.new_zeros(*self._real.shape, keep.shape[-1])
            whole[entered] = keep
            self._add(what.kind, whole, entered & self._real)

    def _add(self, kind: str, keep: Tensor, counted: Tensor) -> None:
        positions = (self._real.long().cumsum(-1) - 1)[counted]  # (N,)
        seen = self._seen.setdefault(kind, torch.zeros(self._longest, dtype=torch.float64))
        chosen = self._chosen.setdefault(kind, torch.zeros(self._longest, keep.shape[-1], dtype=torch.float64))
        seen.index_add_(0, positions, torch.ones(len(positions), dtype=torch.float64))
        chosen.index_add_(0, positions, keep[counted].double())

    def statistics(self) -> list[RouterStatistics]:
        """What was counted; nothing of routers that are bypassed."""
        return [self._of(kind) for kind in self.part.routers if kind in self._seen]

    def _of(self, kind: str) -> RouterStatistics:
        seen, chosen, routers = self._seen[kind], self._chosen[kind], self.part.routers
        units = chosen.sum(0) / seen.sum().clamp(min=1)  # (U,)
        share = float(units.mean())
        entropy = evenness = None
        if kind in TOKENS:
            capacity = routers.active[kind] / PERCENT
        else:
            capacity = routers.units(kind) / routers.available[kind]
            used = units / units.sum().clamp(min=1e-30)
            entropy = float(-torch.special.xlogy(used, used).sum() / math.log(2)) + 0.0
            evenness = entropy / math.log2(len(units)) if len(units) > 1 else None
        return RouterStatistics(
            layer=self.part.layer.index,
            kind=kind,
            capacity=capacity,
            share=share,
            units=tuple(units.tolist()),
            entropy=entropy,
            evenness=evenness,
            dependence=_dependence(seen, chosen, share=share),
        )


def _dependence(seen: Tensor, chosen: Tensor, *, share: float) -> float | None:
    """Variance of decisions within positions, of what it could be; see :class:`RouterStatistics`."""
    several = seen > 1
    free = float((seen[several] - 1).sum())
    if not free:
        return None
    if not 0 < share < 1:
        return 0.0
    seen, chosen = seen[several].unsqueeze(-1), chosen[several]  # (P, 1), (P, U)
    variance = float((chosen - chosen.square() / seen).sum(0).mean() / free)
    return min(1.0, variance / (share * (1 - share)))
