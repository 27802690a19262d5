"""Digests of weights and data, by which what was measured is recognised again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_elastic.supernet import Supernet

_SAMPLE = 64  # entries of each tensor that are read: enough to notice another checkpoint, or the same one trained on


def fingerprint(model: nn.Module, batches: Sequence[Mapping[str, Tensor]] = (), *, rest: Iterable[object] = ()) -> str:
    """Hexadecimal SHA-256 of a sample of each weight, of all data, and of whatever else a measurement depends on.

    Args:
        model: its ``state_dict`` is read.
        batches: read whole.
        rest: tensors are read whole, of other things their ``repr``.
    """
    digest = hashlib.sha256()
    _add_weights(digest, model.state_dict())
    for name, value in [pair for batch in batches for pair in sorted(batch.items())] + [("", value) for value in rest]:
        if isinstance(value, Tensor):
            shape = f"{name}{tuple(value.shape)}".encode()
            digest.update(shape + value.detach().double().cpu().numpy().tobytes())
        else:
            digest.update(f"{name}{value!r}".encode())
    return digest.hexdigest()


def state_of(supernet: Supernet) -> tuple[object, ...]:
    """What a supernet computes depends on, besides weights and architecture: order of layers, adapters, blocks."""
    adapters = sorted({(part.adapter, part.in_use, part.merged) for part in supernet.adapter_parts})
    blocks = [(part.heads, [part.shape_of(block) for block in part.blocks]) for part in supernet.block_parts]
    return supernet.layer_order, adapters, blocks


def weights_fingerprint(weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """Hexadecimal SHA-256 of a sample of each of some weights, as they are or as they would be in ``dtype``."""
    digest = hashlib.sha256()
    _add_weights(digest, weights, dtype=dtype)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    for name, tensor in weights.items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)]
        sample = (sample if dtype is None else sample.to(dtype)).double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
