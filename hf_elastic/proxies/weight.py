"""Proxies of weights and of sizes alone: no data, no gradient."""

from __future__ import annotations

from torch import nn

from hf_elastic.proxies.roles import loaded_weight
from hf_elastic.proxies.subject import Subject, oriented
from hf_elastic.proxies.zerolm_table import DEFAULT_ALPHA, matrix_score


def zerolm_parts(subject: Subject) -> tuple[float, float]:
    """ZeroLM's ``S_attention`` and ``S_ffn`` (:mod:`hf_elastic.proxies.zerolm_table`)."""
    model, roles = subject.model, subject.roles
    whole = {name: oriented(model, name, loaded_weight(model, name)) for name in roles.projections}
    pieces = [whole[n].chunk(roles.fused if n in roles.heads else 1, dim=0) for n in roles.attention]
    attention = sum(matrix_score(piece) for group in pieces for piece in group)
    return attention, sum(matrix_score(whole[name]) for name in roles.ffn)


def zerolm(subject: Subject) -> float:
    """``sum over layers of alpha S_attention + (1 - alpha) S_ffn`` with ``alpha = 0.5`` (arXiv 2503.18646).

    For another weight combine :func:`zerolm_parts`; :func:`~hf_elastic.proxies.ranking.fitted_alpha` and
    :func:`~hf_elastic.proxies.ranking.label_free_alpha` find one for a space.
    """
    attention, ffn = zerolm_parts(subject)
    return DEFAULT_ALPHA * attention + (1 - DEFAULT_ALPHA) * ffn


def params(subject: Subject) -> float:
    """Parameters, each tied tensor once."""
    return float(sum(parameter.numel() for parameter in subject.model.parameters()))


def decoder_params(subject: Subject) -> float:
    """Parameters without embedding tables (LiteTransformerSearch, Javaheripi et al. 2022)."""
    tables = {id(m.weight) for m in subject.model.modules() if isinstance(m, nn.Embedding)}
    return float(sum(p.numel() for p in subject.model.parameters() if id(p) not in tables))


def depth(subject: Subject) -> float:
    """Layers."""
    return float(subject.roles.layers)


def width_depth(subject: Subject) -> float:
    """Sum over the layers of the width of the residual stream."""
    return float(subject.roles.layers * subject.roles.hidden_size)
