"""The FlexiBERT encoder of a row of the benchmark: real forwards, for proxies of gradients and activations.

The source's code (Serianni & Kalita 2023, after FlexiBERT, Tuli et al. 2022) is not at hand. What its data says of it:
the operators, heads and FFNs of each row, the published parameter counts, and published metrics of random models, which
tell the number of tensors that each looked at (metric / normalised metric), and some whose values follow from the
architecture alone.

From the counts, which :func:`hf_elastic.proxies.read_flexibert` lists: tables of 30,522 tokens, 512 positions and 2
types of 128, a LayerNorm, a projection to the hidden size where that differs; a LayerNorm behind each FFN, and behind
each operator but ``LT``. ``DSC`` is ConvBERT's mixed attention (Jiang et al. 2020, as transformers has it): half of the
hidden size is plain attention of half the heads, the other half the convolution, which alone would leave the output
matrix too wide.

From the published metrics, whose models had 512 tokens (``DSC`` with one head: a maximum over heads of exactly 1/512):

* ``WMA``: ``(W q) k^T / sqrt(d)``, ``W`` of the hidden size over all heads; without that scale its probabilities would
  be further from uniform than they are.
* ``LT``: its one matrix is counted among the inputs of operators, so it comes before the transform, which then nothing
  but the FFN follows. The transform is over tokens and the width of a head, heads apart, the Fourier one its real part,
  the cosine one of type II with scipy's factors. A softmax over that width is counted, too, whose mean maximum over
  heads is that of one-hot vectors, ``1 - (1 - h / D)^h``; but its output goes nowhere: only where the transform itself
  is passed on have the FFNs behind it the published signs. FNet has neither matrix, heads nor softmax.

With these, and ``N(0, 0.02)`` for matrices and tables, the published Head Softmax Confidence, Head Confidence and (each
tensor counted once) Activation Distance are met to about 1 %, 5 % and 5 %, on text of our own. Chosen, since nothing
tells: no residual around ``LT``, whose output is 10 to 60 times as large as its input; GELU by the error function;
convolutions initialised as matrices are, biases zero; no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_elastic.proxies import Roles, Setting

VOCABULARY, POSITIONS, TYPES, EMBEDDING = 30522, 512, 2, 128
PUBLISHED_HIDDEN, PUBLISHED_FFN = 256, 1024
_STD, _EPSILON = 0.02, 1e-12
Fields = Mapping[str, Any]
"""A row of the benchmark, or one of its ``encoder_layers``."""


# -- Operators: (B, T, D) to (B, T, D) and what their softmax gave -----------------------------------------------------


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v``; with ``weighted`` of ``(W q) k^T``."""

    def __init__(self, hidden: int, heads: int, *, weighted: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.weighting = nn.Linear(hidden, hidden, bias=False) if weighted else nn.Identity()
        self.inputs = self.matrices = ("query", "key", "value", *(["weighting"] if weighted else []))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.weighting(self.query(x)), self.key(x), self.value(x)  # (B, T, D)
        context, probabilities = attended(*(split(part, self.heads) for part in (q, k, v)))
        return merged(context), probabilities


class Transform(nn.Module):
    """The transform of ``W x`` over tokens and the width of a head; its softmax is returned and not used."""

    def __init__(self, hidden: int, heads: int, *, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.entering = nn.Linear(hidden, hidden)
        self.inputs = self.matrices = ("entering",)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = fourier if self.kind == "DFT" else cosine
        found = transform(split(self.entering(x), self.heads))  # (B, H, T, d)
        return merged(found), found.softmax(-1)


class MixedAttention(nn.Module):
    """Attention beside span-based dynamic convolution, of half the hidden size each (ConvBERT, Jiang et al. 2020).

    A separable convolution of the input makes keys of spans. Times the queries they make, per head and token, a kernel
    by softmax, with which values around that token are summed.
    """

    def __init__(self, hidden: int, heads: int, *, kernel: int) -> None:
        super().__init__()
        half = hidden // 2
        self.heads = max(1, heads // 2)
        self.query, self.key, self.value, self.convolved = (nn.Linear(hidden, half) for _ in range(4))
        self.depthwise = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.pointwise = nn.Conv1d(hidden, half, 1)
        self.taps = nn.Linear(half, self.heads * kernel)
        self.inputs = ("query", "key", "value")
        self.matrices = (*self.inputs, "convolved", "taps")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x)  # (B, T, D / 2)
        context, probabilities = attended(*(split(part, self.heads) for part in (query, self.key(x), self.value(x))))
        span = self.pointwise(self.depthwise(x.transpose(1, 2))).transpose(1, 2)  # (B, D, T) -> (B, T, D / 2)
        kernels = split(self.taps(span * query), self.heads).softmax(-1)  # (B, H, T, K)
        summed = summed_around(split(self.convolved(x), self.heads), kernels)  # (B, H, T, d)
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


def summed_around(values: Tensor, kernels: Tensor) -> Tensor:
    """Sums ``values`` ``(B, H, T, d)`` around each token by that token's ``kernels`` ``(B, H, T, K)``; zeros beyond."""
    size = kernels.shape[-1]
    padded = nn.functional.pad(values, (0, 0, size // 2, size // 2))  # (B, H, T + K - 1, d)
    windows = padded.unfold(2, size, 1)  # (B, H, T, d, K)
    return (windows * kernels.unsqueeze(-2)).sum(-1)  # (B, H, T, d)


def fourier(x: Tensor) -> Tensor:
    """Real part of the discrete Fourier transform over the last two dimensions."""
    return torch.fft.fft2(x).real


def cosine(x: Tensor) -> Tensor:
    """Cosine transform of type II over the last two dimensions, not normalised, as scipy's."""
    rows, columns = (_cosines(size, like=x) for size in x.shape[-2:])
    return rows @ x @ columns.t()


def _cosines(size: int, *, like: Tensor) -> Tensor:
    """``2 cos(pi k (2 n + 1) / 2 N)``, ``(N, N)``."""
    n = torch.arange(size, dtype=torch.float64, device=like.device)
    return (2 * torch.cos(math.pi / (2 * size) * torch.outer(n, 2 * n + 1))).to(like.dtype)


def operator_of(layer: Fields, hidden: int) -> Attention | Transform | MixedAttention:
    """The operator that a row's layer names.

    Raises:
        ValueError: there is no such operator.
    """
    kind, option, heads = layer["operation_type"], layer["operation_parameter"], layer["num_operation_heads"]
    if kind == "SA" and option in ("SDP", "WMA"):
        return Attention(hidden, heads, weighted=option == "WMA")
    if kind == "LT" and option in ("DFT", "DCT"):
        return Transform(hidden, heads, kind=option)
    if kind == "DSC" and int(option) % 2:
        return MixedAttention(hidden, heads, kernel=int(option))
    raise ValueError(f"operator {kind!r} with {option!r} is none of SA SDP|WMA, LT DFT|DCT, DSC with an odd size")


# -- The encoder -------------------------------------------------------------------------------------------------------


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


class EncoderLayer(nn.Module):
    """An operator, with output matrix, residual and LayerNorm unless it is a transform; then the stack of FFNs."""

    def __init__(self, operator: Attention | Transform | MixedAttention, *, hidden: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.operator = operator
        self.followed = not isinstance(operator, Transform)
        if self.followed:
            self.output, self.output_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=_EPSILON)
        sizes = [hidden, *widths, hidden]
        self.ffn = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.ffn_norm = nn.LayerNorm(hidden, eps=_EPSILON)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, probabilities = self.operator(x)  # (B, T, D)
        if self.followed:
            mixed = self.output_norm(x + self.output(mixed))
        found = mixed
        for number, linear in enumerate(self.ffn):
            found = linear(nn.functional.gelu(found) if number else found)  # (B, T, F), the last (B, T, D)
        return self.ffn_norm(mixed + found), probabilities


class FlexiBert(PreTrainedModel):
    """The encoder of a row, a model of transformers because proxies ask only such for attention probabilities.

    ``forward`` gives the last hidden state ``(B, T, D)``, and for ``output_attentions=True`` what each layer's softmax
    gave: ``(B, H, T, T)``, of a transform ``(B, H, T, D / H)``.
    """

    def __init__(self, layers: Sequence[Fields], *, hidden: int, widths: Sequence[Sequence[int]]) -> None:
        super().__init__(PreTrainedConfig(attn_implementation="eager"))
        self.hidden = hidden
        self.embeddings = Embeddings(hidden)
        self.layers = nn.ModuleList(
            EncoderLayer(operator_of(layer, hidden), hidden=hidden, widths=own)
            for layer, own in zip(layers, widths, strict=True)
        )

    def forward(self, input_ids: Tensor, *, output_attentions: bool = False) -> BaseModelOutput:
        x, found = self.embeddings(input_ids), []  # (B, T, D)
        for layer in self.layers:
            x, probabilities = layer(x)
            found.append(probabilities)
        return BaseModelOutput(last_hidden_state=x, attentions=tuple(found) if output_attentions else None)


def unfilled(row: Fields, *, setting: Setting = "published") -> FlexiBert:
    """The modules of a row on the meta device: sizes without values.

    Args:
        row: of the benchmark.
        setting: see :func:`hf_elastic.proxies.read_flexibert`.

    Raises:
        ValueError: there is no such setting or operator.
    """
    if setting not in get_args(Setting):
        raise ValueError(f"setting={setting!r} is not one of {', '.join(get_args(Setting))}")
    hidden = PUBLISHED_HIDDEN if setting == "published" else row["hidden_size"]
    layers, widths = list(row["encoder_layers"]), []
    for layer in layers:
        neurons = PUBLISHED_FFN if setting == "published" else layer["feed_forward_dimension"]
        widths.append([neurons] * layer["num_feed_forward"])
    if setting == "trained":
        layers = [{**layer, "operation_type": "SA", "operation_parameter": "SDP"} for layer in layers]
        widths = [[4 * hidden, *more] for _, *more in widths]
    with torch.device("meta"):
        return FlexiBert(layers, hidden=hidden, widths=widths)


def model_of(row: Fields, *, setting: Setting = "published", seed: int = 0) -> FlexiBert:
    """The random model of a row; ``seed`` decides all of its weights.

    Raises:
        ValueError: as :func:`unfilled`.
    """
    model = unfilled(row, setting=setting).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, nn.LayerNorm):
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=_STD, generator=generator)
    return model.eval()


def roles_of_flexibert(model: FlexiBert) -> Roles:
    """What proxies look at, by the published numbers of tensors.

    ``attention`` holds an operator's matrices and its output (Synaptic Diversity; Head Importance leaves out the latter
    and the matrix of kernels), ``heads`` its inputs and the matrix behind the queries (Head Confidence), ``ffn_out``
    what activations enter: of a stack all but its first matrix (Activation Distance).
    """
    attention, heads, queries, ffn, ffn_out = [], [], [], [], []
    for number, layer in enumerate(model.layers):
        inside = f"layers.{number}.operator"
        attention += [f"{inside}.{name}" for name in layer.operator.matrices]
        attention += [f"layers.{number}.output"] if layer.followed else []
        heads += [f"{inside}.{name}" for name in layer.operator.inputs]
        queries.append(f"{inside}.{layer.operator.inputs[0]}")
        stack = [f"layers.{number}.ffn.{place}" for place in range(len(layer.ffn))]
        ffn += stack
        ffn_out += stack[1:]
    return Roles(
        attention=tuple(attention), heads=tuple(heads), ffn=tuple(ffn), ffn_out=tuple(ffn_out),
        layers=len(model.layers), hidden_size=model.hidden, positions="embeddings.positions", queries=tuple(queries),
    )  # fmt: skip
