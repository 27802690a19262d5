"""Growth against a plain re-implementation of the published schedule at the paper's size, and what a history keeps."""

from __future__ import annotations

import ast
import itertools
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic.errors import CheckpointError, TrainingError
from hf_elastic.training import schedule
from hf_elastic.training.schedule import (
    Block,
    Check,
    Growth,
    GrowthHistory,
    GrowthPlan,
    GrowthStep,
    Reason,
    check_budget,
    grown,
    growths_per_epoch,
)

LAYERS, HIDDEN, NARROW, STEP, WIDEST = 12, 528, 132, 132, 792
BLOCKS = ("bert", "bert-without-q", "bert-without-k", "mobile", "mobile-without-q", "mobile-without-k")
CAP, EMBEDDING = 15.7e6, 4_382_544
CHECKS: list[Check] = ["block", "epoch"]
both_checks = pytest.mark.parametrize("check", CHECKS)


def paper_parameters(layer: int, block: str, width: int) -> int:
    """Of the blocks of papers.md 1.2."""
    h, i, f = HIDDEN, HIDDEN // 4, width
    dropped = "without" in block
    if block.startswith("bert"):
        return 4 * (h * h + h) + 2 * 2 * h + (h * f + f) + (f * h + h) - dropped * (h * h + h)
    projections = (h * i + i) + 2 * i + 3 * (h * i + i) + (i * i + i) + 2 * i
    return projections + (i * f + f) + (f * i + i) + 2 * i + (i * h + h) + 2 * h - dropped * (h * i + i)


def paper_plan(scores: dict[Block, float], check: Check, **changes: Any) -> GrowthPlan:
    given: dict[str, Any] = {
        "widths": {(layer, block): NARROW for layer in range(LAYERS) for block in BLOCKS},
        "epoch": 1,
        "step": STEP,
        "largest": WIDEST,
        "count": growths_per_epoch(LAYERS, len(BLOCKS), 10),
        "budget": CAP,
        "parameters": paper_parameters,
        "constant": EMBEDDING,
        **changes,
    }
    return GrowthPlan(scores=scores, check=check, **given)


def paper_scores(seed: int, *, digits: int = 6) -> list[dict[Block, float]]:
    """Scores of 10 epochs; few digits make ties."""
    draw = random.Random(seed)
    blocks = [(layer, block) for layer in range(LAYERS) for block in BLOCKS]
    draw.shuffle(blocks)  # measured in no particular order
    return [{block: round(draw.uniform(0.2, 1.0), digits) for block in blocks} for _ in range(10)]


class Published:
    """papers.md 1.5 as it is written there, on arrays; the mean over random paths by its closed form."""

    def __init__(self) -> None:
        self.width = np.full((LAYERS, len(BLOCKS)), NARROW)

    def mean(self) -> float:
        layers = [[paper_parameters(0, b, int(w)) for b, w in zip(BLOCKS, row, strict=True)] for row in self.width]
        return EMBEDDING + float(np.mean(layers, axis=1).sum())

    def epoch(self, scores: dict[Block, float], check: Check) -> list[tuple[int, str, int, int]]:
        table = np.array([[scores[n, b] for b in BLOCKS] for n in range(LAYERS)])
        if check == "epoch" and self.mean() > CAP:
            return []
        slots, made = 21, []
        for place in np.argsort(-table.reshape(-1), kind="stable"):
            n, b = divmod(int(place), len(BLOCKS))
            if slots == 0 or (check == "block" and self.mean() >= CAP):
                break
            if self.width[n, b] == WIDEST:
                continue
            before = int(self.width[n, b])
            self.width[n, b] += STEP
            slots -= 1
            made.append((n, BLOCKS[b], before, before + STEP))
        return made


def run(scores: list[dict[Block, float]], check: Check) -> Iterator[tuple[GrowthPlan, GrowthStep]]:
    plan = paper_plan(scores[0], check)
    for epoch, measured in enumerate(scores, 1):
        plan = replace(plan, scores=measured, epoch=epoch)
        step = grown(plan)
        yield plan, step
        plan = replace(plan, widths=step.widths)


def rows(step: GrowthStep) -> list[tuple[int, str, int, int]]:
    return [(growth.layer, growth.block, growth.before, growth.after) for growth in step.grown]


