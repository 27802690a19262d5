"""What an ElasticConfig says and how sizes are read: fractions, absolute sizes, multiples, and everything malformed."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_elastic import ElasticConfig, SpaceError
from hf_elastic.declaration import resolve_sizes, skip_kinds


def sizes(values: Any, full: int = 64, *, multiple_of: int = 1) -> tuple[int, ...]:
    return resolve_sizes(values, full, name="intermediate_size", multiple_of=multiple_of)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.25, 0.5, 1.0], (16, 32, 64)),
        ([16, 32], (16, 32, 64)),
        ([1], (1, 64)),
        ([1.0], (64,)),
        ([0.5, 32, 32, 0.5], (32, 64)),
        ([64, 16], (16, 64)),
        ((0.25,), (16, 64)),
        ({16, 32}, (16, 32, 64)),
        (range(16, 49, 16), (16, 32, 48, 64)),
        (np.array([0.25, 0.5]), (16, 32, 64)),
        ([0.001], (1, 64)),
    ],
)
def test_sizes_are_ascending_distinct_and_end_with_the_models_own(values: Any, wanted: tuple[int, ...]) -> None:
    assert sizes(values) == wanted


def test_a_size_may_come_from_a_generator() -> None:
    assert sizes(s for s in (0.5, 16)) == (16, 32, 64)


@pytest.mark.parametrize(
    ("values", "multiple_of", "wanted"),
    [
        ([0.3], 8, (16, 64)),  # 19.2 -> 16
        ([20], 8, (16, 64)),  # halves to even, as Python rounds
        ([0.01], 8, (8, 64)),  # never below one multiple
        ([63], 16, (64,)),
        ([10], 128, (64,)),  # a multiple larger than the model leaves the model
    ],
)
def test_widths_are_rounded_to_multiples(values: list[float], multiple_of: int, wanted: tuple[int, ...]) -> None:
    assert sizes(values, multiple_of=multiple_of) == wanted


def test_the_models_own_size_stays_even_if_it_is_no_multiple() -> None:
    assert sizes([0.5], 50, multiple_of=16) == (32, 50)


@given(
    full=st.integers(1, 4096),
    values=st.lists(st.floats(0, 1, exclude_min=True) | st.integers(1, 4096), min_size=1, max_size=6),
    multiple_of=st.integers(1, 200),
)
def test_resolved_sizes_fit_the_model_and_are_multiples(full: int, values: list[Any], multiple_of: int) -> None:
    values = [min(v, full) if isinstance(v, int) else v for v in values]
    found = sizes(values, full, multiple_of=multiple_of)
    assert found[-1] == full and list(found) == sorted(set(found))
    assert all(1 <= size <= full and (size % multiple_of == 0 or size == full) for size in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must be a non-empty list"),
        (0.5, "0.5 must be a non-empty list"),
        (True, "True must be a non-empty list"),
        ("0.5", "must be a non-empty list"),
        ({0: [16]}, "must be a non-empty list"),
        ([True], "True is neither a fraction nor a size"),
        (["16"], "'16' is neither"),
        ([None], "None is neither"),
        ([[16]], "neither"),
        ([0], "0 is not between 1 and the model's own 64"),
        ([-8], "-8 is not between"),
        ([65], "65 is not between 1 and the model's own 64"),
        ([0.0], "0.0 is no fraction"),
        ([1.5], "1.5 is no fraction in .0, 1.; an absolute size is an integer from 1 to 64"),
        ([-0.5], "-0.5 is no fraction"),
        ([math.nan], "nan is no fraction"),
        ([math.inf], "inf is no fraction"),
        ([16.0], "16.0 is no fraction"),
    ],
)
def test_a_size_that_cannot_be_is_named_with_what_is_allowed(values: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        sizes(values)
    assert str(caught.value).startswith("intermediate_size=") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loadability": "stok"}, r"loadability='stok' is not one of 'any', 'stock-padded', 'stock'"),
        ({"multiple_of": 0}, "multiple_of=0 must be an integer of at least 1"),
        ({"multiple_of": 8.0}, "multiple_of=8.0"),
        ({"multiple_of": True}, "multiple_of=True"),
        ({"multiple_of": None}, "multiple_of=None"),
    ],
)
def test_a_config_that_cannot_be_is_refused_when_it_is_written(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ElasticConfig(**settings)


@pytest.mark.parametrize(
    ("skip", "wanted"),
    [
        (None, set()),
        ((), set()),
        (("attention", "mlp"), {"attention", "mlp"}),
        ({0: ("layer",), 1: ("mlp",), 2: None}, {"layer", "mlp"}),
    ],
)
def test_the_kinds_of_skips_are_gathered_over_layers(skip: Any, wanted: set[str]) -> None:
    assert skip_kinds(skip) == wanted


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("mlp", r"skip='mlp' must be a list such as"),
        ({0: "mlp"}, r"skip='mlp' must be a list such as"),
        (True, r"skip=True must be a list"),
        (("mlp", 1), r"skip=\['1'\] is unknown"),
        (("ffn", "norm"), r"skip=\['ffn', 'norm'\] is unknown; a layer may leave out 'attention', 'mlp' or 'layer'"),
    ],
)
def test_a_skip_that_cannot_be_is_refused(skip: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        skip_kinds(skip)


CONFIGS = [
    ElasticConfig(intermediate_size=[0.25, 48], num_attention_heads=[1, 2]),
    ElasticConfig(intermediate_size=range(8, 33, 8), skip=["mlp"], multiple_of=8, loadability="stock-padded"),
    ElasticConfig(
        intermediate_size={0: [16], 2: (0.5,)}, skip={1: ["layer"]}, num_hidden_layers=[2], layer_order=(2, 0, 1)
    ),
    ElasticConfig(intermediate_size=np.array([0.25, 0.5]), num_key_value_heads=(x for x in (1, 2))),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_json(config: ElasticConfig) -> None:
    again = ElasticConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_a_config_cannot_change_under_a_supernet() -> None:
    listed = [16, 32]
    config = ElasticConfig(intermediate_size=listed)
    listed.append(8)
    assert config.intermediate_size == (16, 32)
    with pytest.raises(FrozenInstanceError):
        config.multiple_of = 4  # type: ignore[misc]
    assert replace(config, multiple_of=4).intermediate_size == (16, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": [1]}, r"unknown ElasticConfig fields \['width'\]; known: intermediate_size"),
        ({"intermediate_size": {"first": [1]}}, r"intermediate_size names the layers \['first'\], expected numbers"),
        ({"loadability": "all"}, "loadability='all'"),
        (None, "made from a dict of its fields, got NoneType"),
        ([1], "made from a dict of its fields, got list"),
    ],
)
def test_a_foreign_dict_is_no_config(data: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        ElasticConfig.from_dict(data)
