"""The rules by which vLLM's Transformers backend serves a model it has no class for, checked on a folder's own files.

vLLM itself is not run here. What its backend does was read: it makes the model by ``AutoModel``, swaps every
``nn.Linear`` for one of its own, sets the attention implementation to ``vllm``, and passes an attention instance per
layer down as a keyword argument, which the attention module must hand to the function that it looks up in
``ALL_ATTENTION_FUNCTIONS``. Of the classes that it has itself, those are named here that an export of ours may be of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json
from hf_elastic.models import MODEL_TYPES
from hf_elastic.runtimes.opening import first_line

_PROBE = "hf_elastic_probe"
OWN_CLASSES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel",
    "GPT2ForSequenceClassification", "BertModel", "BertForSequenceClassification", "RobertaModel",
    "RobertaForSequenceClassification",
)  # fmt: skip
"""Classes in its list of supported models, of the families that can be made elastic here."""
_PACKED_BITS = (4, 8)


def known_integers(stated: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's weights are integers as vLLM is known to take them.

    These are weights alone, symmetric, of 4 or 8 bits, packed by compressed-tensors.

    Args:
        stated: ``quantization_config`` of its config.
    """
    groups = list((stated.get("config_groups") or {}).values())
    if stated.get("quant_method") != "compressed-tensors" or not groups:
        return False
    weights = [group.get("weights") or {} for group in groups]
    formats = {group.get("format") or stated.get("format") for group in groups}
    activations = any(group.get("input_activations") or group.get("output_activations") for group in groups)
    packed = all(w.get("type") == "int" and w.get("num_bits") in _PACKED_BITS and w.get("symmetric") for w in weights)
    return formats == {"pack-quantized"} and packed and not activations


def broken_vllm_rules(folder: str | Path) -> list[str]:
    """Says which rules a remote-code checkpoint breaks, each with its reason; an empty list: none.

    The model that ``auto_map.AutoModel`` names is made with the code of the folder, with random weights.

    Args:
        folder: an export, which runs its code: only of somebody you trust.

    Raises:
        CheckpointError: the folder holds no config, or its model cannot be made.
    """
    path = Path(folder)
    stated = read_json(path / "config.json")
    code = stated.get("auto_map") or {}
    if "AutoModel" not in code:
        return ["auto_map of config.json names no AutoModel, by which vLLM loads remote code"]
    try:
        # Not by AutoModel: in this process that takes the registered classes of hf_elastic, not those of the folder.
        kinds: list[Any] = [get_class_from_dynamic_module(code[name], path) for name in ("AutoConfig", "AutoModel")]
        model: PreTrainedModel = kinds[1](kinds[0].from_pretrained(path)).eval()
    except Exception as error:  # of code that is not ours
        raise CheckpointError(f"{path} makes no model by AutoModel: {first_line(error)}") from error
    return [*_static_rules(model, stated), *_attention_rules(model)]


def _static_rules(model: PreTrainedModel, stated: dict[str, Any]) -> Iterator[str]:
    if not getattr(type(model), "_supports_attention_backend", False):
        yield f"{type(model).__name__} does not set _supports_attention_backend = True"
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        yield f"the forward of {type(model).__name__} takes no keyword arguments for the attention"
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield f"{name} is a Conv1D, which vLLM neither splits over GPUs nor quantises; linears are nn.Linear"
            break
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            yield f"{name} is a {type(module).__name__}; linears are nn.Linear itself"
            break
    layers = stated.get("per_layer_config") or {}
    unread = sorted({name for layer in layers.values() for name in layer} - _readable(model.config))
    if unread:
        yield f"per_layer_config sets {', '.join(unread)}, which a layer's config does not answer"


def _readable(config: PreTrainedConfig) -> set[str]:
    """Names that the config of a layer answers."""
    layer = config.per_layer_config[0] if config.model_type in MODEL_TYPES else config
    known = set(layer.to_dict()) | set(getattr(layer, "attribute_map", {})) | {"skip"}
    return known | {name for name in ("num_key_value_heads", "head_dim") if getattr(layer, name, None) is not None}


def _attention_rules(model: PreTrainedModel) -> Iterator[str]:
    """Runs the model with an attention of our own and looks at what reaches it."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def probe(module: nn.Module, query: Tensor, *others: Any, **kwargs: Any) -> Any:
        seen.append((module, kwargs))
        return torch.zeros_like(query).transpose(1, 2), None  # (B, T, H, head_dim)

    ALL_ATTENTION_FUNCTIONS[_PROBE] = probe
    marker = object()
    try:
        model.config._attn_implementation_internal = _PROBE
        ids = torch.arange(3, 9)[None].remainder(int(model.config.vocab_size))
        with torch.no_grad():
            model(input_ids=ids, attention_mask=None, attention_instances=marker)
    except Exception as error:  # whatever the model raises, vLLM would meet it too
        yield f"the forward fails with an attention of its own: {type(error).__name__}: {first_line(error)}"
        return
    finally:
        del ALL_ATTENTION_FUNCTIONS[_PROBE]
    yield from _seen_rules(model, seen, marker=marker)


def _seen_rules(model: PreTrainedModel, seen: list[tuple[Any, dict[str, Any]]], *, marker: object) -> Iterator[str]:
    if not seen:
        yield "attention does not go through ALL_ATTENTION_FUNCTIONS"
        return
    if any(kwargs.get("attention_instances") is not marker for _, kwargs in seen):
        yield "keyword arguments of the model's forward do not reach the attention function"
    numbers = [getattr(module, "layer_idx", None) for module, _ in seen]
    if None in numbers or len(set(numbers)) != len(numbers):
        yield "an attention module has no layer_idx of its own, by which vLLM finds its instance"
    causal = {bool(getattr(module, "is_causal", True)) for module, _ in seen}
    wanted = not _is_encoder(model.config)
    if causal != {wanted}:
        kind = "a decoder" if wanted else "an encoder"
        yield f"attention modules of {kind} say is_causal={not wanted}; vLLM takes them for the other kind"


def _is_encoder(config: PreTrainedConfig) -> bool:
    return config.model_type in ("bert", "roberta", "distilbert", "elastic_bert")
