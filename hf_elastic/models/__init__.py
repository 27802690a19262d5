"""Static models whose layers may differ, and their registration with the Auto classes of transformers.

The other files of this folder travel with an exported checkpoint as remote code; this one does not.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

_SHARED = "elastic_layers"
_FAMILIES = ("bert", "llama", "gpt2")
MODEL_TYPES = tuple(f"elastic_{family}" for family in _FAMILIES)


def config_class(model_type: str) -> Any:
    """Returns the config class of ``elastic_bert``, ``elastic_llama`` or ``elastic_gpt2``."""
    module = import_module(f".configuration_{model_type}", __name__)
    return next(getattr(module, name) for name in module.__all__)


def model_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """Returns a class of ``modeling_<model_type>``, imported when first asked for."""
    return getattr(import_module(f".modeling_{model_type}", __name__), name)


def register_auto_classes() -> None:
    """Registers the static models with AutoConfig, AutoModel and the Auto classes of their heads.

    transformers has no lazy registration, so this imports the modeling files. Doing it again changes nothing.
    """
    for model_type in MODEL_TYPES:
        config = config_class(model_type)
        AutoConfig.register(model_type, config, exist_ok=True)
        for auto_class, path in config.auto_classes.items():
            if auto_class != "AutoConfig":
                model = model_class(model_type, path.split(".")[-1])
                getattr(transformers, auto_class).register(config, model, exist_ok=True)


def source_files(model_type: str) -> tuple[Path, ...]:
    """Returns the files to copy, flat, into a checkpoint that must load without hf_elastic.

    Raises:
        ValueError: not one of the static model types.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} has no files here; known: {', '.join(MODEL_TYPES)}")
    folder = Path(__file__).parent
    names = (f"configuration_{model_type}", f"modeling_{model_type}", _SHARED)
    return tuple(folder / f"{name}.py" for name in names)
