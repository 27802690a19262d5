"""Degenerate inputs: one row, one token, one sample, tokens all alike, rows of padding; right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import block_models
import numpy as np
import pytest
import torch
from half_models import batches, distance, finite, output, refused
from routed_models import ALL
from tiny_models import point, supernet_of, tiny

from hf_elastic import (
    ElasticError,
    RoutingConfig,
    add_routing,
    calibrate_routing,
    fit_routers,
    fuse_heads,
    make_elastic,
    measure_quality_table,
    objectives,
    quantize_,
    refit,
    routing_statistics,
    score,
    sort_by_importance_,
    sparsify_,
)
from hf_elastic.distillation import (
    dist_loss,
    embedding_loss,
    hidden_state_loss,
    logits_loss,
    pooled,
    relational_loss,
    top_k_distribution,
    top_k_loss,
)
from hf_elastic.head_similarity import HeadFeatures, linear_cka
from hf_elastic.least_squares import NormalEquations, Scatter, elimination_order
from hf_elastic.proxies import PROXIES
from hf_elastic.training.pca import PreActivations, pca_score

FAMILIES = ("bert", "llama", "gpt2")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
Data = list[dict[str, torch.Tensor]]


def of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Data:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask, "labels": ids.clone()}]


def padded_row() -> Data:
    """A row of padding alone beside rows with tokens."""
    (first, *others) = batches(tiny("bert"), count=6, rows=4, tokens=16, labels=True)
    first["attention_mask"][1] = 0
    first["labels"][1] = -100
    return [first, *others]


INPUTS: dict[str, Callable[[], Data]] = {
    "one row": lambda: of(torch.randint(3, 61, (1, 60), generator=torch.Generator().manual_seed(0))),
    "one token": lambda: of(torch.tensor([[7]])),
    "rows of one token": lambda: of(torch.arange(3, 60).view(-1, 1)),
    "one word": lambda: of(torch.full((4, 20), 7)),
    "one batch again and again": lambda: batches(tiny("bert"), count=1, labels=True) * 6,
    "a row of padding": padded_row,
}
CASES = pytest.mark.parametrize("case", sorted(INPUTS))


def unmasked(data: Data) -> Data:
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in data]


@CASES
@FAMILY
@pytest.mark.parametrize("method", ["activation", "reconstruction", "taylor"])
def test_units_are_sorted_by_finite_scores(method: Any, family: str, case: str) -> None:
    supernet, data = supernet_of(family), INPUTS[case]()
    if case in ("one token", "rows of one token") and family != "bert" and method == "taylor":
        with refused("the loss of a batch is nan", "labels"):  # the mean over none
            sort_by_importance_(supernet, data, method=method)
        return
    (feed, *_) = batches(supernet.model)
    before = output(supernet.model, feed)
    scores = sort_by_importance_(supernet, data, method=method)
    assert all(bool(torch.isfinite(values).all()) for values in scores.values())
    assert distance(output(supernet.model, feed), before) <= 1e-5


def test_a_batch_again_and_again_is_scored_as_once_and_padding_not_at_all() -> None:
    for method in ("activation", "taylor"):
        once = sort_by_importance_(supernet_of("bert"), INPUTS["one batch again and again"]()[:1], method=method)  # type: ignore[arg-type]
        often = sort_by_importance_(supernet_of("bert"), INPUTS["one batch again and again"](), method=method)  # type: ignore[arg-type]
        assert max(distance(often[name], once[name]) for name in once) <= 1e-6
    with_row = INPUTS["a row of padding"]()
    without = [{n: v[torch.tensor([0, 2, 3])] for n, v in with_row[0].items()}, *with_row[1:]]
    found, wanted = (sort_by_importance_(supernet_of("llama"), data) for data in (with_row, without))
    assert max(distance(found[name], wanted[name]) for name in wanted) <= 1e-6


@CASES
@FAMILY
def test_a_repair_ends_nearer_to_the_parent_or_says_what_to_pass(family: str, case: str) -> None:
    supernet, data = supernet_of(family), unmasked(INPUTS[case]())
    reports: list[Any] = []
    try:
        model = refit(supernet, point(supernet, ffn0=16, heads1=1), data, on_report=reports.append)
    except ElasticError as error:
        assert "\n" not in str(error) and "pass" in str(error)
        assert case in ("one token", "one batch again and again", "one word", "one row")
        return
    assert finite(model) and np.isfinite(reports[0].error) and reports[0].error <= reports[0].error_cut


def test_too_few_tokens_for_a_repair_are_counted() -> None:
    supernet = supernet_of("llama")
    with refused("1 calibration tokens cannot determine 16 inputs", "pass at least 16"):
        refit(supernet, point(supernet, ffn0=16), unmasked(INPUTS["one token"]()))


def test_tokens_all_alike_move_the_bias_alone() -> None:
    x = torch.full((50, 4), 3.0)
    y = torch.full((50, 2), 5.0)
    sums = NormalEquations(4, 2)
    sums.add(x, y)
    start = torch.arange(8.0).view(4, 2) / 8
    solved = sums.solve(start, torch.zeros(2), ridge=1e-3)
    assert torch.equal(solved.weight, start.double()) and solved.error_after <= 1e-18
    assert solved.bias is not None
    assert torch.allclose(solved.bias, 5 - (x[:1].double() @ start.double())[0])
    scatter = Scatter(4)
    scatter.add(x)
    assert scatter.matrix(centred=True).abs().max() == 0
    assert sorted(elimination_order(scatter.matrix(centred=True), start).tolist()) == [0, 1, 2, 3]


@CASES
@FAMILY
@pytest.mark.parametrize("measure", ["hidden", "kl", "similarity"])
def test_a_quality_table_is_finite_or_says_what_is_missing(measure: str, family: str, case: str) -> None:
    supernet, data = supernet_of(family), unmasked(INPUTS[case]())
    calibration = batches(supernet.model, count=6, rows=6, tokens=16)
    sentences = sum(len(batch["input_ids"]) for batch in data)
    if measure == "similarity" and sentences < 2:
        with refused("at least two"):
            measure_quality_table(supernet, calibration, data, measure=measure)
        return
    table = measure_quality_table(supernet, calibration, data, measure=measure)
    assert all(np.isfinite(damage) and damage >= -1e-6 for row in table.damages for damage in row.values())
    if measure == "similarity" and case == "one word":
        assert max(damage for row in table.damages for damage in row.values()) <= 1e-9  # all sentences are one


@CASES
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_zeros_and_integers_of_any_calibration_are_finite(family: str, case: str) -> None:
    for method in ("wanda", "gptq"):
        model, data = tiny(family), unmasked(INPUTS[case]())
        if method == "wanda":
            assert sparsify_(model, data).share == pytest.approx(0.5, abs=0.02)
        else:
            report = quantize_(model, data, group_size=16)
            assert all(0 <= error < 0.05 for error in report.errors.values())
        assert finite(model)


@CASES
@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_are_fused_without_nan_or_too_few_tokens_are_told(family: str, mode: Any, case: str) -> None:
    model, data = tiny(family), unmasked(INPUTS[case]())
    if case == "one token":
        with refused("a single token has no covariance"):
            fuse_heads(model, data, mode=mode, threshold=0.5, min_heads=1)
        return
    fused, report = fuse_heads(model, data, mode=mode, threshold=0.5, min_heads=1)
    assert finite(fused) and all(bool(torch.isfinite(entry.cka).all()) for entry in report.layers)
    if case == "one word" and family == "bert":  # but for its positions, which BERT has in its first layer
        assert all(0 <= float(entry.cka.min()) <= 1 for entry in report.layers)


def test_constant_contexts_are_alike_to_none() -> None:
    features = HeadFeatures(3, 4)
    features.add(torch.full((2, 5, 12), 1e3))
    assert features.constant_heads() == (0, 1, 2) and torch.equal(features.cka(), torch.eye(3, dtype=torch.float64))
    assert linear_cka(torch.ones(5, 2), torch.randn(5, 2)) == 0.0


def test_pre_activations_that_do_not_vary_have_no_direction() -> None:
    for value in (0.0, 1e3, -7.25):
        moments = PreActivations(6)
        moments.add(torch.full((2, 9, 6), value))
        assert pca_score(moments, inputs=6) == 0.0
    single = PreActivations(6)
    single.add(torch.randn(1, 1, 6))
    with refused("at least 2 tokens"):
        pca_score(single, inputs=6)


@CASES
@FAMILY
def test_routers_are_fitted_and_calibrated_or_say_what_to_pass(family: str, case: str) -> None:
    supernet = add_routing(tiny(family), RoutingConfig(**ALL))
    data = unmasked(INPUTS[case]())
    if case == "one token":
        with refused("1 calibration tokens cannot determine 32 inputs"):
            fit_routers(supernet, data)
        return
    if case == "one word" and family == "llama":  # whose positions are in attention alone, so that states are all alike
        with refused("constant or copies of others", "pass more text"):
            fit_routers(supernet, data)
        return
    fit = fit_routers(supernet, data)
    assert np.isfinite(fit.distance) and all(-1e-9 <= each.explained <= 1 for each in fit.routers)
    try:
        calibrate_routing(supernet, data)
    except ElasticError as error:
        assert case in ("one word", "rows of one token") and "\n" not in str(error) and "one score" in str(error)
        return
    statistics = routing_statistics(supernet, data, supernet.space.smallest())
    assert all(0 <= each.share <= 1 and np.isfinite(each.share) for each in statistics.routers)
    assert statistics.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    with supernet.activate(supernet.space.smallest()):
        found = output(supernet.model, data[0])
    assert bool(torch.isfinite(found[data[0]["attention_mask"].bool()]).all())


OF_A_LOSS = {
    "grad_norm", "snip", "grasp", "fisher", "eznas", "lpzero", "jacobian_cosine", "synaptic_saliency",
    "synaptic_diversity", "head_importance",
}  # fmt: skip


@CASES
@FAMILY
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_scores_are_finite_or_refused(name: str, family: str, case: str) -> None:
    model, data = tiny(family), INPUTS[case]()[:1]
    if (name, family) == ("jacobian_cosine", "llama"):
        return
    no_label = case == "one token" and family != "bert" or case == "rows of one token" and family != "bert"
    if no_label and name in OF_A_LOSS:
        with refused("the model's loss is not finite"):  # the mean over no label
            score(model, name, data)
        data = unmasked(data)
    assert np.isfinite(score(model, name, data))


@FAMILY
@pytest.mark.parametrize("case", ["one row", "one token", "rows of one token", "one word", "a row of padding"])
def test_objectives_are_right_or_told_apart(family: str, case: str) -> None:
    supernet, data = supernet_of(family), INPUTS[case]()
    architecture = point(supernet, ffn0=16, heads1=1)
    if case in ("one token", "rows of one token") and family != "bert":
        with refused("no label", "scored"):
            objectives.loss(supernet, data)
    else:
        value = objectives.loss(supernet, data)(architecture)
        assert value == pytest.approx(cross_entropy_by_hand(supernet, architecture, data, shift=family != "bert"))
    cosine = objectives.embedding_cosine(supernet, unmasked(data))
    assert cosine(supernet.space.largest()) == pytest.approx(1.0 if case != "a row of padding" else 23 / 24, abs=1e-6)
    assert np.isfinite(cosine(architecture))


def cross_entropy_by_hand(supernet: Any, architecture: Any, data: Data, *, shift: bool) -> float:
    """Mean over scored labels, in NumPy's float64."""
    total, count = 0.0, 0
    for batch in data:
        with supernet.activate(architecture):
            plain = {name: value for name, value in batch.items() if name != "labels"}
            logits = output(supernet.model, plain).double().numpy()
        labels = batch["labels"].numpy()
        logits, labels = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        kept = labels != -100
        chosen = logits[kept]
        peaks = chosen.max(-1, keepdims=True)
        sums = np.log(np.exp(chosen - peaks).sum(-1)) + peaks[:, 0]
        total += float((sums - chosen[np.arange(len(chosen)), labels[kept]]).sum())
        count += int(kept.sum())
    return total / count


