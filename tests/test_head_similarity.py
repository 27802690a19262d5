"""CKA of heads against centring matrices on all data at once, and groups against the loop of the algorithm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_elastic import DataError
from hf_elastic.head_similarity import HeadFeatures, Samples, greedy_groups, linear_cka, resplit_count

H, d = 4, 3


def contexts(*shape: int, seed: int = 0, width: int = H * d) -> Tensor:
    """Correlated features ``(*shape, width)`` with means, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(*shape, width, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def masks(*shape: int, seed: int = 0) -> Tensor:
    """Padding on the right, at least one token each."""
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(shape[1]) < lengths).long()


def rotation(size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def summed(*batches: Tensor, samples: Samples = "tokens", masked: list[Tensor] | None = None) -> HeadFeatures:
    features = HeadFeatures(H, d, samples=samples)
    for batch, mask in zip(batches, masked or [None] * len(batches), strict=True):
        features.add(batch, mask)
    return features


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """tr(K J L J) / (n - 1)² with the centring matrix J."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(x @ x.T @ centring @ y @ y.T @ centring)) / (n - 1) ** 2


def direct_cka(features: list[list[np.ndarray]]) -> np.ndarray:
    """From a list of batches of the features of each head, HSICs averaged over batches."""
    heads = range(len(features[0]))
    mean = np.array([[np.mean([hsic(batch[a], batch[b]) for batch in features]) for b in heads] for a in heads])
    return mean / np.sqrt(np.outer(mean.diagonal(), mean.diagonal()))


def split(rows: Tensor) -> list[np.ndarray]:
    return [part.numpy() for part in rows.split(d, dim=-1)]


def test_tokens_over_many_masked_batches_are_one_centring_over_all_of_them() -> None:
    batches = [contexts(3, 5, seed=1), contexts(2, 7, seed=2) + 2.0, contexts(1, 4, seed=3)]
    kept = [masks(3, 5, seed=1), masks(2, 7, seed=2), masks(1, 4, seed=3)]
    rows = torch.cat([batch[mask.bool()] for batch, mask in zip(batches, kept, strict=True)])
    features = summed(*batches, masked=kept)
    found = features.cka()
    assert found.dtype == torch.float64 and features.count == len(rows)
    np.testing.assert_allclose(found.numpy(), direct_cka([split(rows)]), rtol=1e-10)
    torch.testing.assert_close(found, summed(rows[None]).cka(), rtol=1e-12, atol=0)
    assert not np.allclose(found.numpy(), direct_cka([split(batch.flatten(0, 1)) for batch in batches]), rtol=1e-2)


def test_sequences_are_flattened_centred_and_averaged_over_batches() -> None:
    batches = [contexts(5, 4, seed=1), contexts(3, 6, seed=2)]
    kept = [masks(5, 4, seed=1), masks(3, 6, seed=2)]
    flat = []
    for batch, mask in zip(batches, kept, strict=True):
        zeroed = (batch * mask[..., None]).unflatten(2, (H, d))
        flat.append([zeroed[:, :, head].flatten(1).numpy() for head in range(H)])
    features = summed(*batches, samples="sequences", masked=kept)
    np.testing.assert_allclose(features.cka().numpy(), direct_cka(flat), rtol=1e-10)
    assert features.count == 2


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
def test_padding_may_hold_anything_and_real_tokens_count(samples: Samples) -> None:
    batch, mask = contexts(4, 6), masks(4, 6)
    spoiled = batch.masked_fill(mask[..., None] == 0, torch.nan)
    expected = summed(batch, samples=samples, masked=[mask]).cka()
    assert torch.equal(summed(spoiled, samples=samples, masked=[mask]).cka(), expected)
    assert torch.equal(summed(spoiled, samples=samples, masked=[mask.bool()]).cka(), expected)
    assert not torch.allclose(summed(batch, samples=samples).cka(), expected, rtol=1e-3)


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
def test_sequences_and_batches_of_padding_are_no_samples(samples: Samples) -> None:
    batch, mask = contexts(4, 6), masks(4, 6)
    more = torch.cat([contexts(1, 6, seed=9), batch]), torch.cat([torch.zeros(1, 6).long(), mask])
    expected = summed(batch, samples=samples, masked=[mask]).cka()
    torch.testing.assert_close(summed(more[0], samples=samples, masked=[more[1]]).cka(), expected)
    if samples == "tokens":
        features = summed(batch, batch, masked=[mask, torch.zeros_like(mask)])
        assert torch.equal(features.cka(), expected) and features.count == int(mask.sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.sampled_from(["tokens", "sequences"]), st.booleans())
def test_turning_scaling_and_moving_a_head_changes_nothing(
    seed: int, scale: float, samples: Samples, mirrored: bool
) -> None:
    batch = contexts(5, 4, seed=seed)
    turned = batch.clone()
    sign = -1.0 if mirrored else 1.0
    turned[..., d : 2 * d] = sign * scale * batch[..., d : 2 * d] @ rotation(d, seed=seed) + 3.0
    expected = summed(batch, samples=samples).cka()
    torch.testing.assert_close(summed(turned, samples=samples).cka(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
def test_heads_equal_up_to_a_turn_have_one_and_stretched_ones_less(samples: Samples) -> None:
    batch = contexts(5, 6)
    batch[..., d : 2 * d] = 0.1 * batch[..., :d] @ rotation(d)
    batch[..., 2 * d : 3 * d] = batch[..., :d] * torch.tensor([1.0, 30.0, 1.0])
    found = summed(batch, samples=samples).cka()
    assert found[0, 1] == pytest.approx(1, abs=1e-12) and found[0, 2] < 0.95
    assert torch.equal(found, found.t()) and torch.equal(found.diagonal(), torch.ones(H).double())
    assert bool((found >= 0).all()) and bool((found <= 1).all())


def test_heads_of_one_feature_have_their_squared_correlation() -> None:
    features = HeadFeatures(2, 1)
    features.add(torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 6.0]]]))
    # Deviations (-1, 0, 1) and (-1, -2, 3): 4² / (2 · 14).
    assert float(features.cka()[0, 1]) == pytest.approx(16 / 28, rel=1e-12)


def test_few_sequences_make_any_heads_alike_and_tokens_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randn(4, 300, H * d, generator=generator)
    others = ~torch.eye(H, dtype=torch.bool)
    assert float(summed(unrelated, samples="sequences").cka()[others].min()) > 0.9
    assert float(summed(unrelated).cka()[others].max()) < 0.1
    pair = summed(unrelated[:2], samples="sequences").cka()
    torch.testing.assert_close(pair, torch.ones(H, H).double())


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_constant_head_is_alike_to_none_but_itself(samples: Samples, noise: float) -> None:
    batch = contexts(5, 6)
    rounding = 1 + noise * contexts(5, 6, seed=4).sign()
    batch[..., d : 2 * d] = torch.tensor([5.0, -0.3, 0.0]) * rounding[..., :d]
    batch[..., 3 * d :] = 0
    features = summed(batch, batch[:, :4], samples=samples)
    found = features.cka()
    assert features.constant_heads() == (1, 3)
    for head in (1, 3):
        expected = torch.zeros(H).double()
        expected[head] = 1
        assert torch.equal(found[head], expected) and torch.equal(found[:, head], expected)
    assert float(found[0, 2]) > 0


def test_a_small_variance_around_a_large_mean_is_none_the_less_one() -> None:
    batch = contexts(8, 6)
    moved = batch.clone()
    moved[..., :d] = 1e-3 * batch[..., :d] + 300.0
    features = summed(moved[:5], moved[5:])
    assert features.constant_heads() == ()
    torch.testing.assert_close(features.cka(), summed(batch).cka(), rtol=1e-7, atol=1e-9)


def test_covariances_and_means_are_those_of_numpy() -> None:
    batches, kept = [contexts(3, 5, seed=1), contexts(2, 7, seed=2)], [masks(3, 5), masks(2, 7)]
    features = summed(*batches, masked=kept)
    rows = torch.cat([batch[mask.bool()] for batch, mask in zip(batches, kept, strict=True)]).numpy()
    whole = np.cov(rows, rowvar=False, bias=True)
    np.testing.assert_allclose(features.covariance(2, 1).numpy(), whole[2 * d : 3 * d, d : 2 * d], rtol=1e-9)
    np.testing.assert_allclose(features.covariance(0, 0).numpy(), whole[:d, :d], rtol=1e-9)
    np.testing.assert_allclose(features.mean(3).numpy(), rows.mean(0)[3 * d :], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", ["tokens", "sequences"])
def test_sums_are_in_float64_whatever_comes_in(dtype: torch.dtype, samples: Samples) -> None:
    batch = contexts(4, 6).to(dtype).requires_grad_()
    found = summed(batch, samples=samples).cka()
    assert not found.requires_grad
    assert torch.equal(found, summed(batch.double(), samples=samples).cka())


def test_what_was_given_and_what_was_summed_stays() -> None:
    batch = contexts(4, 6)
    kept = batch.clone()
    features = summed(batch)
    first = features.cka()
    features.covariance(0, 1).zero_()
    features.mean(0).zero_()
    assert torch.equal(features.cka(), first) and torch.equal(batch, kept)


SPOILED = contexts(2, 3).index_fill(0, torch.tensor([1]), torch.inf)


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
@pytest.mark.parametrize(
    ("context", "mask", "message"),
    [
        (contexts(2, 3)[0], None, r"\(B, T, 12\), got \(3, 12\)"),
        (contexts(2, 3)[..., 1:], None, r"4 heads of 3 .* got \(2, 3, 11\)"),
        (contexts(2, 3), torch.ones(2, 4), r"\(2, 3, 12\) has their \(B, T\), got \(2, 4\)"),
        (SPOILED, None, "NaN or infinity"),
        (SPOILED.nan_to_num(posinf=torch.nan), None, "NaN or infinity"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_and_leaves_the_sums(
    samples: Samples, context: Tensor, mask: Tensor | None, message: str
) -> None:
    features = summed(contexts(3, 5), samples=samples)
    before, count = features.cka(), features.count
    with pytest.raises(DataError, match=message):
        features.add(context, mask)
    with pytest.raises(DataError, match=message):
        HeadFeatures(H, d, samples=samples).add(context, mask)
    assert torch.equal(features.cka(), before) and features.count == count


def test_one_sequence_is_no_batch_of_sequences() -> None:
    with pytest.raises(DataError, match="a batch of 1 sequences .* at least two"):
        summed(contexts(1, 9), samples="sequences")
    with pytest.raises(DataError, match="a batch of 1 sequences"):
        summed(contexts(2, 2), samples="sequences", masked=[torch.tensor([[1, 0], [0, 0]])])


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
def test_nothing_added_compares_nothing(samples: Samples) -> None:
    features = HeadFeatures(H, d, samples=samples)
    for read in (features.cka, features.constant_heads):
        with pytest.raises(DataError, match="no contexts were added"):
            read()


@pytest.mark.parametrize("read", [lambda f: f.covariance(0, 1), lambda f: f.covariance(1, 0), lambda f: f.mean(0)])
def test_covariances_need_tokens_and_heads_that_are_there(read: Callable[[HeadFeatures], Tensor]) -> None:
    with pytest.raises(DataError, match="samples='tokens'"):
        read(summed(contexts(3, 5), samples="sequences"))
    with pytest.raises(DataError, match="no contexts were added"):
        read(HeadFeatures(H, d))
    with pytest.raises(DataError, match="a single token"):
        read(summed(contexts(1, 1)))
    for head in (-1, H):
        with pytest.raises(DataError, match=f"head {head} is not among 0 to 3"):
            summed(contexts(3, 5)).covariance(0, head)


@pytest.mark.parametrize(
    ("heads", "size", "samples", "message"),
    [(0, 3, "tokens", "heads=0"), (4, 0, "tokens", "head_dim=0"), (4, 3, "batches", "samples='batches'")],
)
def test_features_of_nothing_are_refused(heads: int, size: int, samples: Samples, message: str) -> None:
    with pytest.raises(DataError, match=message):
        HeadFeatures(heads, size, samples=samples)


def looped_groups(cka: np.ndarray, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Algorithm 1 as it is written, without counting a head twice."""
    taken: set[int] = set()
    groups = []
    for j in range(len(cka)):
        if j in taken:
            continue
        group = [j]
        for k in range(j + 1, len(cka)):
            if k not in taken and cka[j, k] > threshold:
                group.append(k)
                taken.add(k)
        groups.append(tuple(group))
    return tuple(groups)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(0, 999), st.floats(0.01, 1))
