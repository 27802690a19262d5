r"""One attention head in the place of several that write alike: by merging them, or by removing all but one.

Pure linear algebra on heads as plain matrices. A head reads tokens :math:`x_j` and writes at each of them

.. math:: O\,c, \qquad c = \sum_j p_j (V x_j + b_V), \qquad
          p = \mathrm{softmax}_j \left((Q x + b_Q)^T (K x_j + b_K) / \sqrt d\right),

and the outputs of all heads are added. Nothing changes for orthogonal :math:`R` and :math:`P` and a scale :math:`s` in

* :math:`V, b_V, O \to sR^T V,\; sR^T b_V,\; OR/s`, since the context becomes :math:`sR^T c`;
* :math:`Q, b_Q, K, b_K \to P^T Q,\; P^T b_Q,\; P^T K,\; P^T b_K`, since scores are products of both.

So heads are turned towards the representative of their group (its first) before they are averaged, and the outputs of
heads that then have one context are *added*. ELM (arXiv 2510.27037) says "merge or remove" and gives no formulas, and
its sibling code removes no parameters; what is here is ours.

Where positions are rotations of query and key (RoPE), these cannot be turned freely: there :func:`remove_heads` is
right, :func:`merge_heads` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_elastic.errors import DataError
from hf_elastic.head_similarity import HeadFeatures

Shared = Literal["none", "qv", "kv"]
_RIDGE = 1e-8  # of the mean variance of the features
_OPEN = 1e-3  # weight of the value projections, which decide where the contexts leave a rotation open


@dataclass(frozen=True)
class Head:
    """An attention head with a key and a value of its own.

    The matrices are those of ``nn.Linear``; transpose what a ``Conv1D`` (GPT-2) holds.

    Attributes:
        query, key, value: rows of the projections, ``(d, D_in)``.
        output: columns of the output projection, ``(D_out, d)``; its bias belongs to no head.
        query_bias, key_bias, value_bias: ``(d,)``; ``None`` where the projection has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None


