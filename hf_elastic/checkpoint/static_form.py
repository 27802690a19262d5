"""The static form of a stock model: which class of ``hf_elastic.models`` holds it, with which config and names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ExportError
from ..models import STATIC_CLASSES, config_class, model_class, static_class_name

Fields = dict[str, Any]
StockModel = PreTrainedModel | type[PreTrainedModel]

# Not carried over: what names the stock class, and what the static config says in another way.
_DROPPED = frozenset({
    "model_type", "architectures", "auto_map", "transformers_version", "per_layer_config", "use_sliding_window",
    "max_window_layers", "sinusoidal_pos_embds",
})  # fmt: skip
_DISTILBERT_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "seq_classif_dropout": "classifier_dropout",
}
_ROBERTA_NAMES = (
    (r"^roberta\.", "bert."),
    (r"^lm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"^lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^lm_head\.", "cls.predictions."),
)
_ROBERTA_CLASSIFIER = ((r"^classifier\.dense\.", "bert.pooler.dense."), (r"^classifier\.out_proj\.", "classifier."))
_DISTILBERT_NAMES = (
    (r"^distilbert\.", "bert."),
    (r"^((?:bert\.)?)transformer\.layer\.", r"\1encoder.layer."),
    (r"(\.layer\.\d+\.)attention\.q_lin\.", r"\1attention.self.query."),
    (r"(\.layer\.\d+\.)attention\.k_lin\.", r"\1attention.self.key."),
    (r"(\.layer\.\d+\.)attention\.v_lin\.", r"\1attention.self.value."),
    (r"(\.layer\.\d+\.)attention\.out_lin\.", r"\1attention.output.dense."),
    (r"(\.layer\.\d+\.)sa_layer_norm\.", r"\1attention.output.LayerNorm."),
    (r"(\.layer\.\d+\.)ffn\.lin1\.", r"\1intermediate.dense."),
    (r"(\.layer\.\d+\.)ffn\.lin2\.", r"\1output.dense."),
    (r"(\.layer\.\d+\.)output_layer_norm\.", r"\1output.LayerNorm."),
    (r"^vocab_transform\.", "cls.predictions.transform.dense."),
    (r"^vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^vocab_projector\.", "cls.predictions.decoder."),
    (r"^pre_classifier\.", "bert.pooler.dense."),
)


def static_class(stock_model: StockModel) -> type[PreTrainedModel]:
    """Returns the static class that computes what a stock class does.

    For example ``RobertaForMaskedLM -> ElasticBertForMaskedLM``.

    Args:
        stock_model: a model or its class.

    Raises:
        ExportError: there is none for this class.
    """
    stock = _class_of(stock_model)
    found = static_class_name(stock)
    if found is None:
        kin = sorted(name for name in STATIC_CLASSES if name[:4] == stock.__name__[:4]) or sorted(STATIC_CLASSES)
        raise ExportError(
            f"{stock.__name__} has no static class to hold per-layer shapes; supported: {', '.join(kin)}; "
            "make the space with ElasticConfig(loadability='stock'), or convert one of these"
        )
    return model_class(*found)


def static_config(
    config: PreTrainedConfig,
    per_layer: Mapping[int, Mapping[str, Any]],
    *,
    parent: StockModel | None = None,
    routing: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Translates a stock config into the static one of its family, with per-layer shapes.

    Sizes that all layers share become the global ones, so that equal layers give a homogeneous config.

    Args:
        config: of a BERT, RoBERTa, DistilBERT, LLaMA, Qwen2, Qwen3, Mistral or GPT-2 model; unchanged.
        per_layer: layer number -> ``intermediate_size``, ``num_attention_heads``, ``num_key_value_heads`` and ``skip``
            (out of ``attention`` and ``mlp``); a layer, or a size, that is not given is the config's.
        parent: the stock model, of which a BERT or RoBERTa base model may lack the pooler. By default it is taken to
            have one.
        routing: routers by layer, see :class:`~hf_elastic.models.configuration_elastic_bert.ElasticBertConfig`.

    Raises:
        ExportError: the family has no static class, the static class cannot do what the config asks for, or a layer's
            shape is impossible.
    """
    translate = _TRANSLATIONS.get(config.model_type)
    if translate is None:
        raise ExportError(
            f"model type {config.model_type!r} has no static class to hold per-layer shapes; "
            f"supported: {', '.join(_TRANSLATIONS)}"
        )
    target, fields = translate(config)
    if parent is not None and "add_pooling_layer" in fields:
        fields["add_pooling_layer"] = _has_pooler(parent)
    names = _DISTILBERT_FIELDS if config.model_type == "distilbert" else {}
    layers = {
        int(number): {names.get(name, name): value for name, value in layer.items()}
        for number, layer in per_layer.items()
    }
    kind = config_class(target)
    fields |= {} if routing is None else {"routing": dict(routing)}
    fields["per_layer_config"] = _fold_shared_sizes(fields, layers, names=kind.per_layer_names) or None
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ExportError(f"no {target} model holds this {config.model_type}: {error.__cause__ or error}") from error