def test_groups_are_those_of_the_loop(heads: int, seed: int, threshold: float) -> None:
    values = np.random.default_rng(seed).random((heads, heads))
    cka = np.maximum(values, values.T)
    np.fill_diagonal(cka, 1)
    found = greedy_groups(torch.tensor(cka), threshold)
    assert found == looped_groups(cka, threshold)
    assert sorted(head for group in found for head in group) == list(range(heads))
    for first, *others in found:
        assert all(cka[first, other] > threshold for other in others)


def similarities(*pairs: tuple[int, int], heads: int = 4, value: float = 0.95) -> Tensor:
    cka = torch.eye(heads)
    for a, b in pairs:
        cka[a, b] = cka[b, a] = value
    return cka


def test_a_head_two_heads_claim_goes_to_the_first_and_counts_once() -> None:
    assert greedy_groups(similarities((0, 2), (1, 2), (1, 3))) == ((0, 2), (1, 3))


def test_likeness_does_not_travel_through_a_head_that_is_taken() -> None:
    assert greedy_groups(similarities((0, 1), (1, 2), (2, 3))) == ((0, 1), (2, 3))


def test_the_threshold_itself_is_not_alike() -> None:
    assert greedy_groups(similarities((0, 1), value=0.5), 0.5) == ((0,), (1,), (2,), (3,))
    assert greedy_groups(torch.ones(3, 3), 1) == ((0,), (1,), (2,))
    assert greedy_groups(torch.ones(3, 3)) == ((0, 1, 2),)
    assert greedy_groups(similarities((0, 1), value=0.9001)) == ((0, 1), (2,), (3,))


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(DataError, match="above 0 and at most 1"):
        greedy_groups(torch.eye(3), threshold)


