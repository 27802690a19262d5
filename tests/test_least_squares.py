"""Normal equations against dense float64 least squares, and elimination against trying out what to give up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_elastic import DataError, least_squares
from hf_elastic.least_squares import NormalEquations, Scatter, elimination_order


def rows(
    count: int, inputs: int, outputs: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) + 1.5
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y = y + torch.randn(count, outputs, generator=generator, dtype=torch.float64) + 3.0
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype), weight.to(dtype), bias.to(dtype)


def summed(x: Tensor, y: Tensor | None = None, *, batches: int = 3) -> NormalEquations:
    sums = NormalEquations(x.shape[1], 0 if y is None else y.shape[1])
    ys = [None] * batches if y is None else y.chunk(batches)
    for part, target in zip(x.chunk(batches), ys, strict=True):
        sums.add(part, target)
    return sums


def dense_ridge(x: Tensor, y: Tensor, weight: Tensor, *, bias: bool, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The same problem as one tall least-squares system, rows of the penalty below those of the data."""
    a, b, w = x.double().numpy(), y.double().numpy(), weight.double().numpy()
    penalty = np.sqrt(strength) * np.eye(a.shape[1])
    if bias:
        a, penalty = np.hstack([a, np.ones((len(a), 1))]), np.hstack([penalty, np.zeros((a.shape[1], 1))])
    system, target = np.vstack([a, penalty]), np.vstack([b, np.sqrt(strength) * w])
    found = np.linalg.lstsq(system, target, rcond=None)[0]
    return (found[:-1], found[-1]) if bias else (found, np.zeros(b.shape[1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_a_solution_is_that_of_one_dense_float64_system(
    seed: int, inputs: int, outputs: int, bias: bool, ridge: float
) -> None:
    x, y, weight, shift = rows(60, inputs, outputs, seed=seed)
    solved = summed(x, y).solve(weight, shift if bias else None, ridge=ridge)
    expected, expected_bias = dense_ridge(x, y, weight, bias=bias, strength=solved.ridge)
    np.testing.assert_allclose(solved.weight.numpy(), expected, rtol=1e-6, atol=1e-8)
    if bias:
        assert solved.bias is not None
        np.testing.assert_allclose(solved.bias.numpy(), expected_bias, rtol=1e-6, atol=1e-8)
    else:
        assert solved.bias is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.floats(1e-6, 1e3))
def test_the_error_is_that_of_the_rows_and_never_grows(seed: int, bias: bool, ridge: float) -> None:
    x, y, weight, shift = rows(40, 6, 3, seed=seed)
    start = shift if bias else None
    solved = summed(x, y).solve(weight, start, ridge=ridge)
    for w, b, stated in ((weight, start, solved.error_before), (solved.weight, solved.bias, solved.error_after)):
        residual = x @ w + (0 if b is None else b) - y
        assert stated == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-6)
    assert solved.error_after <= solved.error_before


def test_a_start_that_is_the_solution_stays() -> None:
    x, _, weight, bias = rows(50, 6, 3)
    solved = summed(x, x @ weight + bias).solve(weight, bias, ridge=1e-3)
    torch.testing.assert_close(solved.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solved.bias, bias, rtol=1e-9, atol=1e-9)


def test_targets_of_a_linear_layer_need_no_rows() -> None:
    x, _, weight, bias = rows(50, 6, 3)
    with_rows, without = summed(x, x @ weight + bias), summed(x).toward(weight, bias)
    for name in ("gram", "cross", "sum_x", "sum_y"):
        torch.testing.assert_close(getattr(with_rows, name), getattr(without, name), rtol=1e-9, atol=1e-7)
    assert with_rows.square_y == pytest.approx(without.square_y)


def test_the_sums_of_a_prefix_are_those_of_its_inputs() -> None:
    x, y, weight, bias = rows(50, 6, 3)
    part = summed(x, y).prefix(4).solve(weight[:4], bias, ridge=1e-3)
    alone = summed(x[:, :4], y).solve(weight[:4], bias, ridge=1e-3)
    torch.testing.assert_close(part.weight, alone.weight, rtol=1e-9, atol=1e-9)
    assert part.error_after == pytest.approx(alone.error_after)


def test_strips_give_what_whole_matrices_give(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weight, bias = rows(60, 7, 5)
    gram = x.t() @ x
    whole = summed(x, y).solve(weight, bias, ridge=1e-3), summed(x).toward(weight, bias).cross
    order = elimination_order(gram, weight)
    monkeypatch.setattr(least_squares, "_STRIP", 2)
    solved = summed(x, y).solve(weight, bias, ridge=1e-3)
    torch.testing.assert_close(solved.weight, whole[0].weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(summed(x).toward(weight, bias).cross, whole[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(elimination_order(gram, weight), order)


def test_solving_and_ordering_leave_the_sums_as_they_are() -> None:
    x, y, weight, bias = rows(60, 7, 5)
    sums = summed(x, y)
    gram, cross = sums.gram.clone(), sums.cross.clone()
    for shift in (None, bias):
        sums.prefix(4).solve(weight[:4], shift, ridge=1e-3)
        sums.solve(weight, shift, ridge=1e-3)
        sums.toward(weight, shift)
    elimination_order(sums.gram, weight)
    assert torch.equal(sums.gram, gram) and torch.equal(sums.cross, cross)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_without_its_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = NormalEquations(4)
    sums.add(x)
    torch.testing.assert_close(sums.gram, x.double().t() @ x.double(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
def test_a_quick_scatter_differs_by_rounding_only_also_around_a_large_mean(mean: float) -> None:
    x = torch.randn(5000, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-2, *[1.0] * 6])
    x[:, 0] += mean
    exact, quick = NormalEquations(7), Scatter(7)
    for part in x.split(1300):
        exact.add(part)
        quick.add(part)
    for centred in (False, True):
        torch.testing.assert_close(
            quick.matrix(centred=centred), exact.scatter(centred=centred), rtol=1e-5, atol=2e-3 * (1 + mean)
        )
    wanted = x.double()[:, 0].var(unbiased=False) * len(x)
    assert float(quick.matrix(centred=True)[0, 0]) == pytest.approx(float(wanted), rel=1e-4)


def test_sums_that_are_not_finite_give_no_order() -> None:
    sums = Scatter(3)
    sums.add(torch.tensor([[1.0, 2.0, torch.nan], [0.0, 1.0, 1.0]]))
    with pytest.raises(DataError, match="NaN or infinity"):
        elimination_order(sums.matrix(centred=True), torch.ones(3, 2))
    indefinite = torch.diag(torch.tensor([4.0, 4.0, -1.0]))
    with pytest.raises(DataError, match="do not determine an order"):
        elimination_order(indefinite, torch.ones(3, 2))


def test_too_few_rows_are_refused_with_how_many_are_needed() -> None:
    x, y, weight, bias = rows(5, 6, 2)
    with pytest.raises(DataError, match=r"5 calibration tokens .* 6 inputs .*rank at most 5.*at least 6"):
        summed(x, y, batches=1).solve(weight, bias, ridge=1e-3)


def test_the_rank_is_told_where_rows_are_scarce() -> None:
    x, y, weight, bias = rows(9, 6, 2)
    assert summed(x, y).solve(weight, bias, ridge=1e-3).rank == 6
    x[:, 5] = x[:, 4]
    assert summed(x, y).solve(weight, bias, ridge=1e-3).rank == 5
    x, y, weight, bias = rows(12, 6, 2)
    assert summed(x, y).solve(weight, bias, ridge=1e-3).rank is None


def test_copies_of_an_input_share_its_weight() -> None:
    x, y, weight, bias = rows(60, 3, 2)
    doubled = torch.cat([x, x[:, :1]], dim=1)
    solved = summed(doubled, y).solve(torch.zeros(4, 2, dtype=torch.float64), bias, ridge=1e-6)
    torch.testing.assert_close(solved.weight[0], solved.weight[3], rtol=1e-6, atol=1e-6)


def test_constant_inputs_leave_the_start_and_move_the_bias() -> None:
    x, y = torch.zeros(20, 3, dtype=torch.float64), torch.ones(20, 2, dtype=torch.float64)
    weight = torch.ones(3, 2, dtype=torch.float64)
    solved = summed(x, y).solve(weight, torch.zeros(2, dtype=torch.float64), ridge=1e-3)
    assert torch.equal(solved.weight, weight) and solved.bias is not None
    torch.testing.assert_close(solved.bias, y[0])


def test_nan_is_refused() -> None:
    x, y, weight, bias = rows(30, 4, 2)
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        summed(x, y).solve(weight, bias, ridge=1e-3)


def best_error(x: Tensor, y: Tensor, keep: list[int]) -> float:
    kept = x[:, keep].numpy()
    return float(np.square(kept @ np.linalg.lstsq(kept, y.numpy(), rcond=None)[0] - y.numpy()).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, 2]))
def test_each_unit_given_up_is_the_one_whose_loss_costs_least(seed: int, unit: int) -> None:
    """Against refitting without each unit in turn, from the least important unit on."""
    x, _, weight, _ = rows(80, 8, 3, seed=seed)
    y = x @ weight
    order = elimination_order(x.t() @ x, weight, unit=unit, ridge=1e-12).tolist()
    left = list(range(8 // unit))
    for gone in reversed(order[1:]):
        errors = {
            u: best_error(x, y, [i for v in left if v != u for i in range(v * unit, v * unit + unit)]) for u in left
        }
        assert errors[gone] <= min(errors.values()) * (1 + 1e-3) + 1e-9
        left.remove(gone)
    assert left == order[:1]


def test_a_copy_is_given_up_before_anything_that_is_unique() -> None:
    x, _, weight, _ = rows(200, 6, 3)
    x[:, 2] = x[:, 0] * 5  # large, and of no use beside its copy
    order = elimination_order(x.t() @ x, weight, ridge=1e-9).tolist()
    assert order[-1] in (0, 2)


def test_giving_up_many_at_once_still_orders_every_unit() -> None:
    x, _, weight, _ = rows(300, 130, 3)
    order = elimination_order(x.t() @ x, weight, at_once=4)
    assert sorted(order.tolist()) == list(range(130))
