"""Objectives from ``evaluate``: equal to scikit-learn's numbers on what the extracted model answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluate
import local_metrics
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score
from tiny_models import supernet_of, tiny
from torch import Tensor

from hf_elastic import DataError, ElasticConfig, Supernet, UnsupportedModelError, extract, make_elastic, objectives
from hf_elastic.evaluation import metric
from hf_elastic.evaluation.metrics import load_module
from hf_elastic.search import search_subnets

Batch = dict[str, Tensor]


def texts(rows: int, *, tokens: int = 7, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens - 2 :] = 0
    ids[mask == 0] = 0  # a classifier on a decoder finds the last token by the id of padding
    return {"input_ids": ids, "attention_mask": mask}


def labelled(classes: int = 3, *, rows: int = 11) -> list[Batch]:
    """Two batches of different size; one row without a label."""
    generator = torch.Generator().manual_seed(7)
    first = {**texts(rows), "labels": torch.randint(classes, (rows,), generator=generator)}
    second = {**texts(5, tokens=9, seed=1), "labels": torch.randint(classes, (5,), generator=generator)}
    second["labels"][2] = -100
    return [first, second]


@torch.no_grad()
def logits_of(supernet: Supernet, architecture: Any, batches: list[Batch]) -> list[Tensor]:
    """Logits of the extracted model, one row at a time without padding."""
    model = extract(supernet, architecture).eval()
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(model(input_ids=ids[: int(mask.sum())][None]).logits[0])
    return rows


def references(batches: list[Batch]) -> list[Tensor]:
    return [label for batch in batches for label in batch["labels"]]


def smallest_with_sizes(supernet: Supernet) -> Any:
    """Every size below the parent's, nothing skipped."""
    sizes = {c.name: c.values[0] if c.kind == "ordered" else "none" for c in supernet.space.choices}
    return supernet.space.canonical(sizes)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifiers_f1_is_that_of_the_extracted_model(family: str) -> None:
    supernet, batches = supernet_of(family, "sequence"), labelled()
    measure = metric(supernet, local_metrics.f1(), batches, direction="maximize", settings={"average": "macro"})
    values = []
    for point in (supernet.space.largest(), smallest_with_sizes(supernet)):
        pairs = [
            (int(row.argmax()), int(label))
            for row, label in zip(logits_of(supernet, point, batches), references(batches), strict=True)
            if label != -100
        ]
        guesses, right = zip(*pairs, strict=True)
        values.append(f1_score(right, guesses, average="macro"))
        assert measure(point) == pytest.approx(values[-1], abs=1e-12)
    assert measure.name == "f1" and measure.direction == "maximize" and supernet.active == supernet.space.largest()


def test_accuracy_by_evaluate_is_our_own_accuracy() -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()
    own = objectives.accuracy(supernet, batches)
    theirs = metric(supernet, local_metrics.accuracy(), batches, direction="maximize")
    for point in (supernet.space.largest(), supernet.space.smallest()):
        assert theirs(point) == pytest.approx(own(point))


def test_a_regression_is_compared_by_its_numbers() -> None:
    supernet = make_elastic(tiny("bert", "sequence", num_labels=1), ElasticConfig(intermediate_size=[16, 48]))
    batches = labelled()
    for batch in batches:
        batch["labels"] = batch["labels"].float() + torch.arange(len(batch["labels"])) / 10
    point = supernet.space.smallest()
    guesses = [float(row) for row in logits_of(supernet, point, batches)]
    wanted = pearsonr(guesses, [float(label) for label in references(batches)]).statistic
    measure = metric(supernet, local_metrics.pearson(), batches, direction="maximize")
    assert measure(point) == pytest.approx(wanted, abs=1e-5)
    column = [{**batch, "labels": batch["labels"][:, None]} for batch in batches]
    assert metric(supernet, local_metrics.pearson(), column, direction="maximize")(point) == measure(point)


def test_a_classifier_with_several_labels_answers_those_above_zero() -> None:
    supernet = make_elastic(
        tiny("bert", "sequence", problem_type="multi_label_classification"), ElasticConfig(intermediate_size=[16, 48])
    )
    batches = labelled()
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        batch["labels"] = torch.randint(2, (len(batch["labels"]), 3), generator=generator).float()
    point = supernet.space.smallest()
    guesses = torch.stack([(row > 0).long() for row in logits_of(supernet, point, batches)])
    wanted = f1_score(torch.stack(references(batches)).long().numpy(), guesses.numpy(), average="micro")
    measure = metric(supernet, local_metrics.micro_f1_of_labels(), batches, direction="maximize")
    assert measure(point) == pytest.approx(wanted)


