"""Search spaces against brute force: every property is checked on all points of small random spaces."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_elastic
from hf_elastic.errors import ArchitectureError, SpaceError
from hf_elastic.space import Architecture, Choice, Condition, SearchSpace


def layered_space(layers=2):
    choices = [Choice("num_hidden_layers", tuple(range(1, layers + 1)))]
    for i in range(layers):
        deep = Condition("num_hidden_layers", tuple(range(i + 1, layers + 1)))
        skip = f"layers.{i}.skip"
        choices += [
            Choice(skip, ("none", "attention", "mlp", "layer"), "categorical", (30, 20, 10, 0), (deep,)),
            Choice(
                f"layers.{i}.intermediate_size",
                (64, 128, 256),
                when=(deep, Condition(skip, ("none", "attention"))),
            ),
            Choice(f"layers.{i}.num_attention_heads", (2, 4), when=(deep, Condition(skip, ("none", "mlp")))),
        ]
    return SearchSpace(choices)


@st.composite
def spaces(draw):
    choices = []
    for i in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 3))
        earlier = draw(st.lists(st.sampled_from(choices), max_size=2)) if choices else []
        when = tuple(
            Condition(c.name, tuple(draw(st.lists(st.sampled_from(c.values), min_size=1, max_size=2)))) for c in earlier
        )
        if draw(st.booleans()):
            values = tuple(sorted(draw(st.sets(st.integers(-9, 9), min_size=count, max_size=count))))
            choices.append(Choice(f"c{i}", values, when=when))
        else:
            values = tuple("xyz"[:count])
            weights = tuple(draw(st.integers(0, 3)) for _ in values)
            choices.append(Choice(f"c{i}", values, "categorical", weights, when))
    return SearchSpace(choices)


def brute_force(space):
    """Canonical points by enumerating the whole product and applying the definition word by word."""
    points = {}
    for product in itertools.product(*(choice.values for choice in space.choices)):
        values = dict(zip(space.names, product, strict=True))
        effective = set()
        for choice in space.choices:
            if all(c.choice in effective and values[c.choice] in c.values for c in choice.when):
                effective.add(choice.name)
            else:
                values[choice.name] = choice.values[0]
        points[tuple(values.values())] = effective
    return points


@given(spaces())
@settings(max_examples=150, deadline=None)
def test_size_and_enumeration_equal_brute_force(space):
    points = brute_force(space)
    listed = [tuple(a.values()) for a in space.architectures()]
    assert space.size == len(points) == len(listed)
    assert set(listed) == set(points)
    for architecture in space.architectures():
        assert set(space.in_effect(architecture)) == points[tuple(architecture.values())]
        assert space.decode(space.encode(architecture)) == architecture
        assert space.canonical(architecture) == architecture
        assert architecture in space


@given(spaces(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_samples_are_canonical_and_a_function_of_the_seed(space, seed):
    first = space.sample(random.Random(seed))
    assert first in space
    assert tuple(first) == space.names
    assert first == space.sample(random.Random(seed))


@given(spaces(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_choices_without_effect_change_nothing(space, seed):
    rng = random.Random(seed)
    values = {choice.name: rng.choice(choice.values) for choice in space.choices}
    architecture = space.canonical(values)
    scrambled = dict(architecture)
    for choice in space.choices:
        if choice.name not in space.in_effect(architecture):
            scrambled[choice.name] = rng.choice(choice.values)
    assert space.canonical(scrambled) == architecture
    assert space.canonical(scrambled).digest == architecture.digest
    only_effective = {name: architecture[name] for name in space.in_effect(architecture)}
    assert space.canonical(only_effective) == architecture


@given(spaces(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_json_and_pickle_give_equal_objects_back(space, seed):
    architecture = space.sample(random.Random(seed))
    again = SearchSpace.from_json(space.to_json())
    assert again == space and again.digest == space.digest and hash(again) == hash(space)
    read = Architecture.from_json(architecture.to_json())
    assert read == architecture and hash(read) == hash(architecture) and tuple(read) == tuple(architecture)
    assert pickle.loads(pickle.dumps(architecture)) == architecture
    assert pickle.loads(pickle.dumps(space)) == space


def test_largest_architecture_takes_every_last_value():
    largest = layered_space().largest()
    assert dict(largest) == {
        "num_hidden_layers": 2,
        "layers.0.skip": "none",
        "layers.0.intermediate_size": 256,
        "layers.0.num_attention_heads": 4,
        "layers.1.skip": "none",
        "layers.1.intermediate_size": 256,
        "layers.1.num_attention_heads": 4,
    }


def test_smallest_architecture_skips_what_it_can():
    smallest = layered_space().smallest()
    assert smallest["num_hidden_layers"] == 1
    assert smallest["layers.0.skip"] == "layer"
    # Not in effect: first values, whatever is smallest.
    assert smallest["layers.1.skip"] == "none"
    assert smallest["layers.1.intermediate_size"] == 64


@pytest.mark.parametrize(
    ("values", "middle"),
    [((1,), 1), ((1, 2), 2), ((1, 2, 3), 2), ((1, 2, 3, 4), 3), ((8, 16, 24, 32, 48), 24)],
)
def test_midpoint_is_the_floor_half_of_the_descending_list(values, middle):
    assert Choice("c", values).midpoint == middle
    assert Choice("c", values).descending[(len(values) - 1) // 2] == middle


def test_parameter_counts_order_categorical_values_and_ties_go_by_position():
    choice = Choice("block", ("a", "b", "c", "d"), "categorical", (5, 9, 5, 1))
    assert choice.descending == ("b", "a", "c", "d")
    assert (choice.largest, choice.midpoint, choice.smallest) == ("b", "a", "d")


def test_size_of_spaces_too_big_to_list_is_exact():
    free = SearchSpace([Choice(f"w{i}", (1, 2, 3)) for i in range(25)] + [Choice(f"s{i}", (0, 1)) for i in range(11)])
    assert free.size == 3**25 * 2**11
    layers = 32
    assert layered_space(layers).size == sum((3 * 2 + 3 + 2 + 1) ** depth for depth in range(1, layers + 1))
    depth = Choice("depth", tuple(range(33)))
    nested = [
        Choice(f"c{i}.{j}", tuple(range(n)), when=(Condition("depth", tuple(range(i + 1, 33))),))
        for i in range(32)
        for j, n in enumerate((2, 2, 5))
    ]
    assert SearchSpace([depth, *nested]).size == sum(20**d for d in range(33))


def test_size_of_a_long_chain_of_conditions_is_exact():
    chain = [Choice("c0", (0, 1))]
    chain += [Choice(f"c{i}", (0, 1), when=(Condition(f"c{i - 1}", (1,)),)) for i in range(1, 150)]
    assert SearchSpace(chain).size == 151


def test_digests_are_equal_in_a_process_with_another_hash_seed():
    space = layered_space()
    code = (
        # The bare package: `import hf_elastic` itself registers models with transformers.
        "import sys, types; package = types.ModuleType('hf_elastic'); package.__path__ = ['hf_elastic'];"
        "sys.modules['hf_elastic'] = package;"
        "from hf_elastic.space import SearchSpace; s = SearchSpace.from_json(sys.stdin.read());"
        "a = s.midpoint(); light = not {'torch', 'transformers'} & set(sys.modules);"
        "print(s.digest, a.digest, hash(a), light)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=space.to_json(),
        cwd=Path(hf_elastic.__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    middle = space.midpoint()
    assert done.stdout.split() == [space.digest, middle.digest, str(hash(middle)), "True"]


def test_digest_of_known_contents_never_changes():
    # Storages and checkpoints of earlier versions hold these digests.
    architecture = Architecture({"b": "x", "a": 3})
    assert architecture.digest == "93f9372f578d078b26b31215fb3813798b002bd9acee528e265151bc89a6d87a"


def test_architectures_cannot_be_changed_and_work_as_keys():
    architecture = layered_space().largest()
    with pytest.raises(TypeError):
        architecture["num_hidden_layers"] = 1
    with pytest.raises(AttributeError):
        architecture._values = {}
    assert {architecture: 1}[layered_space().largest()] == 1
    assert len(repr(layered_space(48).sample(random.Random(0)))) < 250


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: Choice("c", ()), "no values"),
        (lambda: Choice("", (1,)), "non-empty name"),
        (lambda: Choice("c", (2, 1)), "strictly ascending"),
        (lambda: Choice("c", (1, 1)), "strictly ascending"),
        (lambda: Choice("c", (1, True)), "True"),
        (lambda: Choice("c", (1, 2.0)), "2.0"),
        (lambda: Choice("c", (1, 2**70)), "64-bit"),
        (lambda: Choice("c", (1, 2), "odd"), "odd"),
        (lambda: Choice("c", (1, 2), parameters=(1, 2)), "parameters="),
        (lambda: Choice("c", ("a", "b"), "categorical"), "parameters="),
        (lambda: Choice("c", ("a", "b"), "categorical", (1,)), "one parameter count per value"),
        (lambda: Choice("c", ("a", "a"), "categorical", (1, 1)), "repeats"),
        (lambda: Choice("c", ("a", 1), "categorical", (1, 1)), "strings"),
        (lambda: Choice("c", ("a",), "categorical", (-1,)), ">= 0"),
        (lambda: SearchSpace([]), "empty"),
        (lambda: SearchSpace([Choice("c", (1,)), Choice("c", (1,))]), "twice"),
        (lambda: SearchSpace([Choice("c", (1,), when=(Condition("d", (1,)),))]), "'d'"),
        (
            lambda: SearchSpace([Choice("c", (1,)), Choice("d", (1,), when=(Condition("c", (2,)),))]),
            "taking 2; it takes 1",
        ),
        (
            lambda: SearchSpace([Choice("c", (1,)), Choice("d", (1,), when=(Condition("c", ()),))]),
            "no values",
        ),
        (lambda: layered_space()["layers.7.skip"], "layers.7.skip"),
    ],
)
def test_malformed_declarations_are_named_in_one_line(declare, words):
    with pytest.raises(SpaceError) as caught:
        declare()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "cannot be 3; allowed: 1, 2"),
        ({"num_hidden_layers": 2.0}, "cannot be 2.0"),
        ({"num_hidden_layers": True}, "cannot be True"),
        ({"num_hidden_layers": [1]}, "cannot be [1]"),
        ({"num_hidden_layers": None}, "no value for 'num_hidden_layers'"),
        ({"hidden_size": 8}, "no choice 'hidden_size'"),
        ({"layers.0.skip": "layer"}, "'layers.0.intermediate_size' is not in effect"),
    ],
)
def test_architectures_of_another_space_are_named_in_one_line(change, words):
    space = layered_space()
    values = {k: v for k, v in {**space.largest(), **change}.items() if v is not None}
    with pytest.raises(ArchitectureError) as caught:
        space.validate(values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert values not in space


def test_indices_out_of_range_raise():
    space = SearchSpace([Choice("c", (1, 2))])
    for indices in ((), (2,), (-1,), (0, 0), (1.0,)):
        with pytest.raises(ArchitectureError):
            space.decode(indices)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"c": 1, "c": 2}',
        '{"c": [1]}',
        '{"c": 1.5}',
        '{"c": true}',
        '{"c": NaN}',
        '{"c": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"c": ' * 100_000,
    ],
)
def test_malformed_json_is_one_line(text):
    with pytest.raises(ArchitectureError) as caught:
        Architecture.from_json(text)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_json(text)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"choices": None},
        {"choices": []},
        {"choices": [3]},
        {"choices": [{}]},
        {"choices": [{"name": "c"}]},
        {"choices": [{"name": "c", "values": 3}]},
        {"choices": [{"name": "c", "values": [[1]]}]},
        {"choices": [{"name": "c", "values": [1], "kind": []}]},
        {"choices": [{"name": "c", "values": [1], "surprise": 1}]},
        {"choices": [{"name": "c", "values": [1], "when": [{"choice": ["d"], "values": [1]}]}]},
        {"choices": [{"name": "c", "values": [1], "when": 7}]},
    ],
)
def test_json_that_is_no_space_raises_space_errors(change):
    data = {**json.loads(layered_space().to_json()), **change}
    with pytest.raises(SpaceError):
        SearchSpace.from_json(json.dumps(data))
