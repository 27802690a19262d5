"""Static BERT-shaped encoders (BERT, RoBERTa, DistilBERT) whose layers may differ; see the configuration.

Parameters have BERT's names. The numerics are those of the stock modeling files of transformers.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead, BertOnlyMLMHead
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elastic_bert import ElasticBertConfig
from .elastic_bert_layers import (
    ElasticBertEmbeddings,
    ElasticBertEncoder,
    ElasticBertLayer,
    ElasticBertPooler,
    ElasticBertSelfAttention,
)
from .elastic_blocks import NoNorm
from .elastic_routed_models import RoutedModel


class ElasticBertPreTrainedModel(RoutedModel, PreTrainedModel):
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
        elif isinstance(module, NoNorm):
            init.ones_(module.weight)
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
        self.attach_stated_routers(self.encoder.layer)
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
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, attention_mask)
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
        words = config.embedding_size or config.hidden_size
        if words != config.hidden_size:
            self.cls.predictions.transform.dense = nn.Linear(config.hidden_size, words)
            self.cls.predictions.transform.LayerNorm = nn.LayerNorm(words, eps=config.layer_norm_eps)
            self.cls.predictions.decoder = nn.Linear(words, config.vocab_size)
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