@torch.no_grad()
def test_multiple_choice_is_the_answer_with_the_largest_logit() -> None:
    supernet = supernet_of("bert", "choice", skip=["layer"])
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (6, 4, 7), generator=generator)  # (B, choices, T)
    batch = {"input_ids": ids, "labels": torch.randint(4, (6,), generator=generator)}
    point = smallest_with_sizes(supernet)
    model = extract(supernet, point, loadability="stock-padded")
    scores = torch.stack(
        [model(input_ids=ids[n, choice][None, None]).logits[0, 0] for n in range(6) for choice in range(4)]
    )
    guesses = scores.view(6, 4).argmax(-1)
    wanted = float((guesses == batch["labels"]).double().mean())
    assert metric(supernet, local_metrics.accuracy(), [batch], direction="maximize")(point) == pytest.approx(wanted)


def token_batches() -> list[Batch]:
    """Token labels; the first of each sequence and padding are not scored."""
    batches = labelled()
    generator = torch.Generator().manual_seed(4)
    for batch in batches:
        labels = torch.randint(3, batch["input_ids"].shape, generator=generator)
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, 0] = -100
    return batches


@pytest.mark.parametrize("named", [False, True])
def test_token_classes_are_compared_where_they_are_scored(named: bool) -> None:
    supernet, batches = supernet_of("bert", "token"), token_batches()
    supernet.base.config.id2label = {0: "O", 1: "B-LOC", 2: "I-LOC"}
    point = smallest_with_sizes(supernet)
    hits = []
    for row, labels in zip(logits_of(supernet, point, batches), references(batches), strict=True):
        hits += [int(t.argmax()) == int(label) for t, label in zip(row, labels, strict=False) if label != -100]
    measure = metric(
        supernet, local_metrics.names_right() if named else local_metrics.accuracy(), batches, direction="maximize"
    )
    assert measure(point) == pytest.approx(sum(hits) / len(hits))


def test_a_causal_language_model_answers_the_next_token() -> None:
    supernet, batches = supernet_of("llama"), labelled()
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    own = objectives.accuracy(supernet, batches)
    point = supernet.space.smallest()
    with torch.no_grad(), supernet.activate(point):
        for batch in batches:  # labels that the model hits at every other position
            guess = supernet.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
            batch["labels"][:, 2::2] = guess[:, 1:-1:2]
    own = objectives.accuracy(supernet, batches)
    assert 0 < own(point) < 1
    assert metric(supernet, local_metrics.accuracy(), batches, direction="maximize")(point) == pytest.approx(own(point))


def test_a_metric_of_scores_sees_the_probability_of_the_second_class() -> None:
    supernet = make_elastic(tiny("bert", "sequence", num_labels=2), ElasticConfig(intermediate_size=[16, 48]))
    batches = labelled(2)
    point = supernet.space.smallest()
    pairs = [
        (float(row.softmax(-1)[1]), int(label))
        for row, label in zip(logits_of(supernet, point, batches), references(batches), strict=True)
        if label != -100
    ]
    scores, right = zip(*pairs, strict=True)
    measure = metric(supernet, local_metrics.roc_auc(), batches, direction="maximize")
    assert measure(point) == pytest.approx(roc_auc_score(right, scores))
    three = supernet_of("bert", "sequence")
    with pytest.raises(DataError, match="one score a row.*the model has 3"):
        metric(three, local_metrics.roc_auc(), labelled(), direction="maximize")(three.space.largest())


def test_one_of_several_values_is_chosen_by_its_key() -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()
    point = supernet.space.smallest()
    pairs = [
        (int(row.argmax()), int(label))
        for row, label in zip(logits_of(supernet, point, batches), references(batches), strict=True)
        if label != -100
    ]
    guesses, right = zip(*pairs, strict=True)
    module = local_metrics.several()
    chosen = metric(supernet, module, batches, direction="maximize", key="matthews")
    assert chosen(point) == pytest.approx(matthews_corrcoef(right, guesses))
    assert metric(supernet, module, batches, direction="maximize", key="right")(point) == sum(g == r for g, r in pairs)
    assert chosen.name == "several.matthews"
    for key, message in ((None, "gives several numbers"), ("by_class", "gives no number 'by_class'")):
        with pytest.raises(DataError, match=f"{message}; its values are matthews, right; set key="):
            metric(supernet, module, batches, direction="maximize", key=key)(point)


def test_a_value_that_is_a_list_is_no_number() -> None:
    supernet = supernet_of("bert", "sequence")
    measure = metric(supernet, local_metrics.f1(), labelled(), direction="maximize", settings={"average": None})
    with pytest.raises(DataError, match="gives no number; its values are f1"):
        measure(supernet.space.largest())


def test_a_metric_that_fails_says_why_in_one_line() -> None:
    supernet = supernet_of("bert", "sequence")
    measure = metric(supernet, local_metrics.f1(), labelled(), direction="maximize")  # binary, of three classes
    with pytest.raises(DataError, match=r"'f1' cannot be computed of 15 answers.*multiclass") as caught:
        measure(supernet.space.largest())
    assert "\n" not in str(caught.value)
    good = metric(supernet, local_metrics.f1(), labelled(), direction="maximize", settings={"average": "micro"})
    assert math.isfinite(good(supernet.space.largest()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (local_metrics.of_other_inputs, "'perplexity' takes data; supported are metrics of predictions"),
        (lambda: evaluate.combine([local_metrics.accuracy()]), "a CombinedEvaluations is no evaluate.EvaluationModule"),
        (lambda: 5, "a int is no evaluate.EvaluationModule"),
    ],
)
def test_a_metric_of_other_things_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(supernet_of("bert", "sequence"), make(), labelled(), direction="maximize")