def static_state_dict(stock_model: StockModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the parameters of a stock model the names of its static class; the tensors are the same.

    Args:
        stock_model: a model or its class.
        state_dict: of it, whole or cut.

    Raises:
        ExportError: there is no static class for this model.
    """
    static_class(stock_model)
    name = _class_of(stock_model).__name__
    rules: tuple[tuple[str, str], ...] = ()
    if name.startswith("Roberta"):
        rules = _ROBERTA_NAMES + (_ROBERTA_CLASSIFIER if name.endswith("ForSequenceClassification") else ())
    elif name.startswith("DistilBert"):
        rules = _DISTILBERT_NAMES
    renamed = {_renamed(key, rules): tensor for key, tensor in state_dict.items()}
    # BERT lists the bias of its decoder twice, DistilBERT once.
    bias, decoder = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if decoder in renamed:
        renamed.setdefault(bias, renamed[decoder])
    return renamed


def stock_class(static: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns the stock class of BERT or GPT-2 that computes what a static class does with standard blocks.

    Raises:
        ExportError: there is none.
    """
    names = {name: stock for stock, (_, name) in STATIC_CLASSES.items() if stock[:4] in ("Bert", "GPT2")}
    if static.__name__ not in names:
        raise ExportError(f"{static.__name__} has no stock class; export with loadability='remote-code'")
    return getattr(transformers, names[static.__name__])


def stock_config(config: PreTrainedConfig, *, intermediate_size: int) -> PreTrainedConfig:
    """Translates the config of a static BERT or GPT-2 into the stock one, with one width for all layers."""
    kind = {"elastic_bert": transformers.BertConfig, "elastic_gpt2": transformers.GPT2Config}[config.model_type]
    known = set(kind().to_dict()) - _DROPPED
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    fields["n_inner" if kind is transformers.GPT2Config else "intermediate_size"] = intermediate_size
    return kind(**fields)


def _class_of(stock_model: StockModel) -> type[PreTrainedModel]:
    return stock_model if isinstance(stock_model, type) else type(stock_model)


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _has_pooler(parent: StockModel) -> bool:
    name = _class_of(parent).__name__
    if name.endswith("ForSequenceClassification"):
        return True
    if isinstance(parent, type):
        return name in ("BertModel", "RobertaModel")
    return getattr(parent.base_model, "pooler", None) is not None


def _fold_shared_sizes(fields: Fields, layers: dict[int, Fields], *, names: Mapping[str, str]) -> dict[int, Fields]:
    """Drops sizes of sublayers that are not there, and makes sizes that all other layers share the global ones."""
    for name, field in names.items():
        skip = "mlp" if name == "intermediate_size" else "attention"
        having = {n: layers[n] for n in layers if skip not in layers[n].get("skip", ())}
        others = fields[_depth_field(fields)] - len(layers)
        default = fields.get(field)
        sizes = {layer.get(name, layer.get(field, default)) for layer in having.values()}
        sizes |= {default} if others else set()
        shared = len(sizes) <= 1
        for number, layer in layers.items():
            size = layer.pop(name, layer.pop(field, default))
            if not shared and number in having:
                layer[field] = size
        if shared and sizes:
            fields[field] = sizes.pop()
    return {number: layer for number, layer in layers.items() if layer.get("skip") or set(layer) - {"skip"}}


def _depth_field(fields: Fields) -> str:
    return "n_layer" if "n_layer" in fields else "num_hidden_layers"


def _carried(config: PreTrainedConfig) -> Fields:
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError("the config is of a quantised model, which has no static form; load the model unquantised")
    return {name: value for name, value in config.to_dict().items() if name not in _DROPPED}


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _from_bert(config: PreTrainedConfig) -> tuple[str, Fields]:
    # A stock BERT ignores a head_dim in its config, a stock RoBERTa too.
    head_dim = config.hidden_size // config.num_attention_heads
    return "elastic_bert", {**_carried(config), "head_dim": head_dim, "add_pooling_layer": True}


def _from_roberta(config: PreTrainedConfig) -> tuple[str, Fields]:
    target, fields = _from_bert(config)
    dropout = config.classifier_dropout
    fields |= {
        "positions_skip_padding": True,
        "mlm_activation": "gelu",
        "pooler_dropout": config.hidden_dropout_prob if dropout is None else dropout,
    }
    return target, fields


def _from_distilbert(config: PreTrainedConfig) -> tuple[str, Fields]:
    fields = {_DISTILBERT_FIELDS.get(name, name): value for name, value in _carried(config).items()}
    fields |= {
        "head_dim": config.dim // config.n_heads,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-12,
        "add_pooling_layer": False,
        "pooler_activation": "relu",
        "attention_output_dropout_prob": 0.0,
        "token_classifier_dropout": config.dropout,
    }
    return "elastic_bert", fields


def _from_llama(config: PreTrainedConfig) -> tuple[str, Fields]:
    return "elastic_llama", {**_carried(config), "head_dim": _head_dim(config)}


def _from_qwen2(config: PreTrainedConfig) -> tuple[str, Fields]:
    target, fields = _from_llama(config)
    return target, {**fields, "attention_bias": True, "attention_output_bias": False}


def _from_qwen3(config: PreTrainedConfig) -> tuple[str, Fields]:
    target, fields = _from_llama(config)
    return target, {**fields, "qk_norm": True}


def _from_mistral(config: PreTrainedConfig) -> tuple[str, Fields]:
    target, fields = _from_llama(config)
    # The stock model applies its window to every layer, whatever layer_types says.
    return target, {**fields, "layer_types": None}


def _from_gpt2(config: PreTrainedConfig) -> tuple[str, Fields]:
    return "elastic_gpt2", {
        **_carried(config),
        "head_dim": config.n_embd // config.n_head,
        "n_inner": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
    }


_TRANSLATIONS: Mapping[str, Callable[[PreTrainedConfig], tuple[str, Fields]]] = {
    "bert": _from_bert,
    "roberta": _from_roberta,
    "distilbert": _from_distilbert,
    "llama": _from_llama,
    "qwen2": _from_qwen2,
    "qwen3": _from_qwen3,
    "mistral": _from_mistral,
    "gpt2": _from_gpt2,
}
