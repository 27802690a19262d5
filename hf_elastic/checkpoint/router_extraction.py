"""Routers of a subnet: what its static config says of them, and their weights for the units that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_elastic.errors import ExportError
from hf_elastic.models.elastic_routers import TOKENS, Decision, LayerRouters
from hf_elastic.parts import LayerPart
from hf_elastic.routers import ROUTERS, RouterPart
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet


def stated_routing(
    supernet: Supernet, architecture: Architecture, kept: Sequence[LayerPart]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The field ``routing`` of the static config (``None``: nothing is routed), and the weights of the routers.

    Args:
        supernet: where from.
        architecture: what.
        kept: layers that stay, by which those of the result are numbered.

    Returns:
        Weights are copies in float32, by their name behind that of the list of layers; thresholds that were not
        calibrated stay NaN.
    """
    parts = {id(part.layer): part for part in supernet.router_parts}
    layers: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(kept):
        part = parts.get(id(layer))
        if part is not None and (stated := part.stated(architecture)):
            layers[str(number)] = stated
            state |= {f"{number}.{ROUTERS}.{name}": tensor for name, tensor in _weights(part, stated).items()}
    return ({"layers": layers} if layers else None), state


def _weights(part: RouterPart, stated: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in part.routers:
        if kind not in stated:
            continue
        for name, tensor in part.routers[kind].state_dict().items():
            units = stated[kind]["of"] if kind not in TOKENS and name.startswith("scores.") else None
            found[f"{kind}.{name}"] = tensor[:units].detach().to(torch.float32, copy=True)
    return found


def routers_in_use(supernet: Supernet, architecture: Architecture) -> list[LayerRouters]:
    """The routers of an architecture that an extraction carries, layer after layer."""
    return [part.routers for part in supernet.router_parts if part.routes(architecture)]


class Decisions:
    """What the routers of one model decided in a forward, to be repeated by those of an equal one.

    Attributes:
        known: decisions by place of the layer's routers and kind.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[int, str], Decision] = {}
        self._asked, self._otherwise = 0, 0

    @property
    def agree(self) -> bool:
        """Whether routers that repeated them would have decided nearly all alike."""
        return self._otherwise <= _OTHERWISE * self._asked

    def noted(self, routers: Sequence[LayerRouters]) -> AbstractContextManager[None]:
        """Notes what is decided inside the block."""

        def note(place: int, kind: str, decision: Decision) -> Decision:
            self.known[place, kind] = decision
            return decision

        return _decided_by(note, routers)

    def repeated(self, routers: Sequence[LayerRouters]) -> AbstractContextManager[None]:
        """Lets other routers decide the same inside the block."""

        def repeat(place: int, kind: str, decision: Decision) -> Decision:
            wanted = self.known[place, kind]
            self._asked += wanted.keep.numel()
            self._otherwise += int((wanted.keep != decision.keep).sum())
            return replace(decision, keep=wanted.keep)

        return _decided_by(repeat, routers)


_OTHERWISE = 0.05  # share of decisions that rounding may turn
_CHOOSING = ("choose_tokens", "choose_units")


@contextmanager
def _decided_by(decide: Callable[[int, str, Decision], Decision], routers: Sequence[LayerRouters]) -> Iterator[None]:
    """Inside the block, gives each decision of routers to a function, which says what is done."""

    def through(place: int, choose: Callable[[str, Tensor], Decision]) -> Callable[[str, Tensor], Decision]:
        return lambda kind, states: decide(place, kind, choose(kind, states))

    for place, held in enumerate(routers):
        for name in _CHOOSING:
            held.__dict__[name] = through(place, getattr(held, name))
    try:
        yield
    finally:
        for held in routers:
            for name in _CHOOSING:
                del held.__dict__[name]


def check_routed_form(supernet: Supernet, architecture: Mapping[str, Value], form: str) -> None:
    """Refuses to write routers in a form, or of a model, that has no place for them.

    Raises:
        ExportError: so it is.
    """
    if not any(part.routes(architecture) for part in supernet.router_parts):
        return
    if form != "remote-code":
        raise ExportError(
            f"a {form!r} checkpoint holds no routers, and this architecture routes; export it with "
            "loadability='remote-code', or one whose capacities are all full"
        )
    if supernet.family.static_type is None:
        raise ExportError(
            f"{type(supernet.base).__name__} has no static class to hold routers; keep them with "
            "hf_elastic.save_routers, or export an architecture whose capacities are all full"
        )


def check_calibrated(supernet: Supernet, architecture: Mapping[str, Value]) -> None:
    """Refuses to write a causal model whose routers of tokens could not decide.

    Raises:
        ExportError: a threshold is missing at a capacity of the architecture.
    """
    for part in supernet.router_parts:
        for kind, stated in part.stated(architecture).items():
            if kind not in TOKENS or stated["active"] == stated["of"]:
                continue
            thresholds = part.routers[kind].thresholds
            place = stated["values"].index(stated["active"])
            if thresholds is not None and bool(torch.isnan(thresholds[place])):
                raise ExportError(
                    f"{kind} of layer {part.layer.index} have no threshold at {stated['active']} %, by which a causal "
                    "model decides token by token; call hf_elastic.calibrate_routing(supernet, batches) first"
                )
