"""The order of examples: a pure function of the seed, fair to every example, grouped by length."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils.data import DataLoader, SequentialSampler

from hf_elastic.training.order import InOrder, training_order


def test_every_epoch_of_the_order_holds_each_example_at_most_once() -> None:
    order = training_order([5] * 30, batch_size=4, steps=20, seed=0)
    assert len(order) == 80
    for start in range(0, 80, 28):  # 7 whole batches of 30 examples; the other two wait for another epoch
        assert max(Counter(order[start : start + 28]).values()) == 1
    assert set(order) == set(range(30))


def test_the_order_is_a_function_of_the_seed_and_longer_trainings_begin_alike() -> None:
    lengths = [n % 7 for n in range(50)]
    order = training_order(lengths, batch_size=4, steps=40, seed=1)
    assert order == training_order(lengths, batch_size=4, steps=40, seed=1)
    assert order[:80] == training_order(lengths, batch_size=4, steps=20, seed=1)
    assert order != training_order(lengths, batch_size=4, steps=40, seed=2)


def test_batches_are_of_similar_length_and_not_sorted_by_it() -> None:
    lengths = [1 + (n * 37) % 60 for n in range(240)]
    order = training_order(lengths, batch_size=8, steps=30, seed=0)
    batches = [[lengths[i] for i in order[s : s + 8]] for s in range(0, len(order), 8)]
    assert max(max(batch) - min(batch) for batch in batches) <= 3
    longest = [max(batch) for batch in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_fewer_examples_than_a_batch_holds_are_repeated() -> None:
    order = training_order([1, 2, 3], batch_size=8, steps=2, seed=0)
    assert len(order) == 16 and set(Counter(order).values()) <= {5, 6}


def test_the_random_states_of_the_libraries_play_no_part() -> None:
    first = training_order([3] * 20, batch_size=4, steps=9, seed=0)
    before = torch.get_rng_state()
    torch.rand(5)
    assert training_order([3] * 20, batch_size=4, steps=9, seed=0) == first
    torch.set_rng_state(before)
    training_order([3] * 20, batch_size=4, steps=9, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sequential_loader_sees_the_examples_in_their_order() -> None:
    rows = [{"row": number} for number in range(7)]
    order = [3, 1, 1, 6, 0, 5]
    dataset = InOrder(rows, order)
    assert len(dataset) == 6
    loader = DataLoader(dataset, batch_size=2, sampler=SequentialSampler(dataset), collate_fn=list)
    assert [[row["row"] for row in batch] for batch in loader] == [[3, 1], [1, 6], [0, 5]]
