"""``calibrate_routing``: thresholds by which a causal model decides, token by token, as it would by rank.

ElastiFormer (arXiv 2411.15281) trains routers of tokens to tell those of highest rank apart; how it chooses the
threshold at inference was not found. Here it is measured, for each capacity of each router.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_elastic.errors import DataError, TrainingError
from hf_elastic.layers import evaluating
from hf_elastic.models.elastic_routers import PERCENT, TOKENS, Router
from hf_elastic.routers import RouterPart
from hf_elastic.routing.handles import require_routers
from hf_elastic.space import Architecture, Value
from hf_elastic.streams import Batch, checked_batches, on_device
from hf_elastic.supernet import Supernet

TOLERANCE = 0.005
"""Share of tokens by which a measured share may miss its capacity on the calibration batches."""
_SPARE_PASSES = 2  # beyond one for each router, after which all are exact but for rounding

_MADE = ("alone", "architecture")  # settings in which thresholds are found

Place = tuple[int, str]  # layer, kind


@dataclass(frozen=True)
class CalibratedShare:
    """What one threshold does to the calibration batches in one setting.

    Attributes:
        layer: number of the layer.
        kind: of the router, ``"mlp_tokens"`` or ``"attention_tokens"``.
        capacity: wanted share of tokens, in per cent.
        setting: ``"alone"``, ``"architecture"``, or capacities of both kinds of tokens that were measured together, not
            calibrated, such as ``"attention_tokens 60 %, mlp_tokens 70 %"``; see :func:`calibrate_routing`.
        measured: share of the tokens, without padding, that entered.
        threshold: the score that a token must exceed.
    """

    layer: int
    kind: str
    capacity: int
    setting: str
    measured: float
    threshold: float

    @property
    def missed(self) -> float:
        """How far the measured share is from the wanted one."""
        return abs(self.measured - self.capacity / PERCENT)


@dataclass(frozen=True)
class CalibrationReport:
    """The shares of tokens that entered on the calibration batches with the thresholds that were found.

    Attributes:
        shares: one for each threshold and setting.
        tokens: tokens of the batches, without padding.
        passes: how often the batches were run in each setting.
        note: why there was nothing to do, if so.
    """

    shares: tuple[CalibratedShare, ...] = ()
    tokens: int = 0
    passes: int = 0
    note: str = ""

    @property
    def worst(self) -> float:
        """How far a measured share is from its capacity at most, of those that were calibrated."""
        return max((share.missed for share in self.shares if share.setting in _MADE), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in lists, strings and numbers that JSON can hold."""
        return asdict(self) | {"shares": [asdict(share) for share in self.shares]}

    def __str__(self) -> str:
        """A table: a row for each layer, kind and setting, a column for each capacity."""
        if not self.shares:
            return self.note
        capacities = sorted({share.capacity for share in self.shares})
        rows: dict[tuple[int, str, str], dict[int, float]] = defaultdict(dict)
        for share in self.shares:
            rows[share.layer, share.kind, share.setting][share.capacity] = share.measured
        wide = max(len(share.setting) for share in self.shares)
        lines = [f"{'layer':>5}  {'kind':<16}  {'setting':<{wide}}" + "".join(f"{c:>7} %" for c in capacities)]
        for (layer, kind, setting), found in rows.items():
            cells = "".join(f"{found[c]:>9.1%}" if c in found else f"{'-':>9}" for c in capacities)
            lines.append(f"{layer:>5}  {kind:<16}  {setting:<{wide}}{cells}")
        lines.append(
            f"{self.tokens} tokens, {self.passes} passes; a share misses its capacity by {self.worst:.1%} at most"
        )
        if any(share.setting not in _MADE for share in self.shares):
            lines.append("kinds named together are not calibrated so; give such an architecture to have it right")
        return "\n".join(lines)


