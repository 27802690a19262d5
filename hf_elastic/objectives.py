"""What to search for: losses and similarities measured on data, and costs in closed form, as objectives.

Each function takes a supernet (and data) and returns an :class:`~hf_elastic.search.Objective`. Every one of them knows
the costs of its supernet, so ``within={"parameters": 0.8}`` works whichever objectives a search has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hf_elastic import costs
from hf_elastic.distillation import Pooling, label_mask, pooled
from hf_elastic.errors import DataError
from hf_elastic.families import shifts_labels
from hf_elastic.layers import evaluating
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.tables.additive import OfAdapter, OfLayer, layer_table
from hf_elastic.tables.budgets import LATENCY, MEMORY, Budgets, Workload, layer_memory, memory_bytes
from hf_elastic.tables.latencies import NANOSECONDS, LatencyTable
from hf_elastic.tables.quality import QualityTable, predicted_damage

Batch = Mapping[str, Tensor]


def loss(supernet: Supernet, validation: Iterable[Batch], *, name: str = "loss") -> Objective:
    """Mean loss on labelled batches, weighted by the labels that are scored; smaller is better.

    Scored are labels other than -100; a causal language model does not score the first of a sequence. Cutting the
    same examples into other batches gives the same mean.

    Args:
        validation: inputs of the model, ``labels`` included.

    Raises:
        DataError: there is no batch, a batch has no ``labels``, or no label is scored.
    """
    batches = _labelled(supernet, validation)

    def measure(architecture: Architecture) -> float:
        total, weight = 0.0, 0
        with _active(supernet, architecture) as model:
            for batch in batches:
                counted = int(_scored(supernet, batch["labels"]).sum())
                if counted:  # the mean over no label is NaN
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
    """Share of scored labels that the largest logit hits (see :func:`loss` for which are); larger is better.

    Raises:
        DataError: there is no batch, a batch has no ``labels``, or no label is scored.
    """
    batches = _labelled(supernet, validation)

    def measure(architecture: Architecture) -> float:
        right, total = 0, 0
        with _active(supernet, architecture) as model:
            for batch in batches:
                feed = _on_device(batch, model)
                labels = feed["labels"]
                guess = model(**{k: v for k, v in feed.items() if k != "labels"}).logits.argmax(-1)  # (B,) or (B, T)
                counted = _scored(supernet, labels)
                if shifts_labels(supernet.model):
                    labels = labels.roll(-1, dims=-1)  # position t answers label t + 1; the last is not counted
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

    measure = EmbeddingScore(
        Embedder(supernet, batches, pooling),
        lambda found: float(nn.functional.cosine_similarity(found, target, dim=-1).mean()),
    )
    return _measured(supernet, "cosine", measure, batches=batches, direction="maximize", extra=target, mode=pooling)


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

    Raises:
        DataError: there are fewer than three sentences, so fewer than two pairs to order.
    """
    batches = _listed(validation, needs="input_ids")
    target = _target(supernet, batches, teacher=teacher, pooling=pooling)
    if len(target) < _FEWEST_SENTENCES:
        raise DataError(f"validation holds {len(target)} sentences, the order of similarities needs at least 3")
    upper = torch.triu_indices(len(target), len(target), offset=1)  # (2, N·(N-1)/2)
    wanted = _similarities(target, upper)

    measure = EmbeddingScore(
        Embedder(supernet, batches, pooling),
        lambda found: float(spearmanr(_similarities(found, upper).numpy(), wanted.numpy()).statistic),
    )
    return _measured(supernet, "structure", measure, batches=batches, direction="maximize", extra=target, mode=pooling)


@dataclass(frozen=True, eq=False)
class Embedder:
    """Embeds sentences with a subnet, :func:`embeddings`.

    Attributes:
        supernet, batches, pooling: as for :func:`embeddings`.
    """

    supernet: Supernet
    batches: Sequence[Batch]
    pooling: Pooling

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two that embed the same sentences with the same supernet."""
        return id(self.supernet), self.pooling, *map(id, self.batches)

    def __call__(self, architecture: Architecture) -> Tensor:
        return embeddings(self.supernet, architecture, self.batches, pooling=self.pooling)


@dataclass(frozen=True)
class EmbeddingScore:
    """The function of an objective that looks at an architecture's embeddings only."""

    embed: Embedder
    score: Callable[[Tensor], float]

    def __call__(self, architecture: Architecture) -> float:
        return self.score(self.embed(architecture))


def evaluated(measures: Iterable[Objective], architecture: Architecture) -> dict[str, float]:
    """Values of objectives by name; embeddings that several of them look at are computed once."""
    found, known = {}, dict[object, Tensor]()
    for measure in measures:
        function = measure.function
        if isinstance(function, EmbeddingScore):
            key = function.embed.key
            known[key] = vectors = known[key] if key in known else function.embed(architecture)
            found[measure.name] = function.score(vectors)
        else:
            found[measure.name] = measure(architecture)
    return found