@pytest.mark.parametrize(
    ("head", "make"), [("sequence", local_metrics.of_texts), ("token", local_metrics.of_texts),
                       ("sequence", local_metrics.names_right), ("token", local_metrics.roc_auc)],
)  # fmt: skip
def test_a_metric_of_texts_or_names_is_refused_for_classes(head: str, make: Any) -> None:
    supernet = supernet_of("bert", head)
    batches = token_batches() if head == "token" else labelled()
    with pytest.raises(DataError, match="takes .*, the model answers by one class a"):
        metric(supernet, make(), batches, direction="maximize")(supernet.space.largest())


def test_question_answering_is_refused() -> None:
    supernet = supernet_of("bert", "qa", skip=["layer"])
    with pytest.raises(UnsupportedModelError, match="gives start_logits, end_logits, no logits"):
        metric(supernet, local_metrics.accuracy(), labelled(), direction="maximize")(supernet.space.largest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: [], "validation holds no batch"),
        (lambda b: [texts(3)], "has no 'labels'"),
        (lambda b: [{**texts(3), "labels": torch.zeros(3, 5)}], "do not fit logits of shape"),
        (lambda b: [{**texts(3), "labels": torch.full((3,), -100)}], "no label of the validation batches is scored"),
        (lambda b: [b[0], {**texts(3), "labels": torch.zeros(3, 3)}], "labels of several kinds: class, labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    supernet = supernet_of("bert", "sequence")
    with pytest.raises(DataError, match=message):
        metric(supernet, local_metrics.accuracy(), change(labelled()), direction="maximize")(supernet.space.largest())


def test_a_script_on_this_machine_is_loaded_from_its_folder_or_file(tmp_path: Path) -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()
    folder = local_metrics.script_folder(tmp_path)
    own = objectives.accuracy(supernet, batches)(supernet.space.smallest())
    for place in (folder, str(folder), folder / "share_right.py"):
        measure = metric(supernet, place, batches, direction="maximize")
        assert measure(supernet.space.smallest()) == pytest.approx(own) and measure.name == "share_right"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_metric_anywhere",
            "has no metric 'no_such_metric_anywhere' on this machine, and nothing is downloaded",
        ),
        ("/no/such/folder", "no metric script /no/such/folder/folder.py"),
        ("nowhere/at/all.py", "no metric script nowhere/at/all.py"),
    ],
)
def test_a_metric_that_is_not_here_is_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_module(name)


def test_a_script_that_fails_is_named(tmp_path: Path) -> None:
    folder = local_metrics.script_folder(tmp_path, name="broken", text="import evaluate\nraise RuntimeError('mine')\n")
    with pytest.raises(DataError, match="broken.py fails: .*mine"):
        load_module(folder)


def test_results_of_other_metrics_keys_data_or_weights_do_not_mix() -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()

    def fingerprint(module: Any, data: list[Batch], settings: Mapping[str, Any] | None = None, **changes: Any) -> str:
        return metric(supernet, module, data, direction="maximize", settings=settings, **changes).fingerprint

    several = local_metrics.several()
    prints = [
        fingerprint(several, batches, key="matthews"), fingerprint(several, batches, key="right"),
        fingerprint(local_metrics.accuracy(), batches), fingerprint(local_metrics.accuracy(), batches[:1]),
        fingerprint(local_metrics.accuracy(), batches, {"normalize": False}),
    ]  # fmt: skip
    assert fingerprint(several, batches, key="right") == prints[1]
    with torch.no_grad():
        supernet.model.classifier.weight.mul_(2)
    prints.append(fingerprint(several, batches, key="matthews"))
    assert len(set(prints)) == 6


def test_a_search_goes_by_a_metric() -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()
    goal = metric(supernet, local_metrics.several(), batches, direction="maximize", key="matthews", name="mcc")
    result = search_subnets(supernet.space, [goal, objectives.parameters(supernet)], evaluations=12, seed=0)
    best = result.best("mcc")
    assert best.values["mcc"] == goal(best.architecture)
    assert all(goal(evaluation.architecture) <= best.values["mcc"] for evaluation in result.evaluations)


def test_modes_of_the_model_and_the_callers_batches_stay() -> None:
    supernet, batches = supernet_of("bert", "sequence"), labelled()
    supernet.model.train()
    supernet.model.bert.encoder.eval()
    metric(supernet, local_metrics.accuracy(), batches, direction="maximize")(supernet.space.smallest())
    assert supernet.model.training and not supernet.model.bert.encoder.training and "labels" in batches[0]
