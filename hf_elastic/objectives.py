"""What to search for: losses and similarities measured on data, and costs in closed form, as objectives.

Each function takes a supernet (and data) and returns an :class:`~hf_elastic.search.Objective`. Every one of them knows
the costs of its supernet, so ``within={"parameters": 0.8}`` works whichever objectives a search has.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hf_elastic import costs
from hf_elastic.checkpoint import extract
from hf_elastic.cost_objectives import (
    adapter_macs,
    adapter_parameters,
    budget_costs,
    kv_cache_bytes,
    latency,
    macs,
    memory,
    parameters,
    predicted_latency,
    related_costs,
    total_parameters,
)
from hf_elastic.distillation import Pooling, label_mask, pooled
from hf_elastic.errors import DataError
from hf_elastic.families import shifts_labels
from hf_elastic.fingerprints import state_of
from hf_elastic.late_imports import on_first_use
from hf_elastic.layers import evaluating, without_autocast
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.proxies import PROXIES, ZeroLMTable, label_free_alpha, score
from hf_elastic.proxies.subject import Target
from hf_elastic.proxies.zerolm_table import DEFAULT_ALPHA
from hf_elastic.routers import require_unrouted
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.streams import on_device
from hf_elastic.supernet import Supernet
from hf_elastic.tables.additive import OfLayer, layer_table
from hf_elastic.tables.quality import QualityTable, predicted_damage

__all__ = [
    "Embedder", "EmbeddingScore", "accuracy", "adapter_macs", "adapter_parameters", "budget_costs", "damage",
    "embedding_cosine", "embeddings", "evaluated", "kv_cache_bytes", "latency", "loss", "macs", "memory",
    "parameters", "perplexity", "predicted_latency", "proxy", "related_costs", "similarity_structure",
    "total_parameters",
]  # fmt: skip

Batch = Mapping[str, Tensor]

# Objectives by other libraries' measures stand above this module; they are named beside those that are here.
__getattr__, __dir__ = on_first_use(globals(), {"evaluation": ("lm_eval", "metric", "ndcg", "spearman")})


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
                    total += float(model(**on_device(batch, model)).loss) * counted
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
                feed = on_device(batch, model)
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
            feed = on_device(batch, model)
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
        UnsupportedModelError: the layers are candidate blocks, or have routers.
    """
    require_unrouted(supernet.base, "a quality table")
    supernet.require_layers("a quality table", instead="objectives.loss(supernet, validation)")
    return Objective(
        "damage",
        lambda architecture: predicted_damage(supernet, table, architecture),
        related=lambda: related_costs(supernet),
        additive=layer_table(supernet, table.damage),
        fingerprint=table.fingerprint,
    )


def proxy(
    supernet: Supernet,
    name: str,
    *,
    batches: Iterable[Batch] | Batch = (),
    target: Target = "auto",
    alpha: float | Literal["label-free"] | None = None,
    table: ZeroLMTable | None = None,
) -> Objective:
    """A zero-cost proxy (:mod:`hf_elastic.proxies`) of a subnet as it would be extracted; larger is better.

    ``zerolm``, ``decoder_params``, ``params``, ``depth`` and ``width_depth`` are sums over layers, which exact search
    takes; they need no weights besides the table. The others extract each subnet and run it. Ranks of adapters score
    nothing: before training ``B = 0``.

    Args:
        name: one of ``hf_elastic.proxies.PROXIES``.
        batches: inputs, for the proxies that need data.
        target: what gradients are of, see :func:`hf_elastic.proxies.score`.
        alpha: ZeroLM's weight of attention; by default 0.5. ``"label-free"``: by its Algorithm 2 on 200 architectures
            of the space, which is unbounded: where the parts hardly agree it may turn the score round, and is refused.
        table: of ``zerolm``, by default that of the supernet's weights. One streamed by
            ``hf_elastic.proxies.checkpoint_table`` serves a supernet on the meta device.

    Raises:
        DataError: there is no such proxy, batches are missing, an option is not for this proxy, the table is of another
            model, or a label-free weight is outside of 0 to 1.
        UnsupportedModelError: the proxy is a sum over widths and heads, and the layers are candidate blocks; or the
            model has routers.
    """
    require_unrouted(supernet.base, "a proxy")
    if name != "zerolm" and (alpha is not None or table is not None):
        raise DataError(f"alpha and table are of zerolm, not of {name}; leave them out")
    if name == "zerolm" or name in _SIZES:
        supernet.require_layers(f"the proxy {name!r} of a supernet", instead="score() on what extract() gives")
    if name == "zerolm":
        family = supernet.family if supernet.layer_parts else None
        found = ZeroLMTable.of_model(supernet.base, family=family) if table is None else table
        return _zerolm(supernet, alpha, found)
    if name in ("params", "decoder_params"):
        counted = total_parameters(supernet) if name == "params" else parameters(supernet)
        return replace(counted, name=name, direction="maximize")
    if name in _SIZES:
        return _additive_proxy(supernet, name, _SIZES[name])
    if name not in PROXIES:
        raise DataError(f"there is no proxy {name!r}; known: {', '.join(PROXIES)}")
    data = [on_device(batch, supernet.model) for batch in ([batches] if isinstance(batches, Mapping) else batches)]
    merge = True if supernet.adapter_parts else None

    def measure(architecture: Architecture) -> float:
        padded = supernet.loadability(architecture) == "stock-padded" and not supernet.block_parts
        compact = padded and supernet.family.static_type is not None
        form = "remote-code" if compact else None  # neurons of padding would count
        return score(extract(supernet, architecture, loadability=form, merge=merge), name, data, target=target)  # type: ignore[arg-type]

    return _measured(supernet, name, measure, batches=data, direction="maximize", mode=target)


