"""Proxies of activations. Values are means over the batches; nothing is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.errors import UnsupportedModelError
from hf_elastic.proxies.subject import Batch, Subject, finite, observed, precise


def attention_confidence(subject: Subject) -> float:
    """``sum over q, k, v of mean(max over tokens)`` of the projections' outputs ``(B, T, O)`` (Serianni & Kalita 2023).

    Their column "Head Confidence". ZeroLM's "Attention confidence" agrees with it on FlexiBERT.
    """
    return _mean_over_batches(subject, lambda batch: _confidence(_heads(subject, batch)))


def softmax_confidence(subject: Subject) -> float:
    """``sum over layers of mean(max over heads)`` of attention probabilities ``(B, H, T, T)`` (Serianni & Kalita 2023).

    Their code takes the maximum over dimension 1, which of this tensor are the heads; kept as published. A model with
    another implementation of attention computes it in the eager way for this.

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
        neurons = observed(subject, batch, subject.roles.ffn_out, inputs=True)
        sequences = len(next(iter(batch.values())))
        return sum(_agreements(a.reshape(sequences, -1, a.shape[-1])[0]) for a in neurons.values())

    return _mean_over_batches(subject, agreements)


def _agreements(neurons: Tensor) -> float:
    on = (neurons > 0).double()  # (T, F)
    # The sum over all entries of X X^T is the squared norm of the sums of X's columns.
    return float(on.sum(0).square().sum() + (1 - on).sum(0).square().sum())


def _heads(subject: Subject, batch: Batch) -> list[Tensor]:
    outputs = observed(subject, batch, subject.roles.heads)
    return [part for output in outputs.values() for part in output.chunk(subject.roles.fused, dim=-1)]


def _probabilities(subject: Subject, batch: Batch) -> list[Tensor]:
    found = None
    if isinstance(subject.model, PreTrainedModel):
        with torch.no_grad(), _eager(subject.model), _nothing_added(subject.model):
            output = subject.model(**batch, output_attentions=True)
        found = output.get("attentions") if isinstance(output, dict) else None
    if not found or any(layer is None for layer in found):
        raise UnsupportedModelError(
            f"{type(subject.model).__name__} returns no attention probabilities; softmax_confidence needs a model of "
            "transformers that returns them for output_attentions=True"
        )
    return [finite(precise(layer), what="an attention probability") for layer in found]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model compute attention so that there are probabilities, and as before at the end."""
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _nothing_added(model: nn.Module) -> Iterator[None]:
    """Takes away what modules have got inside the block: transformers hangs hooks on them that no pickle can hold."""
    before = [(module, set(module._forward_hooks), set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, attributes in before:
            for added in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[added]
            for name in vars(module).keys() - attributes:
                delattr(module, name)


def _confidence(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.amax(dim=1).mean()) for tensor in tensors)


def _mean_over_batches(subject: Subject, measure: Callable[[Batch], float]) -> float:
    batches = subject.needed()
    return sum(measure(batch) for batch in batches) / len(batches)
