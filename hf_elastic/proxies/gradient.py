"""Proxies of gradients. ``W`` is the weight of a projection ``(O, I)``, ``G`` the gradient of the target by it.

All add over the projections of attention and FFN of all layers. LPZero's FlexiBERT code keeps the first linear layer
only (its GPT-2 code adds all), so published FlexiBERT values of ``snip``, ``fisher``, ``grasp``, ``grad_norm`` and the
two ``synflow`` are not comparable. Embeddings and output heads are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.proxies.subject import (
    Subject,
    derivatives,
    gradients,
    mean_gradient,
    observed,
    ones_pass,
    oriented,
    outputs_of,
    plain_attention,
    precise,
)


def grad_norm(subject: Subject) -> float:
    """``sum ||G||_F`` (Abdelfattah et al. 2021)."""
    return sum(float(g.norm()) for _, _, g in gradients(subject))


def snip(subject: Subject) -> float:
    """``sum |W * G|`` (Lee et al. 2019)."""
    return _saliency(subject, subject.roles.projections)


def synaptic_saliency(subject: Subject) -> float:
    """``sum |W * G|`` over FFNs (Tanaka et al. 2020, as TF-TAS uses it); over all projections of a causal model."""
    return _saliency(subject, _or_all(subject, subject.roles.ffn))


def head_importance(subject: Subject) -> float:
    """``sum |W * G|`` over attention (after Michel et al. 2019); over all projections of a causal model.

    Serianni & Kalita's code (2023) leaves out matrices of fewer than 128 rows; here all count.
    """
    return _saliency(subject, _or_all(subject, subject.roles.attention))


def synaptic_diversity(subject: Subject) -> float:
    """``sum ||W||_nuc ||G||_nuc`` over attention (TF-TAS, Zhou et al. 2022); over all projections of a causal model."""
    chosen = _or_all(subject, subject.roles.attention)
    return sum(_nuclear(w) * _nuclear(g) for name, w, g in gradients(subject) if name in chosen)


def eznas(subject: Subject) -> float:
    """``sum || sigmoid(log |det(A A^T)|) ||_F`` with ``A = sign(G)`` (EZNAS as LPZero ports it to language models).

    Over attention in an encoder, over all projections of a causal model. A singular ``A A^T``, as of every ``G`` with
    more rows than columns, adds 0; any other adds at least 1/2, for its determinant is a whole number. The original's
    programs are for vision; no official version for language models is known. A model in half precision is
    differentiated in single precision: signs of small gradients would be of rounding.
    """
    subject = replace(subject, single=True)
    chosen = _or_all(subject, subject.roles.attention)
    return sum(float(_log_det(g.sign().double()).sigmoid()) for name, _, g in gradients(subject) if name in chosen)


def _log_det(a: Tensor) -> Tensor:
    """``log |det(A A^T)|``; an LU factorisation would take rounding noise for the pivots of a singular one."""
    rows, columns = a.shape
    if rows > columns:
        return a.new_tensor(-torch.inf)
    values = torch.linalg.svdvals(a)
    singular = values[-1] <= values[0] * columns * torch.finfo(a.dtype).eps
    return a.new_tensor(-torch.inf) if singular else 2 * values.log().sum()


def grasp(subject: Subject) -> float:
    """``sum -W * (H G)``, with the Hessian ``H`` (Wang et al. 2020; the sign of zero-cost NAS: larger is better).

    A model in half precision is differentiated in single precision, of which second derivatives leave little enough.
    """
    subject = replace(subject, single=True)
    weights = subject.weights()
    leaves = list(weights.values())
    batches = subject.needed()
    score = 0.0
    with plain_attention():
        total = mean_gradient(subject, weights)
        for batch in batches:
            found = derivatives(subject.differentiated(batch, weights) / len(batches), leaves, create_graph=True)
            z = sum(((t * g).sum() for t, g in zip(total, found, strict=True)), torch.zeros(()))
            products = derivatives(z, leaves)
            score -= sum(float((precise(w) * p).sum()) for w, p in zip(leaves, products, strict=True))
    return score


def fisher(subject: Subject) -> float:
    """``sum over weights of 1/2 mean over tokens of (a dL/da)^2`` of its output channel (Turner et al. 2020).

    ``a`` are outputs of a projection; of several batches the mean. Zero-cost NAS adds over all but the first two
    dimensions before squaring, which for ``(B, T, O)`` would mix the channels; here each channel is its own.
    """
    weights = subject.weights()
    batches = subject.needed()
    total = 0.0
    for batch in batches:
        with outputs_of(subject.model, subject.roles.projections) as outputs:
            value = subject.differentiated(batch, weights)
        for (name, a), g in zip(outputs.items(), derivatives(value, list(outputs.values())), strict=True):
            channels = (precise(a) * precise(g)).flatten(0, -2).square().mean(0) / 2  # (O,)
            inputs = oriented(subject.model, name, weights[name]).shape[1]
            total += float(channels.sum()) * inputs / len(batches)
    return total


def synflow(subject: Subject) -> float:
    """``sum |W * dR/dW|`` at absolute weights and embeddings of ones, ``R`` the sum of outputs (Tanaka et al. 2020).

    LayerNorms are passed by, see :func:`~hf_elastic.proxies.subject.ones_pass`; the field's ports to language models
    keep them, and so differentiate a constant. No data is needed.
    """
    return sum(float((w * g).abs().sum()) for _, w, g in ones_pass(subject))


def log_synflow(subject: Subject) -> float:
    """``sum W |log |dR/dW||`` at absolute weights (FreeREA, Cavagnero et al. 2023, as LPZero ports it).

    A gradient of zero adds nothing, such as all of queries and keys: where tokens are alike, attention is the same
    whatever those are. The ports, which run several tokens, add the logarithms of rounding noise there.
    """
    logs = ((w, g.abs().where(g != 0, torch.ones_like(g)).log()) for _, w, g in ones_pass(subject))
    return sum(float((w * log.abs()).sum()) for w, log in logs)


def dss(subject: Subject) -> float:
    """``||W||_nuc ||G||_nuc`` of attention plus ``sum |W * G|`` of FFNs, at absolute weights (Zhou et al. 2022).

    Input of ones and the sum of outputs, as :func:`synflow`. ZeroLM's port to BERT and GPT-2 is not published.
    """
    attention = subject.roles.attention
    return sum(
        _nuclear(w) * _nuclear(g) if name in attention else float((w * g).abs().sum())
        for name, w, g in ones_pass(subject)
    )


_ROOT = 1 / 20


def jacobian_cosine(subject: Subject) -> float:
    """``1 - 1/(n^2 - n) 1/2 sum |C|^(1/20)``, ``C`` the cosines of a Jacobian's rows less the identity (Celotti 2020).

    As Serianni & Kalita (2023) have it: the Jacobian is the gradient of the table of positions, transposed
    ``(n = D, positions)``. ``C`` is exactly 0 on its diagonal (the root would make 0.16 of the rounding of a single
    1 - 1), and in rows of zeros.

    Raises:
        UnsupportedModelError: the model has no table of positions, as LLaMA.
    """
    if subject.roles.positions is None:
        raise UnsupportedModelError("jacobian_cosine needs a table of learned positions, which this model has not")
    gradient = mean_gradient(subject, subject.weights([subject.roles.positions]))[0]
    rows = nn.functional.normalize(gradient.t().double(), dim=1)  # (D, positions)
    cosines = (rows @ rows.t()).fill_diagonal_(0)
    count = len(rows)
    return 1 - float(cosines.abs().pow(_ROOT).sum()) / (2 * (count * count - count))


def lpzero(subject: Subject) -> float:
    """What LPZero's search has found, as its code ships it (best effort: the paper prints no formula).

    Of an encoder ``mean(a^2)`` of the query projections' outputs, of a causal model ``mean(W^2) + mean(softmax(G)^2)``
    with the softmax over the inputs, the first dimension of GPT-2's weights; both as means over layers.

    Raises:
        UnsupportedModelError: an encoder has no query projections.
    """
    if subject.roles.causal:
        values = [float(w.square().mean() + g.softmax(1).square().mean()) for _, w, g in gradients(subject)]
        return sum(values) / max(1, len(values))
    names, batches = subject.roles.queries, subject.needed()
    if not names:
        raise UnsupportedModelError("lpzero looks at the queries of an encoder, and Roles(queries=...) names none")
    total = 0.0
    for batch in batches:
        for name, output in observed(subject, batch, names).items():
            queries = output.chunk(subject.roles.fused if name in subject.roles.heads else 1, dim=-1)[0]
            total += float(queries.square().mean()) / len(names) / len(batches)
    return total


def _or_all(subject: Subject, names: Sequence[str]) -> Sequence[str]:
    """In a causal model all projections: the field's GPT-2 code tells no roles apart."""
    return subject.roles.projections if subject.roles.causal else names


def _saliency(subject: Subject, names: Sequence[str]) -> float:
    return sum(float((w * g).abs().sum()) for name, w, g in gradients(subject) if name in names)


def _nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), "nuc"))
