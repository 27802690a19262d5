"""Whether a config asks for a model that the weights beside it can fill: asked before memory or time is spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json
from hf_elastic.models.elastic_layers import MOST_LAYERS

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
MOST_LABELS = 100_000
"""Classes of a classifier that a config may count: transformers gives each of them a name."""
_WITHOUT_WEIGHTS = 64  # layers that may have no tensor of their own, as all of them is skipped
_PER_BYTE = 4  # elements that a byte of a file may hold: integers of two bits
_SMALL = 2**22  # elements that are no matter, whatever the files hold


def require_counts(folder: Path) -> None:
    """Checks that a config counts no more layers than there are tensors, nor labels, before one of either is made.

    Where there are no tensors at all, layers may be as many as any model has.

    Raises:
        CheckpointError: it counts more, or a file is truncated or foreign.
    """
    count, _ = _stored(folder)
    if not (folder / "config.json").is_file():
        return
    config, layers = read_json(folder / "config.json"), count + _WITHOUT_WEIGHTS if count else MOST_LAYERS
    beside = f"the weights beside it are {count} tensors" if count else f"no model has more than {layers}"
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        _at_most(layers, part, _LAYERS, folder=folder, why=beside)
        _at_most(MOST_LABELS, part, ("num_labels",), folder=folder, why=f"at most {MOST_LABELS} are read")


def _at_most(most: int, config: Mapping[str, Any], names: Iterable[str], *, folder: Path, why: str) -> None:
    for name in names:
        stated = config.get(name)
        if isinstance(stated, int | float) and not stated <= most:
            raise CheckpointError(f"{folder / 'config.json'} has {name}={stated}, but {why}; copy the folder again")


def require_filled(folder: Path, kind: Any) -> None:
    """Checks that the model of a config is not much larger than the weights beside it, which would have to be made up.

    Args:
        folder: a checkpoint; one without safetensors is not looked at.
        kind: what loads it: a class of transformers or an Auto class.

    Raises:
        CheckpointError: the model is of more layers or sizes than the files hold, or there are weights for a class to
            load and no config; what transformers raises where it makes no model of the config is not caught.
    """
    require_counts(folder)
    count, size = _stored(folder)
    if not count:  # transformers says which file is missing
        return
    if not (folder / "config.json").is_file():
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):  # it would make its usual config, of billions
            raise CheckpointError(f"{folder} holds no config.json, so its weights are of no model; copy it again")
        return  # an Auto class says so
    with torch.device("meta"):
        model = _made(folder, kind)
    wanted = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if wanted > _PER_BYTE * size + _SMALL:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for {wanted:.3g} parameters, the weights beside it have {size:.3g} bytes"
            "; copy the folder again"
        )


def _made(folder: Path, kind: Any) -> PreTrainedModel:
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        stock: Any = kind
        made: PreTrainedModel = stock._from_config(stock.config_class.from_pretrained(folder))
        return made
    made = kind.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False)
    return made


def _stored(folder: Path) -> tuple[int, int]:
    """How many tensors the safetensors files of a folder hold, and how many bytes they have."""
    count, size = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                count += len(tensors.keys())
            size += file.stat().st_size
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); copy it again") from error
    return count, size
