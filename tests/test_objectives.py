from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.stats import spearmanr
from tiny_models import supernet_of, tiny
from torch import Tensor
from torch.nn import functional as F

from hf_elastic import Architecture, DataError, ElasticConfig, Supernet, costs, extract, make_elastic, objectives
from hf_elastic.distillation import Pooling
from hf_elastic.errors import StorageError
from hf_elastic.search import Objective, search_subnets

Batch = dict[str, Tensor]


def padded(rows: list[int], *, seed: int = 0, vocabulary: int = 61) -> Batch:
    """Token ids and mask of sequences of the given lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(rows), max(rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, length in enumerate(rows):
        ids[n, :length] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[n, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_token_labels(batch: Batch) -> Batch:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def token_batches() -> list[Batch]:
    """Batches of different size, length and number of labels, so that no unweighted mean of them is right."""
    first, second = with_token_labels(padded([9, 4, 7])), with_token_labels(padded([5], seed=1))
    second["labels"][0, :3] = -100
    return [first, second]


def split(batches: list[Batch]) -> list[Batch]:
    """The same rows, each as a batch of its own without padding."""
    rows = [{name: t[n : n + 1] for name, t in batch.items()} for batch in batches for n in range(len(batch["labels"]))]
    lengths = [int(row["attention_mask"].sum()) for row in rows]
    return [{name: t[:, :length] for name, t in row.items()} for row, length in zip(rows, lengths, strict=True)]


def cut(supernet: Supernet) -> Architecture:
    """An architecture with every size below the parent's and, where there is one, no skip."""
    sizes = {c.name: c.values[0] if c.kind == "ordered" else "none" for c in supernet.space.choices}
    return supernet.space.canonical(sizes)


def mean_token_loss(model: torch.nn.Module, batches: list[Batch], *, shift: int) -> float:
    """Cross entropy by hand, one position at a time."""
    losses = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            pairs = zip(row[: len(row) - shift], labels[shift:], strict=True)
            losses += [-F.log_softmax(scores, -1)[label] for scores, label in pairs if label != -100]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(("family", "shift"), [("bert", 0), ("llama", 1), ("gpt2", 1)])
