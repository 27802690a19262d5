"""Static BERT-shaped encoders (BERT, RoBERTa, DistilBERT) whose layers may differ; see the configuration.

Parameters have BERT's names. The numerics are those of the stock modeling files of transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertIntermediate,
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertOutput,
    eager_attention_forward,
)
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elastic_bert import ElasticBertConfig
from .elastic_layers import skipped_sublayers


class ElasticBertEmbeddings(nn.Module):
    """Words, positions and, unless ``type_vocab_size`` is 0, token types; then LayerNorm and dropout."""

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__()
        # RoBERTa gives padding the position of the padding token, which then takes no gradient.
        self.padding_idx = config.pad_token_id if config.positions_skip_padding else None
        self.first_position = 0 if self.padding_idx is None else self.padding_idx + 1
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden, padding_idx=self.padding_idx)
        self.has_token_types = config.type_vocab_size > 0
        if self.has_token_types:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self._positions(input_ids, embeddings)
        if self.has_token_types:
            if token_type_ids is None:
                token_type_ids = torch.zeros(embeddings.shape[:-1], dtype=torch.long, device=embeddings.device)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def _positions(self, input_ids: torch.Tensor | None, embeddings: torch.Tensor) -> torch.Tensor:
        if self.padding_idx is None or input_ids is None:
            count = torch.arange(embeddings.shape[1], device=embeddings.device)
            return (count + self.first_position).unsqueeze(0)  # (1, T)
        real = input_ids.ne(self.padding_idx).int()
        return (torch.cumsum(real, dim=1).type_as(real) * real).long() + self.padding_idx  # (B, T)


class ElasticBertSelfAttention(nn.Module):
    """Bidirectional attention whose heads come from a layer's config; ``config`` is the model's, shared."""

    def __init__(self, config: ElasticBertConfig, shape: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_attention_heads = shape.num_attention_heads
        self.attention_head_size = shape.head_dim
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(shape.hidden_size, self.all_head_size)
        self.key = nn.Linear(shape.hidden_size, self.all_head_size)
        self.value = nn.Linear(shape.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(shape.attention_probs_dropout_prob)
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = hidden_states.shape[:-1]
        by_head = (*tokens, -1, self.attention_head_size)
        query = self.query(hidden_states).view(by_head).transpose(1, 2)  # (B, H, T, head_dim)
        key = self.key(hidden_states).view(by_head).transpose(1, 2)
        value = self.value(hidden_states).view(by_head).transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return mixed.reshape(*tokens, -1).contiguous(), weights  # (B, T, H * head_dim)


class ElasticBertSelfOutput(nn.Module):
    """From the heads back to the hidden size, with the residual and its LayerNorm."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        dropout = shape.attention_output_dropout_prob
        self.dense = nn.Linear(shape.num_attention_heads * shape.head_dim, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob if dropout is None else dropout)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class ElasticBertAttention(nn.Module):
    """Attention sublayer, with the stock names of its two halves."""

    def __init__(self, config: ElasticBertConfig, shape: Any, layer_idx: int) -> None:
        super().__init__()
        self.self = ElasticBertSelfAttention(config, shape, layer_idx)
        self.output = ElasticBertSelfOutput(shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        mixed, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(mixed, hidden_states)


class ElasticBertLayer(GradientCheckpointingLayer):
    """A post-norm layer; a sublayer it skips has no modules, its LayerNorm neither: it is the identity."""

    def __init__(self, config: ElasticBertConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.per_layer_config[layer_idx]
        skipped = skipped_sublayers(shape)
        self.chunk_size_feed_forward = shape.chunk_size_feed_forward
        self.has_attention, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        if self.has_attention:
            self.attention = ElasticBertAttention(config, shape, layer_idx)
        if self.has_mlp:
            self.intermediate = BertIntermediate(shape)
            self.output = BertOutput(shape)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.has_attention:
            hidden_states = self.attention(hidden_states, attention_mask, **kwargs)
        if self.has_mlp:
            hidden_states = apply_chunking_to_forward(
                self.feed_forward_chunk, self.chunk_size_feed_forward, 1, hidden_states
            )
        return hidden_states

    def feed_forward_chunk(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(hidden_states), hidden_states)


class ElasticBertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(ElasticBertLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class ElasticBertPooler(nn.Module):
    """Dense layer and activation on the first token; BERT's pooler, RoBERTa's and DistilBERT's classifier body."""

    def __init__(self, config: ElasticBertConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(self.dropout(hidden_states[:, 0])))  # (B, D)


class ElasticBertPreTrainedModel(PreTrainedModel):
    config: ElasticBertConfig
    config_class = ElasticBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticBertEmbeddings", "ElasticBertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ElasticBertLayer, "attentions": ElasticBertSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model; the config says whether it has a pooler, so that ``AutoModel`` makes none that it lacks."""
        self.config.add_pooling_layer = self.base_model.pooler is not None
        super().save_pretrained(save_directory, *args, **kwargs)


class ElasticBertModel(ElasticBertPreTrainedModel):
    """The encoder without a head. ``attentions`` has an entry for each layer that has attention.

    Args:
        config: shapes and flavour.
        add_pooling_layer: overrides the config's.
        pooler_dropout: dropout before the pooler.
    """

    def __init__(
        self, config: ElasticBertConfig, add_pooling_layer: bool | None = None, *, pooler_dropout: float = 0.0
    ) -> None:
        super().__init__(config)
        pools = config.add_pooling_layer if add_pooling_layer is None else add_pooling_layer
        self.embeddings = ElasticBertEmbeddings(config)
        self.encoder = ElasticBertEncoder(config)
        self.pooler = ElasticBertPooler(config, pooler_dropout) if pools else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        hidden_states = self.encoder(hidden_states, mask, position_ids=position_ids, **kwargs)
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class ElasticBertForMaskedLM(ElasticBertPreTrainedModel):
    """The encoder with the masked-language head, tied to the input embeddings by default."""

    config: ElasticBertConfig
    config_class = ElasticBertConfig
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__(config)
        self.bert = ElasticBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.cls.predictions.transform.transform_act_fn = ACT2FN[config.mlm_activation or config.hidden_act]
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.cls(outputs.last_hidden_state)  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ElasticBertForSequenceClassification(ElasticBertPreTrainedModel):
    """The encoder with its pooler and a linear classifier on it."""

    config: ElasticBertConfig
    config_class = ElasticBertConfig
    # The loss is a mean over sequences whatever the Trainer counts, so it divides by the accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = ElasticBertModel(config, add_pooling_layer=True, pooler_dropout=config.pooler_dropout)
        self.dropout = nn.Dropout(_first(config.classifier_dropout, config.hidden_dropout_prob))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))  # (B, labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ElasticBertForTokenClassification(ElasticBertPreTrainedModel):
    """The encoder with a linear classifier on every token."""

    config: ElasticBertConfig
    config_class = ElasticBertConfig

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = ElasticBertModel(config, add_pooling_layer=False)
        dropouts = (config.token_classifier_dropout, config.classifier_dropout, config.hidden_dropout_prob)
        self.dropout = nn.Dropout(_first(*dropouts))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # (B, T, labels)
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ElasticBertForQuestionAnswering(ElasticBertPreTrainedModel):
    """The encoder with scores for the start and the end of an answer."""

    config: ElasticBertConfig
    config_class = ElasticBertConfig

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = ElasticBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.qa_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))  # (B, T, 2)
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))  # (B, T)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _first(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)


__all__ = [
    "ElasticBertForMaskedLM",
    "ElasticBertForQuestionAnswering",
    "ElasticBertForSequenceClassification",
    "ElasticBertForTokenClassification",
    "ElasticBertModel",
    "ElasticBertPreTrainedModel",
]
