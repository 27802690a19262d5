"""ZeroLM's table of a checkpoint that is not loaded: its files are read once, a block of rows at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_elastic.errors import CheckpointError, UnsupportedModelError
from hf_elastic.families import Family
from hf_elastic.proxies.roles import FLOATS
from hf_elastic.proxies.zerolm_table import Floats, Projection, ZeroLMTable, projections_of, slice_energies, table_of
from hf_elastic.stored_sizes import require_counts

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB: dict[str, Any] = {}  # the cache of huggingface_hub, as it finds it
_BLOCK = 16 * 2**20  # values that are read at a time


def checkpoint_table(source: str | Path, *, family: Family | None = None) -> ZeroLMTable:
    """ZeroLM's score of every width and head count, streamed from safetensors.

    A block of 64 MiB is in memory at a time, whatever the model's size: the model is built on the meta device, where it
    has shapes only.

    Args:
        source: a local folder, or a name whose files are in the Hub cache; nothing is downloaded.
        family: the row of a model type that hf_elastic does not know.

    Raises:
        CheckpointError: there is no such checkpoint, a file or a weight is missing, or one is truncated.
        UnsupportedModelError: there is no row of its family, or its weights are packed integers.
        DataError: a weight is not finite.
    """
    model = skeleton(source)
    wanted = projections_of(model, family)
    places = _places(source)
    files: dict[Path, list[tuple[str, str]]] = {}
    for name in wanted:
        file, key = _find(f"{name}.weight", places, source=source)
        files.setdefault(file, []).append((name, key))
    energies: dict[str, Floats] = {}
    for file, keys in files.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                energies |= {name: _energies(tensors, key, wanted[name]) for name, key in keys}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); copy it again") from error
    return table_of(model, wanted, energies, family=family)


def skeleton(source: str | Path) -> PreTrainedModel:
    """The model of a checkpoint's config without weights, on the meta device; without a head.

    Raises:
        CheckpointError: there is no config that transformers knows.
    """
    try:
        if Path(source).is_dir():
            require_counts(Path(source))
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **_HUB)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"no checkpoint can be read from {source}: {reason}") from error
    return model


def _places(source: str | Path) -> dict[str, Path]:
    """The file of every tensor.

    Raises:
        CheckpointError: there is no safetensors file, it or the index is damaged, or a shard is missing.
    """
    single = _cached(source, _SINGLE)
    if single is not None:
        try:
            with safe_open(single, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), single)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{single} cannot be read ({error}); copy it again") from error
    index = _cached(source, _INDEX)
    if index is None:
        raise CheckpointError(f"{source} holds neither {_SINGLE} nor {_INDEX}; save it with safetensors")
    try:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {shard: _cached(source, shard) for shard in set(shards.values())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}); copy it again") from error
    if missing := sorted(shard for shard, file in files.items() if file is None):
        raise CheckpointError(f"{source} lacks the shard {missing[0]} that its index names; copy it again")
    return {name: file for name, shard in shards.items() if (file := files[shard]) is not None}


def _cached(source: str | Path, name: str) -> Path | None:
    """A file of a folder, or of the newest snapshot in the Hub cache."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    found = try_to_load_from_cache(str(source), name, **_HUB)
    return Path(found) if isinstance(found, str) else None


def _find(name: str, places: dict[str, Path], *, source: str | Path) -> tuple[Path, str]:
    """File and name of a weight; a model with a head stores its body under a prefix."""
    found = [name] if name in places else [key for key in places if key.endswith(f".{name}")]
    found = [key for key in found if key.count(".") == min(other.count(".") for other in found)]
    if len(found) > 1:
        raise CheckpointError(f"{source} has several weights that may be {name!r}: {', '.join(found[:3])}")
    if found:
        return places[found[0]], found[0]
    packed = f"{name}_packed"
    if any(key == packed or key.endswith(f".{packed}") for key in places):
        raise UnsupportedModelError(f"{source} holds packed integers; load it, unpack_ it, use ZeroLMTable.of_model")
    raise CheckpointError(f"{source} has no weight {name!r}, which its config asks for")


def _energies(tensors: Any, key: str, projection: Projection) -> Floats:
    """Squared norms of a stored matrix's slices, a block of rows at a time.

    Raises:
        CheckpointError: its shape is not the config's.
    """
    stored = tensors.get_slice(key)
    rows, columns = expected = tuple(projection.weight.shape)
    if tuple(stored.get_shape()) != expected:
        raise CheckpointError(f"{key} is of shape {stored.get_shape()}, its config says {list(expected)}")
    step = max(1, _BLOCK // columns)
    blocks: list[Floats] = []
    for start in range(0, rows, step):
        block: Tensor = stored[start : min(rows, start + step)]
        if block.dtype not in FLOATS:
            kind = str(block.dtype).removeprefix("torch.")
            raise UnsupportedModelError(f"{key} holds {kind}; load the model in floats, and use ZeroLMTable.of_model")
        blocks.append(slice_energies(block, dim=projection.dim))
    return np.concatenate(blocks) if projection.dim == 0 else np.sum(blocks, axis=0)