@pytest.mark.parametrize(
    ("cka", "message"),
    [
        (torch.ones(3), "square"),
        (torch.ones(3, 2), r"square matrix \(H, H\), got \(3, 2\)"),
        (torch.ones(0, 0), "square"),
        (torch.full((2, 2), torch.nan), "NaN"),
    ],
)
def test_similarities_that_cannot_be_are_refused(cka: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        greedy_groups(cka)


@pytest.mark.parametrize(
    ("left", "width", "expected"),
    [(12, 528, 12), (10, 528, 8), (9, 528, 8), (7, 132, 6), (5, 132, 4), (7, 31, 1), (1, 8, 1), (12, 5, 5)],
)
def test_heads_are_split_anew_by_the_next_number_that_divides(left: int, width: int, expected: int) -> None:
    assert resplit_count(left, width) == expected


@pytest.mark.parametrize(("left", "width"), [(0, 8), (4, 0), (-1, 8)])
def test_no_heads_or_no_width_cannot_be_split(left: int, width: int) -> None:
    with pytest.raises(DataError, match="at least 1"):
        resplit_count(left, width)


@pytest.mark.parametrize(("rows", "first", "second"), [(50, 6, 4), (5, 6, 4), (6, 6, 9), (5, 4, 6)])
def test_cka_of_matrices_is_that_of_centred_kernels(rows: int, first: int, second: int) -> None:
    x, y = contexts(rows, seed=1, width=first), contexts(rows, seed=2, width=second) + 1e-3
    y[:, 0] += x[:, 1]
    expected = direct_cka([[x.numpy(), y.numpy()]])[0, 1]
    assert 0.02 < expected < 0.99
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(y, x) == pytest.approx(expected, rel=1e-10)
    turned = 7.0 * x @ rotation(first) - 2.0
    assert linear_cka(turned, y) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(turned, x) == pytest.approx(1, abs=1e-12)


def test_cka_of_matrices_is_that_of_heads_and_tokens() -> None:
    batch = contexts(4, 6)
    rows = batch.flatten(0, 1)
    found = summed(batch).cka()
    for a, b in ((0, 1), (3, 2)):
        expected = pytest.approx(float(found[a, b]), rel=1e-10)
        assert linear_cka(rows[:, a * d : (a + 1) * d], rows[:, b * d : (b + 1) * d]) == expected


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_cka_of_matrices_keeps_its_value_at_any_scale(scale: float) -> None:
    x, y = contexts(20, seed=1), contexts(20, seed=2)
    assert linear_cka(x * scale, y / scale) == pytest.approx(linear_cka(x, y), rel=1e-9)


def test_a_constant_matrix_is_alike_to_none() -> None:
    x = contexts(20)
    constant = torch.full((20, 3), 0.1)
    assert linear_cka(x, constant) == linear_cka(constant, x) == linear_cka(constant, constant) == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(3), torch.ones(3, 1), r"got \(3,\) and \(3, 1\)"),
        (torch.ones(3, 2), torch.ones(4, 2), r"got \(3, 2\) and \(4, 2\)"),
        (torch.ones(1, 2), torch.ones(1, 2), "N of at least 2"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), "NaN"),
        (torch.ones(3, 2), torch.full((3, 2), torch.inf), "NaN or infinity"),
    ],
)
def test_matrices_that_cannot_be_compared_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        linear_cka(x, y)
