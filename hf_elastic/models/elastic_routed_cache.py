"""What routed attention gathers, and the KV cache in which tokens that did not enter have a place; see
``elastic_routed_attention.py``.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""Layers of a cache that keep keys as they are; not what is derived from these, such as quantised ones."""
_GAPS = "_hf_elastic_gaps"
"""What a layer of a cache is marked with once it holds tokens that did not enter."""


class Gathered:
    """Tokens ``(B, T)`` that enter, gathered into ``(B, n)``: those of each row first, then such as do not enter.

    Attributes:
        order: ``(B, n)`` places of the tokens.
        filled: ``(B, n)`` whether there is a token that enters.
    """

    def __init__(self, keep: torch.Tensor) -> None:
        counts = keep.sum(-1)  # (B,)
        longest = int(counts.max())
        self.keep = keep
        self.order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[:, :longest]  # (B, n)
        self.filled = torch.arange(longest, device=keep.device) < counts[:, None]  # (B, n)
        self.whole = bool((counts == longest).all())
        self.rows = torch.arange(keep.shape[0], device=keep.device)[:, None]  # (B, 1)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """``(B or 1, T, ...) -> (B, n, ...)``."""
        return values.expand(self.keep.shape[0], *values.shape[1:])[self.rows, self.order]

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """``(B, n, ...) -> (B, T, ...)``, zero where no token entered."""
        result = values.new_zeros(*self.keep.shape, *values.shape[2:])
        rows, columns = self.filled.nonzero(as_tuple=True)
        result[rows, self.order[rows, columns]] = values[rows, columns]
        return result


class ScatteringCache:
    """Stands for a KV cache while attention runs on gathered tokens: the cache gets a place for every token.

    Args:
        cache: the real one.
        tokens: where the gathered ones stand.
        alone: whether attention is over the gathered tokens only, since the cache was empty.
    """

    def __init__(self, cache: Any, tokens: Gathered, *, alone: bool) -> None:
        self.cache, self.tokens, self.alone = cache, tokens, alone

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Writes ``(B, K, n, d)`` to the places of the tokens, zeros to the others."""
        spread = [self.tokens.put(part.transpose(1, 2)).transpose(1, 2) for part in (keys, values)]  # (B, K, T, d)
        whole = self.cache.update(*spread, layer_idx, *args, **kwargs)
        note_gaps(self.cache, layer_idx)
        return (keys, values) if self.alone else whole


def is_fresh(cache: Any, layer_idx: int) -> bool:
    """Whether a layer of a cache is empty and will hold exactly what it is given.

    Raises:
        ValueError: it will not keep keys as they are, from which later calls would find out which tokens entered.
    """
    layers = cache.layers
    if layer_idx >= len(layers):  # it is made when it is written to
        return True
    if type(layers[layer_idx]) not in CACHE_LAYERS:
        raise ValueError(
            f"routed attention finds out from its keys which tokens entered, a {type(layers[layer_idx]).__name__} does "
            "not keep them; use a DynamicCache or a StaticCache"
        )
    return not isinstance(layers[layer_idx], StaticLayer) and int(cache.get_seq_length(layer_idx)) == 0


def note_gaps(cache: Any, layer_idx: int) -> None:
    """Marks a layer of a cache, which has been written to, as one with tokens that did not enter."""
    vars(cache.layers[layer_idx])[_GAPS] = True


def has_gaps(cache: Any, layer_idx: int) -> bool:
    """Whether a layer of a cache may hold tokens that did not enter, so that not all of its keys are seen."""
    return cache is not None and layer_idx < len(cache.layers) and _GAPS in vars(cache.layers[layer_idx])


def present_keys(cache: Any, layer_idx: int, keep: torch.Tensor) -> torch.Tensor:
    """Which of the keys that an update returns are of tokens that entered, ``(B, S)``.

    Args:
        cache: before the update with the tokens that are run now.
        layer_idx: its layer.
        keep: ``(B, T)`` of these tokens, which enter.
    """
    layer, count = cache.layers[layer_idx], keep.shape[1]
    before = keep[:, :0]  # (B, S'): of tokens that an earlier call has seen
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        before = layer.keys.ne(0).any(-1).any(1).to(keep.device)
    if isinstance(layer, DynamicSlidingWindowLayer):  # it may hold more than it returns
        before = before[:, max(0, before.shape[1] - layer.sliding_window + 1) :]
    if not isinstance(layer, StaticLayer):
        return torch.cat([before, keep], dim=1)
    start, size = int(layer.get_seq_length()), layer.max_cache_len
    if start + count <= size:  # places behind these tokens are empty
        return nn.functional.pad(torch.cat([before[:, :start], keep], dim=1), (0, size - start - count))
    kept = before[:, 1:] if start >= size else before[:, :start]  # of a sliding window, which is full or gets so
    return torch.cat([kept, keep], dim=1)
