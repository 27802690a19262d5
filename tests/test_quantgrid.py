"""The grid of integers against compressed-tensors' own rounding, and what any grid must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_elastic import CheckpointError, DataError
from hf_elastic.packed_format import attach_grid, detach_grid
from hf_elastic.quantgrid import Grid, grid_of

GRIDS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def weight(*, seed: int = 0, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Tensor:
    return (torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) + shift).to(dtype)


def grouped(tensor: Tensor, size: int = 8) -> Tensor:
    return tensor.float().unflatten(1, (-1, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_integers_and_values_are_those_of_compressed_tensors(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    given_weight = weight(dtype=dtype)
    grid = Grid.fit(given_weight, bits=bits, group_size=8, symmetric=symmetric)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=8)
    wide: dict[str, Any] = {"scale": grid.scale.float(), "zero_point": grid.zero, "args": args}
    theirs = quantize(given_weight.float(), dtype=torch.int8, **wide)
    assert torch.equal(grid.integers(given_weight), theirs)
    values = dequantize(theirs, scale=grid.scale, zero_point=grid.zero, args=args)
    assert values.dtype == dtype and torch.equal(grid.values(theirs), values)
    assert torch.equal(grid.nearest(given_weight), values)
    assert torch.equal(grid.integers(values), theirs), "values on the grid must give their integers back"


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_rounding_moves_nothing_in_the_range_by_more_than_half_a_step(bits: int, symmetric: bool) -> None:
    given_weight = weight(shift=0.3)
    grid = Grid.fit(given_weight, bits=bits, group_size=8, symmetric=symmetric)
    moved = grouped(grid.nearest(given_weight) - given_weight).abs()
    # An asymmetric grid rounds its zero-point too; a symmetric one clamps its largest weight by half a step.
    assert bool((moved <= (0.501 if symmetric else 1.001) * grid.scale[..., None]).all())


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_zero_is_on_every_grid(seed: int, symmetric: bool, bits: int) -> None:
    given_weight = weight(seed=seed, shift=2.0)
    given_weight[:, ::3] = 0
    grid = Grid.fit(given_weight, bits=bits, group_size=4, symmetric=symmetric)
    assert bool((grid.nearest(given_weight)[:, ::3] == 0).all())
    least, most = grid.levels
    assert least <= int(grid.integers(given_weight).min()) and int(grid.integers(given_weight).max()) <= most


def test_a_group_of_zeros_stays_zero_and_has_a_scale() -> None:
    empty = torch.zeros(2, 8)
    for symmetric in (True, False):
        grid = Grid.fit(empty, bits=4, group_size=4, symmetric=symmetric)
        assert bool((grid.scale == 1).all()) and bool((grid.nearest(empty) == 0).all())


def test_a_constant_group_is_kept_to_half_a_step() -> None:
    for value in (0.7, -0.7):
        constant = torch.full((2, 8), value)
        for symmetric in (True, False):
            grid = Grid.fit(constant, bits=4, group_size=8, symmetric=symmetric)
            assert float((grid.nearest(constant) - constant).abs().max()) <= 0.7 / 7.5 / 2 * 1.001


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_grid(bad: float) -> None:
    broken = weight()
    broken[1, 2] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        Grid.fit(broken, bits=4, group_size=8, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_module_carries_its_grid(symmetric: bool) -> None:
    layer = nn.Linear(16, 6)
    assert grid_of(layer, name="layer") is None
    grid = Grid.fit(layer.weight.data, bits=4, group_size=8, symmetric=symmetric)
    attach_grid(layer, grid)
    found = grid_of(layer, name="layer")
    assert found is not None and torch.equal(found.scale, grid.scale) and torch.equal(found.zero, grid.zero)
    assert (found.bits, found.symmetric) == (4, symmetric)
    layer.weight_scale.data[0, 0] = 0
    with pytest.raises(CheckpointError, match="layer has quantisation scales that are not positive"):
        grid_of(layer, name="layer")
    detach_grid(layer)
    assert grid_of(layer, name="layer") is None and list(layer.state_dict()) == ["weight", "bias"]