@both_checks
@pytest.mark.parametrize("digits", [6, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(4))
def test_ten_epochs_at_the_papers_size_grow_as_published(seed: int, digits: int, check: Check) -> None:
    oracle, scores = Published(), paper_scores(seed, digits=digits)
    reasons = []
    for (_, step), measured in zip(run(scores, check), scores, strict=True):
        before = oracle.mean()
        assert rows(step) == oracle.epoch(measured, check)
        assert step.widths == {(n, b): w for n in range(LAYERS) for b, w in zip(BLOCKS, oracle.width[n], strict=True)}
        assert step.parameters_before == pytest.approx(before, rel=1e-12)
        assert step.parameters_after == pytest.approx(oracle.mean(), rel=1e-12)
        reasons.append(step.reason)
    assert reasons[0] == "count" and (oracle.width > NARROW).any()


@both_checks
def test_blocks_whose_growth_is_dear_saturate_the_budget(check: Check) -> None:
    scores = [{key: score + key[1].startswith("bert") for key, score in epoch.items()} for epoch in paper_scores(9)]
    steps = [step for _, step in run(scores, check)]
    assert [step.reason for step in steps][0] == "count" and steps[-1].reason == "budget" and not steps[-1].grown
    dearest = (paper_parameters(0, "bert", NARROW + STEP) - paper_parameters(0, "bert", NARROW)) / len(BLOCKS)
    last = [step for step in steps if step.grown][-1]
    overshoot = last.parameters_after - CAP
    assert 0 <= overshoot < (dearest if check == "block" else 21 * dearest)
    assert len(last.grown) < 21 if check == "block" else len(last.grown) == 21


def test_sizes_are_those_measured_in_the_published_code() -> None:
    millions = {name: [round(paper_parameters(0, name, width) / 1e6, 3) for width in range(132, 793, 132)]
                for name in ("bert", "mobile")}  # fmt: skip
    assert millions["bert"] == [1.259, 1.399, 1.538, 1.678, 1.818, 1.957]
    assert millions["mobile"] == [0.404, 0.439, 0.474, 0.509, 0.544, 0.579]


def test_the_mean_is_that_over_all_subnets() -> None:
    blocks = [(0, "a"), (0, "b"), (1, "a"), (2, "a"), (2, "b"), (2, "c")]
    draw = random.Random(0)
    plan = small_plan(widths={block: draw.randint(1, 8) for block in blocks}, scores={}, constant=17)
    layers = [[block for block in blocks if block[0] == layer] for layer in range(3)]
    sizes = [
        17 + sum(plan.parameters(*block, plan.widths[block]) for block in path) for path in itertools.product(*layers)
    ]
    assert plan.mean_parameters() == pytest.approx(np.mean(sizes), rel=1e-14)
    assert plan.mean_parameters(dict.fromkeys(blocks, 1)) < plan.mean_parameters()


def test_a_thousand_random_subnets_come_near_the_mean() -> None:
    plan = paper_plan({}, "block")
    draw = random.Random(0)
    sizes = [
        EMBEDDING + sum(paper_parameters(n, draw.choice(BLOCKS), NARROW) for n in range(LAYERS)) for _ in range(1000)
    ]
    assert abs(np.mean(sizes) - plan.mean_parameters()) < 4 * np.std(sizes) / math.sqrt(1000)


@pytest.mark.parametrize(("size", "expected"), [((12, 6, 10), 21), ((6, 6, 10), 10), ((2, 2, 12), 1), ((1, 1, 1), 3)])
def test_growths_per_epoch_are_rounded_down(size: tuple[int, int, int], expected: int) -> None:
    assert growths_per_epoch(*size) == expected


def test_growths_per_epoch_that_would_be_none_or_mean_nothing_are_refused() -> None:
    assert growths_per_epoch(12, 6, 10, average_growths=0.5) == 3
    with pytest.raises(TrainingError, match="take at least 4 growths or fewer epochs"):
        growths_per_epoch(2, 2, 13)
    assert growths_per_epoch(2, 2, 13, average_growths=4) == 1
    for arguments in [(0, 6, 10), (12, -1, 10), (12, 6, 0)]:
        with pytest.raises(TrainingError, match="have to be positive"):
            growths_per_epoch(*arguments)


def small_plan(**changes: Any) -> GrowthPlan:
    """Two layers of blocks "b" and "a", 4 wide and 1 to grow by; a block has as many parameters as 10 widths."""
    given: dict[str, Any] = {
        "widths": {(0, "b"): 4, (0, "a"): 4, (1, "b"): 4, (1, "a"): 4},
        "scores": {(1, "a"): 0.9, (1, "b"): 0.3, (0, "a"): 0.5, (0, "b"): 0.7},
        "epoch": 2,
        "step": 1,
        "largest": 8,
        "count": 2,
        "budget": 1000.0,
        "parameters": lambda layer, block, width: 10 * width,
        "constant": 20,
        **changes,
    }
    return GrowthPlan(**given)


def test_a_decision_tells_what_grew_and_what_it_costs() -> None:
    step = grown(small_plan())
    assert step.grown == (Growth(1, "a", 4, 5), Growth(0, "b", 4, 5))
    assert step.widths == {(0, "b"): 5, (0, "a"): 4, (1, "b"): 4, (1, "a"): 5}
    assert (step.parameters_before, step.parameters_after, step.reason) == (100.0, 110.0, "count")


@both_checks
def test_equal_scores_go_by_layer_and_by_the_position_of_the_block(check: Check) -> None:
    scores = {(1, "a"): 0.5, (1, "b"): 0.5, (0, "a"): 0.5, (0, "b"): 0.9}
    expected = [(0, "b"), (0, "a"), (1, "b"), (1, "a")]
    for widths in (expected, [(1, "b"), (0, "b"), (1, "a"), (0, "a")]):  # layer by layer, and block by block
        step = grown(small_plan(widths=dict.fromkeys(widths, 4), scores=scores, count=4, check=check))
        assert [(growth.layer, growth.block) for growth in step.grown] == expected


def test_a_block_at_its_largest_is_passed_over_and_takes_no_slot() -> None:
    step = grown(small_plan(largest={(0, "b"): 8, (0, "a"): 8, (1, "b"): 8, (1, "a"): 4}))
    assert rows(step) == [(0, "b", 4, 5), (0, "a", 4, 5)]


def test_the_last_step_up_to_the_largest_width_may_be_shorter() -> None:
    step = grown(small_plan(step=3, largest={(0, "b"): 7, (0, "a"): 6, (1, "b"): 8, (1, "a"): 6}))
    assert rows(step) == [(1, "a", 4, 6), (0, "b", 4, 7)]
    assert step.parameters_after == 100 + 10 + 15


def test_a_block_that_was_not_measured_does_not_grow() -> None:
    step = grown(small_plan(scores={(0, "b"): 0.1, (1, "b"): 0.2}, count=3))
    assert rows(step) == [(1, "b", 4, 5), (0, "b", 4, 5)]
    assert step.reason == "no measured block is left"


@both_checks
def test_growth_ends_when_all_are_at_their_largest(check: Check) -> None:
    last = grown(small_plan(count=9, largest=5, check=check))
    assert len(last.grown) == 4 and last.reason == "all at their largest"
    after = grown(small_plan(widths=last.widths, largest=5, scores={}, check=check))
    assert not after.grown and after.reason == "all at their largest"
    assert after.parameters_before == after.parameters_after == last.parameters_after


@pytest.mark.parametrize(
    ("check", "budget", "grew", "reason"),
    [
        ("block", 100, 0, "budget"),
        ("block", 100.5, 1, "budget"),
        ("block", 105, 1, "budget"),
        ("block", 106, 2, "budget"),
        ("block", 111, 2, "count"),
        ("epoch", 99.5, 0, "budget"),
        ("epoch", 100, 2, "count"),
        ("epoch", 104, 2, "count"),
    ],
)
def test_the_budget_is_held_before_each_block_or_once_an_epoch(
    check: Check, budget: float, grew: int, reason: Reason
) -> None:
    step = grown(small_plan(check=check, budget=budget))
    assert (len(step.grown), step.reason) == (grew, reason)


def test_the_mean_is_exact_where_a_layer_has_three_blocks() -> None:
    blocks = {(0, name): 1 for name in "abc"}
    plan = small_plan(
        widths=blocks, scores={(0, name): ord(name) / 1000 for name in "abc"}, count=3, budget=2.0, constant=0,
        parameters=lambda layer, block, width: width,
    )  # fmt: skip
    # A third three times is 1: the budget of 2 is reached by the last block, not missed by rounding.
    step = grown(plan)
    assert (len(step.grown), step.parameters_after, step.reason) == (3, 2.0, "budget")


@pytest.mark.parametrize("score", [math.nan, math.inf])
@both_checks
def test_a_score_that_is_no_number_says_that_training_has_diverged(score: float, check: Check) -> None:
    scores = {(1, "a"): 0.9, (0, "a"): score, (1, "b"): score}
    with pytest.raises(TrainingError) as caught:
        grown(small_plan(scores=scores, budget=1.0, check=check))
    text = str(caught.value)
    assert text.startswith(f"training has diverged: the PCA score of block 'a' of layer 0 in epoch 2 is {score}")
    assert "1 more block" in text and "\n" not in text


def test_an_epoch_without_any_measurement_is_an_error_only_if_a_block_could_grow() -> None:
    with pytest.raises(TrainingError, match="no block was measured in epoch 2"):
        grown(small_plan(scores={}))
    assert grown(small_plan(scores={}, budget=100)).reason == "budget"


@pytest.mark.parametrize("spread", [0.0, 0.0009])
def test_flat_scores_warn_with_the_numbers_and_growth_goes_on(spread: float) -> None:
    scores = {(0, "b"): 0.99, (0, "a"): 0.99, (1, "b"): 0.99, (1, "a"): 0.99 + spread}
    with pytest.warns(UserWarning, match=rf"PCA scores are flat.*4 blocks in epoch 2.*0\.99 and {0.99 + spread:.6g}"):
        step = grown(small_plan(scores=scores))
    assert rows(step) == ([(0, "b", 4, 5), (0, "a", 4, 5)] if not spread else [(1, "a", 4, 5), (0, "b", 4, 5)])


@pytest.mark.parametrize(
    "changes", [{}, {"scores": {(0, "a"): 0.5}}, {"scores": {(0, "a"): 0.5, (0, "b"): 0.5}, "budget": 50.0}]
)
def test_nothing_warns_where_scores_differ_are_alone_or_decide_nothing(changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grown(small_plan(**changes))


def test_a_budget_that_growth_cannot_meet_is_refused_before_training() -> None:
    check_budget(small_plan(budget=100.0))
    check_budget(small_plan(budget=180.0))
    check_budget(paper_plan({}, "block"))
    with pytest.raises(TrainingError, match="total_parameters=99 is below the 100 of the mean path"):
        check_budget(small_plan(budget=99.0))
    with pytest.raises(TrainingError, match="total_parameters=181 is above the 180 .* all blocks at their largest"):
        check_budget(small_plan(budget=181.0))
    with pytest.raises(TrainingError, match=r"above the 18,\d\d\d,\d\d\d of the mean path"):
        check_budget(paper_plan({}, "block", budget=20e6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": {}, "scores": {}}, "widths= is empty"),
        ({"step": 0}, "step=0"),
        ({"count": -1}, "count=-1"),
        ({"check": "path"}, "'path' is not one of 'block', 'epoch'"),
        ({"budget": math.nan}, "budget=nan"),
        ({"largest": 3}, "block 'b' of layer 0 is 4 wide, above its largest width 3"),
        ({"largest": {(0, "b"): 9}}, "nothing about block 'a' of layer 0"),
        ({"scores": {(7, "a"): 1.0}}, r"\(7, 'a'\)"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        small_plan(**changes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), step=st.integers(1, 5), count=st.integers(1, 12), budget=st.floats(10, 400),
    check=st.sampled_from(CHECKS),
)  # fmt: skip
def test_growth_keeps_its_bounds(seed: int, step: int, count: int, budget: float, check: Check) -> None:
    draw = random.Random(seed)
    blocks = [(layer, name) for layer in range(3) for name in "abc"[: draw.randint(1, 3)]]
    widths = {block: draw.randint(1, 6) for block in blocks}
    plan = small_plan(
        widths=widths, largest=6, step=step, count=count, budget=budget, check=check,
        scores={block: draw.random() for block in blocks},
    )  # fmt: skip
    made = grown(plan)
    assert len(made.grown) <= count and len({(g.layer, g.block) for g in made.grown}) == len(made.grown)
    assert all(g.before < g.after <= min(6, g.before + step) for g in made.grown)
    assert made.parameters_before == plan.mean_parameters()
    assert made.parameters_after == plan.mean_parameters(made.widths)
    changed = {block for block in blocks if made.widths[block] != widths[block]}
    assert changed == {(g.layer, g.block) for g in made.grown}
    if check == "block" and made.grown:
        *_, last = made.grown
        undone = {**made.widths, (last.layer, last.block): last.before}
        assert plan.mean_parameters(undone) < budget
    assert made.reason in get_args(Reason)


def history(check: Check = "block", *, epochs: int = 10) -> GrowthHistory:
    scores = paper_scores(3)[:epochs]
    kept = GrowthHistory(paper_plan(scores[0], check).widths, CAP)
    for plan, step in run(scores, check):
        kept.record(plan, step, step=100 * plan.epoch)
    return kept


def test_a_history_holds_every_decision() -> None:
    kept = history()
    made = list(run(paper_scores(3), "block"))
    assert [entry.epoch for entry in kept.entries] == list(range(1, 11))
    assert [entry.step for entry in kept.entries] == list(range(100, 1001, 100))
    for number, (entry, (plan, step)) in enumerate(zip(kept.entries, made, strict=True), 1):
        assert (entry.scores, entry.grown, entry.reason) == (plan.scores, step.grown, step.reason)
        assert (entry.parameters_before, entry.parameters_after) == (step.parameters_before, step.parameters_after)
        assert kept.widths(number) == step.widths
    assert kept.widths(0) == kept.start and kept.widths() == made[-1][1].widths


def test_a_history_comes_back_from_json_exactly() -> None:
    for kept in (history(), GrowthHistory({(0, "a"): 4}, 100)):
        text = json.dumps(kept.to_dict(), allow_nan=False)
        back = GrowthHistory.from_dict(json.loads(text))
        assert back == kept
        assert json.dumps(back.to_dict()) == text
        assert list(back.start) == list(kept.start)


def test_a_decision_that_does_not_go_on_from_the_last_is_refused() -> None:
    kept = history(epochs=2)
    plan, step = next(run(paper_scores(3), "block"))
    with pytest.raises(TrainingError, match="widths before the growth of epoch 1"):
        kept.record(plan, step, step=1)
    assert len(kept.entries) == 2


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("format"),
        lambda data: data.pop("entries"),
        lambda data: data["entries"][0].pop("reason"),
        _set("version", to=2),
        _set("budget", to=None),
        _set("entries", to=3),
        _set("entries", 0, to=[]),
        _set("entries", 0, "reason", to="tired"),
        _set("entries", 0, "epoch", to=1.5),
        _set("entries", 0, "scores", 0, to=[0, "bert"]),
        _set("entries", 0, "grown", 0, 2, to=264),
        _set("entries", 0, "grown", 0, 1, to="gpt"),
        _set("start", 0, 2, to="wide"),
    ],
)
def test_damaged_data_are_no_history(damage: Callable[[Any], None]) -> None:
    data = json.loads(json.dumps(history(epochs=2).to_dict()))
    damage(data)
    with pytest.raises(CheckpointError, match="not a history of growth"):
        GrowthHistory.from_dict(data)


def test_the_figure_holds_widths_and_parameters() -> None:
    kept = history()
    figure = kept.figure()
    heatmaps = {trace.name: trace for trace in figure.data if trace.type == "heatmap"}
    assert tuple(heatmaps) == BLOCKS
    for name, trace in heatmaps.items():
        assert list(trace.x) == list(range(11)) and list(trace.y) == list(range(LAYERS))
        for layer in range(LAYERS):
            assert list(trace.z[layer]) == [kept.widths(number)[layer, name] for number in range(11)]
    lines = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    assert list(lines["mean"].y) == [kept.entries[0].parameters_before, *(e.parameters_after for e in kept.entries)]
    assert list(lines["mean"].x) == list(range(11))
    assert set(lines["budget"].y) == {CAP}
    assert [note.text for note in figure.layout.annotations] == [*BLOCKS, "parameters of the mean path"]
    assert lines["mean"].yaxis not in {trace.yaxis for trace in heatmaps.values()}
    json.loads(figure.to_json())


@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_a_figure_can_be_made_of_any_blocks_and_of_no_decisions(names: str) -> None:
    blocks = [(layer, name) for layer in (0, 2) for name in names if (layer, name) != (2, names[-1]) or names == "a"]
    figure = GrowthHistory(dict.fromkeys(blocks, 4), 100.0).figure()
    heatmaps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.name for trace in heatmaps] == list(names)
    assert [list(row) for row in heatmaps[-1].z] == ([[4], [4]] if names == "a" else [[4], [None]])


def test_the_schedule_needs_no_tensors() -> None:
    with open(str(schedule.__file__), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers", "accelerate"}
