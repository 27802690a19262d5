"""Which architecture of llama.cpp holds a model, with which sizes per layer; or why none does.

Read from the sources of llama.cpp (``src/models``): ``llama``, ``qwen2``, ``qwen3``, ``gpt2`` and ``bert`` have one
shape for all layers, as they take the sizes of the first; ``deci`` (made for Nemotron) takes heads, key/value heads and
FFN width of each layer. There a layer of no heads has no attention, but one of no FFN drops its attention too, and the
first layer must have heads. What a layer then lacks is written as zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_elastic.errors import ExportError
from hf_elastic.models import MODEL_TYPES
from hf_elastic.models.elastic_layers import skipped_sublayers
from hf_elastic.models.elastic_routing import routed_layers

FILLED_WIDTH = 32  # neurons of zeros, a multiple of what blocks of quantised weights hold
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "elastic_llama")
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class GgufLayer:
    """One layer as it stands in the file.

    Attributes:
        index: of the layer in the checkpoint.
        heads: query heads, 0 for no attention.
        groups: key/value heads, 0 for no attention.
        width: FFN neurons.
        filled: sublayers of zeros that stand for one the layer lacks, out of ``attention`` and ``mlp``.
    """

    index: int
    heads: int
    groups: int
    width: int
    filled: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufLayout:
    """How a model is laid out in the file.

    Attributes:
        architecture: llama.cpp's name.
        layers: that are written.
        head_dim: size of a head.
        context: tokens that the model may see.
        interleaved: whether rotary pairs are neighbours in the file, as ``llama`` and ``deci`` want them.
        notes: what a user has to know.
    """

    architecture: str
    layers: tuple[GgufLayer, ...]
    head_dim: int
    context: int
    interleaved: bool = False
    notes: tuple[str, ...] = ()

    def sizes(self, name: str) -> int | list[int]:
        """A size of all layers, one number where they are alike; ``deci`` always has lists."""
        found = [int(getattr(layer, name)) for layer in self.layers]
        return found if self.architecture == "deci" else found[0]


def gguf_layout(config: PreTrainedConfig, class_name: str) -> GgufLayout:
    """Finds the layout of a model.

    Args:
        config: of a checkpoint that stands for itself.
        class_name: of the model.

    Raises:
        ExportError: llama.cpp holds no such model; the message says why and, where there is a way, which.
    """
    if config.model_type in MODEL_TYPES:
        _refuse_unknown_parts(config)
    if config.model_type in _DECODERS:
        return _of_decoder(config, class_name)
    if config.model_type in ("gpt2", "elastic_gpt2"):
        return _of_gpt2(config, class_name)
    if config.model_type in ("bert", "elastic_bert"):
        return _of_bert(config, class_name)
    raise ExportError(
        f"no GGUF of a {config.model_type}: known are {', '.join((*_DECODERS, 'gpt2', 'elastic_gpt2', 'bert'))}"
    )


def _refuse_unknown_parts(config: PreTrainedConfig) -> None:
    if routed_layers(config):
        raise ExportError("llama.cpp has no routers that choose tokens, heads or experts this way; convert the parent")
    blocks = {str(getattr(layer, "block", "standard")) for layer in _layer_configs(config)}
    if getattr(config, "candidate_blocks", None) or blocks != {"standard"}:
        raise ExportError(f"llama.cpp has no blocks such as {', '.join(sorted(blocks - {'standard'})) or 'candidates'}")


def _layer_configs(config: PreTrainedConfig) -> list[Any]:
    if config.model_type in MODEL_TYPES:
        return list(config.per_layer_config)
    return [config] * int(config.num_hidden_layers)


def _shapes(
    config: PreTrainedConfig, *, width: str, heads: str, groups: str, default: int | None = None
) -> list[GgufLayer]:
    """Shapes of all layers, by the names of sizes in their configs; of no width is what skips its FFN."""
    found = []
    for index, layer in enumerate(_layer_configs(config)):
        skipped = skipped_sublayers(layer) if config.model_type in MODEL_TYPES else []
        attention = "attention" not in skipped
        queries, keys = (int(getattr(layer, name)) if attention else 0 for name in (heads, groups))
        found.append(
            GgufLayer(index, queries, keys, 0 if "mlp" in skipped else int(getattr(layer, width) or default or 0))
        )
    return found


def _uniform(layers: Sequence[GgufLayer]) -> bool:
    shapes = {(layer.heads, layer.groups, layer.width) for layer in layers}
    return len(shapes) == 1 and all(min(shape) > 0 for shape in shapes)


def _of_decoder(config: PreTrainedConfig, class_name: str) -> GgufLayout:
    _require(class_name.endswith("ForCausalLM"), f"a {class_name} has no language-model head, which llama.cpp wants")
    _require(config.hidden_act == "silu", f"llama.cpp has silu here, and not hidden_act={config.hidden_act!r}")
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    _require(kind in _ROPE_TYPES, f"rope_type={kind!r} is not written here, only {', '.join(_ROPE_TYPES)}")
    partial = float(rope.get("partial_rotary_factor") or 1.0)
    _require(partial == 1.0, f"llama.cpp turns whole heads here, and not partial_rotary_factor={partial}")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    layers = _shapes(config, width="intermediate_size", heads="num_attention_heads", groups="num_key_value_heads")
    context, notes = _window(config)
    normed = config.model_type == "qwen3" or bool(getattr(config, "qk_norm", False))
    if _uniform(layers):
        architecture = _uniform_decoder(config, heads=layers[0].heads * head_dim, normed=normed)
        interleaved = architecture == "llama"
        return GgufLayout(architecture, tuple(layers), head_dim, context, interleaved, notes)
    _require(not normed, "llama.cpp's deci has no norm on queries and keys, and its qwen3 one shape for all layers")
    filled = _without_holes(layers)
    if any(layer.filled for layer in filled):
        notes += ("some layers hold a sublayer of zeros for one they lack, as llama.cpp's deci cannot leave it out",)
    return GgufLayout("deci", filled, head_dim, context, True, notes)


def _uniform_decoder(config: PreTrainedConfig, *, heads: int, normed: bool) -> str:
    """llama.cpp's name for a decoder of one shape; ``llama`` holds biases too, but queries of any width."""
    biased = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    if normed:
        _require(not biased, "llama.cpp's qwen3 has no biases on queries, keys and values")
        return "qwen3"
    behind = bool(getattr(config, "attention_output_bias", config.model_type != "qwen2" and biased))
    return "qwen2" if biased and not behind and heads == config.hidden_size else "llama"


