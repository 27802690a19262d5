"""Static models whose layers may differ, and their registration with the Auto classes of transformers.

The other files of this folder travel with an exported checkpoint as remote code; this one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

_SHARED = (
    "elastic_layers", "elastic_blocks", "elastic_mixins", "elastic_routing", "elastic_routers", "elastic_routed",
    "elastic_routed_attention", "elastic_routed_cache", "elastic_routed_models",
)  # fmt: skip
_FURTHER = {"elastic_bert": ("elastic_bert_layers",), "elastic_gpt2": ("elastic_gpt2_layers",)}
_FAMILIES = ("bert", "llama", "gpt2")
MODEL_TYPES = tuple(f"elastic_{family}" for family in _FAMILIES)
_ENCODER_HEADS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
_DECODER_HEADS = ("Model", "ForCausalLM", "ForSequenceClassification")
STATIC_CLASSES: Mapping[str, tuple[str, str]] = {
    **{
        f"{stock}{head}": ("elastic_bert", f"ElasticBert{head}")
        for stock in ("Bert", "Roberta", "DistilBert")
        for head in _ENCODER_HEADS
    },
    **{
        f"{stock}{head}": ("elastic_llama", f"ElasticLlama{head}")
        for stock in ("Llama", "Qwen2", "Qwen3", "Mistral")
        for head in _DECODER_HEADS
    },
    "GPT2Model": ("elastic_gpt2", "ElasticGPT2Model"),
    "GPT2LMHeadModel": ("elastic_gpt2", "ElasticGPT2ForCausalLM"),
    "GPT2ForSequenceClassification": ("elastic_gpt2", "ElasticGPT2ForSequenceClassification"),
}
"""Stock class -> model type and name of the static class that computes what it does."""


def static_class_name(stock: type[PreTrainedModel]) -> tuple[str, str] | None:
    """Model type and name of the static class of a stock class; ``None`` where there is none, as for a user's class."""
    return STATIC_CLASSES.get(stock.__name__) if stock.__module__.startswith("transformers.") else None


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
    names = (f"configuration_{model_type}", f"modeling_{model_type}", *_FURTHER.get(model_type, ()), *_SHARED)
    return tuple(folder / f"{name}.py" for name in names)
