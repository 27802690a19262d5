"""Merged and removed heads against what real attention of random tokens writes, and against scipy's Procrustes."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from hf_elastic import DataError
from hf_elastic.head_merging import Head, Shared, merge_heads, remove_heads
from hf_elastic.head_similarity import HeadFeatures, greedy_groups

d, INPUTS, OUTPUTS = 4, 10, 7
SHARED: list[Shared] = ["none", "qv", "kv"]


class Drawn:
    """Random matrices from one seed, float64."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def rotation(self) -> Tensor:
        return torch.linalg.qr(self.normal(d, d))[0]

    def tokens(self) -> Tensor:
        return self.normal(5, 12, INPUTS) @ (self.normal(INPUTS, INPUTS) / INPUTS**0.5) + 0.5

    def head(self, shared: Shared = "none") -> Head:
        matrices = [self.normal(d, INPUTS) / 2 for _ in range(3)]
        return tied(Head(*matrices, self.normal(OUTPUTS, d), *(self.normal(d) for _ in range(3))), shared)

    def turned(self, head: Head, shared: Shared = "none") -> Head:
        """The same head in other coordinates, with another output; the scores and the context say the same."""
        turn, other = self.rotation(), self.rotation()
        scale = float(self.normal(1).exp()) + 0.2
        scores = {"none": (other, other), "qv": (scale * turn, turn / scale), "kv": (turn / scale, scale * turn)}
        query, key = scores[shared]
        made = Head(
            query @ head.query,
            key @ head.key,
            scale * turn @ head.value,
            self.normal(OUTPUTS, d),
            query @ head.query_bias,
            key @ head.key_bias,
            scale * turn @ head.value_bias,
        )
        return tied(made, shared)


def tied(head: Head, shared: Shared) -> Head:
    if shared == "qv":
        return replace(head, value=head.query, value_bias=head.query_bias)
    return replace(head, value=head.key, value_bias=head.key_bias) if shared == "kv" else head


def projected(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(tokens, weight, bias)


def context(head: Head, tokens: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, (B, T, d)."""
    query = projected(tokens, head.query, head.query_bias)
    key = projected(tokens, head.key, head.key_bias)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ projected(tokens, head.value, head.value_bias)


def written(head: Head, tokens: Tensor) -> Tensor:
    return context(head, tokens) @ head.output.t()


def summed(heads: list[Head], tokens: Tensor) -> HeadFeatures:
    features = HeadFeatures(len(heads), d)
    features.add(torch.cat([context(head, tokens) for head in heads], dim=-1))
    return features


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, beside what varies: a constant alone is no success."""
    varying = expected - expected.mean((0, 1))
    return float((found - expected).norm() / varying.norm())


def cast(head: Head, dtype: torch.dtype) -> Head:
    return Head(*(getattr(head, field.name).to(dtype) for field in fields(Head)))


def layer(drawn: Drawn, shared: Shared = "none", *, identical: bool = False) -> list[Head]:
    """Five heads, of which 1, 3 and 4 are one."""
    one = drawn.head(shared)
    same = [replace(one, output=drawn.normal(OUTPUTS, d)) if identical else drawn.turned(one, shared) for _ in "ab"]
    return [drawn.head(shared), one, drawn.head(shared), *same]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("group", [(1, 3, 4), (4, 1), (3, 1, 4)])
@pytest.mark.parametrize("identical", [True, False])
def test_heads_that_are_one_in_other_coordinates_are_merged_exactly(
    shared: Shared, group: tuple[int, ...], identical: bool
) -> None:
    drawn = Drawn(1)
    heads, tokens = layer(drawn, shared, identical=identical), drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=group, shared=shared)
    fresh = drawn.tokens()
    for seen in (tokens, fresh):
        expected = sum(written(heads[index], seen) for index in group)
        assert difference(written(merged, seen), expected) < 1e-10
        torch.testing.assert_close(context(merged, seen), context(heads[group[0]], seen))
    assert difference(written(heads[group[0]], tokens), sum(written(heads[i], tokens) for i in group)) > 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(SHARED))
def test_merging_is_exact_for_any_turn(seed: int, shared: Shared) -> None:
    drawn = Drawn(seed)
    heads, tokens = layer(drawn, shared), drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(1, 3, 4), shared=shared)
    expected = sum(written(heads[index], tokens) for index in (1, 3, 4))
    assert difference(written(merged, tokens), expected) < 1e-7


