"""Blocks of ``elastic_gpt2``; the numerics are those of the stock modeling file of transformers.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.pytorch_utils import Conv1D

from .configuration_elastic_gpt2 import ElasticGPT2Config
from .elastic_blocks import (
    SlicedConv1D,
    head_size,
    inner_size,
    is_bottleneck,
    kept_heads,
    prefix,
    runs_of_heads,
    sharing,
)
from .elastic_layers import skipped_sublayers, write_cache_filler


class ElasticGPT2Attention(GPT2Attention):
    """The stock attention over as many heads as a layer's config says.

    A block that shares projections has two of them in ``c_attn``, of which one is handed out twice.

    Args:
        config: the model's config, shared, so that ``set_attn_implementation`` reaches every layer.
        shape: the layer's config.
        layer_idx: slot in the KV cache.
        block: kind of the layer.
    """

    def __init__(self, config: ElasticGPT2Config, shape: Any, layer_idx: int, *, block: str) -> None:
        # Not the stock constructor, which wants heads that fill the hidden size.
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.embed_dim = shape.hidden_size
        self.num_heads = shape.num_attention_heads
        self.head_dim = self.config_head_size = head_size(shape, block)
        self.split_size = self.num_heads * self.head_dim
        self.scale_attn_weights = shape.scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = shape.scale_attn_by_inverse_layer_idx
        self.reorder_and_upcast_attn = shape.reorder_and_upcast_attn
        self.is_cross_attention = False
        self.is_causal = True
        linear, shared = _linear(config), sharing(block)
        self.parts = 2 if shared else 3
        self.c_attn = (SlicedConv1D if shared else linear)(self.parts * self.split_size, self.embed_dim)
        if shared:
            self.c_attn.shared = shared  # type: ignore[assignment]
        self.c_proj = linear(inner_size(shape, block), self.split_size)
        self.attn_dropout = nn.Dropout(shape.attn_pdrop)
        self.resid_dropout = nn.Dropout(shape.resid_pdrop)
        self.rescale()

    def rescale(self) -> None:
        """Follows the size of a head."""
        self.scaling = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            self.scaling /= self.layer_idx + 1


class ElasticGPT2Block(GradientCheckpointingLayer):
    """A pre-norm layer; a sublayer it skips has no modules and adds nothing to the residual stream.

    A bottleneck block takes the normalised input to ``bottleneck_size`` dimensions, where it has a residual stream of
    its own for attention (whose queries, keys and values are read from the whole input) and FFN, and adds what comes
    out, mapped back, to the residual stream: ELM's block, made causal and pre-norm.

    Args:
        config: the model's config, shared.
        layer_idx: number of the layer.
        block: kind of the layer.
    """

    def __init__(self, config: ElasticGPT2Config, layer_idx: int, *, block: str) -> None:
        super().__init__()
        shape = config.per_layer_config[layer_idx]
        skipped = skipped_sublayers(shape)
        self.layer_idx, inner, eps = layer_idx, inner_size(shape, block), shape.layer_norm_epsilon
        self.has_attention, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        self.has_bottleneck = is_bottleneck(block)
        if self.has_attention or self.has_bottleneck:
            self.ln_1 = nn.LayerNorm(shape.hidden_size, eps=eps)
        if self.has_attention:
            self.attn = ElasticGPT2Attention(config, shape, layer_idx, block=block)
        if self.has_mlp:
            self.ln_2 = nn.LayerNorm(inner, eps=eps)
            self.mlp = GPT2MLP(shape.n_inner, shape)
            self._fit_mlp(config, shape, block)
        if self.has_bottleneck:
            self.c_in, self.c_out = Conv1D(inner, shape.hidden_size), Conv1D(shape.hidden_size, inner)
            self.c_out.into_residual = True  # type: ignore[assignment]
        # GPT-2 starts these smaller. The stock rule asks the modules around them, which transformers does not
        # initialise in custom code, for they hold no parameters of their own.
        for module in self.modules():
            if isinstance(module, (GPT2Attention, GPT2MLP)):
                module.c_proj.into_residual = True  # type: ignore[assignment]

    def _fit_mlp(self, config: ElasticGPT2Config, shape: Any, block: str) -> None:
        linear, inner = _linear(config), inner_size(shape, block)
        if self.has_bottleneck or linear is not Conv1D:
            self.mlp.c_fc, self.mlp.c_proj = linear(shape.n_inner, inner), linear(inner, shape.n_inner)
        if self.has_bottleneck:
            self.mlp.act = ACT2FN[shape.bottleneck_act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        whole = hidden_states
        normed = self.ln_1(whole) if self.has_attention or self.has_bottleneck else whole
        if self.has_bottleneck:
            hidden_states = self.c_in(normed)  # (B, T, I)
        if self.has_attention:
            mixed, _ = self.attn(normed, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
            hidden_states = mixed + hidden_states
        else:
            write_cache_filler(past_key_values, hidden_states, self.layer_idx)
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return whole + self.c_out(hidden_states) if self.has_bottleneck else hidden_states  # (B, T, D)

    def set_width(self, width: int) -> None:
        """Lets the first ``width`` neurons of the FFN be used; only of a block in a supernet."""
        entering: Any = self.mlp.c_fc
        leaving: Any = self.mlp.c_proj
        entering.rows = leaving.columns = prefix(width, entering.nf)

    def set_heads(self, heads: list[int] | int | None) -> None:
        """Says which heads are used, see ``candidate_heads`` of the config; only of a block in a supernet."""
        attention: Any = self.attn
        size = attention.config_head_size
        whole = attention.c_proj.nx // size
        kept, count = kept_heads(heads, whole)
        attention.c_attn.rows = runs_of_heads(kept, size, heads=whole, parts=attention.parts)
        attention.c_proj.columns = runs_of_heads(kept, size, heads=whole)
        attention.split_size, attention.num_heads = len(kept) * size, count
        attention.head_dim = len(kept) * size // count
        attention.rescale()


def _linear(config: ElasticGPT2Config) -> type[Conv1D]:
    """Class of the projections: one that can be used in part where a layer holds candidates."""
    return Conv1D if config.candidate_blocks is None else SlicedConv1D
