"""Objectives from sentence embeddings: similarity of pairs against gold scores, and ranking a corpus for queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hf_elastic.distillation import Pooling
from hf_elastic.errors import DataError
from hf_elastic.evaluation.measuring import Batch, measured, running
from hf_elastic.fingerprints import weights_fingerprint
from hf_elastic.objectives import embeddings
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

Role = Literal["sentence", "query", "document"]
Relevance = Mapping[str, Mapping[str, float]]
"""How relevant which documents are to each query, as qrels files say: ``{query: {document: grade}}``."""

_FEWEST_PAIRS = 3
_QUERIES_AT_ONCE = 256


def spearman(
    supernet: Supernet,
    pairs: Sequence[tuple[str, str]],
    gold: Sequence[float],
    *,
    encoder: Any,
    pooling: Pooling | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Objective:
    """Spearman's correlation of the cosines of sentence pairs with gold scores, as for STS-B; larger is better.

    Not a number where all cosines are equal, which a search counts as a failed evaluation.

    Args:
        pairs: of sentences.
        gold: a score of each pair.
        encoder: a tokenizer: token states of the active subnet are pooled. Or a ``SentenceTransformer`` whose
            transformer is the supernet's model: all its modules and prompts take part.
        pooling: with a tokenizer, ``"mean"`` by default.
        batch_size: sentences of a forward.
        max_length: with a tokenizer, in tokens; by default what the tokenizer says.

    Raises:
        DataError: there are fewer than three pairs, gold scores are missing or all equal, or the encoder is not one of
            this supernet.
    """
    scores = checked_gold(pairs, gold)
    firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
    embed = _embedder(supernet, encoder, pooling=pooling, batch_size=batch_size, max_length=max_length)
    one, other = embed(firsts, "sentence"), embed(seconds, "sentence")
    return measured(
        supernet, "spearman", lambda architecture: pair_correlation(one(architecture), other(architecture), scores),
        direction="maximize", rest=(pairs, scores, *embed.settings),
    )  # fmt: skip


def ndcg(
    supernet: Supernet,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    *,
    relevance: Relevance,
    encoder: Any,
    k: int = 10,
    pooling: Pooling | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Objective:
    """NDCG@k of ranking a corpus by cosine for each query, the mean over queries; larger is better.

    Gains are the grades themselves, discounted by ``log2(1 + rank)`` (Järvelin & Kekäläinen 2002), as trec_eval and
    BEIR compute them. The best ranking is over all documents of a query's ``relevance``. Documents with equal cosines
    stand in the order of the corpus.

    Args:
        queries, corpus: texts by id.
        relevance: grades of documents by query; what is not named has grade 0. Only these queries count.
        k: ranks that count.
        encoder, pooling, batch_size, max_length: as for :func:`spearman`; a ``SentenceTransformer`` encodes by
            ``encode_query`` and ``encode_document``, with the prompts of each.

    Raises:
        DataError: a name is unknown, a query has no relevant document, or the encoder is not one of this supernet.
    """
    asked = checked_relevance(queries, corpus, relevance=relevance, k=k)
    embed = _embedder(supernet, encoder, pooling=pooling, batch_size=batch_size, max_length=max_length)
    of_queries = embed([queries[name] for name in asked], "query")
    of_corpus = embed(list(corpus.values()), "document")
    names = list(corpus)

    def measure(architecture: Architecture) -> float:
        return mean_ndcg(of_queries(architecture), of_corpus(architecture), names, grades=list(asked.values()), k=k)

    rest = (sorted(queries.items()), list(corpus.items()), asked, k, *embed.settings)
    return measured(supernet, f"ndcg@{k}", measure, direction="maximize", rest=rest)


def checked_gold(pairs: Sequence[tuple[str, str]], gold: Sequence[float]) -> list[float]:
    """The gold scores as numbers.

    Raises:
        DataError: they do not fit the pairs, or have no order.
    """
    scores = [float(score) for score in gold]
    if len(pairs) != len(scores):
        raise DataError(f"there are {len(pairs)} sentence pairs and {len(scores)} gold scores; give one score a pair")
    if len(scores) < _FEWEST_PAIRS or len(set(scores)) == 1 or not all(map(math.isfinite, scores)):
        raise DataError("a rank correlation needs at least 3 pairs, and finite gold scores that are not all equal")
    return scores


def pair_correlation(firsts: Tensor, seconds: Tensor, gold: Sequence[float]) -> float:
    """Spearman's correlation of the cosines of rows ``(N, D)`` with gold scores."""
    cosines = F.cosine_similarity(firsts.double(), seconds.double(), dim=-1)  # (N,)
    if not len(cosines) or bool((cosines == cosines[0]).all()):
        return math.nan
    return float(spearmanr(cosines.numpy(), list(gold)).statistic)


def checked_relevance(
    queries: Mapping[str, str], corpus: Mapping[str, str], *, relevance: Relevance, k: int
) -> dict[str, dict[str, float]]:
    """The grades above 0 of each query that has any judgement.

    Raises:
        DataError: a name is unknown, a query has no relevant document, or ``k`` is not positive.
    """
    if k < 1:
        raise DataError(f"k={k} must be at least 1, the ranks that count")
    if not relevance:
        raise DataError("relevance names no query; give {query: {document: grade}}")
    found: dict[str, dict[str, float]] = {}
    for query, judged in relevance.items():
        if query not in queries:
            raise DataError(f"relevance names query {query!r}, which is not among the {len(queries)} queries")
        if unknown := [document for document in judged if document not in corpus]:
            raise DataError(f"relevance of query {query!r} names document {unknown[0]!r}, which the corpus has not")
        found[query] = {document: float(grade) for document, grade in judged.items() if grade > 0}
        if not found[query]:
            raise DataError(f"no document is relevant to query {query!r}; leave it out of relevance")
    return found