def calibrate_routing(
    supernet: Supernet,
    batches: Iterable[Batch] | Batch,
    architecture: Architecture | Mapping[str, Value] | None = None,
) -> CalibrationReport:
    """Finds the thresholds by which routers of tokens decide in a causal model, and stores them in the routers.

    A token enters if its score exceeds the threshold of its router for the capacity that is active. It is chosen so
    that this share of the tokens of the batches does, padding left out. A router has one threshold for each of its
    capacities, but its scores depend on what else is let in. Each is found ``"alone"``: with the capacity in all layers
    that have it, and all else full, as by ``set_capacity(supernet, mlp_tokens=0.7)``. Dials that are turned together
    shift scores: of stories260K by some ten points with tokens of both kinds, by twenty where heads and experts are low
    too. Where both kinds of tokens are routed, the report says how much, with the other kind at its nearest capacity.
    To have a combination right, give it as the ``architecture``, such as ``supernet.active`` behind ``set_capacity``:
    its capacities are calibrated jointly, heads and experts as it says. That replaces the thresholds of these
    capacities for all architectures, so calibrate last the one that is to be used.

    Scores of a layer depend on the thresholds of layers before it: the batches are run until all shares are within half
    a point, at most a little more often than there are routers. Tokens of equal scores enter together or not at all;
    before attention has mixed them, those are all occurrences of one word.

    Do this after training, in the precision in which the model will be used. Nothing is drawn at random, no gradient is
    computed, and modes and the active architecture stay as they were; thresholds too, where anything is raised.

    Args:
        supernet: a model with routers.
        batches: inputs of the model, with an ``attention_mask`` ``(B, T)`` where there is padding; some thousand tokens
            like those of later use.
        architecture: a point of the space; by default all capacities are calibrated.

    Returns:
        The measured shares. Of encoders, which decide by rank in each row, and without routers of tokens there is
        nothing to do, and the report says so.

    Raises:
        UnsupportedModelError: the model has no routers.
        DataError: there is no batch, or it has no tokens.
        TrainingError: a router gives all tokens one score; it was not trained.
        ArchitectureError: the architecture is not a point of the space.
    """
    require_routers(supernet, "calibrate_routing")
    data = checked_batches(batches)
    settings = _settings(supernet) if architecture is None else {"architecture": [supernet.point(architecture)]}
    if nothing := _nothing_to_do(supernet):
        return CalibrationReport(note=nothing)
    flat = [_Setting(supernet, name, point) for name, points in settings.items() for point in points]
    flat = [setting for setting in flat if setting.routed]
    if not flat:
        return CalibrationReport(note="nothing to calibrate: all tokens enter everywhere in this architecture")
    with torch.no_grad(), evaluating(supernet.model), _kept_on_failure(supernet.router_parts):
        made = [setting for setting in flat if setting.name in _MADE]
        passes = _Calibration(made, data).run()
        for setting in flat:
            if setting not in made:
                setting.measure(data, first=False)
    return _report(flat, passes)


@contextmanager
def _kept_on_failure(parts: Iterable[RouterPart]) -> Iterator[None]:
    """Gives all thresholds back as they were if anything is raised inside the block."""
    routers = [part.routers[kind] for part in parts for kind in part.routers if kind in TOKENS]
    before = [(router, router.thresholds.clone()) for router in routers if router.thresholds is not None]
    try:
        yield
    except BaseException:
        for router, thresholds in before:
            router.thresholds.copy_(thresholds)
        raise


def _nothing_to_do(supernet: Supernet) -> str:
    routers = [part.routers for part in supernet.router_parts]
    if not any(kind in each for each in routers for kind in TOKENS):
        return "nothing to calibrate: no tokens are routed, and heads and experts are chosen by rank for each token"
    if not any(each.causal for each in routers):
        return "nothing to calibrate: in an encoder the tokens of highest rank in each row enter, whatever their scores"
    return ""


def _settings(supernet: Supernet) -> dict[str, list[Architecture]]:
    """Architectures in which each capacity of tokens is calibrated, by the name of the setting."""
    values: dict[str, set[int]] = {kind: set() for kind in TOKENS}
    for part in supernet.router_parts:
        for kind in values:
            values[kind] |= set(part.routers[kind].values[:-1]) if kind in part.routers else set()
    found: dict[str, list[Architecture]] = {
        "alone": [_uniform(supernet, {kind: value}) for kind in TOKENS for value in sorted(values[kind])]
    }
    if all(values.values()):
        for value in sorted(set().union(*values.values())):
            near = {kind: _nearest(values[kind], value) for kind in TOKENS}
            found[", ".join(f"{kind} {near[kind]} %" for kind in TOKENS)] = [_uniform(supernet, near)]
    return found


def _uniform(supernet: Supernet, wanted: Mapping[str, int]) -> Architecture:
    """The largest architecture, but with routers of some kinds at the capacity below all that is nearest."""
    active: dict[str, Value] = dict(supernet.space.largest())
    for part in supernet.router_parts:
        for kind in (kind for kind in wanted if kind in part.routers):
            below = part.routers[kind].values[:-1]
            active[part.choice_name(kind)] = _nearest(below, wanted[kind])
    return supernet.space.canonical(active)


def _nearest(values: Iterable[int], wanted: int) -> int:
    return min(values, key=lambda value: (abs(value - wanted), value))