@pytest.mark.parametrize("shared", SHARED)
def test_merging_in_float32_is_exact_to_a_hundred_thousandth(shared: Shared) -> None:
    drawn = Drawn(2)
    heads = [cast(head, torch.float32) for head in layer(drawn, shared)]
    tokens = drawn.tokens().float()
    merged = merge_heads(heads, summed(heads, tokens), group=(1, 3, 4), shared=shared)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in vars(merged).values())
    expected = sum(written(heads[index], tokens) for index in (1, 3, 4))
    assert difference(written(merged, tokens), expected) < 1e-5


@pytest.mark.parametrize("shared", SHARED)
def test_heads_without_biases_stay_without(shared: Shared) -> None:
    drawn = Drawn(3)
    none = {"query_bias": torch.zeros(d).double(), "key_bias": torch.zeros(d).double()}
    one = tied(replace(drawn.head(), value_bias=torch.zeros(d).double(), **none), shared)
    heads = [
        replace(head, query_bias=None, key_bias=None, value_bias=None) for head in (one, drawn.turned(one, shared))
    ]
    tokens = drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(0, 1), shared=shared)
    assert merged.query_bias is merged.key_bias is merged.value_bias is None
    expected = written(heads[0], tokens) + written(heads[1], tokens)
    assert difference(written(merged, tokens), expected) < 1e-10


def test_shared_projections_stay_one_tensor_and_others_do_not() -> None:
    drawn = Drawn(4)
    for shared, names in (("qv", ("query", "value")), ("kv", ("key", "value"))):
        heads = layer(drawn, shared)
        merged = merge_heads(heads, summed(heads, drawn.tokens()), group=(1, 3), shared=shared)
        assert getattr(merged, names[0]) is getattr(merged, names[1])
        assert getattr(merged, f"{names[0]}_bias") is getattr(merged, f"{names[1]}_bias")
    heads = layer(drawn)
    merged = merge_heads(heads, summed(heads, drawn.tokens()), group=(1, 3))
    assert merged.value is not merged.query and merged.value is not merged.key


def test_groups_found_by_likeness_replace_all_heads_of_a_layer() -> None:
    drawn = Drawn(5)
    kinds = [drawn.head() for _ in range(3)]
    order = (0, 1, 0, 2, 1, 0, 2)
    heads = [drawn.turned(kinds[kind]) for kind in order]
    tokens = drawn.tokens()
    features = summed(heads, tokens)
    groups = greedy_groups(features.cka(), 0.99)
    assert groups == ((0, 2, 5), (1, 4), (3, 6))
    expected = sum(written(head, tokens) for head in heads)
    found = sum(written(merge_heads(heads, features, group=group), tokens) for group in groups)
    assert difference(found, expected) < 1e-10


def test_directions_in_which_contexts_do_not_vary_are_turned_by_the_weights() -> None:
    drawn = Drawn(6)
    one = drawn.head()
    flat = one.value.clone()
    flat[1:] = 0  # three features are their bias
    one = replace(one, value=flat)
    heads, tokens = [one, drawn.turned(one), drawn.turned(one)], drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(0, 1, 2))
    expected = sum(written(head, tokens) for head in heads)
    assert difference(written(merged, tokens), expected) < 1e-9


def test_the_bias_of_a_key_that_is_no_value_has_no_say() -> None:
    drawn = Drawn(7)
    one = drawn.head()
    heads = [replace(drawn.turned(one), key_bias=20 * drawn.normal(d)) for _ in "abc"]
    tokens = drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(0, 1, 2))
    assert difference(written(merged, tokens), sum(written(head, tokens) for head in heads)) < 1e-10


@pytest.mark.parametrize("shared", SHARED)
def test_heads_that_attend_to_all_tokens_alike_are_merged_exactly(shared: Shared) -> None:
    drawn = Drawn(16)
    one = drawn.head(shared)
    zeros = {"key": torch.zeros(d, INPUTS).double()} if shared == "qv" else {"query": torch.zeros(d, INPUTS).double()}
    zeros |= {f"{name}_bias": torch.zeros(d).double() for name in zeros}
    if shared == "none":
        zeros |= {"key": zeros["query"], "key_bias": zeros["query_bias"]}
    one = replace(one, **zeros)
    heads, tokens = [one, drawn.turned(one, shared)], drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(0, 1), shared=shared)
    assert difference(written(merged, tokens), sum(written(head, tokens) for head in heads)) < 1e-7


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix)


