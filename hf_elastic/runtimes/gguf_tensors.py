"""The weights of a model under llama.cpp's names, in its order of rotary pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_elastic.runtimes.gguf_layouts import GgufLayer, GgufLayout, rope_of

_PLACES = {
    "llama": {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    },
    "gpt2": {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    },
    "bert": {
        "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
    },
}  # fmt: skip
_ROOTS = {
    "llama": {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    "gpt2": {
        "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    "bert": {
        "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
    },
}  # fmt: skip
_LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "encoder.layer"}
_TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # GPT-2's Conv1D stores (in, out)
_TURNED = ("attn_q", "attn_k")


def tensors_of(model: PreTrainedModel, layout: GgufLayout) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of the file, in fp32.

    Args:
        model: whose.
        layout: of the file.
    """
    family = layout.architecture if layout.architecture in _PLACES else "llama"
    state = model.state_dict()
    tied = model.config.tie_word_embeddings
    for name, place in _ROOTS[family].items():
        if name == "output" and tied:
            continue
        yield from _both(name, place, state)
    if (factors := rope_factors(model.config, head_dim=layout.head_dim)) is not None:
        yield "rope_freqs.weight", factors
    for number, layer in enumerate(layout.layers):
        root = f"{_LAYERS[family]}.{layer.index}"
        for name, place in _PLACES[family].items():
            for full, tensor in _both(f"blk.{number}.{name}", f"{root}.{place}", state):
                yield full, _arranged(tensor, name, layout=layout, layer=layer, family=family)
        yield from _zeros(number, layer, hidden=int(model.config.hidden_size), head_dim=layout.head_dim)


def _both(name: str, place: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Weight and bias of a module, as far as it is there."""
    for kind in ("weight", "bias"):
        if (tensor := state.get(f"{place}.{kind}")) is not None:
            yield f"{name}.{kind}", np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _arranged(tensor: np.ndarray, name: str, *, layout: GgufLayout, layer: GgufLayer, family: str) -> np.ndarray:
    if family == "gpt2" and name in _TRANSPOSED and tensor.ndim == 2:
        return np.ascontiguousarray(tensor.T)
    if layout.interleaved and name in _TURNED:
        return interleaved(tensor, heads=layer.heads if name == "attn_q" else layer.groups)
    return tensor


def interleaved(tensor: np.ndarray, *, heads: int) -> np.ndarray:
    """Brings rotary pairs, which transformers keeps half a head apart, beside each other: rows of a weight or bias."""
    rest = tensor.shape[1:]
    halves = tensor.reshape(heads, 2, -1, *rest)  # (H, 2, head_dim / 2, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(-1, *rest))


def _zeros(number: int, layer: GgufLayer, *, hidden: int, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """Sublayers of zeros where the file cannot leave one out."""
    shapes: dict[str, tuple[int, ...]] = {}
    if "attention" in layer.filled:
        queries, keys = layer.heads * head_dim, layer.groups * head_dim
        shapes |= {"attn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden)}
        shapes |= {"attn_v": (keys, hidden), "attn_output": (hidden, queries)}
    if "mlp" in layer.filled:
        shapes |= {"ffn_norm": (hidden,), "ffn_gate": (layer.width, hidden), "ffn_up": (layer.width, hidden)}
        shapes |= {"ffn_down": (hidden, layer.width)}
    for name, shape in shapes.items():
        yield f"blk.{number}.{name}.weight", np.zeros(shape, dtype=np.float32)


def rope_factors(config: Any, *, head_dim: int) -> np.ndarray | None:
    """Divisors of the rotary frequencies of LLaMA 3.1, ``(head_dim / 2,)``; ``None`` where there are none."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    base = float(rope["rope_theta"])
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    whole = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    waves = 2 * math.pi / frequencies
    smooth = ((whole / waves - low) / (high - low)).clamp(0, 1)
    factor = float(rope["factor"])
    return (1 / ((1 - smooth) / factor + smooth)).float().numpy()
