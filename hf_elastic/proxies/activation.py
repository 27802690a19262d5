"""Proxies of activations. Values are means over the batches; nothing is differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.proxies.subject import Batch, Subject, outputs_of


def attention_confidence(subject: Subject) -> float:
    """``sum over q, k, v of mean(max over tokens)`` of the projections' outputs ``(B, T, O)`` (Serianni & Kalita 2023).

    Their column "Head Confidence". ZeroLM's "Attention confidence" agrees with it on FlexiBERT.
    """
    return _mean_over_batches(subject, lambda batch: _confidence(_heads(subject, batch)))


def softmax_confidence(subject: Subject) -> float:
    """``sum over layers of mean(max over heads)`` of attention probabilities ``(B, H, T, T)`` (Serianni & Kalita 2023).

    Their code takes the maximum over dimension 1, which of this tensor are the heads; kept as published.

    Raises:
        UnsupportedModelError: the model does not return attention probabilities.
    """
    return _mean_over_batches(subject, lambda batch: _confidence(_probabilities(subject, batch)))


def activation_distance(subject: Subject) -> float:
    """``sum over FFNs of sum(x x^T + (1 - x)(1 - x)^T)``, ``x = [a > 0]`` of a batch's first sequence, ``(T, F)``.

    After Mellor et al. 2021, as Serianni & Kalita 2023 have it: a sum of agreements and not their log-determinant.
    ``a`` are the neurons as they enter the second projection; of a gated FFN, the products.
    """

    def agreements(batch: Batch) -> float:
        with torch.no_grad(), outputs_of(subject.model, subject.roles.ffn_out, inputs=True) as neurons:
            subject.model(**batch)
        sequences = len(next(iter(batch.values())))
        return sum(_agreements(a.reshape(sequences, -1, a.shape[-1])[0]) for a in neurons.values())

    return _mean_over_batches(subject, agreements)


def _agreements(neurons: Tensor) -> float:
    on = (neurons > 0).double()  # (T, F)
    # The sum over all entries of X X^T is the squared norm of the sums of X's columns.
    return float(on.sum(0).square().sum() + (1 - on).sum(0).square().sum())


def _heads(subject: Subject, batch: Batch) -> list[Tensor]:
    with torch.no_grad(), outputs_of(subject.model, subject.roles.heads) as outputs:
        subject.model(**batch)
    return [part for output in outputs.values() for part in output.chunk(subject.roles.fused, dim=-1)]


def _probabilities(subject: Subject, batch: Batch) -> Sequence[Tensor]:
    with torch.no_grad():
        output = subject.model(**batch, output_attentions=True)
    found = output.get("attentions") if isinstance(output, dict) else None
    if not found or any(layer is None for layer in found):
        raise UnsupportedModelError(
            "the model returns no attention probabilities; load it with attn_implementation='eager'"
        )
    return tuple(found)


def _confidence(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.amax(dim=1).mean()) for tensor in tensors)


def _mean_over_batches(subject: Subject, measure: object) -> float:
    batches = subject.needed()
    return sum(measure(batch) for batch in batches) / len(batches)  # type: ignore[operator]
