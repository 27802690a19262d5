"""CKA head fusion of ELM on supernets of blocks: which heads of a layer are alike, and what is done about it.

The mathematics are in :mod:`hf_elastic.head_similarity` and :mod:`hf_elastic.head_merging`; here they meet a model. Of
a supernet only slices are switched (and weights of the heads that stay are written in place): shapes change when a
subnet is extracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_elastic.blocks import BlockPart, BlockShape, Heads
from hf_elastic.errors import CompressionError, DataError, UnsupportedModelError
from hf_elastic.head_merging import Head, Shared, merge_heads, remove_heads
from hf_elastic.head_similarity import HeadFeatures, Samples, greedy_groups, resplit_count
from hf_elastic.layers import evaluating
from hf_elastic.models.elastic_blocks import SlicedConv1D, SlicedLinear, is_bottleneck, kept_heads, sharing
from hf_elastic.space import Architecture
from hf_elastic.streams import Batch, checked_batches
from hf_elastic.supernet import Supernet

if TYPE_CHECKING:
    import plotly.graph_objects as go

FusionMode = Literal["resplit", "merge", "remove"]
TooFew = Literal["raise", "stop"]
Key = tuple[int, str]  # layer, block


@dataclass(frozen=True)
class FusedLayer:
    """Heads of one block of one layer.

    Attributes:
        layer: its number.
        block: kind of the block.
        before: heads before.
        after: heads afterwards.
        groups: heads that are alike, by their places among those before.
        cka: similarity of each two heads before, ``(H, H)``.
        heads: what of the block is in use afterwards, as ``candidate_heads`` of the config says it.
        alike: heads that would have been left but for ``min_heads``; ``None`` where that changed nothing.
    """

    layer: int
    block: str
    before: int
    after: int
    groups: tuple[tuple[int, ...], ...]
    cka: Tensor = field(repr=False, compare=False)
    heads: Heads = None
    alike: int | None = None


@dataclass(frozen=True)
class FusionReport:
    """What head fusion did.

    Attributes:
        mode: ``resplit``, ``merge`` or ``remove``.
        threshold: CKA above which heads are alike.
        layers: every block that was looked at.
        parameters_before, parameters_after: of the blocks that were looked at, together.
        loss_before, loss_after: mean of the model's own loss over the batches; ``None`` where these have no labels.
    """

    mode: FusionMode
    threshold: float
    layers: tuple[FusedLayer, ...]
    parameters_before: int
    parameters_after: int
    loss_before: float | None
    loss_after: float | None

    def __str__(self) -> str:
        heads = ", ".join(f"{e.layer} ({e.block}): {e.before} -> {e.after}" for e in self.layers if e.after < e.before)
        share = 1 - self.parameters_after / self.parameters_before
        lines = [
            f"head fusion ({self.mode}, CKA above {self.threshold:g}): {sum(e.before for e in self.layers)} heads "
            f"became {sum(e.after for e in self.layers)}, {share:.1%} of the parameters of the layers are gone",
            f"  layers: {heads or 'none has heads so much alike'}",
        ]
        if stopped := self.stopped:
            lines.append(f"  {stopped}")
        if self.loss_before is not None:
            lines.append(f"  loss: {self.loss_before:.4f} before, {self.loss_after:.4f} afterwards, before training")
        return "\n".join(lines)

    @property
    def stopped(self) -> str | None:
        """Where ``min_heads`` kept heads that are alike, in words; ``None`` where it kept none."""
        kept = [(e, e.alike) for e in self.layers if e.alike is not None]
        if not kept:
            return None
        named = ", ".join(f"{e.layer} ({e.block}): {e.after} instead of {alike}" for e, alike in kept[:3])
        more = f", and {len(kept) - 3} more" if len(kept) > 3 else ""
        return f"stopped at min_heads in {len(kept)} of {len(self.layers)} blocks: {named}{more}"

    def figure(self) -> go.Figure:
        """Returns a plotly figure with the CKA matrix of every block that was looked at."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        columns = min(4, len(self.layers))
        rows = -(-len(self.layers) // columns)
        titles = [f"layer {entry.layer}, {entry.block}" for entry in self.layers]
        figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles)
        for place, entry in enumerate(self.layers):
            heatmap = go.Heatmap(z=entry.cka.tolist(), coloraxis="coloraxis", name=titles[place])
            figure.add_trace(heatmap, row=place // columns + 1, col=place % columns + 1)
        figure.update_layout(coloraxis={"cmin": 0, "cmax": 1}, height=260 * rows)
        return figure


def fuse_heads_(
    supernet: Supernet,
    batches: Iterable[Batch],
    *,
    mode: FusionMode = "merge",
    threshold: float = 0.9,
    samples: Samples = "tokens",
    min_heads: int = 2,
    too_few: TooFew = "raise",
) -> FusionReport:
    """Fuses heads of the blocks of a supernet that write alike, in place.

    Per block: CKA between its heads over all batches, greedy groups above the threshold (ELM, arXiv 2510.27037,
    Algorithm 1), and then, by ``mode``:

    * ``"resplit"``, as the code of the author's sibling paper does: all weights stay and are split into fewer, wider
      heads, at most as many as there are groups, dividing the width. No parameter goes, and the function changes:
      train afterwards.
    * ``"merge"``: one head for each group, aligned by Procrustes and averaged (:func:`merge_heads`).
    * ``"remove"``: the first head of each group, which takes over what the others' contexts are of its own by least
      squares (:func:`remove_heads`).

    Every candidate of every layer sees every batch: in path ``k`` layer ``l`` has its candidate ``l + k``.

    Heads that were merged or removed can be so again, and heads that were split anew can be split anew once more; from
    the one to the other leads :func:`hf_elastic.extract`.

    Args:
        supernet: of blocks; a static model becomes one by :func:`hf_elastic.make_elastic`.
        batches: dicts of tensors for the model, wherever they lie, with an ``attention_mask`` where there is padding;
            with labels for the losses.
        mode, threshold, samples: see above and :class:`~hf_elastic.head_similarity.HeadFeatures`.
        min_heads: fewest heads that a block may be left with.
        too_few: what happens to a block that would be left with fewer: ``"raise"``, or ``"stop"``: as many of its heads
            stay, those least like the head that would have taken them in.

    Returns:
        What was done; layers keep their heads where none are alike.

    Raises:
        UnsupportedModelError: the supernet is not of blocks, or no block has two heads.
        CompressionError: a block would be left with fewer than ``min_heads`` heads and ``too_few`` is ``"raise"``, its
            heads were cut in another way before, or an argument is not allowed.
        DataError: there are no batches, or too few tokens or sequences, or contexts are not finite. After these, and
            after any other error, nothing has changed.
    """
    data = check_fusion(supernet, batches, mode=mode, threshold=threshold, samples=samples, min_heads=min_heads)
    if too_few not in get_args(TooFew):
        raise CompressionError(f"too_few={too_few!r} is unknown; allowed: {', '.join(get_args(TooFew))}")
    options = _Options(mode, threshold, min_heads, too_few)
    parts = supernet.block_parts
    before = _parameters(parts)
    with evaluating(supernet.model), torch.no_grad(), _all_or_nothing() as undo:
        features, loss = _measure(supernet, data, samples=samples)
        plans = [_planned(part, block, features, options=options) for part in parts for block in part.blocks]
        for plan in (plan for plan in plans if plan.after < plan.before):
            undo.callback(_restoring(parts[plan.layer], plan.block))
            _apply(parts[plan.layer], plan, features[plan.layer, plan.block], mode=mode)
        loss_after = None if loss is None else _mean_loss(supernet, data)
        supernet.resized()
        state_heads(supernet)
    return FusionReport(mode, threshold, tuple(plans), before, _parameters(parts), loss, loss_after)


def check_fusion(
    supernet: Supernet, batches: Iterable[Batch], *, mode: str, threshold: float, samples: str, min_heads: int
) -> list[Batch]:
    """Checks all that can be checked before a forward, and returns the batches as a list.

    Raises:
        UnsupportedModelError, CompressionError, DataError: as :func:`fuse_heads_`.
    """
    if not isinstance(supernet, Supernet):
        raise UnsupportedModelError(
            f"heads are fused in a Supernet, got a {type(supernet).__name__}; make one of it by "
            "hf_elastic.make_elastic(model), or call hf_elastic.fuse_heads"
        )
    if not supernet.block_parts:
        raise UnsupportedModelError(
            "head fusion is for blocks (elastic_bert, elastic_gpt2); hf_elastic.fuse_heads takes BERT, RoBERTa, "
            "DistilBERT and GPT-2 models as they are"
        )
    if mode not in get_args(FusionMode):
        raise CompressionError(f"mode={mode!r} is unknown; allowed: {', '.join(get_args(FusionMode))}")
    if samples not in get_args(Samples):
        raise CompressionError(f"samples={samples!r} is unknown; allowed: {', '.join(get_args(Samples))}")
    if samples == "sequences" and mode != "resplit":
        raise CompressionError(f"mode={mode!r} aligns heads by their tokens; use samples='tokens'")
    if not 0 < threshold <= 1:
        raise CompressionError(f"threshold={threshold!r} must be above 0 and at most 1, which groups nothing")
    if min_heads < 1:
        raise CompressionError(f"min_heads={min_heads!r} must be at least 1")
    if not has_heads_to_fuse(supernet):
        raise UnsupportedModelError("every block has one head, so there is nothing to fuse")
    data = checked_batches(batches)
    if samples == "sequences" and (small := [n for n, batch in enumerate(data) if len(next(iter(batch.values()))) < 2]):
        raise DataError(f"batch {small[0]} holds one sequence, samples='sequences' compares at least two")
    return data


def silence_heads_out_of_use(supernet: Supernet) -> None:
    """Lets heads that are not in use write nothing, in place, should somebody use all weights.

    A step of an optimizer with momentum moves what the last fusion silenced, although it has no gradient.
    """
    for part in supernet.block_parts:
        for block in part.blocks:
            projection = part.projection(block, part.roles.attention_out)
            if not isinstance(projection, SlicedLinear | SlicedConv1D) or projection.columns is None:
                continue
            weight = projection.weight.detach()
            axis = 0 if isinstance(projection, SlicedConv1D) else 1
            ends = [0, *(end for run in projection.columns for end in run), weight.shape[axis]]
            for start, stop in zip(ends[::2], ends[1::2], strict=True):
                weight.narrow(axis, start, stop - start).zero_()


def state_heads(supernet: Supernet) -> None:
    """Lets the config of a model with one block per layer say into how many heads its weights are split.

    So that ``save_pretrained`` of the model writes what it computes. Heads that were merged or removed are still there
    as weights that write nothing, which no config needs to say.
    """
    config, parts = supernet.base.config, supernet.block_parts
    if config.candidate_blocks is not None:
        return  # there set_heads says it
    layers: Mapping[Any, Any] = config.to_dict().get("per_layer_config") or {}
    made: dict[int, dict[str, Any]] = {int(number): dict(entry) for number, entry in layers.items()}
    name, changed = config.per_layer_names["num_attention_heads"], False
    for part in parts:
        (block,) = part.blocks
        attention, shape = part.projection(block, part.roles.attention), part.shape_of(block)
        split = isinstance(part.heads[block], int)
        heads = shape.num_attention_heads if split else _all_heads(part, block, attention)
        size = shape.head_dim if split else attention.config_head_size
        size_name = "bottleneck_head_dim" if is_bottleneck(block) else "head_dim"
        own = config.per_layer_config[part.index]
        changed |= (getattr(own, name), getattr(own, size_name)) != (heads, size)
        made.setdefault(part.index, {}).update({name: heads, size_name: size})
    if changed:
        config.per_layer_config = made


def has_heads_to_fuse(supernet: Supernet) -> bool:
    """Whether some block has two heads."""
    return any(part.shape_of(block).num_attention_heads > 1 for part in supernet.block_parts for block in part.blocks)


@contextmanager
def _all_or_nothing() -> Iterator[ExitStack]:
    """Collects what undoes the steps of the block, and does so if it is left by an error."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def _restoring(part: BlockPart, block: str) -> Callable[[], None]:
    """What brings heads of a block and the weights of its attention back to what they are now."""
    heads, stated, roles = part.heads[block], part.model.config.candidate_heads, part.roles
    modules = [part.projection(block, path) for path in (roles.attention, roles.attention_out)]
    weights = [(p, p.detach().clone()) for module in modules for p in module.parameters()]

    def restore() -> None:
        part.set_heads(block, heads)
        part.model.config.candidate_heads = stated
        for parameter, before in weights:
            parameter.detach().copy_(before)

    return restore


def _parameters(parts: Sequence[BlockPart]) -> int:
    return sum(part.parameters(block) for part in parts for block in part.blocks)


def _mean_loss(supernet: Supernet, data: Sequence[Batch], *, mask: list[Tensor] | None = None) -> float | None:
    """Runs all batches on all paths; ``mask`` then holds the mask of the batch that runs, if it has one."""
    losses: list[Tensor | None] = []
    for batch in data:
        feed = {name: value.to(supernet.base.device) for name, value in batch.items()}
        given = batch.get("attention_mask")
        if mask is not None:
            mask[:] = [given] if given is not None and given.dim() == 2 else []
        for path in _paths(supernet):
            with supernet.activate(path):
                losses.append(getattr(supernet.model(**feed), "loss", None))
    found = [loss.float() for loss in losses if loss is not None]
    return float(torch.stack(found).mean()) if len(found) == len(losses) else None


def _paths(supernet: Supernet) -> Iterator[Architecture]:
    """As many paths as candidates, which together run every block of every layer once."""
    count = max(len(part.blocks) for part in supernet.block_parts)
    for shift in range(count):
        blocks = {part.name: part.blocks[(part.index + shift) % len(part.blocks)] for part in supernet.block_parts}
        yield supernet.space.canonical(blocks)


def _measure(
    supernet: Supernet, data: Sequence[Batch], *, samples: Samples
) -> tuple[dict[Key, HeadFeatures], float | None]:
    """Statistics of the contexts of all blocks, and the mean loss."""
    shapes = {(part.index, block): part.shape_of(block) for part in supernet.block_parts for block in part.blocks}
    found = {
        key: HeadFeatures(shape.num_attention_heads, shape.head_dim, samples=samples) for key, shape in shapes.items()
    }
    with _listening(supernet, found) as mask:
        loss = _mean_loss(supernet, data, mask=mask)
    return found, loss


@contextmanager
def _listening(supernet: Supernet, found: Mapping[Key, HeadFeatures]) -> Iterator[list[Tensor]]:
    """Adds what enters the output projections to the statistics; the list holds the mask, if there is one."""
    mask: list[Tensor] = []

    def hook(features: HeadFeatures) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features.add(inputs[0], mask[0] if mask else None)

        return add

    with ExitStack() as stack:
        for part in supernet.block_parts:
            for block in part.blocks:
                projection = part.projection(block, part.roles.attention_out)
                stack.callback(projection.register_forward_pre_hook(hook(found[part.index, block])).remove)
        yield mask


@dataclass(frozen=True)
class _Options:
    mode: FusionMode
    threshold: float
    min_heads: int
    too_few: TooFew


def _planned(part: BlockPart, block: str, features: Mapping[Key, HeadFeatures], *, options: _Options) -> FusedLayer:
    """What is to become of a block's heads; nothing changes."""
    mode, threshold = options.mode, options.threshold
    measured, shape = features[part.index, block], part.shape_of(block)
    cka, heads = measured.cka(), shape.num_attention_heads
    least, width = min(options.min_heads, heads), heads * shape.head_dim
    groups, alike = greedy_groups(cka, threshold), None
    after = resplit_count(len(groups), width) if mode == "resplit" else len(groups)
    if after < least and options.too_few == "stop":
        alike, groups = after, _limited(groups, cka, least)
        divisors = (count for count in range(least, heads + 1) if width % count == 0)
        after = next(divisors) if mode == "resplit" else len(groups)
    use: Heads = part.heads[block]
    if after < heads:
        held = _held(part, block)
        _check_repeated(part, shape, mode=mode, held=len(held))
        use = after if mode == "resplit" else [held[group[0]] for group in groups]
    if after < least:
        raise CompressionError(
            f"layer {part.index} ({block}): {heads} heads are so much alike at threshold={threshold:g} that {after} "
            f"would be left; raise the threshold, or allow it by min_heads={after}"
        )
    return FusedLayer(part.index, block, heads, after, groups, cka, use, alike)


def _limited(groups: Sequence[tuple[int, ...]], cka: Tensor, least: int) -> tuple[tuple[int, ...], ...]:
    """Groups without the members that are least like their first, which stay by themselves, so that ``least`` are left.

    Ties go to the later head.
    """
    taken = sorted((float(cka[group[0], head]), -head) for group in groups for head in group[1:])
    alone = {-head for _, head in taken[: least - len(groups)]}
    kept = [tuple(head for head in group if head not in alone) for group in groups]
    return tuple(sorted([*kept, *((head,) for head in alone)]))


def _check_repeated(part: BlockPart, shape: BlockShape, *, mode: FusionMode, held: int) -> None:
    """Refuses a second cut that cannot be said of the weights that there are."""
    where, cure = f"layer {part.index} ({shape.block})", "extract a subnet and fuse that, or go on with"
    attention = part.projection(shape.block, part.roles.attention)
    if mode == "resplit" and held < _all_heads(part, shape.block, attention):
        raise CompressionError(
            f"{where} lost heads before, whose weights mode='resplit' would use again; {cure} 'merge' or 'remove'"
        )
    if mode != "resplit" and shape.head_dim != attention.config_head_size:
        raise CompressionError(f"{where} was split anew before, which mode={mode!r} would undo; {cure} 'resplit'")


def _held(part: BlockPart, block: str) -> list[int]:
    """Places of the heads in use among those whose weights there are."""
    stated = part.heads[block]
    attention = part.projection(block, part.roles.attention)
    return kept_heads(stated, _all_heads(part, block, attention))[0]


def _all_heads(part: BlockPart, block: str, attention: Any) -> int:
    whole = part.projection(block, part.roles.attention_out).weight.numel() // _out_features(part, block)
    return int(whole // attention.config_head_size)


def _out_features(part: BlockPart, block: str) -> int:
    return int(part.projection(block, part.roles.attention_out).bias.numel())


def _apply(part: BlockPart, plan: FusedLayer, features: HeadFeatures, *, mode: FusionMode) -> None:
    """Writes the heads that stay and switches the others off."""
    if mode != "resplit":
        weights = _HeadWeights(part, plan.block)
        held = _held(part, plan.block)
        heads = [weights.read(place) for place in held]
        for group in plan.groups:
            if len(group) < 2:
                continue
            if mode == "merge":
                made = merge_heads(heads, features, group=group, shared=weights.shared)
            else:
                made, correction = remove_heads(heads, features, group=group)
                weights.add_to_bias(correction)
            weights.write(held[group[0]], made)
            for place in group[1:]:  # so that the weights as a whole, without the slices, compute the same
                weights.silence(held[place])
    part.set_heads(plan.block, plan.heads)


class _HeadWeights:
    """Reads and writes single heads of a block's attention, as ``nn.Linear`` and fused ``Conv1D`` hold them."""

    def __init__(self, part: BlockPart, block: str) -> None:
        roles = part.roles
        self._fused = roles.query == roles.key
        self._query, self._key = part.projection(block, roles.query), part.projection(block, roles.key)
        shared = sharing(block)
        self.shared: Shared = "qv" if shared == "qv" else "kv" if shared == "kv" else "none"
        self._value = None if shared or self._fused else part.projection(block, roles.value)
        self._out = part.projection(block, roles.attention_out)
        attention = part.projection(block, roles.attention)
        self._size, self._heads = attention.config_head_size, _all_heads(part, block, attention)

    def _views(self, place: int) -> dict[str, Tensor]:
        """Views of the weights of a head, as a :class:`Head` names them."""
        start, size = place * self._size, self._size
        views: dict[str, Tensor] = {}
        for number, name in enumerate(("query", "key", "value")):
            if name == "value" and self.shared != "none":
                continue
            if self._fused:
                first = number * self._heads * size + start
                weight, bias = self._query.weight.t(), self._query.bias  # (out, in), (out,)
            else:
                first = start
                projection = getattr(self, f"_{name}")
                weight, bias = projection.weight, projection.bias
            views[name], views[f"{name}_bias"] = weight[first : first + size], bias[first : first + size]
        out = self._out.weight.t() if self._fused else self._out.weight  # (D_out, heads * size)
        views["output"] = out[:, start : start + size]
        return views

    def read(self, place: int) -> Head:
        """Copies a head."""
        views = {name: view.detach().clone() for name, view in self._views(place).items()}
        if self.shared != "none":
            source = "query" if self.shared == "qv" else "key"
            views |= {"value": views[source], "value_bias": views[f"{source}_bias"]}
        return Head(**views)

    def write(self, place: int, head: Head) -> None:
        """Overwrites a head in place."""
        for name, view in self._views(place).items():
            view.detach().copy_(getattr(head, name))

    def silence(self, place: int) -> None:
        """Lets a head write nothing, in place."""
        self._views(place)["output"].detach().zero_()

    def add_to_bias(self, correction: Tensor) -> None:
        """Adds to the bias of the output projection in place."""
        self._out.bias.detach().add_(correction)
