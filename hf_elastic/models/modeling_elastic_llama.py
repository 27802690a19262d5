"""Static LLaMA-shaped models (LLaMA, Qwen2, Qwen3, Mistral) whose layers may differ; see the configuration.

Parameters have the stock names. The numerics are those of the stock modeling files of transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elastic_llama import ElasticLlamaConfig
from .elastic_layers import skipped_sublayers, static_cache_shapes, write_cache_filler
from .elastic_routed_models import RoutedModel

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class ElasticLlamaAttention(nn.Module):
    """Grouped-query attention whose heads come from a layer's config.

    Args:
        config: the model's config, shared, so that ``set_attn_implementation`` reaches every layer.
        shape: the layer's config.
        layer_idx: slot in the KV cache.
    """

    def __init__(self, config: ElasticLlamaConfig, shape: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = shape.head_dim
        self.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = shape.attention_dropout
        self.is_causal = True
        self.sliding_window = shape.sliding_window if shape.layer_types[layer_idx] == "sliding_attention" else None
        hidden, bias = shape.hidden_size, shape.attention_bias
        queries, keys = shape.num_attention_heads * self.head_dim, shape.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=shape.attention_output_bias)
        self.has_qk_norm = shape.qk_norm
        if self.has_qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=shape.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = hidden_states.shape[:-1]
        by_head = (*tokens, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(by_head)  # (B, T, H, head_dim)
        key = self.k_proj(hidden_states).view(by_head)  # (B, T, K, head_dim)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)  # (B, K, T, head_dim)
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, head_dim), (B, K, T, head_dim)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        mixed = mixed.reshape(*tokens, -1).contiguous()  # (B, T, H * head_dim)
        return self.o_proj(mixed), weights


class ElasticLlamaDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm layer; a sublayer it skips has no modules and adds nothing to the residual stream."""

    def __init__(self, config: ElasticLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.per_layer_config[layer_idx]
        skipped = skipped_sublayers(shape)
        self.layer_idx = layer_idx
        self.has_attention, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        if self.has_attention:
            self.self_attn = ElasticLlamaAttention(config, shape, layer_idx)
            self.input_layernorm = LlamaRMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        if self.has_mlp:
            self.mlp = LlamaMLP(shape)
            self.post_attention_layernorm = LlamaRMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.has_attention:
            mixed, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + mixed
        else:
            write_cache_filler(past_key_values, hidden_states, self.layer_idx)
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class ElasticLlamaPreTrainedModel(RoutedModel, LlamaPreTrainedModel):
    config: ElasticLlamaConfig
    config_class = ElasticLlamaConfig
    _no_split_modules = ["ElasticLlamaDecoderLayer"]
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ElasticLlamaDecoderLayer, "attentions": ElasticLlamaAttention}


class ElasticLlamaModel(ElasticLlamaPreTrainedModel):
    """The decoder without a head. ``attentions`` has an entry for each layer that has attention."""

    def __init__(self, config: ElasticLlamaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.layer_types = list(config.layer_types or ())
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ElasticLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Some rotary types read the number of heads, which only a layer's config answers.
        self.rotary_emb = LlamaRotaryEmbedding(config.per_layer_config[0])  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.attach_stated_routers(self.layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        masks = self._masks(attention_mask, hidden_states, past_key_values=past_key_values, position_ids=position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer, layer_type in zip(self.layers, self.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _masks(self, attention_mask: Any, inputs_embeds: torch.Tensor, **past: Any) -> dict[str, Any]:
        """One mask per type of layer; ``generate`` brings them ready-made."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            layer_type: MASKS[layer_type](
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **past
            )
            for layer_type in dict.fromkeys(self.layer_types)
        }


class ElasticLlamaForCausalLM(ElasticLlamaPreTrainedModel, LlamaForCausalLM):
    """The decoder with the stock language-model head."""

    config: ElasticLlamaConfig
    config_class = ElasticLlamaConfig

    def __init__(self, config: ElasticLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = ElasticLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self) -> tuple[list[int], list[int]] | None:
        # None where the layers sit on several devices.
        single_device = super()._get_static_cache_init_shape() is not None  # type: ignore[misc]
        return static_cache_shapes(self.config) if single_device else None


class ElasticLlamaForSequenceClassification(GenericForSequenceClassification, ElasticLlamaPreTrainedModel):
    """The decoder with a linear score on the last token that is not padding."""

    config: ElasticLlamaConfig
    config_class = ElasticLlamaConfig
    # The loss is a mean over sequences whatever the Trainer counts, so it divides by the accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ElasticLlamaConfig) -> None:
        # Not the generic constructor: AutoModel.from_config refuses remote code even where it was trusted.
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ElasticLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)  # type: ignore[arg-type]
        self.post_init()


__all__ = [
    "ElasticLlamaForCausalLM",
    "ElasticLlamaForSequenceClassification",
    "ElasticLlamaModel",
    "ElasticLlamaPreTrainedModel",
]