def embeddings(
    supernet: Supernet, architecture: Architecture, batches: Sequence[Batch], *, pooling: Pooling = "mean"
) -> Tensor:
    """Sentence embeddings ``(N, D)`` of a subnet, fp32 on the CPU, of length 1."""
    rows = []
    with _active(supernet, architecture) as model:
        base = supernet.base.base_model
        for batch in batches:
            feed = _on_device(batch, model)
            inputs = {name: value for name, value in feed.items() if name in _ENCODER_INPUTS}
            hidden = base(**inputs)[0]  # (B, T, D)
            vectors = pooled(hidden, feed.get("attention_mask"), pooling=pooling)
            rows.append(nn.functional.normalize(vectors.float(), dim=-1).cpu())
    return torch.cat(rows)


_FEWEST_SENTENCES = 3
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


def damage(supernet: Supernet, table: QualityTable) -> Objective:
    """Damage predicted by a measured quality table, a sum over layers (:mod:`hf_elastic.tables.quality`).

    Raises:
        DataError: the table does not reach every option of the space.
    """
    return Objective(
        "damage",
        lambda architecture: predicted_damage(supernet, table, architecture),
        related=lambda: related_costs(supernet),
        additive=layer_table(supernet, table.damage),
        fingerprint=table.fingerprint,
    )


def parameters(supernet: Supernet) -> Objective:
    """Parameters without embeddings, see :func:`hf_elastic.costs.parameters`."""
    return _cost(supernet, "parameters", lambda a: costs.parameters(supernet, a), layer=_added_parameters)


def total_parameters(supernet: Supernet) -> Objective:
    """Parameters with embeddings, see :func:`hf_elastic.costs.total_parameters`."""
    return _cost(supernet, "total_parameters", lambda a: costs.total_parameters(supernet, a), layer=_added_parameters)


def _added_parameters(part: LayerPart, shape: LayerShape) -> int:
    return -costs.removed_parameters(part, shape)