def _without_holes(layers: Sequence[GgufLayer]) -> tuple[GgufLayer, ...]:
    """Layers as ``deci`` computes them: those that do nothing are left out, others filled where it cannot skip."""
    kept: list[GgufLayer] = []
    ratio = next((layer.heads // layer.groups for layer in layers if layer.heads), 1)
    for layer in layers:
        if not layer.heads and not layer.width:
            continue
        holes: tuple[str, ...] = () if layer.width else ("mlp",)
        holes += ("attention",) if not layer.heads and not kept else ()
        queries, keys = (ratio, 1) if "attention" in holes else (layer.heads, layer.groups)
        kept.append(GgufLayer(layer.index, queries, keys, layer.width or FILLED_WIDTH, holes))
    _require(bool(kept), "every layer of the model is skipped as a whole")
    return tuple(kept)


def rope_of(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The rotary parameters of a decoder."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _window(config: PreTrainedConfig) -> tuple[int, tuple[str, ...]]:
    """Tokens that the model may see: a sliding window is not written, so that is all it may."""
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("qwen2", "qwen3") and not getattr(config, "use_sliding_window", False):
        window = None
    if window is None or window >= context:
        return context, ()
    note = f"no sliding window in the file: the context is {window} tokens, up to which the model is the same"
    return int(window), (note,)


def _of_gpt2(config: PreTrainedConfig, class_name: str) -> GgufLayout:
    causal = class_name.endswith(("LMHeadModel", "ForCausalLM"))
    _require(causal, f"a {class_name} has no language-model head, which llama.cpp wants")
    activation = config.activation_function
    _require(activation in ("gelu_new", "gelu_pytorch_tanh"), f"llama.cpp's gpt2 has gelu_new, and not {activation!r}")
    scaled = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    _require(scaled, "llama.cpp's gpt2 scales attention by the size of a head alone")
    layers = _shapes(config, width="n_inner", heads="n_head", groups="n_head", default=4 * config.n_embd)
    return _uniform_only(config, layers, architecture="gpt2", context=int(config.n_positions))


def _of_bert(config: PreTrainedConfig, class_name: str) -> GgufLayout:
    plain = class_name in ("BertModel", "ElasticBertModel")
    _require(plain, f"of BERT llama.cpp takes the encoder that embeds text, and not a {class_name}")
    _require(config.hidden_act == "gelu", f"llama.cpp's bert has gelu, and not hidden_act={config.hidden_act!r}")
    if config.model_type == "elastic_bert":
        other = (
            config.positions_skip_padding or config.trigram_input or config.embedding_size or not config.type_vocab_size
        )
        _require(not other, "only what comes from a BERT is written, not from a RoBERTa, DistilBERT or MobileBERT")
    layers = _shapes(config, width="intermediate_size", heads="num_attention_heads", groups="num_attention_heads")
    return _uniform_only(config, layers, architecture="bert", context=int(config.max_position_embeddings))


def _uniform_only(
    config: PreTrainedConfig, layers: Sequence[GgufLayer], *, architecture: str, context: int
) -> GgufLayout:
    hidden = int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    if not _uniform(layers):
        padded = "; export with loadability='stock-padded' and convert that" if architecture == "gpt2" else ""
        raise ExportError(
            f"llama.cpp's {architecture} has one width and head count for all layers, and no skipped sublayers{padded}"
        )
    if layers[0].heads * head_dim != hidden:
        raise ExportError(
            f"llama.cpp's {architecture} has heads that fill the hidden size, {hidden}; here are {layers[0].heads} of "
            f"{head_dim}"
        )
    return GgufLayout(architecture, tuple(layers), head_dim, context)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise ExportError(f"no GGUF: {reason}")
