"""The FlexiBERT encoder of a row of the benchmark: real forwards for proxies that need gradients or activations.

The source (Serianni & Kalita 2023, after FlexiBERT, Tuli et al. 2022) is not at hand. Known of it is what its data
says: a row's operators, heads and FFNs, the published parameter counts, and the published metrics, which hold the number
of tensors that each looks at and, as the models were random, figures that follow from the architecture.

* Sizes: 30,522 tokens, 512 positions and 2 types of 128 with a LayerNorm, a projection to the hidden size where that
  differs; the matrices of :func:`hf_elastic.proxies.read_flexibert`. All 250 counts are the published ones.
* ``SDP``: scaled dot products. ``WMA`` has one more matrix behind the queries, ``(W q) k^T``; that its scores are scaled
  alike is from the published probabilities, which are nearer to uniform than those of ``SDP``.
* ``DSC``: the counts are those of ConvBERT's mixed attention (Jiang et al. 2020) in transformers and fit no convolution
  alone: half of the hidden size is plain attention of half the heads, the other half the span-based dynamic convolution.
* ``LT``: one matrix and no LayerNorm; so nothing follows the transform but the FFN. The published tensors have the matrix
  among the inputs of an operator, and one softmax in each such layer, which FNet has not. Its published mean of maxima
  over heads is ``1 - (1 - h / D) ** h``, that of one-hot vectors of ``D / h`` drawn for each of ``h`` heads. So: matrix,
  heads, real part of the Fourier transform (or type-II cosine transform) over tokens and the head's width, softmax over
  the latter.

Chosen, as nothing tells: the cosine transform is not normalised and has the factor 2 of each dimension, as that of scipy;
a softmaxed transform is not added to its input; the FFN of every layer is, and is followed by a LayerNorm; GELU is the
exact one; weights, tables and convolutions are ``N(0, 0.02)``, biases zero; no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_elastic.proxies import Roles, Setting

VOCABULARY, POSITIONS, TYPES, EMBEDDING = 30522, 512, 2, 128
_PUBLISHED_HIDDEN, _PUBLISHED_FFN = 256, 1024
_STD, _EPSILON = 0.02, 1e-12
Layer = Mapping[str, Any]


class Embeddings(nn.Module):
    """Tokens, positions and types, as ELECTRA has them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, EMBEDDING)
        self.positions = nn.Embedding(POSITIONS, EMBEDDING)
        self.types = nn.Embedding(TYPES, EMBEDDING)
        self.norm = nn.LayerNorm(EMBEDDING, eps=_EPSILON)
        self.projection = nn.Linear(EMBEDDING, hidden) if hidden != EMBEDDING else nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        mixed = self.tokens(input_ids) + self.positions(places) + self.types(torch.zeros_like(places))  # (B, T, 128)
        projected: Tensor = self.projection(self.norm(mixed))  # (B, T, D)
        return projected


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v``, and with ``weighted`` of ``(W q) k^T``, W of the hidden size over all heads."""

    def __init__(self, hidden: int, heads: int, *, weighted: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.mixing = nn.Linear(hidden, hidden, bias=False) if weighted else nn.Identity()
        self.inputs = ("query", "key", "value", *(["mixing"] if weighted else []))
        self.matrices = self.inputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (split(part, self.heads) for part in (self.mixing(self.query(x)), self.key(x), self.value(x)))
        context, probabilities = attended(q, k, v)
        return merged(context), probabilities


class Transform(nn.Module):
    """``softmax`` over a head's width of the transform of ``W x`` over tokens and that width."""

    def __init__(self, hidden: int, heads: int, *, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.entering = nn.Linear(hidden, hidden)
        self.inputs = self.matrices = ("entering",)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = fourier if self.kind == "DFT" else cosine
        probabilities = transform(split(self.entering(x), self.heads)).softmax(-1)  # (B, H, T, D / H)
        return merged(probabilities), probabilities


class MixedAttention(nn.Module):
    """Attention and span-based dynamic convolution of half the hidden size each (ConvBERT, Jiang et al. 2020).

    A separable convolution of the input makes keys of spans; these times the queries make, per head and token, the
    ``softmax`` of a kernel, with which the convolution's values around that token are summed.
    """

    def __init__(self, hidden: int, heads: int, *, kernel: int) -> None:
        super().__init__()
        half = hidden // 2
        self.heads, self.kernel = max(1, heads // 2), kernel
        self.query, self.key, self.value = (nn.Linear(hidden, half) for _ in range(3))
        self.depthwise = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.pointwise = nn.Conv1d(hidden, half, 1)
        self.taps = nn.Linear(half, self.heads * kernel)
        self.convolved = nn.Linear(hidden, half)
        self.inputs = ("query", "key", "value")
        self.matrices = (*self.inputs, "convolved", "taps")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x)  # (B, T, D / 2)
        context, probabilities = attended(*(split(part, self.heads) for part in (query, self.key(x), self.value(x))))
        span = self.pointwise(self.depthwise(x.transpose(1, 2))).transpose(1, 2)  # (B, T, D / 2)
        kernels = split(self.taps(span * query), self.heads).softmax(-1)  # (B, H, T, K)
        summed = lightweight(split(self.convolved(x), self.heads), kernels)
        return torch.cat([merged(context), merged(summed)], dim=-1), probabilities


def split(x: Tensor, heads: int) -> Tensor:
    """``(B, T, D)`` to ``(B, H, T, D / H)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """``(B, H, T, d)`` to ``(B, T, H d)``."""
    return x.transpose(1, 2).flatten(2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of ``(B, H, T, d)``, and its probabilities ``(B, H, T, T)``."""
    probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return probabilities @ v, probabilities


def lightweight(values: Tensor, kernels: Tensor) -> Tensor:
    """Sums ``values`` ``(B, H, T, d)`` around each token with that token's kernel, ``(B, H, T, K)``; zeros beyond."""
    size = kernels.shape[-1]
    padded = nn.functional.pad(values, (0, 0, size // 2, size // 2))  # (B, H, T + K - 1, d)
    windows = padded.unfold(2, size, 1)  # (B, H, T, d, K)
    return (windows * kernels.unsqueeze(-2)).sum(-1)  # (B, H, T, d)


def fourier(x: Tensor) -> Tensor:
    """Real part of the two-dimensional discrete Fourier transform over the last two dimensions."""
    return torch.fft.fft2(x).real


def cosine(x: Tensor) -> Tensor:
    """Two-dimensional cosine transform of type II over the last two dimensions, not normalised."""
    rows, columns = (_cosines(size, x) for size in x.shape[-2:])
    return rows @ x @ columns.t()


def _cosines(size: int, like: Tensor) -> Tensor:
    """``2 cos(pi k (2 n + 1) / 2 N)``, ``(N, N)``."""
    places = torch.arange(size, dtype=torch.float64, device=like.device)
    return (2 * torch.cos(math.pi / (2 * size) * torch.outer(places, 2 * places + 1))).to(like.dtype)


class EncoderLayer(nn.Module):
    """An operator, with output, residual and LayerNorm where it has those, and a stack of FFNs likewise."""

    def __init__(self, operator: Attention | Transform | MixedAttention, *, hidden: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.operator = operator
        self.output = None if isinstance(operator, Transform) else nn.Linear(hidden, hidden)
        self.output_norm = None if isinstance(operator, Transform) else nn.LayerNorm(hidden, eps=_EPSILON)
        sizes = [hidden, *widths, hidden]
        self.ffn = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.ffn_norm = nn.LayerNorm(hidden, eps=_EPSILON)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, probabilities = self.operator(x)
        if self.output is not None and self.output_norm is not None:
            mixed = self.output_norm(x + self.output(mixed))
        found = self.ffn[0](mixed)
        for linear in list(self.ffn)[1:]:
            found = linear(nn.functional.gelu(found))  # (B, T, F), the last (B, T, D)
        return self.ffn_norm(mixed + found), probabilities


class FlexiBert(PreTrainedModel):
    """The encoder of a row; a class of transformers, for proxies ask those for attention probabilities.

    ``forward`` returns the last hidden state ``(B, T, D)``, and with ``output_attentions=True`` the output of each layer's
    softmax: ``(B, H, T, T)``, of a transform ``(B, H, T, D / H)``.
    """

    def __init__(self, layers: Sequence[Layer], *, hidden: int, widths: Sequence[Sequence[int]]) -> None:
        super().__init__(PreTrainedConfig(attn_implementation="eager"))
        self.embeddings = Embeddings(hidden)
        self.layers = nn.ModuleList(
            EncoderLayer(operator_of(layer, hidden), hidden=hidden, widths=own)
            for layer, own in zip(layers, widths, strict=True)
        )

    def forward(self, input_ids: Tensor, *, output_attentions: bool = False) -> BaseModelOutput:
        x, found = self.embeddings(input_ids), []
        for layer in self.layers:
            x, probabilities = layer(x)
            found.append(probabilities)
        return BaseModelOutput(last_hidden_state=x, attentions=tuple(found) if output_attentions else None)


def operator_of(layer: Layer, hidden: int) -> Attention | Transform | MixedAttention:
    """The operator that a row's layer names.

    Raises:
        ValueError: there is no such operator.
    """
    kind, option, heads = layer["operation_type"], layer["operation_parameter"], layer["num_operation_heads"]
    if kind == "SA" and option in ("SDP", "WMA"):
        return Attention(hidden, heads, weighted=option == "WMA")
    if kind == "LT" and option in ("DFT", "DCT"):
        return Transform(hidden, heads, kind=option)
    if kind == "DSC":
        return MixedAttention(hidden, heads, kernel=int(option))
    raise ValueError(f"operator {kind!r} with {option!r} is none of SA SDP|WMA, LT DFT|DCT, DSC size")


def built(row: Mapping[str, Any], *, setting: Setting = "published", seed: int = 0) -> FlexiBert:
    """The random model of a row in one of the settings of :func:`hf_elastic.proxies.read_flexibert`.

    Raises:
        ValueError: there is no such operator.
    """
    hidden = _PUBLISHED_HIDDEN if setting == "published" else row["hidden_size"]
    layers = row["encoder_layers"]
    widths = [[_PUBLISHED_FFN if setting == "published" else layer["feed_forward_dimension"]] * layer["num_feed_forward"] for layer in layers]
    if setting == "trained":
        layers = [{**layer, "operation_type": "SA", "operation_parameter": "SDP"} for layer in layers]
        widths = [[4 * hidden, *rest] for _, *rest in widths]
    with torch.random.fork_rng(devices=[]):
        model = FlexiBert(layers, hidden=hidden, widths=widths)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" not in name:
                parameter.normal_(std=_STD, generator=generator)
    return model.eval()


def roles(model: FlexiBert) -> Roles:
    """Roles."""
    attention: list[str] = []
    heads, queries, ffn, out = [], [], [], []
    for i, layer in enumerate(model.layers):
        op = f"layers.{i}.operator."
        attention += [op + n for n in layer.operator.matrices]
        heads += [op + n for n in layer.operator.inputs]
        queries.append(op + layer.operator.inputs[0])
        attention += [f"layers.{i}.output"] if layer.output is not None else []
        names = [f"layers.{i}.ffn.{j}" for j in range(len(layer.ffn))]
        ffn += names; out += names[1:]
    return Roles(tuple(attention), tuple(heads), tuple(ffn), tuple(out), len(model.layers), model.layers[0].ffn[0].in_features, positions="embeddings.positions", queries=tuple(queries))