class _Wide(NamedTuple):
    """A head in float64 on the CPU, each bias as the last column of its projection, ``(d, D_in + 1)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def merge_heads(
    heads: Sequence[Head], features: HeadFeatures, *, group: Sequence[int], shared: Shared = "none"
) -> Head:
    r"""Makes one head of a group: turns each towards the first, then averages projections and adds outputs.

    With :math:`F_k` the contexts of head :math:`k` (centred: the means turn along with the value biases), it is turned
    towards the representative :math:`r` by orthogonal Procrustes: :math:`\max_R \mathrm{tr}(R^T M)` is reached by the
    polar factor of :math:`M` (Schönemann 1966). In short for :math:`A_k A_r^T / (\|A_k\| \|A_r\|)`: the relation of
    :math:`A`.

    * ``shared="none"``: values and outputs by :math:`M` = the relation of :math:`F^T`, plus 0.001 times that of
      :math:`[V | b_V]`, which decides in directions where contexts do not vary; queries and keys by the relation of
      :math:`[Q | b_Q | K]` (softmax does not see the bias of the key).
    * ``"qv"``: the value is the query's projection, so one :math:`R` and one :math:`s` serve both. The query becomes
      :math:`sR^T Q`; the scores stay if the key becomes :math:`R^T K / s`, the output if it becomes :math:`OR/s`.
      :math:`M` = the sum of the relations of :math:`F^T`, :math:`[Q | b_Q]` and :math:`K`.
    * ``"kv"``: the value is the key's. The key becomes :math:`sR^T K`, the query :math:`R^T Q / s`, the output
      :math:`OR/s`. :math:`M` = the sum of the relations of :math:`F^T`, :math:`[K | b_K]` and :math:`[Q | b_Q]`.

    The scale is :math:`s = \|F_r\| / \|F_k\|`. That of :math:`\min \|F_r - s F_k R\|` is smaller by the correlation of
    the two, and its inverse would enlarge outputs just where heads agree less; the ratio treats both alike, and is the
    same where they agree.

    Exact for heads that differ by such turns, whatever their outputs.

    Args:
        heads: all heads of the layer.
        features: contexts of these heads, of tokens.
        group: indices of heads; the first is the representative.
        shared: which projections are one: ``"qv"`` query and value, ``"kv"`` key and value.

    Returns:
        The head, in the dtype and on the device of the representative. Where projections are shared, it holds one
        tensor under both names.

    Raises:
        DataError: heads, features and group do not fit, a projection that should be shared is not, or a head to be
            merged with others writes the same for all tokens.
    """
    _check(heads, features, group)
    if shared not in get_args(Shared):
        raise DataError(f"shared={shared!r} is not one of {', '.join(map(repr, get_args(Shared)))}")
    if shared != "none":
        _check_shared(heads, group, shared=shared)
    if len(group) > 1 and (constant := sorted(set(features.constant_heads()).intersection(group))):
        raise DataError(f"heads {constant} write the same for all tokens; do not merge but remove them")
    first = _wide(heads[group[0]])
    turned = [first]
    for index in group[1:]:
        relation, scale = _contexts(features, index, group[0])
        turned.append(_TURNS[shared](_wide(heads[index]), first, relation=relation, scale=scale))
    queries, keys, values, outputs = (torch.stack(matrices) for matrices in zip(*turned, strict=True))
    head = heads[group[0]]
    query, query_bias = _narrow(queries.mean(0), head.query, head.query_bias)
    key, key_bias = _narrow(keys.mean(0), head.key, head.key_bias)
    value, value_bias = _narrow(values.mean(0), head.value, head.value_bias)
    if shared != "none":
        value, value_bias = (query, query_bias) if shared == "qv" else (key, key_bias)
    return Head(query, key, value, outputs.sum(0).to(head.output), query_bias, key_bias, value_bias)


def remove_heads(heads: Sequence[Head], features: HeadFeatures, *, group: Sequence[int]) -> tuple[Head, Tensor]:
    r"""Keeps the first head of a group, which writes also what the contexts of the others have in common with its own.

    The context of each removed head is predicted from that of the representative by ridge least squares,
    :math:`c_k \approx A^T c_r + t` with :math:`A = (C_{rr} + \lambda I)^{-1} C_{rk}` and
    :math:`t = \bar c_k - A^T \bar c_r`, so :math:`O_r` becomes :math:`O_r + \sum_k O_k A_k^T`, and
    :math:`\sum_k O_k t_k` goes into the bias. :math:`\lambda` is 1e-8 of the mean variance of the
    representative's features. Queries, keys and values stay, so this holds for any attention, shared projections and
    RoPE included. Exact, up to the ridge, where contexts are linear functions of the representative's; a constant
    representative takes over the means.

    Args:
        heads: all heads of the layer.
        features: contexts of these heads, of tokens.
        group: indices of heads; the first is the one that stays.

    Returns:
        The head, and what to add to the bias of the output projection, ``(D_out,)``, both in the dtype and on the
        device of the representative.

    Raises:
        DataError: heads, features and group do not fit.
    """
    _check(heads, features, group)
    first = group[0]
    output = heads[first].output
    whole = output.detach().double().cpu()  # (D_out, d)
    correction = torch.zeros(len(output), dtype=torch.float64)  # (D_out,)
    variances = features.covariance(first, first)  # (d, d)
    variances.diagonal().add_(_RIDGE * variances.diagonal().mean())
    alone = first in features.constant_heads()
    for index in group[1:]:
        between = features.covariance(first, index)  # (d, d)
        weight = torch.zeros_like(between) if alone else torch.linalg.solve(variances, between)  # (d, d)
        leaving = heads[index].output.detach().double().cpu()  # (D_out, d)
        whole = whole + leaving @ weight.t()
        correction += leaving @ (features.mean(index) - weight.t() @ features.mean(first))
    return replace(heads[first], output=whole.to(output)), correction.to(output)


def _contexts(features: HeadFeatures, index: int, first: int) -> tuple[Tensor, float]:
    """How the contexts of a head relate to the representative's, ``(d, d)``, and the scale between them."""
    here, there = (features.covariance(head, head).trace().sqrt() for head in (index, first))
    return features.covariance(index, first) / (here * there), float(there / here)


def _relation(left: Tensor, right: Tensor) -> Tensor:
    """Products of rows ``(d, ·)`` over the norms of both, ``(d, d)``; zeros where one is zero."""
    norms = left.norm() * right.norm()
    return left @ right.t() / norms if norms > 0 else left.new_zeros(len(left), len(right))


def _rotation(relation: Tensor) -> Tensor:
    """The orthogonal ``R``, ``(d, d)``, with the largest ``tr(Rᵀ relation)``."""
    left, _, right = torch.linalg.svd(relation)
    return left @ right


