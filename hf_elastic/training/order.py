"""Which examples each step of a training sees: a pure function of a seed, whatever interrupts it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

_BATCHES_PER_POOL = 50


class InOrder(Dataset[Mapping[str, Any]]):
    """Examples in the order in which all steps of a training see them, for a Trainer that reads sequentially."""

    def __init__(self, features: Sequence[Mapping[str, Any]], order: Sequence[int]) -> None:
        self.features, self.order = features, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self.features[self.order[position]]


def training_order(lengths: Sequence[int], *, batch_size: int, steps: int, seed: int) -> list[int]:
    """Which examples the batches of all steps hold: ``steps · batch_size`` indices, a pure function of the seed.

    Every epoch is shuffled anew, and batches are made of examples of similar length (less padding) out of 50
    batches. The samplers of the Trainer draw from the random state that all libraries share, so with them a training
    that is continued after its first epoch sees other batches than one that was not interrupted.
    """
    order: list[int] = []
    epoch, pool = 0, _BATCHES_PER_POOL * batch_size
    while len(order) < steps * batch_size:
        rng = random.Random(f"{seed}/{epoch}")
        shuffled = list(range(len(lengths)))
        rng.shuffle(shuffled)
        pools = [sorted(shuffled[s : s + pool], key=lengths.__getitem__) for s in range(0, len(shuffled), pool)]
        grouped = [index for pooled in pools for index in pooled]
        batches = [grouped[s : s + batch_size] for s in range(0, len(grouped), batch_size)]
        whole = [batch for batch in batches if len(batch) == batch_size] or batches
        rng.shuffle(whole)
        order += [i for batch in whole for i in batch]
        epoch += 1
    return order[: steps * batch_size]
