"""Configuration of ``elastic_llama``: LLaMA, Qwen2, Qwen3 and Mistral whose layers may differ."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .elastic_layers import PerLayerShapes, check_depth, skipped_sublayers

LAYER_TYPES = ("full_attention", "sliding_attention")


@strict
class ElasticLlamaConfig(PerLayerShapes, LlamaConfig):
    """A :class:`~transformers.LlamaConfig` with per-layer shapes, and what Qwen2, Qwen3 and Mistral do differently.

    Per layer (``per_layer_config``): ``intermediate_size``, ``num_attention_heads``, ``num_key_value_heads``, ``skip``.

    Attributes:
        head_dim: size of a head, whatever the number of heads; by default ``hidden_size // num_attention_heads``.
        attention_bias: bias of the query, key and value projections.
        attention_output_bias: bias of the output projection; by default ``attention_bias``. Qwen2 has the one without
            the other.
        qk_norm: RMSNorm over each head of queries and keys before the rotary embedding, as Qwen3 has it.
        sliding_window: tokens that a layer of type ``sliding_attention`` sees.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; by default all sliding if there is a
            ``sliding_window``, as in Mistral, else all full.
        routing: routers by layer, as in ``elastic_bert``.
    """

    model_type = "elastic_llama"
    per_layer_names: ClassVar[dict[str, str]] = {
        "intermediate_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
    }
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_elastic_llama.ElasticLlamaConfig",
        "AutoModel": "modeling_elastic_llama.ElasticLlamaModel",
        "AutoModelForCausalLM": "modeling_elastic_llama.ElasticLlamaForCausalLM",
        "AutoModelForSequenceClassification": "modeling_elastic_llama.ElasticLlamaForSequenceClassification",
    }
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    attention_output_bias: bool | None = None
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    routing: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        check_depth(self.num_hidden_layers)
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[self.sliding_window is not None]] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks every layer's shape, see :meth:`PerLayerShapes.validate_architecture`.

        Raises:
            ValueError: also when the query heads of a layer do not divide into its key/value groups.
        """
        super().validate_architecture()
        if self.is_heterogeneous or "attention" in skipped_sublayers(self):
            return
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads} in every layer"
            )

    def validate_window(self) -> None:
        """Checks that layer types and sliding window fit.

        Raises:
            ValueError: an unknown layer type, or sliding layers without a window.
        """
        layer_types = self.layer_types or []
        unknown = sorted(set(layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types has {', '.join(unknown)}; elastic_llama has {' and '.join(LAYER_TYPES)}")
        if "sliding_attention" in layer_types and not self.sliding_window:
            raise ValueError(
                f"layer_types has sliding_attention, which needs a sliding_window, got {self.sliding_window}"
            )

    def validate_rope(self) -> None:
        """Checks the rotary parameters; on one layer, because the check of some types reads the number of heads."""
        if self.is_heterogeneous:
            self.per_layer_config[0].validate_rope()
        else:
            super().validate_rope()


__all__ = ["ElasticLlamaConfig"]