def _turned(head: _Wide, first: _Wide, *, relation: Tensor, scale: float) -> _Wide:
    """Turns a head whose projections are its own."""
    inner = _rotation(relation + _OPEN * _relation(head.value, first.value))  # (d, d)
    outer = _rotation(_relation(*(torch.cat([h.query, h.key[:, :-1]], dim=1) for h in (head, first))))  # (d, d)
    return _Wide(
        outer.t() @ head.query, outer.t() @ head.key, scale * inner.t() @ head.value, head.output @ inner / scale
    )


def _turned_with_query(head: _Wide, first: _Wide, *, relation: Tensor, scale: float) -> _Wide:
    """Turns a head whose value is its query."""
    keys = _relation(head.key[:, :-1], first.key[:, :-1])  # (d, d)
    inner = _rotation(relation + _relation(head.query, first.query) + keys)  # (d, d)
    query = scale * inner.t() @ head.query  # (d, D_in + 1)
    return _Wide(query, inner.t() @ head.key / scale, query, head.output @ inner / scale)


def _turned_with_key(head: _Wide, first: _Wide, *, relation: Tensor, scale: float) -> _Wide:
    """Turns a head whose value is its key."""
    inner = _rotation(relation + _relation(head.key, first.key) + _relation(head.query, first.query))  # (d, d)
    key = scale * inner.t() @ head.key  # (d, D_in + 1)
    return _Wide(inner.t() @ head.query / scale, key, key, head.output @ inner / scale)


_TURNS: dict[str, Callable[..., _Wide]] = {"none": _turned, "qv": _turned_with_query, "kv": _turned_with_key}


def _wide(head: Head) -> _Wide:
    return _Wide(
        _joined(head.query, head.query_bias),
        _joined(head.key, head.key_bias),
        _joined(head.value, head.value_bias),
        head.output.detach().double().cpu(),
    )


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection ``(d, D_in)`` with its bias ``(d,)`` as the last column, ``(d, D_in + 1)``."""
    last = weight.new_zeros(len(weight)) if bias is None else bias  # (d,)
    return torch.cat([weight.detach().double().cpu(), last.detach().double().cpu()[:, None]], dim=1)


def _narrow(wide: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias ``(d, D_in)``, ``(d,)`` from ``(d, D_in + 1)``, as those that are given."""
    return wide[:, :-1].to(weight).contiguous(), None if bias is None else wide[:, -1].to(bias).contiguous()


def _check(heads: Sequence[Head], features: HeadFeatures, group: Sequence[int]) -> None:
    if features.samples != "tokens":
        raise DataError("heads are merged and removed by features of tokens; make HeadFeatures with samples='tokens'")
    if len(heads) != features.heads:
        raise DataError(f"there are {len(heads)} heads and features of {features.heads}; pass all heads of the layer")
    if not group or len(set(group)) < len(group) or not set(group) <= set(range(len(heads))):
        raise DataError(f"group={list(group)} must name heads of 0 to {len(heads) - 1}, at least one and each once")
    first, rows = heads[group[0]], features.head_dim
    expected = _shapes(first)  # which biases there are, and the sizes that are not the features'
    expected |= dict.fromkeys(("query", "key", "value"), (rows, first.query.shape[-1]))
    expected |= {name: (rows,) for name, shape in expected.items() if name.endswith("bias") and shape}
    expected["output"] = (first.output.shape[0], rows)
    for index in group:
        if (shapes := _shapes(heads[index])) != expected:
            raise DataError(f"head {index} has tensors of {shapes}, expected those of a group alike: {expected}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in vars(heads[index]).values() if tensor is not None):
            raise DataError(f"head {index} holds NaN or infinity; check the weights")


def _shapes(head: Head) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor; empty where there is none."""
    return {name: () if tensor is None else tuple(tensor.shape) for name, tensor in vars(head).items()}


def _check_shared(heads: Sequence[Head], group: Sequence[int], *, shared: Shared) -> None:
    other = "query" if shared == "qv" else "key"
    for index in group:
        head = heads[index]
        weight, bias = (head.query, head.query_bias) if shared == "qv" else (head.key, head.key_bias)
        same = torch.equal(weight, head.value) and (bias is None) == (head.value_bias is None)
        if bias is not None and head.value_bias is not None:
            same = same and torch.equal(bias, head.value_bias)
        if not same:
            raise DataError(f"shared={shared!r}, but head {index} has a value that is not its {other}")
