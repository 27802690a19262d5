"""What it costs to give up one input of a linear layer and to refit the others, in NumPy."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def least_squares(rows: Tensor, weight: Tensor, *, centred: bool, ridge: float = 1e-3) -> np.ndarray:
    """Squared error that the best refit of all other inputs leaves, for each input.

    Args:
        rows: ``(N, I)``.
        weight: ``(I, O)``.
        centred: whether there is a bias, which takes means up.
        ridge: relative to the mean diagonal of ``XᵀX``, as a penalty on the change of the weights.
    """
    x, w = rows.double().numpy(), weight.double().numpy()
    x = x - x.mean(0) if centred else x
    strength = ridge * np.mean(np.sum(x * x, axis=0))
    padded = np.concatenate([x, np.sqrt(strength) * np.eye(x.shape[1])])  # the ridge as rows
    targets = padded @ w
    costs = []
    for unit in range(x.shape[1]):
        kept = np.delete(padded, unit, axis=1)
        solution = np.linalg.lstsq(kept, targets, rcond=None)[0]
        costs.append(float(((kept @ solution - targets) ** 2).sum()))
    return np.array(costs)
