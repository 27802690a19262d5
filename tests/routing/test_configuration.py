"""``RoutingConfig``: what it takes, what it makes of it, and what it refuses, each in one line."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elastic import ElasticError, RoutingConfig, SpaceError
from hf_elastic.routing.configuration import resolve_capacity

quick = settings(max_examples=60, deadline=None, database=None)
TOKENS, UNITS = ("mlp_tokens", "attention_tokens"), ("heads", "experts")


def refusal(**fields: Any) -> str:
    with pytest.raises(SpaceError) as caught:
        RoutingConfig(**fields)
    message = str(caught.value)
    assert isinstance(caught.value, ElasticError | ValueError) and "\n" not in message
    return message


BAD = [0, 0.0, -0.1, -1, 1.5, True, False, "0.5", math.nan, math.inf, -math.inf, None, [0.5], 1 + 1e-9]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("kind", [*TOKENS, *UNITS])
def test_a_capacity_outside_of_0_to_1_is_refused_by_name_and_value(kind: str, value: Any) -> None:
    message = refusal(**{kind: [0.5, value]})
    assert message.startswith(f"{kind} has a capacity of {value!r}; it must lie in (0, 1]")
    assert ("a count of at least 1" in message) == (kind in UNITS) == ("as 0.7 for 70 %" not in message)


@pytest.mark.parametrize("value", [2, 3, 80])
def test_tokens_are_given_as_shares_and_not_as_counts(value: int) -> None:
    assert "must lie in (0, 1]" in refusal(mlp_tokens=[value])
    assert RoutingConfig(heads=[value]).heads == (value,)


@pytest.mark.parametrize("values", [0.5, 3, "0.5", True, [], ()], ids=repr)
@pytest.mark.parametrize("kind", [*TOKENS, *UNITS])
def test_capacities_come_in_a_list(kind: str, values: Any) -> None:
    assert refusal(**{kind: values}).startswith(f"{kind}={values if values != [] else ()!r} must be a list")


@pytest.mark.parametrize(("fields", "words"), [
    ({}, "RoutingConfig routes nothing; give at least one of attention_tokens, heads, mlp_tokens, experts"),
    ({"layers": [0]}, "routes nothing"),
    ({"heads": [1], "num_experts": 4}, "num_experts=4 without experts"),
    ({"experts": [1], "num_experts": 0}, "num_experts=0 must be an integer of at least 1"),
    ({"experts": [1], "num_experts": True}, "num_experts=True must be an integer"),
    ({"experts": [1], "num_experts": 2.0}, "num_experts=2.0 must be an integer"),
    ({"heads": [1], "every": 0}, "every=0 must be an integer of at least 1"),
    ({"heads": [1], "every": "2"}, "every='2' must be an integer"),
    ({"heads": [1], "router": "deep"}, "router='deep' is unknown; allowed: linear, mlp"),
    ({"heads": [1], "share": "group"}, "share='group' is unknown; allowed: layer, model"),
    ({"heads": [1], "router_hidden_size": -3}, "router_hidden_size=-3 must be an integer of at least 1"),
])  # fmt: skip
def test_a_field_that_cannot_be_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 9], ["0"], [True], [], [1.0], [[0]]], ids=repr)
def test_layers_that_are_not_there_are_refused_with_those_that_are(layers: Any) -> None:
    config = RoutingConfig(heads=[1], layers=layers)
    with pytest.raises(SpaceError, match=r"^layers=\[.*\] must name layers of 0 to 2$"):
        config.routed_layers(3)


@pytest.mark.parametrize(("fields", "wanted"), [
    ({}, (0, 1, 2, 3, 4)), ({"every": 2}, (0, 2, 4)), ({"every": 9}, (0,)), ({"layers": [3, 0, 3]}, (0, 3)),
])  # fmt: skip
def test_layers_are_all_or_every_nth_or_those_named(fields: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert RoutingConfig(heads=[1], **fields).routed_layers(5) == wanted


@quick
@given(st.integers(1, 100))
def test_every_whole_per_cent_is_a_capacity_of_tokens(percent: int) -> None:
    assert resolve_capacity("mlp_tokens", percent / 100, whole=100) == percent


@quick
@given(st.floats(0, 1, exclude_min=True))
def test_a_share_of_tokens_that_is_no_whole_per_cent_is_refused_with_the_nearest(share: float) -> None:
    exact = abs(share * 100 - round(share * 100)) <= 1e-6
    if exact and round(share * 100) >= 1:
        assert resolve_capacity("attention_tokens", share, whole=100) == round(share * 100)
        return
    with pytest.raises(SpaceError, match=r"no whole number of per cent; round it to [01]\.\d") as caught:
        resolve_capacity("attention_tokens", share, whole=100)
    advised = float(str(caught.value).rpartition(" ")[2])
    assert abs(advised - share) <= 0.01 and 0 < advised <= 1
    assert resolve_capacity("attention_tokens", advised, whole=100) == round(advised * 100)


@quick
@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(UNITS))
def test_a_count_is_itself_up_to_what_there_is(count: int, whole: int, kind: str) -> None:
    if count <= whole:
        assert resolve_capacity(kind, count, whole=whole) == count
        return
    with pytest.raises(SpaceError, match=f"^{kind}={count} is more than the {whole} there are.*; give 1 to {whole}"):
        resolve_capacity(kind, count, whole=whole)


@quick
@given(st.integers(1, 64), st.integers(1, 64))
def test_a_fraction_of_units_is_the_nearest_count_and_at_least_one(numerator: int, whole: int) -> None:
    share = numerator / 64
    found = resolve_capacity("experts", share, whole=whole)
    assert 1 <= found <= whole
    assert found == 1 or abs(found - Fraction(numerator, 64) * whole) <= Fraction(1, 2)


@quick
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(1, 8))
def test_values_ascend_and_end_at_the_whole(counts: list[int], whole: int) -> None:
    config = RoutingConfig(heads=counts)
    below = sorted({count for count in counts if count < whole})
    if max(counts) > whole:
        with pytest.raises(SpaceError, match="more than the"):
            config.values_of("heads", whole)
    elif not below:
        with pytest.raises(SpaceError, match=f"leaves nothing to choose; give one below {whole}"):
            config.values_of("heads", whole)
    else:
        assert config.values_of("heads", whole) == (*below, whole)


@quick
@given(st.integers(1, 60), st.integers(1, 60))
def test_experts_divide_the_neurons_or_are_refused_with_such_that_do(experts: int, width: int) -> None:
    config = RoutingConfig(experts=[1], num_experts=experts)
    if width % experts == 0:
        assert config.experts_of(width) == experts
        return
    with pytest.raises(SpaceError, match=f"^{experts} experts do not divide the {width} neurons") as caught:
        config.experts_of(width)
    near = str(caught.value).rpartition(": ")[2]
    assert all(width % int(count) == 0 for count in near.split(", ")) if near else width == 1


def test_the_number_of_experts_is_the_largest_count_unless_it_is_said() -> None:
    assert RoutingConfig(experts=[2, 4, 0.5]).experts_of(48) == 4
    assert RoutingConfig(experts=[2], num_experts=6).experts_of(48) == 6
    with pytest.raises(SpaceError, match="are shares of how many"):
        RoutingConfig(experts=[0.5]).experts_of(48)


fields = st.fixed_dictionaries({}, optional={
    "mlp_tokens": st.lists(st.integers(1, 100).map(lambda percent: percent / 100), min_size=1, max_size=3),
    "heads": st.lists(st.integers(1, 8), min_size=1, max_size=3), "every": st.integers(1, 4),
    "layers": st.lists(st.integers(0, 5), min_size=1, max_size=3), "share": st.sampled_from(["layer", "model"]),
    "router": st.sampled_from(["linear", "mlp"]), "router_hidden_size": st.integers(1, 9),
})  # fmt: skip


@quick
@given(fields)
def test_a_config_survives_json(drawn: dict[str, Any]) -> None:
    if "layers" in drawn:
        drawn.pop("every", None)
    config = RoutingConfig(experts=[2, 0.5], **drawn)
    assert RoutingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_field_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"^unknown RoutingConfig fields \['tokens'\]; known: attention_tokens, every"):
        RoutingConfig.from_dict({"heads": [1], "tokens": [0.5]})
    with pytest.raises(SpaceError, match="made from a dict of its fields, got float"):
        RoutingConfig.from_dict(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers=3 must be a list of numbers of layers"),
        ({"layers": [0, 1], "every": 2}, r"layers=\[0, 1\] and every=2 both say which layers are routed"),
    ],
)
def test_layers_are_said_once_and_as_a_list(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        RoutingConfig(heads=[1], **changes)
