"""Spearman and NDCG of sentence encoders: equal to SciPy, scikit-learn and hand computation on the extracted model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from tiny_checkpoints import bert_tokenizer, sentence_encoder, sentences
from torch import Tensor
from transformers import AutoModel

from hf_elastic import (
    Architecture,
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    Supernet,
    add_lora,
    extract,
    make_elastic,
    search_subnets,
)
from hf_elastic.evaluation import ndcg, spearman
from hf_elastic.evaluation.measuring import running
from hf_elastic.evaluation.similarity import encoded, mean_ndcg, pair_correlation
from hf_elastic.objectives import parameters

SPACE = ElasticConfig(intermediate_size=[16, 32, 64], num_attention_heads=[1, 4], skip=["layer"])
PAIRS = list(zip(sentences(14), sentences(14, seed=1), strict=True))
GOLD = [float((7 * n) % 5) for n in range(len(PAIRS))]
QUERIES = {f"q{n}": text for n, text in enumerate(sentences(5, seed=2))}
CORPUS = {f"d{n}": text for n, text in enumerate(sentences(23, seed=3))}
TEXTS = sentences(4, seed=4)
RELEVANCE = {
    "q0": {"d1": 2, "d5": 1, "d7": 0}, "q1": {"d2": 1}, "q3": {f"d{n}": 1 + n % 3 for n in range(15)}, "q4": {"d22": 3},
}  # fmt: skip


@pytest.fixture
def supernet(tmp_path: Path) -> Supernet:
    return make_elastic(AutoModel.from_pretrained(sentence_encoder(tmp_path / "encoder")), SPACE)


def cut(supernet: Supernet) -> Architecture:
    return supernet.space.canonical({c.name: c.values[0] if c.kind == "ordered" else "none" for c in supernet.space})


@torch.no_grad()
def embed(supernet: Supernet, architecture: Architecture, texts: list[str], *, pooling: str = "mean") -> Tensor:
    """Embeddings of the extracted model, one sentence at a time."""
    model = extract(supernet, architecture).eval()
    rows = []
    for text in texts:
        states = model(**bert_tokenizer()(text, return_tensors="pt"))[0][0]  # (T, D)
        vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        rows.append(vector / vector.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_spearman_is_the_correlation_of_the_extracted_models_cosines(supernet: Supernet, pooling: Any) -> None:
    measure = spearman(supernet, PAIRS, GOLD, encoder=bert_tokenizer(), pooling=pooling, batch_size=4)
    values = []
    for point in (supernet.space.largest(), cut(supernet)):
        one, other = (embed(supernet, point, [pair[side] for pair in PAIRS], pooling=pooling) for side in (0, 1))
        values.append(float(spearmanr((one * other).sum(-1), GOLD).statistic))
        assert measure(point) == pytest.approx(values[-1], abs=1e-9)
    assert values[0] != values[1]
    assert measure.name == "spearman" and measure.direction == "maximize"
    assert supernet.active == supernet.space.largest()


def test_a_sentence_transformer_runs_all_its_modules(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(str(sentence_encoder(tmp_path / "encoder")), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = sentence_transformers.models.Dense(32, 8)
    encoder.append(dense)
    supernet = make_elastic(encoder[0].auto_model, SPACE)
    measure = spearman(supernet, PAIRS, GOLD, encoder=encoder, batch_size=3)
    point = cut(supernet)
    vectors = [embed(supernet, point, [pair[side] for pair in PAIRS]) for side in (0, 1)]  # normalised before Dense
    with torch.no_grad():
        one, other = (dense({"sentence_embedding": v})["sentence_embedding"] for v in vectors)
    cosines = torch.nn.functional.cosine_similarity(one, other)
    assert measure(point) == pytest.approx(float(spearmanr(cosines, GOLD).statistic), abs=1e-9)
    assert measure(supernet.space.largest()) != measure(point)
    encoder.train()
    measure(point)
    assert encoder.training, "an evaluation left the encoder in evaluation mode"


def test_fingerprints_tell_the_weights_and_settings_of_the_modules_around_the_model_apart(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(sentence_encoder(tmp_path / "encoder"))

    def made(*, seed: int = 0, **settings: Any) -> str:
        encoder = sentence_transformers.SentenceTransformer(folder, device="cpu", **settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder.append(sentence_transformers.models.Dense(32, 8))
        supernet = make_elastic(encoder[0].auto_model, SPACE)
        return spearman(supernet, PAIRS, GOLD, encoder=encoder).fingerprint

    assert made() == made()
    prompts = {"prompts": {"short": "the "}}
    assert (
        len({made(), made(seed=1), made(truncate_dim=4), made(**prompts), made(**prompts, default_prompt_name="short")})
        == 5
    )


def test_measuring_is_in_the_dtype_of_the_weights_also_behind_a_trainer_in_mixed_precision(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(str(sentence_encoder(tmp_path / "encoder")), device="cpu")
    supernet = make_elastic(encoder[0].auto_model, SPACE)
    vectors = measuring_embeddings(supernet, encoder)
    AcceleratorState._reset_state(reset_partial_state=True)  # as the Trainer does; it is one for a process
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(encoder)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.equal(encoded(encoder, TEXTS, role="sentence"), vectors), "not wrapped"
    assert torch.equal(measuring_embeddings(supernet, encoder), vectors)


def measuring_embeddings(supernet: Supernet, encoder: Any) -> Tensor:
    """Embeddings of texts as the objectives make them."""
    with running(supernet, supernet.space.largest(), encoder):
        return encoded(encoder, TEXTS, role="sentence")


def test_prompts_of_a_sentence_transformer_are_those_of_queries_and_documents(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(sentence_encoder(tmp_path / "encoder"))
    prompts = {"query": "find small ", "document": "the old house "}
    encoder = sentence_transformers.SentenceTransformer(folder, device="cpu", prompts=prompts)
    supernet = make_elastic(encoder[0].auto_model, SPACE)
    measure = ndcg(supernet, QUERIES, CORPUS, relevance=RELEVANCE, encoder=encoder, k=5)
    point = cut(supernet)
    queries = embed(supernet, point, [prompts["query"] + QUERIES[name] for name in RELEVANCE])
    corpus = embed(supernet, point, [prompts["document"] + text for text in CORPUS.values()])
    assert measure(point) == pytest.approx(by_sklearn(queries @ corpus.t(), k=5), abs=1e-6)
    plain = ndcg(supernet, QUERIES, CORPUS, relevance=RELEVANCE, encoder=bert_tokenizer(), k=5)
    assert measure.fingerprint != plain.fingerprint and measure(point) != plain(point)


def by_sklearn(cosines: Tensor, *, k: int) -> float:
    grades = [[RELEVANCE[query].get(document, 0) for document in CORPUS] for query in RELEVANCE]
    return float(ndcg_score(grades, cosines.numpy(), k=k))


@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_ndcg_is_scikit_learns_on_the_extracted_models_cosines(supernet: Supernet, k: int) -> None:
    measure = ndcg(supernet, QUERIES, CORPUS, relevance=RELEVANCE, encoder=bert_tokenizer(), k=k, batch_size=6)
    for point in (supernet.space.largest(), cut(supernet)):
        queries = embed(supernet, point, [QUERIES[name] for name in RELEVANCE])
        cosines = queries @ embed(supernet, point, list(CORPUS.values())).t()
        assert measure(point) == pytest.approx(by_sklearn(cosines, k=k), abs=1e-6)
    assert measure.name == f"ndcg@{k}" and measure.direction == "maximize"


def test_ndcg_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    corpus = torch.tensor([[1.0, 0.1], [0.5, 0.5], [0.0, 3.0]])  # ranks: a b c and c b a
    names = ["a", "b", "c"]
    grades = [{"b": 2.0, "c": 1.0}, {"c": 1.0}]
    first = (2 / math.log2(3) + 1 / math.log2(4)) / (2 / math.log2(2) + 1 / math.log2(3))
    assert mean_ndcg(queries, corpus, names, grades=grades, k=3) == pytest.approx((first + 1.0) / 2)
    assert mean_ndcg(queries, corpus, names, grades=grades, k=1) == pytest.approx((0.0 + 1.0) / 2)


def test_equal_cosines_are_ranked_in_the_order_of_the_corpus() -> None:
    one = torch.ones(1, 2)
    for names, wanted in ((["a", "b"], 1.0), (["b", "a"], 1 / math.log2(3))):
        assert mean_ndcg(one, torch.ones(2, 2), names, grades=[{"a": 1.0}], k=2) == pytest.approx(wanted)


def test_many_queries_are_ranked_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(600, 6, generator=generator), torch.randn(40, 6, generator=generator)
    names, grades = [str(n) for n in range(40)], [{str(n % 40): 1.0 + n % 2} for n in range(600)]
    alone = [mean_ndcg(queries[n : n + 1], corpus, names, grades=grades[n : n + 1], k=10) for n in range(600)]
    assert mean_ndcg(queries, corpus, names, grades=grades, k=10) == pytest.approx(sum(alone) / 600)


def test_equal_cosines_everywhere_have_no_correlation_and_fail_an_evaluation(supernet: Supernet) -> None:
    assert math.isnan(pair_correlation(torch.ones(4, 3), torch.ones(4, 3), [1, 2, 3, 4]))
    same = [("the dog runs today", "the dog runs today")] * 4
    measure = spearman(supernet, same, [1, 2, 3, 4], encoder=bert_tokenizer())
    assert math.isnan(measure(supernet.space.largest()))


@pytest.mark.parametrize(
    ("pairs", "gold", "message"),
    [
        (PAIRS, GOLD[:3], "14 sentence pairs and 3 gold scores"),
        (PAIRS[:2], GOLD[:2], "at least 3 pairs"),
        (PAIRS, [1.0] * len(PAIRS), "not all equal"),
        (PAIRS, [math.nan, *GOLD[1:]], "finite gold scores"),
    ],
)
def test_gold_scores_that_cannot_be_correlated_are_refused(
    supernet: Supernet, pairs: Any, gold: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        spearman(supernet, pairs, gold, encoder=bert_tokenizer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevance": {"q9": {"d1": 1}}}, "names query 'q9', which is not among the 5"),
        ({"relevance": {"q1": {"d99": 1}}}, "document 'd99', which the corpus has not"),
        ({"relevance": {"q1": {"d1": 0}}}, "no document is relevant to query 'q1'"),
        ({"relevance": {}}, "names no query"),
        ({"k": 0}, "k=0 must be at least 1"),
    ],
)
def test_judgements_that_do_not_fit_are_refused(supernet: Supernet, change: dict[str, Any], message: str) -> None:
    settings = {"relevance": RELEVANCE, "encoder": bert_tokenizer(), **change}
    with pytest.raises(DataError, match=message):
        ndcg(supernet, QUERIES, CORPUS, **settings)


def test_an_encoder_of_another_model_is_refused(supernet: Supernet, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    other = sentence_transformers.SentenceTransformer(str(sentence_encoder(tmp_path / "other")), device="cpu")
    with pytest.raises(DataError, match="does not hold the supernet's model"):
        spearman(supernet, PAIRS, GOLD, encoder=other)
    with pytest.raises(DataError, match="encoder is a str, expected the tokenizer"):
        spearman(supernet, PAIRS, GOLD, encoder="all-MiniLM")
    of_it = make_elastic(other[0].auto_model, SPACE)
    with pytest.raises(DataError, match="leave out pooling and max_length"):
        spearman(of_it, PAIRS, GOLD, encoder=other, pooling="cls")


def test_a_text_without_a_token_is_refused(supernet: Supernet) -> None:
    bare = bert_tokenizer()
    bare._tokenizer.post_processor = None
    with pytest.raises(DataError, match="a text gives no token"):
        spearman(supernet, [*PAIRS, ("", "the dog")], [*GOLD, 1.0], encoder=bare)


def test_texts_beyond_the_models_positions_are_cut(supernet: Supernet) -> None:
    long = " ".join(["dog"] * 500)
    tokenizer = bert_tokenizer()
    tokenizer.model_max_length = 10**9
    measure = spearman(supernet, [*PAIRS, (long, "the dog")], [*GOLD, 1.0], encoder=tokenizer)
    assert math.isfinite(measure(supernet.space.largest()))
    short = spearman(supernet, PAIRS, GOLD, encoder=tokenizer, max_length=4)
    assert short(supernet.space.largest()) != spearman(supernet, PAIRS, GOLD, encoder=tokenizer)(
        supernet.space.largest()
    )


def test_adapters_take_part(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(sentence_encoder(tmp_path / "encoder"))
    adapted = add_lora(model, ElasticLoraConfig(r=8, ranks=[2], target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    measure = spearman(adapted, PAIRS, GOLD, encoder=bert_tokenizer())
    for point in (adapted.space.largest(), adapted.space.smallest()):
        merged = extract(adapted, point, merge=True).eval()
        rows = []
        with torch.no_grad():
            for pair in PAIRS:
                vectors = [merged(**bert_tokenizer()(text, return_tensors="pt"))[0][0].mean(0) for text in pair]
                rows.append(float(torch.nn.functional.cosine_similarity(*vectors, dim=0)))
        assert measure(point) == pytest.approx(float(spearmanr(rows, GOLD).statistic), abs=1e-9)


def test_a_search_goes_by_retrieval(supernet: Supernet) -> None:
    goal = ndcg(supernet, QUERIES, CORPUS, relevance=RELEVANCE, encoder=bert_tokenizer())
    result = search_subnets(
        supernet.space, [goal, parameters(supernet)], evaluations=8, within={"parameters": 0.8}, seed=0
    )
    best = result.best("ndcg@10")
    assert best.values["ndcg@10"] == goal(best.architecture)