def macs(supernet: Supernet, *, seq_len: int = costs.LATENCY_TOKENS, batch_size: int = 1) -> Objective:
    """MACs of one forward at a stated length, see :func:`hf_elastic.costs.macs`."""
    return _cost(
        supernet,
        "macs",
        lambda a: costs.macs(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
        layer=lambda part, shape: batch_size * costs.layer_macs(part, shape, seq_len=seq_len),
    )


def adapter_parameters(supernet: Supernet) -> Objective:
    """Parameters of the adapters, see :func:`hf_elastic.costs.adapter_parameters`."""
    return _cost(
        supernet,
        "adapter_parameters",
        lambda a: costs.adapter_parameters(supernet, a),
        adapter=lambda part, point: part.parameters(point),
    )


def adapter_macs(supernet: Supernet, *, seq_len: int = costs.LATENCY_TOKENS, batch_size: int = 1) -> Objective:
    """MACs of the adapters beside their bases, see :func:`hf_elastic.costs.adapter_macs`."""
    return _cost(
        supernet,
        "adapter_macs",
        lambda a: costs.adapter_macs(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
        adapter=lambda part, point: batch_size * part.macs(point, seq_len=seq_len),
    )


def kv_cache_bytes(supernet: Supernet, *, seq_len: int, batch_size: int = 1) -> Objective:
    """Bytes of the KV cache after ``seq_len`` tokens, see :func:`hf_elastic.costs.kv_cache_bytes`."""
    return _cost(
        supernet,
        "kv_cache_bytes",
        lambda a: costs.kv_cache_bytes(supernet, a, seq_len=seq_len, batch_size=batch_size),
        arguments=(seq_len, batch_size),
    )


def memory(
    supernet: Supernet, *, batch_size: int = 1, seq_len: int | None = None, dtype: torch.dtype | None = None
) -> Objective:
    """Bytes of the exported weights and of the KV cache, see :func:`hf_elastic.tables.budgets.memory_bytes`.

    Args:
        batch_size: sequences in the cache.
        seq_len: tokens of each; by default 128, or fewer where the model has fewer positions.
        dtype: of the export; by default the model's.

    Raises:
        DataError: the model has no positions for so many tokens.
    """
    workload = Workload(batch_size, seq_len)
    return _cost(
        supernet,
        MEMORY,
        lambda a: memory_bytes(supernet, a, workload=workload, dtype=dtype),
        arguments=(workload, dtype),
        layer=lambda part, shape: layer_memory(supernet, part, shape, workload=workload, dtype=dtype),
    )


def predicted_latency(supernet: Supernet, table: LatencyTable) -> Objective:
    """Whole nanoseconds of a forward of the exported subnet as a latency table predicts them, a sum over layers.

    A limit on it in nanoseconds is an integer; ``within={"predicted_latency": 0.5}`` is a speed-up of two.

    Raises:
        CheckpointError: the table is of another model, or not finished.
        DataError: the table does not reach every size of the space.
    """
    table.require(supernet)
    constant = round(NANOSECONDS * table.fit.constant)

    def predicted(architecture: Architecture) -> int:
        pairs = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
        return constant + sum(table.nanoseconds(part, shape) for part, shape in pairs)

    measured = (table.setting, table.fit)
    return _cost(supernet, LATENCY, predicted, arguments=measured, unit="ns", layer=table.nanoseconds)


def budget_costs(
    supernet: Supernet, budgets: Budgets, table: LatencyTable | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Objective]:
    """The costs that :meth:`hf_elastic.tables.budgets.Budgets.limits` names, by name, and the related ones.

    Args:
        budgets: what is asked for.
        table: needed for a speed-up or a latency.
        dtype: of the export; by default the model's.
    """
    known = related_costs(supernet)
    if budgets.needs_table and table is not None:
        known[LATENCY] = predicted_latency(supernet, table)
    if budgets.memory is not None:
        held = budgets.held
        known[MEMORY] = memory(supernet, batch_size=held.batch_size, seq_len=held.length, dtype=dtype)
    return known


def latency(supernet: Supernet, *, inputs: Batch | None = None, repeats: int = 9) -> Objective:
    """Seconds of one forward, measured on the model's device beside the largest architecture.

    The value is ``median(subnet) / median(largest) · latency of the largest at first use``, so that a machine that
    slows down between two evaluations does not change their order.

    Args:
        inputs: of one forward; by default one sequence of 128 tokens.
        repeats: timed rounds of each evaluation.
    """
    largest = supernet.space.largest()
    feed = None if inputs is None else _on_device(inputs, supernet.model)
    reference: list[float] = []

    def measure(architecture: Architecture) -> float:
        timed = costs.architecture_latency(
            supernet, {"largest": largest, "subnet": architecture}, inputs=feed, repeats=repeats
        )
        if not reference:
            reference.append(timed["largest"].median)
        return timed["subnet"].median / timed["largest"].median * reference[0]

    timed_on = _timed_on(supernet, feed if feed is not None else costs.default_inputs(supernet))
    return _measured(supernet, "latency", measure, unit="s", mode=timed_on)


def _timed_on(supernet: Supernet, feed: Batch) -> str:
    """What decides about a latency besides the architecture: shapes of the inputs, precision, device."""
    device = supernet.base.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    shapes = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in feed.items())
    return repr(("latency", shapes, str(supernet.base.dtype), device.type, chip))


def _cost(
    supernet: Supernet,
    name: str,
    function: Callable[[Architecture], int],
    *,
    arguments: Sequence[object] = (),
    layer: OfLayer | None = None,
    adapter: OfAdapter | None = None,
    unit: str = "",
) -> Objective:
    """A cost; ``layer`` and ``adapter`` are what one of them adds to it, up to a constant."""
    extremes = (supernet.space.largest(), supernet.space.smallest())
    family = supernet.base.config.model_type
    depends_on = (name, tuple(arguments), family, supernet.layer_order, [function(point) for point in extremes])
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    table = None
    if layer is not None or adapter is not None:
        largest = sum(layer(part, part.full) for part in supernet.layer_parts) if layer else 0
        largest += sum(adapter(part, extremes[0]) for part in supernet.adapter_parts) if adapter else 0
        table = layer_table(supernet, layer, adapter=adapter, constant=function(extremes[0]) - largest)
    return Objective(
        name, function, cost=True, unit=unit, related=lambda: related_costs(supernet), additive=table,
        fingerprint=digest,
    )  # fmt: skip


def related_costs(supernet: Supernet) -> dict[str, Objective]:
    """The costs that ``within=`` may name for any search over a supernet (MACs at 128 tokens)."""
    made = [parameters(supernet), total_parameters(supernet), macs(supernet)] if supernet.layer_parts else []
    made += [adapter_parameters(supernet), adapter_macs(supernet)] if supernet.adapter_parts else []
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
    mode: str = "",
) -> Objective:
    return Objective(
        name, measure, direction, unit=unit, related=lambda: related_costs(supernet),
        fingerprint=_fingerprint(supernet, batches, extra=extra, mode=mode),
    )  # fmt: skip


def _fingerprint(supernet: Supernet, batches: Sequence[Batch], *, extra: Tensor | None, mode: str) -> str:
    """Digest of the weights (a sample of each tensor), the order of layers and the data: a storage mixes no two."""
    adapters = sorted({(part.adapter, part.in_use, part.merged) for part in supernet.adapter_parts})
    digest = hashlib.sha256(f"{mode}{supernet.layer_order}{adapters or ''}".encode())
    for name, tensor in supernet.model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    named = [(name, t) for batch in batches for name, t in sorted(batch.items())]
    for name, tensor in [*named, *([("", extra)] if extra is not None else [])]:
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _labelled(supernet: Supernet, validation: Iterable[Batch]) -> list[Batch]:
    batches = _listed(validation, needs="labels")
    if not any(_scored(supernet, batch["labels"]).any() for batch in batches):
        raise DataError("no label of the validation batches is scored: all are -100, or the first of their sequence")
    return batches


def _scored(supernet: Supernet, labels: Tensor) -> Tensor:
    """Which entries of the labels, or with a shift which positions, the model's loss counts."""
    return label_mask(labels, shifted=shifts_labels(supernet.model))


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
    with evaluating(supernet.model), torch.inference_mode(), supernet.activate(architecture):
        yield supernet.model
