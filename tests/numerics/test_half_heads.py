"""Heads, blocks and distillation in half precision: similarity, merging, fusion, PCA, losses."""

from __future__ import annotations

import math
from typing import Any

import block_models
import numpy as np
import pytest
import torch
from half_models import CASES, HALVES, batches, distance, finite, narrowed, output, pair, refused, tolerance, widened

from hf_elastic import fuse_heads, make_elastic
from hf_elastic.distillation import (
    dist_loss,
    embedding_loss,
    hidden_state_loss,
    logits_loss,
    relational_loss,
    top_k_distribution,
    top_k_loss,
)
from hf_elastic.head_merging import Head, merge_heads, remove_heads
from hf_elastic.head_similarity import HeadFeatures, linear_cka
from hf_elastic.training.pca import PreActivations, pca_score

EVERY = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
LARGE = 2e3


def contexts(dtype: torch.dtype, *, count: int = 4, tokens: int = 30) -> list[torch.Tensor]:
    """Batches ``(2, T, 4 · 6)`` of large contexts, of which head 2 is head 0 turned and scaled."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    found = []
    for _ in range(count):
        heads = LARGE * torch.randn(2, tokens, 4, 6, generator=generator) + 5000
        heads[:, :, 2] = 0.5 * heads[:, :, 0] @ turn
        found.append(heads.flatten(2).to(dtype))
    return found


def cka_by_hand(rows: np.ndarray, heads: int) -> np.ndarray:
    """Kornblith et al., Eq. 5, of ``(N, H, d)``."""
    centred = rows - rows.mean(0)
    split = [centred[:, head] for head in range(heads)]
    products = np.array([[np.linalg.norm(a.T @ b) ** 2 for b in split] for a in split])
    norms = np.sqrt(np.diag(products))
    return products / np.outer(norms, norms)


@EVERY
def test_similarities_of_large_half_contexts_are_numpys(dtype: torch.dtype) -> None:
    features, rows = HeadFeatures(4, 6), []
    for context in contexts(dtype):
        features.add(context)
        rows.append(context.double().numpy().reshape(-1, 4, 6))
    wanted = cka_by_hand(np.concatenate(rows), 4)
    assert np.abs(features.cka().numpy() - wanted).max() <= 1e-9 and wanted[0, 2] > 0.999
    one, other = (torch.cat([c.reshape(-1, 4, 6)[:, h] for c in contexts(dtype)]) for h in (0, 1))
    assert linear_cka(one, other) == pytest.approx(wanted[0, 1], abs=1e-9)


@EVERY
def test_heads_in_half_precision_become_those_of_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    features = HeadFeatures(4, 6)
    for context in contexts(dtype):
        features.add(context)

    def head() -> Head:
        drawn = [torch.randn(6, 10, generator=generator) for _ in range(3)]
        output = torch.randn(10, 6, generator=generator)
        biases = [torch.randn(6, generator=generator) for _ in range(3)]
        return Head(*(t.to(dtype) for t in (*drawn, output, *biases)))

    heads = [head() for _ in range(4)]
    wide = [Head(*(None if t is None else t.float() for t in vars(h).values())) for h in heads]
    eps = torch.finfo(dtype).eps
    found, wanted = (merge_heads(each, features, group=[0, 2]) for each in (heads, wide))
    for name, tensor in vars(wanted).items():
        assert vars(found)[name].dtype == dtype and distance(vars(found)[name], tensor) <= eps
    (kept, bias), (wanted, wide_bias) = (remove_heads(each, features, group=[0, 2]) for each in (heads, wide))
    assert distance(kept.output, wanted.output) <= eps and distance(bias, wide_bias) <= eps


@CASES
@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fused_models_are_those_of_float32(family: str, mode: Any, dtype: torch.dtype, loud: bool) -> None:
    found, reports = [], []
    half, exact = pair(family, dtype, loud=loud)
    for model in (half, exact):
        data = batches(model, count=6, labels=True)
        fused, report = fuse_heads(model, data, mode=mode, threshold=0.3, min_heads=1)
        assert fused.dtype == model.dtype and finite(fused)
        feed = {name: value for name, value in data[0].items() if name != "labels"}
        found.append(output(fused, feed)[feed["attention_mask"].bool()])
        reports.append(report)
    ours, theirs = reports
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert distance(one.cka, other.cka) <= tolerance(dtype)
    assert ours.loss_before == pytest.approx(theirs.loss_before, rel=tolerance(dtype))
    if [one.after for one in ours.layers] == [other.after for other in theirs.layers]:
        bound = 0.1 if mode == "merge" else tolerance(dtype)  # turns of heads that are little alike are ill-conditioned
        assert distance(*found) <= bound


@EVERY
@pytest.mark.parametrize("kind", block_models.TYPES)
@pytest.mark.parametrize("shape", sorted(block_models.SHAPES))
def test_candidate_blocks_are_those_of_float32(shape: str, kind: str, dtype: torch.dtype) -> None:
    half = narrowed(block_models.tiny(kind, **block_models.SHAPES[shape]), dtype)
    found = []
    for model in (half, widened(half)):
        supernet = make_elastic(model)
        paths = [block_models.path(supernet, block) for block in supernet.block_parts[0].blocks]
        found.append(torch.stack([block_models.output_of(supernet, path).float() for path in paths]))
    assert distance(*found) <= tolerance(dtype)


@EVERY
def test_pca_moments_of_large_half_pre_activations_are_numpys(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (LARGE * torch.randn(4, 50, 3, generator=generator) @ torch.randn(3, 12, generator=generator) + 9e3)
    hidden = hidden.to(dtype)
    moments = PreActivations(12)
    for rows in hidden:
        moments.add(rows[None])
    wide = hidden.double().numpy().reshape(-1, 12)
    wanted = np.cov(wide.T)
    assert np.abs(moments.covariance().numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()
    values = np.sort(np.linalg.eigvalsh(wanted))[::-1].cumsum()
    directions = int((values / values[-1] <= 0.99).sum()) + 1
    assert pca_score(moments, inputs=12) == directions / 12


LOSSES: dict[str, Any] = {
    "forward": lambda s, t: logits_loss(s, t, temperature=2.0),
    "reverse": lambda s, t: logits_loss(s, t, divergence="reverse"),
    "mse": lambda s, t: logits_loss(s, t, divergence="mse"),
    "dist": dist_loss,
    "top k": lambda s, t: top_k_loss(s, top_k_distribution(t, 5)),
    "embeddings": lambda s, t: embedding_loss(s[0], t[0]),
    "relational": lambda s, t: relational_loss(s[0], t[0]),
    **{
        name: (lambda s, t, name=name: hidden_state_loss([s], [t], distance=name))
        for name in ("mse", "cosine", "relative", "pearson")
    },
}


@EVERY
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_large_half_tensors_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = {"forward": 30.0, "reverse": 30.0, "dist": 30.0, "top k": 4.0}.get(name, LARGE)  # 2,000 is all one-hot
    student, teacher = ((scale * torch.randn(3, 7, 20, generator=generator)).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    wide, taught = student.detach().double(), teacher.double()
    assert loss.dtype == torch.float32 and bool(torch.isfinite(student.grad).all())
    assert float(loss) == pytest.approx(ORACLES[name](wide, taught), rel=1e-4, abs=1e-6)


def _kl(first: torch.Tensor, second: torch.Tensor) -> float:
    p, q = (x.log_softmax(-1).numpy() for x in (first, second))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _top(student: torch.Tensor, teacher: torch.Tensor, k: int = 5) -> float:
    p, q = teacher.softmax(-1), student.softmax(-1)
    kept = teacher.topk(k).indices
    pairs = [(x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1)) for x in (p, q)]
    (a, rest), (b, other) = pairs
    tail = torch.special.xlogy(rest, rest) - rest * other.clamp(min=1e-300).log()
    return float(((a * (a / b).log()).sum(-1) + tail).mean())


def _cosines(rows: torch.Tensor) -> np.ndarray:
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=-1, keepdims=True)
    return unit @ unit.T


def _pearson(student: torch.Tensor, teacher: torch.Tensor) -> float:
    one, other = (x.numpy().reshape(-1, x.shape[-1]) for x in (student, teacher))
    one, other = ((x - x.mean(0)) / (x.std(0, ddof=1) + 1e-6) for x in (one, other))
    return float(((one - other) ** 2).mean())


def _dist(student: torch.Tensor, teacher: torch.Tensor) -> float:
    p, q = (x.softmax(-1).numpy().reshape(-1, x.shape[-1]) for x in (student, teacher))

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (v / v.max(1, keepdims=True) for v in (a, b))
        a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
        return (a * b).sum(1) / ((np.linalg.norm(a, axis=1) + 1e-6) * (np.linalg.norm(b, axis=1) + 1e-6))

    return float(2 - correlation(p, q).mean() - correlation(p.T, q.T).mean())


def _off_diagonal(student: torch.Tensor, teacher: torch.Tensor) -> float:
    apart = (_cosines(student) - _cosines(teacher)) ** 2
    return float(apart.sum() / (len(apart) * (len(apart) - 1)))


def _one_less_cosine(s: torch.Tensor, t: torch.Tensor) -> float:
    a, b = s.numpy().reshape(-1, s.shape[-1]), t.numpy().reshape(-1, t.shape[-1])
    return float(1 - ((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).mean())


ORACLES: dict[str, Any] = {
    "forward": lambda s, t: 4 * _kl(t / 2, s / 2),
    "reverse": _kl,
    "mse": lambda s, t: float(((s - t).numpy() ** 2).mean()),
    "dist": _dist,
    "top k": _top,
    "embeddings": lambda s, t: _one_less_cosine(s[0], t[0]),
    "relational": lambda s, t: _off_diagonal(s[0], t[0]),
    "cosine": _one_less_cosine,
    "relative": lambda s, t: float(((s - t).numpy() ** 2).sum() / (t.numpy() ** 2).sum()),
    "pearson": _pearson,
}


@EVERY
def test_contexts_beyond_a_dtype_are_refused(dtype: torch.dtype) -> None:
    beyond = torch.full((1, 3, 24), 2.0 * torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert math.isinf(float(beyond.max()))
    with refused("NaN or infinity", "check the weights"):
        HeadFeatures(4, 6).add(beyond)
