"""What to search for: losses and similarities measured on data, and costs in closed form, as objectives.

Each function takes a supernet (and data) and returns an :class:`~hf_elastic.search.Objective`. Every one of them knows
the costs of its supernet, so ``within={"parameters": 0.8}`` works whichever objectives a search has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hf_elastic import costs
from hf_elastic.distillation import Pooling, pooled
from hf_elastic.errors import DataError
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

Batch = Mapping[str, Tensor]


def loss(supernet: Supernet, validation: Iterable[Batch], *, name: str = "loss") -> Objective:
    """Mean loss on labelled batches, weighted by the labels that count (not -100); smaller is better.

    Args:
        validation: inputs of the model, ``labels`` included.

    Raises:
        DataError: there is no batch, or a batch has no ``labels``.
    """
    batches = _listed(validation, needs="labels")

    def measure(architecture: Architecture) -> float:
        total, weight = 0.0, 0
        with _active(supernet, architecture) as model:
            for batch in batches:
                counted = max(1, int((batch["labels"] != -100).sum()))
                total += float(model(**_on_device(batch, model)).loss) * counted
                weight += counted
        return total / weight

    return _measured(supernet, name, measure, batches=batches)


def perplexity(supernet: Supernet, validation: Iterable[Batch]) -> Objective:
    """Exponential of :func:`loss`; smaller is better."""
    mean_loss = loss(supernet, validation)
    return Objective(
        "perplexity", lambda architecture: math.exp(min(mean_loss(architecture), 700.0)), related=mean_loss.related,
        fingerprint=mean_loss.fingerprint,
    )  # fmt: skip


def accuracy(supernet: Supernet, validation: Iterable[Batch]) -> Objective:
    """Share of labels that the largest logit hits (labels of -100 do not count); larger is better.

    Raises:
        DataError: there is no batch, or a batch has no ``labels``.
    """
    batches = _listed(validation, needs="labels")

    def measure(architecture: Architecture) -> float:
        right, total = 0, 0
        with _active(supernet, architecture) as model:
            for batch in batches:
                feed = _on_device(batch, model)
                labels = feed["labels"]
                guess = model(**{k: v for k, v in feed.items() if k != "labels"}).logits.argmax(-1)  # (B,) or (B, T)
                counted = labels != -100
                right += int(((guess == labels) & counted).sum())
                total += int(counted.sum())
        return right / total

    return _measured(supernet, "accuracy", measure, batches=batches, direction="maximize")


def embedding_cosine(
    supernet: Supernet,
    validation: Iterable[Batch],
    *,
    teacher: Tensor | None = None,
    pooling: Pooling = "mean",
) -> Objective:
    """Mean cosine between a subnet's sentence embeddings and the parent's; larger is better, 1 at the parent.

    Args:
        validation: inputs of the encoder, padded, with ``attention_mask``.
        teacher: the parent's embeddings ``(N, D)`` in the order of the sentences; by default those of the largest
            architecture as it is now.
        pooling: how token states become an embedding.
    """
    batches = _listed(validation, needs="input_ids")
    target = _target(supernet, batches, teacher=teacher, pooling=pooling)

    def measure(architecture: Architecture) -> float:
        found = embeddings(supernet, architecture, batches, pooling=pooling)
        return float(nn.functional.cosine_similarity(found, target, dim=-1).mean())

    return _measured(supernet, "cosine", measure, batches=batches, direction="maximize", extra=target)


def similarity_structure(
    supernet: Supernet,
    validation: Iterable[Batch],
    *,
    teacher: Tensor | None = None,
    pooling: Pooling = "mean",
) -> Objective:
    """Spearman correlation between a subnet's and the parent's similarities of all pairs of sentences.

    Larger is better, 1 at the parent. What users of sentence encoders measure is the order of similarities, which
    the cosine to the parent's embeddings guides poorly.

    Args:
        validation, teacher, pooling: as :func:`embedding_cosine`.
    """
    batches = _listed(validation, needs="input_ids")
    target = _target(supernet, batches, teacher=teacher, pooling=pooling)
    upper = torch.triu_indices(len(target), len(target), offset=1)  # (2, N·(N-1)/2)
    wanted = _similarities(target, upper)

    def measure(architecture: Architecture) -> float:
        found = embeddings(supernet, architecture, batches, pooling=pooling)
        return float(spearmanr(_similarities(found, upper).numpy(), wanted.numpy()).statistic)

    return _measured(supernet, "structure", measure, batches=batches, direction="maximize", extra=target)


def embeddings(
    supernet: Supernet, architecture: Architecture, batches: Sequence[Batch], *, pooling: Pooling = "mean"
) -> Tensor:
    """Sentence embeddings ``(N, D)`` of a subnet, fp32 on the CPU, of length 1."""
    rows = []
    with _active(supernet, architecture) as model:
        base = model.base_model if isinstance(model.base_model, nn.Module) else model
        for batch in batches:
            feed = _on_device(batch, model)
            inputs = {name: value for name, value in feed.items() if name in _ENCODER_INPUTS}
            hidden = base(**inputs)[0]  # (B, T, D)
            vectors = pooled(hidden, feed.get("attention_mask"), pooling=pooling)
            rows.append(nn.functional.normalize(vectors.float(), dim=-1).cpu())
    return torch.cat(rows)


_ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _target(supernet: Supernet, batches: Sequence[Batch], *, teacher: Tensor | None, pooling: Pooling) -> Tensor:
    if teacher is None:
        return embeddings(supernet, supernet.space.largest(), batches, pooling=pooling)
    sentences = sum(len(batch["input_ids"]) for batch in batches)
    if len(teacher) != sentences:
        raise DataError(f"teacher holds {len(teacher)} embeddings for {sentences} validation sentences")
    return nn.functional.normalize(teacher.float(), dim=-1).cpu()


def _similarities(vectors: Tensor, pairs: Tensor) -> Tensor:
    return (vectors @ vectors.t())[pairs[0], pairs[1]]


def parameters(supernet: Supernet) -> Objective:
    """Parameters without embeddings, see :func:`hf_elastic.costs.parameters`."""
    return _cost(supernet, "parameters", lambda a: costs.parameters(supernet, a))


def total_parameters(supernet: Supernet) -> Objective:
    """Parameters with embeddings, see :func:`hf_elastic.costs.total_parameters`."""
    return _cost(supernet, "total_parameters", lambda a: costs.total_parameters(supernet, a))


def macs(supernet: Supernet, *, seq_len: int = costs.LATENCY_TOKENS, batch_size: int = 1) -> Objective:
    """MACs of one forward at a stated length, see :func:`hf_elastic.costs.macs`."""
    return _cost(supernet, "macs", lambda a: costs.macs(supernet, a, seq_len=seq_len, batch_size=batch_size))


def kv_cache_bytes(supernet: Supernet, *, seq_len: int, batch_size: int = 1) -> Objective:
    """Bytes of the KV cache after ``seq_len`` tokens, see :func:`hf_elastic.costs.kv_cache_bytes`."""
    return _cost(
        supernet,
        "kv_cache_bytes",
        lambda a: costs.kv_cache_bytes(supernet, a, seq_len=seq_len, batch_size=batch_size),
    )


def latency(supernet: Supernet, *, inputs: Batch | None = None, repeats: int = 9) -> Objective:
    """Seconds of one forward, measured on the model's device beside the largest architecture.

    The value is ``median(subnet) / median(largest) · latency of the largest at first use``, so that a machine that
    slows down between two evaluations does not change their order.

    Args:
        inputs: of one forward; by default one sequence of 128 tokens.
        repeats: timed rounds of each evaluation.
    """
    largest = supernet.space.largest()
    reference: list[float] = []

    def measure(architecture: Architecture) -> float:
        timed = costs.architecture_latency(
            supernet, {"largest": largest, "subnet": architecture}, inputs=inputs, repeats=repeats
        )
        if not reference:
            reference.append(timed["largest"].median)
        return timed["subnet"].median / timed["largest"].median * reference[0]

    return _measured(supernet, "latency", measure, unit="s")


def _cost(supernet: Supernet, name: str, function: Callable[[Architecture], int]) -> Objective:
    return Objective(name, function, cost=True, related=lambda: related_costs(supernet))


def related_costs(supernet: Supernet) -> dict[str, Objective]:
    """The costs that ``within=`` may name for any search over a supernet (MACs at 128 tokens)."""
    made = (parameters(supernet), total_parameters(supernet), macs(supernet))
    return {objective.name: objective for objective in made}


def _measured(
    supernet: Supernet,
    name: str,
    measure: Callable[[Architecture], float],
    *,
    batches: Sequence[Batch] = (),
    direction: Any = "minimize",
    unit: str = "",
    extra: Tensor | None = None,
) -> Objective:
    return Objective(
        name, measure, direction, unit=unit, related=lambda: related_costs(supernet),
        fingerprint=_fingerprint(supernet, batches, extra),
    )  # fmt: skip


def _fingerprint(supernet: Supernet, batches: Sequence[Batch], extra: Tensor | None) -> str:
    """Digest of the weights (a sample of each tensor) and of the data, so that a storage mixes no two of them."""
    digest = hashlib.sha256()
    for name, tensor in supernet.model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    for tensor in [t for batch in batches for _, t in sorted(batch.items())] + ([extra] if extra is not None else []):
        digest.update(tensor.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _listed(batches: Iterable[Batch], *, needs: str) -> list[Batch]:
    found = list(batches)
    if not found:
        raise DataError("validation holds no batch; pass a list of at least one")
    for index, batch in enumerate(found):
        if needs not in batch:
            raise DataError(f"validation batch {index} has no {needs!r}, only {sorted(batch)}")
    return found


def _on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def _active(supernet: Supernet, architecture: Architecture) -> Iterator[Any]:
    """The model in evaluation mode, without gradients, with ``architecture`` active."""
    model, training = supernet.model, supernet.model.training
    model.eval()
    try:
        with torch.inference_mode(), supernet.activate(architecture):
            yield model
    finally:
        model.train(training)
