"""Opens what is to be converted: a model in memory, or the folder of any checkpoint that stands for itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_elastic.errors import CheckpointError, DataError, ElasticError, ExportError
from hf_elastic.files import read_json
from hf_elastic.layers import PartHolder
from hf_elastic.models import MODEL_TYPES, model_class, register_auto_classes
from hf_elastic.models.elastic_routing import routed_layers
from hf_elastic.packed_format import detach_grid, quantised_layers, unpack_
from hf_elastic.stored_sizes import require_counts, require_filled
from hf_elastic.supernet_folder import SPACE_FILE

ADAPTER_FILE = "adapter_config.json"
GGUF_FILE = "model.gguf"


def open_model(source: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Loads a checkpoint in fp32 for a conversion; a model in memory is taken as it is.

    Integers of a compressed checkpoint become floats of the same values. No code of the folder is run: of remote code
    only that of hf_elastic is known, and this package has it.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be loaded.
        ExportError: it does not stand for itself (an adapter, a supernet), or has a class of somebody else's code.
    """
    if isinstance(source, PreTrainedModel):
        return _plain(source)
    folder = Path(source)
    config = open_config(folder)
    quantised = getattr(config, "quantization_config", None) is not None
    kind = class_of_checkpoint(config)
    dtype: dict[str, Any] = {} if quantised else {"dtype": torch.float32}
    try:
        require_filled(folder, kind)
        model = kind.from_pretrained(folder, config=config, trust_remote_code=False, use_safetensors=True, **dtype)
    except ElasticError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"{folder} cannot be loaded as {kind.__name__}: {first_line(error)}") from error
    if quantised:
        for module in quantised_layers(unpack_(model)).values():
            detach_grid(module)
        model = model.float()
    return model.eval()


def open_config(folder: Path) -> PreTrainedConfig:
    """Reads the config of a checkpoint that stands for itself; raises as :func:`open_model`."""
    if (folder / ADAPTER_FILE).is_file():
        raise ExportError(
            f"{folder} holds an adapter, which no runtime takes without its base; merge it first "
            "(export(..., merge=True), or hf-elastic merge) and convert that"
        )
    if (folder / SPACE_FILE).is_file():
        raise ExportError(f"{folder} holds a supernet; export one of its architectures first and convert that")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; give the folder of a checkpoint")
    if found := gguf_file(folder):
        raise ExportError(f"{folder} holds {found}, a model for llama.cpp; give the checkpoint it was made from")
    stated = read_json(folder / "config.json")
    if stated.get("auto_map") and stated.get("model_type") not in MODEL_TYPES:
        raise ExportError(
            f"{folder} has code of its own ({stated.get('model_type')}); load it yourself and pass the model"
        )
    register_auto_classes()
    require_counts(folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"{folder / 'config.json'} is no config: {first_line(error)}") from error


def gguf_file(folder: Path) -> str | None:
    """Name of the GGUF file of a folder that holds a model for llama.cpp in the place of a checkpoint."""
    if any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        return None
    return min((file.name for file in folder.glob("*.gguf")), default=None)


def class_of_checkpoint(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Class that a config says the weights are of.

    Raises:
        ExportError: it names none that is known.
    """
    name = next(iter(config.architectures or ()), "")
    try:
        if config.model_type in MODEL_TYPES:
            return model_class(config.model_type, name)
        found = getattr(transformers, name)
    except (AttributeError, TypeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ExportError(
            f"the config names the class {name or 'none'!r}, which is no model of transformers or hf_elastic; "
            "load the model yourself and pass it"
        )
    return found


def require_unrouted_graph(config: PreTrainedConfig, *, form: str) -> None:
    """Checks that nothing is routed by the data, as no static graph holds that; at full capacity nothing is.

    Raises:
        ExportError: tokens, heads or experts are chosen while the model runs.
    """
    routed = routed_kinds(config)
    if routed:
        raise ExportError(
            f"the model chooses {', '.join(routed)} while it runs, by gathers whose sizes depend on the data; {form} "
            "holds none; convert the parent, or an architecture without routers"
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; ``None``: it reckons them for any number (rotary ones)."""
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None or getattr(config, "rope_parameters", None):
        return None
    behind_padding = config.model_type == "roberta" or getattr(config, "positions_skip_padding", False)
    return int(stated) - (int(config.pad_token_id or 0) + 1 if behind_padding else 0)


def require_positions(config: PreTrainedConfig, tokens: int, *, cure: str) -> None:
    """Checks that a model has positions for sequences of a length.

    Args:
        config: of it.
        tokens: of the longest sequence.
        cure: what to do else, in a few words.

    Raises:
        DataError: it has not.
    """
    room = positions_of(config)
    if room is not None and tokens > room:
        raise DataError(f"{tokens} tokens are more than the {config.model_type} has positions for, {room}; {cure}")


def routed_kinds(config: PreTrainedConfig) -> list[str]:
    """What a model chooses while it runs; nothing where all routers are at full capacity."""
    layers = routed_layers(config) if config.model_type in MODEL_TYPES else {}
    kinds = [(kind, said) for stated in layers.values() for kind, said in stated.items() if kind != "hidden"]
    return sorted({kind for kind, said in kinds if said["active"] != said["of"]})


def require_package(*modules: str, extra: str) -> None:
    """Checks that optional packages are there, without importing them.

    Raises:
        ExportError: one is missing; the message says how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f'{", ".join(missing)} is not installed; pip install "hf-elastic[{extra}]"')


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    if any(isinstance(module, PartHolder) for module in model.modules()):
        raise ExportError(
            f"the {type(model).__name__} is (part of) a supernet; extract(supernet, architecture) gives a plain model"
        )
    if wrapped := next((n for n, m in model.named_modules() if "base_layer" in dict(m.named_children())), None):
        raise ExportError(f"{wrapped} has an adapter; merge it first (extract(..., merge=True) or merge_and_unload)")
    if quantised_layers(model):
        raise ExportError(
            "the model carries integers on a grid, which the runtime would round anew; pass the folder that "
            "save_quantized wrote (its values become floats), or the model before quantize_"
        )
    return model


def first_line(error: Exception) -> str:
    """The first line of an error that somebody else's code raised."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
