"""PCA score against numpy's eigenvalues in float64 of the raw data, however the data arrive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_elastic.errors import DataError, TrainingError
from hf_elastic.training.pca import Normalisation, PreActivations, pca_score


def pre_activations(
    batch: int, tokens: int, width: int, *, inputs: int = 8, seed: int = 0, mean: float = 0.0
) -> Tensor:
    """``X W + b`` of ``(B, T, F)`` in float32, of inputs whose spread falls off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, inputs, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(1, 0.05, inputs, dtype=torch.float64)
    weight = torch.randn(inputs, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return (x @ weight + bias + mean).float()


def half_mask(batch: int, tokens: int, *, seed: int = 1) -> Tensor:
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(tokens) < lengths).long()  # (B, T)


def measured(*batches: Tensor, mask: Tensor | None = None) -> PreActivations:
    sums = PreActivations(batches[0].shape[-1])
    for batch in batches:
        sums.add(batch, mask)
    return sums


def covariance_of(rows: np.ndarray) -> np.ndarray:
    return np.cov(rows.astype(np.float64), rowvar=False, ddof=1).reshape(rows.shape[1], rows.shape[1])


def directions_of(rows: np.ndarray, eta: float) -> int:
    """k of papers.md 1.4, by adding eigenvalues up one after another."""
    values = sorted(np.linalg.eigvalsh(covariance_of(rows)), reverse=True)
    total, reached = sum(values), 0.0
    for k, value in enumerate(values, 1):
        reached += value
        if reached / total > eta:
            return k
    raise AssertionError("no share above eta")


def flat(hidden: Tensor) -> np.ndarray:
    return hidden.flatten(0, -2).numpy()


