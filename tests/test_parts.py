"""One layer as a part: its shape in an architecture, what it sets, what it reports, what can be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, GROUPED, inputs, supernet_of, tiny

from hf_elastic import Choice, Condition, ElasticConfig, SpaceError, make_elastic
from hf_elastic.parts import ElasticPart, LayerPart, LayerShape, join_choices


def architecture(**changes: Any) -> dict[str, Any]:
    """A point of the space of ``supernet_of("bert")`` in which layer 1 is absent at depth 2."""
    values = {"num_hidden_layers": 3}
    for i in range(3):
        values |= {
            f"layers.{i}.skip": "none",
            f"layers.{i}.intermediate_size": 48,
            f"layers.{i}.num_attention_heads": 4,
        }
    return {**values, **changes}


def test_a_layer_part_keeps_the_protocol() -> None:
    assert isinstance(supernet_of("bert").layer_parts[0], ElasticPart)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, LayerShape(48, 4, 4)),
        ({"layers.1.intermediate_size": 16, "layers.1.num_attention_heads": 2}, LayerShape(16, 2, 2)),
        ({"layers.1.skip": "attention"}, LayerShape(48, 4, 4, attention=False)),
        ({"layers.1.skip": "mlp"}, LayerShape(48, 4, 4, mlp=False)),
        ({"layers.1.skip": "layer"}, LayerShape(48, 4, 4, attention=False, mlp=False)),
        ({"num_hidden_layers": 2}, LayerShape(48, 4, 4, attention=False, mlp=False)),
        # what is not there has its own full size, so that equal functions have equal shapes
        ({"layers.1.skip": "mlp", "layers.1.intermediate_size": 16}, LayerShape(48, 4, 4, mlp=False)),
        ({"layers.1.skip": "attention", "layers.1.num_attention_heads": 1}, LayerShape(48, 4, 4, attention=False)),
        ({"layers.0.intermediate_size": 16}, LayerShape(48, 4, 4)),
    ],
)
def test_the_shape_of_a_layer_follows_its_own_choices(changes: dict[str, Any], shape: LayerShape) -> None:
    part = supernet_of("bert").layer_parts[1]
    assert part.shape(architecture(**changes)) == shape
    assert part.current == part.full == LayerShape(48, 4, 4)  # asking changed nothing


def test_query_heads_follow_their_group() -> None:
    part = supernet_of("llama", skip=None, num_hidden_layers=None).layer_parts[0]
    values = {"layers.0.num_key_value_heads": 1, "layers.0.intermediate_size": 48}
    assert part.shape(values) == LayerShape(48, 2, 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_setting_a_shape_cuts_projections_and_attributes_by_hand_calculation(family: str) -> None:
    supernet = supernet_of(family)
    part = supernet.layer_parts[0]
    row, dim = part.family, part.head_dim
    heads, groups = (2, 1) if family in GROUPED else (1, 1)
    part.apply(LayerShape(16, heads, groups))
    modules = part.projections()
    for path in row.ffn_in:
        assert modules[path].active_out_features == 16
    assert modules[row.ffn_out].active_in_features == 16
    assert modules[row.attention_out].active_in_features == heads * dim
    if family == "gpt2":
        assert modules["attn.c_attn"].active_out_features == 3 * heads * dim
    else:
        assert modules[row.query].active_out_features == heads * dim
        assert modules[row.key].active_out_features == modules[row.value].active_out_features == groups * dim
    attention = part.layer.get_submodule(row.attention)
    for name, meaning in row.attributes.items():
        assert getattr(attention, name) == (heads if meaning == "heads" else heads * dim)
    part.apply(part.full)
    assert all(m.active_out_features == m.weight.shape[0] for p, m in modules.items() if p == row.query != row.key)


@pytest.mark.parametrize("family", CONFIGS)
def test_regions_of_a_skipped_sublayer_are_empty_for_all_its_parameters_and_for_no_other(family: str) -> None:
    part = supernet_of(family).layer_parts[0]
    row = part.family
    part.apply(LayerShape(16, 4, part.full.num_key_value_heads, attention=False))
    empty = {name for name, p in part.layer.named_parameters() if part.regions().get(id(p)) == ()}
    modules = [rule.module for rule in row.skip_attention]
    assert empty == {n for n, _ in part.layer.named_parameters() if any(n.startswith(f"{m}.") for m in modules)}


def test_regions_name_the_norms_of_a_layer_only_while_it_is_skipped() -> None:
    part = supernet_of("llama").layer_parts[0]
    norm = id(part.layer.input_layernorm.weight)
    assert norm not in part.regions()
    part.apply(LayerShape(48, 4, 2, attention=False))
    assert part.regions()[norm] == ()


@pytest.mark.parametrize("family", CONFIGS)
def test_watching_sees_nothing_outside_and_the_real_sizes_inside(family: str) -> None:
    supernet = supernet_of(family)
    part = supernet.layer_parts[0]
    part.apply(LayerShape(16, 2, 1) if family in GROUPED else LayerShape(16, 1, 1))
    with part.watch() as seen, torch.no_grad():
        supernet.model(**inputs(supernet.model))
        inside = dict(seen)
    part.apply(part.full)
    with torch.no_grad():
        supernet.model(**inputs(supernet.model))
    assert (
        seen
        == inside
        == {"layers.0.intermediate_size": 16, "layers.0.num_attention_heads": 2 if family in GROUPED else 1}
    )
    assert not any(m._forward_pre_hooks for m in part.layer.modules())


def test_watching_reports_zero_for_what_did_not_run() -> None:
    supernet = supernet_of("bert")
    part = supernet.layer_parts[0]
    part.apply(LayerShape(48, 4, 4, mlp=False))
    with part.watch() as seen, torch.no_grad():
        supernet.model(**inputs(supernet.model))
    assert seen == {"layers.0.intermediate_size": 0, "layers.0.num_attention_heads": 4}


def test_choices_are_joined_once_in_the_order_of_the_parts() -> None:
    depth, first, second = (
        Choice("depth", (1, 2)),
        Choice("a", (1, 2)),
        Choice("b", (1, 2), when=(Condition("depth", (2,)),)),
    )
    assert join_choices([(depth, first), (depth, second)]) == (depth, first, second)


def test_two_parts_that_declare_a_choice_differently_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"'a' differently.*\(1, 2\).*\(1, 3\)"):
        join_choices([(Choice("a", (1, 2)),), (Choice("a", (1, 3)),)])


def test_a_part_is_not_a_submodule_of_its_layer() -> None:
    supernet = make_elastic(tiny("bert", "base"), ElasticConfig(intermediate_size=[16]))
    layer = supernet.layer_parts[0].layer
    assert isinstance(layer.elastic_parts[0], LayerPart)
    assert {name for name, _ in layer.named_children()} == {"attention", "intermediate", "output"}


@pytest.mark.parametrize(
    ("small", "large", "nested"),
    [
        (LayerShape(16, 2, 2), LayerShape(16, 2, 2), True),
        (LayerShape(16, 2, 2), LayerShape(48, 4, 4), True),
        (LayerShape(24, 2, 2), LayerShape(16, 4, 4), False),
        (LayerShape(16, 4, 4), LayerShape(48, 2, 2), False),
        (LayerShape(48, 4, 4, mlp=False), LayerShape(16, 4, 4), True),
        (LayerShape(48, 4, 4, attention=False), LayerShape(48, 2, 2), True),
        (LayerShape(16, 4, 4), LayerShape(48, 4, 4, attention=False), False),
        (LayerShape(16, 4, 4), LayerShape(48, 4, 4, mlp=False), False),
        (LayerShape(48, 4, 4, False, False), LayerShape(16, 2, 2, False, False), True),
    ],
)
def test_a_shape_is_nested_in_one_that_it_can_be_cut_from(small: LayerShape, large: LayerShape, nested: bool) -> None:
    assert small.nested_in(large) is nested
