"""The field ``routing`` of a config: which routers the layers have, and at which capacities these are.

This file travels with a checkpoint as remote code: it imports nothing but files beside it.
"""

from collections.abc import Mapping
from typing import Any

from .elastic_routers import KINDS, PERCENT, SUBLAYERS, TOKENS

STATED = ("of", "values", "active")
"""What is said of each kind: see :class:`~hf_elastic.models.elastic_routers.LayerRouters`."""


def with_text_numbers(routing: Any) -> Any:
    """A copy of the field with the numbers of layers as JSON has them; what is malformed stays so."""
    copied = _copied(routing)
    layers = copied.get("layers") if isinstance(copied, dict) else None
    if not isinstance(layers, dict):
        return copied
    return {**copied, "layers": {str(number): stated for number, stated in layers.items()}}


def _copied(stated: Any) -> Any:
    """A copy in which nothing stands at two places, as it may in what a user gives."""
    if isinstance(stated, Mapping):
        return {name: _copied(value) for name, value in stated.items()}
    return list(stated) if isinstance(stated, list | tuple) else stated


def routed_layers(config: Any) -> dict[int, Any]:
    """What each layer that has routers says of them, by its number; empty where none has."""
    return {} if config.routing is None else {int(n): stated for n, stated in config.routing["layers"].items()}


def check_routing(config: Any) -> None:
    """Checks what a config says of routers; nothing where it has no ``routing``.

    Raises:
        ValueError: it names a layer or a kind that is not there, or capacities that cannot be.
    """
    routing = config.routing
    if routing is None:
        return
    if set(routing) != {"layers"} or not isinstance(routing["layers"], Mapping) or not routing["layers"]:
        raise ValueError(f'routing must be {{"layers": {{number: {{kind: ...}}}}}}, or None for none; got {routing}')
    if vars(config).get("candidate_blocks") is not None:
        raise ValueError("routing goes with one block per layer; leave candidate_blocks out of the config")
    if getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError("chunk_size_feed_forward cuts rows into pieces, of which no router sees all; set it to 0")
    numbers = [str(number) for number in range(config.num_hidden_layers)]
    for number, stated in routing["layers"].items():
        if number not in numbers:
            raise ValueError(f"routing names layer {number}; the model has layers 0 to {len(numbers) - 1}")
        _check_layer(config, int(number), stated)


def _check_layer(config: Any, number: int, stated: Any) -> None:
    where, layer = f"routing of layer {number}", config.per_layer_config[number]
    if not isinstance(stated, Mapping) or set(stated) <= {"hidden"} or set(stated) - {"hidden", *KINDS}:
        got = ", ".join(map(str, stated)) if isinstance(stated, Mapping) else stated
        raise ValueError(f"{where} has {got or 'nothing'}; give at least one of {', '.join(KINDS)}, and hidden or not")
    hidden = stated.get("hidden")
    if hidden is not None and (type(hidden) is not int or hidden < 1):
        raise ValueError(f"{where} has hidden={hidden!r}; it is the width of a hidden layer, or None")
    if (block := getattr(layer, "block", "standard")) != "standard":
        raise ValueError(f"{where}: its block is {block!r}, only standard blocks are routed")
    if "heads" in stated and getattr(config, "reorder_and_upcast_attn", False):
        raise ValueError(f"{where}: reorder_and_upcast_attn=True goes with no routed heads; set it to False")
    for kind in KINDS:
        if kind not in stated:
            continue
        if SUBLAYERS[kind] in (getattr(layer, "skip", None) or ()):
            raise ValueError(f"{where} has {kind}, but the layer skips its {SUBLAYERS[kind]}")
        _check_capacities(stated[kind], where=f"{where}: {kind}")
        _check_whole(config, layer, kind=kind, whole=stated[kind]["of"], where=where)


def _check_capacities(stated: Any, *, where: str) -> None:
    if not isinstance(stated, Mapping) or set(stated) != set(STATED):
        raise ValueError(f"{where} must say {', '.join(STATED)} and nothing else; got {stated}")
    whole, values, active = (stated[name] for name in STATED)
    counts = [whole, active, *(values if isinstance(values, list | tuple) else [None])]
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"{where} has {stated}; capacities are integers of at least 1")
    if list(values) != sorted(set(values)) or whole not in values[-1:]:
        raise ValueError(f"{where} has values={list(values)}; they must ascend and end at of={whole}")
    if active not in values:
        raise ValueError(f"{where} has active={active}, which is none of its values {list(values)}")


def _check_whole(config: Any, layer: Any, *, kind: str, whole: int, where: str) -> None:
    """Checks that there are as many tokens (per cent), heads or experts in a layer as is said."""
    width = getattr(layer, config.per_layer_names["intermediate_size"])
    if kind in TOKENS and whole != PERCENT:
        raise ValueError(f"{where}: {kind} are per cent, of {PERCENT}; got of={whole}")
    if kind == "experts" and width % whole:
        raise ValueError(f"{where}: {whole} experts do not divide its {width} neurons")
    if kind == "heads":
        groups = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        if whole != groups:
            raise ValueError(f"{where}: heads are of={whole}, but the layer has {groups} (groups of) heads")


def resolve_capacity(kind: str, value: Any, *, whole: int) -> int:
    """Turns a capacity into what routers know: per cent of tokens, a count of heads or experts.

    Args:
        kind: what is routed.
        value: a fraction, or a count.
        whole: 100 for tokens, else how many there are.

    Raises:
        ValueError: it is no capacity, larger than what there is, or no whole number of per cent.
    """
    check_capacity(kind, value)
    if isinstance(value, int) and kind not in TOKENS:
        if value > whole:
            shared = ", groups with keys and values of their own" if kind == "heads" else ""
            raise ValueError(
                f"{kind}={value} is more than the {whole} there are{shared}; give 1 to {whole}, or a fraction"
            )
        return value
    found = round(value * whole)
    if kind in TOKENS and (not found or abs(value * PERCENT - found) > 1e-6):
        raise ValueError(f"{kind}={value} is no whole number of per cent; round it to {max(1, found) / PERCENT}")
    return max(1, found)


def check_capacity(kind: str, value: Any) -> None:
    """Checks that a value is a fraction or, of heads and experts, a count.

    Raises:
        ValueError: it is neither.
    """
    count = isinstance(value, int) and not isinstance(value, bool) and kind not in TOKENS and value >= 1
    fraction = isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1
    if not (count or fraction):
        also = ", as 0.7 for 70 %" if kind in TOKENS else ", or be a count of at least 1"
        raise ValueError(f"{kind} has a capacity of {value!r}; it must lie in (0, 1]{also}")


def shown_capacities(kind: str, values: Any) -> str:
    """Capacities as a user gives them: fractions of tokens, counts of heads and experts."""
    return ", ".join(str(value / PERCENT if kind in TOKENS else value) for value in values)