@torch.no_grad()
def test_loss_is_the_mean_over_all_scored_labels_of_the_extracted_model(family: str, shift: int) -> None:
    supernet = supernet_of(family)
    measure = objectives.loss(supernet, token_batches())
    for point in (supernet.space.largest(), cut(supernet)):
        assert measure(point) == pytest.approx(
            mean_token_loss(extract(supernet, point), token_batches(), shift=shift), rel=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_loss_does_not_depend_on_how_examples_are_batched(family: str) -> None:
    supernet = supernet_of(family)
    point = cut(supernet)
    together = objectives.loss(supernet, token_batches())(point)
    assert objectives.loss(supernet, split(token_batches()))(point) == pytest.approx(together, rel=1e-5)


def test_loss_of_a_classifier_is_the_mean_over_its_rows() -> None:
    supernet = supernet_of("bert", "sequence")
    batches = [
        {**padded([5, 8, 6]), "labels": torch.tensor([0, 2, 1])}, {**padded([4], seed=1), "labels": torch.tensor([2])},
    ]  # fmt: skip
    model = extract(supernet, cut(supernet))
    with torch.no_grad():
        rows = [-F.log_softmax(model(**{k: v for k, v in b.items() if k != "labels"}).logits, -1) for b in batches]
    wanted = torch.cat([row.gather(1, b["labels"][:, None]) for row, b in zip(rows, batches, strict=True)]).mean()
    assert objectives.loss(supernet, batches)(cut(supernet)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_batch_without_a_scored_label_changes_no_mean() -> None:
    supernet = supernet_of("bert")
    silent = with_token_labels(padded([6, 6], seed=3))
    silent["labels"][:] = -100
    point = cut(supernet)
    for make in (objectives.loss, objectives.accuracy):
        assert make(supernet, [silent, *token_batches()])(point) == make(supernet, token_batches())(point)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    supernet = supernet_of("llama")
    point = cut(supernet)
    mean_loss = objectives.loss(supernet, token_batches())(point)
    assert objectives.perplexity(supernet, token_batches())(point) == pytest.approx(math.exp(mean_loss), rel=1e-12)
    assert objectives.perplexity(supernet, token_batches()).direction == "minimize"


def test_perplexity_stays_finite_for_a_model_that_is_sure_of_the_wrong_token() -> None:
    supernet = supernet_of("llama")
    with torch.no_grad():
        supernet.model.lm_head.weight.mul_(1e5)
    assert math.isfinite(objectives.perplexity(supernet, token_batches())(supernet.space.largest()))


@torch.no_grad()
def test_accuracy_of_a_classifier_counts_rows() -> None:
    supernet = supernet_of("bert", "sequence")
    batches = [
        {**padded([5, 8, 6]), "labels": torch.tensor([0, 2, -100])},
        {**padded([4, 7], seed=1), "labels": torch.tensor([2, 1])},
    ]
    point = cut(supernet)
    model = extract(supernet, point)
    hits = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        hits += [
            int(row.argmax()) == int(label) for row, label in zip(logits, batch["labels"], strict=True) if label != -100
        ]
    assert objectives.accuracy(supernet, batches)(point) == sum(hits) / len(hits)
    assert objectives.accuracy(supernet, batches).direction == "maximize"


@pytest.mark.parametrize(("family", "shift"), [("bert", 0), ("llama", 1), ("gpt2", 1)])
@torch.no_grad()
def test_accuracy_of_a_language_model_compares_a_causal_one_with_the_next_token(family: str, shift: int) -> None:
    supernet = supernet_of(family)
    point = supernet.space.largest()
    batches = token_batches()
    for batch in batches:  # labels that the model hits at some positions
        guess = supernet.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        batch["labels"][:, 2::2] = guess[:, 2 - shift : guess.shape[1] - shift : 2]
    hits = []
    for batch in batches:
        logits = supernet.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, labels in zip(logits.argmax(-1), batch["labels"], strict=True):
            pairs = zip(row[: len(row) - shift], labels[shift:], strict=True)
            hits += [bool(g == label) for g, label in pairs if label != -100]
    assert 0 < sum(hits) < len(hits)
    assert objectives.accuracy(supernet, batches)(point) == pytest.approx(sum(hits) / len(hits))


def sentence_batches() -> list[Batch]:
    return [padded([9, 4, 7]), padded([5, 12], seed=1)]


def encode(model: torch.nn.Module, batches: list[Batch], *, pooling: Pooling = "mean") -> Tensor:
    """Embeddings of a model of its own, one sentence at a time without padding."""
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            states = model(input_ids=ids[: int(mask.sum())][None])[0][0]  # (T, D)
            vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
            rows.append(vector / vector.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@torch.no_grad()
def test_embedding_cosine_is_the_mean_cosine_to_the_parent(pooling: Pooling) -> None:
    supernet = supernet_of("bert", "base")
    parent = encode(extract(supernet, supernet.space.largest()), sentence_batches(), pooling=pooling)
    small = encode(extract(supernet, cut(supernet)), sentence_batches(), pooling=pooling)
    measure = objectives.embedding_cosine(supernet, sentence_batches(), pooling=pooling)
    assert measure(supernet.space.largest()) == pytest.approx(1.0, abs=1e-6)
    assert measure(cut(supernet)) == pytest.approx(float((parent * small).sum(-1).mean()), abs=1e-5)


@torch.no_grad()
def test_similarity_structure_is_the_spearman_correlation_of_all_pairs() -> None:
    supernet = supernet_of("bert", "base")
    parent = encode(extract(supernet, supernet.space.largest()), sentence_batches())
    small = encode(extract(supernet, cut(supernet)), sentence_batches())
    pairs = [(i, j) for i in range(5) for j in range(i)]
    wanted = spearmanr([float(small[i] @ small[j]) for i, j in pairs], [float(parent[i] @ parent[j]) for i, j in pairs])
    measure = objectives.similarity_structure(supernet, sentence_batches())
    assert measure(cut(supernet)) == pytest.approx(wanted.statistic, abs=1e-9)
    assert measure(supernet.space.largest()) == pytest.approx(1.0)


def test_measured_together_embeddings_are_computed_once_and_values_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supernet, batches = supernet_of("bert"), sentence_batches()
    measures = [make(supernet, batches) for make in (objectives.similarity_structure, objectives.embedding_cosine)]
    measures.append(objectives.parameters(supernet))
    alone = {measure.name: measure(cut(supernet)) for measure in measures}
    made, embed = [], objectives.embeddings
    monkeypatch.setattr(objectives, "embeddings", lambda *a, **k: made.append(1) or embed(*a, **k))
    assert objectives.evaluated(measures, cut(supernet)) == alone and len(made) == 1
    with torch.no_grad():  # nothing is kept from one call to the next
        next(iter(supernet.model.parameters())).mul_(-2)
    changed = objectives.evaluated(measures, cut(supernet))
    assert changed["cosine"] == measures[1](cut(supernet)) != alone["cosine"]


def test_embeddings_of_other_sentences_are_not_taken_for_these() -> None:
    supernet, batches = supernet_of("bert"), sentence_batches()
    others = [{name: tensor[:-1] for name, tensor in batches[0].items()}]
    measures = [objectives.similarity_structure(supernet, batches), objectives.embedding_cosine(supernet, others)]
    assert objectives.evaluated(measures, cut(supernet)) == {m.name: m(cut(supernet)) for m in measures}


def test_a_given_teacher_replaces_the_largest_subnet_and_needs_no_unit_length() -> None:
    supernet = supernet_of("bert", "base")
    vectors = objectives.embeddings(supernet, cut(supernet), sentence_batches())
    for make in (objectives.embedding_cosine, objectives.similarity_structure):
        measure = make(supernet, sentence_batches(), teacher=3.0 * vectors)
        assert measure(cut(supernet)) == pytest.approx(1.0, abs=1e-5)
        assert measure(supernet.space.largest()) < 0.999


def test_embeddings_of_a_model_with_a_head_are_those_of_its_encoder() -> None:
    plain, headed = tiny("bert", "base"), tiny("bert", "sequence")
    headed.bert.load_state_dict(plain.state_dict())
    space = ElasticConfig(intermediate_size=[0.5])
    found = [
        objectives.embeddings(s, s.space.smallest(), sentence_batches())
        for s in (make_elastic(plain, space), make_elastic(headed, space))
    ]
    assert torch.equal(found[0], found[1])


def test_costs_are_those_of_the_costs_module_and_know_each_other() -> None:
    supernet = supernet_of("llama")
    point = cut(supernet)
    wanted = {
        objectives.parameters(supernet): costs.parameters(supernet, point),
        objectives.total_parameters(supernet): costs.total_parameters(supernet, point),
        objectives.macs(supernet, seq_len=40, batch_size=2): costs.macs(supernet, point, seq_len=40, batch_size=2),
        objectives.kv_cache_bytes(supernet, seq_len=40): costs.kv_cache_bytes(supernet, point, seq_len=40),
    }
    for objective, cost in wanted.items():
        assert objective(point) == cost
        assert objective.cost and objective.direction == "minimize"
        assert objective.related is not None
        assert set(objective.related()) == {"parameters", "total_parameters", "macs"}


def test_every_measured_objective_knows_the_costs_of_its_supernet() -> None:
    supernet = supernet_of("llama")
    for objective in (objectives.loss(supernet, token_batches()), objectives.perplexity(supernet, token_batches())):
        assert objective.related is not None
        assert objective.related()["macs"](cut(supernet)) == costs.macs(supernet, cut(supernet), seq_len=128)


def test_latency_is_measured_in_seconds_also_on_inputs_of_the_caller() -> None:
    supernet = supernet_of("bert", "base")
    for inputs in (None, padded([5, 6])):
        measure = objectives.latency(supernet, inputs=inputs, repeats=3)
        assert 0 < measure(cut(supernet)) < 60
        assert measure.unit == "s"


def test_measuring_leaves_the_mode_and_the_active_subnet_as_they_were() -> None:
    supernet = supernet_of("bert", "base")
    supernet.model.train()
    with supernet.activate(supernet.space.midpoint()):
        objectives.embedding_cosine(supernet, sentence_batches())(cut(supernet))
        assert supernet.active == supernet.space.midpoint()
    assert supernet.model.training


def test_measuring_gives_each_module_its_own_mode_back() -> None:
    supernet = supernet_of("bert", "base")
    supernet.model.train()
    supernet.model.embeddings.eval()  # frozen, as a caller may want it
    objectives.embedding_cosine(supernet, sentence_batches())(cut(supernet))
    assert supernet.model.training and supernet.model.encoder.training
    assert not supernet.model.embeddings.training and not supernet.model.embeddings.dropout.training


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_measuring_is_in_the_dtype_of_the_weights_also_behind_a_trainer_in_mixed_precision(family: str) -> None:
    supernet = supernet_of(family)
    made = [objectives.loss(supernet, token_batches()), objectives.accuracy(supernet, token_batches())]
    made += [objectives.perplexity(supernet, token_batches())]
    before = {measure.name: measure(cut(supernet)) for measure in made}
    AcceleratorState._reset_state(reset_partial_state=True)  # as the Trainer does; it is one for a process
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(supernet.model)
    AcceleratorState._reset_state(reset_partial_state=True)
    wrapped = supernet.model.forward
    batch = {name: tensor for name, tensor in token_batches()[0].items() if name != "labels"}
    kernels: list[torch.dtype] = []
    hook = supernet.model.get_output_embeddings().register_forward_hook(lambda *a: kernels.append(a[2].dtype))
    supernet.model(**batch)
    assert kernels == [torch.bfloat16], "accelerate did not wrap the forward: this test shows nothing"
    kernels.clear()
    assert {measure.name: measure(cut(supernet)) for measure in made} == before
    objectives.latency(supernet, repeats=3)(cut(supernet))
    assert set(kernels) == {torch.float32}
    hook.remove()
    assert supernet.model.forward is wrapped


def test_measuring_is_in_evaluation_mode() -> None:
    supernet = make_elastic(
        tiny("bert", "base", hidden_dropout_prob=0.5).train(), ElasticConfig(intermediate_size=[0.5])
    )
    measure = objectives.embedding_cosine(supernet, sentence_batches())
    assert measure(supernet.space.largest()) == pytest.approx(1.0, abs=1e-6)


def fingerprint(supernet: Supernet, batches: list[Batch], **given: object) -> str:
    return objectives.embedding_cosine(supernet, batches, **given).fingerprint  # type: ignore[arg-type]


def test_the_fingerprint_is_the_same_for_the_same_weights_and_data() -> None:
    one, other = (fingerprint(supernet_of("bert", "base"), sentence_batches()) for _ in range(2))
    assert one == other != ""


def _scaled(supernet: Supernet) -> str:
    with torch.no_grad():
        supernet.model.encoder.layer[1].output.dense.weight.mul_(1.01)
    return fingerprint(supernet, sentence_batches(), teacher=torch.ones(5, 32))


CHANGES: dict[str, Callable[[Supernet], str]] = {
    "weights": _scaled,
    "token ids": lambda s: fingerprint(
        s, [padded([9, 4, 7], seed=5), sentence_batches()[1]], teacher=torch.ones(5, 32)
    ),
    "order": lambda s: fingerprint(s, sentence_batches()[::-1], teacher=torch.ones(5, 32)),
    "teacher": lambda s: fingerprint(s, sentence_batches(), teacher=torch.eye(5, 32)),
    "pooling": lambda s: fingerprint(s, sentence_batches(), teacher=torch.ones(5, 32), pooling="cls"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with(change: str) -> None:
    before = fingerprint(supernet_of("bert", "base"), sentence_batches(), teacher=torch.ones(5, 32))
    assert CHANGES[change](supernet_of("bert", "base")) != before


def test_what_is_active_does_not_change_the_fingerprint() -> None:
    supernet = supernet_of("bert", "base")
    before = fingerprint(supernet, sentence_batches())
    with supernet.activate(cut(supernet)):
        assert fingerprint(supernet, sentence_batches()) == before


def _ordered(*order: int) -> Supernet:
    config = ElasticConfig(num_hidden_layers=[1, 2, 3], layer_order=order)
    return make_elastic(tiny("bert", "base"), config)


def test_the_order_of_layers_is_in_every_fingerprint() -> None:
    one, other = _ordered(0, 1, 2), _ordered(1, 0, 2)
    assert one.space.digest == other.space.digest
    made: list[Callable[[Supernet], Objective]] = [
        lambda s: objectives.embedding_cosine(s, sentence_batches(), teacher=torch.ones(5, 32)),
        lambda s: objectives.similarity_structure(s, sentence_batches(), teacher=torch.ones(5, 32)),
        objectives.latency,
        objectives.parameters,
        objectives.total_parameters,
        objectives.macs,
        lambda s: objectives.kv_cache_bytes(s, seq_len=8),
    ]
    for make in made:
        assert make(one).fingerprint == make(_ordered(0, 1, 2)).fingerprint != make(other).fingerprint


def test_the_fingerprint_of_a_cost_changes_with_its_arguments_and_with_the_model() -> None:
    supernet = supernet_of("llama")
    made = [
        objectives.parameters(supernet),
        objectives.total_parameters(supernet),
        objectives.parameters(supernet_of("gpt2")),
        *(objectives.macs(supernet, seq_len=length, batch_size=size) for length, size in ((16, 1), (4096, 1), (16, 2))),
        *(objectives.kv_cache_bytes(supernet, seq_len=length) for length in (16, 32)),
    ]
    assert len({objective.fingerprint for objective in made}) == len(made)
    assert objectives.macs(supernet).fingerprint == objectives.macs(supernet_of("llama"), seq_len=128).fingerprint


def test_a_storage_does_not_answer_for_macs_at_another_length(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    options = {"evaluations": 4, "storage": f"sqlite:///{tmp_path / 's.db'}", "progress": False}
    for length in (16, 16):
        search_subnets(supernet.space, [objectives.macs(supernet, seq_len=length)], **options)
    with pytest.raises(StorageError, match=r"objectives \(minimize macs \[.{8}\]\) instead of"):
        search_subnets(supernet.space, [objectives.macs(supernet, seq_len=4096)], **options)


def test_the_fingerprint_of_a_latency_changes_with_shapes_and_precision() -> None:
    made = [
        objectives.latency(supernet_of("bert", "base"), inputs=inputs) for inputs in (None, padded([5, 6]), padded([5]))
    ]
    half = supernet_of("bert", "base")
    half.model.to(torch.bfloat16)
    made.append(objectives.latency(half))
    assert len({objective.fingerprint for objective in made}) == len(made)
    same = objectives.latency(supernet_of("bert", "base"), inputs=padded([6, 5], seed=3))
    assert same.fingerprint == made[1].fingerprint


def _ignored() -> list[Batch]:
    return [{**padded([4]), "labels": torch.full((1, 4), -100)}]


UNUSABLE: dict[str, tuple[Callable[[Supernet], object], str]] = {
    "no batch": (lambda s: objectives.loss(s, []), "no batch"),
    "no labels": (lambda s: objectives.loss(s, [padded([4])]), "no 'labels'"),
    "no labels for accuracy": (lambda s: objectives.accuracy(s, [padded([4])]), "no 'labels'"),
    "all ignored": (lambda s: objectives.loss(s, _ignored()), "no label"),
    "all ignored for accuracy": (lambda s: objectives.accuracy(s, _ignored()), "no label"),
    "no ids": (lambda s: objectives.embedding_cosine(s, [{"x": torch.ones(1)}]), "no 'input_ids'"),
    "two sentences": (lambda s: objectives.similarity_structure(s, [padded([4, 5])]), "2 sentences"),
    "a teacher of others": (
        lambda s: objectives.embedding_cosine(s, [padded([4, 5])], teacher=torch.ones(3, 32)), "3 embeddings for 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_validation_data_is_named_at_once(case: str) -> None:
    make, words = UNUSABLE[case]
    with pytest.raises(DataError, match=words) as caught:
        make(supernet_of("bert", "base" if "sentence" in case or "ids" in case or "teacher" in case else "lm"))
    assert "\n" not in str(caught.value)


def test_the_first_token_of_a_causal_model_is_no_scored_label() -> None:
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]]), "labels": torch.tensor([[5]])}
    with pytest.raises(DataError, match="first of their sequence"):
        objectives.loss(supernet_of("llama"), [batch])
