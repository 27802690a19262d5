"""Embeddings, blocks and pooler of ``elastic_bert``; the numerics are those of the stock modeling files.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, eager_attention_forward
from transformers.pytorch_utils import apply_chunking_to_forward

from .configuration_elastic_bert import ElasticBertConfig
from .elastic_blocks import (
    NoNorm,
    SlicedLinear,
    head_size,
    inner_size,
    is_bottleneck,
    kept_heads,
    make_layer,
    prefix,
    runs_of_heads,
    sharing,
)
from .elastic_layers import skipped_sublayers


class ElasticBertEmbeddings(nn.Module):
    """Words, positions and, unless ``type_vocab_size`` is 0, token types; then LayerNorm and dropout.

    With ``trigram_input`` the words are ``(next, own, previous)`` side by side; these, or words of another
    ``embedding_size``, are mapped to the hidden size.
    """

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__()
        # RoBERTa gives padding the position of the padding token, which then takes no gradient.
        self.padding_idx = config.pad_token_id if config.positions_skip_padding else None
        self.first_position = 0 if self.padding_idx is None else self.padding_idx + 1
        hidden, words = config.hidden_size, config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, words, padding_idx=config.pad_token_id)
        self.trigram_input = config.trigram_input
        self.embedding_transformation = None
        if config.trigram_input or words != hidden:
            self.embedding_transformation = nn.Linear((3 if config.trigram_input else 1) * words, hidden)
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
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.trigram_input:
            if attention_mask is not None and attention_mask.dim() == 2:  # beside padding as at the end of a row
                embeddings = embeddings * attention_mask[..., None].to(embeddings)
            after = nn.functional.pad(embeddings[:, 1:], (0, 0, 0, 1))  # (B, T, E)
            before = nn.functional.pad(embeddings[:, :-1], (0, 0, 1, 0))
            embeddings = torch.cat([after, embeddings, before], dim=-1)  # (B, T, 3E)
        if self.embedding_transformation is not None:
            embeddings = self.embedding_transformation(embeddings)
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
    """Bidirectional attention whose heads come from a layer's config; ``config`` is the model's, shared.

    A block that shares projections has no ``value``: its query, or its key, serves as that too.
    """

    def __init__(self, config: ElasticBertConfig, shape: Any, layer_idx: int, *, block: str) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_attention_heads = shape.num_attention_heads
        self.attention_head_size = head_size(shape, block)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.config_head_size = self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.shared = sharing(block)
        linear = _linear(config)
        self.query = linear(shape.hidden_size, self.all_head_size)
        self.key = linear(shape.hidden_size, self.all_head_size)
        if not self.shared:
            self.value = linear(shape.hidden_size, self.all_head_size)
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
        if self.shared:
            value = query if self.shared == "qv" else key
        else:
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
    """From the heads back to the width of the block, with the residual and its norm."""

    def __init__(self, config: ElasticBertConfig, shape: Any, *, block: str) -> None:
        super().__init__()
        dropout, size = shape.attention_output_dropout_prob, inner_size(shape, block)
        self.dense = _linear(config)(shape.num_attention_heads * head_size(shape, block), size)
        self.LayerNorm = NoNorm(size) if is_bottleneck(block) else nn.LayerNorm(size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob if dropout is None else dropout)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class ElasticBertAttention(nn.Module):
    """Attention sublayer, with the stock names of its two halves."""

    def __init__(self, config: ElasticBertConfig, shape: Any, layer_idx: int, *, block: str) -> None:
        super().__init__()
        self.self = ElasticBertSelfAttention(config, shape, layer_idx, block=block)
        self.output = ElasticBertSelfOutput(config, shape, block=block)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        mixed, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(mixed, hidden_states if residual is None else residual)


class ElasticBertLayer(GradientCheckpointingLayer):
    """A post-norm layer; a sublayer it skips has no modules, its norm neither: it is the identity.

    A bottleneck block takes its input to ``bottleneck_size`` dimensions, where its residual stream, its attention
    (whose queries, keys and values are read from the whole input) and its FFN are, and back; its norms are
    element-wise affine. That is the block of ELM, not Google's MobileBERT, which stacks four FFNs.

    Args:
        config: the model's config, shared.
        layer_idx: number of the layer.
        block: kind of the layer.
    """

    def __init__(self, config: ElasticBertConfig, layer_idx: int, *, block: str) -> None:
        super().__init__()
        shape = config.per_layer_config[layer_idx]
        skipped = skipped_sublayers(shape)
        self.layer_idx, self.chunk_size_feed_forward = layer_idx, shape.chunk_size_feed_forward
        self.has_attention, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        self.has_bottleneck = is_bottleneck(block)
        if self.has_bottleneck:
            inner, hidden = inner_size(shape, block), shape.hidden_size
            self.bottleneck_in, self.bottleneck_in_norm = nn.Linear(hidden, inner), NoNorm(inner)
            self.bottleneck_out, self.bottleneck_out_norm = nn.Linear(inner, hidden), NoNorm(hidden)
            self.bottleneck_dropout = nn.Dropout(shape.hidden_dropout_prob)
        if self.has_attention:
            self.attention = ElasticBertAttention(config, shape, layer_idx, block=block)
        if self.has_mlp:
            self._make_mlp(config, shape, block)

    def _make_mlp(self, config: ElasticBertConfig, shape: Any, block: str) -> None:
        self.intermediate, self.output = BertIntermediate(shape), BertOutput(shape)
        linear, inner = _linear(config), inner_size(shape, block)
        if self.has_bottleneck or linear is not nn.Linear:
            self.intermediate.dense = linear(inner, shape.intermediate_size)
            self.output.dense = linear(shape.intermediate_size, inner)
        if self.has_bottleneck:
            self.intermediate.intermediate_act_fn = ACT2FN[shape.bottleneck_act]
            self.output.LayerNorm = NoNorm(inner)  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        whole = hidden_states
        if self.has_bottleneck:
            hidden_states = self.bottleneck_in_norm(self.bottleneck_in(whole))  # (B, T, I)
        if self.has_attention:
            hidden_states = self.attention(whole, attention_mask, hidden_states, **kwargs)
        if self.has_mlp:
            hidden_states = apply_chunking_to_forward(
                self.feed_forward_chunk, self.chunk_size_feed_forward, 1, hidden_states
            )
        if self.has_bottleneck:
            widened = self.bottleneck_dropout(self.bottleneck_out(hidden_states))  # (B, T, D)
            hidden_states = self.bottleneck_out_norm(widened + whole)
        return hidden_states

    def feed_forward_chunk(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(hidden_states), hidden_states)

    def set_width(self, width: int) -> None:
        """Lets the first ``width`` neurons of the FFN be used; only of a block in a supernet."""
        entering: Any = self.intermediate.dense
        leaving: Any = self.output.dense
        entering.rows = leaving.columns = prefix(width, entering.out_features)

    def set_heads(self, heads: list[int] | int | None) -> None:
        """Says which heads are used, see ``candidate_heads`` of the config; only of a block in a supernet."""
        attention: Any = self.attention.self
        leaving: Any = self.attention.output.dense
        whole, size = attention.query.out_features, attention.config_head_size
        kept, count = kept_heads(heads, whole // size)
        runs = runs_of_heads(kept, size, heads=whole // size)
        for projection in (attention.query, attention.key, *([] if attention.shared else [attention.value])):
            projection.rows = runs
        leaving.columns = runs
        attention.num_attention_heads, attention.all_head_size = count, len(kept) * size
        attention.attention_head_size = len(kept) * size // count
        attention.scaling = attention.attention_head_size**-0.5


def _linear(config: ElasticBertConfig) -> type[nn.Linear]:
    """Class of the projections: one that can be used in part where a layer holds candidates."""
    return nn.Linear if config.candidate_blocks is None else SlicedLinear


class ElasticBertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ElasticBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(make_layer(config, i, ElasticBertLayer) for i in range(config.num_hidden_layers))

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
