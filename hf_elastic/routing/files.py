"""``load_routers``: saved routers come back onto their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hf_elastic.downloads import checkpoint_folder
from hf_elastic.errors import CheckpointError, SpaceError
from hf_elastic.routers_folder import ROUTERS_FILE, SavedRouters, check_base, fill_routers, read_routers
from hf_elastic.routing.adding import add_routing, stated_routers
from hf_elastic.routing.configuration import RoutingConfig
from hf_elastic.routing.handles import base_of
from hf_elastic.supernet import Supernet


def load_routers(
    model: nn.Module,
    directory: str | Path,
    *,
    allow_other_base: bool = False,
    freeze: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Supernet:
    """Puts routers that :func:`hf_elastic.save_routers` wrote onto their base, in place.

    Weights, thresholds and the capacities that were active are those that were saved. Layers and embeddings must be
    those of the base that the routers were trained on, in whatever precision; its head may be another.

    Args:
        model: the base, stock or made elastic, or a ``PeftModel`` around it.
        directory: the folder, or its name on the Hub.
        allow_other_base: whether the weights of the base may be others, such as those of a fine-tuned one.
        freeze: as for :func:`hf_elastic.add_routing`.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; by default the one that is logged in.

    Returns:
        A handle whose choices are the capacities, and those of the base where it is elastic.

    Raises:
        CheckpointError: there are no such routers, a file is truncated or foreign, or they are of another base; the
            model is left as it was.
        UnsupportedModelError, SpaceError: as for :func:`hf_elastic.add_routing`.
    """
    base = base_of(model, "load_routers")
    saved = read_routers(checkpoint_folder(directory, revision=revision, token=token))
    check_base(saved, base, allow_other_base=allow_other_base)
    supernet = add_routing(model, _config_of(saved), freeze=freeze)
    active = supernet.space.canonical({**supernet.active, **fill_routers(saved, supernet.router_parts)})
    if active != supernet.active:  # a handle on which nothing was made active belongs to no thread yet
        supernet.set_active(active)
    return supernet


def _config_of(saved: SavedRouters) -> RoutingConfig:
    """The configuration, if it is the one that the saved routers were made by.

    Raises:
        CheckpointError: it is not.
    """
    file, sizes = saved.directory / ROUTERS_FILE, saved.sizes
    try:
        config = RoutingConfig.from_dict(saved.routing)
        stated = stated_routers(config, heads=sizes["heads"], width=sizes["intermediate_size"])
        numbers = config.routed_layers(sizes["num_hidden_layers"])
        agree = all(_agree(stated, layer) for layer in saved.layers.values())
    except (SpaceError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} has no usable RoutingConfig: {error}; copy the folder again") from error
    if saved.layers.keys() != set(map(str, numbers)) or not agree:
        raise CheckpointError(f"{file} has other routers than its RoutingConfig makes; copy the folder again")
    return config


def _agree(stated: dict[str, Any], layer: dict[str, Any]) -> bool:
    """Whether a saved layer has the stated routers, at capacities of theirs."""
    wanted = {k: {**v, "active": layer[k]["active"]} if k != "hidden" else v for k, v in stated.items() if k in layer}
    chosen = all(layer[kind]["active"] in stated[kind]["values"] for kind in wanted if kind != "hidden")
    return layer.keys() == stated.keys() and wanted == layer and chosen