def stacked(weight: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """Samples in rows, features of the head in columns, as scipy has them."""
    columns = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    return columns.numpy().T


def rows_of(head: Head, features: np.ndarray, shared: Shared) -> tuple[np.ndarray, np.ndarray]:
    """What decides on the turn of the value and of the query, for an unrelated implementation."""
    if shared == "none":
        value = np.vstack([unit(features), np.sqrt(1e-3) * unit(stacked(head.value, head.value_bias))])
        return value, np.vstack([stacked(head.query, head.query_bias), stacked(head.key)])
    query, key = stacked(head.query, head.query_bias), stacked(head.key)
    if shared == "kv":
        key = stacked(head.key, head.key_bias)
    both = np.vstack([unit(features), unit(query), unit(key)])
    return both, both


@pytest.mark.parametrize("shared", SHARED)
def test_unrelated_heads_are_turned_as_scipy_turns_them_then_averaged_and_added(shared: Shared) -> None:
    drawn = Drawn(8)
    heads, tokens = [drawn.head(shared) for _ in range(4)], drawn.tokens()
    group = (2, 0, 3)
    centred = [context(head, tokens).flatten(0, 1).numpy() for head in heads]
    centred = [features - features.mean(0) for features in centred]
    target = rows_of(heads[2], centred[2], shared)
    made = []
    for index in group:
        head = heads[index]
        rows = rows_of(head, centred[index], shared)
        inner, outer = (torch.tensor(orthogonal_procrustes(a, b)[0]) for a, b in zip(rows, target, strict=True))
        scale = float(np.linalg.norm(centred[2]) / np.linalg.norm(centred[index]))
        query, key = {"none": (1, 1), "qv": (scale, 1 / scale), "kv": (1 / scale, scale)}[shared]
        projections = (head.query, query * outer), (head.key, key * outer), (head.value, scale * inner)
        biases = (head.query_bias, query * outer), (head.key_bias, key * outer), (head.value_bias, scale * inner)
        matrices = [turn.t() @ weight for weight, turn in projections]
        made.append(Head(*matrices, head.output @ inner / scale, *(turn.t() @ bias for bias, turn in biases)))
    merged = merge_heads(heads, summed(heads, tokens), group=group, shared=shared)
    for field in fields(Head):
        parts = torch.stack([getattr(head, field.name) for head in made])
        expected = parts.sum(0) if field.name == "output" else parts.mean(0)
        torch.testing.assert_close(getattr(merged, field.name), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shared", SHARED)
def test_heads_that_differ_a_little_are_merged_with_little_loss(shared: Shared) -> None:
    drawn = Drawn(9)
    one = drawn.head(shared)

    def near(head: Head) -> Head:
        moved = {name: tensor + 0.02 * drawn.normal(*tensor.shape) for name, tensor in vars(head).items()}
        return tied(Head(**moved), shared)

    heads, tokens = [drawn.turned(near(one), shared) for _ in range(3)], drawn.tokens()
    merged = merge_heads(heads, summed(heads, tokens), group=(0, 1, 2), shared=shared)
    expected = sum(written(head, tokens) for head in heads)
    averaged = Head(*(torch.stack([getattr(head, f.name) for head in heads]).mean(0) for f in fields(Head)))
    naive = replace(averaged, output=3 * averaged.output)
    losses = [difference(written(head, tokens), expected) for head in (merged, naive)]
    assert losses[0] < 0.2 < 0.6 < losses[1]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_group_of_one_is_the_head_itself(shared: Shared, dtype: torch.dtype) -> None:
    drawn = Drawn(10)
    heads = [cast(drawn.head(shared), dtype) for _ in range(2)]
    features = summed(heads, drawn.tokens().to(dtype))
    merged = merge_heads(heads, features, group=(1,), shared=shared)
    kept, correction = remove_heads(heads, features, group=(1,))
    for field in fields(Head):
        for found in (merged, kept):
            assert torch.equal(getattr(found, field.name), getattr(heads[1], field.name))
            assert getattr(found, field.name).dtype == dtype and getattr(found, field.name).is_contiguous()
    assert torch.equal(correction, torch.zeros(OUTPUTS, dtype=dtype)) and correction.dtype == dtype


def test_heads_and_features_stay_as_they_are() -> None:
    drawn = Drawn(11)
    heads, tokens = layer(drawn), drawn.tokens()
    features = summed(heads, tokens)
    copies, cka = [cast(head, torch.float64) for head in heads], features.cka()
    copies = [Head(*(tensor.clone() for tensor in vars(head).values())) for head in copies]
    merge_heads(heads, features, group=(1, 3))
    remove_heads(heads, features, group=(1, 3))
    for head, copy in zip(heads, copies, strict=True):
        assert all(torch.equal(getattr(head, field.name), getattr(copy, field.name)) for field in fields(Head))
    assert torch.equal(features.cka(), cka)


def related(drawn: Drawn, head: Head) -> Head:
    """A head whose context is any linear function of another's, with a constant."""
    mixing = drawn.normal(d, d)
    return replace(
        head,
        value=mixing @ head.value,
        value_bias=mixing @ head.value_bias + 3 * drawn.normal(d),
        output=drawn.normal(OUTPUTS, d),
    )


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_with_linearly_related_contexts_are_removed_exactly(shared: Shared, dtype: torch.dtype) -> None:
    drawn = Drawn(12)
    one = drawn.head(shared)
    heads = [cast(head, dtype) for head in (related(drawn, one), drawn.head(), one, related(drawn, one))]
    tokens, fresh = drawn.tokens().to(dtype), drawn.tokens().to(dtype)
    kept, correction = remove_heads(heads, summed(heads, tokens), group=(2, 0, 3))
    for name in ("query", "key", "value", "query_bias", "key_bias", "value_bias"):
        assert getattr(kept, name) is getattr(heads[2], name)
    assert kept.output.dtype == correction.dtype == dtype
    for seen in (tokens, fresh):
        expected = sum(written(heads[index], seen) for index in (2, 0, 3))
        assert difference(written(kept, seen) + correction, expected) < 3e-5
    assert difference(written(kept, tokens), expected := sum(written(heads[i], tokens) for i in (2, 0, 3))) > 0.1
    assert difference(written(heads[2], tokens), expected) > 0.1


def test_removal_is_the_ridge_solution_of_one_dense_system() -> None:
    drawn = Drawn(13)
    heads, tokens = [drawn.head() for _ in range(3)], drawn.tokens()
    contexts = [context(head, tokens).flatten(0, 1).numpy() for head in heads]
    rows = len(contexts[0])
    strength = 1e-8 * contexts[1].var(0).mean()
    output, constant = heads[1].output.numpy(), np.zeros(OUTPUTS)
    system = np.hstack([contexts[1], np.ones((rows, 1))])
    penalty = np.hstack([np.sqrt(rows * strength) * np.eye(d), np.zeros((d, 1))])
    for index in (2, 0):
        target = np.vstack([contexts[index], np.zeros((d, d))])
        solved = np.linalg.lstsq(np.vstack([system, penalty]), target, rcond=None)[0]
        output = output + heads[index].output.numpy() @ solved[:-1].T
        constant = constant + heads[index].output.numpy() @ solved[-1]
    kept, correction = remove_heads(heads, summed(heads, tokens), group=(1, 2, 0))
    np.testing.assert_allclose(kept.output.numpy(), output, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(correction.numpy(), constant, rtol=1e-7, atol=1e-9)


def test_removal_keeps_the_mean_of_what_is_written() -> None:
    drawn = Drawn(14)
    heads, tokens = [drawn.head() for _ in range(3)], drawn.tokens()
    kept, correction = remove_heads(heads, summed(heads, tokens), group=(0, 1, 2))
    expected = sum(written(head, tokens) for head in heads).mean((0, 1))
    torch.testing.assert_close((written(kept, tokens) + correction).mean((0, 1)), expected)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_head_takes_over_the_means_and_leaves_its_own(value: float) -> None:
    drawn = Drawn(15)
    other = drawn.head()
    constant = replace(drawn.head(), value=torch.zeros(d, INPUTS).double(), value_bias=torch.full((d,), value).double())
    heads, tokens = [constant, other], drawn.tokens()
    features = summed(heads, tokens)
    kept, correction = remove_heads(heads, features, group=(0, 1))
    assert torch.equal(kept.output, constant.output)
    torch.testing.assert_close(correction, written(other, tokens).mean((0, 1)))
    kept, correction = remove_heads(heads, features, group=(1, 0))
    torch.testing.assert_close(kept.output, other.output)
    torch.testing.assert_close(written(kept, tokens) + correction, sum(written(head, tokens) for head in heads))
    with pytest.raises(DataError, match=r"heads \[0\] write the same for all tokens"):
        merge_heads(heads, features, group=(1, 0))
    assert torch.equal(merge_heads(heads, features, group=(0,)).value, constant.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [((), "at least one"), ((1, 1), "each once"), ((0, 3), "heads of 0 to 2"), ((-1, 0), "heads of 0 to 2")],
)
def test_a_group_that_cannot_be_is_refused(group: tuple[int, ...], message: str) -> None:
    drawn = Drawn()
    heads, tokens = [drawn.head() for _ in range(3)], drawn.tokens()
    features = summed(heads, tokens)
    for replaced in (merge_heads, remove_heads):
        with pytest.raises(DataError, match=message):
            replaced(heads, features, group=group)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.ones(d + 1, INPUTS)}, "head 1 has tensors of"),
        ({"value": torch.ones(d, INPUTS + 1)}, "head 1 has tensors of"),
        ({"output": torch.ones(OUTPUTS, d + 1)}, "head 1 has tensors of"),
        ({"output": torch.ones(d, OUTPUTS)}, "head 1 has tensors of"),
        ({"key_bias": None}, "head 1 has tensors of"),
        ({"value_bias": torch.ones(1)}, "head 1 has tensors of"),
        ({"key": torch.full((d, INPUTS), torch.nan)}, "head 1 holds NaN"),
        ({"output": torch.full((OUTPUTS, d), torch.inf)}, "head 1 holds NaN or infinity"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changed: dict[str, Tensor | None], message: str) -> None:
    drawn = Drawn()
    heads = [drawn.head(), drawn.head()]
    features = summed(heads, drawn.tokens())
    spoiled = [heads[0], replace(heads[1], **changed)]
    for replaced in (merge_heads, remove_heads):
        with pytest.raises(DataError, match=message):
            replaced(spoiled, features, group=(0, 1))


def test_a_representative_of_another_size_than_the_features_is_refused() -> None:
    drawn = Drawn()
    heads, tokens = [drawn.head(), drawn.head()], drawn.tokens()
    features = HeadFeatures(2, d + 1)
    features.add(torch.cat([tokens, tokens], dim=-1)[..., : 2 * (d + 1)])
    with pytest.raises(DataError, match="head 0 has tensors of"):
        merge_heads(heads, features, group=(0, 1))


def test_features_of_other_samples_or_of_other_heads_are_refused() -> None:
    drawn = Drawn()
    heads, tokens = [drawn.head(), drawn.head()], drawn.tokens()
    sequences = HeadFeatures(2, d, samples="sequences")
    sequences.add(torch.cat([context(head, tokens) for head in heads], dim=-1))
    for replaced in (merge_heads, remove_heads):
        with pytest.raises(DataError, match="samples='tokens'"):
            replaced(heads, sequences, group=(0, 1))
        with pytest.raises(DataError, match="2 heads and features of 3"):
            replaced(heads, summed([*heads, heads[0]], tokens), group=(0, 1))
        with pytest.raises(DataError, match="no contexts were added"):
            replaced(heads, HeadFeatures(2, d), group=(0, 1))


def test_projections_said_to_be_shared_have_to_be() -> None:
    drawn = Drawn()
    heads, tokens = [drawn.head("qv"), drawn.head("qv")], drawn.tokens()
    features = summed(heads, tokens)
    with pytest.raises(DataError, match="shared='kv', but head 0 has a value that is not its key"):
        merge_heads(heads, features, group=(0, 1), shared="kv")
    for changed in ({"query_bias": heads[1].query_bias + 1}, {"value": heads[1].value * 2}):
        with pytest.raises(DataError, match="head 1 has a value that is not its query"):
            merge_heads([heads[0], replace(heads[1], **changed)], features, group=(0, 1), shared="qv")
    bare = [replace(head, value_bias=None) for head in heads]
    with pytest.raises(DataError, match="head 0 has a value that is not its query"):
        merge_heads(bare, features, group=(0, 1), shared="qv")
    with pytest.raises(DataError, match="shared='qk' is not one of 'none', 'qv', 'kv'"):
        merge_heads(heads, features, group=(0, 1), shared="qk")  # type: ignore[arg-type]