@pytest.mark.parametrize("eta", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("width", [1, 5, 8, 24, 600])
@pytest.mark.parametrize("mean", [0.0, -30.0])
def test_the_score_is_that_of_the_eigenvalues_of_the_raw_data(width: int, eta: float, mean: float) -> None:
    hidden = pre_activations(4, 64, width, inputs=12, mean=mean)
    expected = directions_of(flat(hidden), eta)
    sums = measured(hidden)
    assert pca_score(sums, inputs=12, eta=eta) == expected / min(12, width)
    assert pca_score(sums, inputs=12, eta=eta, normalise="width") == expected / width


def test_eta_is_0_99_and_the_divisor_the_smaller_width_unless_said_otherwise() -> None:
    hidden = pre_activations(4, 64, 24, inputs=12)
    assert pca_score(measured(hidden), inputs=12) == directions_of(flat(hidden), 0.99) / 12


def test_the_share_has_to_be_exceeded_not_only_reached() -> None:
    # Eigenvalues 3 : 1 exactly; three quarters are reached by one direction and exceeded by two.
    sums = PreActivations(2)
    sums.load({"count": torch.tensor(5.0).double(), "sum": torch.zeros(2).double(),
               "moments": torch.diag(torch.tensor([12.0, 4.0]).double())})  # fmt: skip
    assert pca_score(sums, inputs=2, eta=0.75) == 1.0
    assert pca_score(sums, inputs=2, eta=0.7499) == 0.5


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masked_tokens_do_not_count_even_if_they_are_not_numbers(kind: torch.dtype) -> None:
    hidden, mask = pre_activations(6, 32, 20), half_mask(6, 32)
    kept = hidden[mask.bool()]
    hidden[~mask.bool()] = math.nan
    sums = measured(hidden, mask=mask.to(kind))
    assert sums.tokens == len(kept) < 6 * 32
    np.testing.assert_allclose(sums.covariance().numpy(), covariance_of(kept.numpy()), rtol=1e-5, atol=1e-6)
    assert pca_score(sums, inputs=8) == directions_of(kept.numpy(), 0.99) / 8


def test_batches_of_different_means_add_up_to_the_covariance_of_all() -> None:
    batches = [pre_activations(1 + n, 50, 16, seed=n, mean=100.0 * n) for n in range(4)]
    rows = np.concatenate([flat(batch) for batch in batches])
    sums = measured(*batches)
    np.testing.assert_allclose(sums.covariance().numpy(), covariance_of(rows), rtol=1e-6)
    assert pca_score(sums, inputs=8) == directions_of(rows, 0.99) / 8


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_sums_over_ranks_give_the_score_of_the_global_batch_whatever_their_number(ranks: int) -> None:
    hidden, mask = pre_activations(15, 24, 30, inputs=20, mean=40.0), half_mask(15, 24)
    hidden += torch.arange(15.0)[:, None, None]  # every rank has another mean
    whole = measured(hidden, mask=mask)
    shards = [PreActivations(30) for _ in range(ranks)]
    for number in range(15):  # the last rank sees nothing
        shards[number % (ranks - 1)].add(hidden[number : number + 1], mask[number : number + 1])
    reduced = {name: torch.stack([rank.tensors()[name] for rank in shards]).sum(0) for name in whole.tensors()}
    joined = PreActivations(30)
    joined.load(reduced)
    assert joined.tokens == whole.tokens
    torch.testing.assert_close(joined.covariance(), whole.covariance(), rtol=1e-5, atol=1e-5)
    for eta in (0.9, 0.99, 0.999):
        assert pca_score(joined, inputs=20, eta=eta) == pca_score(whole, inputs=20, eta=eta)


def test_reducing_the_tensors_in_place_is_reducing_the_moments() -> None:
    one, two = (measured(pre_activations(2, 20, 6, seed=seed)) for seed in range(2))
    for name, tensor in one.tensors().items():
        tensor.add_(two.tensors()[name])  # what all_reduce does on each rank
    assert one.tokens == 80
    rows = np.concatenate([flat(pre_activations(2, 20, 6, seed=seed)) for seed in range(2)])
    np.testing.assert_allclose(one.covariance().numpy(), covariance_of(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
def test_means_far_above_the_spread_cost_no_accuracy(mean: float) -> None:
    hidden = pre_activations(8, 64, 24, mean=mean)  # rounded to float32: the oracle sees the same numbers
    rows = flat(hidden)
    sums = measured(*hidden.chunk(4))
    exact = covariance_of(rows)
    np.testing.assert_allclose(sums.covariance().numpy(), exact, atol=2e-6 * exact.diagonal().max())
    # Without the shift, products in float32 say nothing here.
    naive = hidden.flatten(0, 1).t() @ hidden.flatten(0, 1) / len(rows) - hidden.mean((0, 1)).outer(hidden.mean((0, 1)))
    assert np.abs(naive.numpy() - exact).max() > 1e3 * np.abs(sums.covariance().numpy() - exact).max()
    for eta in (0.9, 0.99):
        assert pca_score(sums, inputs=8, eta=eta) == directions_of(rows, eta) / 8


def test_a_constant_column_far_from_zero_does_not_hide_the_others() -> None:
    hidden = 1e-3 * pre_activations(8, 64, 12)
    rows = flat(hidden)
    hidden = torch.cat([hidden, torch.full((8, 64, 1), 1e6 / 3)], dim=-1)
    assert pca_score(measured(*hidden.chunk(4)), inputs=8) == directions_of(rows, 0.99) / 8


@pytest.mark.parametrize("tokens", [2, 3, 7, 12])
def test_few_tokens_limit_the_rank(tokens: int) -> None:
    hidden = pre_activations(1, tokens, 40, inputs=30)
    sums = measured(hidden)
    assert pca_score(sums, inputs=30) == directions_of(flat(hidden), 0.99) / 30
    assert pca_score(sums, inputs=30, eta=1 - 1e-9) == (tokens - 1) / 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_summed_as_they_are(dtype: torch.dtype) -> None:
    hidden = pre_activations(8, 64, 24).to(dtype)
    rows = hidden.double().flatten(0, 1).numpy()
    sums = measured(hidden)
    np.testing.assert_allclose(sums.covariance().numpy(), covariance_of(rows), rtol=1e-5, atol=1e-5)
    assert pca_score(sums, inputs=8) == directions_of(rows, 0.99) / 8


def test_rounding_of_half_precision_is_no_direction() -> None:
    hidden = pre_activations(8, 64, 48, mean=20.0)
    score = pca_score(measured(hidden.bfloat16()), inputs=8, eta=0.9999)
    assert directions_of(hidden.bfloat16().double().flatten(0, 1).numpy(), 0.9999) > 8
    assert score == 1.0


def test_autocast_and_gradients_change_nothing() -> None:
    hidden = pre_activations(8, 64, 24, mean=5.0)
    plain = measured(hidden)
    learnt = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = measured(learnt)
    assert all(torch.equal(seen.tensors()[name], tensor) for name, tensor in plain.tensors().items())
    assert not any(tensor.requires_grad for tensor in seen.tensors().values())
    assert torch.is_autocast_enabled("cpu") is False


def test_pre_activations_that_do_not_vary_have_score_0() -> None:
    for value in (0.0, 0.1, -1e6 / 3):
        sums = measured(*[torch.full((2, 33, 5), value) for _ in range(20)])
        assert pca_score(sums, inputs=5) == 0.0
        assert not sums.covariance().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_not_finite_or_overflows_gives_a_score_that_is_no_number(value: float, everywhere: bool) -> None:
    hidden = pre_activations(2, 16, 6)
    if everywhere:
        hidden[0] = value
    else:
        hidden[1, 3, 2] = value
    assert math.isnan(pca_score(measured(hidden), inputs=8))


def test_fewer_than_two_tokens_are_an_error() -> None:
    with pytest.raises(DataError, match="at least 2 tokens that count, got 0"):
        pca_score(PreActivations(4), inputs=4)
    hidden, mask = pre_activations(2, 3, 4), torch.zeros(2, 3)
    sums = measured(hidden, mask=mask)
    assert sums.tokens == 0
    mask[1, 1] = 1
    sums.add(hidden, mask)
    with pytest.raises(DataError, match="got 1"):
        pca_score(sums, inputs=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 1.0}, "eta=1.0 is a share"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"eta": math.nan}, "eta=nan"),
        ({"normalise": "max"}, "'max' is not one of 'min', 'width'"),
        ({"inputs": 0}, "inputs=0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        pca_score(measured(pre_activations(2, 8, 4)), **{"inputs": 4, **changes})


def test_shapes_that_do_not_fit_are_refused_and_change_nothing() -> None:
    sums = measured(pre_activations(2, 8, 4))
    with pytest.raises(DataError, match=r"\(B, T, 4\) here, got \(2, 8, 5\)"):
        sums.add(pre_activations(2, 8, 5))
    with pytest.raises(DataError, match=r"mask of \(8, 2\)"):
        sums.add(pre_activations(2, 8, 4), torch.ones(8, 2))
    with pytest.raises(DataError, match="moments is missing"):
        sums.load({"count": torch.tensor(5.0).double(), "sum": torch.zeros(4).double()})
    with pytest.raises(DataError, match=r"moments has to be torch.float64 of \(4, 4\), got torch.float64 of \(5, 5\)"):
        sums.load(PreActivations(4).tensors() | {"moments": torch.zeros(5, 5).double()})
    with pytest.raises(DataError, match="sum has to be torch.float64"):
        sums.load(PreActivations(4).tensors() | {"sum": torch.zeros(4)})
    assert sums.tokens == 16


@pytest.mark.parametrize(("device", "home"), [("mps", "cpu"), ("xpu:1", "cpu"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_sums_are_on_the_device_only_if_it_surely_has_float64(
    device: str, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros

    def on_the_cpu(*shape: Any, device: Any, **rest: Any) -> Tensor:
        return zeros(*shape, **rest)

    monkeypatch.setattr(torch, "zeros", on_the_cpu)
    assert PreActivations(3, device=device).device == torch.device(home)


WIDTHS: list[Normalisation] = ["min", "width"]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(2, 20),
    width=st.integers(1, 16),
    inputs=st.integers(1, 12),
    eta=st.floats(0.05, 0.999),
    seed=st.integers(0, 10**6),
    power=st.integers(-20, 20),
)
def test_a_score_is_a_share_that_neither_scale_nor_padding_changes(
    batch: int, tokens: int, width: int, inputs: int, eta: float, seed: int, power: int
) -> None:
    hidden = pre_activations(batch, tokens, width, inputs=inputs, seed=seed)
    plain = measured(hidden)
    scaled = measured(hidden * 2.0**power)  # powers of two, so that nothing is rounded
    padded = measured(
        torch.cat([hidden, torch.full((batch, 5, width), 7.0)], dim=1),
        mask=torch.cat([torch.ones(batch, tokens), torch.zeros(batch, 5)], dim=1),
    )
    for normalise in WIDTHS:
        score = pca_score(plain, inputs=inputs, eta=eta, normalise=normalise)
        assert 0 < score <= 1
        assert pca_score(scaled, inputs=inputs, eta=eta, normalise=normalise) == score
        assert pca_score(padded, inputs=inputs, eta=eta, normalise=normalise) == score


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), etas=st.tuples(st.floats(0.05, 0.999), st.floats(0.05, 0.999)))
def test_a_larger_share_never_needs_fewer_directions(seed: int, etas: tuple[float, float]) -> None:
    sums = measured(pre_activations(2, 16, 10, seed=seed))
    low, high = (pca_score(sums, inputs=8, eta=eta) for eta in sorted(etas))
    assert low <= high
