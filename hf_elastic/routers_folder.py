"""Routers in a folder of their own: a few kilobytes beside a base that they do not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import CheckpointError, UnsupportedModelError
from hf_elastic.families import family_of, layers_of
from hf_elastic.files import file_digest, given_path, read_json, whole_folder, write_json
from hf_elastic.fingerprints import weights_fingerprint
from hf_elastic.layers import PartHolder
from hf_elastic.models.elastic_routed import LAYOUTS
from hf_elastic.models.elastic_routers import TOKENS, LayerRouters, Router, routers_of
from hf_elastic.routers import RouterPart, router_tensors
from hf_elastic.space import Value
from hf_elastic.supernet_folder import parent_of

if TYPE_CHECKING:
    from hf_elastic.supernet import Supernet

ROUTING_CONFIG = "_hf_elastic_routing"
"""Where a model keeps the :class:`hf_elastic.RoutingConfig` that it was given."""
ROUTER_FOLDER = "routers"
ROUTERS_FILE = "routers.json"
WEIGHTS_FILE = "routers.safetensors"
FORMAT = 1
_KINDS = {
    "routing": dict, "base": str, "model_type": str, "fingerprints": dict, "sizes": dict, "layers": dict,
    "weights": str,
}  # fmt: skip
_CASTS = (None, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SavedRouters:
    """What a folder of routers holds.

    Attributes:
        directory: the folder.
        routing: fields of the :class:`hf_elastic.RoutingConfig`.
        base: folder or Hub name of the base; empty: it was made from a config.
        model_type: of the base.
        fingerprints: of the base's weights, as they were and as they are in half precision.
        sizes: of the base, that routers depend on.
        layers: by number of the layer, what its routers are and which capacities were active, see
            :class:`~hf_elastic.models.elastic_routers.LayerRouters`.
        weights: by number of the layer and name within its routers.
    """

    directory: Path
    routing: dict[str, Any]
    base: str
    model_type: str
    fingerprints: dict[str, str]
    sizes: dict[str, Any]
    layers: dict[str, Any]
    weights: dict[str, Tensor]


def save_routers(supernet: Supernet | nn.Module, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes the routers of a model alone; :func:`hf_elastic.load_routers` puts them onto their base again.

    Args:
        supernet: the handle that :func:`hf_elastic.add_routing` returned, or its model.
        directory: a folder that does not exist or is empty.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        UnsupportedModelError: the model has no routers of :func:`hf_elastic.add_routing`.
        CheckpointError: the folder is not empty or cannot be written; nothing is left half-written.
    """
    model: Any = supernet if isinstance(supernet, nn.Module) else supernet.model
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None or ROUTING_CONFIG not in vars(base):
        also = ", whose routers are in its own checkpoint" if base is not None and routers_of(base) else ""
        raise UnsupportedModelError(
            f"save_routers takes what hf_elastic.add_routing returned, got a {type(model).__name__}{also}"
        )
    with whole_folder(directory, overwrite=overwrite) as folder:
        write_routers(base, folder)


def write_routers(base: PreTrainedModel, folder: Path) -> None:
    """Writes the routers of a model that :func:`hf_elastic.add_routing` was called on into a folder that is there."""
    parts: list[RouterPart] = [
        part
        for module in base.modules()
        if isinstance(module, PartHolder)
        for part in module.elastic_parts
        if isinstance(part, RouterPart)
    ]
    active = vars(base)["_hf_elastic_state"].active
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in router_tensors(parts).items()}
    save_file(weights, folder / WEIGHTS_FILE)
    record = {
        "format": FORMAT,
        "routing": vars(base)[ROUTING_CONFIG].to_dict(),
        "base": parent_of(base),
        "model_type": base.config.model_type,
        "fingerprints": base_fingerprints(base),
        "sizes": base_sizes(base),
        "layers": {str(part.layer.index): _stated(part, active) for part in parts},
        "weights": file_digest(folder / WEIGHTS_FILE),
    }
    write_json(folder / ROUTERS_FILE, record)


def _stated(part: RouterPart, active: Mapping[str, Value]) -> dict[str, Any]:
    """What the routers of a layer are, and which of their capacities are chosen, full where that has no effect."""
    found: dict[str, Any] = {"hidden": part.hidden_size}
    for kind in part.routers:
        router = part.routers[kind]
        chosen = active[part.choice_name(kind)] if part.share == "model" else part.capacity(kind, active)
        found[kind] = {"of": router.of, "values": list(router.values), "active": chosen}
    return found


