"""Closed-form scores against loops over matrices, against weights that were drawn, and against the table of a model."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

import hf_elastic as he
from hf_elastic.proxies import (
    SHAPE_BASELINES,
    ShapeBatch,
    ZeroLMTable,
    correlation,
    matrix_score,
    read_benchmark,
    score,
)
from hf_elastic.proxies.zerolm_table import projections_of

MATRIX = st.tuples(st.integers(1, 900), st.integers(1, 900))
CANDIDATES = st.lists(st.tuples(st.lists(MATRIX, max_size=5), st.lists(MATRIX, max_size=4)), min_size=1, max_size=6)


def batch_of(attention: list[list[tuple[int, int]]], ffn: list[list[tuple[int, int]]]) -> ShapeBatch:
    count = np.arange(1, len(attention) + 1)
    return ShapeBatch.padded(
        attention=attention, ffn=ffn, depth=count, width=64 * count, parameters=10 * count, decoder_parameters=9 * count
    )


def arrays(count: int = 2) -> dict[str, np.ndarray]:
    sizes = np.full((count, 3, 2), 8.0)
    each = {name: np.ones(count) for name in ("depth", "width", "parameters", "decoder_parameters")}
    return {"attention": sizes, "ffn": sizes[:, :2], **each}


@settings(max_examples=60, deadline=None)
@given(CANDIDATES, st.floats(0.01, 2), st.floats(-1.5, 1.5))
def test_scores_are_those_of_a_loop_over_matrices(candidates: list, sigma: float, alpha: float) -> None:  # type: ignore[type-arg]
    batch = batch_of([a for a, _ in candidates], [f for _, f in candidates])
    attention = [sum(sigma**2 * max(n, m) for n, m in a) for a, _ in candidates]
    ffn = [sum(sigma**2 * max(n, m) for n, m in f) for _, f in candidates]
    found = batch.zerolm_parts(sigma=sigma)
    assert found[0] == pytest.approx(attention) and found[1] == pytest.approx(ffn)
    wanted = [alpha * a + (1 - alpha) * f for a, f in zip(attention, ffn, strict=True)]
    assert batch.zerolm(alpha, sigma=sigma) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (40, 160), (160, 40)])
def test_the_expectation_is_the_mean_of_weights_that_are_drawn(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [matrix_score(0.02 * torch.randn(*shape, generator=generator)) for _ in range(30)]
    attention, ffn = batch_of([[shape]], [[]]).zerolm_parts(sigma=0.02)
    assert attention[0] == pytest.approx(np.mean(drawn), rel=0.02) and ffn[0] == 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_batch_of_one_model_has_the_score_of_its_table(family: str) -> None:
    model = tiny(family)
    model.config.initializer_range = 0.05
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for name, projection in projections_of(model).items():
        rows, columns = projection.weight.shape
        found["attn" in name or "attention" in name].append((rows, columns))
    attention, ffn = batch_of([found[True]], [found[False]]).zerolm_parts(sigma=0.05)
    assert (attention[0], ffn[0]) == pytest.approx(ZeroLMTable.expected(model).parts())


def test_deviations_of_single_matrices_take_the_place_of_the_one() -> None:
    plain = arrays()
    deviations = {"attention_std": np.array([[1.0, 2, 3], [0, 0, 1]]), "ffn_std": np.array([[1.0, 1], [0.5, 0]])}
    attention, ffn = ShapeBatch(**plain, **deviations).zerolm_parts(sigma=7.0)
    assert attention == pytest.approx([8 * (1 + 4 + 9), 8]) and ffn == pytest.approx([16, 2])
    same = {name: np.full(values.shape, 7.0) for name, values in deviations.items()}
    assert ShapeBatch(**plain, **same).zerolm(sigma=1.0) == pytest.approx(ShapeBatch(**plain).zerolm(sigma=7.0))


def test_baselines_are_the_sizes_given_by_the_names_of_models() -> None:
    batch = batch_of([[(4, 4)]] * 3, [[(4, 8), (8, 4)]] * 3)
    found = {name: list(size(batch)) for name, size in SHAPE_BASELINES.items()}
    assert found == {
        "params": [10, 20, 30], "decoder_params": [9, 18, 27], "depth": [1, 2, 3], "width_depth": [64, 256, 576],
    }  # fmt: skip
    model = tiny("bert")
    assert score(model, "width_depth") == model.config.num_hidden_layers * model.config.hidden_size
    assert len(batch) == 3


def test_a_hundred_thousand_candidates_take_less_than_a_second() -> None:
    sizes = np.random.default_rng(0).integers(1, 4096, size=(100_000, 12, 2))
    each = np.ones(100_000)
    batch = ShapeBatch(sizes, sizes[:, :8], each, each, each, each)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        batch.zerolm(0.7)
        times.append(time.perf_counter() - started)
    assert min(times) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": np.zeros((2, 3))}, "attention is of shape"),
        ({"attention": np.ones((3, 3, 2))}, "attention is of shape"),
        ({"ffn": np.array([[[8, 0]], [[8, 8]]])}, "rows and no columns"),
        ({"ffn": np.array([[[-8, 8]], [[8, 8]]])}, "ffn holds a number that is negative or not finite"),
        ({"depth": np.array([1.0, np.nan])}, "depth holds a number that is negative"),
        ({"parameters": np.array([1.0, np.inf])}, "parameters holds"),
        ({"width": np.ones(3)}, "width is of shape"),
        ({"width": 5}, "width is of shape"),
        ({"depth": [[1, 2], [3]]}, "depth is no array of numbers"),
        ({"depth": ["two", "three"]}, "depth is no array of numbers"),
        ({"attention_std": np.ones((2, 3))}, "together or not at all"),
        ({"attention_std": np.ones((2, 2)), "ffn_std": np.ones((2, 2))}, "attention_std is of shape"),
        ({name: np.ones(0) for name in ("depth", "width", "parameters", "decoder_parameters")}, "at least one"),
    ],
)
def test_shapes_that_cannot_be_are_named(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(he.DataError, match=message):
        ShapeBatch(**{**arrays(), **change})


def test_candidates_that_have_no_attention_at_all_score_nothing_there() -> None:
    attention, ffn = batch_of([[], []], [[(2, 3)], []]).zerolm_parts()
    assert list(attention) == [0, 0] and list(ffn) == [3, 0]


@pytest.mark.parametrize("causal", [True, False])
def test_capacity_is_its_formula(causal: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [[tuple(int(n) for n in pair) for pair in rng.integers(1, 90, size=(3, 2))] for _ in range(8)]
    depth, width = rng.integers(1, 14, size=8), rng.integers(3, 400, size=8)
    count = np.ones(8)
    batch = ShapeBatch.padded(
        attention=sizes, ffn=sizes[::-1], depth=depth, width=width, parameters=count, decoder_parameters=count
    )
    for i, found in enumerate(batch.capacity(causal=causal)):
        threshold = math.log(width[i], 3)
        if causal:
            wanted = sum(min(pair) ** 2 for pair in (*sizes[i], *sizes[::-1][i]))
        elif depth[i] < threshold:
            wanted = 3 ** int(depth[i]) * threshold  # depth is worth more
        else:
            wanted = int(depth[i]) * int(width[i])
        assert found == pytest.approx(wanted)


def test_capacity_is_above_the_width_of_the_stream_on_both_benchmarks(data_dir: Path) -> None:
    files = [("flexibert/flexibert.jsonl", 0.741), ("lts/random_GPT2_wt103.jsonl", 0.828)]
    for file, of_width in files:
        rows = read_benchmark(data_dir / file)
        assert rows.shapes is not None and rows.causal is not None
        capacity = correlation(rows.shapes.capacity(causal=rows.causal), rows.truth, resamples=0)
        width = correlation(rows.shapes.width_depth, rows.truth, resamples=0)
        assert width.kendall == pytest.approx(of_width, abs=1e-3)
        assert capacity.kendall > width.kendall + 0.03 and capacity.spearman > width.spearman + 0.02