def mean_ndcg(
    queries: Tensor, corpus: Tensor, names: Sequence[str], *, grades: Sequence[Mapping[str, float]], k: int
) -> float:
    """NDCG@k, the mean over queries.

    Args:
        queries: embeddings ``(Q, D)``.
        corpus: embeddings ``(N, D)``.
        names: of the documents, in the order of ``corpus``.
        grades: of each query, above 0 by document.
        k: ranks that count.
    """
    queries, corpus = (F.normalize(rows.float(), dim=-1) for rows in (queries, corpus))
    values: list[float] = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        cosines = queries[start : start + _QUERIES_AT_ONCE] @ corpus.t()  # (q, N)
        ranked = cosines.sort(dim=-1, descending=True, stable=True).indices[:, :k].tolist()
        for row, of_query in zip(ranked, grades[start : start + _QUERIES_AT_ONCE], strict=True):
            gains = [of_query.get(names[column], 0.0) for column in row]
            values.append(_discounted(gains) / _discounted(sorted(of_query.values(), reverse=True)[:k]))
    return math.fsum(values) / len(values)


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


Embed = Callable[[Architecture], Tensor]
"""Embeddings ``(N, D)`` of fixed texts by a subnet."""


class _Pooled:
    """Embeds by pooling the token states of the subnet."""

    def __init__(
        self, supernet: Supernet, tokenizer: PreTrainedTokenizerBase, *, pooling: Pooling, batch_size: int,
        max_length: int | None,
    ) -> None:  # fmt: skip
        self.supernet, self.tokenizer = supernet, tokenizer
        self.pooling, self.batch_size, self.max_length = pooling, batch_size, max_length
        self.settings = (pooling, max_length, tokenizer.name_or_path, len(tokenizer))

    def __call__(self, texts: Sequence[str], role: Role) -> Embed:
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        if not all(encoded):
            raise DataError(f"a text gives no token: {texts[[bool(ids) for ids in encoded].index(False)][:40]!r}")
        order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]))  # less padding
        batches = [
            self._padded([encoded[n] for n in order[i : i + self.batch_size]])
            for i in range(0, len(order), self.batch_size)
        ]
        back = torch.tensor(order).argsort()
        return lambda architecture: embeddings(self.supernet, architecture, batches, pooling=self.pooling)[back]

    def _padded(self, rows: list[list[int]]) -> Batch:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0  # masked, so that it changes nothing whichever token it is
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


class _Modules:
    """Embeds by all modules of a SentenceTransformer."""

    def __init__(self, supernet: Supernet, encoder: Any, *, batch_size: int) -> None:
        self.supernet, self.encoder, self.batch_size = supernet, encoder, batch_size
        prompts = dict(encoder.prompts), encoder.default_prompt_name
        modules = weights_fingerprint(encoder.state_dict())  # those around the supernet's model have weights, too
        self.settings = (str(encoder), encoder.max_seq_length, prompts, encoder.truncate_dim, modules)

    def __call__(self, texts: Sequence[str], role: Role) -> Embed:
        def embed(architecture: Architecture) -> Tensor:
            with running(self.supernet, architecture, self.encoder):
                return encoded(self.encoder, texts, role=role, batch_size=self.batch_size)

        return embed


def encoded(encoder: Any, texts: Sequence[str], *, role: Role, batch_size: int = 64) -> Tensor:
    """Embeddings ``(N, D)`` by a SentenceTransformer as it is now, fp32 on the CPU."""
    encode = {"sentence": encoder.encode, "query": encoder.encode_query, "document": encoder.encode_document}[role]
    rows = encode(list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return torch.as_tensor(rows).float().cpu()


def _embedder(
    supernet: Supernet, encoder: Any, *, pooling: Pooling | None, batch_size: int, max_length: int | None
) -> _Pooled | _Modules:
    if isinstance(encoder, PreTrainedTokenizerBase):
        return _Pooled(
            supernet, encoder, pooling=pooling or "mean", batch_size=batch_size,
            max_length=max_length or _longest(supernet, encoder),
        )  # fmt: skip
    if not any(kind.__name__ == "SentenceTransformer" for kind in type(encoder).__mro__):
        raise DataError(
            f"encoder is a {type(encoder).__name__}, expected the tokenizer of the model or a SentenceTransformer of it"
        )
    if not any(module is supernet.base for module in encoder.modules()):
        raise DataError("the SentenceTransformer does not hold the supernet's model; make that of its transformer")
    if pooling is not None or max_length is not None:
        raise DataError("a SentenceTransformer pools and cuts by its own modules; leave out pooling and max_length")
    return _Modules(supernet, encoder, batch_size=batch_size)


def _longest(supernet: Supernet, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest text: what the tokenizer says, and the model has positions for."""
    positions = getattr(supernet.base.config, "max_position_embeddings", None) or tokenizer.model_max_length
    if supernet.base.config.model_type == "roberta":  # its positions begin behind that of padding
        positions -= int(supernet.base.config.pad_token_id or 0) + 1
    return int(min(positions, tokenizer.model_max_length))