def read_routers(directory: str | Path) -> SavedRouters:
    """Reads and checks what :func:`save_routers` wrote.

    Raises:
        CheckpointError: a file is missing, truncated or foreign.
    """
    folder = given_path(directory)
    file = folder / ROUTERS_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no routers, it has no {ROUTERS_FILE}; write them with save_routers")
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {record.get('format')!r}, this version reads {FORMAT}")
    if bad := [name for name, kind in _KINDS.items() if not isinstance(record.get(name), kind)]:
        raise CheckpointError(f"{file} says nothing usable about {', '.join(bad)}; copy the folder again")
    if not all(isinstance(entry, str) for entry in record["fingerprints"].values()):
        raise CheckpointError(f"{file} holds no usable fingerprints of its base; copy the folder again")
    if file_digest(folder / WEIGHTS_FILE) != record["weights"]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} is truncated or is not the file that {ROUTERS_FILE} was written with; copy the "
            "folder again"
        )
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / WEIGHTS_FILE}: {' '.join(str(error).split())}") from error
    fields = {name: record[name] for name in _KINDS if name != "weights"}
    saved = SavedRouters(directory=folder, weights=weights, **fields)
    _check_weights(saved)
    return saved


def _check_weights(saved: SavedRouters) -> None:
    """Refuses weights that are not those of the routers that are stated."""
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.weights.items()}
    try:
        with torch.device("meta"):
            ours = {
                f"{int(number)}.{kind}.{name}": tuple(tensor.shape)
                for number, stated in saved.layers.items()
                for kind in stated.keys() - {"hidden"}
                for name, tensor in _router_as(saved, stated, kind).state_dict().items()
            }
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{saved.directory / ROUTERS_FILE} says nothing usable about its routers ({error!r}); copy the folder again"
        ) from error
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CheckpointError(
            f"{saved.directory / WEIGHTS_FILE} does not fit its {ROUTERS_FILE}: {len(wrong)} tensors are missing, too "
            f"many or of other shapes, as {wrong[0]}; copy the folder again"
        )


def _router_as(saved: SavedRouters, stated: Mapping[str, Any], kind: str) -> Router:
    return Router(
        saved.sizes["hidden_size"],
        of=stated[kind]["of"],
        values=stated[kind]["values"],
        tokens=kind in TOKENS,
        hidden=stated["hidden"],
        thresholds=kind in TOKENS and LAYOUTS[saved.model_type].causal,
    )


def check_base(saved: SavedRouters, base: PreTrainedModel, *, allow_other_base: bool) -> None:
    """Refuses a base that routers were not made for.

    Raises:
        CheckpointError: its type or its sizes are others, or its weights are and that was not allowed.
    """
    ours, theirs = parent_of(base) or "a model without a name", saved.base or "a model without a name"
    there = {"model_type": base.config.model_type, **base_sizes(base)}
    for name, value in {"model_type": saved.model_type, **saved.sizes}.items():
        if there.get(name) != value:
            raise CheckpointError(
                f"the routers in {saved.directory} are of {theirs} with {name}={value}, this is {ours} with "
                f"{there.get(name)}; load them onto their own base"
            )
    known = set(saved.fingerprints.values())
    if not allow_other_base and not known & set(base_fingerprints(base).values()):
        raise CheckpointError(
            f"the routers in {saved.directory} were trained on {theirs}, this is {ours}, whose weights are others; "
            "load them onto their own base, or say allow_other_base=True"
        )


def fill_routers(saved: SavedRouters, parts: Iterable[RouterPart]) -> dict[str, Value]:
    """Copies saved weights and thresholds into routers that were made as theirs.

    Returns:
        The capacities that were active when they were saved, by name of the choice.
    """
    found = tuple(parts)
    for name, tensor in router_tensors(found).items():
        tensor.copy_(saved.weights[name])
    return {
        part.choice_name(kind): saved.layers[str(part.layer.index)][kind]["active"]
        for part in found
        for kind in part.routers
    }


def base_sizes(base: PreTrainedModel) -> dict[str, Any]:
    """Sizes of a stock model that its routers depend on."""
    row, config = family_of(base), base.config
    heads = getattr(config, row.config_name("num_attention_heads"))
    width = getattr(config, row.config_name("intermediate_size"))
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(layers_of(base, row)),
        "heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": 4 * config.hidden_size if width is None else width,
    }


def base_fingerprints(base: PreTrainedModel) -> dict[str, str]:
    """Fingerprints of the layers and the embeddings of a model, without its head, routers and adapters.

    Two models that differ by a cast to half precision have one in common.
    """
    row = family_of(base)
    weights = {f"layers.{name}": tensor for name, tensor in _plain_weights(layers_of(base, row), "")}
    embeddings = base.get_input_embeddings()
    weights |= {f"embeddings.{name}": tensor for name, tensor in _plain_weights(embeddings, "")}
    casts = {"as it is" if dtype is None else str(dtype).removeprefix("torch."): dtype for dtype in _CASTS}
    return {name: weights_fingerprint(weights, dtype=dtype) for name, dtype in casts.items()}


def _plain_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names that they have without adapters and routers."""
    children = dict(module.named_children())
    inside = children.get("base_layer", children.get("original_module"))
    if inside is not None:
        yield from _plain_weights(inside, prefix)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in children.items():
        if not isinstance(child, LayerRouters):
            yield from _plain_weights(child, f"{prefix}{name}.")