def test_similarities_that_are_all_one_are_a_failed_evaluation_not_a_number() -> None:
    supernet = supernet_of("bert")
    objective = objectives.similarity_structure(supernet, unmasked(INPUTS["one word"]()))
    with np.errstate(all="ignore"), pytest.warns(Warning, match="constant"):
        assert np.isnan(objective(supernet.space.largest()))  # a search counts it as failed


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward": logits_loss,
    "reverse": lambda s, t: logits_loss(s, t, divergence="reverse"),
    "mse": lambda s, t: logits_loss(s, t, divergence="mse"),
    "dist": dist_loss,
    "top k": lambda s, t: top_k_loss(s, top_k_distribution(t, 3)),
    "embeddings": lambda s, t: embedding_loss(s[:, 0], t[:, 0]),
    "relational": lambda s, t: relational_loss(s[:, 0], t[:, 0]),
    **{
        f"states {name}": (lambda s, t, name=name: hidden_state_loss([s], [t], distance=name))
        for name in ("mse", "cosine", "relative", "pearson")
    },
}
TENSORS: dict[str, torch.Tensor] = {
    "zeros": torch.zeros(2, 3, 8),
    "constant": torch.full((2, 3, 8), 1e3),
    "one row": torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)),
    "one token": torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1)),
    "huge": 1e18 * torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("teacher", sorted(TENSORS))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_and_their_gradients_are_finite_and_zero_where_both_agree(name: str, teacher: str) -> None:
    taught = TENSORS[teacher]
    for student in (taught.clone(), torch.zeros_like(taught), torch.ones_like(taught)):
        student.requires_grad_()
        loss = LOSSES[name](student, taught)
        loss.backward()
        assert bool(torch.isfinite(loss)) and student.grad is not None
        assert bool(torch.isfinite(student.grad).all()), (name, teacher)
        assert float(loss.detach()) >= -1e-5
    same = float(LOSSES[name](taught, taught))
    without = teacher in ("zeros", "constant", "huge")  # a correlation, or a direction
    assert abs(same) <= 1e-5 or name in ("dist", "embeddings", "states cosine") and without


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_row_of_padding_is_pooled_to_something_finite(pooling: Any) -> None:
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    found = pooled(hidden, mask, pooling=pooling)
    wanted = {"mean": hidden[0, :3].mean(0), "cls": hidden[0, 0], "last": hidden[0, 2]}[pooling]
    assert torch.allclose(found[0], wanted) and bool(torch.isfinite(found[1]).all())
    assert pooling != "mean" or torch.equal(found[1], torch.zeros(3))


@CASES
@pytest.mark.parametrize("kind", block_models.TYPES)
def test_candidate_blocks_take_any_input(kind: str, case: str) -> None:
    supernet = make_elastic(block_models.tiny(kind, **block_models.FUSED))
    (feed, *_) = unmasked(INPUTS[case]())
    feed = {name: value[:, :30] for name, value in feed.items()}
    for block in supernet.block_parts[0].blocks:
        found = block_models.output_of(supernet, block_models.path(supernet, block), **feed)
        assert bool(torch.isfinite(found[feed["attention_mask"].bool()]).all())
        for row in range(min(2, len(found))):
            if bool(feed["attention_mask"][row].all()):
                alone = {name: value[row : row + 1] for name, value in feed.items()}
                single = block_models.output_of(supernet, block_models.path(supernet, block), **alone)
                assert block_models.close(single, found[row : row + 1])
