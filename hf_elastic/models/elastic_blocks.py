"""Kinds of transformer blocks that a layer may be, and the layer of a supernet that holds several of them.

This file travels with a checkpoint as remote code: it imports nothing but transformers and files beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

STANDARD, BOTTLENECK = "standard", "bottleneck"
BLOCKS = tuple(kind + sharing for kind in (STANDARD, BOTTLENECK) for sharing in ("", "-qv", "-kv"))
"""The six candidates of ELM (arXiv 2510.27037): the family's own block and a bottleneck block in MobileBERT's way, with
three projections of attention, with one that serves as query and value, and with one that serves as key and value."""

Runs = tuple[tuple[int, int], ...]
"""Half-open ranges of rows or columns, ascending."""


def is_bottleneck(block: str) -> bool:
    """Whether a block works in ``bottleneck_size`` dimensions."""
    return block.startswith(BOTTLENECK)


def sharing(block: str) -> str:
    """What one projection serves as: ``"qv"``, ``"kv"``, or ``""`` where there are three."""
    return block.partition("-")[2]


def inner_size(config: Any, block: str) -> int:
    """Width that attention and FFN of a block read and write."""
    return bottleneck_size(config) if is_bottleneck(block) else config.hidden_size


def bottleneck_size(config: Any) -> int:
    """Width of bottlenecks: by default a quarter of the hidden size, as in ELM."""
    return config.hidden_size // 4 if config.bottleneck_size is None else config.bottleneck_size


def head_size(config: Any, block: str) -> int:
    """Size of one head of a block."""
    return config.bottleneck_head_dim if is_bottleneck(block) else config.head_dim


def blocks_of(config: Any, index: int) -> tuple[str, ...]:
    """Blocks that a layer holds: its candidates, or its only one."""
    return tuple(config.candidate_blocks or (config.per_layer_config[index].block,))


def complete_blocks(config: Any, per_layer: Any) -> None:
    """Fills in the size of a bottleneck's heads where some layer may be one; it stays when heads are left out."""
    named = [config.block, *(config.candidate_blocks or ())]
    named += [layer.get("block", STANDARD) for layer in (per_layer or {}).values()]
    if config.bottleneck_head_dim is None and any(is_bottleneck(str(block)) for block in named):
        config.bottleneck_head_dim = bottleneck_size(config) // config.num_attention_heads


def check_blocks(config: Any) -> None:
    """Checks what one layer's config, or a config that all layers share, says of blocks.

    Raises:
        ValueError: a block is unknown, a size is impossible, or candidates are not given for every layer.
    """
    candidates = config.candidate_blocks
    for block in [config.block, *(candidates or ())]:
        if block not in BLOCKS:
            raise ValueError(f"block {block!r} is unknown; allowed: {', '.join(BLOCKS)}")
        if is_bottleneck(block) and (bottleneck_size(config) < 1 or (config.bottleneck_head_dim or 0) < 1):
            raise ValueError(
                f"a bottleneck of {bottleneck_size(config)} dimensions has no room for {config.num_attention_heads} "
                "heads; set bottleneck_size, or fewer heads"
            )
    if candidates is not None and (len(set(candidates)) != len(candidates) or not candidates):
        raise ValueError(f"candidate_blocks={candidates} must name at least one block, each once")
    for name in ("candidate_widths", "candidate_heads"):
        stated = getattr(config, name)
        if stated is None:
            continue
        layers = config.num_hidden_layers
        if candidates is None or len(stated) != layers or {len(layer) for layer in stated} != {len(candidates)}:
            raise ValueError(
                f"{name} needs one list per layer ({layers}) with an entry for each of candidate_blocks ({candidates})"
            )
    for layer in config.candidate_heads or ():
        for block, heads in zip(candidates, layer, strict=True):
            check_heads(heads, count=config.num_attention_heads, size=head_size(config, block))
    widths = [width for layer in config.candidate_widths or () for width in layer]
    name = config.per_layer_names["intermediate_size"]
    allocated = getattr(config, name)
    if any(not 1 <= width <= allocated for width in widths):
        raise ValueError(
            f"candidate_widths lie between 1 and {name}={allocated}, which is allocated; got {min(widths)} to "
            f"{max(widths)}"
        )


def check_heads(heads: Any, *, count: int, size: int) -> None:
    """Checks what says which heads of a block are in use, as ``candidate_heads`` of a config does.

    Args:
        heads: what is said.
        count: heads that are there.
        size: of one.

    Raises:
        ValueError: it is none of what is allowed.
    """
    if isinstance(heads, list):
        fits = bool(heads) and heads == [head for head in range(count) if head in heads]
    else:
        fits = heads is None or (type(heads) is int and 1 <= heads <= count and count * size % heads == 0)
    if not fits:
        raise ValueError(
            f"heads in use (candidate_heads) are null for all, an ascending list of heads below {count}, or a number "
            f"up to {count} that divides their {count * size} dimensions; got {heads}"
        )