_ALPHA_SAMPLES = 200
_SIZES: Mapping[str, OfLayer] = {
    "depth": lambda part, shape: float(not shape.skipped),
    "width_depth": lambda part, shape: float(part.hidden_size * (not shape.skipped)),
}


def _zerolm(supernet: Supernet, given: float | str | None, table: ZeroLMTable) -> Objective:
    wanted = ZeroLMTable.expected(supernet.base, family=supernet.family).sizes
    if table.sizes != wanted:
        raise DataError(
            f"the table is of another model: of {len(table.sizes)} layers, the first {table.sizes[:1]}; the supernet "
            f"has {len(wanted)}, the first {wanted[:1]} (units, size of one, other side)"
        )
    alpha = DEFAULT_ALPHA if given is None else given
    if alpha == "label-free":
        rng = random.Random(0)
        drawn = [supernet.space.sample(rng) for _ in range(_ALPHA_SAMPLES)]
        parts = [table.parts(supernet.layer_shapes(architecture)) for architecture in drawn]
        attention, ffn = zip(*parts, strict=True)
        alpha = label_free_alpha(attention, ffn, [costs.parameters(supernet, a) for a in drawn])
        if not 0 <= alpha <= 1:
            raise DataError(
                f"Algorithm 2 gives alpha={alpha:.3g} here, which would count a part of a model against it; pass alpha="
            )
    if isinstance(alpha, str) or not math.isfinite(alpha):
        raise DataError(f"alpha={alpha!r} must be a number, or 'label-free'")
    weight = float(alpha)

    def contribution(part: LayerPart, shape: LayerShape) -> float:
        of_attention, of_ffn = table.layers[part.index].parts(shape)
        return weight * of_attention + (1 - weight) * of_ffn

    return _additive_proxy(supernet, "zerolm", contribution, mode=f"{weight}{table.parts()}")


def _additive_proxy(supernet: Supernet, name: str, contribution: OfLayer, *, mode: str = "") -> Objective:
    """A proxy that is a sum over layers; its table is its definition."""

    def total(architecture: Architecture) -> float:
        shapes = zip(supernet.layer_parts, supernet.layer_shapes(architecture), strict=True)
        return math.fsum(contribution(part, shape) for part, shape in shapes)

    digest = hashlib.sha256(repr((name, mode, supernet.layer_order, total(supernet.space.largest()))).encode())
    return Objective(
        name, total, "maximize", related=lambda: related_costs(supernet), fingerprint=digest.hexdigest(),
        additive=layer_table(supernet, contribution),
    )  # fmt: skip


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
    """Digest of the weights (a sample of each), the order of layers, blocks and data: a storage mixes no two."""
    order, adapters, blocks = state_of(supernet)
    digest = hashlib.sha256(f"{mode}{order}{adapters or ''}{blocks or ''}".encode())
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


@contextmanager
def _active(supernet: Supernet, architecture: Architecture) -> Iterator[Any]:
    """The model in evaluation mode, in the dtype of its weights, without gradients, with ``architecture`` active."""
    model = supernet.model
    with evaluating(model), without_autocast(model), torch.inference_mode(), supernet.activate(architecture):
        yield model