class _Setting:
    """An architecture in which thresholds are found, and the scores that its routers gave last."""

    def __init__(self, supernet: Supernet, name: str, architecture: Architecture) -> None:
        self.supernet, self.name, self.architecture = supernet, name, architecture
        self.routed: dict[Place, int] = {}
        self.parts: dict[Place, RouterPart] = {}
        self.scores: dict[Place, list[Tensor]] = {}
        for part in supernet.router_parts:
            for kind in (kind for kind in TOKENS if kind in part.routers):
                if (capacity := part.capacity(kind, architecture)) < part.routers[kind].of:
                    self.routed[part.layer.index, kind] = capacity
                    self.parts[part.layer.index, kind] = part

    def measure(self, data: list[Batch], *, first: bool) -> None:
        """Runs the batches; the first time each batch has thresholds of its own, since there are none."""
        self.scores = {place: [] for place in self.routed}
        with self.supernet.activate(self.architecture), ExitStack() as stack:
            for place in self.routed:
                stack.enter_context(self._hooked(place, first=first))
            for batch in data:
                self.supernet.model(**{**on_device(batch, self.supernet.base), "use_cache": False})

    @contextmanager
    def _hooked(self, place: Place, *, first: bool) -> Iterator[None]:
        part = self.parts[place]

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> None:
            real = part.routers.context.real(inputs[0], needed=True)
            mine = scores.squeeze(-1).flatten() if real is None else scores.squeeze(-1)[real]  # (N,)
            self.scores[place].append(mine.cpu())
            if first:
                assert isinstance(module, Router)
                own = _threshold(mine.cpu(), self.routed[place])[0] if mine.numel() else 0.0
                _store(module, self.routed[place], own)

        hook = part.routers[place[1]].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def share(self, place: Place) -> float:
        """Share of the tokens that exceed the threshold there is now, by the scores seen last."""
        threshold = self.parts[place].routers[place[1]].threshold(self.routed[place]).cpu()
        scores = torch.cat(self.scores[place])
        return float((scores > threshold).double().mean())


class _Calibration:
    """Runs settings until their shares are right.

    Args:
        settings: in which thresholds are found.
        data: the batches.
    """

    def __init__(self, settings: list[_Setting], data: list[Batch]) -> None:
        self._settings, self._data = settings, data
        self._users: dict[tuple[Place, int], list[_Setting]] = defaultdict(list)  # of each threshold
        for setting in settings:
            for place, capacity in setting.routed.items():
                self._users[place, capacity].append(setting)

    def run(self) -> int:
        """Finds the thresholds and returns how often the batches were run.

        Raises:
            DataError: the batches have no tokens.
            TrainingError: a router gives all tokens one score.
        """
        for setting in self._settings:
            setting.measure(self._data, first=True)
        self._update()
        passes, most = 1, 1 + len({place for place, _ in self._users}) + _SPARE_PASSES
        while passes < most:
            for setting in self._settings:
                setting.measure(self._data, first=False)
            passes += 1
            if self._is_right() or not self._update():
                break
        return passes

    def _is_right(self) -> bool:
        return all(
            abs(sum(setting.share(place) for setting in users) / len(users) - capacity / PERCENT) <= TOLERANCE
            for (place, capacity), users in self._users.items()
        )

    def _update(self) -> bool:
        """Sets each threshold by the scores seen last; whether any moved."""
        moved = False
        for (place, capacity), users in self._users.items():
            router = users[0].parts[place].routers[place[1]]
            scores = torch.cat([part for setting in users for part in setting.scores[place]])
            if not scores.numel():
                raise DataError("the batches hold nothing but padding; give some with tokens")
            threshold, several = _threshold(scores, capacity)
            if not several:
                raise TrainingError(
                    f"the router of {place[1]} in layer {place[0]} gives all {scores.numel()} tokens one score, so no "
                    "threshold tells them apart; fit or train it first, with more than one token in the batches here"
                )
            before = router.thresholds[router.values.index(capacity)]
            moved = moved or float(before) != threshold
            _store(router, capacity, threshold)
        return moved


def _report(settings: list[_Setting], passes: int) -> CalibrationReport:
    shares = [
        CalibratedShare(
            layer=place[0],
            kind=place[1],
            capacity=capacity,
            setting=setting.name,
            measured=setting.share(place),
            threshold=float(setting.parts[place].routers[place[1]].threshold(capacity)),
        )
        for setting in settings
        for place, capacity in setting.routed.items()
    ]
    shares.sort(key=lambda share: (share.layer, TOKENS.index(share.kind), share.setting, share.capacity))
    scores = next(iter(settings[0].scores.values()))
    return CalibrationReport(tuple(shares), tokens=sum(len(part) for part in scores), passes=passes)


def _threshold(scores: Tensor, capacity: int) -> tuple[float, bool]:
    """The threshold that lets in as nearly the capacity of scores ``(N,)`` as equal ones allow; whether any differ."""
    ordered = scores.float().sort(descending=True).values
    steps = (ordered[:-1] > ordered[1:]).nonzero().squeeze(-1) + 1  # numbers of tokens that can be let in, but for all
    lowest = torch.nextafter(ordered[-1], torch.tensor(-torch.inf))
    if not len(steps):
        return float(lowest), False
    ends = torch.cat([steps, torch.tensor([len(ordered)])])
    count = int(ends[(ends - len(ordered) * capacity / PERCENT).abs().argmin()])
    if count == len(ordered):
        return float(lowest), True
    last, following = ordered[count - 1], ordered[count]
    middle = (last + following) / 2
    return float(middle if middle < last else following), True


def _store(router: Router, capacity: int, threshold: float) -> None:
    router.thresholds[router.values.index(capacity)] = threshold