def active_part(tensor: torch.Tensor, runs: Runs | None, dim: int) -> torch.Tensor:
    """The rows or columns that are in use; all of them for ``None``."""
    if runs is None:
        return tensor
    pieces = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class SlicedLinear(nn.Linear):
    """A linear of which some outputs (``rows``) and inputs (``columns``) are in use.

    ``y = x W[rows, columns]ᵀ + b[rows]``; ``None`` stands for all of them.
    """

    rows: Runs | None = None
    columns: Runs | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.rows is None and self.columns is None:
            return super().forward(input)
        weight = active_part(active_part(self.weight, self.rows, 0), self.columns, 1)
        if self.columns is not None:
            weight = weight.contiguous()  # the gradient of a strided weight would be written transposed
        bias = None if self.bias is None else active_part(self.bias, self.rows, 0)
        return nn.functional.linear(input, weight, bias)


class SlicedConv1D(Conv1D):
    """GPT-2's linear (weight ``(in, out)``) of which some outputs (``rows``) and inputs (``columns``) are in use.

    With ``shared`` it is a fused projection of attention with two parts, of which one is handed out twice, so that the
    result is query, key and value side by side.
    """

    rows: Runs | None = None
    columns: Runs | None = None
    shared: str = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is None and self.columns is None:
            output = super().forward(x)
        else:
            weight = active_part(active_part(self.weight, self.columns, 0), self.rows, 1)
            bias = active_part(self.bias, self.rows, 0)
            output = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)  # (B, T, out)
        if not self.shared:
            return output
        query, other = output.chunk(2, dim=-1)  # (B, T, heads * head_dim) each
        return torch.cat([query, other, query if self.shared == "qv" else other], dim=-1)


class NoNorm(nn.Module):
    """The element-wise affine map that MobileBERT has in place of LayerNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight + self.bias


class CandidateBlocks(nn.Module):
    """A layer of a supernet: several blocks, of which one is computed.

    Attributes:
        candidates: the blocks by name.
        active: name of the one that is computed; at first the one with most parameters in use.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(dict(blocks))
        self.active = max(blocks, key=lambda name: parameters_in_use(blocks[name]))  # the first of equal ones

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.candidates[self.active](*args, **kwargs)


def make_layer(config: Any, layer_idx: int, block_class: Callable[..., Any]) -> nn.Module:
    """The only block of a layer, or all its candidates in the sizes that are in use.

    Args:
        config: of the model.
        layer_idx: number of the layer.
        block_class: makes a block of a config, a layer number and the ``block`` that it is.
    """
    blocks = blocks_of(config, layer_idx)
    made = {block: block_class(config, layer_idx, block=block) for block in blocks}
    if config.candidate_blocks is None:
        return made[blocks[0]]
    for number, layer in enumerate(made.values()):
        if config.candidate_widths is not None:
            layer.set_width(config.candidate_widths[layer_idx][number])
        if config.candidate_heads is not None:
            layer.set_heads(config.candidate_heads[layer_idx][number])
    return CandidateBlocks(made)


def parameters_in_use(block: nn.Module) -> int:
    """Parameters of a block without the rows and columns that are not in use."""
    total = sum(parameter.numel() for parameter in block.parameters())
    for module in block.modules():
        if isinstance(module, (SlicedLinear, SlicedConv1D)):
            outputs, inputs = sizes_in_use(module)
            held = [] if module.bias is None else [module.bias]
            total += outputs * inputs + outputs * len(held)
            total -= module.weight.numel() + sum(bias.numel() for bias in held)
    return total


def sizes_in_use(projection: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a projection that are in use (two for a shared one, whatever it hands out)."""
    shape = projection.get_parameter("weight").shape
    outputs, inputs = shape if isinstance(projection, nn.Linear) else shape[::-1]
    rows, columns = getattr(projection, "rows", None), getattr(projection, "columns", None)
    return _length(rows, outputs), _length(columns, inputs)


def _length(runs: Runs | None, whole: int) -> int:
    return whole if runs is None else sum(stop - start for start, stop in runs)


def prefix(size: int, whole: int) -> Runs | None:
    """The first entries, ``None`` for all."""
    return None if size == whole else ((0, size),)


def runs_of_heads(kept: list[int], size: int, *, heads: int, parts: int = 1) -> Runs | None:
    """Entries of some heads, in each of several parts side by side; ``None`` for all heads.

    Args:
        kept: heads, ascending.
        size: of one head.
        heads: all there are.
        parts: projections of that many heads that are fused.
    """
    if len(kept) == heads:
        return None
    runs: list[tuple[int, int]] = []
    for part in range(parts):
        for head in kept:
            start = (part * heads + head) * size
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + size)
            else:
                runs.append((start, start + size))
    return tuple(runs)


def kept_heads(heads: Any, count: int) -> tuple[list[int], int]:
    """Heads whose weights are in use, and how many heads these are split into.

    Args:
        heads: ``None``: all; a list: those, the others left out; a number: all weights, split into so many.
        count: heads that were there.
    """
    if heads is None:
        return list(range(count)), count
    if isinstance(heads, int):
        return list(range(count)), heads
    return list(heads), len(heads)
