"""Static GPT-2 models whose layers may differ; see the configuration.

Parameters have the stock names. Like the stock model they sit in Conv1D (fused query/key/value, weights transposed),
not in ``nn.Linear``: tools that want plain linears, such as vLLM's tensor parallelism, do not take GPT-2.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elastic_gpt2 import ElasticGPT2Config
from .elastic_blocks import make_layer
from .elastic_gpt2_layers import ElasticGPT2Attention, ElasticGPT2Block
from .elastic_layers import static_cache_shapes
from .elastic_routed_models import RoutedModel


class ElasticGPT2PreTrainedModel(RoutedModel, GPT2PreTrainedModel):
    config: ElasticGPT2Config
    config_class = ElasticGPT2Config
    _no_split_modules = ["ElasticGPT2Block"]
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ElasticGPT2Block, "attentions": ElasticGPT2Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Conv1D) and getattr(module, "into_residual", False):
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.n_layer))


class ElasticGPT2Model(ElasticGPT2PreTrainedModel):
    """The decoder without a head. ``attentions`` has an entry for each layer that has attention."""

    def __init__(self, config: ElasticGPT2Config) -> None:
        super().__init__(config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(make_layer(config, i, ElasticGPT2Block) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.attach_stated_routers(self.h)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = new_embeddings  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        hidden_states = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class ElasticGPT2ForCausalLM(ElasticGPT2PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, tied to the input embeddings by default."""

    config: ElasticGPT2Config
    config_class = ElasticGPT2Config
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: ElasticGPT2Config) -> None:
        super().__init__(config)
        self.transformer = ElasticGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_static_cache_init_shape(self) -> tuple[list[int], list[int]] | None:
        # None, which lets the first token say the shapes, where layers sit on several devices or hold several blocks.
        single_device = super()._get_static_cache_init_shape() is not None  # type: ignore[misc]
        return static_cache_shapes(self.config) if single_device and self.config.candidate_blocks is None else None


class ElasticGPT2ForSequenceClassification(GenericForSequenceClassification, ElasticGPT2PreTrainedModel):
    """The decoder with a linear score on the last token that is not padding."""

    config: ElasticGPT2Config
    config_class = ElasticGPT2Config
    # The loss is a mean over sequences whatever the Trainer counts, so it divides by the accumulated batches itself.
    accepts_loss_kwargs = False
    base_model_prefix = "transformer"

    def __init__(self, config: ElasticGPT2Config) -> None:
        # Not the generic constructor: AutoModel.from_config refuses remote code even where it was trusted.
        GPT2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = ElasticGPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)  # type: ignore[arg-type]
        self.post_init()


__all__ = [
    "ElasticGPT2ForCausalLM",
    "ElasticGPT2ForSequenceClassification",
    "ElasticGPT2Model",
    "ElasticGPT2PreTrainedModel",
]
