"""Layers that are one of several candidate blocks: single-path one-shot supernets (Guo et al. 2020, arXiv 1904.00420).

The blocks themselves, and what of them is in use, are in ``hf_elastic.models``; here one layer of such a model is an
elastic part with one categorical choice. Widths and heads of a block are configuration and no choice: PCA growth and
head fusion change them, every architecture of the space follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_elastic.errors import SpaceError, UnsupportedModelError
from hf_elastic.layers import Region, take_region
from hf_elastic.models.elastic_blocks import (
    STANDARD,
    CandidateBlocks,
    Runs,
    SlicedConv1D,
    SlicedLinear,
    check_heads,
    parameters_in_use,
    sizes_in_use,
)
from hf_elastic.space import Choice, Value

Heads = list[int] | int | None
"""Which heads of a block are in use: all, a list of those that stay, or into how many all the weights are split."""


@dataclass(frozen=True)
class Roles:
    """Where the projections of a block are, relative to it; query, key and value are one where they are fused."""

    layers: str
    query: str
    key: str
    value: str
    attention_out: str
    attention: str
    ffn_in: str
    ffn_out: str
    heads: str
    width: str
    causal: bool


ROLES: Mapping[str, Roles] = {
    "elastic_bert": Roles(
        layers="encoder.layer", query="attention.self.query", key="attention.self.key", value="attention.self.value",
        attention_out="attention.output.dense", attention="attention.self", ffn_in="intermediate.dense",
        ffn_out="output.dense", heads="num_attention_heads", width="all_head_size", causal=False,
    ),
    "elastic_gpt2": Roles(
        layers="h", query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", attention_out="attn.c_proj",
        attention="attn", ffn_in="mlp.c_fc", ffn_out="mlp.c_proj", heads="num_heads", width="split_size", causal=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BlockShape:
    """What one layer is in an architecture.

    Attributes:
        block: kind, one of :data:`hf_elastic.models.elastic_blocks.BLOCKS`.
        intermediate_size: FFN neurons.
        num_attention_heads: heads.
        head_dim: size of one.
    """

    block: str
    intermediate_size: int
    num_attention_heads: int
    head_dim: int


@dataclass
class BlockPart:
    """One layer of a static model, as a choice between its candidate blocks.

    Attributes:
        layer: a :class:`~hf_elastic.models.elastic_blocks.CandidateBlocks`, or the only block of the layer.
        index: its place in the model.
        model: whose layer it is; its config keeps the sizes.
        roles: where the projections are.
        blocks: names of the candidates.
        current: the block that is active.
        heads: which heads of each block are in use.
    """

    layer: nn.Module
    index: int
    model: PreTrainedModel
    roles: Roles
    blocks: tuple[str, ...]
    current: str = field(init=False)
    heads: dict[str, Heads] = field(init=False)

    def __post_init__(self) -> None:
        self.current = self.layer.active if isinstance(self.layer, CandidateBlocks) else self.blocks[0]
        stated = self.model.config.candidate_heads
        own = [None] * len(self.blocks) if stated is None else stated[self.index]
        self.heads = dict(zip(self.blocks, own, strict=True))

    @property
    def name(self) -> str:
        """Name of the choice."""
        return f"layers.{self.index}.block"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choice of a block; its values carry their parameters as the blocks are now."""
        counts = tuple(self.parameters(block) for block in self.blocks)
        return (Choice(self.name, self.blocks, "categorical", counts),)

    def module(self, block: str) -> Any:
        """The module of a block.

        Raises:
            SpaceError: the layer has no such block.
        """
        if block not in self.blocks:
            raise SpaceError(f"layer {self.index} has no block {block!r}; it has {', '.join(self.blocks)}")
        return self.layer.candidates[block] if isinstance(self.layer, CandidateBlocks) else self.layer

    def projection(self, block: str, path: str) -> Any:
        """A projection of a block, by its path (see :class:`Roles`)."""
        return self.module(block).get_submodule(path)

    def chosen(self, architecture: Mapping[str, Value]) -> str:
        """The block that an architecture has here."""
        return str(architecture[self.name])

    def set(self, architecture: Mapping[str, Value]) -> None:
        """Makes a block the one that is computed."""
        self.current = self.chosen(architecture)
        if isinstance(self.layer, CandidateBlocks):
            self.layer.__dict__["active"] = self.current

    def shape(self, architecture: Mapping[str, Value]) -> BlockShape:
        """What the layer is in an architecture."""
        return self.shape_of(self.chosen(architecture))

    def shape_of(self, block: str) -> BlockShape:
        """Sizes of a block as they are now."""
        attention = self.projection(block, self.roles.attention)
        heads, width = getattr(attention, self.roles.heads), getattr(attention, self.roles.width)
        return BlockShape(block, self.width(block), heads, width // heads)

    def width(self, block: str) -> int:
        """FFN neurons of a block that are in use."""
        return sizes_in_use(self.projection(block, self.roles.ffn_in))[0]

    def allocated(self, block: str) -> int:
        """FFN neurons of a block that it could use."""
        return _outputs(self.projection(block, self.roles.ffn_in))

    def set_width(self, block: str, width: int) -> None:
        """Lets a block use its first ``width`` FFN neurons.

        Raises:
            SpaceError: it has no so many, or the layer holds no candidates.
        """
        if not isinstance(self.layer, CandidateBlocks):
            raise SpaceError(f"layer {self.index} is one block of a fixed width; only candidates grow")
        if not 1 <= width <= self.allocated(block):
            raise SpaceError(
                f"width {width} of {block} in layer {self.index} is outside 1..{self.allocated(block)}, all it can use"
            )
        self.module(block).set_width(width)
        config = self.model.config
        widths = config.candidate_widths or [[config_width(config)] * len(self.blocks)] * config.num_hidden_layers
        config.candidate_widths = _replaced(widths, (self.index, self.blocks.index(block)), width)

    def set_heads(self, block: str, heads: Heads) -> None:
        """Says which heads of a block are in use.

        Raises:
            SpaceError: the block has no such heads, or its dimensions do not divide into so many.
        """
        size = self.projection(block, self.roles.attention).config_head_size
        count = _inputs(self.projection(block, self.roles.attention_out)) // size
        try:
            check_heads(heads, count=count, size=size)
        except ValueError as error:
            raise SpaceError(f"{block} in layer {self.index}: {error}") from None
        self.module(block).set_heads(heads)
        self.heads[block] = heads
        if isinstance(self.layer, CandidateBlocks):
            config = self.model.config
            stated = config.candidate_heads or [[None] * len(self.blocks)] * config.num_hidden_layers
            config.candidate_heads = _replaced(stated, (self.index, self.blocks.index(block)), heads)

    def parameters(self, block: str) -> int:
        """Parameters of a block as it is now."""
        return parameters_in_use(self.module(block))

    def parameters_at(self, block: str, width: int) -> int:
        """Parameters that a block would have with another width."""
        _, inputs = sizes_in_use(self.projection(block, self.roles.ffn_in))
        outputs, _ = sizes_in_use(self.projection(block, self.roles.ffn_out))
        return self.parameters(block) + (width - self.width(block)) * (inputs + outputs + 1)

    def macs(self, block: str, *, seq_len: int) -> int:
        """MACs of a block for one sequence: ``T Σ in·out`` over its projections and ``2 H d T²`` of attention."""
        shape, total = self.shape_of(block), 0
        for module in self.module(block).modules():
            if isinstance(module, nn.Linear | Conv1D):
                outputs, inputs = sizes_in_use(module)
                total += seq_len * outputs * inputs
        return total + 2 * shape.num_attention_heads * shape.head_dim * seq_len * seq_len

    def regions(self) -> dict[int, Region]:
        """Active boxes by ``id`` of the parameter; ``()`` for all of a block that is not computed."""
        found: dict[int, Region] = {}
        for block in self.blocks:
            if block != self.current:
                found |= {id(parameter): () for parameter in self.module(block).parameters()}
        for projection in self.module(self.current).modules():
            if isinstance(projection, SlicedLinear | SlicedConv1D):
                found |= _regions(projection)
        return found

    def expected(self, architecture: Mapping[str, Value]) -> dict[str, int]:
        """Place of the block among the candidates, its FFN neurons and its heads."""
        shape, name = self.shape(architecture), f"layers.{self.index}"
        return {
            f"{name}.block": self.blocks.index(shape.block),
            f"{name}.intermediate_size": shape.intermediate_size,
            f"{name}.num_attention_heads": shape.num_attention_heads,
        }

    @contextmanager
    def watch(self) -> Iterator[dict[str, int]]:
        """Reads the sizes of :meth:`expected` off the tensors that enter the output projections."""
        name = f"layers.{self.index}"
        seen = {f"{name}.block": -1, f"{name}.intermediate_size": 0, f"{name}.num_attention_heads": 0}
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                size = self.shape_of(block).head_dim

                def neurons(module: nn.Module, inputs: tuple[Tensor, ...], place: int = place) -> None:
                    seen[f"{name}.block"] = place
                    seen[f"{name}.intermediate_size"] = inputs[0].shape[-1]

                def heads(module: nn.Module, inputs: tuple[Tensor, ...], size: int = size) -> None:
                    seen[f"{name}.num_attention_heads"] = inputs[0].shape[-1] // size

                for path, hook in ((self.roles.ffn_out, neurons), (self.roles.attention_out, heads)):
                    stack.callback(self.projection(block, path).register_forward_pre_hook(hook).remove)
            yield seen

    def tensors(self, block: str) -> dict[str, Tensor]:
        """What of a block is in use, by name within it; cut to size, no copies where nothing is cut."""
        own = self.module(block)
        boxes = {
            id(parameter): region
            for projection in own.modules()
            if isinstance(projection, SlicedLinear | SlicedConv1D)
            for parameter, region in _boxes(projection)
        }
        return {
            name: take_region(tensor, boxes[id(tensor)]) if id(tensor) in boxes else tensor
            for name, tensor in own.state_dict(keep_vars=True).items()
        }


def make_block_parts(model: PreTrainedModel) -> list[BlockPart]:
    """Makes the parts of a static model, without changing what it computes.

    Raises:
        UnsupportedModelError: it is no static model with attention and FFN in every layer.
    """
    roles = ROLES.get(model.config.model_type)
    if roles is None:
        raise UnsupportedModelError(
            f"a {type(model).__name__} holds no candidate blocks; those of type {' and '.join(ROLES)} do"
        )
    layers: Any = model.base_model.get_submodule(roles.layers)
    parts = []
    for index, layer in enumerate(layers):
        candidates = isinstance(layer, CandidateBlocks)
        if not candidates and not (layer.has_attention and layer.has_mlp):
            raise UnsupportedModelError(f"layer {index} skips a sublayer, which a block of a space does not")
        blocks = tuple(layer.candidates) if candidates else (model.config.per_layer_config[index].block or STANDARD,)
        parts.append(BlockPart(layer, index, model, roles, blocks))
    for part in parts:
        if not isinstance(part.layer, CandidateBlocks):
            _make_sliceable(part)
    return parts


def check_no_adapters(model: nn.Module) -> None:
    """Refuses adapters on a model of candidate blocks: no block would be extracted with what they learnt.

    Raises:
        UnsupportedModelError: a module of it has one.
    """
    wrapped = [name for name, module in model.named_modules() if "base_layer" in dict(module.named_children())]
    if wrapped:
        raise UnsupportedModelError(
            f"{wrapped[0]} has an adapter, which cannot follow candidate blocks; give it to extract(supernet, "
            "architecture) instead"
        )


def _make_sliceable(part: BlockPart) -> None:
    """Swaps the classes of the projections of a layer's only block, so that heads can be left out."""
    roles = part.roles
    for path in dict.fromkeys((roles.query, roles.key, roles.value, roles.attention_out, roles.ffn_in, roles.ffn_out)):
        if path == roles.value and part.blocks[0].partition("-")[2] and path != roles.query:
            continue  # a projection that another one serves as
        projection = part.projection(part.blocks[0], path)
        if type(projection) in (nn.Linear, Conv1D):
            projection.__class__ = SlicedLinear if isinstance(projection, nn.Linear) else SlicedConv1D


def blocks_loadability(
    shapes: Sequence[BlockShape], model: PreTrainedModel
) -> Literal["stock", "stock-padded", "remote-code"]:
    """Loadability of blocks (:meth:`hf_elastic.Supernet.loadability`).

    A stock class holds standard blocks whose heads are as large as in its own config; where they differ in width or
    have lost heads, after padding with zeros.
    """
    config, heads = model.config, config_heads(model.config)
    size = config.hidden_size // heads
    standard = all(shape.block == STANDARD and shape.head_dim == size for shape in shapes)
    if not standard or size * heads != config.hidden_size or not _is_plain(model):
        return "remote-code"
    whole = {shape.num_attention_heads for shape in shapes} == {heads}
    return "stock" if whole and len({shape.intermediate_size for shape in shapes}) == 1 else "stock-padded"


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether all but the layers of a static model is as the stock class of its family has it."""
    config: Any = model.config
    if config.model_type == "elastic_gpt2":
        return True
    words = config.embedding_size in (None, config.hidden_size) and not config.trigram_input
    heads = config.pooler_activation == "tanh" and config.mlm_activation in (None, config.hidden_act)
    dropouts = (config.pooler_dropout, config.qa_dropout) == (0, 0) and config.token_classifier_dropout is None
    positions = config.type_vocab_size > 0 and not config.positions_skip_padding
    pools = model.base_model is not model or "pooler" in dict(model.named_children())
    return words and heads and dropouts and positions and pools and config.attention_output_dropout_prob is None


def config_width(config: Any) -> int:
    """FFN width of a static config, of the layers that say no other."""
    return int(vars(config)[config.per_layer_names["intermediate_size"]])


def config_heads(config: Any) -> int:
    """Heads of a static config, of the layers that say no other number."""
    return int(vars(config)[config.per_layer_names["num_attention_heads"]])  # no attribute where layers differ


def _replaced(table: Sequence[Sequence[Any]], place: tuple[int, int], value: Any) -> list[list[Any]]:
    made = [list(row) for row in table]
    made[place[0]][place[1]] = value
    return made


def _outputs(projection: nn.Module) -> int:
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.nf)  # type: ignore[arg-type]


def _inputs(projection: nn.Module) -> int:
    return int(projection.in_features if isinstance(projection, nn.Linear) else projection.nx)  # type: ignore[arg-type]


def _regions(projection: SlicedLinear | SlicedConv1D) -> dict[int, Region]:
    return {id(parameter): region for parameter, region in _boxes(projection)}


def _boxes(projection: SlicedLinear | SlicedConv1D) -> Iterator[tuple[Tensor, Region]]:
    """Parameters of a projection with the boxes of them that are in use."""
    whole = slice(None)
    rows = [whole] if projection.rows is None else _slices(projection.rows)
    columns = [whole] if projection.columns is None else _slices(projection.columns)
    transposed = isinstance(projection, SlicedConv1D)
    yield projection.weight, tuple((c, r) if transposed else (r, c) for r in rows for c in columns)
    if projection.bias is not None:
        yield projection.bias, tuple((r,) for r in rows)


def _slices(runs: Runs) -> list[slice]:
    return [slice(start, stop) for start, stop in runs]
